"""The sentinel: a hopeless run ends early and says so, a good one never notices that it was watched."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import quick
from safetensors.torch import load_file

from align.config import SentinelConfig
from align.launch.rank import Rank
from align.say import UserError
from align.train import sentinel, train
from align.train.sentinel import REPETITION, CollapsedError, Sentinel, verdict

ABSURD = ["optimizer.learning_rate=1.0", "optimizer.warmup_steps=0", "optimizer.max_steps=30"]
LOOKS = ["sentinel.sample_every_steps=2", "evaluation.samples_per_prompt=2", "evaluation.max_new_tokens=8"]


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl, without what depends on the clock."""
    made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")} for line in made]


# Decisions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mean_logp, share, says",
    [
        (-1.0, 0.0, None),
        (-6.0, 0.5, None),  # just at both bounds: 5 nats below -1, and one half
        (-6.1, 0.0, "5.1 nats per token below the start model's, more than sentinel.mean_logp_drop=5"),
        (math.nan, 0.0, "nan nats per token"),
        (-1.0, 0.51, "51% of the 4-grams of its answers repeat an earlier one, more than sentinel.repetition=0.5"),
    ],
)
def test_a_policy_has_collapsed_beyond_its_bounds(mean_logp, share, says):
    why = verdict(SentinelConfig(), -1.0, {"train/mean_logp/chosen": mean_logp, REPETITION: share})
    assert (why is None) if says is None else (says in why)


def test_without_a_bound_nothing_is_too_far():
    assert verdict(SentinelConfig(mean_logp_drop=None), -1.0, {"train/mean_logp/chosen": -1000.0}) is None


def test_answers_are_sampled_every_so_many_steps_and_their_repetition_is_a_mean():
    asked = []

    def sample() -> list[list[int]]:
        asked.append(True)
        return [[1] * 5, [1, 2, 3, 4, 5], [7]]  # 1/2, 0 and 0

    rank = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)
    watch = Sentinel(cfg=SentinelConfig(sample_every_steps=3), rank=rank, start_mean_logp=-1.0, sample=sample)
    assert [watch.sampled(step) for step in (1, 2, 3, 4)] == [{}, {}, {REPETITION: pytest.approx(1 / 6)}, {}]
    never = Sentinel(cfg=SentinelConfig(), rank=rank, start_mean_logp=-1.0, sample=sample)
    assert never.sampled(3) == {} and len(asked) == 1


