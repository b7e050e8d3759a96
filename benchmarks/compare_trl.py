"""Speed and memory of align and of TRL's own trainers: the same weights, pairs, objective, optimizer and global batch.

    python benchmarks/compare_trl.py              about 20 minutes: a Llama shape, mixed lengths
    python benchmarks/compare_trl.py --quick      does it run: under a minute, the figures mean nothing

Random weights and random tokens, float32, CPU. Every leg (one side of a comparison) is a fresh process; the legs take
turns for `--rounds` rounds, and a ratio compares legs of the same round. Timed are training steps, from the end of
one optimizer update to the end of a later one: batches, forward, backward, clipping, AdamW, and what each trainer does
for its metrics. Not timed: imports, models, tokenising, the reference column, the first step. Nothing is logged,
saved or reported, there is no dropout, gradient checkpointing is off on both sides.

TRL gets its pairs as text of one word per token, and the ids it makes of it are checked; it takes them in the order of
our sampler, a step's pairs in random order as its own sampler would have them. So the losses of every step must agree
within 1e-3: where they do not, both are printed instead of a table, and the exit status is 1.

TRL at its best: the fused head of its DPOTrainer scores response positions alone only on CUDA and scores every
position on a CPU; here it is told to leave the others out. And it holds one pair at once, which is its fastest on a
CPU, for what it pads then is least (Llama shape, pairs per CPU second: 0.33 at its default of 8, 0.55 at 2, 0.61 at 1).
The rows "as shipped" are without the first. `CPOTrainer` (SimPO) has no fused head: it makes the logits of every
position, on any device.

Memory: "peak" is the largest resident memory of the process while it trains; "working" is what of it came after the
model was loaded: gradients, AdamW's state, activations, logits, and TRL's live reference model. "fed" are the tokens
that go through the policy for a pair, padding among them.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import common
import datasets
import torch
import transformers
from common import Pair
from transformers import PreTrainedModel, Trainer

from align.choices import Layout
from align.engine.batching import CPU_TOKENS, StepSampler
from align.train.metrics import Tally

_TOLERANCE = 1e-3  # between losses of a step, absolute below a loss of 1 and relative above

#: One set of hyperparameters for both sides; gamma is SimPO's target margin in units of the reward.
_BETA = {"dpo": 0.1, "wpo": 0.1, "simpo": 2.0}
_GAMMA = 1.0


@dataclass(frozen=True)
class Leg:
    """One side of a comparison."""

    trainer: str  # "align" or "TRL"
    objective: str  # "dpo", "wpo", "simpo"
    live_reference: bool = False  # TRL's alone: a second model beside the policy in place of a column
    as_shipped: bool = False  # TRL's alone

    def __str__(self) -> str:
        notes = ", live reference" * self.live_reference + ", as shipped" * self.as_shipped
        return f"{self.trainer} {self.objective}{notes}"


@dataclass(frozen=True)
class Workload:
    """What every leg of a comparison is given."""

    model: str
    vocab: int | None
    profile: str
    steps: int  # timed ones
    pairs_per_step: int
    micro_batch_tokens: int  # ours
    trl_batch: int  # pairs
    threads: int
    seed: int
    learning_rate: float

    @property
    def pairs(self) -> int:
        """Of all steps, the one that is not timed too."""
        return (self.steps + 1) * self.pairs_per_step


_OURS = Leg("align", "dpo")

#: name -> (first leg, second leg, what the ratio is of). A speed above 1 and a cost below 1 are to the first leg's credit.
COMPARISONS: dict[str, tuple[Leg, Leg, str]] = {
    "dpo": (_OURS, Leg("TRL", "dpo"), "speed"),
    "simpo": (Leg("align", "simpo"), Leg("TRL", "simpo"), "speed"),
    "wpo-cost": (Leg("align", "wpo"), _OURS, "cost"),
    "reference-cost": (_OURS, Leg("align", "simpo"), "cost"),
    "live": (_OURS, Leg("TRL", "dpo", live_reference=True), "speed"),
    "dpo-as-shipped": (_OURS, Leg("TRL", "dpo", as_shipped=True), "speed"),
    "live-as-shipped": (_OURS, Leg("TRL", "dpo", live_reference=True, as_shipped=True), "speed"),
}


# Legs ------------------------------------------------------------------------------------------------------------------


def our_steps(work: Workload, pairs: Sequence[Pair]) -> list[list[int]]:
    """The pairs of each step as our sampler deals them, in the order they have in the data, which is random."""
    lengths = [tuple(len(p[n]) for n in ("prompt_ids", "chosen_ids", "rejected_ids")) for p in pairs]
    sampler = StepSampler(
        lengths,
        Layout.shared,
        pairs_per_step=work.pairs_per_step,
        world=1,
        rank=0,
        budget=work.micro_batch_tokens,
        seed=work.seed,
    )
    return [sorted(i for micro_batch in step for i in micro_batch.pairs) for step in sampler.epoch(0)]


def train_ours(
    leg: Leg, work: Workload, policy: PreTrainedModel, pairs: Sequence[Pair], folder: Path, clock: common.StepClock
) -> list[float]:
    """Train by align's loop, its reference column computed. Returns the loss of each step."""
    fields = {"beta": _BETA[leg.objective]}
    fields |= {"gamma": _GAMMA} if leg.objective == "simpo" else {}
    fields |= {"base": "dpo"} if leg.objective == "wpo" else {}
    loop, steps = common.pair_loop(
        policy,
        pairs,
        {"name": leg.objective, **fields},
        folder,
        layout=Layout.shared,
        pairs_per_step=work.pairs_per_step,
        budget=work.micro_batch_tokens,
        learning_rate=work.learning_rate,
        seed=work.seed,
    )
    losses = []
    clock.on_train_begin()
    for share in steps:
        loop.step(share)
        means, _, _ = loop.tally.means(loop.objective, loop.rank)
        loop.tally = Tally()
        losses.append(means["loss"])
        clock.on_step_end()
    return losses


