"""The engine on one GPU: is it right there, how fast is it, what does it hold. Torch, transformers and triton suffice.

    python benchmarks/gpu.py                 8 minutes on one GPU with room for the shape (2.6B weights: 80 GB)
    python benchmarks/gpu.py --device cpu --shape tiny --pairs-per-step 8 --tokens 4096      does it run: two minutes

Random weights and random tokens, nothing is downloaded. First every backend, layout and objective is compared, on the
device, with the model's own logits and with padded rows, in float32 and under bf16 autocast. A row whose numbers are
wrong has no speed, and the exit status is 1.

Timed are training steps: batches from token ids, forward and backward of all micro-batches, clipping, AdamW; float32
weights, bf16 autocast, the reference column computed before, entropy among the statistics as in training. The rows take
turns, every round has pairs of its own, and a speed-up compares rows of one round. Compilation comes before.

"plain" is what a careful user would write without align: transformers' model on padded rows of chosen and rejected,
sorted by length, the attention that transformers does best, the last token not fed, the head on response tokens alone,
in chunks that are computed again in the backward, the same reference column. Its batches are a fixed number of pairs,
as many as fit the token budget where they are longest.

Useful tokens are those that the work needs: every prompt once, every response but its last token. MFU counts these
alone: 6 FLOPs per weight of the trunk and token, attention over the keys that a token sees, 6 * V * H per response
token; nothing that is padded, fed twice or computed again.

Left out: several GPUs, gradient checkpointing, data loading.
"""

import argparse
import gc
import itertools
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # align need not be installed

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flex_attention_mask
from transformers.trainer_callback import PrinterCallback
from transformers.utils import is_flash_attn_2_available

from align import engine
from align.choices import Layout
from align.engine import COMPUTED, Group
from align.engine.batching import fed_tokens, plan_step
from align.launch.rank import Rank
from align.train.budget import token_budget
from objectives import Objective, Response, build

ROOT = Path(__file__).resolve().parent.parent

Statistics = dict[str, Tensor]  # [responses], in the order of the groups

#: Fields of the configuration.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma2_2b": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    },
    "llama_1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "gemma2", "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "query_pre_attn_scalar": 16, "sliding_window": 512, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    },
}  # fmt: skip

OBJECTIVES: dict[str, Objective] = {
    "dpo": build({"name": "dpo", "beta": 0.1}),
    "simpo": build({"name": "simpo", "beta": 2.0}),
    "sppo": build({"name": "sppo", "beta": 0.1, "target": "hard"}),
    "wpo": build({"name": "wpo", "base": "dpo", "beta": 0.1}),
}

MAX_LENGTH, MAX_PROMPT = 2048, 1800  # tokens, as in conf/: of prompt + response, of the prompt
_PROMPT, _RESPONSE = (190, 1.1), (300, 0.7)  # tokens on average, and the deviation of the logarithm

#: What a comparison may differ by. Float32 leaves 1e-5, a mistake makes 1e-2 and more.
#: (nats per token of the worst statistic and response; relative: loss, gradient's norm, norm of its difference)
_TOLERANCE = {torch.float32: (1e-4, 1e-4, 1e-4, 1e-3), torch.bfloat16: (0.1, 0.05, 0.05, 0.1)}

_SPEED_COLUMNS = (
    "layout", "objective", "attention", "pairs/s", "fed tokens/s", "useful tokens/s", "peak GiB", "MFU", "times plain",
    "loss",
)  # fmt: skip
_CHECK_COLUMNS = ("layout", "attention", "precision", "nats per token", "loss", "gradient norm", "gradient", "verdict")

_CHUNK = 2048  # tokens of a chunk of plain logits
_GUESS = 8192  # tokens of a micro-batch where none is known
_COMPILE_SECONDS, _MEMORY_SECONDS = 30, 40  # kept back for a row's compilation and for the memory table
_NO_MEMORY, _WRONG = "out of memory", "wrong numbers"
_GIB = 2**30


class TimeUp(BaseException):
    """The minutes are over; no `Exception`, which compilers catch."""


