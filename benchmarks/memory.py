"""Peak working memory of a micro-batch over vocabularies and token budgets: logits are in none of it.

    python benchmarks/memory.py        about three minutes; every figure from a fresh process

Working memory is resident memory above that of weights and gradients, in the second of two backward passes, DPO on
the mixed lengths, float32, CPU. What a vocabulary adds is one gradient of the head, as large as the head itself; the
last column is what the logits of the scored tokens alone would take.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch

from align.choices import Layout

_SHAPE = "gemma2_vocab"


def measure(vocabulary: int, budget: int) -> dict[str, float]:
    """Figures of one micro-batch, in this process, in MB."""
    torch.set_num_threads(1)
    pairs = common.make_pairs("mixed", 64, vocabulary, seed=0)
    policy = common.build_model(_SHAPE, vocabulary, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        loop, steps = common.pair_loop(
            policy, pairs, {"name": "simpo"}, Path(folder), layout=Layout.shared, pairs_per_step=64, budget=budget
        )
        share = sorted(next(steps), key=lambda batch: batch.responses.fed_tokens)
    batch = share[-1]
    loop.update = lambda losses: {}  # type: ignore[method-assign] - forward and backward only
    loop.step(share[:1])  # makes the gradients
    memory = common.Memory()
    memory.start()
    loop.step([batch])
    return {
        "tokens": batch.responses.fed_tokens,
        "working": memory.peak() - memory.base,
        "head": policy.get_output_embeddings().weight.nbytes / 1e6,
        "logits": len(batch.responses.target) * vocabulary * 4 / 1e6,
    }


def main() -> int:
    """Print the table, or measure one row of it for another process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[32_000, 128_000, 256_000])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--leg", help=argparse.SUPPRESS)  # of `common.run_alone`
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.leg:
        options.into.write_text(json.dumps(measure(**json.loads(options.leg))))
        return 0
    print(f"{common.machine()}; {common.versions('torch', 'transformers')}; commit {common.commit()}\n")
    print(
        "| vocabulary | token budget | tokens fed | working memory, MB | of it the head's gradient | logits would take |"
    )
    print("|---|---|---|---|---|---|")
    for vocabulary in options.vocabulary:
        for tokens in options.tokens:
            spec: dict[str, Any] = {"vocabulary": vocabulary, "budget": tokens}
            row = common.run_alone(Path(__file__), spec, threads=1)
            cells = [vocabulary, tokens, *(f"{row[name]:.0f}" for name in ("tokens", "working", "head", "logits"))]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
