"""A run as its user meets it: its folder, its second time, other trackers, an objective of one's own."""

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import pair_row, quick, write_jsonl
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from align.__main__ import main
from align.engine.batching import CPU_TOKENS
from align.model.load import Policy
from align.runs import folder as run_folder
from align.runs.prepare import prepare
from align.say import UserError
from align.train import checkpoint, reference, train
from align.train.checkpoint import MADE_BY, last_checkpoint


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_gemma2) -> tuple[list[str], Path]:
    """The words of a run that is complete, and the folder that holds it and its pairs. Tests look, or copy."""
    home = tmp_path_factory.mktemp("finished")
    pairs = write_jsonl(home / "pairs.jsonl", [pair_row(i) for i in range(40)])
    setup = "cluster.slurm.setup=['export OPENAI_API_KEY=sk-123', 'module load cuda']"
    judge = "scorer.judge.urls=['https://me:hunter2@judge:8000']"
    words = quick(tiny_gemma2, pairs, "objective=wpo", "seed=5", setup, judge, "train.save_every_steps=1")
    words += [f"run_dir={home / 'run'}", f"cache_dir={home / 'cache'}", "tracker=none"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["align", *words])
        main()
    (home / "said").write_text(out.getvalue())
    return words, home


def test_a_run_folder_holds_what_a_person_needs(finished, tiny_gemma2):
    folder = finished[1] / "run"
    for name in ("plan.txt", "first_pair.txt", "metrics.jsonl", "results.json", "model/README.md", "model/config.json"):
        assert (folder / name).stat().st_size > 0, name
    columns = load_file(folder / "reference.safetensors")
    assert {name: tuple(column.shape) for name, column in columns.items()} == {"train": (38, 2), "held_out": (2, 2)}
    config = OmegaConf.load(folder / "config.yaml")
    assert (config.seed, config.objective.base.name, config.train.truncation) == (5, "dpo", "papers")
    results = json.loads((folder / "results.json").read_text())
    assert results["start"]["accuracy/log_ratio"] == 0.5  # every pair ties with itself, and a tie is half
    card = (folder / "model" / "README.md").read_text()
    for said in (
        "wpo",
        "'beta': 0.01",
        str(tiny_gemma2),
        "fingerprint `",
        "seed 5",
        "held-out accuracy",
        '"alignment": "sampled"',
    ):
        assert said in card, said
    assert "held-out accuracy by log_ratio" in (finished[1] / "said").read_text()


def test_the_trained_model_loads_as_a_pipeline_with_its_chat_template(finished, tokenizer):
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(finished[1] / "run" / "model"), device="cpu")
    said = generate([{"role": "user", "content": "please name 2 animals"}], max_new_tokens=3, do_sample=False)
    assert said[0]["generated_text"][-1]["role"] == "assistant"
    assert generate.tokenizer.chat_template == tokenizer.chat_template


def test_the_same_command_again_trains_nothing_and_shows_the_table(finished, align, monkeypatch):
    words, home = finished
    monkeypatch.setattr(train, "load_policy", None)  # calling it would fail
    again = align(*words)
    assert again.status == 0 and "This run is complete" in again.out
    assert (home / "said").read_text().splitlines()[-5:] == again.out.splitlines()[-5:]


def test_nothing_of_a_run_is_left_in_the_process(finished):
    assert not torch.distributed.is_initialized()


def test_no_secret_that_was_typed_is_written_down(finished):
    written = "".join(
        file.read_text()
        for file in (finished[1] / "run").rglob("*")
        if file.suffix in (".yaml", ".json", ".md", ".txt")
    )
    assert "export OPENAI_API_KEY=***" in written and "https://***@judge:8000" in written
    assert "sk-123" not in written and "hunter2" not in written


@pytest.mark.slow
def test_a_second_run_over_the_same_data_and_start_model_does_no_reference_forward(
    align, monkeypatch, tiny_llama, pairs_file, tmp_path
):
    assert align(*quick(tiny_llama, pairs_file, f"run_dir={tmp_path / 'a'}")).status == 0

    def refuse(*args):
        raise AssertionError("a forward for a reference that is cached")

    monkeypatch.setattr(reference, "response_statistics", refuse)
    for words in (("objective.beta=0.05",), ("objective=sppo",), ("objective=wpo", "seed=3")):
        result = align(*quick(tiny_llama, pairs_file, *words))
        assert result.status == 0, result.err


