"""The engine on one GPU: is it right there, how fast is it, what does it hold. Torch, transformers and triton suffice.

    timeout -s INT 480 python benchmarks/gpu.py      one GPU with room for 2.6B weights (80 GB); a table also if time is up
    python benchmarks/gpu.py --device cpu --shape tiny --pairs-per-step 8 --tokens 4096      does it run: two minutes

Random weights and random tokens, nothing is downloaded. First every attention and layout is compared with the model's own
logits, on the device, in float32 and under bf16 autocast: all statistics that an objective may need, and the gradient of
the one that has a gradient, logp. A row whose numbers are wrong has no speed, and the exit status is 1.

Timed are training steps: batches from token ids, forward and backward of all micro-batches, clipping, AdamW; float32
weights, bf16 autocast, the reference column computed before. The rows take turns, every round has pairs of its own, and a
ratio compares rows of one round with padded rows, which come first. Beside the peak stands what align's plan of the run
expects (align/train/memory.py). Last, TRL's DPOTrainer trains on the same steps, if it is installed.

Useful tokens are those that the work needs: every prompt once, every response but its last token. MFU counts these
alone: 6 FLOPs per weight of the trunk and token, attention over the keys that a token sees, 6 * V * H per response
token; nothing that is padded, fed twice or computed again.

Left out: several GPUs, gradient checkpointing, data loading, the engine's own choice of a micro-batch.
"""

import argparse
import gc
import itertools
import math
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # align need not be installed

import common
import torch
import transformers
from common import EOS, MAX_LENGTH, PAD
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from align import engine
from align.choices import Layout, Strategy
from align.engine import COMPUTED, Group
from align.engine.batching import CPU_TOKENS, plan_step
from align.launch.rank import Rank
from align.train import memory
from objectives import Objective, Response, build

Statistics = dict[str, Tensor]  # [responses], in the order of the groups

#: Fields of the configuration.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma2_2b": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
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

#: How far the model's own logits may be: nats per token of the worst statistic and response; the gradient, relative.
_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (0.1, 0.1)}  # float32 leaves 1e-5, a mistake makes 1e-2

_SPEED_COLUMNS = (
    "layout", "objective", "attention", "pairs/s", "useful tokens/s", "peak GiB", "plan GiB", "MFU, %", "times padded",
    "loss",
)  # fmt: skip

_WRONG = "wrong numbers"
_BEGAN = time.monotonic()


@dataclass(frozen=True)
class Step:
    """The pairs of a step with their reference column, and what it takes at least, whoever does it."""

    pairs: list[Group]
    ref_logp: Tensor  # [pairs, 2] nats
    tokens: int = 0  # every prompt once and nothing in vain
    flops: float = 0.0  # of these