@dataclass
class Clock:
    """What is left of the minutes."""

    minutes: float
    began: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds."""
        return self.began + 60 * self.minutes - time.monotonic()

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the start."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", file=sys.stderr, flush=True)


# Pairs -----------------------------------------------------------------------------------------------------------------


def draw_pairs(count: int, vocabulary: int, seed: int) -> list[Group]:
    """Pairs of random tokens; each length from one of `count` equally likely slices, so that few have the means too."""
    generator = random.Random(f"{seed}, pairs")

    def lengths(mean: int, sigma: float) -> list[int]:
        normal = statistics.NormalDist(math.log(mean) - sigma**2 / 2, sigma)
        drawn = [max(2, round(math.exp(normal.inv_cdf((i + 0.5) / count)))) for i in range(count)]
        return generator.sample(drawn, count)

    pairs = []
    for prompt, *responses in zip(lengths(*_PROMPT), lengths(*_RESPONSE), lengths(*_RESPONSE), strict=True):
        prompt = min(prompt, MAX_PROMPT)
        pairs.append(
            draw_group(prompt, [min(tokens, MAX_LENGTH - prompt) for tokens in responses], vocabulary, generator)
        )
    return pairs


def draw_group(prompt: int, responses: Sequence[int], vocabulary: int, generator: random.Random) -> Group:
    """Random tokens of these lengths."""
    ids = [generator.choices(range(2, vocabulary), k=tokens) for tokens in (prompt, *responses)]
    return ids[0], ids[1:]


def lengths_of(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """(prompt, chosen, rejected) in tokens."""
    return [(len(prompt), *map(len, responses)) for prompt, responses in groups]


@dataclass(frozen=True)
class Step:
    """The pairs of a step with their reference column."""

    pairs: list[Group]
    ref_logp: Tensor  # [pairs, 2] nats


@dataclass(frozen=True)
class Needed:
    """What a step takes at least, whoever does it."""

    tokens: int
    flops: float


def needed(pairs: Sequence[Group], model: PreTrainedModel) -> Needed:
    """Tokens and FLOPs of a step that feeds every prompt once and nothing in vain."""
    config, head = model.config, model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    weights = sum(layer.weight.numel() for layer in layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [config.sliding_window if kind == "sliding_attention" else MAX_LENGTH for kind in kinds]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = seen = scored = 0
    for prompt, *responses in lengths_of(pairs):
        tokens += prompt + sum(responses) - len(responses)
        scored += sum(responses)
        for window in windows:
            seen += _seen(prompt, window)
            seen += sum(_seen(prompt + n - 1, window) - _seen(prompt, window) for n in responses)
    attention = 4 * seen * config.num_attention_heads * head_dim  # q k^T and its product with v
    return Needed(tokens, 3 * (2 * weights * tokens + attention + 2 * head.weight.numel() * scored))


def _seen(tokens: int, window: int) -> int:
    """(query, key) pairs of a causal sequence."""
    full = min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window


# Ways to compute the statistics ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """The engine in a layout, with one of its attentions for rows or one of transformers' for padded ones."""

    layout: Layout
    attention: str

    @property
    def name(self) -> str:
        """As in the tables."""
        return self.layout.name

    def select(self, model: PreTrainedModel) -> None:
        """Make the model ready."""
        engine.attach(model, self.layout)
        if self.layout is Layout.padded:
            model.set_attn_implementation(self.attention)
        else:
            model.config._attn_implementation = self.attention

    def plan(self, pairs: Sequence[Group], budget: int) -> list[list[int]]:
        """Which pairs are in which micro-batch."""
        return plan_step(lengths_of(pairs), 1, self.layout, budget)[0]

    def fed(self, pairs: Sequence[Group]) -> int:
        """Tokens of a micro-batch, padding included."""
        return fed_tokens(lengths_of(pairs), self.layout)

    def compute(self, model: PreTrainedModel, pairs: Sequence[Group], names: Sequence[str], rank: Rank) -> Statistics:
        """Statistics of the responses, under autocast, as in training."""
        batch = engine.collate(pairs, self.layout, pad_token_id=0).to(rank.device)
        with rank.autocast():
            return engine.response_statistics(model, batch, names)


@dataclass(frozen=True)
class Plain:
    """Padded rows without align; log-probabilities and lengths alone, which DPO needs."""

    attention: str
    name: str = "plain"

    def select(self, model: PreTrainedModel) -> None:
        """Make the model ready."""
        model.set_attn_implementation(self.attention)

    def plan(self, pairs: Sequence[Group], budget: int) -> list[list[int]]:
        """As many pairs as fit where they are longest, longest first."""
        order = sorted(range(len(pairs)), key=lambda i: -_longest(pairs[i]))
        number = 1
        while number < len(pairs) and self.fed([pairs[i] for i in order[: number + 1]]) <= budget:
            number += 1
        return [order[at : at + number] for at in range(0, len(pairs), number)]

    def fed(self, pairs: Sequence[Group]) -> int:
        """Tokens of a micro-batch, padding included."""
        return 2 * len(pairs) * max(map(_longest, pairs))

    def compute(self, model: PreTrainedModel, pairs: Sequence[Group], names: Sequence[str], rank: Rank) -> Statistics:
        """Padding is on the right, so causal attention needs no mask for it."""
        rows = [(prompt, response) for prompt, responses in pairs for response in responses]
        width = max(len(prompt) + len(response) - 1 for prompt, response in rows)
        ids = torch.tensor([(prompt + response[:-1] + [0] * width)[:width] for prompt, response in rows])
        starts = [i * width + len(prompt) - 1 for i, (prompt, _) in enumerate(rows)]
        at = torch.cat([torch.arange(s, s + len(response)) for s, (_, response) in zip(starts, rows, strict=True)])
        target = torch.tensor([token for _, response in rows for token in response])
        length = torch.tensor([len(response) for _, response in rows])
        with rank.autocast():
            hidden = model.base_model(input_ids=ids.to(rank.device), use_cache=False).last_hidden_state
            logp = self._head(model, hidden.flatten(0, 1)[at.to(rank.device)], target.to(rank.device))
        sums = torch.stack([part.sum() for part in logp.split(length.tolist())])
        return {"logp": sums, "length": length.to(rank.device).float()}

    def _head(self, model: PreTrainedModel, hidden: Tensor, target: Tensor) -> Tensor:
        """Log-probability of each target, `[N]`."""
        weight = model.get_output_embeddings().weight
        cap = getattr(model.config, "final_logit_softcapping", None)
        chunks = zip(hidden.split(_CHUNK), target.split(_CHUNK), strict=True)
        return torch.cat([checkpoint(_plain_logp, h, weight, t, cap, use_reentrant=False) for h, t in chunks])


