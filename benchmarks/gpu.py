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
from collections.abc import Sequence
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
from transformers.utils import is_flash_attn_2_available

from align import engine
from align.batching import fed_tokens, plan_step
from align.config import Layout
from align.engine import COMPUTED, Group
from align.launch import Place
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
    name: build({"name": name, **fields})
    for name, fields in {
        "dpo": {"beta": 0.1},
        "simpo": {"beta": 2.0},
        "sppo": {"beta": 0.1, "target": "hard"},
        "wpo": {"base": "dpo", "beta": 0.1},
    }.items()
}

MAX_LENGTH, MAX_PROMPT = 2048, 1800  # tokens, as in conf/: of prompt + response, of the prompt
_PROMPT, _RESPONSE = (190, 1.1), (300, 0.7)  # tokens on average, and the deviation of the logarithm

#: What a comparison may differ by. Float32 leaves 1e-5, a mistake makes 1e-2 and more.
#: (nats per token of the worst statistic and response; relative: loss, gradient's norm, norm of its difference)
_TOLERANCE = {torch.float32: (1e-4, 1e-4, 1e-4, 1e-3), torch.bfloat16: (0.1, 0.05, 0.05, 0.15)}

_CHUNK = 2048  # tokens of a chunk of plain logits
_MEMORY_SECONDS = 40  # kept back for the memory tables
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
        pairs.append(draw_group(prompt, [min(tokens, MAX_LENGTH - prompt) for tokens in responses], vocabulary, generator))
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
    """The engine in a layout; `attention` as in `model.attn_implementation`."""

    layout: Layout
    attention: str

    @property
    def name(self) -> str:
        """As in the tables."""
        return self.layout.name

    def select(self, model: PreTrainedModel) -> str:
        """Make the model ready; the name of its attention then."""
        engine.attach(model, self.layout, self.attention)
        if self.layout is Layout.padded:
            model.set_attn_implementation(self.attention)
        return str(model.config._attn_implementation)

    def plan(self, pairs: Sequence[Group], budget: int) -> list[list[int]]:
        """Which pairs are in which micro-batch."""
        return plan_step(lengths_of(pairs), 1, self.layout, budget)[0]

    def fed(self, pairs: Sequence[Group]) -> int:
        """Tokens of a micro-batch, padding included."""
        return fed_tokens(lengths_of(pairs), self.layout)

    def compute(self, model: PreTrainedModel, pairs: Sequence[Group], names: Sequence[str], where: Place) -> Statistics:
        """Statistics of the responses, under autocast, as in training."""
        batch = engine.collate(pairs, self.layout, pad_token_id=0).to(where.device)
        with where.autocast():
            return engine.response_statistics(model, batch, names)


@dataclass(frozen=True)
class Plain:
    """Padded rows without align; log-probabilities and lengths alone, which DPO needs."""

    attention: str
    name: str = "plain"

    def select(self, model: PreTrainedModel) -> str:
        """Make the model ready; the name of its attention then."""
        model.set_attn_implementation(self.attention)
        return self.attention

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

    def compute(self, model: PreTrainedModel, pairs: Sequence[Group], names: Sequence[str], where: Place) -> Statistics:
        """Padding is on the right, so causal attention needs no mask for it."""
        rows = [(prompt, response) for prompt, responses in pairs for response in responses]
        width = max(len(prompt) + len(response) - 1 for prompt, response in rows)
        ids = torch.tensor([(prompt + response[:-1] + [0] * width)[:width] for prompt, response in rows])
        starts = [i * width + len(prompt) - 1 for i, (prompt, _) in enumerate(rows)]
        at = torch.cat([torch.arange(s, s + len(response)) for s, (_, response) in zip(starts, rows, strict=True)])
        target = torch.tensor([token for _, response in rows for token in response])
        length = torch.tensor([len(response) for _, response in rows])
        with where.autocast():
            hidden = model.base_model(input_ids=ids.to(where.device), use_cache=False).last_hidden_state
            logp = self._head(model, hidden.flatten(0, 1)[at.to(where.device)], target.to(where.device))
        sums = torch.stack([part.sum() for part in logp.split(length.tolist())])
        return {"logp": sums, "length": length.to(where.device).float()}

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
        return ["sdpa"]
    return [*(["flash_attention_2"] if is_flash_attn_2_available() else []), "flex_attention", "sdpa"]


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