def lengths_of(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    """(prompt, chosen, rejected) in tokens."""
    return [(len(prompt), *map(len, responses)) for prompt, responses in groups]


def needed(pairs: Sequence[Group], model: PreTrainedModel) -> tuple[int, float]:
    """Tokens and FLOPs of a step that feeds every prompt once and nothing in vain."""
    config, head = model.config, model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    weights = sum(layer.weight.numel() for layer in layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [config.sliding_window if kind == "sliding_attention" else MAX_LENGTH for kind in kinds]
    tokens = seen = scored = 0
    for prompt, *responses in lengths_of(pairs):
        tokens += prompt + sum(responses) - len(responses)
        scored += sum(responses)
        for window in windows:
            seen += _seen(prompt, window)
            seen += sum(_seen(prompt + n - 1, window) - _seen(prompt, window) for n in responses)
    attention = 4 * seen * config.num_attention_heads * config.head_dim  # q k^T and its product with v
    return tokens, 3 * (2 * weights * tokens + attention + 2 * head.weight.numel() * scored)


def _seen(tokens: int, window: int) -> int:
    """(query, key) pairs of a causal sequence."""
    full = min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * window


@dataclass(frozen=True)
class Way:
    """A layout, with one of the engine's attentions for rows or one of transformers' for padded ones."""

    layout: Layout
    attention: str

    def select(self, model: PreTrainedModel) -> None:
        """Make the model ready."""
        engine.attach(model, self.layout)
        if self.layout is Layout.padded:
            model.set_attn_implementation(self.attention)
        else:
            model.config._attn_implementation = self.attention

    def compute(self, model: PreTrainedModel, pairs: Sequence[Group], names: Sequence[str], rank: Rank) -> Statistics:
        """Statistics of the responses, under autocast, as in training."""
        batch = engine.collate(pairs, self.layout, pad_token_id=PAD).to(rank.device)
        with rank.autocast():
            return engine.response_statistics(model, batch, names)


def attentions(fields: dict[str, Any], device: torch.device) -> tuple[list[str], list[str]]:
    """The engine's attentions for rows, and transformers' for padded ones, the best first. Its sdpa knows no soft-cap."""
    own = "eager" if "attn_logit_softcapping" in fields else "sdpa"
    if device.type != "cuda":
        return ["align_sdpa"], [own]
    flash = is_flash_attn_2_available()
    return ["align_flash"] * flash + ["align_flex", "align_sdpa"], ["flash_attention_2"] * flash + [own]


def make_model(fields: dict[str, Any], attention: str, device: torch.device) -> PreTrainedModel:
    """Randomly initialised on the device, float32, in training mode."""
    fields = {**fields, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS, "use_cache": False}
    fields["max_position_embeddings"] = 2 * MAX_LENGTH
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
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


def reason(error: BaseException) -> str:
    """One short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160].replace("|", "/")


def forget() -> None:
    """Give back what a failure or another row has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Is it right? ------------------------------------------------------------------------------------------------------------


Check = tuple[Way, str, list[str], str | None]  # a way, its precision, distances as _TOLERANCE, a fault


def check_shape(fields: dict[str, Any], head_dim: int, device: torch.device) -> dict[str, Any]:
    """Two layers of the family: windows shorter than the sequences, caps that bend, several tiles of a vocabulary."""
    fields = {**fields, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": head_dim}
    fields["vocab_size"] = 40009 if device.type == "cuda" else 1009
    changes: dict[str, float] = {"query_pre_attn_scalar": head_dim, "sliding_window": 64}
    changes |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 3.0}
    return {**fields, **{name: value for name, value in changes.items() if name in fields}}


def check_pairs(vocabulary: int, device: torch.device) -> list[Group]:
    """Responses of one token, lengths around blocks of 128, more response tokens than a tile is high."""
    generator = random.Random("check")
    sizes = [(3, 1, 3), (170, 140, 1), (38, 1, 1), (1, 5, 9), (129, 127, 128), (200, 300, 257)]
    if device.type == "cuda":
        sizes += [(300, 700, 411), (64, 900, 640), (511, 256, 700)]
    drawn = [[generator.choices(range(2, vocabulary), k=tokens) for tokens in row] for row in sizes]
    return [(ids[0], ids[1:]) for ids in drawn]


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
    found: dict[str, list[Tensor]] = {name: [] for name in ("logp", "log_sum_sq", "log_max", "entropy", "length")}
    for prompt, response in ((prompt, response) for prompt, responses in pairs for response in responses):
        ids, target = (torch.tensor(tokens, device=device) for tokens in (prompt + response, response))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        logp = logits.log_softmax(-1)
        found["logp"].append(logp.gather(-1, target[:, None]).sum())
        found["log_sum_sq"].append((2 * logp).logsumexp(-1).sum().detach())
        found["log_max"].append(logp.amax(-1).sum().detach())
        found["entropy"].append(-(logp.exp() * logp).sum().detach())
        found["length"].append(torch.tensor(float(len(response)), device=device))
    return {name: torch.stack(values) for name, values in found.items()}


def gradient_of(model: PreTrainedModel, logp: Tensor) -> Tensor:
    """Of all weights, one vector, by a sum of log-probabilities with weights none of which is like another."""
    model.zero_grad(set_to_none=True)
    signs = torch.tensor([(-1.0) ** i * (1 + i / 2) for i in range(len(logp))], device=logp.device)
    (logp * signs).sum().backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def check(fields: dict[str, Any], ways: Sequence[Way], rank: Rank, dtype: torch.dtype) -> Iterator[Check]:
    """Every way in one precision, against float32 logits of a model that align has not touched yet."""
    # Heads of the shape itself under bf16; float32 has no tensor cores, and large heads take long to compile.
    head_dim = min(fields["head_dim"], 64) if dtype == torch.float32 else fields["head_dim"]
    shape = check_shape(fields, head_dim, rank.device)
    pairs = check_pairs(shape["vocab_size"], rank.device)
    model = peaked(make_model(shape, "eager", rank.device))
    own = own_statistics(model, pairs, rank.device)
    gradient = gradient_of(model, own["logp"])
    precise = replace(rank, bf16=dtype == torch.bfloat16)
    for way in ways:
        off, fault = [math.nan, math.nan], None
        try:
            way.select(model)
            made = way.compute(model, pairs, ("entropy", "log_max", "log_sum_sq"), precise)
            off[0] = max(((made[name] - own[name]) / own["length"]).abs().max().item() for name in own)
            off[1] = ((gradient_of(model, made["logp"]) - gradient).norm() / gradient.norm()).item()
            if not all(value <= most for value, most in zip(off, _TOLERANCE[dtype], strict=True)):
                fault = _WRONG
        except Exception as error:
            fault = reason(error)
        precision = str(dtype).removeprefix("torch.")
        say(f"checked {way.layout.name}, {way.attention}, {precision}: {fault or 'right'}")
        yield way, precision, [f"{value:.1e}" for value in off], fault


def check_all(fields: dict[str, Any], rank: Rank) -> Iterator[Check]:
    """Ours in float32 and bf16, transformers' flash-attn for padded rows in bf16, which is all it knows."""
    rows, padded = attentions(fields, rank.device)
    ways = [Way(layout, a) for a in rows for layout in (Layout.shared, Layout.packed)]
    ways += [Way(Layout.padded, a) for a in padded]
    yield from check(fields, [way for way in ways if "flash" not in way.attention], rank, torch.float32)
    if rank.bf16 or rank.device.type == "cpu":
        yield from check(fields, ways, rank, torch.bfloat16)
    forget()
    if rank.device.type == "cuda":
        torch._dynamo.reset()  # compiled for the shapes of the check


# How fast is it? ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One way of training."""

    way: Way
    objective: str
    seconds: list[float] = field(default_factory=list)  # of each round's step
    losses: list[float] = field(default_factory=list)
    peak: int = 0  # bytes
    fault: str | None = None

    def __str__(self) -> str:
        return f"{self.way.layout.name} {self.objective} ({self.way.attention})"


class Bench:
    """A model, its optimizer and the steps that all rows train on, one in each round."""

    def __init__(self, model: PreTrainedModel, steps: list[Step], rank: Rank, budget: int) -> None:
        self.model, self.steps, self.rank, self.budget = model, steps, rank, budget  # tokens of a micro-batch
        self.weights = [p for p in model.parameters() if p.requires_grad]
        # A rate so small that every row finds the same weights, as far as times and losses can tell.
        on_gpu = rank.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-9, weight_decay=0.0, fused=on_gpu)

    def train(self, row: Row, step: Step) -> None:
        """Train a step, time it, and note it in the row."""
        objective, device = OBJECTIVES[row.objective], self.rank.device
        row.way.select(self.model)
        plan = plan_step(lengths_of(step.pairs), 1, row.way.layout, self.budget)[0]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        began, total = time.perf_counter(), torch.zeros((), device=device)
        for chosen in plan:
            found = row.way.compute(self.model, [step.pairs[i] for i in chosen], wanted(objective), self.rank)
            loss = pair_losses(objective, found, step.ref_logp[chosen]).sum() / len(step.pairs)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        row.seconds.append(time.perf_counter() - began)
        row.losses.append(total.item())
        row.peak = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0

    def planned(self) -> int:
        """Bytes that align's plan of such a run expects at most."""
        config, weights = self.model.config, sum(weight.numel() for weight in self.weights)
        sizes = {"layers": config.num_hidden_layers, "hidden": config.hidden_size, "vocabulary": config.vocab_size}
        place_ = {"bf16": self.rank.bf16, "on_gpu": self.rank.device.type == "cuda"}
        shape = memory.Shape(parameters=weights, **sizes)
        setup = memory.Setup(shape=shape, trained=weights, optimizer="adamw_torch_fused", checkpointing=False, **place_)
        return memory.need(setup, Strategy.single, self.budget).total

    def cells(self, row: Row, base: Row, peak_tflops: float) -> list[str]:
        """Of the table: median [smallest, largest] over the rounds."""
        name = [row.way.layout.name, row.objective, row.way.attention]
        if not row.seconds:
            return [*name, row.fault or "no time", *"-" * 6]
        rounds = list(zip(self.steps, row.seconds, strict=False))
        shares = [100 * step.flops / seconds / peak_tflops / 1e12 for step, seconds in rounds]
        ratios = [b / a for a, b in zip(row.seconds, base.seconds, strict=False)]
        return [
            *name,
            common.median_range([len(step.pairs) / seconds for step, seconds in rounds]),
            f"{statistics.median(step.tokens / seconds for step, seconds in rounds):.0f}",
            f"{row.peak / 2**30:.2f}" if row.peak else "-",
            f"{self.planned() / 2**30:.2f}",
            common.median_range(shares),
            common.median_range(ratios) if ratios else "-",
            f"{row.losses[0]:.4f}" + (f"; then {row.fault}" if row.fault else ""),
        ]


def measure(bench: Bench, rows: Sequence[Row]) -> None:
    """Rounds in which the rows take turns, behind one that compiles and is not counted."""
    for number, step in enumerate([bench.steps[0], *bench.steps]):
        for row in rows:
            if row.fault:
                continue
            try:
                bench.train(row, step)
            except Exception as error:
                row.fault = reason(error)
                bench.model.zero_grad(set_to_none=True)
                forget()
                continue
            say(f"round {number}, {row}: {row.seconds[-1]:.2f} s, loss {row.losses[-1]:.4f}")
            if number == 0:
                row.seconds, row.losses = [], []


def draw_steps(model: PreTrainedModel, way: Way, options: argparse.Namespace, rank: Rank) -> list[Step]:
    """A step for each round. Its reference: the policy's own log-probabilities with noise, as if it had trained a while."""
    way.select(model)
    steps = []
    for seed in range(options.rounds):
        drawn = common.make_pairs("mixed", options.pairs_per_step, model.config.vocab_size, seed)
        pairs: list[Group] = [(pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]]) for pair in drawn]
        column = torch.empty(len(pairs), 2, device=rank.device)
        with engine.evaluating(model):
            for chosen in plan_step(lengths_of(pairs), 1, way.layout, CPU_TOKENS)[0]:
                column[chosen] = way.compute(model, [pairs[i] for i in chosen], (), rank)["logp"].view(-1, 2)
        column += 5 * torch.randn(column.shape, generator=torch.Generator().manual_seed(seed)).to(column)
        steps.append(Step(pairs, column, *needed(pairs, model)))
    return steps


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# TRL ---------------------------------------------------------------------------------------------------------------------