Way = Ours | Plain


def _longest(pair: Group) -> int:
    prompt, responses = pair
    return len(prompt) + max(map(len, responses)) - 1


def _plain_logp(hidden: Tensor, weight: Tensor, target: Tensor, cap: float | None) -> Tensor:
    logits = functional.linear(hidden, weight).float()
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return -functional.cross_entropy(logits, target, reduction="none")


def _padded_flex(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """transformers' flex_attention in the type of autocast: rotary embeddings leave float32 behind."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return flex_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register("padded_flex", _padded_flex)
AttentionMaskInterface.register("padded_flex", flex_attention_mask)


def padded_attentions(fields: dict[str, Any], device: torch.device) -> list[str]:
    """transformers' attentions for padded rows of this shape, the best first. Its sdpa knows no soft-cap."""
    capped = "attn_logit_softcapping" in fields
    if device.type != "cuda":
        return ["eager" if capped else "sdpa"]
    flash = ["flash_attention_2"] if is_flash_attn_2_available() else []
    return [*flash, "padded_flex" if capped else "sdpa", "eager"]


def row_attentions(device: torch.device) -> list[str]:
    """The engine's attentions for rows, the default first."""
    if device.type != "cuda":
        return ["align_sdpa"]
    return [*(["align_flash"] if is_flash_attn_2_available() else []), "align_flex", "align_sdpa"]


# Models and objectives ---------------------------------------------------------------------------------------------------


def make_model(fields: dict[str, Any], attention: str, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """Randomly initialised on the device, float32, in training mode."""
    names = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "use_cache": False}
    fields = {**fields, **names, "max_position_embeddings": 2 * MAX_LENGTH}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    return model.to(device).train()


def pair_losses(objective: Objective, found: Statistics, ref_logp: Tensor) -> Tensor:
    """`[pairs]`; of responses in pairs, chosen first."""
    by_pair = {name: values.view(-1, 2) for name, values in found.items()} | {"ref_logp": ref_logp}
    return objective(*(Response(**{name: by_pair[name][:, i] for name in objective.needs}) for i in (0, 1))).loss


def wanted(objective: Objective) -> list[str]:
    """Statistics that training asks the engine for."""
    return sorted((objective.needs & COMPUTED) - {"logp", "length"} | {"entropy"})


def step_losses(
    model: PreTrainedModel, way: Way, objective: Objective, step: Step, chosen: list[int], rank: Rank
) -> Tensor:
    """Losses of some pairs of a step."""
    found = way.compute(model, [step.pairs[i] for i in chosen], wanted(objective), rank)
    return pair_losses(objective, found, step.ref_logp[chosen])


def reason(error: BaseException) -> str:
    """One short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return _NO_MEMORY
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160].replace("|", "/")


def forget(model: PreTrainedModel | None = None) -> None:
    """Give back what a failure or another row has left behind."""
    if model is not None:
        model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Is it right? ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What a way of computing gives for an objective."""

    per_token: Statistics  # [responses] nats per token
    loss: Tensor
    gradient: Tensor  # of all weights, one vector

    def distance(self, other: "Truth") -> list[float]:
        """Of `other` from this one, as _TOLERANCE."""
        norm, difference = self.gradient.norm(), (other.gradient - self.gradient).norm()
        return [
            max((values - self.per_token[name]).abs().max().item() for name, values in other.per_token.items()),
            ((other.loss - self.loss) / self.loss).abs().item(),
            ((other.gradient.norm() - norm) / norm).abs().item(),
            (difference / norm).item(),
        ]


@dataclass
class Check:
    """One way of computing in one precision."""

    way: Way
    dtype: torch.dtype
    by_logits: list[float] = field(default_factory=list)  # from the model's own logits, worst of the objectives
    by_padded: list[float] = field(default_factory=list)  # from padded rows
    fault: str | None = None

    def compare(self, made: dict[str, Truth], logits: dict[str, Truth], padded: dict[str, Truth]) -> None:
        """Fill in the distances, and the fault where one is too far."""

        def worst(expected: dict[str, Truth]) -> list[float]:
            return [max(column) for column in zip(*(expected[n].distance(made[n]) for n in made), strict=True)]

        self.by_logits, self.by_padded = worst(logits), worst(padded)
        limits = 2 * _TOLERANCE[self.dtype]
        if not all(value <= limit for value, limit in zip(self.by_logits + self.by_padded, limits, strict=True)):
            self.fault = _WRONG

    @property
    def line(self) -> str:
        """Of the table."""
        cells = [f"{a:.1e} / {b:.1e}" for a, b in zip(self.by_logits, self.by_padded, strict=True)] or ["-"] * 4
        return _row(self.way.name, self.way.attention, _short(self.dtype), *cells, self.fault or "right")


def check_shape(fields: dict[str, Any], head_dim: int, device: torch.device) -> dict[str, Any]:
    """Two layers of the family: windows shorter than the sequences, caps that bend, several tiles of a vocabulary."""
    fields = {**fields, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": head_dim}
    fields["vocab_size"] = 40009 if device.type == "cuda" else 1009
    changes: dict[str, float] = {"query_pre_attn_scalar": head_dim, "sliding_window": 64}
    changes |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 3.0}
    return {**fields, **{name: value for name, value in changes.items() if name in fields}}


def check_step(vocabulary: int, device: torch.device) -> Step:
    """Responses of one token, lengths around blocks of 128, more response tokens than a tile is high."""
    generator = random.Random("check")
    sizes = [(3, 1, 3), (170, 140, 1), (38, 1, 1), (1, 5, 9), (129, 127, 128), (200, 300, 257)]
    if device.type == "cuda":
        sizes += [(300, 700, 411), (64, 900, 640), (511, 256, 700)]
    pairs = [draw_group(prompt, responses, vocabulary, generator) for prompt, *responses in sizes]
    lengths = torch.tensor([row[1:] for row in lengths_of(pairs)])
    noise = 5 * torch.randn(lengths.shape, generator=torch.Generator().manual_seed(0))
    return Step(pairs, (-math.log(vocabulary) * lengths + noise).to(device))


def peaked(model: PreTrainedModel) -> PreTrainedModel:
    """Weights larger than usual: flat attention and flat logits would hide a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.copy_(1.5 * weight.shape[-1] ** -0.5 * noise if weight.ndim > 1 else weight + 0.1 * noise)
    return model


def own_statistics(model: PreTrainedModel, pairs: Sequence[Group], device: torch.device) -> Statistics:
    """From all logits of the model's own forward, a response at a time, nothing padded."""
    found: dict[str, list[Tensor]] = {name: [] for name in ("logp", "log_sum_sq", "log_max", "entropy")}
    rows = [(prompt, response) for prompt, responses in pairs for response in responses]
    for prompt, response in rows:
        ids, target = (torch.tensor(tokens, device=device) for tokens in (prompt + response, response))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logp = logits.log_softmax(-1)
        found["logp"].append(logp.gather(-1, target[:, None]).sum())
        found["log_sum_sq"].append((2 * logp).logsumexp(-1).sum().detach())
        found["log_max"].append(logp.amax(-1).sum().detach())
        found["entropy"].append(-(logp.exp() * logp).sum().detach())
    length = torch.tensor([float(len(response)) for _, response in rows], device=device)
    return {**{name: torch.stack(values) for name, values in found.items()}, "length": length}


def truth(model: PreTrainedModel, found: Statistics, objective: Objective, ref_logp: Tensor) -> Truth:
    """Loss and gradient by statistics that have just been computed."""
    model.zero_grad(set_to_none=True)
    loss = pair_losses(objective, found, ref_logp).mean()
    loss.backward(retain_graph=True)
    gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    per_token = {name: (values / found["length"]).detach() for name, values in found.items()}
    return Truth(per_token, loss.detach(), gradient)


def evaluate(model: PreTrainedModel, way: Way, step: Step, rank: Rank) -> dict[str, Truth]:
    """By objective; DPO alone for Plain."""
    made = {}
    for name, objective in OBJECTIVES.items():
        if isinstance(way, Ours) or name == "dpo":
            found = way.compute(model, step.pairs, wanted(objective), rank)
            made[name] = truth(model, found, objective, step.ref_logp)
    return made


def check(fields: dict[str, Any], ways: Sequence[Way], rank: Rank, dtype: torch.dtype, clock: Clock) -> Iterator[Check]:
    """Every way and objective in one precision, against float32 logits of a model that align has not touched yet."""
    # Heads of the shape itself under bf16; float32 has no tensor cores, and large heads take long to compile.
    head_dim = min(fields["head_dim"], 64) if dtype == torch.float32 else fields["head_dim"]
    shape = check_shape(fields, head_dim, rank.device)
    step = check_step(shape["vocab_size"], rank.device)
    model = peaked(make_model(shape, "eager", rank.device))
    found = own_statistics(model, step.pairs, rank.device)
    logits = {name: truth(model, found, objective, step.ref_logp) for name, objective in OBJECTIVES.items()}
    del found
    precise = replace(rank, bf16=dtype == torch.bfloat16)
    rows = Ours(Layout.padded, "eager")
    rows.select(model)
    padded = evaluate(model, rows, step, precise)
    for way in ways:
        one = Check(way, dtype)
        try:
            way.select(model)
            one.compare(evaluate(model, way, step, precise), logits, padded)
        except Exception as error:
            one.fault = reason(error)
        clock.say(f"checked {way.name}, {way.attention}, {_short(dtype)}: {one.fault or 'right'}")
        yield one


def check_all(fields: dict[str, Any], rank: Rank, clock: Clock) -> Iterator[Check]:
    """Ours in float32 and bf16, transformers' fast attentions for padded rows in bf16, which is what they are for."""
    rows = [Ours(layout, a) for a in row_attentions(rank.device) for layout in (Layout.shared, Layout.packed)]
    padded: list[Way] = [
        way for a in padded_attentions(fields, rank.device) for way in (Ours(Layout.padded, a), Plain(a))
    ]
    exact: list[Way] = [way for way in rows if "flash" not in way.attention]
    exact += [way for way in padded if way.attention in ("eager", "sdpa")]
    yield from check(fields, exact, rank, torch.float32, clock)
    if rank.bf16 or rank.device.type == "cpu":
        yield from check(fields, [*rows, *padded], rank, torch.bfloat16, clock)
    forget()
    if rank.device.type == "cuda":
        torch._dynamo.reset()  # compiled for the shapes of the check


def right_first(names: Sequence[str], checks: Sequence[Check]) -> list[str]:
    """Names of attentions, those whose numbers are wrong or that do not run behind the others."""
    faulty = {one.way.attention for one in checks if one.fault}
    return sorted(names, key=lambda name: name in faulty)


# How fast is it? ---------------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """One turn of a row."""

    seconds: float
    pairs: int
    fed: int  # tokens, padding included
    needed: Needed
    peak: int  # bytes
    loss: float


@dataclass
class Row:
    """One way of training."""

    way: Way
    objective: str
    budget: int  # tokens of a micro-batch
    estimate: float = 0.0  # seconds of a step
    rounds: list[Round] = field(default_factory=list)
    fault: str | None = None

    def __str__(self) -> str:
        return f"{self.way.name} {self.objective} ({self.way.attention})"

    def line(self, base: "Row", peak_tflops: float) -> str:
        """Of the table: median [smallest, largest] over the rounds."""
        name = (self.way.name, self.objective, self.way.attention)
        if not self.rounds:
            return _row(*name, self.fault or "no time", *"-" * 6)
        speeds = [r.pairs / r.seconds for r in self.rounds]
        shares = [r.needed.flops / r.seconds / peak_tflops / 1e12 for r in self.rounds]
        ratios = [b.seconds / a.seconds for a, b in zip(self.rounds, base.rounds, strict=False)]
        return _row(
            *name,
            _spread(speeds, ".2f"),
            f"{statistics.median(r.fed / r.seconds for r in self.rounds):.0f}",
            f"{statistics.median(r.needed.tokens / r.seconds for r in self.rounds):.0f}",
            _gib(max(r.peak for r in self.rounds)),
            _spread(shares, ".1%"),
            _spread(ratios, ".2f") if ratios else "-",
            f"{self.rounds[0].loss:.4f}" + (f"; then {self.fault}" if self.fault else ""),
        )


class Bench:
    """A model, its optimizer and the steps that all rows train on."""

    def __init__(self, model: PreTrainedModel, steps: list[Step], rank: Rank) -> None:
        self.model, self.steps, self.rank = model, steps, rank
        self.weights = [p for p in model.parameters() if p.requires_grad]
        # A rate so small that every row finds the same weights, as far as times and losses can tell.
        on_gpu = rank.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-9, weight_decay=0.0, fused=on_gpu)
        self.needed = [needed(step.pairs, model) for step in steps]

    def warm_up(self, row: Row) -> None:
        """A step that compiles what there is to compile; estimates how long the next will take."""
        row.way.select(self.model)
        seconds: list[float] = []
        for batch in row.way.plan(self.steps[0].pairs, row.budget):
            began = time.perf_counter()
            self._backward(row, self.steps[0], batch)
            synchronize(self.rank.device)
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        self._update()
        synchronize(self.rank.device)
        row.estimate = statistics.median(seconds) * len(seconds) + time.perf_counter() - began

    def train(self, row: Row, numbers: Sequence[int]) -> Round:
        """Train these steps and time them together."""
        row.way.select(self.model)
        plans = {number: row.way.plan(self.steps[number].pairs, row.budget) for number in numbers}
        gc.collect()
        reset_peak(self.rank.device)
        synchronize(self.rank.device)
        began, losses = time.perf_counter(), []
        for number, plan in plans.items():
            losses += [self._backward(row, self.steps[number], batch) for batch in plan]
            self._update()
        synchronize(self.rank.device)
        seconds = time.perf_counter() - began
        loss = torch.stack(losses).sum().item() / len(numbers)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        batches = [[self.steps[number].pairs[i] for i in batch] for number in numbers for batch in plans[number]]
        needs = [self.needed[number] for number in numbers]
        total = Needed(sum(n.tokens for n in needs), sum(n.flops for n in needs))
        return Round(
            seconds, sum(map(len, batches)), sum(map(row.way.fed, batches)), total, peak(self.rank.device), loss
        )

    def _backward(self, row: Row, step: Step, batch: list[int]) -> Tensor:
        losses = step_losses(self.model, row.way, OBJECTIVES[row.objective], step, batch, self.rank)
        loss = losses.sum() / len(step.pairs)
        loss.backward()
        return loss.detach()

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def rows_of(ours: Sequence[str], own: str, budget: int) -> list[Row]:
    """The most important first; attentions for rows, ours, and transformers' own for padded ones."""
    default, *others = ours
    shared = Ours(Layout.shared, default)
    ways: list[tuple[Way, str]] = [(Plain(own), "dpo"), (shared, "dpo")]
    ways += [(Ours(Layout.packed, default), "dpo"), (Ours(Layout.padded, own), "dpo")]
    ways += [(shared, name) for name in ("simpo", "wpo", "sppo")]
    ways += [(Ours(Layout.shared, attention), "dpo") for attention in others]
    return [Row(way, objective, budget) for way, objective in ways]