def step_losses(model: PreTrainedModel, way: Way, objective: Objective, step: Step, chosen: list[int], where: Place) -> Tensor:
    """Losses of some pairs of a step."""
    found = way.compute(model, [step.pairs[i] for i in chosen], wanted(objective), where)
    return pair_losses(objective, found, step.ref_logp[chosen])


def reason(error: BaseException) -> str:
    """One short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
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
    attention: str = "-"
    by_logits: list[float] = field(default_factory=list)  # distance from the model's own logits, worst of the objectives
    by_padded: list[float] = field(default_factory=list)  # from padded rows
    fault: str | None = None

    def compare(self, made: dict[str, Truth], logits: dict[str, Truth], padded: dict[str, Truth]) -> None:
        """Fill in the distances, and the fault where one is too far."""

        def worst(expected: dict[str, Truth]) -> list[float]:
            return [max(column) for column in zip(*(expected[n].distance(made[n]) for n in made), strict=True)]

        self.by_logits, self.by_padded = worst(logits), worst(padded)
        limits = 2 * _TOLERANCE[self.dtype]
        if not all(value <= limit for value, limit in zip(self.by_logits + self.by_padded, limits, strict=True)):
            self.fault = "wrong numbers"

    @property
    def line(self) -> str:
        """Of the table."""
        cells = [f"{a:.1e} / {b:.1e}" for a, b in zip(self.by_logits, self.by_padded, strict=True)] or ["-"] * 4
        return _row(self.way.name, self.attention, _short(self.dtype), *cells, self.fault or "right")


def check_shape(fields: dict[str, Any], head_dim: int, device: torch.device) -> dict[str, Any]:
    """Two layers of the family: windows shorter than the sequences, caps that bend, several tiles of a vocabulary."""
    fields = {**fields, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": head_dim}
    fields["vocab_size"] = 40009 if device.type == "cuda" else 1009
    changes = {"query_pre_attn_scalar": head_dim, "sliding_window": 64}
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


def evaluate(model: PreTrainedModel, way: Way, step: Step, where: Place) -> dict[str, Truth]:
    """By objective; DPO alone for Plain."""
    made = {}
    for name, objective in OBJECTIVES.items():
        if isinstance(way, Ours) or name == "dpo":
            found = way.compute(model, step.pairs, wanted(objective), where)
            made[name] = truth(model, found, objective, step.ref_logp)
    return made


def check(fields: dict[str, Any], ways: Sequence[Way], where: Place, dtype: torch.dtype, clock: Clock) -> list[Check]:
    """Every way and objective in one precision, against float32 logits of a model that align has not touched yet."""
    # Heads of the shape itself under bf16; float32 has no tensor cores, and large heads take long to compile.
    head_dim = min(fields["head_dim"], 64) if dtype == torch.float32 else fields["head_dim"]
    shape = check_shape(fields, head_dim, where.device)
    step = check_step(shape["vocab_size"], where.device)
    model = peaked(make_model(shape, "eager", where.device))
    found = own_statistics(model, step.pairs, where.device)
    logits = {name: truth(model, found, objective, step.ref_logp) for name, objective in OBJECTIVES.items()}
    del found
    precise = replace(where, bf16=dtype == torch.bfloat16)
    rows = Ours(Layout.padded, "eager")
    rows.select(model)
    padded = evaluate(model, rows, step, precise)
    checks = []
    for way in ways:
        one = Check(way, dtype)
        try:
            one.attention = way.select(model)
            one.compare(evaluate(model, way, step, precise), logits, padded)
        except Exception as error:
            one.fault = reason(error)
        checks.append(one)
        clock.say(f"checked {way.name}, {one.attention}, {_short(dtype)}: {one.fault or 'right'}")
    return checks


def check_all(fields: dict[str, Any], where: Place, clock: Clock) -> list[Check]:
    """Ours in float32 and bf16, transformers' fast attentions for padded rows in bf16, which is what they are for."""
    rows = [Ours(layout, a) for a in row_attentions(where.device) for layout in (Layout.shared, Layout.packed)]
    padded: list[Way] = [way for a in padded_attentions(fields, where.device) for way in (Ours(Layout.padded, a), Plain(a))]
    exact: list[Way] = [way for way in rows if "flash" not in way.attention]
    exact += [way for way in padded if way.attention in ("eager", "sdpa")]
    checks = check(fields, exact, where, torch.float32, clock)
    if where.bf16 or where.device.type == "cpu":
        checks += check(fields, [*rows, *padded], where, torch.bfloat16, clock)
    forget()
    if where.device.type == "cuda":
        torch._dynamo.reset()  # compiled for the shapes of the check
    return checks


