"""`python -m align.select run_dir=<folder> ...`: the third stage of self-play alone, pairs from responses and scores.

The words are those of `python -m align`; `selection` and the seed matter. <folder>/responses and <folder>/scores are
read, <folder>/pairs is written: a preference file to train on.
"""

from align import run, stages
from align.__main__ import main
from align.config import RunConfig
from align.onpolicy.pairs import write_pairs


def select(cfg: RunConfig) -> None:
    """Choose the pair of each prompt.

    Raises:
        UserError: anything the user can put right.
    """
    folder = stages.folder_of(cfg)
    pairs = folder / "pairs"
    counts = write_pairs(folder / "responses", folder / "scores", cfg.selection, pairs, seed=cfg.seed + 1)
    run.say(f"{stages.describe(counts)}\npairs  {pairs}")
    run.say(
        f"to train: dataset=local dataset.path={pairs / 'train.jsonl'} dataset.eval_path={pairs / 'held_out.jsonl'}"
    )


if __name__ == "__main__":
    main("align.select:select")