def train_trl(
    leg: Leg, work: Workload, policy: PreTrainedModel, pairs: Sequence[Pair], folder: Path, clock: common.StepClock
) -> list[float]:
    """Train by TRL's trainer, its reference column computed, after a check that its data are these pairs in this order.

    Returns the loss of each step.
    """
    import trl.trainer.utils
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    texts = [{name.removesuffix("_ids"): common.text(ids) for name, ids in pair.items()} for pair in pairs]
    fields: dict[str, Any] = {
        **_arguments(work, folder),
        "per_device_train_batch_size": work.trl_batch,
        "gradient_accumulation_steps": work.pairs_per_step // work.trl_batch,
        "train_sampling_strategy": "sequential",
        "beta": _BETA[leg.objective],
    }
    given = {
        "train_dataset": datasets.Dataset.from_list(texts),
        "processing_class": common.word_tokenizer(policy.config.vocab_size),
    }
    if leg.objective == "simpo":
        simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": _GAMMA, "max_length": 2 * common.MAX_LENGTH}
        trainer = CPOTrainer(policy, args=CPOConfig(**fields, **simpo), **given)
        columns = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
        prompted = True  # its columns of responses begin with the prompt
    else:
        if not leg.as_shipped:
            # The name that the head's mask hangs on; the kernels have a name of their own, so none asks for Triton.
            patch.object(trl.trainer.utils, "_use_triton", return_value=True).start()
        reference = common.build_model(work.model, work.vocab, work.seed) if leg.live_reference else None
        options = {"max_length": None, "precompute_ref_log_probs": not leg.live_reference}
        trainer = trl.DPOTrainer(policy, reference, args=trl.DPOConfig(**fields, **options), **given)
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        prompted = False
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        before = pair["prompt_ids"] if prompted else []
        given_ids = [pair["prompt_ids"], before + pair["chosen_ids"], before + pair["rejected_ids"]]
        if [row[column] for column in columns] != given_ids:
            raise RuntimeError(f"{leg}: TRL does not train on the token ids it was given")
    trainer.add_callback(clock)
    losses = _keep_losses(trainer)
    trainer.train()
    calls = len(losses) // (work.steps + 1)  # of training_step for a step
    return [sum(losses[at : at + calls]) for at in range(0, len(losses), calls)]