def best_padded(fields: dict[str, Any], where: Place, checks: Sequence[Check]) -> str:
    """transformers' first attention for padded rows whose numbers are right."""
    faulty = {one.way.attention for one in checks if one.fault and one.way.name in ("padded", "plain")}
    names = padded_attentions(fields, where.device)
    return next((name for name in names if name not in faulty), names[-1])


# How fast is it? ---------------------------------------------------------------------------------------------------------


@dataclass
class Round:
    """One turn of a row."""

    seconds: float
    pairs: int
    fed: int
    needed: Needed
    peak: int  # bytes
    loss: float


@dataclass
class Row:
    """One way of training."""

    way: Way
    objective: str
    budget: int
    attention: str = "-"
    estimate: float = 0.0  # seconds of a step
    rounds: list[Round] = field(default_factory=list)
    fault: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """For lines of progress."""
        return f"{self.way.name} {self.objective} ({self.attention})"


class Bench:
    """A model, its optimizer and the steps that all rows train on."""

    def __init__(self, model: PreTrainedModel, steps: list[Step], where: Place) -> None:
        self.model, self.steps, self.where = model, steps, where
        self.weights = [p for p in model.parameters() if p.requires_grad]
        fused = where.device.type == "cuda"
        # A rate so small that every row finds the same weights, as far as times and losses can tell.
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-9, weight_decay=0.0, fused=fused)
        self.needed = [needed(step.pairs, model) for step in steps]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.where.device.type == "cuda":
            torch.cuda.synchronize(self.where.device)

    def warm_up(self, row: Row) -> None:
        """A step that compiles what there is to compile; estimates how long the next will take."""
        row.attention = row.way.select(self.model)
        self.synchronize()
        seconds: list[float] = []
        for batch in row.way.plan(self.steps[0].pairs, row.budget):
            began = time.perf_counter()
            self._backward(row, self.steps[0], batch)
            self.synchronize()
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        self._update()
        self.synchronize()
        row.estimate = statistics.median(seconds) * len(seconds) + time.perf_counter() - began

    def train(self, row: Row, numbers: Sequence[int]) -> Round:
        """Train these steps and time them together."""
        row.way.select(self.model)
        plans = [row.way.plan(self.steps[number].pairs, row.budget) for number in numbers]
        forget(self.model)
        if self.where.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.where.device)
        self.synchronize()
        began = time.perf_counter()
        losses = []
        for number, plan in zip(numbers, plans, strict=True):
            losses += [self._backward(row, self.steps[number], batch) for batch in plan]
            self._update()
        self.synchronize()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated(self.where.device) if self.where.device.type == "cuda" else 0
        loss = torch.stack(losses).sum().item() / len(numbers)
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        needs = [self.needed[number] for number in numbers]
        fed = [
            row.way.fed([self.steps[number].pairs[i] for i in batch])
            for number, plan in zip(numbers, plans, strict=True)
            for batch in plan
        ]
        total = Needed(sum(n.tokens for n in needs), sum(n.flops for n in needs))
        return Round(seconds, sum(len(self.steps[n].pairs) for n in numbers), sum(fed), total, peak, loss)

    def _backward(self, row: Row, step: Step, batch: list[int]) -> Tensor:
        losses = step_losses(self.model, row.way, OBJECTIVES[row.objective], step, batch, self.where)
        loss = losses.sum() / len(step.pairs)
        loss.backward()
        return loss.detach()

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def rows_of(device: torch.device, budget: int) -> list[Row]:
    """The most important first."""
    default, *others = row_attentions(device)
    shared = Ours(Layout.shared, default)
    rows = [
        Row(Plain(), "dpo", budget),
        Row(shared, "dpo", budget),
        Row(Ours(Layout.packed, default), "dpo", budget),
        Row(Ours(Layout.padded, None), "dpo", budget),
        *(Row(shared, name, budget) for name in ("simpo", "wpo", "sppo")),
    ]
    return rows + [Row(Ours(Layout.shared, attention), "dpo", budget) for attention in others]


