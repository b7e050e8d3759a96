"""The recorded runs: the file is whole, and today's runs end as those did."""

import json
import math

import golden_runs
import pytest

RECORDED = json.loads(golden_runs.FILE.read_text())


def test_eight_runs_are_recorded_with_finite_losses():
    assert RECORDED["runs"].keys() == golden_runs.RUNS.keys() and len(RECORDED["runs"]) == 8
    for name, figures in RECORDED["runs"].items():
        series = [value for key, value in figures.items() if key.endswith(" train/loss")]
        assert [[step for step, _ in losses] for losses in series] == [[1, 2, 3, 4, 5, 6]] * len(series), name
        assert len(series) == (2 if name == "selfplay" else 1)
        assert all(math.isfinite(loss) for losses in series for _, loss in losses), name


def test_the_run_that_was_killed_is_recorded_as_the_same_command_undisturbed():
    assert RECORDED["runs"]["resumed"] == RECORDED["runs"]["dpo"]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.multiprocess
def test_the_runs_end_as_they_were_recorded():
    # Another processor or torch sums in another order: figures agree to float32's rounding, weights not to the bit.
    same = RECORDED["header"] == golden_runs.header()
    assert golden_runs.main(["check"] if same else ["check", "--within", "1e-4"]) == 0
