"""What a training step does, counted and not timed: floating-point operations, tokens, saved bytes, host syncs.

    python benchmarks/counters.py          exits with 1 where a bound below is missed; part of CI, about a minute

Bounds, for one step of align's trainer (DPO, its reference cached; float32, CPU) over pairs of mixed lengths:

    operations   at most 1.05 times the floor: three times the forward pass of a model that sees every prompt once and
                 every response once, without the last token of a response, in which a query meets the keys that it
                 may see and only positions that predict a response token reach the head. To it belongs the head's
                 recomputation, one product of hidden states and head, which is the price of not keeping logits.
    tokens       prompt + chosen + rejected - 2 a pair are fed, and none of them is padding
    saved bytes  what autograd keeps for the backward, weights left out: at most 0.6 times the padded layout's
    host syncs   no value is read back from the device between the first micro-batch of a step and the last

torch's FlopCounterMode counts the products; it has no formula for products in place, nor for attention on a CPU, so
they stand here: of a causal attention the half that the kernel computes, of a masked one everything. Elementwise work
is not counted.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import torch
from common import Pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from align.choices import Layout

_OPERATIONS, _SAVED = 1.05, 0.6
_PAIRS = 8
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique2", "_unique2", "item"}


# Floating-point operations ---------------------------------------------------------------------------------------------


def attended(queries: int, keys: int, window: int | None) -> int:
    """(query, key) pairs that see each other, the queries being the last of the keys."""
    reach = window or keys
    return sum(min(at + 1, reach) for at in range(keys - queries, keys))


def floor(model: PreTrainedModel, pairs: Sequence[Pair]) -> tuple[int, int]:
    """(three times the forward pass, the head's recomputation) in floating-point operations; a multiply-add is two."""
    config = model.config
    trunk, head = common.proportions(model)
    trunk -= sum(weight.numel() for weight in model.parameters() if weight.dim() < 2)  # norms multiply nothing
    tokens = scored = seen = 0
    for pair in pairs:
        prompt, *responses = (len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))
        tokens += prompt + sum(responses) - 2
        scored += sum(responses)
        for window in layer_windows(config):
            seen += attended(prompt, prompt, window)
            seen += sum(attended(response - 1, prompt + response - 1, window) for response in responses)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 2 * 2 * width * seen  # queries with keys, weights with values
    return 3 * (2 * trunk * tokens + 2 * head * scored + attention), 2 * head * scored


def layer_windows(config: Any) -> list[int | None]:
    """The sliding window of each layer; None: it sees everything before it."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def _attention_operations(query: Any, key: Any, causal: bool, products: int) -> int:
    (batch, heads, queries, width), keys = query, key[2]
    seen = attended(queries, keys, None) if causal else queries * keys
    return 2 * products * batch * heads * width * seen


def _forward_formula(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    return _attention_operations(query, key, causal, products=2)


def _backward_formula(
    grad: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, dropout: float, causal: bool, **_: Any
) -> int:
    return _attention_operations(query, key, causal, products=5)  # the logits again, and a gradient for each factor


def _product_formula(into: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * math.prod(a) * int(b[-1])


_FORMULAS = {
    torch.ops.aten.addmm_: _product_formula,
    torch.ops.aten.baddbmm_: _product_formula,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward_formula,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_formula,
}


# What else a step does -------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Operations that read values from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in _READS:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def saved_bytes(model: PreTrainedModel) -> Iterator[dict[int, int]]:
    """{storage: bytes} of what autograd keeps meanwhile, weights left out and every storage counted once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a storage that is freed could come back under the same address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
    alive.clear()


def count(shape: str, folder: Path) -> list[str]:
    """Print the figures of a model; the bounds that it misses."""
    pairs = common.make_pairs("mixed", _PAIRS, common.SHAPES[shape]["vocab_size"], seed=0)
    saved = {}
    for layout in (Layout.padded, Layout.shared):
        policy = common.build_model(shape, None, seed=0)
        loop, steps = common.pair_loop(
            policy, pairs, {"name": "dpo", "beta": 0.1}, folder, layout=layout, pairs_per_step=_PAIRS, budget=4096
        )
        share = next(steps)
        loop.update = lambda losses: {}  # type: ignore[method-assign] - forward and backward only
        fed = common.FedTokens(policy)
        with saved_bytes(policy) as kept:
            loop.step(share)
        saved[layout] = sum(kept.values())
        fed.remove()  # it reads values
    reads = Reads()
    with reads:
        loop.step(share)
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as flops:
        loop.step(share)
    least, again = floor(policy, pairs)
    operations = flops.get_total_flops()
    tokens = sum(sum(map(len, pair.values())) - 2 for pair in pairs)
    figures = {
        "operations": f"{operations / 1e9:.2f} G, {operations / (least + again):.3f} of the floor "
        f"({least / 1e9:.2f} G and {again / 1e9:.2f} G for the head's recomputation)",
        "tokens": f"{fed.all} fed, {tokens} expected, {fed.padding} of them padding",
        "saved bytes": f"{saved[Layout.shared] / 1e6:.1f} MB, {saved[Layout.shared] / saved[Layout.padded]:.2f} of the padded layout's",
        "host syncs": f"{len(reads.seen)} in {len(share)} micro-batches {' '.join(sorted(set(reads.seen)))}",
    }
    for name, figure in figures.items():
        print(f"{shape:8}  {name:12}  {figure}")
    kept_bounds = {
        "operations": operations <= _OPERATIONS * (least + again),
        "tokens": fed.all == tokens and fed.padding == 0,
        "saved bytes": saved[Layout.shared] <= _SAVED * saved[Layout.padded],
        "host syncs": not reads.seen,
    }
    return [f"{shape}: {name} out of bounds: {figures[name]}" for name, kept in kept_bounds.items() if not kept]


def main() -> int:
    """Count for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=common.SHAPES, default=["llama", "gemma2"])
    shapes = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        missed = [line for shape in shapes for line in count(shape, Path(folder))]
    print(*missed, sep="\n", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