def refuse(rows: Sequence[Row], checks: Sequence[Check]) -> bool:
    """Take the rows out that did not pass their check; whether numbers were wrong."""
    for row in rows:
        for one in checks:
            if one.way == row.way and one.fault and not (one.attention == "eager" and one.way.name == "padded"):
                row.fault = f"check, {_short(one.dtype)}: {one.fault}"
    return any(one.fault is not None for one in checks)


def warm_up(bench: Bench, rows: Sequence[Row], options: argparse.Namespace, clock: Clock) -> None:
    """Each row's first step, while there is time for it and for the rounds of those before it."""
    for row in rows:
        if row.fault:
            continue
        ready = [other for other in rows if other.estimate and not other.fault]
        planned = options.rounds * options.steps * sum(other.estimate for other in ready)
        guess = 30 + (1 + options.rounds) * options.steps * max((other.estimate for other in ready), default=0.0)
        if clock.left() < planned + guess + _MEMORY_SECONDS and ready:
            row.fault = "left out: no time"
            continue
        began = clock.left()
        for _ in range(3):
            try:
                bench.warm_up(row)
                row.fault = None
                break
            except Exception as error:
                row.fault, oom = reason(error), isinstance(error, torch.OutOfMemoryError)
            forget(bench.model)
            if not oom:
                break
            row.budget //= 2
            row.notes.append(f"out of memory, budget halved to {row.budget}")
        clock.say(f"{row.label}: warm-up {began - clock.left():.0f} s, {row.fault or f'{row.estimate:.2f} s a step'}")


def measure(bench: Bench, rows: Sequence[Row], options: argparse.Namespace, clock: Clock) -> list[str]:
    """Rounds in which the rows take turns; what was left out."""
    notes = []
    for number in range(options.rounds):
        alive = [row for row in rows if not row.fault]
        while alive and number == 0 and clock.left() < _MEMORY_SECONDS + _round_seconds(alive, options) * 2:
            alive.pop().fault = "left out: no time"
        if clock.left() < _MEMORY_SECONDS + _round_seconds(alive, options) and number:
            notes.append(f"{number} of {options.rounds} rounds: no time for more")
            break
        graphs = compiled_graphs()
        for row in alive:
            try:
                row.rounds.append(bench.train(row, range(number * options.steps, (number + 1) * options.steps)))
            except Exception as error:
                row.fault = reason(error)
                forget(bench.model)
                continue
            seconds = row.rounds[-1].seconds
            row.estimate = seconds / options.steps
            clock.say(f"round {number + 1}, {row.label}: {seconds:.2f} s, loss {row.rounds[-1].loss:.4f}")
        if compiled_graphs() > graphs:
            notes.append(f"{compiled_graphs() - graphs} compilation(s) fell into round {number + 1}")
    return notes


def _round_seconds(rows: Sequence[Row], options: argparse.Namespace) -> float:
    return 1.1 * options.steps * sum(row.estimate for row in rows)


def compiled_graphs() -> int:
    """How many graphs torch.compile has made so far."""
    if "torch._dynamo" not in sys.modules:
        return 0
    return int(sys.modules["torch._dynamo"].utils.counters["stats"]["unique_graphs"])


