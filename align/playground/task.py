"""A task whose answers a program judges, "please name 3 animals, numbered", and the pairs to train on.

The judge counts different valid items, as many as the prompt asks for, in the layout that it asks for. The pairs are
the start model's own: five samples a prompt, the best against the worst, and for each the probability that it beats a
fresh sample (its mean win over the five, itself included: arXiv 2405.00675, section 5).
"""

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from inspect import getfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from align.config import SamplingConfig, SelectionConfig
from align.files import build_once, file_fingerprint, fingerprint
from align.model.chat import prompt_ids
from align.model.load import Start
from align.onpolicy.samplers import Prompt, hf_sampler, seeds
from align.onpolicy.select import Candidate, ScoredPrompt, select
from align.say import UserError

ITEMS = {
    "animals": "cat dog cow pig hen fox owl bear wolf lion deer frog",
    "colours": "red blue green black white brown pink grey gold purple yellow orange",
    "fruits": "apple pear plum grape lemon lime mango peach cherry melon banana kiwi",
    "tools": "hammer saw drill wrench pliers chisel file axe shovel rake hoe clamp",
    "cities": "paris london rome madrid berlin vienna prague athens dublin oslo cairo tokyo",
    "clothes": "hat coat shirt skirt dress scarf glove sock shoe boot belt jacket",
}
CATEGORIES = {name: items.split() for name, items in ITEMS.items()}
LAYOUTS = ("numbered", "with commas", "one per line")
ASKS = ("please name", "name", "please list", "list", "please give me", "give me", "i need", "tell me")
FILLER = "thing"  # in a lazy answer in place of an item
COUNTS = range(2, 6)
SAMPLES = 5  # a prompt
MIN_GAP = 0.3  # between the scores of a pair
TRAIN_PROMPTS, TEST_PROMPTS = 400, 176


def render(items: list[str], layout: str) -> str:
    """Write items in a layout."""
    if layout == "numbered":
        return " ".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    return ", ".join(items) if layout == "with commas" else "\n".join(items)


def read(answer: str, layout: str) -> list[str] | None:
    """Read the items of an answer in a layout; None if the answer is in another one."""
    if layout == "numbered":
        parts = re.split(r"(?:^| )(\d+)\. ", answer.strip())
        numbers, items = parts[1::2], parts[2::2]
        return items if items and not parts[0] and numbers == [str(i) for i in range(1, len(items) + 1)] else None
    separator = ", " if layout == "with commas" else "\n"
    items = answer.strip().split(separator)
    return items if all(re.fullmatch(r"[a-z]+", item) for item in items) else None


def judge(prompt: str, answer: str) -> float:
    """Score an answer in [0, 1]: the share of right items, lowered for a wrong count and halved for a wrong layout."""
    asked = re.search(rf"(\d+) ({'|'.join(CATEGORIES)}), ({'|'.join(LAYOUTS)})$", prompt)
    if asked is None:
        raise UserError(f"the built-in judge only knows prompts such as {prompts('test')[0]!r}, not {prompt[:60]!r}")
    count, category, layout = int(asked[1]), asked[2], asked[3]
    items = read(answer, layout)
    named = items if items is not None else re.findall(r"[a-z]+", answer)
    right = len(set(named) & set(CATEGORIES[category]))
    score = min(right, count) / max(len(named), count)
    return score * (1.0 if len(named) == count else 0.8) * (1.0 if items is not None else 0.5)


def prompts(split: str) -> list[str]:
    """List the prompts of a split, each in one split only: all combinations in a fixed random order."""
    every = [f"{ask} {n} {c}, {layout}" for ask in ASKS for n in COUNTS for c in CATEGORIES for layout in LAYOUTS]
    random.Random(0).shuffle(every)
    return every[:TRAIN_PROMPTS] if split == "train" else every[TRAIN_PROMPTS : TRAIN_PROMPTS + TEST_PROMPTS]


def demonstrations(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (prompt, imperfect answer). Most are wrong in some way, so that the start model gives few perfect answers.

    With many perfect answers the judge would see ties only, and could not compare.
    """
    rng = random.Random(seed)
    train = prompts("train")
    for _ in range(count):
        prompt = rng.choice(train)
        n, category, layout = re.search(r"(\d+) (\w+), (.*)$", prompt).groups()  # type: ignore[union-attr]
        items = rng.sample(CATEGORIES[category], int(n))
        if rng.random() < 0.20:  # wrong count
            items = (items + rng.sample(CATEGORIES[category], 3))[: max(1, len(items) + rng.choice((-2, -1, 1, 2)))]
        for i in range(len(items)):
            if rng.random() < 0.25:
                items[i] = FILLER
            elif rng.random() < 0.05:  # an item of another category
                items[i] = rng.choice(CATEGORIES[rng.choice(list(CATEGORIES))])
        yield prompt, render(items, layout if rng.random() > 0.35 else rng.choice(LAYOUTS))


def corpus() -> Iterator[str]:
    """Yield text with every word of the task about equally often, for the tokenizer."""
    yield from (f"user\n{prompt}\nmodel\n" for prompt in prompts("train") + prompts("test"))
    yield from (answer for _, answer in demonstrations(2000, seed=0))


def rows(split: str, start: Start, cache: Path) -> list[dict[str, Any]]:
    """Make preference pairs from the start model's own samples, with `win_prob` and score per side. Cached."""

    def build(into: Path) -> None:
        pairs = pairs_of(_answers(prompts(split), start))
        (into / "rows.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    key = fingerprint(start.fingerprint, *(file_fingerprint(Path(getfile(code))) for code in (judge, select)))
    folder = build_once(cache / "playground" / f"{split}-{key}", build)
    pairs = [json.loads(line) for line in (folder / "rows.jsonl").open()]
    if not pairs:
        raise UserError(
            f"{start.path} answers the built-in task with worthless or equal samples: use model=tiny, or dataset=local"
        )
    return pairs


def _answers(asked: list[str], start: Start) -> dict[str, list[str]]:
    """Sample the start model's answers to each prompt, at temperature 1."""
    try:
        policy = AutoModelForCausalLM.from_pretrained(start.path, use_safetensors=True, dtype=torch.float32)
    except OSError as error:
        raise UserError(
            f"the built-in pairs are the start model's own answers, and {start.path} cannot be loaded to give them: use "
            "model=tiny, or dataset=local"
        ) from error
    sample = hf_sampler(policy.to("cuda" if torch.cuda.is_available() else "cpu"), start.tokenizer)
    ids = [prompt_ids([{"role": "user", "content": prompt}], start.tokenizer) for prompt in asked]
    seeded = [Prompt(token_ids=i, seeds=seeds(0, 0, p, SAMPLES)) for i, p in zip(ids, asked, strict=True)]
    drawn = sample(seeded, SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=64))
    return {prompt: [sample.text for sample in samples] for prompt, samples in zip(asked, drawn, strict=True)}


def pairs_of(answers: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Pair the best answer to each prompt with the worst, but where their scores are close. A tie is half a win."""
    scored = [
        ScoredPrompt(id=prompt, candidates=[Candidate(text=it, length=0, score=judge(prompt, it)) for it in own])
        for prompt, own in answers.items()
    ]
    pairs, _ = select(scored, SelectionConfig(temperature=0.0, min_gap=MIN_GAP), seed=0)
    return [
        {"id": prompt, "prompt": [{"role": "user", "content": prompt}], **asdict(pair)}
        for prompt, pair in pairs.items()
    ]