def _arguments(work: Workload, folder: Path) -> dict[str, Any]:
    """Fields of TrainingArguments; the optimizer is the Trainer's default, AdamW, as in `common.pair_loop`."""
    return {
        "output_dir": str(folder), "seed": work.seed, "num_train_epochs": 1, "use_cpu": True, "bf16": False,
        "learning_rate": work.learning_rate, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "logging_nan_inf_filter": False, "dataloader_pin_memory": False,
    }  # fmt: skip


def run_leg(leg: Leg, work: Workload) -> dict[str, Any]:
    """Train one leg in this process."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(work.threads)
    vocabulary = work.vocab or common.SHAPES[work.model]["vocab_size"]
    pairs = common.make_pairs(work.profile, work.pairs, vocabulary, work.seed)
    train = train_ours
    if leg.trainer == "TRL":
        import trl  # noqa: F401 - before the memory is looked at

        train = train_trl
        pairs = [pairs[i] for step in our_steps(work, pairs) for i in step]
    policy = common.build_model(work.model, work.vocab, work.seed)
    memory = common.Memory()
    weights = sum(weight.double().abs().sum().item() for weight in policy.parameters())
    fed, clock = common.FedTokens(policy), common.StepClock(memory)
    with tempfile.TemporaryDirectory() as folder:
        losses = train(leg, work, policy, pairs, Path(folder), clock)
    assert len(clock.ends) == work.steps + 1
    cpu, wall = clock.seconds()
    timed = work.steps * work.pairs_per_step
    return {
        "losses": losses,
        "weights": weights,
        "pairs_per_cpu_second": timed / cpu,
        "pairs_per_second": timed / wall,
        "peak": clock.peak,
        "working": clock.peak - memory.base,
        "padding": fed.padding / fed.all,
        "fed": fed.all / work.pairs,
    }


def _keep_losses(trainer: Trainer) -> list[float]:
    """What `training_step` will return: a micro-batch's part of the mean over the step's pairs."""
    losses: list[float] = []
    inner = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = inner(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = training_step
    return losses


# Comparing -------------------------------------------------------------------------------------------------------------


def disagreement(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """What forbids comparing two legs of a round, if anything."""
    if first["weights"] != second["weights"]:
        return "the legs start from different weights"
    pairs = list(zip(first["losses"], second["losses"], strict=True))
    if all(abs(a - b) <= _TOLERANCE * max(1.0, abs(a)) for a, b in pairs):
        return None
    return "the losses of the steps differ: " + ", ".join(f"{a:.5f} and {b:.5f}" for a, b in pairs)


def row(name: str, work: Workload, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    """A line of the table: the rounds of both legs of a comparison."""
    one, other, what = COMPARISONS[name]

    def both(key: str, form: str) -> str:
        return " / ".join(form.format(median(result[key] for result in rounds)) for rounds in (first, second))

    def ratio(key: str) -> str:
        speed = [a[key] / b[key] for a, b in zip(first, second, strict=True)]
        return common.median_range(speed if what == "speed" else [1 / value for value in speed])

    def share(key: str) -> str:
        return common.median_range([a[key] / b[key] for a, b in zip(first, second, strict=True)])

    cells = (
        f"{work.model}, {work.profile}",
        f"{one} / {other}",
        f"{what} {ratio('pairs_per_cpu_second')}",
        f"{what} {ratio('pairs_per_second')}",
        both("pairs_per_cpu_second", "{:.2f}"),
        both("pairs_per_second", "{:.2f}"),
        f"{both('working', '{:.0f}')}, {share('working')}",
        f"{both('peak', '{:.0f}')}, {share('peak')}",
        both("padding", "{:.0%}"),
        both("fed", "{:.0f}"),
    )
    return f"| {' | '.join(cells)} |"


_HEADER = (
    "model, lengths", "first / second", "ratio of CPU time", "ratio of wall time", "pairs per CPU second",
    "pairs per second", "working memory, MB, first over second", "peak memory, MB, first over second", "padding", "tokens fed per pair",
)  # fmt: skip


def compare(names: Sequence[str], work: Workload, rounds: int) -> list[str]:
    """The table's lines for one model and profile.

    Raises:
        RuntimeError: a leg failed, or two legs did not do the same work.
    """
    legs = list(dict.fromkeys(leg for name in names for leg in COMPARISONS[name][:2]))
    results: dict[Leg, list[dict[str, Any]]] = {leg: [] for leg in legs}
    for i in range(rounds):
        for leg in legs:
            result = common.run_alone(Path(__file__), {"leg": asdict(leg), "work": asdict(work)}, work.threads)
            results[leg].append(result)
            losses = " ".join(f"{loss:.5f}" for loss in result["losses"])
            speed = f"{result['pairs_per_cpu_second']:.2f} pairs per CPU second, {result['pairs_per_second']:.2f} per second"
            about = f"round {i + 1} of {rounds}, {work.model}, {work.profile}, {leg}"
            print(f"{about}: {speed}, losses {losses}", file=sys.stderr, flush=True)
        for name in names:
            one, other, what = COMPARISONS[name]
            if what == "speed" and (why := disagreement(results[one][-1], results[other][-1])):
                raise RuntimeError(f"{work.model}, {work.profile}, {one} / {other}: {why}")
    return [row(name, work, *(results[leg] for leg in COMPARISONS[name][:2])) for name in names]


def describe(work: Workload) -> str:
    """The model's proportions and the lengths as they were drawn."""
    model = common.build_model(work.model, work.vocab, work.seed)
    trunk, head = common.proportions(model)
    pairs = common.make_pairs(work.profile, work.pairs, model.config.vocab_size, work.seed)
    means = {name: sum(len(pair[name]) for pair in pairs) / len(pairs) for name in pairs[0]}
    longest = max(len(p["prompt_ids"]) + len(p[side]) for p in pairs for side in ("chosen_ids", "rejected_ids"))
    lengths = ", ".join(f"{name.removesuffix('_ids')} {mean:.0f}" for name, mean in means.items())
    return (
        f"- {work.model}: {trunk / 1e6:.1f}M weights in the trunk, {head / 1e6:.1f}M in the head, vocabulary "
        f"{model.config.vocab_size}; {work.profile}: {len(pairs)} pairs, mean tokens {lengths}, longest sequence {longest}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compare", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--model", nargs="+", choices=common.SHAPES, default=["llama"])
    parser.add_argument("--vocab", type=int, help="tokens, in place of the model's own number")
    parser.add_argument("--profile", nargs="+", choices=common.PROFILES, default=["mixed"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed steps; one more comes first")
    parser.add_argument("--pairs-per-step", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=CPU_TOKENS, help="ours: tokens held at once")
    parser.add_argument("--trl-batch", type=int, default=1, help="TRL: pairs held at once; 1 is its fastest here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="large: the losses must move to be compared")
    parser.add_argument("--quick", action="store_true", help="one round of a few short steps")
    parser.add_argument("--leg", help=argparse.SUPPRESS)  # of `common.run_alone`
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.steps, options.pairs_per_step, options.trl_batch = 1, 1, 4, 2
        options.vocab, options.profile, options.compare = 1000, ["chat"], ["dpo", "wpo-cost"]
    if options.pairs_per_step % options.trl_batch:
        parser.error("--pairs-per-step must be a multiple of --trl-batch")
    return options


def main() -> int:
    """Compare, or train one leg for a comparison in another process."""
    options = _options()
    if options.leg:
        spec = json.loads(options.leg)
        options.into.write_text(json.dumps(run_leg(Leg(**spec["leg"]), Workload(**spec["work"]))))
        return 0
    given = {name: getattr(options, name) for name in Workload.__dataclass_fields__ if name not in ("model", "profile")}
    works = [Workload(model=model, profile=p, **given) for model in options.model for p in options.profile]
    lines: list[str] = []
    try:
        for work in works:
            lines += compare(options.compare, work, options.rounds)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{common.machine()}; {common.versions('torch', 'transformers', 'trl')}; commit {common.commit()}")
    print(
        f"\nfloat32, {options.threads} thread(s), steps of {options.pairs_per_step} pairs, {options.steps} timed, "
        f"{options.rounds} round(s): median [smallest, largest]; micro-batches of {options.micro_batch_tokens} tokens "
        f"(align) and {options.trl_batch} pairs (TRL)\n"
    )
    print(*map(describe, works), sep="\n")
    print(f"\n| {' | '.join(_HEADER)} |\n|{'---|' * len(_HEADER)}", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