def speed_table(rows: Sequence[Row], peak_tflops: float) -> list[str]:
    """Median [smallest, largest] over the rounds."""
    lines = [
        "| layout | objective | attention | pairs/s | fed tokens/s | useful tokens/s | peak GiB | MFU | times plain | loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = next(row for row in rows if isinstance(row.way, Plain))
    for row in rows:
        cells = [row.way.name, row.objective, row.attention]
        if not row.rounds:
            cells += [f"failed: {row.fault}" if row.fault and "left out" not in row.fault else row.fault or "-", *"-" * 6]
        else:
            rounds = row.rounds
            ratios = [b.seconds / a.seconds for a, b in zip(rounds, base.rounds, strict=False)]
            cells += [
                _spread([r.pairs / r.seconds for r in rounds], ".2f"),
                f"{statistics.median(r.fed / r.seconds for r in rounds):.0f}",
                f"{statistics.median(r.needed.tokens / r.seconds for r in rounds):.0f}",
                f"{max(r.peak for r in rounds) / _GIB:.1f}" if rounds[0].peak else "-",
                _spread([r.needed.flops / r.seconds / peak_tflops / 1e12 for r in rounds], ".1%"),
                _spread(ratios, ".2f") if ratios else "-",
                f"{rounds[0].loss:.4f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    middle, low, high = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]"


def reference_column(model: PreTrainedModel, pairs: Sequence[Group], way: Ours, budget: int, where: Place, seed: int) -> Tensor:
    """Near the start policy's own, as at a step soon after the first: its log-probabilities and some noise. [pairs, 2]"""
    way.select(model)
    column = torch.empty(len(pairs), 2, device=where.device)
    with engine.evaluating(model):
        for batch in way.plan(pairs, budget):
            column[batch] = way.compute(model, [pairs[i] for i in batch], (), where)["logp"].view(-1, 2)
    noise = torch.randn(column.shape, generator=torch.Generator().manual_seed(seed))
    return column + 5 * noise.to(column)


# What does it hold? ------------------------------------------------------------------------------------------------------


def micro_batch_peak(model: PreTrainedModel, way: Ours, pairs: Sequence[Group], where: Place) -> float:
    """GiB above weights and gradients of one micro-batch, forward and backward; NaN on a CPU."""
    way.select(model)
    step = Step(list(pairs), torch.zeros(len(pairs), 2, device=where.device))

    def backward(chosen: list[int]) -> None:
        step_losses(model, way, OBJECTIVES["dpo"], step, chosen, where).sum().backward()

    backward([0])  # makes the gradients
    forget()
    if where.device.type != "cuda":
        backward(list(range(len(pairs))))
        return math.nan
    torch.cuda.reset_peak_memory_stats(where.device)
    before = torch.cuda.memory_allocated(where.device)
    backward(list(range(len(pairs))))
    torch.cuda.synchronize(where.device)
    return (torch.cuda.max_memory_allocated(where.device) - before) / _GIB


def filling(pairs: Sequence[Group], budget: int) -> list[Group]:
    """Pairs, repeated where they do not suffice, that come near a budget of fed tokens."""
    some: list[Group] = []
    for i in range(10 * budget):
        pair = pairs[i % len(pairs)]
        if fed_tokens(lengths_of([*some, pair]), Layout.shared) > budget:
            break
        some.append(pair)
    return some or [min(pairs, key=_longest)]


def memory_line(name: str, model: PreTrainedModel, way: Ours, budgets: Sequence[int], where: Place, clock: Clock) -> str:
    """A cell for each budget."""
    pairs = sorted(draw_pairs(128, model.config.vocab_size, seed=1), key=_longest)[:96]  # of middling length
    cells = [name]
    for budget in budgets:
        if clock.left() < 10:
            cells.append("no time")
            continue
        some = filling(pairs, budget)
        try:
            peak = micro_batch_peak(model, way, some, where)
            cells.append("-" if math.isnan(peak) else f"{peak:.2f}")
        except Exception as error:
            cells.append(reason(error)[:60])
        forget(model)
    scored = sum(map(sum, ((len(r) for r in responses) for _, responses in filling(pairs, budgets[-1]))))
    cells.append(f"{scored * model.config.vocab_size * 4 / _GIB:.1f}")
    return f"| {' | '.join(cells)} |"


def memory_table(
    model: PreTrainedModel | None, fields: dict[str, Any], attention: str, own: str, where: Place, clock: Clock
) -> list[str]:
    """Budgets by vocabularies on a trunk of two layers, and the shape itself."""
    on_gpu = where.device.type == "cuda"
    budgets = [4096, 8192, 16384, 32768] if on_gpu else [1024, 2048]
    way = Ours(Layout.shared, attention)
    lines = [
        f"| peak GiB of a micro-batch of | {' | '.join(f'{budget} tokens' for budget in budgets)} | its logits alone, fp32 |",
        f"|---|{'---|' * len(budgets)}---|",
    ]
    small = {**fields, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    for vocabulary in (32_000, 128_000, 256_000) if on_gpu else (1000, 4000):
        little = make_model({**small, "vocab_size": vocabulary}, own, where.device)
        lines.append(memory_line(f"{vocabulary} words, 2 layers", little, way, budgets, where, clock))
        del little
        forget()
    if model is not None:
        lines.append(memory_line("the shape above", model, way, budgets, where, clock))
    clock.say("measured memory")
    return lines


# TRL ---------------------------------------------------------------------------------------------------------------------


def trl_line(fields: dict[str, Any], own: str, steps: Sequence[Step], per_batch: int, where: Place) -> str:
    """TRL's DPOTrainer with the reference column given, if it is installed; not in turns with the others.

    The column stands in its data set already, so that none is computed. Text of one word per token is read back as the
    same ids.
    """
    if any(find_spec(name) is None for name in ("trl", "datasets", "accelerate")):
        return "TRL is not installed: no row for its DPOTrainer."
    import datasets
    import trl
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, fields["vocab_size"])}
    raw = Tokenizer(models.WordLevel(words))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    rows = [
        {
            "prompt_ids": prompt, "chosen_ids": responses[0], "rejected_ids": responses[1],
            "ref_chosen_logps": column[0], "ref_rejected_logps": column[1],
        }
        for step in steps
        for (prompt, responses), column in zip(step.pairs, step.ref_logp.tolist(), strict=True)
    ]  # fmt: skip
    per_step = len(steps[0].pairs)
    ends: list[float] = []

    class Times(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if where.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=per_batch, gradient_accumulation_steps=per_step // per_batch,
            max_steps=len(steps), bf16=where.bf16, use_cpu=where.device.type == "cpu", precompute_ref_log_probs=True,
            gradient_checkpointing=False, max_length=None, learning_rate=1e-9, logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True, beta=0.1,
            optim="adamw_torch_fused" if where.device.type == "cuda" else "adamw_torch",
        )  # fmt: skip
        model = make_model(fields, own, where.device)
        data = datasets.Dataset.from_list(rows)
        trainer = Trainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Times()])
        trainer.train()
    speeds = [per_step / (b - a) for a, b in zip(ends, ends[1:], strict=False)]
    return f"TRL {version('trl')}, DPOTrainer, {per_batch} pairs held at once: {_spread(speeds, '.2f')} pairs/s."