@pytest.mark.slow
def test_what_runs_share_is_said_to_be_made_once(align, monkeypatch, pairs_file, tmp_path):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    tiny = ["model=tiny", "model.fit=null", "model.init.num_hidden_layers=1", f"dataset.path={pairs_file}"]
    tiny += ["dataset=local", "cluster=cpu", "train.pairs_per_step=8", "optimizer.max_steps=1"]
    result = align("-m", *tiny, "objective.beta=0.1,0.2")
    assert result.status == 0, result.err
    made = [line.partition(" in ") for line in result.out.splitlines() if line.startswith("made ")]
    assert [what for what, _, _ in made] == [
        "made start model",
        "made pairs of local",
        "made reference log-probabilities of 2 held_out pairs",
        "made reference log-probabilities of 38 train pairs",
    ]
    for _, _, rest in made:
        seconds, _, folder = rest.partition(" s: ")
        assert float(seconds) >= 0 and folder.startswith(str(tmp_path / "cache"))


@pytest.mark.slow
def test_a_reference_free_objective_computes_no_reference_for_its_training_pairs(
    align, monkeypatch, tiny_llama, pairs_file, folder
):
    made = []
    original = reference.reference_logps
    monkeypatch.setattr(reference, "reference_logps", lambda *a, **k: made.append(k["name"]) or original(*a, **k))
    assert align(*quick(tiny_llama, pairs_file, f"run_dir={folder}", "objective=simpo")).status == 0
    assert made == ["held_out"]


def test_another_value_is_another_folder_and_bookkeeping_is_not(composed, tiny_llama, pairs_file):
    of = {
        word: prepare(composed(*quick(tiny_llama, pairs_file, *([word] if word else [])))).dir
        for word in ("", "objective.beta=0.2", "train.log_every_steps=2", "seed=7")
    }
    assert len(set(of.values())) == 3 and of[""] == of["train.log_every_steps=2"]


def test_a_start_model_that_changed_in_its_folder_is_another_run(composed, tiny_llama, pairs_file, tmp_path):
    own = shutil.copytree(tiny_llama, tmp_path / "own")
    before = prepare(composed(*quick(own, pairs_file))).dir
    weights = {name: value * 1.01 for name, value in load_file(own / "model.safetensors").items()}
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    assert prepare(composed(*quick(own, pairs_file))).dir != before


@pytest.mark.slow
def test_what_else_lies_in_a_folder_that_is_named_as_run_dir_stays(align, tiny_llama, pairs_file, folder):
    theirs = [folder / "evaluation" / "notes.txt", folder / "merged" / "weights.txt", folder / "logs" / "mine.txt"]
    for file in theirs:
        file.parent.mkdir(parents=True)
        file.write_text("precious")
    assert align(*quick(tiny_llama, pairs_file, f"run_dir={folder}")).status == 0
    assert [file.read_text() for file in theirs] == ["precious"] * 3


