"""Self-play as its user meets it: what the iterations leave in the folder, how they go on, and what is refused.

The scorer is a program that counts vowels. A random model's answers differ in that, so that every prompt has a pair
that can be worked out from the texts. The lower half types real commands; `make nightly PART=selfplay` has the long ones.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import conftest
import pytest
import torch
from commands import Command, complete
from conftest import ROOT, Result, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align.onpolicy.scorers import registry

REAL = ROOT.parent / "shared" / "data"
K, TRAIN, HELD_OUT = 3, 12, 4  # samples to a prompt, prompts
SHARDS = 4  # of 4 prompts each

VOWELS = """
def count(prompt, response):
    return float(sum(letter in "aeiou" for letter in response))
"""


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with prompts to train on, others that are held out, and the scorer's program."""
    folder = tmp_path_factory.mktemp("home")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": user(f"please name {i} animals")} for i in range(TRAIN)])
    write_jsonl(folder / "held_out.jsonl", [{"prompt": user(f"please name {i} cities")} for i in range(HELD_OUT)])
    (folder / "vowels.py").write_text(VOWELS)
    return folder


@pytest.fixture(autouse=True)
def vowels(home, monkeypatch) -> None:
    """The scorer can be imported."""
    monkeypatch.syspath_prepend(str(home))


@pytest.fixture(scope="module")
def words(home, tiny_llama) -> Callable[..., list[str]]:
    """Words of self-play that samples, trains two steps and compares in about a second, and others behind them."""

    def of(folder: Path, *more: str) -> list[str]:
        return [
            "model=local",
            f"model.path={tiny_llama}",
            f"dataset.path={home / 'prompts.jsonl'}",
            f"dataset.eval_path={home / 'held_out.jsonl'}",
            "source=selfplay",
            "scorer=program",
            "scorer.path=vowels:count",
            "objective=sppo",
            "cluster=cpu",
            "cluster.cpu_threads=1",
            f"sampling.samples={K}",
            "sampling.max_new_tokens=6",
            f"sampling.prompts_per_shard={(TRAIN + HELD_OUT) // SHARDS}",
            "evaluation.samples_per_prompt=2",
            "evaluation.max_new_tokens=6",
            "train.pairs_per_step=4",
            "train.save_every_steps=1",
            "optimizer.max_steps=2",
            "optimizer.learning_rate=1e-3",
            f"run_dir={folder}",
            *more,
        ]

    return of


def typed(home: Path, *words: str, stage: str | None = None) -> Result:
    """`align <words>` in this process, or a stage alone."""
    return conftest.typed(home, *([stage] if stage else []), *words, "tracker=none")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def two(tmp_path_factory, home, words, cache) -> Path:
    """The folder of two iterations that nobody has disturbed. Tests look, and change nothing."""
    folder = tmp_path_factory.mktemp("two") / "run"
    metric = "optimized_metric=win_rate"  # of the whole: an iteration's training has no judge
    result = typed(home, *words(folder, "iterations=2", f"cache_dir={cache}", metric))
    assert result.status == 0, result.err
    return folder


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def rows(folder: Path) -> list[dict]:
    """Of all files of JSON lines in a folder, in the order of their names."""
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """Every file of JSON lines of the stages: its path and its bytes."""
    names = names or ("iter_*/responses", "iter_*/scores", "iter_*/pairs", "iter_*/evaluation/*")
    found = {file for name in names for file in folder.glob(f"{name}/*.jsonl")}
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(found)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def written(folder: Path, *patterns: str) -> dict[str, int]:
    """When each file that matches was last written, in nanoseconds."""
    files = [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def in_one_line(result: Result) -> str:
    assert result.status == 1, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("align: "), result.err
    return lines[0]


def without_speed(file: Path) -> list[dict]:
    """metrics.jsonl, without what depends on the clock."""
    made = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in made]


def without_cost(folder: Path) -> dict:
    """results.json, without what depends on the clock; the tokens stay."""
    made = read(folder / "results.json")
    return made | {"cost": made["cost"]["tokens"]}


# What two iterations leave ------------------------------------------------------------------------------------------


def test_each_iteration_leaves_its_stages_its_policy_and_its_summary(two):
    for number in (1, 2):
        folder = two / f"iter_{number}"
        assert len(rows(folder / "responses")) == len(rows(folder / "scores")) == K * (TRAIN + HELD_OUT)
        keys = [(row["iteration"], row["prompt_id"], row["k"]) for row in rows(folder / "responses")]
        assert len(set(keys)) == len(keys) and {key[0] for key in keys} == {number}
        assert keys == [(row["iteration"], row["prompt_id"], row["k"]) for row in rows(folder / "scores")]
        data = read(folder / "summary.json")["data"]
        for split, prompts in (("train", TRAIN), ("held_out", HELD_OUT)):
            pairs = len((folder / "pairs" / f"{split}.jsonl").read_text().splitlines())
            assert data[split]["prompts"] == prompts and data[split]["pairs"] == pairs
            assert pairs + sum(data[split]["dropped"].values()) == prompts
        assert read(folder / "summary.json")["steps"] == 2
        assert AutoModelForCausalLM.from_pretrained(folder / "policy").dtype == torch.float32
        assert not (folder / "checkpoints").exists()  # they are several times the policy's size
    assert read(two / "results.json")["iterations"] == [read(two / f"iter_{n}" / "summary.json") for n in (1, 2)]
    assert not list(two.rglob("*unfinished*"))


def test_the_second_iteration_is_sampled_by_the_policy_of_the_first(two, tiny_llama):
    first, second = (read(two / f"iter_{n}" / "responses" / "manifest.json") for n in (1, 2))
    assert first["policy"] != second["policy"] and first["prompts"] == second["prompts"]
    assert not same_weights(two / "iter_1" / "policy", tiny_llama)
    ours, theirs = ([row["response"] for row in rows(two / f"iter_{n}" / "responses")] for n in (1, 2))
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) > len(ours) / 2  # other seeds, another policy


