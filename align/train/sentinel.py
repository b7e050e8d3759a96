"""The sentinel: when a run is beyond hope, what is said of it, and the file that keeps others from trying again.

Three signs: chosen responses have become far less likely than under the start model (mean_logp), the policy's own
answers repeat themselves (seq-rep-4, `figures.repetition`), or a loss or gradient is not finite (loop.py sees that one).
The first and the last cost nothing; answers are sampled only where `sentinel.sample_every_steps` says so. Left out: a
policy whose weights are divided among processes, which cannot be sampled.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import PreTrainedModel

from align.config import SentinelConfig
from align.files import write_json
from align.launch.rank import Rank
from align.model.chat import prompt_ids
from align.onpolicy.figures import repetition
from align.onpolicy.samplers import Prompt, hf_sampler, seeds
from align.say import UserError
from align.train.job import Job

REPETITION = "sentinel/repetition"  # the metric
FILE = "collapsed.json"  # of a run folder
_PROMPTS = 8  # held-out ones, always the same, that are answered
_STREAM = 2  # third random stream of a run: answers of the start model are 0, of the trained policy 1
_BOUND, _SHARE = "sentinel.mean_logp_drop", "sentinel.repetition"  # a verdict names its own
_LETS_GO_ON = {_BOUND: f"{_BOUND}=null", _SHARE: "sentinel.sample_every_steps=null"}  # where it is typed


class CollapsedError(UserError):
    """A run that was ended as hopeless, by all its processes after the same step."""

    def __init__(self, step: int, why: str, remedy: str = "") -> None:
        super().__init__(f"step {step}: {why}{remedy}")
        self.step, self.why = step, why


@dataclass(frozen=True, kw_only=True)
class Sentinel:
    """Watch every logged step. Every process asks the same, and all come to the same answer."""

    cfg: SentinelConfig
    rank: Rank
    start_mean_logp: float  # of chosen held-out responses under the start model, nats per token
    sample: Callable[[], Sequence[Sequence[int]]]  # token ids of the policy's answers; called on the first process only

    def sampled(self, step: int) -> dict[str, float]:
        """Return the metric of answers, at the steps at which they are sampled."""
        every = self.cfg.sample_every_steps
        if every is None or step % every:
            return {}
        share: float = self.rank.from_first(lambda: fmean(map(repetition, self.sample())))
        return {REPETITION: share}

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise `CollapsedError` where a step's metrics say that the run has collapsed."""
        if why := verdict(self.cfg, self.start_mean_logp, metrics):
            raise CollapsedError(step, why)


def sentinel_of(job: Job, policy: PreTrainedModel, start_mean_logp: float, rank: Rank) -> Sentinel:
    """Make the sentinel of a policy in training, which holds whole weights where answers are asked for."""
    cfg, tokenizer = job.cfg, job.start.tokenizer
    conversations = list(dict.fromkeys(job.pairs.held_out["conversation"]))[:_PROMPTS]
    prompts = [  # the same random numbers each time, and not those of the win rate
        Prompt(
            token_ids=prompt_ids(json.loads(text), tokenizer),
            seeds=seeds(cfg.seed, _STREAM, text, cfg.evaluation.samples_per_prompt),
        )
        for text in conversations
    ]

    def sample() -> list[list[int]]:
        devices = [rank.device] if rank.device.type == "cuda" else []
        with torch.random.fork_rng(devices), rank.autocast():  # training goes on as if nobody had looked
            drawn = hf_sampler(policy, tokenizer, cfg.sampling.tokens_per_batch)(prompts, cfg.evaluation)
        return [answer.response_ids for of_prompt in drawn for answer in of_prompt]

    return Sentinel(cfg=cfg.sentinel, rank=rank, start_mean_logp=start_mean_logp, sample=sample)


def verdict(cfg: SentinelConfig, start_mean_logp: float, metrics: Mapping[str, float]) -> str | None:
    """Return why a policy with these metrics has collapsed; None where it has not."""
    drop = start_mean_logp - metrics["train/mean_logp/chosen"]
    if cfg.mean_logp_drop is not None and not drop <= cfg.mean_logp_drop:  # so that NaN counts
        return (
            f"mean_logp of chosen responses is {drop:.3g} nats per token below the start model's, more than "
            f"{_BOUND}={cfg.mean_logp_drop:g}"
        )
    share = metrics.get(REPETITION, 0.0)
    if not share <= cfg.repetition:
        return f"{share:.0%} of the 4-grams of its answers repeat an earlier one, more than {_SHARE}={cfg.repetition:g}"
    return None


def mark(folder: Path, end: CollapsedError) -> None:
    """Write into its folder that a run has collapsed."""
    write_json(folder / FILE, {"step": end.step, "why": end.why})


def refuse(folder: Path) -> None:
    """Raise for a run that has collapsed before, so that nothing of it is trained again."""
    if not (file := folder / FILE).exists():
        return
    try:
        end = CollapsedError(**json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is damaged: delete it, and the run goes on") from error
    raise with_remedy(end, folder)


def with_remedy(end: CollapsedError, folder: Path) -> CollapsedError:
    """Return the same error with what to type."""
    what = "start another run with a lower optimizer.learning_rate"
    knob = next((typed for named, typed in _LETS_GO_ON.items() if f"{named}=" in end.why), None)
    if knob is not None:  # a loss that is not finite has none: the same steps would end alike
        what += f"; to go on all the same, both delete {folder / FILE} and type the command again with {knob}"
    return CollapsedError(end.step, end.why, f". This run has collapsed: {what}")