# The whole ---------------------------------------------------------------------------------------------------------------


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


def best_own_attention(
    fields: dict[str, Any], where: Place, checks: list[Check], clock: Clock, dtypes: Sequence[torch.dtype]
) -> str:
    """Check everything; transformers' best attention for padded rows whose numbers are right."""
    names = padded_attentions(fields, where.device)
    for own in names:
        found = [one for dtype in dtypes for one in check(fields, own, where, dtype, clock)]
        fault = next((one.fault for one in found if isinstance(one.way, Plain) and one.fault), None)
        new = [one for one in found if not any(same(one, known) for known in checks)]
        checks += new
        if fault is None:
            return own
        clock.say(f"transformers' {own} for padded rows: {fault}")
    return names[-1]


def same(one: Check, other: Check) -> bool:
    """Whether two checks are of one thing."""
    return (one.way, one.attention, one.dtype) == (other.way, other.attention, other.dtype)


def choose_budget(bench: Bench, way: Ours, options: argparse.Namespace, clock: Clock) -> tuple[int, str]:
    """Tokens of a micro-batch, and where the number is from."""
    if options.tokens:
        return options.tokens, "given"
    way.select(bench.model)
    longest = sorted(bench.steps[0].pairs, key=_longest, reverse=True)
    try:
        budget = engine.token_budget(bench.model, longest, way.layout, wanted(OBJECTIVES["dpo"]), bench.where)
        return budget, "the engine's auto"
    except Exception as error:
        clock.say(f"the engine's token budget: {reason(error)}")
        forget(bench.model)
        return 8192, f"a guess: the engine's auto failed, {reason(error)}"


def prepare(fields: dict[str, Any], own: str, where: Place, options: argparse.Namespace, clock: Clock) -> tuple[Bench, str]:
    """The model and its steps; the second: a remark about the reference column."""
    model = make_model(fields, own, where.device)
    way = Ours(Layout.shared, row_attentions(where.device)[0])
    drawn = [
        draw_pairs(options.pairs_per_step, fields["vocab_size"], seed) for seed in range(options.rounds * options.steps)
    ]
    steps, remark = [], "the reference column by the engine"
    for seed, pairs in enumerate(drawn):
        try:
            column = reference_column(model, pairs, way, options.tokens or 8192, where, seed)
        except Exception as error:
            lengths = torch.tensor([row[1:] for row in lengths_of(pairs)], device=where.device)
            column, remark = -math.log(fields["vocab_size"]) * lengths, f"no reference column: {reason(error)}"
            forget(model)
        steps.append(Step(pairs, column))
    clock.say(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}B weights, {len(steps)} steps of pairs; {remark}")
    return Bench(model, steps, where), remark