@pytest.mark.slow
def test_a_judge_that_fails_costs_no_model_and_the_next_try_trains_nothing(
    align, monkeypatch, tiny_llama, pairs_file, folder, tmp_path
):
    (tmp_path / "bad_judge.py").write_text(
        "fails = [True]\ndef judge(prompt, answer):\n    assert not fails[0]\n    return 1.0\n"
    )
    words = [
        *quick(tiny_llama, pairs_file, f"run_dir={folder}"),
        "dataset.judge=bad_judge:judge",
        "evaluation.max_new_tokens=4",
    ]
    with pytest.raises(AssertionError):
        align(*words)
    assert (folder / "model" / "model.safetensors").exists() and not (folder / "results.json").exists()
    sys.modules["bad_judge"].fails[0] = False
    monkeypatch.setattr(reference, "reference_logps", None)  # the run folder has the column
    again = align(*words)
    assert again.status == 0 and (folder / "results.json").exists()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2]  # at the start, two steps, after the last: once
    before, after = (load_file(folder / at / "model.safetensors") for at in ("checkpoints/checkpoint-2", "model"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_checkpoint_counts_once_it_is_whole(tmp_path):
    assert last_checkpoint(tmp_path / "checkpoints") is None
    for name in ("checkpoint-2", "checkpoint-10", "unfinished/checkpoint-12", "checkpoint-11"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "optimizer.pt").touch()
        if name != "checkpoint-11":
            (tmp_path / name / MADE_BY).write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


@pytest.mark.slow
def test_the_newest_checkpoints_are_kept_whole_and_say_who_wrote_them(align, tiny_llama, pairs_file, folder):
    words = ["optimizer.max_steps=4", "train.save_every_steps=1", "train.keep_checkpoints=2"]
    assert align(*quick(tiny_llama, pairs_file, f"run_dir={folder}", *words)).status == 0
    kept = sorted(folder.glob("checkpoints/**/checkpoint-*"))
    assert [path.relative_to(folder / "checkpoints").as_posix() for path in kept] == ["checkpoint-3", "checkpoint-4"]
    for path in kept:
        assert json.loads((path / MADE_BY).read_text()) == {"strategy": "single", "processes": 1}
        assert {file.name for file in path.iterdir()} == {
            *("model.safetensors", "optimizer.pt", "scheduler.bin", "random_states_0.pkl"),
            *("metrics_so_far.jsonl", "cost.json", MADE_BY),
        }


@pytest.mark.parametrize(
    "strategy, processes, says",
    [
        ("single", 1, None),
        ("ddp", 4, None),  # weights and optimizer in one piece, as one process writes them
        ("fsdp", 2, "was written by fsdp on 2 process(es), and this is single on 1: go on with cluster.strategy=fsdp,"),
        ("zero2", 4, "go on with cluster.strategy=zero2 cluster.processes=4,"),
        ("zero3", 1, "go on with cluster.strategy=zero3 cluster.processes=1,"),
    ],
)
def test_a_checkpoint_that_this_strategy_cannot_read_is_refused_with_the_one_that_can(
    finished, composed, tmp_path, strategy, processes, says
):
    words, home = finished
    folder = shutil.copytree(home / "run", tmp_path / "run")
    (folder / "results.json").unlink()
    made_by = folder / "checkpoints" / "checkpoint-2" / MADE_BY
    made_by.write_text(json.dumps({"strategy": strategy, "processes": processes}))
    again = [*(word for word in words if not word.startswith("run_dir=")), f"run_dir={folder}"]
    run = prepare(composed(*again))
    assert not run.is_complete
    if says is None:
        with run_folder.owned(run):
            pass
    else:
        with pytest.raises(UserError) as refused, run_folder.owned(run):
            pass
        assert says in str(refused.value) and "or begin anew with another run_dir=" in str(refused.value)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_in_one_line_and_costs_nothing_that_was_saved(
    align, monkeypatch, tiny_llama, pairs_file, folder
):
    words = ["optimizer.max_steps=3", "train.save_every_steps=1"]
    original, saves = checkpoint._write_state, []

    def full(loop, into):
        saves.append(loop.done)
        original(loop, into)
        if len(saves) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_state", full)
    stopped = align(*quick(tiny_llama, pairs_file, f"run_dir={folder}", *words))
    assert stopped.status == 1 and stopped.err.splitlines()[-1].startswith("align: cannot write ")
    assert "the disk is full" in stopped.err and "free some space" in stopped.err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-1"]
    again = align(*quick(tiny_llama, pairs_file, f"run_dir={folder}", *words))
    assert again.status == 0 and "going on from" in again.out and saves == [1, 2, 2, 3]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 3]


def test_a_changed_objective_file_is_another_run(align, monkeypatch, tiny_llama, pairs_file, tmp_path):
    folders = []
    monkeypatch.setattr("align.runs.spine.carry_out", lambda cfg: folders.append(prepare(cfg).dir))
    words = own_objective(tmp_path)
    assert align(*words, *quick(tiny_llama, pairs_file)).status == 0
    code = tmp_path / "my_objective.py"
    code.write_text(code.read_text().replace("- logsigmoid", "-1.0 * logsigmoid"))
    assert align(*words, *quick(tiny_llama, pairs_file)).status == 0
    assert len(set(folders)) == 2


def own_objective(tmp_path: Path) -> list[str]:
    """One Python file and one YAML, as the README shows; the words that use them."""
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("name: mine\ncode: my_objective.py\nbeta: 2.0\n")
    (tmp_path / "my_objective.py").write_text(
        "from dataclasses import dataclass\n"
        "from torch.nn.functional import logsigmoid\n"
        "from objectives import Objective, PairLoss, Response, register\n"
        "@register('mine')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Objective):\n"
        "    beta: float = 1.0\n"
        "    @property\n"
        "    def needs(self):\n"
        "        return frozenset({'logp', 'length'})\n"
        "    def __call__(self, chosen: Response, rejected: Response) -> PairLoss:\n"
        "        reward_w, reward_l = self.beta * chosen.mean_logp, self.beta * rejected.mean_logp\n"
        "        loss = - logsigmoid(reward_w - reward_l)\n"
        "        return PairLoss(loss, reward_w.detach(), reward_l.detach(), {'margin_squared': (reward_w - reward_l).detach() ** 2})\n"
    )
    return [f"--config-dir={tmp_path}", "objective=mine"]


@pytest.mark.slow
def test_an_objective_in_one_file_and_one_yaml_outside_the_project_trains(
    align, tiny_llama, pairs_file, tmp_path, folder
):
    result = align(*own_objective(tmp_path), *quick(tiny_llama, pairs_file, "objective.beta=3.0", f"run_dir={folder}"))
    assert result.status == 0, result.err
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    # Jensen: E[m^2] >= E[m]^2
    assert first["train/objective/margin_squared"] >= first["train/rewards/margins"] ** 2 > 0
    assert first["train/rewards/chosen"] == pytest.approx(3 * first["train/mean_logp/chosen"], rel=1e-5)
    wrong = align(*own_words(tmp_path), *quick(tiny_llama, pairs_file, "objective.btea=3.0"))
    assert wrong.status == 1 and "unknown key objective.btea; mine takes objective.beta" in wrong.err


def own_words(tmp_path: Path) -> list[str]:
    return [f"--config-dir={tmp_path}", "objective=mine"]


@pytest.mark.slow
def test_lora_trains_the_adapter_only_and_its_reference_is_the_start_model(align, tiny_llama, pairs_file, folder):
    pytest.importorskip("peft")
    lora = "model.lora={r: 4, target_modules: all-linear}"
    result = align(*quick(tiny_llama, pairs_file, f"run_dir={folder}", lora))
    assert result.status == 0, result.err
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    assert first["train/loss"] == pytest.approx(0.6931472, abs=1e-5)  # ln 2: the adapter starts as nothing
    assert (folder / "model" / "adapter_model.safetensors").exists()
    assert not (folder / "model" / "model.safetensors").exists()


def test_a_plan_says_what_would_run_and_starts_nothing(align, monkeypatch, tiny_llama, pairs_file, tmp_path):
    monkeypatch.setattr(train, "load_policy", None)
    result = align(
        *quick(tiny_llama, pairs_file, "plan=true", "optimizer.num_train_epochs=2", "optimizer.max_steps=-1")
    )
    assert result.status == 0, result.err
    # 40 pairs, of which 5% of the prompts are held out: 38; 4 full steps of 8 and one of 6 an epoch, two epochs.
    assert "38 pairs" in result.out and "10 of 8 pairs (5 an epoch)" in result.out
    assert "0.693147" in result.out  # ln 2
    assert "processes   1 on cpu, single, fp32" in result.out
    assert "8 pairs a process" in result.out and f"of up to {CPU_TOKENS:,} tokens" in result.out  # auto, on a CPU
    assert "layout      shared: " in result.out and "(packed " in result.out
    assert not (tmp_path / "runs").exists()


def test_a_plan_deals_a_step_to_the_processes_and_counts_the_same_steps(align, tiny_llama, pairs_file):
    words = ["plan=true", "cluster=cpu_2", "optimizer.num_train_epochs=2", "optimizer.max_steps=-1"]
    result = align(*quick(tiny_llama, pairs_file, *words))
    assert result.status == 0, result.err
    assert "10 of 8 pairs (5 an epoch)" in result.out  # as by one process
    assert "processes   2 on cpu, ddp, fp32" in result.out and "4 pairs a process" in result.out


@pytest.mark.parametrize(
    "objective, first",
    [
        ("dpo", "0.693147"),  # ln 2
        ("ipo", "25"),  # (1 / (2 * 0.1))^2
        ("simpo", "depends on"),
        ("wpo", "depends on"),
    ],
)
def test_a_plan_knows_the_first_loss_where_it_can_be_known(align, tiny_llama, pairs_file, objective, first):
    result = align(*quick(tiny_llama, pairs_file, "plan=true", f"objective={objective}"))
    assert f"first loss  {first}" in result.out


def test_a_value_far_outside_the_published_range_warns_and_says_why(align, tiny_llama, pairs_file):
    def plan(*words):
        assert align(*quick(tiny_llama, pairs_file, "plan=true", *words)).status == 0

    with pytest.warns(
        UserWarning, match="objective.beta=0.1 is far outside simpo's published 2 to 10: beta multiplies"
    ):
        plan("objective=simpo", "objective.beta=0.1")
    with pytest.warns(UserWarning, match="optimizer.learning_rate=2e-05 is far above the published"):
        plan("++model.shape.parameters=9000000000", "optimizer.learning_rate=2e-5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan("objective.beta=0.05")


@pytest.mark.slow
def test_every_job_of_a_sweep_is_a_run_of_its_own_and_a_failing_one_does_not_stop_the_others(
    align, tiny_llama, pairs_file, tmp_path
):
    words = ["-m", "objective=dpo,simpo", "objective.beta=0.05,-1,2"]
    result = align(*words, *quick(tiny_llama, pairs_file, "hydra.sweep.dir=sweep"))
    assert result.status == 1 and "objective.beta must be above 0" in result.err
    assert len(list((tmp_path / "runs").glob("*/results.json"))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_a_judge_adds_win_rates_lengths_and_kl(align, monkeypatch, tiny_llama, pairs_file, folder, tmp_path, adapter):
    """Of the policy as the run folder's model/ has it."""
    judged, load = [], Policy.load
    monkeypatch.setattr(Policy, "load", lambda self, rank: judged.append((self, load(self, rank))) or judged[-1][1])
    if adapter:
        pytest.importorskip("peft")
    (tmp_path / "my_judge.py").write_text("def short(prompt, answer):\n    return 1 / (1 + len(answer))\n")
    words = ["dataset.judge=my_judge:short", "evaluation.prompts=2", "evaluation.max_new_tokens=8"]
    words += ["model.lora={r: 4, target_modules: all-linear}"] if adapter else []
    result = align(*quick(tiny_llama, pairs_file, f"run_dir={folder}", *words))
    assert result.status == 0, result.err
    policy, loaded = judged[0]  # the trained one, its adapter merged
    assert policy.iteration == 1 and str(policy.start.path).endswith("merged" if adapter else "model")
    saved, used = load_file(Path(policy.start.path) / "model.safetensors"), loaded.state_dict()
    assert saved and all(torch.equal(value, used[name]) for name, value in saved.items())
    results = json.loads((folder / "results.json").read_text())
    assert results["start"]["win_rate"] == 0.5 and results["start"]["kl_policy_start"] == 0
    assert 0 <= results["trained"]["win_rate"] <= 1 and results["trained"]["sample_length"] <= 8
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 and len(samples[0]["policy"]) == 4


def test_two_processes_do_not_train_in_one_folder(align, monkeypatch, tiny_llama, pairs_file, folder):
    from filelock import FileLock

    monkeypatch.setattr(run_folder, "_ENDING", 0.1)  # for the processes of a run that was killed, which are ending
    folder.mkdir()
    with FileLock(folder / ".lock"):
        result = align(*quick(tiny_llama, pairs_file, f"run_dir={folder}"))
    assert result.status == 1 and "another process is training in" in result.err
    assert [file.name for file in folder.iterdir()] == [".lock"]


def test_rows_too_few_for_the_global_batch_are_refused_with_what_to_type(align, tiny_llama, tmp_path):
    few = write_jsonl(tmp_path / "few.jsonl", [pair_row(i) for i in range(6)])
    result = align(*quick(tiny_llama, few))
    assert result.status == 1 and "train.pairs_per_step=5" in result.err