@pytest.mark.parametrize("number", [1, 2])
def test_the_reference_of_an_iteration_is_the_policy_that_sampled_it(two, tiny_llama, number):
    before = two / "iter_1" / "policy" if number == 2 else tiny_llama
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(before), AutoTokenizer.from_pretrained(before)
    column = load_file(two / f"iter_{number}" / "reference.safetensors")["train"]
    for pair, made in zip(rows_of(two, number, "train")[:3], column, strict=False):
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for side, value in zip(("chosen", "rejected"), made.tolist(), strict=True):
            # As the template writes it: it strips an answer's ends.
            answer = tokenizer(pair[side].strip() + "<end_of_turn>", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert value == pytest.approx(logp, abs=1e-3)
    start = read(two / f"iter_{number}" / "start.json")  # at step 0 the policy is its reference: every pair ties
    assert start["eval/accuracy/log_ratio"] == 0.5
    assert {
        name: value for name, value in start.items() if "reward" in name and "accurac" not in name
    } == pytest.approx({name: 0.0 for name in start if "reward" in name and "accurac" not in name}, abs=1e-6)


def rows_of(folder: Path, iteration: int, split: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (folder / f"iter_{iteration}" / "pairs" / f"{split}.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("number", [1, 2])
def test_a_pair_is_the_best_against_the_worst_and_its_win_probs_are_the_mean_wins_over_all_samples(two, number):
    answers: dict[str, list[str]] = {}
    for row in rows(two / f"iter_{number}" / "responses"):
        answers.setdefault(row["prompt_id"], []).append(row["response"])
    said = {(row["prompt_id"], row["k"]): row["score"] for row in rows(two / f"iter_{number}" / "scores")}
    pairs = rows_of(two, number, "train")
    assert len(pairs) >= TRAIN - 2
    for pair in pairs:
        scores = [sum(text.count(vowel) for vowel in "aeiou") for text in answers[pair["id"]]]
        assert scores == [said[pair["id"], k] for k in range(K)]
        assert (pair["chosen_score"], pair["rejected_score"]) == (max(scores), min(scores))
        for side in ("chosen", "rejected"):
            assert pair[side] in answers[pair["id"]]
            wins = [1 / (1 + math.exp(score - pair[f"{side}_score"])) for score in scores]  # itself included: 1/2
            assert pair[f"{side}_win_prob"] == pytest.approx(sum(wins) / K)


def test_the_summary_compares_the_answers_of_three_policies_to_held_out_prompts(two):
    asked = {row["prompt_id"] for row in rows(two / "iter_1" / "responses") if row["split"] == "held_out"}
    vowels: list[dict[str, list[int]]] = []
    for number in (0, 1, 2):
        answers: dict[str, list[int]] = {}
        for row in rows(two / f"iter_{number}" / "evaluation" / "responses"):
            answers.setdefault(row["prompt_id"], []).append(sum(row["response"].count(vowel) for vowel in "aeiou"))
        assert answers.keys() == asked and all(len(own) == 2 for own in answers.values())
        vowels.append(answers)

    def rate(ours: int, theirs: int) -> float:
        games = [
            (a > b) + (a == b) / 2 for prompt in asked for a in vowels[ours][prompt] for b in vowels[theirs][prompt]
        ]
        return sum(games) / len(games)

    for number in (1, 2):
        made = read(two / f"iter_{number}" / "summary.json")
        assert made["win_rate"] == pytest.approx(rate(number, 0))
        assert made["win_rate/previous"] == pytest.approx(rate(number, number - 1))
        scores = [score for own in vowels[number].values() for score in own]
        assert made["judge_score"] == pytest.approx(sum(scores) / len(scores))
        spread = [max(own) - min(own) for own in vowels[number].values()]
        assert made["score_spread"] == pytest.approx(sum(spread) / len(spread))
        assert made["start"]["win_rate"] == 0.5 and made["start"]["kl_policy_start"] == 0
        even = [
            a == b for prompt in asked for a in vowels[number][prompt] for b in vowels[0][prompt]
        ]  # as many pairs of answers to each prompt
        assert made["ties"] == pytest.approx(sum(even) / len(even))
    results = read(two / "results.json")
    assert results["start"] == read(two / "iter_1" / "summary.json")["start"]
    assert results["trained"]["win_rate"] == pytest.approx(rate(2, 0))
    costs = [read(two / f"iter_{number}" / "results.json")["cost"] for number in (1, 2)]
    for name, whole in {"seconds": sum, "tokens": sum, "peak_memory_gib": max, "processes": max}.items():
        assert results["cost"][name] == whole(cost[name] for cost in costs)


@torch.no_grad()
def test_entropy_and_kl_are_of_a_policys_own_answers_by_its_plain_logits(two, tiny_llama):
    start = AutoModelForCausalLM.from_pretrained(tiny_llama)
    policy = AutoModelForCausalLM.from_pretrained(two / "iter_2" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    entropies, gaps, tokens = 0.0, [], 0
    for row in rows(two / "iter_2" / "evaluation" / "responses"):
        text = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        ids, own = tokenizer(text, add_special_tokens=False).input_ids, row["response_ids"]
        asked = torch.tensor([ids + own])
        ours, theirs = (
            model(input_ids=asked).logits[0, len(ids) - 1 : -1].log_softmax(-1) for model in (policy, start)
        )
        entropies -= (ours.exp() * ours).sum().item()
        gaps.append(sum((ours - theirs)[at, token].item() for at, token in enumerate(own)))
        tokens += len(own)
    made = read(two / "iter_2" / "summary.json")
    assert made["sample_entropy"] == pytest.approx(entropies / tokens, rel=1e-4)
    assert made["kl_policy_start"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-3, abs=1e-5)


# Going on -----------------------------------------------------------------------------------------------------------


def test_the_same_command_again_says_complete_and_writes_nothing(align, words, cache, two):
    before = written(two, "**/*")
    result = align(*words(two, "iterations=2", f"cache_dir={cache}"))
    assert result.status == 0 and f"This run is complete: {two}" in result.out
    assert f"model    {two / 'iter_2' / 'policy'}" in result.out
    assert written(two, "**/*") == before


@pytest.mark.slow
def test_more_iterations_go_on_from_those_that_are_done_and_rewrite_none_of_them(align, words, cache, two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "run")
    before = written(folder, "iter_[012]/**/*")
    result = align(*words(folder, "iterations=3", f"cache_dir={cache}"))
    assert result.status == 0, result.err
    assert written(folder, "iter_[012]/**/*") == before
    assert result.out.count("is complete: ") == 2
    made = read(folder / "results.json")["iterations"]
    assert [of_one["iteration"] for of_one in made] == [1, 2, 3]
    assert made[:2] == read(two / "results.json")["iterations"]
    assert f"model    {folder / 'iter_3' / 'policy'}" in result.out
    assert read(folder / "iter_3" / "start.json")["eval/accuracy/log_ratio"] == 0.5
    fewer = align(*words(folder, "iterations=2", f"cache_dir={cache}"))  # results.json is about the third
    assert "This run is complete" in fewer.out and fewer.out.splitlines()[-5:] == result.out.splitlines()[-5:]


@pytest.mark.slow
@pytest.mark.nightly
def test_one_iteration_and_then_two_is_the_same_as_two_at_once(align, words, two, tmp_path):
    for iterations in (1, 2):
        result = align(*words(tmp_path / "run", f"iterations={iterations}"))
        assert result.status == 0, result.err
    assert contents(tmp_path / "run") == contents(two)
    assert same_weights(tmp_path / "run" / "iter_2" / "policy", two / "iter_2" / "policy")
    assert without_cost(tmp_path / "run") == without_cost(two)


@pytest.mark.parametrize(
    "change, says",
    [
        ("seed=7", "seed: 42 -> 7"),
        ("sampling.temperature=0.5", "sampling.temperature: 1.0 -> 0.5"),
        ("selection.min_gap=1", "selection.min_gap: 0.0 -> 1.0"),
        ("scorer.path=math:fmod", "scorer.path: vowels:count -> math:fmod"),
        ("objective=dpo", "objective"),
    ],
)
def test_other_settings_in_the_folder_of_a_run_are_refused(refusal, words, cache, two, change, says):
    before = written(two, "**/*")
    line = refusal(*words(two, "iterations=2", f"cache_dir={cache}", "tracker=none", change))
    assert f"{two} holds another run" in line and says in line and "give another run_dir= or delete it" in line
    assert written(two, "**/*") == before


def test_how_fast_answers_are_drawn_and_scored_is_no_other_run(align, words, cache, two):
    faster = ["sampling.tokens_per_batch=100", "engine.tokens_per_micro_batch=100", "cluster.cpu_threads=2"]
    result = align(*words(two, "iterations=2", f"cache_dir={cache}", *faster))
    assert result.status == 0 and "This run is complete" in result.out


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_split_prompts_gives_each_iteration_prompts_of_its_own(align, words, tmp_path):
    folder = tmp_path / "run"
    result = align(*words(folder, "iterations=2", "source.split_prompts=true"))
    assert result.status == 0, result.err
    asked = [
        {row["prompt"][0]["content"] for row in rows(folder / f"iter_{n}" / "responses") if row["split"] == "train"}
        for n in (1, 2)
    ]
    assert [len(prompts) for prompts in asked] == [TRAIN // 2, TRAIN // 2] and not asked[0] & asked[1]
    assert asked[0] | asked[1] == {f"please name {i} animals" for i in range(TRAIN)}
    line = in_one_line(align(*words(folder, "iterations=3", "source.split_prompts=true")))  # other shares
    assert "iterations: 2 -> 3" in line


@pytest.mark.slow
def test_limits_hold_for_prompts_and_for_the_evaluation(align, words, tmp_path):
    limits = ["dataset.limit=5", "dataset.eval_limit=3", "evaluation.prompts=2", "evaluation.samples_per_prompt=3"]
    how = ["evaluation.temperature=0.7", "evaluation.top_p=0.9", "evaluation.max_new_tokens=4"]
    result = align(*words(tmp_path / "run", *limits, *how))
    assert result.status == 0, result.err
    folder = tmp_path / "run" / "iter_1"
    made = {
        split: [row for row in rows(folder / "responses") if row["split"] == split] for split in ("train", "held_out")
    }
    assert {split: len(own) for split, own in made.items()} == {"train": K * 5, "held_out": K * 3}
    for number in (0, 1):
        compared = tmp_path / "run" / f"iter_{number}" / "evaluation" / "responses"
        answers = rows(compared)
        assert len(answers) == 2 * 3 and all(len(row["response_ids"]) <= 4 for row in answers)
        manifest = read(compared / "manifest.json")
        assert (manifest["samples"], manifest["temperature"], manifest["top_p"]) == (3, 0.7, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "simpo", "wpo", "ipo"])
def test_every_objective_takes_an_iteration(align, words, tmp_path, objective):
    result = align(*words(tmp_path / "run", f"objective={objective}"))
    assert result.status == 0, result.err
    assert math.isfinite(without_speed(tmp_path / "run" / "iter_1" / "metrics.jsonl")[1]["train/loss"])
    assert 0 <= read(tmp_path / "run" / "results.json")["trained"]["win_rate"] <= 1


@pytest.mark.slow
def test_further_candidates_enter_pairs_and_are_nobody_s_opponent(align, words, tmp_path):
    best = "aeiou " * 3  # 15 vowels: more than six tokens of a random model
    answers = [{"prompt": f"please name {i} animals", "response": best} for i in range(0, TRAIN, 2)]
    write_jsonl(tmp_path / "gpt4.jsonl", answers)
    result = align(*words(tmp_path / "run", f"source.candidates.gpt4={tmp_path / 'gpt4.jsonl'}", "iterations=2"))
    assert result.status == 0, result.err
    for number in (1, 2):
        said: dict[str, list[tuple[str, float]]] = {}
        folder = tmp_path / "run" / f"iter_{number}"
        for row, score in zip(rows(folder / "responses"), rows(folder / "scores"), strict=True):
            said.setdefault(row["prompt_id"], []).append((row["origin"], score["score"]))
        pairs = rows_of(tmp_path / "run", number, "train")
        assert sum(pair["chosen_origin"] == "gpt4" for pair in pairs) == len(answers)
        for pair in pairs:
            even = int(pair["prompt"][0]["content"].split()[2]) % 2 == 0
            assert pair["chosen_origin"] == ("gpt4" if even else "policy") and pair["rejected_origin"] == "policy"
            assert [origin for origin, _ in said[pair["id"]]] == ["policy"] * K + ["gpt4"] * even
            own = [score for origin, score in said[pair["id"]] if origin == "policy"]
            for side in ("chosen", "rejected"):
                wins = [1 / (1 + math.exp(score - pair[f"{side}_score"])) for score in own]
                assert pair[f"{side}_win_prob"] == pytest.approx(sum(wins) / K)
            if even:
                assert pair["chosen"] == best and pair["chosen_score"] == 15
    compared = rows(tmp_path / "run" / "iter_1" / "evaluation" / "responses")
    assert {row["origin"] for row in compared} == {"policy"}  # only policies are compared


@pytest.mark.slow
def test_a_column_of_the_prompts_holds_further_candidates(align, words, home, tmp_path):
    with_answers = [{**row, "human": "aeiou " * 3} for row in rows_in(home / "prompts.jsonl")]
    file = write_jsonl(tmp_path / "with_answers.jsonl", with_answers)
    held_out = write_jsonl(tmp_path / "held.jsonl", [{**row, "human": ""} for row in rows_in(home / "held_out.jsonl")])
    more = [f"dataset.path={file}", f"dataset.eval_path={held_out}", "source.candidates.human=human"]
    result = align(*words(tmp_path / "run", *more))
    assert result.status == 0, result.err
    origins = {
        split: [p["chosen_origin"] for p in rows_of(tmp_path / "run", 1, split)] for split in ("train", "held_out")
    }
    assert set(origins["train"]) == {"human"} and set(origins["held_out"]) == {"policy"}


def rows_in(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_an_adapter_is_merged_before_the_next_iteration_starts_from_it(align, words, tiny_llama, tmp_path):
    pytest.importorskip("peft")
    lora = "model.lora={r: 4, lora_alpha: 12, target_modules: all-linear}"
    folder = tmp_path / "run"
    result = align(*words(folder, "iterations=2", lora, "optimizer.learning_rate=1e-2"))
    assert result.status == 0, result.err
    start, merged = weights(tiny_llama), weights(folder / "iter_1" / "merged")
    adapter = load_file(folder / "iter_1" / "policy" / "adapter_model.safetensors")
    assert not (folder / "iter_1" / "policy" / "model.safetensors").exists()
    changed = 0
    for name, value in merged.items():
        part = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = start[name]
        if f"{part}.lora_A.weight" in adapter:
            wanted = wanted + 12 / 4 * adapter[f"{part}.lora_B.weight"] @ adapter[f"{part}.lora_A.weight"]
            changed += not torch.equal(wanted, start[name])
        assert torch.allclose(value, wanted, atol=1e-6)
    assert changed == 2 * 7  # layers, linear maps in each
    assert f"path: {folder / 'iter_1' / 'merged'}" in (folder / "iter_2" / "config.yaml").read_text()
    assert read(folder / "iter_2" / "start.json")["eval/accuracy/log_ratio"] == 0.5  # a new adapter is nothing yet


# Plans --------------------------------------------------------------------------------------------------------------

# A prompt such as "please name 2 animals" is 13 tokens: <bos>, <start_of_turn>, user, a line's end, please, name, 2,
# animals, <end_of_turn>, a line's end, <start_of_turn>, model, a line's end.
# 5 + 3 prompts, 3 samples of each: 24 responses; 8 x 13 tokens of prompts; 24 x 6 to sample; 24 x (13 + 6) to score.
# 5 pairs in steps of 4 are 2 steps an epoch. Compared: 3 prompts x 2 answers x 6 tokens.
PLAN = """\
objective   SPPO(beta=0.001, target='soft')
model       local: {model}
self-play   2 iterations of 5 training prompts, the same ones each time
prompts     local: 13 tokens on average; 3 held out; dropped: 1 the prompt is there already
sample      24 responses an iteration by hf: 3 to a prompt, temperature 1, top_p 1; 104 tokens of prompts, up to 144 to sample
score       program:vowels:count: 24 responses, up to 456 tokens an iteration
train       at most 2 steps of 4 pairs an iteration
compare     3 held-out prompts, 2 responses of each policy, up to 36 tokens an iteration
processes   1 on cpu, single, fp32
memory      0.04 GiB a process: little of each (0.1M weights)
"""


@pytest.fixture
def thirteen(tmp_path) -> list[str]:
    """Words for eight prompts of thirteen tokens, three of them held out, and one that is there twice."""
    files = []
    for name, numbers in (("few.jsonl", (2, 3, 4, 2, 5, 6)), ("held.jsonl", (7,))):
        files.append(write_jsonl(tmp_path / name, [{"prompt": user(f"please name {i} animals")} for i in numbers]))
    with files[1].open("a") as file:
        file.writelines(json.dumps({"prompt": user(f"please name {i} colours")}) + "\n" for i in (2, 3))
    return [f"dataset.path={files[0]}", f"dataset.eval_path={files[1]}"]


def test_a_plan_counts_prompts_responses_and_tokens_and_starts_nothing(
    align, monkeypatch, words, thirteen, tiny_llama, tmp_path
):
    monkeypatch.setattr("align.model.load.load_policy", None)
    epoch = ["iterations=2", "optimizer.max_steps=-1", "plan=true"]
    result = align(*words(tmp_path / "run", *thirteen, *epoch))
    assert result.status == 0, result.err
    assert result.out == PLAN.format(model=tiny_llama)
    assert not (tmp_path / "run").exists()


def test_a_plan_of_split_prompts_counts_the_share_of_an_iteration(align, words, tmp_path):
    result = align(*words(tmp_path / "run", "plan=true", "iterations=3", "source.split_prompts=true"))
    assert result.status == 0, result.err
    assert "self-play   3 iterations of 4 training prompts each, none twice" in result.out  # of 12
    assert "sample      24 responses an iteration" in result.out  # 3 x (4 + 4)


def test_a_plan_of_a_pairwise_scorer_counts_ordered_pairs(align, monkeypatch, words, thirteen, tmp_path):
    from align.onpolicy.scorers.base import Identity, Kind

    class Compares:
        identity = Identity(kind=Kind.pairwise, name="compares", revision="1", template="both")

    monkeypatch.setattr(registry, "build", lambda cfg, where: Compares())
    result = align(*words(tmp_path / "run", *thirteen, "plan=true"))
    assert result.status == 0, result.err
    # 8 prompts x 3 x 2 ordered pairs of 13 tokens and two answers of 6.
    assert "score       compares: 48 ordered pairs, up to 1,200 tokens an iteration" in result.out


# What is refused ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Words behind the good ones, and what the one line must hold."""

    words: tuple[str, ...]
    says: tuple[str, ...]
    files: dict[str, list[dict]] = field(default_factory=dict)  # in the working folder


def bad(name: str, *words: str, says: tuple[str, ...], **files: list[dict]):
    named = {f"{file}.jsonl": content for file, content in files.items()}
    return pytest.param(Bad(words=words, says=says, files=named), id=name.replace(" ", "_"))


LONG = {"prompt": user("please tell me about the bear " * 50)}


CASES = [
    bad(
        "no scorer",
        "scorer=dataset",
        "scorer.path=null",
        says=(
            "answers need a scorer",
            "dataset local has no judge",
            "scorer=program scorer.path=module:function",
        ),
    ),
    bad("program without a path", "scorer.path=null", says=("scorer.path=module:function",)),
    bad("program that is not there", "scorer.path=nowhere:judge", says=("scorer.path=nowhere:judge", "nowhere")),
    bad("function that is not there", "scorer.path=vowels:consonants", says=("scorer.path=vowels:consonants",)),
    bad(
        "reward model that is not there",
        "scorer=reward_model",
        "scorer.path=./nothing",
        says=("scorer.path=./nothing",),
    ),
    bad("iterations of a dataset", "source=dataset", "iterations=2", says=("iterations=2 needs source=selfplay",)),
    bad("no iterations", "iterations=0", says=("iterations must be above 0, not 0",)),
    bad(
        "candidates of no column",
        "source.candidates.gpt4=answer",
        says=("source.candidates.gpt4=answer is no column of the prompts' rows", "prompt"),
    ),
    bad(
        "candidates of no file",
        "source.candidates.gpt4=nothing.jsonl",
        says=("source.candidates.gpt4=nothing.jsonl does not exist",),
    ),
    bad(
        "candidates for other prompts",
        "source.candidates.gpt4=others.jsonl",
        others=[{"prompt": "what else", "response": "nothing"}],
        says=("source.candidates.gpt4=others.jsonl holds no answer to any of the prompts",),
    ),
    bad(
        "candidates without answers",
        "source.candidates.gpt4=others.jsonl",
        others=[{"prompt": "please name 1 animals"}],
        says=("others.jsonl", "source.candidates.gpt4", "needs the columns prompt and response", "prompt"),
    ),
    bad(
        "candidates named as the policy",
        "source.candidates.policy=others.jsonl",
        others=[{"prompt": "please name 1 animals", "response": "cat"}],
        says=("source.candidates.policy", "take another"),
    ),
    bad("no rows", "dataset.path=p.jsonl", p=[], says=("p.jsonl is empty",)),
    bad("no prompts", "dataset.path=p.jsonl", p=[{"question": "who"}], says=("no column 'prompt'", "question")),
    bad(
        "empty prompts",
        "dataset.path=p.jsonl",
        p=[{"prompt": []}, {"prompt": user("")}],
        says=("p.jsonl: none of 2 train prompts is left",),
    ),
    bad(
        "prompts that are too long",
        "dataset.path=p.jsonl",
        "train.max_prompt_length=100",
        p=[LONG],
        says=("none of 1 train prompts is left", "longer than train.max_prompt_length (100 tokens): 1"),
    ),
    bad(
        "held-out prompts that are those to train on",
        "dataset.path=p.jsonl",
        "dataset.eval_path=p.jsonl",
        p=[{"prompt": user("a")}],
        says=("none of 1 train prompts is left", "the prompt is there already: 1"),
    ),
    bad("top_p", "sampling.top_p=2", says=("sampling.top_p must lie in (0, 1], not 2",)),
    bad("no samples", "sampling.samples=0", says=("sampling.samples must be above 0, not 0",)),
    bad("temperature", "sampling.temperature=0", says=("sampling.temperature must be above 0, not 0",)),
    bad(
        "servers of hf", "sampling.urls=[http://localhost:1]", says=("sampling.urls goes with sampling.backend=openai",)
    ),
    bad(
        "fewer prompts than a step",
        "dataset.limit=3",
        says=("an iteration trains on 3 prompts", "train.pairs_per_step=4 needs"),
    ),
    bad(
        "fewer prompts than a step when split",
        "source.split_prompts=true",
        "iterations=4",
        says=("an iteration trains on 3 prompts", "shared out over", "train.pairs_per_step=4 needs"),
    ),
    bad("source", "source=other", says=("source=other", "dataset, selfplay")),
    bad("a typo", "sampling.sample=3", says=("sampling.sample",)),
    bad("one sample", "sampling.samples=1", says=("sampling.samples=1 makes no pairs: give 2 or more",)),
    bad(
        "a temperature of preferences below 0",
        "selection.temperature=-1",
        says=("selection.temperature must be 0 or above",),
    ),
    bad("a gap below 0", "selection.min_gap=-1", says=("selection.min_gap must be 0 or above",)),
]


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(case, align, refusal, words, tmp_path):
    for name, content in case.files.items():
        write_jsonl(tmp_path / name, content)
    before = set(tmp_path.rglob("*"))
    line = refusal(*words(tmp_path / "run", *case.words, "tracker=none"))
    for fragment in case.says:
        assert fragment in line
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "change, says",
    [
        (
            ("selection.min_gap=1000",),
            "iteration 1 needs 4 train pairs at least: train pairs 0 of 12 prompts (12 scores",
        ),
        (
            ("train.pairs_per_step=12", "selection.min_gap=2.5"),
            "iteration 1 needs 12 train pairs at least: train pairs ",
        ),
        (("sampling.top_p=1e-6",), "(12 all samples are identical); held_out pairs 0 of 4"),
    ],
    ids=["none", "fewer than a step", "all alike"],
)
def test_an_iteration_with_too_few_pairs_says_why_and_what_to_try(align, words, tmp_path, change, says):
    result = align(*words(tmp_path / "run", *change))
    last = result.err.splitlines()[-1]
    assert result.status == 1 and last.startswith("align: iteration 1 needs ") and says in last
    assert "sampling.temperature" in last and "selection.min_gap" in last and "give another run_dir= then" in last
    assert len(rows(tmp_path / "run" / "iter_1" / "responses")) == K * (TRAIN + HELD_OUT)  # they were paid for


# Stages alone -------------------------------------------------------------------------------------------------------

STAGES = ("responses", "scores", "pairs")


@pytest.mark.slow
def test_an_iteration_that_collapses_ends_the_run_and_the_same_command_says_so_at_once(align, words, cache, tmp_path):
    folder = tmp_path / "run"
    absurd = ["optimizer.learning_rate=3.0", "optimizer.warmup_steps=0", "optimizer.max_steps=8", "objective=dpo"]
    first = align(*words(folder, *absurd, f"cache_dir={cache}"))
    told = first.err.splitlines()[-1]
    made = read(folder / "collapsed.json")
    assert first.status == 1 and told.startswith(
        f"align: step {made['step']}: iteration 1: mean_logp of chosen responses"
    )
    assert f"delete {folder / 'collapsed.json'}" in told and not (folder / "iter_1" / "collapsed.json").exists()
    before = written(folder, "**/*")
    again = align(*words(folder, *absurd, f"cache_dir={cache}"))
    assert (again.status, again.err.splitlines()[-1]) == (1, told)
    assert written(folder, "**/*") == before


@pytest.mark.slow
def test_the_stages_alone_make_what_the_first_iteration_made(home, words, cache, two, tmp_path):
    folder = tmp_path / "stages"
    for module, stage in (("sample", "responses"), ("annotate", "scores"), ("select", "pairs")):
        assert not (folder / stage).exists()
        result = typed(home, *words(folder, f"cache_dir={cache}"), stage=module)
        assert result.status == 0, result.err
        assert f"{stage}  {folder / stage}" in result.out
    assert contents(folder, *STAGES) == contents(two / "iter_1", *STAGES)
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(STAGES)


@pytest.mark.parametrize(
    "stage, says",
    [
        ("annotate", "responses holds no responses"),
        ("select", "holds no scores"),
    ],
)
def test_a_stage_before_its_time_says_what_is_missing(home, words, two, tmp_path, stage, says):
    folder = tmp_path / "stages"
    if "select" in stage:
        shutil.copytree(two / "iter_1" / "responses", folder / "responses")
    assert says in in_one_line(typed(home, *words(folder), stage=stage))
    assert not (folder / "pairs").exists() and not (folder / "scores").exists()


def test_a_stage_without_a_folder_is_refused(home, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in ("sample", "annotate", "select"):
        line = in_one_line(typed(home, *words(tmp_path / "run", "run_dir=null"), stage=stage))
        assert "a stage alone needs a folder: run_dir=<folder>" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_samplers_of_one_folder_share_the_prompts(home, words, tmp_path):
    """They make what one makes alone, each of them some of it."""
    more = ["sampling.prompts_per_shard=1", "sampling.max_new_tokens=32"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert typed(home, *words(alone, *more), stage="sample").status == 0
    by_whom = PROCESSES.format(log=tmp_path / "drawn")
    pids = [forked(home, words(shared, *more), tmp_path / name, "sample", by_whom) for name in "ab"]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    assert all(f"responses  {shared / 'responses'}" in (tmp_path / name).read_text() for name in "ab")
    made = rows(shared / "responses")
    assert len({(row["prompt_id"], row["k"]) for row in made}) == len(made) == K * (TRAIN + HELD_OUT)
    assert contents(shared, "responses") == contents(alone, "responses")
    drawn = (tmp_path / "drawn").read_text().split()
    assert len(drawn) == TRAIN + HELD_OUT and set(drawn) == set(map(str, pids))  # a shard is drawn once; each drew some
    assert not list(shared.rglob("*.unfinished"))


PROCESSES = """
import os
from align.files import Shards

write = Shards.write

def noted(self, number, rows):
    with open("{log}", "a") as out:
        out.write(f"{{os.getpid()}}\\n")
    write(self, number, rows)

Shards.write = noted
"""


def forked(home: Path, words: list[str], log: Path, stage: str | None = None, first: str = "") -> int:
    """Type the words in a process that has all imported already; what it prints goes to the log. Returns its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        exec(first, {})
        result = typed(home, *words, stage=stage)
        log.write_text(result.out + result.err)
        status = result.status
    finally:
        os._exit(status)


# Real prompts, trackers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tokenizer) -> Path:
    """A random Llama with a head of one number, and the built-in tokenizer with its template."""
    folder = tmp_path_factory.mktemp("reward_model")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3, **shape, **ids)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data are not on this machine")
def test_real_prompts_and_a_reward_model_go_through_end_to_end(align, words, reward_model, tmp_path):
    lengths = ["train.max_length=400", "train.max_prompt_length=300", "sampling.max_new_tokens=16"]
    data = [
        f"dataset.path={REAL / 'prompts.jsonl'}",
        "dataset.eval_path=null",
        "dataset.limit=12",
        "dataset.eval_limit=4",
    ]
    scorer = ["scorer=reward_model", f"scorer.path={reward_model}"]
    result = align(*words(tmp_path / "run", *data, *lengths, *scorer))
    assert result.status == 0, result.err
    real = {json.dumps(row["prompt"]) for row in rows_in(REAL / "prompts.jsonl")}
    folder = tmp_path / "run" / "iter_1"
    assert {json.dumps(row["prompt"]) for row in rows(folder / "responses")} <= real
    made = rows(folder / "scores")
    assert len(made) == K * (12 + 4) and all(math.isfinite(row["score"]) for row in made)
    assert {row["cut_tokens"] for row in made} == {0}
    assert read(folder / "summary.json")["data"]["train"]["pairs"] > 6
    assert "cut tokens 0" in result.out


@pytest.mark.slow
def test_both_iterations_are_one_run_of_the_tracker(align, words, tmp_path):
    from wandb_files import read_offline

    result = align(*words(tmp_path / "run", "iterations=2"), tracker="wandb")
    assert result.status == 0, result.err
    (offline,) = read_offline(tmp_path / "run")
    history = offline["history"]
    trained = [row["train/global_step"] for row in history if "train/loss" in row]
    assert trained == [1, 2, 3, 4]  # two steps of each iteration
    every = [row["train/global_step"] for row in history]
    assert every == sorted(every)
    ends = [row for row in history if "selfplay/iteration" in row]
    assert [(row["selfplay/iteration"], row["train/global_step"]) for row in ends] == [(1, 2), (2, 4)]
    for row, number in zip(ends, (1, 2), strict=True):
        made = read(tmp_path / "run" / f"iter_{number}" / "summary.json")
        figures = {f"selfplay/{name}": value for name, value in made.items() if isinstance(value, float)}
        assert {"selfplay/win_rate", "selfplay/win_rate/previous", "selfplay/score_spread"} <= figures.keys()
        assert {name: row[name] for name in figures} == pytest.approx(figures)
    assert offline["run"].run_id == (tmp_path / "run" / "wandb" / "run_id").read_text()
    assert offline["run"].job_type == "selfplay"
    assert offline["summary"]["result/win_rate"] == pytest.approx(made["win_rate"])
    assert offline["exit"] == 0


# Real commands: killed, and by several processes --------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When to kill: so long behind the first sight of a file.

    Attributes:
        stage: what the run is about then.
        sight: a pattern below the run folder.
        delay: seconds, at most.
    """

    stage: str
    sight: str
    delay: float


MOMENTS = [
    Moment("sampling", "iter_1/responses/00001-of-*.jsonl", 0.03),
    Moment("scoring", "iter_1/scores/locks/*", 0.005),
    Moment("selection", "iter_1/pairs.lock", 0.005),
    Moment("reference", "iter_1/identity.json", 0.1),
    Moment("training", "iter_1/start.json", 0.05),
    Moment("saving a checkpoint", "iter_1/checkpoints/unfinished/checkpoint-*", 0.01),
    Moment("comparing", "iter_1/evaluation/responses/locks/*", 0.1),
    Moment("sampling", "iter_2/responses/locks/00002-*", 0.03),
    Moment("saving the policy", "iter_2/policy*", 0.02),
    Moment("comparing", "iter_2/evaluation/scores/locks/*", 0.005),
]


def kill_at(moment: Moment, draw: random.Random, words: list[str], cwd: Path, folder: Path, home: Path) -> None:
    """Type it, and SIGKILL at the moment. It has not ended by then."""
    with Command([*words, "tracker=none"], cwd, PYTHONPATH=str(home)) as command:
        command.wait_for(moment.sight, folder)
        said = wait_a_little(moment, draw, folder)
        command.process.kill()
        assert command.process.wait(10) == -signal.SIGKILL, command.said()
        assert not command.left_after(10)
    print(said)


def wait_a_little(moment: Moment, draw: random.Random, folder: Path) -> str:
    delay = draw.random() * moment.delay
    time.sleep(delay)
    there = sorted(str(path.relative_to(folder)) for path in folder.glob("iter_*/*"))
    return f"killed {delay * 1000:.0f} ms behind {moment.sight} ({moment.stage}), left {there}"


def forked_until(sight: str, words: list[str], cwd: Path, folder: Path, home: Path) -> int:
    """The pid of a process that does as the words say, and has made such a file."""
    pid = forked(home, words, cwd / "forked.log")
    until = time.monotonic() + 120
    while not any(folder.glob(sight)):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < until, (cwd / "forked.log").read_text()
        time.sleep(0.001)
    return pid


def fork_and_kill_at(
    moment: Moment, draw: random.Random, words: list[str], cwd: Path, folder: Path, home: Path
) -> None:
    """As `kill_at`, in a second."""
    pid = forked_until(moment.sight, words, cwd, folder, home)
    print(wait_a_little(moment, draw, folder))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def ends_as(folder: Path, whole: Path) -> None:
    """The run has come to the very files of the one that nobody killed, and no row is there twice."""
    ours, theirs = contents(folder), contents(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    for number in (1, 2):
        for stage in ("responses", "scores"):
            keys = [(row["prompt_id"], row["k"]) for row in rows(folder / f"iter_{number}" / stage)]
            assert len(set(keys)) == len(keys) == K * (TRAIN + HELD_OUT)
        assert same_weights(folder / f"iter_{number}" / "policy", whole / f"iter_{number}" / "policy")
        a, b = (place / f"iter_{number}" / "metrics.jsonl" for place in (folder, whole))
        assert without_speed(a) == without_speed(b)
    assert without_cost(folder) == without_cost(whole)
    assert not list(folder.rglob("*unfinished*"))


def killed(moments: list[Moment], words: Callable[..., list[str]], tmp_path: Path, home: Path, whole: Path) -> None:
    """Kill real commands, one after the other; the next one ends as `whole`."""
    folder = tmp_path / "run"
    typed = words(folder, "iterations=2", f"cache_dir={tmp_path / 'cache'}")
    draw = random.Random(" ".join(moment.sight for moment in moments))
    for moment in moments:
        kill_at(moment, draw, typed, tmp_path, folder, home)
    result = complete([*typed, "tracker=none"], tmp_path, PYTHONPATH=str(home))
    assert "This run is complete" not in result.out
    ends_as(folder, whole)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "at",
    [(0, 5), pytest.param((8,), marks=pytest.mark.nightly)],
    ids=["sampling, then a checkpoint", "saving the second policy"],
)
def test_self_play_that_is_killed_goes_on_by_the_same_command_and_loses_nothing(tmp_path, words, home, two, at):
    folder = tmp_path / "run"
    again = words(folder, "iterations=2", f"cache_dir={tmp_path / 'cache'}")
    for number in at:
        fork_and_kill_at(MOMENTS[number], random.Random(number), again, tmp_path, folder, home)
    result = typed(home, *again)
    assert result.status == 0 and "This run is complete" not in result.out, result.err
    ends_as(folder, two)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_self_play_that_is_asked_to_stop_while_it_samples_stops_and_the_same_command_goes_on(tmp_path, words, home):
    folder = tmp_path / "run"
    again = words(folder, "sampling.prompts_per_shard=1")
    pid = forked_until("iter_1/responses/00001-*.jsonl", again, tmp_path, folder, home)
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGINT
    said = (tmp_path / "forked.log").read_text().splitlines()[-1]
    assert said == "align: stopped; the same command goes on where it stopped"
    made = written(folder, "iter_1/responses/*.jsonl")
    assert 2 <= len(made) < TRAIN + HELD_OUT
    assert typed(home, *again).status == 0
    assert written(folder, "iter_1/responses/*.jsonl").items() >= made.items()


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.multiprocess
@pytest.mark.parametrize("moment", MOMENTS, ids=[f"{moment.stage} of {moment.sight[:6]}" for moment in MOMENTS])
def test_self_play_that_is_killed_at_any_moment_goes_on_and_loses_nothing(tmp_path, words, home, two, moment):
    killed([moment], words, tmp_path, home, two)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.multiprocess
def test_self_play_that_is_killed_ten_times_in_a_row_loses_nothing(tmp_path, words, home, two):
    killed(MOMENTS, words, tmp_path, home, two)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_play_as_one_does(tmp_path, words, home, two, strategy):
    folder = tmp_path / "run"
    cluster = ["cluster=cpu_2", f"cluster.strategy={strategy}", "tracker=none"]
    complete(words(folder, "iterations=2", *cluster), tmp_path, PYTHONPATH=str(home))
    ours, theirs = contents(folder), contents(two)
    assert ours.keys() == theirs.keys()
    first = [name for name in ours if name.startswith(("iter_0", "iter_1/r", "iter_1/s", "iter_1/p"))]
    assert len(first) == 1 + SHARDS + 1 + 2 and all(ours[name] == theirs[name] for name in first)
    second = [name for name in ours if name.startswith("iter_2/responses")]
    assert len(second) == SHARDS and all(ours[name] == theirs[name] for name in second)  # rounding moves no sample
    for number in (1, 2):
        a, b = (weights(place / f"iter_{number}" / "policy") for place in (folder, two))
        worst = max((value - b[name]).abs().max().item() for name, value in a.items())
        print("worst weight of iteration", number, ":", worst)
        assert a.keys() == b.keys() and worst < 1e-6
    ours, theirs = read(folder / "results.json"), read(two / "results.json")
    assert ours["trained"] == pytest.approx(theirs["trained"], abs=1e-5)


# The built-in task --------------------------------------------------------------------------------------------------


def built_in(objective: str, iterations: int, tmp_path: Path) -> list[float]:
    """Win rates against the start model, one for each iteration."""
    words = [f"objective={objective}", "source=selfplay", f"iterations={iterations}", "tracker=none", "cluster=cpu"]
    result = complete([*words, f"run_dir={tmp_path / 'run'}"], tmp_path, OMP_NUM_THREADS="2")
    made = read(tmp_path / "run" / "results.json")
    rates = [of_one["win_rate"] for of_one in made["iterations"]]
    print(objective, "win rates:", rates)
    assert "win rate against the start model" in result.out and made["trained"]["win_rate"] == rates[-1]
    return rates


@pytest.mark.slow
@pytest.mark.nightly
def test_sppo_on_the_built_in_task_wins_more_with_each_of_two_iterations_and_ends_at_three_quarters(tmp_path):
    rates = built_in("sppo", 3, tmp_path)
    assert 0.5 < rates[0] < rates[1]
    assert rates[2] >= 0.75


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("objective", ["dpo", "wpo", "simpo"])
def test_other_objectives_play_the_built_in_task(tmp_path, objective):
    rates = built_in(objective, 2, tmp_path)
    assert rates[-1] > 0.5
