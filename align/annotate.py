"""`python -m align.annotate run_dir=<folder> ...`: the second stage of self-play alone, scores of <folder>/responses.

The words are those of `python -m align`; `scorer` (or the dataset's judge) and the cluster matter. The scores go into
<folder>/scores. Started several times on one folder, also on several machines, the commands share the responses.
"""

from pathlib import Path

from align import launch, run, stages, train
from align.__main__ import main
from align.config import RunConfig
from align.launch import Fleet
from align.onpolicy.sample import read_samples


def annotate(cfg: RunConfig) -> None:
    """Score all responses.

    Raises:
        UserError: anything the user can put right.
    """
    train.quieten()
    folder = stages.folder_of(cfg)
    read_samples(folder / "responses")
    fleet = launch.fleet(cfg.cluster)
    stages.in_each_process(fleet, stages.logs_of(folder), _annotate, cfg, folder, fleet)
    run.say(f"scores  {folder / 'scores'}")


def _annotate(cfg: RunConfig, folder: Path, fleet: Fleet) -> None:
    stages.score_responses(read_samples(folder / "responses"), cfg, folder / "scores", launch.apart(fleet))


if __name__ == "__main__":
    main("align.annotate:annotate")