def warm_up(bench: Bench, rows: Sequence[Row], options: argparse.Namespace, clock: Clock) -> list[str]:
    """Each row's first step, while there is time for it and for the rounds of those before it; remarks."""
    remarks = []
    for row in rows:
        if row.fault:
            continue
        ready = [other for other in rows if other.estimate and not other.fault]
        slowest = max((other.estimate for other in ready), default=0.0)
        planned = options.rounds * options.steps * (slowest + sum(other.estimate for other in ready)) + slowest
        if ready and clock.left() < planned + _COMPILE_SECONDS + _MEMORY_SECONDS:
            row.fault = "no time"
            continue
        began = clock.left()
        for _ in range(3):
            try:
                bench.warm_up(row)
                row.fault = None
                break
            except Exception as error:
                row.fault = reason(error)
            forget(bench.model)
            if row.fault != _NO_MEMORY:
                break
            row.budget //= 2
            remarks.append(f"{row}: out of memory, tried again with {row.budget} tokens")
        clock.say(f"{row}: warm-up {began - clock.left():.0f} s, {row.fault or f'{row.estimate:.2f} s a step'}")
    return remarks


def measure(bench: Bench, rows: Sequence[Row], options: argparse.Namespace, clock: Clock) -> list[str]:
    """Rounds in which the rows take turns; remarks."""
    remarks = []

    def seconds() -> float:
        alive = [row.estimate for row in rows if not row.fault]
        return _MEMORY_SECONDS + 1.1 * options.steps * sum(alive)

    for number in range(options.rounds):
        for row in reversed(rows) if number == 0 else ():
            if not row.fault and clock.left() < seconds():
                row.fault = "no time"
        if number and clock.left() < seconds():
            remarks.append(f"{number} of {options.rounds} rounds: there was no time for more")
            break
        graphs = compiled_graphs()
        for row in rows:
            if row.fault:
                continue
            try:
                row.rounds.append(bench.train(row, range(number * options.steps, (number + 1) * options.steps)))
            except Exception as error:
                row.fault = reason(error)
            if row.fault:
                forget(bench.model)
                continue
            done = row.rounds[-1]
            row.estimate = done.seconds / options.steps
            clock.say(f"round {number + 1}, {row}: {done.seconds:.2f} s, loss {done.loss:.4f}")
        if compiled_graphs() > graphs:
            remarks.append(f"{compiled_graphs() - graphs} compilation(s) fell into round {number + 1}")
    return remarks


