"""`python -m align.sample run_dir=<folder> ...`: the first stage of self-play alone, answers into <folder>/responses.

The words are those of `python -m align`; the model, the dataset's prompts, `sampling`, `source` and the cluster matter.
Started several times on one folder, also on several machines, the commands share the prompts. Left out: training.
"""

from collections.abc import Sequence
from pathlib import Path

from align import launch, run, stages, train
from align.__main__ import main
from align.config import RunConfig
from align.launch import Fleet
from align.onpolicy.prompts import PromptRow
from align.stages import Policy


def sample(cfg: RunConfig) -> None:
    """Answer all prompts of the first iteration.

    Raises:
        UserError: anything the user can put right.
    """
    train.quieten()
    folder = stages.folder_of(cfg)
    start, prompts, fleet = stages.prepare_answers(cfg)
    policy = Policy(iteration=0, cfg=cfg.model, start=start)
    asked = stages.prompts_of(cfg, prompts, 1)
    stages.in_each_process(fleet, stages.logs_of(folder), _sample, cfg, policy, asked, folder, fleet)
    run.say(f"responses  {folder / 'responses'}")


def _sample(cfg: RunConfig, policy: Policy, asked: Sequence[PromptRow], folder: Path, fleet: Fleet) -> None:
    stages.sample_from(policy, asked, cfg, cfg.sampling, folder / "responses", 1, "responses", launch.apart(fleet))


if __name__ == "__main__":
    main("align.sample:sample")