def trl_line(fields: dict[str, Any], own: str, steps: Sequence[Step], budget: int, rank: Rank) -> str:
    """TRL's DPOTrainer on the same steps; by itself, not in turns."""
    per_step, per_batch = len(steps[0].pairs), 1
    while 4 * per_batch * MAX_LENGTH <= budget and per_step % (2 * per_batch) == 0:
        per_batch *= 2
    try:
        seconds = trl_seconds(fields, own, steps, per_batch, rank)
    except Exception as error:
        return f"TRL's DPOTrainer failed: {reason(error)}"
    speeds = common.median_range([per_step / s for s in seconds])
    return f"{common.versions('trl')}: DPOTrainer, {own}, {per_batch} pairs at once, not in turns: {speeds} pairs/s."


def trl_seconds(fields: dict[str, Any], own: str, steps: Sequence[Step], per_batch: int, rank: Rank) -> list[float]:
    """Of every step but the first. Token ids and reference column are handed over as TRL itself would have made them."""
    import datasets
    import trl

    rows = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (prompt, *responses), strict=True))
        | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), column, strict=True))
        for step in steps
        for (prompt, responses), column in zip(step.pairs, step.ref_logp.tolist(), strict=True)
    ]
    ends: list[float] = []

    class Times(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize(rank.device)
            ends.append(time.perf_counter())

    def as_given(_: Any, dataset: Any, *__: Any, **___: Any) -> Any:
        return dataset

    on_gpu = rank.device.type == "cuda"
    given = patch.multiple(trl.DPOTrainer, _prepare_dataset=as_given, _precompute_ref_logps=as_given)
    with given, tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=per_batch, max_steps=len(steps), max_length=None,
            gradient_accumulation_steps=len(steps[0].pairs) // per_batch, precompute_ref_log_probs=True,
            gradient_checkpointing=False, bf16=rank.bf16, use_cpu=not on_gpu, learning_rate=1e-9,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch", logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            make_model(fields, own, rank.device),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=common.word_tokenizer(2),
            callbacks=[Times()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [after - before for before, after in itertools.pairwise(ends)]


# The whole ---------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGAN:5.0f} s] {text}", file=sys.stderr, flush=True)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Markdown, at once: a run that is cut short has said what it knows."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    print("", lines[0], f"|{'---|' * len(heads)}", *lines[1:], "", sep="\n", flush=True)


def run(options: argparse.Namespace) -> int:
    """Everything, in the order of its importance; the exit status."""
    fields, rank = SHAPES[options.shape], place(options.device)
    device = torch.cuda.get_device_name() if rank.device.type == "cuda" else "CPU, which says nothing about a GPU"
    print(f"### {options.shape}, {device}; {common.versions('torch', 'transformers')}; commit {common.commit()}")
    checks = list(check_all(fields, rank))
    print("\nDistance from the model's own float32 logits; allowed: ", end="")
    print("; ".join(f"{dtype} {most}" for dtype, most in _TOLERANCE.items()))
    cells = [(way.layout.name, way.attention, name, *off, fault or "right") for way, name, off, fault in checks]
    print_table(("layout", "attention", "precision", "nats per token", "gradient", "verdict"), cells)
    faulty = [way.attention for way, *_, fault in checks if fault]
    ours, (own, *_) = (sorted(names, key=faulty.count) for names in attentions(fields, rank.device))
    shared = Way(Layout.shared, ours[0])
    model = make_model(fields, own, rank.device)
    bench = Bench(model, draw_steps(model, shared, options, rank), rank, options.tokens)
    print(f"{options.pairs_per_step} pairs a step, mixed lengths, micro-batches of {options.tokens} tokens; ", end="")
    print(f"median [smallest, largest] of {options.rounds} rounds; MFU of {options.peak_tflops:g} TFLOP/s")
    rows = [Row(Way(Layout.padded, own), "dpo"), Row(shared, "dpo"), Row(Way(Layout.packed, ours[0]), "dpo")]
    rows += [Row(shared, name) for name in ("simpo", "wpo", "sppo")]
    rows += [Row(Way(Layout.shared, attention), "dpo") for attention in ours[1:]]
    for row in rows:
        found = [f"check failed in {name}: {fault}" for way, name, _, fault in checks if way == row.way and fault]
        row.fault = next(iter(found), None)
    try:
        measure(bench, rows)
    finally:
        print_table(_SPEED_COLUMNS, [bench.cells(row, rows[0], options.peak_tflops) for row in rows])
    steps = (bench.steps * 2)[:3]  # the first is not timed
    del bench, model
    forget()
    print(trl_line(fields, own, steps, options.tokens, rank))
    # An attention of transformers may fail to run, not to be right.
    return int(any(fault == _WRONG or (fault and "align" in way.attention) for way, *_, fault in checks))


def place(device: str) -> Rank:
    """This process; bf16 autocast on a GPU that has it."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: --device cpu --shape tiny is for trying this script")
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported()
    return Rank(device=torch.device("cuda:0" if device == "cuda" else "cpu"), bf16=bf16, number=0, world=1)


def main() -> int:
    """Read the words and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gemma2_2b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs-per-step", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch, padding included")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of the device in bf16; an H200 reaches 790")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if options.device == "cuda":
        import torch._dynamo

        torch._dynamo.config.recompile_limit = 64  # layouts, precisions and models of the checks share one process
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