def compiled_graphs() -> int:
    """How many graphs torch.compile has made so far."""
    dynamo = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["stats"]["unique_graphs"])


def reference_column(
    model: PreTrainedModel, pairs: Sequence[Group], way: Ours, options: argparse.Namespace, seed: int
) -> Tensor:
    """The policy's own log-probabilities with some noise, as if it had trained for a while. `[pairs, 2]` nats"""
    rank = place(options.device)
    column = torch.empty(len(pairs), 2, device=rank.device)
    with engine.evaluating(model):
        for batch in way.plan(pairs, options.tokens or _GUESS):
            column[batch] = way.compute(model, [pairs[i] for i in batch], (), rank)["logp"].view(-1, 2)
    return column + 5 * torch.randn(column.shape, generator=torch.Generator().manual_seed(seed)).to(column)


def draw_steps(model: PreTrainedModel, way: Ours, options: argparse.Namespace, clock: Clock) -> tuple[list[Step], str]:
    """The pairs of every timed step, and where their reference column is from."""
    way.select(model)
    steps, origin = [], "reference column by the engine"
    for seed in range(options.rounds * options.steps):
        pairs = draw_pairs(options.pairs_per_step, model.config.vocab_size, seed)
        try:
            column = reference_column(model, pairs, way, options, seed)
        except Exception as error:
            lengths = torch.tensor([row[1:] for row in lengths_of(pairs)], device=model.device)
            column, origin = -math.log(model.config.vocab_size) * lengths, f"reference column a guess: {reason(error)}"
        steps.append(Step(pairs, column))
    clock.say(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}B weights, {len(steps)} steps drawn; {origin}")
    return steps, origin


