"""Responses of a policy to prompts, by transformers' `generate` with left padding.

Prompts enter as token ids, never as text, so there is one BOS; seeds are the caller's, so the same call gives the
same text. Left out until self-play needs it: several devices, shards, servers.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from align.model import Start, stop_token_ids, with_one_bos


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A response: its text, and the token ids that were fed and drawn, the stop token included."""

    text: str
    prompt_ids: list[int]
    response_ids: list[int]


class Sampler(Protocol):
    """Draws responses of a policy."""

    def __call__(
        self,
        prompts: list[list[int]],
        *,
        samples: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        seed: int,
    ) -> list[list[Sample]]:
        """`samples` responses to each prompt, given as token ids (`prompt_ids`)."""


def prompt_ids(prompt: list[dict[str, str]] | str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids a policy is given: a conversation through the chat template, a plain text with its BOS."""
    text: Any = prompt
    if not isinstance(prompt, str):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return with_one_bos(tokenizer(text, add_special_tokens=False).input_ids, tokenizer)


def load_sampler(start: Start, revision: str | None = None, trust_remote_code: bool = False) -> Sampler:
    """A sampler of the start model itself."""
    model = AutoModelForCausalLM.from_pretrained(
        start.path, revision=revision, trust_remote_code=trust_remote_code, use_safetensors=True, dtype=torch.float32
    )
    return sampler(model.to("cuda" if torch.cuda.is_available() else "cpu"), start)


def sampler(model: PreTrainedModel, start: Start) -> Sampler:
    """A sampler of a policy in memory, with the run's tokenizer and chat template."""
    tokenizer = start.tokenizer
    stops = stop_token_ids(tokenizer)

    @torch.inference_mode()
    def sample(
        prompts: list[list[int]], *, samples: int, temperature: float, top_p: float, max_new_tokens: int, seed: int
    ) -> list[list[Sample]]:
        made: list[list[Sample]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        was_training = model.training
        model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for at in range(0, len(prompts), 64):
                batch = by_length[at : at + 64]
                width = max(len(prompts[i]) for i in batch)
                ids = torch.full((len(batch), width), int(tokenizer.pad_token_id))  # [b, width], left padding
                mask = torch.zeros_like(ids)
                for row, i in enumerate(batch):
                    ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, width - len(prompts[i]) :] = 1
                out = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    do_sample=True,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=0,
                    max_new_tokens=max_new_tokens,
                    num_return_sequences=samples,
                    eos_token_id=stops,
                    pad_token_id=tokenizer.pad_token_id,
                    use_cache=True,
                )
                for row, drawn in enumerate(out[:, width:].tolist()):
                    i = batch[row // samples]
                    end = next((at for at, token in enumerate(drawn, 1) if token in stops), len(drawn))
                    text = tokenizer.decode(drawn[:end], skip_special_tokens=True)
                    made[i].append(Sample(text=text, prompt_ids=prompts[i], response_ids=drawn[:end]))
        model.train(was_training)
        return made

    return sample