def run(options: argparse.Namespace, clock: Clock, report: list[str], rows: list[Row]) -> int:
    """Everything in the order of its importance; `report` and `rows` hold what there is whenever it ends."""
    where = place(options.device)
    fields = SHAPES[options.shape]
    report += [f"### {options.shape}, {machine(where.device)}", ""]
    checks: list[Check] = []
    dtypes = [torch.float32, torch.bfloat16] if where.bf16 or where.device.type == "cpu" else [torch.float32]
    own = best_own_attention(fields, where, checks, clock, dtypes)
    if where.device.type == "cuda":
        torch._dynamo.reset()  # the shapes of the check
    else:
        clock.say("flex_attention has no backward on a CPU and flash-attn no CPU at all: neither is checked nor timed")
    bench, remark = prepare(fields, own, where, options, clock)
    budget, origin = choose_budget(bench, Ours(Layout.shared, row_attentions(where.device)[0]), options, clock)
    rows += rows_of(where.device, budget)
    wrong = refuse(rows, checks)
    warm_up(bench, rows, options, clock)
    notes = measure(bench, rows, options, clock)
    report += describe(bench, options, budget, origin, remark)
    report += [f"- {note}" for note in [*notes, *(f"{row.label}: {note}" for row in rows for note in row.notes)]]
    report += ["", *speed_table(rows, options.peak_tflops), ""]
    report += ["Check: distance from the model's own logits in float32 / from padded rows, worst of the objectives.", ""]
    report += [*check_table(checks), ""]
    del bench.optimizer
    forget(bench.model)
    attention = row_attentions(where.device)[0]
    report += ["Memory above weights and gradients:", ""]
    report += [*memory_table(bench.model, fields, attention, own, where, clock), ""]
    if clock.left() > 60:
        steps = bench.steps[:3]
        del bench
        forget()
        report.append(trl_or_why(fields, own, steps, where, budget))
    return int(wrong)


def trl_or_why(fields: dict[str, Any], own: str, steps: Sequence[Step], where: Place, budget: int) -> str:
    """TRL's line; a failure of it is a line too."""
    per_batch = 1
    while 2 * per_batch * 2 * MAX_LENGTH <= budget and len(steps[0].pairs) % (2 * per_batch) == 0:
        per_batch *= 2
    try:
        return trl_line(fields, own, steps, per_batch, where)
    except Exception as error:
        return f"TRL's DPOTrainer failed: {reason(error)}"


def describe(bench: Bench, options: argparse.Namespace, budget: int, origin: str, remark: str) -> list[str]:
    """What was measured."""
    lengths = [row for step in bench.steps for row in lengths_of(step.pairs)]
    prompt, *responses = (statistics.mean(row[i] for row in lengths) for i in range(3))
    longest = max(prompt + max(rest) for prompt, *rest in lengths)
    tolerances = "; ".join(f"{_short(dtype)} {', '.join(map(str, most))}" for dtype, most in _TOLERANCE.items())
    return [
        f"- {options.pairs_per_step} pairs a step, mean tokens: prompt {prompt:.0f}, responses "
        f"{statistics.mean(responses):.0f}, longest sequence {longest}; {options.rounds} rounds of {options.steps} "
        "step(s) of their own, rows in turns; median [smallest, largest]",
        f"- micro-batches of {budget} tokens ({origin}); {remark}; MFU of {options.peak_tflops:g} TFLOP/s",
        f"- tolerances of the check (nats per token, loss, gradient norm, gradient): {tolerances}",
    ]


def place(device: str) -> Place:
    """This process; bf16 autocast on a GPU that has it."""
    on_gpu = device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("no GPU: --device cpu --shape tiny is for trying this script")
    return Place(
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        rank=0,
        world=1,
    )


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
    clock = Clock(options.minutes)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if options.device == "cuda":
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 64  # layouts, precisions and models of the checks share one process
    signal.signal(signal.SIGALRM, _time_up)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, clock.left() - 5))
    report: list[str] = []
    rows: list[Row] = []
    status = 1
    try:
        status = run(options, clock, report, rows)
    except TimeUp:
        report += ["", f"The {options.minutes:g} minutes ended here.", ""]
        if rows and not any(line.startswith("| layout") for line in report):
            report += speed_table(rows, options.peak_tflops)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(*report, sep="\n", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