def choose_budget(bench: Bench, way: Ours, options: argparse.Namespace) -> tuple[int, str]:
    """Tokens of a micro-batch, and where the number is from."""
    if options.tokens:
        return options.tokens, "given"
    way.select(bench.model)
    longest = sorted(bench.steps[0].pairs, key=_longest, reverse=True)
    try:
        names = wanted(OBJECTIVES["dpo"])
        moments = 8 * sum(weight.numel() for weight in bench.weights)  # AdamW's, which come with the first step
        return token_budget(bench.model, longest, way.layout, names, bench.rank, moments), "the engine's auto"
    except Exception as error:
        bench.model.zero_grad(set_to_none=True)
        return _GUESS, f"a guess, for the engine's auto failed: {reason(error)}"


# What does it hold? ------------------------------------------------------------------------------------------------------


def micro_batch_peak(model: PreTrainedModel, way: Ours, pairs: Sequence[Group], rank: Rank) -> int:
    """Bytes above weights and gradients, forward and backward."""
    step = Step(list(pairs), torch.zeros(len(pairs), 2, device=rank.device))
    for chosen in ([0], range(len(pairs))):  # the first makes the gradients
        gc.collect()
        reset_peak(rank.device)
        before = peak(rank.device)
        step_losses(model, way, OBJECTIVES["dpo"], step, list(chosen), rank).sum().backward()
        synchronize(rank.device)
    return peak(rank.device) - before