def test_a_collapse_that_is_written_down_is_told_again_word_for_word(tmp_path):
    end = CollapsedError(7, "it stutters")
    sentinel.mark(tmp_path, end)
    assert read(tmp_path / "collapsed.json") == {"step": 7, "why": "it stutters"}
    with pytest.raises(CollapsedError) as again:
        sentinel.refuse(tmp_path)
    assert str(again.value) == str(sentinel.with_remedy(end, tmp_path))
    assert str(again.value).startswith("step 7: it stutters. This run has collapsed: ")
    (tmp_path / "collapsed.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        sentinel.refuse(tmp_path)


@pytest.mark.parametrize(
    "metrics, knob",
    [
        ({"train/mean_logp/chosen": -7.0}, "sentinel.mean_logp_drop=null"),
        ({"train/mean_logp/chosen": -1.0, REPETITION: 0.75}, "sentinel.sample_every_steps=null"),
    ],
)
def test_to_go_on_takes_both_the_file_away_and_the_knob_of_the_bound(metrics, knob, tmp_path):
    why = verdict(SentinelConfig(), -1.0, metrics)
    assert why is not None
    said = str(sentinel.with_remedy(CollapsedError(7, f"iteration 2: {why}"), tmp_path))  # as self-play says it
    assert "\n" not in said and "start another run with a lower optimizer.learning_rate" in said
    assert said.endswith(f"both delete {tmp_path / 'collapsed.json'} and type the command again with {knob}")


def test_a_loss_that_is_not_finite_is_no_matter_of_a_knob(tmp_path):
    said = str(sentinel.with_remedy(CollapsedError(7, "the gradient is not finite"), tmp_path))
    assert said.endswith("collapsed: start another run with a lower optimizer.learning_rate")


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_absurd_learning_rate_ends_the_run_early_and_the_same_command_trains_nothing(
    align, monkeypatch, tiny_llama, pairs_file, tmp_path
):
    folder = tmp_path / "run"
    words = quick(tiny_llama, pairs_file, f"run_dir={folder}", *ABSURD)
    first = align(*words)
    assert first.status == 1 and not (folder / "results.json").exists()
    told = first.err.splitlines()[-1]
    made, steps = read(folder / "collapsed.json"), lines(folder)
    assert told.startswith(f"align: step {made['step']}: {made['why']}. This run has collapsed: start another")
    assert 1 < made["step"] < 10 and steps[-1]["step"] == made["step"]
    start = read(folder / "start.json")["eval/mean_logp/chosen"]
    *good, bad = [start - line["train/mean_logp/chosen"] for line in steps if "train/loss" in line]
    assert bad > 5 and max(good) <= 5  # at the first step that is beyond the bound

    monkeypatch.setattr(train, "load_policy", None)  # calling it would fail
    again = align(*words)
    assert (again.status, again.err.splitlines()[-1], lines(folder)) == (1, told, steps)
    plan = align(*words, "plan=true")
    assert plan.status == 0 and "first loss" in plan.out
    monkeypatch.undo()
    other = align(*words, "sentinel.mean_logp_drop=null")  # no other run; and the file is still there
    assert other.status == 1 and f"both delete {folder / 'collapsed.json'} and type" in other.err
    (folder / "collapsed.json").unlink()
    monkeypatch.chdir(tmp_path)
    on = align(*words, "sentinel.mean_logp_drop=null", "cache_dir=cache")
    assert on.status == 0 and (folder / "results.json").exists(), on.err


def test_answers_that_repeat_themselves_end_the_run(align, monkeypatch, tiny_llama, pairs_file, tmp_path):
    monkeypatch.setattr(sentinel, "repetition", lambda ids: 0.75)
    folder = tmp_path / "run"
    words = [*LOOKS, "optimizer.max_steps=4", "train.save_every_steps=1"]
    result = align(*quick(tiny_llama, pairs_file, f"run_dir={folder}", *words))
    assert result.status == 1 and "step 2: 75% of the 4-grams" in result.err
    assert lines(folder)[-1][REPETITION] == 0.75
    kept = [path.name for path in (folder / "checkpoints").glob("checkpoint-*")]
    assert kept == ["checkpoint-1"]  # of the step that collapsed there is none


@pytest.mark.slow
def test_a_job_that_collapses_fails_alone(align, tiny_llama, pairs_file, tmp_path):
    result = align("-m", *quick(tiny_llama, pairs_file, *ABSURD[1:2], "optimizer.learning_rate=1e-3,1.0"))
    runs = sorted((tmp_path / "runs").glob("local-*"))
    done = [(run / "results.json").exists() for run in runs]
    assert result.status == 1 and "This run has collapsed" in result.err
    assert sorted(done) == [False, True]
    assert [(run / "collapsed.json").exists() for run in runs] == [not it for it in done]


@pytest.mark.slow
def test_a_run_that_is_looked_at_is_the_same_to_the_bit_and_so_is_one_that_goes_on(
    align, tiny_gemma2, pairs_file, tmp_path
):
    words = ["optimizer.max_steps=6", "train.save_every_steps=2", "train.eval_every_steps=2"]
    plain, looked = tmp_path / "plain", tmp_path / "looked"
    for folder, more in ((plain, []), (looked, LOOKS)):
        result = align(*quick(tiny_gemma2, pairs_file, f"run_dir={folder}", *words, *more))
        assert result.status == 0, result.err
    looks = [line[REPETITION] for line in lines(looked) if REPETITION in line]
    assert len(looks) == 3 and all(0 <= share <= 1 for share in looks)

    cut = shutil.copytree(looked, tmp_path / "cut")
    for later in ("results.json", "trained.json"):
        (cut / later).unlink()
    for later in ("checkpoints/checkpoint-6", "model"):
        shutil.rmtree(cut / later)
    torch.manual_seed(1)
    again = align(*quick(tiny_gemma2, pairs_file, f"run_dir={cut}", *words, *LOOKS))
    assert again.status == 0 and "checkpoint-4" in again.out, again.err
    assert lines(cut) == lines(looked)
    unseen = [{name: value for name, value in line.items() if name != REPETITION} for line in lines(looked)]
    assert unseen == lines(plain)
    trained = [load_file(folder / "model" / "model.safetensors") for folder in (plain, looked, cut)]
    for other in trained[1:]:
        assert all(torch.equal(value, other[name]) for name, value in trained[0].items())


def test_divided_weights_cannot_be_sampled_while_they_train(align, tiny_llama, pairs_file, tmp_path):
    words = ["cluster=cpu_2", "cluster.strategy=fsdp", "sentinel.sample_every_steps=1", "plan=true"]
    result = align(*quick(tiny_llama, pairs_file, *words))
    assert result.status == 1 and result.err.count("\n") == 1
    assert "sentinel.sample_every_steps=1" in result.err and "use ddp or zero2" in result.err


@pytest.mark.parametrize(
    "words, says",
    [
        (["sentinel.mean_logp_drop=0"], "sentinel.mean_logp_drop must be above 0, not 0"),
        (["sentinel.sample_every_steps=0"], "sentinel.sample_every_steps must be above 0, not 0"),
        (["sentinel.repetition=1.5"], "sentinel.repetition must lie in (0, 1], not 1.5"),
        (
            ["sentinel.sample_every_steps=5", "train.log_every_steps=2", "train.save_every_steps=2"],
            "sentinel.sample_every_steps (5) must be a multiple of train.log_every_steps (2)",
        ),
    ],
)
def test_a_bound_that_cannot_be_is_refused(align, tiny_llama, pairs_file, words, says):
    result = align(*quick(tiny_llama, pairs_file, *words))
    assert result.status == 1 and says in result.err


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.multiprocess
def test_two_processes_collapse_together(tiny_llama, pairs_file, tmp_path):
    from commands import Command

    folder = tmp_path / "run"
    words = [*quick(tiny_llama, pairs_file, f"run_dir={folder}", *ABSURD, *LOOKS), "cluster=cpu_2", "tracker=none"]
    with Command(words, tmp_path) as command:
        end = command.ends()
    made = read(folder / "collapsed.json")
    assert (
        end.status == 1 and f": step {made['step']}: {made['why']}. This run has collapsed" in end.err.splitlines()[-1]
    )
    assert any(REPETITION in line for line in lines(folder))
