"""A policy in memory, sampled by its own forward with a key-value cache, left padding, in batches of like length.

A prompt is computed once for all its responses, which transformers' `generate` does not do: its rows of the cache are
repeated for them, and cut out again once they are done.

Randomness is one uniform number per response and token, from the response's own seed; the token is where it falls in
the cumulative probabilities. They are laid in the vocabulary's order, not by falling probability: rounding, which
differs with the batch, then moves a boundary by 1e-7 but never swaps two tokens.

Left out: weights that are divided among processes (fsdp, zero3), continuous batching, models without a cache.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from align.engine import evaluating
from align.model.chat import stop_token_ids
from align.onpolicy.batches import batches, pad
from align.onpolicy.samplers.base import Prompt, Sample, Sampler, Settings, as_sample
from align.say import UserError


def hf_sampler(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens_per_batch: int = 32768) -> Sampler:
    """Return a sampler of a model that is on its device, `engine.attach`ed or not; autocast is the caller's.

    The cache of a batch holds at most `tokens_per_batch`: prompts and the longest responses, each response its own.
    """
    stops = stop_token_ids(tokenizer)

    def sample(prompts: Sequence[Prompt], settings: Settings) -> list[list[Sample]]:
        made: list[list[Sample]] = [[] for _ in prompts]
        with evaluating(policy):
            lengths = [len(prompt.token_ids) + settings.max_new_tokens for prompt in prompts]
            for batch in batches(lengths, tokens_per_batch, [len(prompt.seeds) for prompt in prompts]):
                try:
                    drawn = iter(_draw(policy, [prompts[i] for i in batch], stops, settings))
                except torch.OutOfMemoryError as error:
                    remedy = f"set sampling.tokens_per_batch={tokens_per_batch // 2}"
                    raise UserError(f"out of memory with {tokens_per_batch} tokens in a batch: {remedy}") from error
                for i in batch:
                    made[i] = [as_sample(next(drawn), tokenizer, stops) for _ in prompts[i].seeds]
        return made

    return sample


def _draw(
    policy: PreTrainedModel, prompts: Sequence[Prompt], stops: Sequence[int], settings: Settings
) -> list[list[int]]:
    """Return the token ids of every response, those of the first prompt first; behind a stop token they mean nothing."""
    device, max_new_tokens = policy.device, settings.max_new_tokens
    stop = torch.tensor(stops, device=device)
    ids, mask = pad([prompt.token_ids for prompt in prompts], stops[0], device, side="left")  # [B, width]
    # Python's generator, since it promises the same numbers for all versions
    uniform = [random.Random(seed).random for prompt in prompts for seed in prompt.seeds]
    numbers = [[draw() for _ in range(max_new_tokens)] for draw in uniform]
    rolls = torch.tensor(numbers, dtype=torch.float64, device=device)  # [R, max_new_tokens] in [0, 1)
    of_prompt = torch.tensor([i for i, prompt in enumerate(prompts) for _ in prompt.seeds], device=device)
    drawn = torch.full((len(rolls), max_new_tokens), stops[0], device=device)  # [R, max_new_tokens]

    cache = DynamicCache(config=policy.config.get_text_config())
    logits = _next_logits(policy, cache, ids, mask, (mask.cumsum(1) - 1).clamp(min=0))[of_prompt]
    cache.reorder_cache(of_prompt)  # a row for each response from here on
    mask, position = mask[of_prompt], mask.sum(1)[of_prompt]
    row = torch.arange(len(rolls), device=device)  # of `drawn`, for each row of the cache
    going = torch.ones_like(row, dtype=torch.bool)
    for step in range(max_new_tokens):
        token = _choose(logits, rolls[row, step], settings.temperature, settings.top_p)
        drawn[row, step] = token
        going &= ~torch.isin(token, stop)
        still = int(going.sum())
        if not still or step + 1 == max_new_tokens:
            break
        if still <= len(row) // 2:  # the others would cost as much as these
            cache.reorder_cache(kept := going.nonzero()[:, 0])
            token, mask, position, row, going = (x[kept] for x in (token, mask, position, row, going))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits = _next_logits(policy, cache, token[:, None], mask, position[:, None])
        position = position + 1
    tokens: list[list[int]] = drawn.tolist()
    return tokens


def _next_logits(policy: PreTrainedModel, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Return `[b, V]` float32 logits of the token that follows each row of `ids`, which the cache then holds too."""
    options: dict[str, Any] = {"logits_to_keep": 1} if policy._supports_logits_to_keep() else {}
    out = policy(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **options
    )
    logits: Tensor = out.logits[:, -1].float()
    return logits


def _choose(logits: Tensor, roll: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the token, `[b]`, that each of the uniform numbers `[b]` falls on, by softmax of `[b, V]` logits."""
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs < _least_kept(probs, top_p), 0.0)
    reached = probs.cumsum(-1, dtype=torch.float64)  # float32 would lose the rare tokens of a large vocabulary
    total = reached[:, -1]
    if not bool(total.isfinite().all()):
        reason = "it has diverged in training; try a lower learning rate"
        raise UserError(f"the policy's logits are not finite numbers: {reason}")
    token = torch.searchsorted(reached, (roll * total)[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)  # where roll * total is rounded up to the total


def _least_kept(probs: Tensor, top_p: float) -> Tensor:
    """Return `[b, 1]` the smallest of the most probable `[b, V]` that together reach top_p."""
    words = probs.shape[-1]
    count = min(256, words)
    falling = probs.topk(count).values  # not a sort of them all, which takes longer than the model's own step
    while count < words and bool((falling.sum(-1) < top_p).any()):
        count = min(8 * count, words)
        falling = probs.topk(count).values
    of_better = falling.cumsum(-1) - falling  # the probability of all that come before a token
    return falling.masked_fill(of_better >= top_p, 1.0).amin(-1, keepdim=True)
