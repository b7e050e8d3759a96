"""The spine on one screen: few frames from the shell to the equation, and three files that are read from top to bottom."""

import traceback
from pathlib import Path

import pytest
from conftest import ROOT, quick

BREAKS = """
from dataclasses import dataclass

from objectives import Objective, PairLoss, register


@register("breaks")
@dataclass(frozen=True, kw_only=True)
class Breaks(Objective):
    needs = frozenset({"logp"})

    def __call__(self, chosen, rejected):
        if chosen.logp.requires_grad:  # in a step; the start policy was evaluated before
            raise ZeroDivisionError
        return PairLoss(rejected.logp - chosen.logp, chosen.logp, rejected.logp, {})
"""


def test_eight_frames_lead_from_main_to_the_objective(align, tiny_llama, pairs_file, tmp_path):
    (tmp_path / "breaks.py").write_text(BREAKS)
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "breaks.yaml").write_text("name: breaks\ncode: breaks.py\n")
    with pytest.raises(ZeroDivisionError) as error:
        align("--config-dir", str(tmp_path), *quick(tiny_llama, pairs_file, "objective=breaks"))
    frames = traceback.extract_tb(error.tb)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT / "align")]
    ours += [frame for frame in frames if Path(frame.filename).name == "breaks.py"]
    names = [frame.name for frame in ours]
    assert names == ["main", "job", "carry_out", "each", "iterate", "train", "step", "__call__"]


def test_the_run_the_training_and_the_loss_are_one_file_each_of_at_most_200_lines():
    for file in ("align/runs/spine.py", "align/train/loop.py", "objectives/dpo.py"):
        assert len((ROOT / file).read_text().splitlines()) <= 200, file