def filling(pairs: Sequence[Group], budget: int) -> list[Group]:
    """Pairs, again from the first where they do not suffice, that come near a budget of fed tokens."""
    some = [pairs[0]]
    for pair in itertools.cycle(pairs):
        if fed_tokens(lengths_of([*some, pair]), Layout.shared) > budget:
            break
        some.append(pair)
    return some


def memory_line(name: str, model: PreTrainedModel, way: Ours, budgets: Sequence[int], rank: Rank, clock: Clock) -> str:
    """A cell for each budget."""
    way.select(model)
    pairs = sorted(draw_pairs(64, model.config.vocab_size, seed=1), key=_longest)[:48]  # short enough to fill finely
    cells = []
    for budget in budgets:
        if clock.left() < 10:
            cells.append("no time")
            continue
        try:
            cells.append(_gib(micro_batch_peak(model, way, filling(pairs, budget), rank)))
        except Exception as error:
            cells.append(reason(error)[:60])
        forget(model)
    scored = sum(sum(row[1:]) for row in lengths_of(filling(pairs, budgets[-1])))
    return _row(name, *cells, f"{4 * scored * model.config.vocab_size / _GIB:.1f}")


def memory_table(bench: Bench, fields: dict[str, Any], way: Ours, clock: Clock) -> list[str]:
    """Budgets by vocabularies on a trunk of two layers, and the shape itself."""
    rank, on_gpu = bench.rank, bench.rank.device.type == "cuda"
    budgets = (4096, 8192, 16384, 32768) if on_gpu else (1024, 2048)
    lines = _head(
        "peak GiB of a micro-batch of", *(f"{budget} tokens" for budget in budgets), "logits of the last, fp32"
    )
    small = {**fields, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    for vocabulary in (32_000, 128_000, 256_000) if on_gpu else (1000, 4000):
        model = make_model({**small, "vocab_size": vocabulary}, "eager", rank.device)
        lines.append(memory_line(f"2 layers, {vocabulary} words", model, way, budgets, rank, clock))
    lines.append(memory_line("the shape above", bench.model, way, budgets, rank, clock))
    return lines


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Count the peak from what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Bytes allocated at most since `reset_peak`; 0 on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


# TRL ---------------------------------------------------------------------------------------------------------------------


def trl_line(fields: dict[str, Any], own: str, steps: Sequence[Step], budget: int, rank: Rank) -> str:
    """TRL's DPOTrainer on the same steps, if TRL is installed; by itself, not in turns."""
    if any(find_spec(name) is None for name in ("trl", "datasets", "accelerate")):
        return "TRL is not installed, so there is no row of its DPOTrainer."
    per_step, per_batch = len(steps[0].pairs), 1
    while 4 * per_batch * MAX_LENGTH <= budget and per_step % (2 * per_batch) == 0:
        per_batch *= 2
    try:
        seconds = trl_seconds(fields, own, steps, per_batch, rank)
    except Exception as error:
        return f"TRL's DPOTrainer failed: {reason(error)}"
    speeds = _spread([per_step / s for s in seconds], ".2f")
    return f"TRL {version('trl')}'s DPOTrainer, {own}, {per_batch} pairs held at once, not in turns: {speeds} pairs/s."


def trl_seconds(fields: dict[str, Any], own: str, steps: Sequence[Step], per_batch: int, rank: Rank) -> list[float]:
    """Of every step but the first. Token ids and reference column are handed over as TRL itself would have made them."""
    import datasets
    import trl
    from tokenizers import Tokenizer, models

    rows = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (prompt, *responses), strict=True))
        | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), column, strict=True))
        for step in steps
        for (prompt, responses), column in zip(step.pairs, step.ref_logp.tolist(), strict=True)
    ]
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    ends: list[float] = []

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    class Times(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(rank.device)
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=per_batch,
            gradient_accumulation_steps=len(steps[0].pairs) // per_batch,
            max_steps=len(steps),
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            bf16=rank.bf16,
            use_cpu=rank.device.type == "cpu",
            optim="adamw_torch_fused" if rank.device.type == "cuda" else "adamw_torch",
            learning_rate=1e-9,
            max_length=None,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            make_model(fields, own, rank.device),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Times()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [after - before for before, after in itertools.pairwise(ends)]


# The whole ---------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What there is to print, whenever it ends."""

    options: argparse.Namespace
    title: str = ""
    about: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    memory: list[str] = field(default_factory=list)
    trl: str = ""

    def status(self) -> int:
        """0 if every check came out right. An attention of transformers may fail to run, not to be right."""
        faults = [one for one in self.checks if one.fault == _WRONG or (one.fault and "align" in one.way.attention)]
        return int(bool(faults) or not self.checks)

    def lines(self) -> list[str]:
        """Markdown."""
        lines = [f"### {self.title}", "", *(f"- {line}" for line in self.about)]
        if self.rows:
            lines += ["", *_head(*_SPEED_COLUMNS)]
            lines += [row.line(self.rows[0], self.options.peak_tflops) for row in self.rows]
        if self.memory:
            lines += ["", "Memory of a micro-batch above weights and gradients, layout shared:", "", *self.memory]
        if self.checks:
            tolerances = "; ".join(f"{_short(dtype)} {', '.join(map(str, most))}" for dtype, most in _TOLERANCE.items())
            lines += [
                "",
                "Largest distance, over all objectives, from the model's own float32 logits / from padded rows",
            ]
            lines += [f"(allowed: {tolerances}):", "", *_head(*_CHECK_COLUMNS), *(one.line for one in self.checks)]
        return [*lines, *(["", self.trl] if self.trl else [])]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> list[str]:
    return [_row(*cells), f"|{'---|' * len(cells)}"]


def _spread(values: Sequence[float], form: str) -> str:
    middle, low, high = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]"


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f}" if count else "-"


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def machine(device: torch.device) -> str:
    """Device, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, which says nothing about a GPU"
    versions = []
    for package in ("torch", "transformers", "triton", "flash_attn"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"no {package}")
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return f"{name}; {', '.join(versions)}; commit {commit}"


def lengths_line(steps: Sequence[Step], options: argparse.Namespace) -> str:
    """What the steps are."""
    lengths = [row for step in steps for row in lengths_of(step.pairs)]
    prompt, chosen, rejected = (statistics.mean(row[i] for row in lengths) for i in range(3))
    longest = max(prompt + max(responses) for prompt, *responses in lengths)
    return (
        f"{options.pairs_per_step} pairs a step, mean tokens of prompt {prompt:.0f}, chosen {chosen:.0f}, rejected "
        f"{rejected:.0f}, longest sequence {longest}; {options.rounds} round(s) of {options.steps} step(s), rows in turns; "
        "median [smallest, largest]"
    )


def run(report: Report, clock: Clock) -> int:
    """Everything, in the order of its importance; the exit status."""
    options, fields = report.options, SHAPES[report.options.shape]
    rank = place(options.device)
    report.title = f"{options.shape}, {machine(rank.device)}"
    if rank.device.type == "cpu":
        report.about.append("flex_attention has no backward on a CPU, flash-attn needs a GPU: neither is here")
    for one in check_all(fields, rank, clock):
        report.checks.append(one)
    own, *_ = right_first(padded_attentions(fields, rank.device), report.checks)
    ours = right_first(row_attentions(rank.device), report.checks)
    shared = Ours(Layout.shared, ours[0])
    model = make_model(fields, own, rank.device)
    steps, origin = draw_steps(model, shared, options, clock)
    bench = Bench(model, steps, rank)
    budget, chosen = choose_budget(bench, shared, options)
    report.about += [lengths_line(steps, options)]
    report.about += [f"micro-batches of {budget} tokens ({chosen}); {origin}; MFU of {options.peak_tflops:g} TFLOP/s"]
    report.rows += rows_of(ours, own, budget)
    for row in report.rows:
        faults = [
            f"check failed in {_short(c.dtype)}: {c.fault}" for c in report.checks if c.way == row.way and c.fault
        ]
        row.fault = next(iter(faults), None)
    report.about += warm_up(bench, report.rows, options, clock)
    report.about += measure(bench, report.rows, options, clock)
    del bench.optimizer
    forget(model)
    report.memory += memory_table(bench, fields, shared, clock)
    if clock.left() > _MEMORY_SECONDS:
        del bench, model
        forget()
        report.trl = trl_line(fields, own, (steps * 2)[:3], budget, rank)  # the first is not timed
    return report.status()


def place(device: str) -> Rank:
    """This process; bf16 autocast on a GPU that has it."""
    on_gpu = device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("no GPU: --device cpu --shape tiny is for trying this script")
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    return Rank(device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"), bf16=bf16, number=0, world=1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gemma2_2b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=1, help="timed together in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs-per-step", type=int, default=128)
    parser.add_argument("--tokens", type=int, help="of a micro-batch, padding included; else the engine's auto")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of the device in bf16; an H200 reaches 790")
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not fit is left out, and named")
    return parser.parse_args()


def _time_up(*_: Any) -> None:
    raise TimeUp


def main() -> int:
    """Measure, and print what there is however it ends."""
    options = _options()
    clock, report = Clock(options.minutes), Report(options)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if options.device == "cuda":
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 64  # layouts, precisions and models of the checks share one process
    signal.signal(signal.SIGALRM, _time_up)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, clock.left() - 5))
    try:
        return run(report, clock)
    except TimeUp:
        report.about.append(f"the {options.minutes:g} minutes ended before everything was measured")
        return report.status()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if report.title:
            print(*report.lines(), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
