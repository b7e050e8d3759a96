"""K responses to a prompt: the `hf` sampler, which computes a prompt once, against transformers' `generate`.

    python benchmarks/sampling.py                 some minutes on two cores; prints rows for RESULTS.md
    python benchmarks/sampling.py --samples 8 --prompt-tokens 256 --new-tokens 64

All get the same model, prompts, batches of prompts, temperature and top_p, and draw as many tokens: no token ends a
response. In turns A B C A B C in one process; a ratio is of CPU seconds of the same turn.

    align        all K responses at once, the prompt once
    K calls      `generate` K times, one response to each prompt of the batch at a time
    one call     `generate` once with num_return_sequences=K, which repeats the prompt before computing it

Left out: GPUs, and servers such as vLLM, whose prefix cache does the same.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from transformers import PreTrainedModel

from align.config import SamplingConfig
from align.onpolicy.samplers import Prompt, hf_sampler, seeds

_DEVIATION = 4.0  # of logits over the temperature: random weights give flat distributions, a policy is about that sure


class _Tokenizer:
    """Ids for texts, and no token that ends a response: the first is drawn by no model."""

    eos_token_id, chat_template = common.PAD, None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def legs(
    model: PreTrainedModel, prompts: list[list[int]], samples: int, new_tokens: int, top_p: float
) -> dict[str, Callable[[], int]]:
    """name -> a function that draws all responses and returns how many tokens it has drawn."""
    ids = torch.tensor(prompts)
    rest: dict[str, Any] = {"do_sample": True, "top_k": 0, "use_cache": True, "min_new_tokens": new_tokens}
    rest |= {"attention_mask": torch.ones_like(ids), "pad_token_id": common.PAD, "max_new_tokens": new_tokens}
    with torch.inference_mode():
        temperature = model(ids[:1]).logits[:, -1].std().item() / _DEVIATION
    rest |= {"temperature": temperature, "top_p": top_p}
    settings = SamplingConfig(temperature=temperature, top_p=top_p, max_new_tokens=new_tokens)

    def drawn(out: torch.Tensor) -> int:
        return out[:, ids.shape[1] :].numel()

    @torch.inference_mode()
    def calls() -> int:
        return sum(drawn(model.generate(ids, **rest)) for _ in range(samples))

    @torch.inference_mode()
    def one_call() -> int:
        return drawn(model.generate(ids, num_return_sequences=samples, **rest))

    def align() -> int:
        asked = [Prompt(token_ids=p, seeds=seeds(0, 0, str(i), samples)) for i, p in enumerate(prompts)]
        made = hf_sampler(model, _Tokenizer(), 10**9)(asked, settings)  # type: ignore[arg-type]
        return sum(len(sample.response_ids) for own in made for sample in own)

    return {"align": align, "K calls": calls, "one call": one_call}


def main() -> int:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=common.SHAPES, default=["llama", "gemma2"])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4, help="in a batch")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--top-p", type=float, default=0.95, help="at 1 nobody looks for the most probable tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{common.machine()}; {common.versions('torch', 'transformers')}; commit {common.commit()}\n")
    print("| model, tokens | responses per CPU second | against K calls | against one call |")
    print("|---|---|---|---|")
    for shape in options.model:
        model = common.build_model(shape, None, seed=0).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight[common.PAD] = 0
        generator = torch.Generator().manual_seed(0)
        size = (options.prompts, options.prompt_tokens)
        prompts = torch.randint(2, model.config.vocab_size, size, generator=generator).tolist()
        legs_ = legs(model, prompts, options.samples, options.new_tokens, options.top_p)
        seconds: dict[str, list[float]] = {name: [] for name in legs_}
        for turn in range(options.rounds + 1):
            for name, leg in legs_.items():
                start = time.process_time()
                tokens = leg()
                if tokens != options.prompts * options.samples * options.new_tokens:
                    raise RuntimeError(f"{name} has drawn {tokens} tokens")
                if turn:  # the first touches memory for the first time
                    seconds[name].append(time.process_time() - start)
        responses = options.prompts * options.samples
        speeds = " / ".join(f"{responses / statistics.median(seconds[name]):.2f}" for name in seconds)
        ratios = [
            common.median_range([theirs / ours for theirs, ours in zip(seconds[name], seconds["align"], strict=True)])
            for name in ("K calls", "one call")
        ]
        what = (
            f"{shape}, {options.prompt_tokens} + {options.new_tokens}, K = {options.samples}, {options.prompts} prompts"
        )
        print(f"| {what} | {speeds} | {ratios[0]} | {ratios[1]} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
