"""The sentinel: when a run is beyond hope, what is said of it, and the file that keeps others from trying again.

Three signs: chosen responses have become far less likely than under the start model (mean_logp), the policy's own
answers repeat themselves (seq-rep-4, summary.repetition), or a loss or gradient is not finite (trainer.py sees that one).
The first and the last cost nothing; answers are sampled only where `sentinel.sample_every_steps` says so. Left out:
what a run of self-play makes of it (selfplay.py), and a policy whose weights are divided among processes: it cannot be sampled.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from align.config import SentinelConfig
from align.files import write_json
from align.launch.rank import Rank
from align.onpolicy.figures import repetition
from align.say import UserError

PROMPTS = 8  # held-out ones, always the same, that are answered


REPETITION = "sentinel/repetition"  # the metric


FILE = "collapsed.json"  # of a run folder


_BOUND, _SHARE = "sentinel.mean_logp_drop", "sentinel.repetition"  # a verdict names its own


_LETS_GO_ON = {_BOUND: f"{_BOUND}=null", _SHARE: "sentinel.sample_every_steps=null"}  # where it is typed


class CollapsedError(UserError):
    """The run was ended as hopeless, by all its processes after the same step."""

    def __init__(self, step: int, why: str, remedy: str = "") -> None:
        super().__init__(f"step {step}: {why}{remedy}")
        self.step, self.why = step, why


@dataclass(frozen=True, kw_only=True)
class Sentinel:
    """Looks at every logged step. Every process asks it the same, and all come to the same answer.

    Attributes:
        start_mean_logp: of chosen held-out responses under the start model, nats per token.
        sample: token ids of the policy's answers; called on the first process only.
    """

    cfg: SentinelConfig
    rank: Rank
    start_mean_logp: float
    sample: Callable[[], Sequence[Sequence[int]]]

    def sampled(self, step: int) -> dict[str, float]:
        """The metric of answers, at the steps at which they are sampled."""
        every = self.cfg.sample_every_steps
        if every is None or step % every:
            return {}
        share: float = self.rank.from_first(lambda: fmean(map(repetition, self.sample())))
        return {REPETITION: share}

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise `CollapsedError` where a step's metrics say that the run is."""
        if why := verdict(self.cfg, self.start_mean_logp, metrics):
            raise CollapsedError(step, why)


def verdict(cfg: SentinelConfig, start_mean_logp: float, metrics: Mapping[str, float]) -> str | None:
    """Why a policy with these metrics has collapsed; None where it has not."""
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
    """Write down that the run in a folder has collapsed."""
    write_json(folder / FILE, {"step": end.step, "why": end.why})


def refuse(folder: Path) -> None:
    """Raise for a run that has collapsed before, so that nothing of it is trained again."""
    if not (file := folder / FILE).exists():
        return
    try:
        known = json.loads(file.read_text())
        end = CollapsedError(known["step"], known["why"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged: delete it, and the run goes on") from error
    raise with_remedy(end, folder)


def with_remedy(end: CollapsedError, folder: Path) -> CollapsedError:
    """The same, and what to type."""
    what = "start another run with a lower optimizer.learning_rate"
    knob = next((typed for named, typed in _LETS_GO_ON.items() if f"{named}=" in end.why), None)
    if knob is not None:  # a loss that is not finite has none: the same steps would end alike
        what += f"; to go on all the same, both delete {folder / FILE} and type the command again with {knob}"
    return CollapsedError(end.step, end.why, f". This run has collapsed: {what}")
