"""Steps: how a batch is split, resumed or dealt to processes changes nothing; gates stop what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, pair_row, quick, save_tiny, write_jsonl
from safetensors.torch import load_file

from align.engine.batching import StepSampler, deal
from align.runs.spine import carry_out
from align.train import job, reference
from align.train import train as train_module
from align.train.checkpoint import last_checkpoint
from align.train.loop import Loop


def metrics(folder: Path, prefix: str = "train/loss") -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if prefix in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.endswith("_per_second")} for line in lines]


def train(composed, folder, model, pairs, *more) -> Path:
    """Carry out what the words compose; composing them as they are typed takes longer than a tiny run."""
    carry_out(composed(*quick(model, pairs, f"run_dir={folder}", "tracker=none", *more)))
    return folder


def first_gradients(composed, monkeypatch, folder, model, pairs, *more) -> dict[str, torch.Tensor]:
    """Every weight's gradient at step 1, before clipping."""
    seen: dict[str, torch.Tensor] = {}
    original = Loop.update

    def record(self, losses):
        seen.setdefault("micro_batches", len(losses))
        for name, p in self.model.named_parameters():
            seen.setdefault(name, p.grad.clone())
        return original(self, losses)

    monkeypatch.setattr(Loop, "update", record)
    train(composed, folder, model, pairs, *more)
    monkeypatch.setattr(Loop, "update", original)
    return seen


@pytest.mark.parametrize("objective", ["dpo", "simpo", "sppo", "wpo"])
def test_one_micro_batch_of_eight_pairs_equals_eight_of_one(
    composed, monkeypatch, tmp_path, tiny_gemma2, pairs_file, objective
):
    words = [f"objective={objective}", "optimizer.max_steps=1"]
    whole = first_gradients(
        composed, monkeypatch, tmp_path / "a", tiny_gemma2, pairs_file, *words, "engine.tokens_per_micro_batch=100000"
    )
    split = first_gradients(
        composed, monkeypatch, tmp_path / "b", tiny_gemma2, pairs_file, *words, "engine.tokens_per_micro_batch=1"
    )
    assert (whole.pop("micro_batches"), split.pop("micro_batches")) == (1, 8)
    scale = max(gradient.norm() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (gradient - split[name]).norm() <= 1e-6 * scale, name


@pytest.mark.parametrize("world", [3, 11])  # fewer than the pairs of a step, and more
def test_pairs_that_only_fill_a_step_up_weigh_nothing(composed, monkeypatch, tmp_path, tiny_gemma2, world):
    """One process is fed the shares of all ranks, fillers too, in steps, evaluation and reference: nothing changes."""
    held = write_jsonl(tmp_path / "held.jsonl", [pair_row(i, group="odd" if i % 2 else "even") for i in range(50, 57)])
    train_file = write_jsonl(tmp_path / "train.jsonl", [pair_row(i, group="even") for i in range(40)])
    words = ["objective=wpo", f"dataset.eval_path={held}", "dataset.group_by=group", "optimizer.max_steps=2"]
    whole = first_gradients(composed, monkeypatch, tmp_path / "whole", tiny_gemma2, train_file, *words)

    original, fillers = StepSampler.epoch, []

    def of_all_ranks(pairs, lengths, _, layout, budget):
        shares = deal(pairs, lengths, world, layout, budget)
        fillers.append(sum(not counts for share in shares for micro in share for counts in micro.counted))
        return [[micro for share in shares for micro in share]]

    def steps_of_all_ranks(self, number, first=0):
        ranks = [replace(self, world=world, rank=rank) for rank in range(world)]
        for shares in zip(*(original(sampler, number, first) for sampler in ranks), strict=True):
            fillers.append(sum(not counts for share in shares for micro in share for counts in micro.counted))
            yield [micro for share in shares for micro in share]

    monkeypatch.setattr(StepSampler, "epoch", steps_of_all_ranks)
    monkeypatch.setattr(job, "deal", of_all_ranks)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))  # a reference column of its own
    filled = first_gradients(composed, monkeypatch, tmp_path / "filled", tiny_gemma2, train_file, *words)

    assert len(fillers) >= 6 and all(fillers)  # two columns, two evaluations, two steps: none could be dealt evenly
    assert whole.pop("micro_batches") < filled.pop("micro_batches")
    scale = max(gradient.norm() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (gradient - filled[name]).norm() <= 1e-6 * scale, name
    for prefix in ("train/loss", "eval/loss"):
        lines = [timeless(metrics(tmp_path / name, prefix)) for name in ("whole", "filled")]
        assert len(lines[0]) == 2
        for ours, theirs in zip(*lines, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_layouts_and_checkpointing_change_a_run_only_by_rounding(composed, tmp_path, tiny_gemma2, pairs_file):
    words = {"a": ["shared"], "b": ["packed", "engine.gradient_checkpointing=true"], "c": ["padded"]}
    runs = [
        metrics(train(composed, tmp_path / name, tiny_gemma2, pairs_file, f"engine.layout={layout}", *more))
        for name, (layout, *more) in words.items()
    ]
    assert len(runs[0]) == 2
    for other in runs[1:]:
        for ours, theirs in zip(timeless(runs[0]), timeless(other), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_model_that_cannot_run_the_layout_takes_another_and_says_why(align, tmp_path, tokenizer, pairs_file):
    bloom = save_tiny(tmp_path / "bloom", tokenizer, "bloom")
    result = align(*quick(bloom, pairs_file, f"run_dir={tmp_path / 'run'}"))
    assert result.status == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("engine.layout=")]
    assert line.startswith("engine.layout=padded, not shared, for BloomForCausalLM: its attention")
    assert metrics(tmp_path / "run")[0]["train/loss"] == pytest.approx(0.6931472, abs=1e-5)  # -log s(0)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(composed, tmp_path, tiny_llama, pairs_file):
    a, b, c = (
        train(composed, tmp_path / name, tiny_llama, pairs_file, f"seed={seed}")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert timeless(metrics(a)) == timeless(metrics(b))
    assert all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())
    assert metrics(a)[0]["train/loss"] != pytest.approx(metrics(c)[0]["train/rewards/chosen"])
    assert any(not torch.equal(value, weights(c)[name]) for name, value in weights(a).items())


def test_the_first_loss_of_dpo_is_ln_2_and_its_log_ratios_are_0(composed, tmp_path, tiny_llama, pairs_file):
    first = metrics(train(composed, tmp_path / "a", tiny_llama, pairs_file))[0]
    assert first["train/loss"] == pytest.approx(0.6931472, abs=1e-5)  # -log s(0)
    assert first["train/log_ratio/chosen"] == pytest.approx(0, abs=1e-4)
    assert first["train/kl_start_policy"] == pytest.approx(0, abs=1e-4)


def test_every_objective_reports_the_same_metrics(composed, tmp_path, tiny_llama, pairs_file):
    names = {}
    for objective in ("dpo", "sppo", "wpo", "simpo", "ipo", "plus_sft"):
        folder = train(
            composed, tmp_path / objective, tiny_llama, pairs_file, f"objective={objective}", "optimizer.max_steps=1"
        )
        names[objective] = {name for name in metrics(folder)[0] if "/objective/" not in name}
    of_reference = {
        "train/log_ratio/chosen",
        "train/log_ratio/rejected",
        "train/accuracy/log_ratio",
        "train/kl_start_policy",
    }
    assert names["dpo"] == names["sppo"] == names["wpo"] == names["ipo"]
    assert names["simpo"] == names["plus_sft"] == names["dpo"] - of_reference
    wanted = (
        "loss rewards/chosen rewards/rejected rewards/margins rewards/accuracies mean_logp/chosen accuracy/mean_logp"
    )
    wanted += " length/chosen entropy grad_norm pairs_per_second tokens_per_second truncated learning_rate"
    assert {f"train/{name}" for name in wanted.split()} <= names["dpo"]


def test_wpo_reports_its_weights_and_sppo_its_scaled_loss(composed, tmp_path, tiny_llama, pairs_file):
    wpo = metrics(train(composed, tmp_path / "wpo", tiny_llama, pairs_file, "objective=wpo"))[0]
    weight, squared = wpo["train/objective/weight"], wpo["train/objective/weight_squared"]
    assert 0 < weight <= 1 and 0 <= wpo["train/objective/weight_clamped"] <= 1
    assert wpo["train/objective/effective_sample_share"] == pytest.approx(weight**2 / squared)
    assert wpo["train/objective/unweighted_loss"] == pytest.approx(0.6931472, abs=1e-5)
    sppo = metrics(train(composed, tmp_path / "sppo", tiny_llama, pairs_file, "objective=sppo", "objective.beta=0.01"))[
        0
    ]
    assert sppo["train/objective/scaled_loss"] == pytest.approx(1e-4 * sppo["train/loss"])  # beta^2 = 1e-4


def test_a_non_finite_loss_stops_the_run_names_the_pairs_and_leaves_the_checkpoint(
    align, tmp_path, tiny_llama, pairs_file
):
    code = tmp_path / "sudden.py"
    code.write_text(
        "from dataclasses import dataclass\n"
        "from objectives import Objective, PairLoss, register\n"
        "@register('sudden')\n@dataclass(frozen=True, kw_only=True)\n"
        "class Sudden(Objective):\n"
        "    calls = [0]\n"
        "    needs = frozenset({'logp'})\n"
        "    def __call__(self, chosen, rejected):\n"
        "        margin = chosen.logp - rejected.logp\n"
        "        if margin.requires_grad: self.calls[0] += 1\n"
        "        loss = -margin if self.calls[0] < 3 else margin * float('nan')\n"
        "        return PairLoss(loss, chosen.logp.detach(), rejected.logp.detach(), {})\n"
    )
    folder = tmp_path / "run"
    words = [
        "++objective.code=" + str(code),
        "++objective.name=sudden",
        "~objective.beta",
        "~objective.label_smoothing",
    ]
    more = [*words, "train.save_every_steps=2", "optimizer.max_steps=5", f"run_dir={folder}"]
    result = align(*quick(tiny_llama, pairs_file, *more))
    assert result.status == 1
    assert "step 3: the loss is not finite for pairs row-" in result.err
    assert last_checkpoint(folder / "checkpoints").name == "checkpoint-2"
    assert not (folder / "results.json").exists()


def test_a_reference_that_is_not_the_start_policy_is_refused(align, monkeypatch, tmp_path, tiny_llama, pairs_file):
    original = reference.reference_logps
    monkeypatch.setattr(reference, "reference_logps", lambda *args, **kwargs: original(*args, **kwargs) - 3.0)
    result = align(*quick(tiny_llama, pairs_file, f"run_dir={tmp_path / 'run'}"))
    assert result.status == 1 and "the reference is not the start policy" in result.err


def test_a_trainable_weight_without_a_gradient_is_refused(align, monkeypatch, tmp_path, tiny_llama, pairs_file):
    original = train_module.load_policy

    def with_a_spare_weight(*args):
        policy = original(*args)
        policy.spare = torch.nn.Parameter(torch.zeros(2))
        return policy

    monkeypatch.setattr(train_module, "load_policy", with_a_spare_weight)
    result = align(*quick(tiny_llama, pairs_file, f"run_dir={tmp_path / 'run'}"))
    assert result.status == 1 and "get no gradient: spare" in result.err


def test_held_out_means_are_exact_whatever_the_micro_batches(composed, tmp_path, tiny_llama):
    pairs_file = write_jsonl(tmp_path / "train.jsonl", [pair_row(i, group="even") for i in range(40)])
    held = write_jsonl(
        tmp_path / "held.jsonl", [pair_row(i, group="even" if i % 2 == 0 else "odd") for i in range(50, 57)]
    )
    words = [f"dataset.eval_path={held}", "dataset.group_by=group", "optimizer.max_steps=1"]
    words.append("optimizer.warmup_steps=0")  # a step that moves: where nothing has, rounding would decide the ties
    a = train(composed, tmp_path / "a", tiny_llama, pairs_file, *words, "engine.tokens_per_micro_batch=1")
    b = train(composed, tmp_path / "b", tiny_llama, pairs_file, *words, "engine.tokens_per_micro_batch=100000")
    one, other = metrics(a, "eval/loss")[-1], metrics(b, "eval/loss")[-1]
    assert one == pytest.approx(other, abs=1e-5)
    # 4 of the 7 rows are even: the groups' accuracies make up the whole's.
    parts = (4 * one["eval/accuracy/even"] + 3 * one["eval/accuracy/odd"]) / 7
    assert parts == pytest.approx(one["eval/rewards/accuracies"], abs=1e-9)


def test_each_held_out_pair_says_whether_it_is_ranked_rightly(composed, tmp_path, tiny_llama, pairs_file):
    held = write_jsonl(tmp_path / "held.jsonl", [pair_row(i) for i in range(50, 57)])
    folder = train(composed, tmp_path / "run", tiny_llama, pairs_file, f"dataset.eval_path={held}", "objective=simpo")
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text().splitlines()]
    assert [row["pair"] for row in rows] == [f"row-{i}" for i in range(50, 57)]
    trained = json.loads((folder / "results.json").read_text())["trained"]
    for name in ("accuracy/mean_logp", "accuracy/log_ratio"):
        assert {row[name] for row in rows} <= {0, 0.5, 1}
        assert sum(row[name] for row in rows) / 7 == pytest.approx(trained[name])


def killed_before_its_end(folder: Path, last_checkpoint: str) -> Path:
    """Make a complete run one that was killed before it wrote its last checkpoint."""
    for later in ("results.json", "trained.json"):
        (folder / later).unlink()
    for later in (f"checkpoints/{last_checkpoint}", "model"):
        shutil.rmtree(folder / later)
    return folder


def test_a_run_that_goes_on_adds_up_what_its_stretches_cost(composed, monkeypatch, tmp_path, tiny_llama, pairs_file):
    words = [
        "optimizer.max_steps=5",
        "train.save_every_steps=2",
        "train.log_every_steps=2",
    ]  # the last step is not logged
    fed, original = [], Loop.step

    def record(self, share):
        fed.append(sum(batch.responses.input_ids.numel() for batch in share))  # a row has no padding
        return original(self, share)

    monkeypatch.setattr(Loop, "step", record)
    folder = train(composed, tmp_path / "run", tiny_llama, pairs_file, *words)

    def cost(file: Path) -> dict:
        made = json.loads(file.read_text())
        return made.get("cost", made)

    whole = cost(folder / "results.json")
    assert whole["tokens"] == sum(fed) and len(fed) == 5
    at_four = cost(folder / "checkpoints" / "checkpoint-4" / "cost.json")
    assert at_four["tokens"] == sum(fed[:4]) and 0 < at_four["seconds"] < whole["seconds"]
    assert whole["peak_memory_gib"] >= at_four["peak_memory_gib"] > 0 and whole["processes"] == 1

    killed_before_its_end(folder, "checkpoint-5")
    at_four["seconds"] += 1000  # of a slow machine
    (folder / "checkpoints" / "checkpoint-4" / "cost.json").write_text(json.dumps(at_four))
    again = cost(train(composed, folder, tiny_llama, pairs_file, *words) / "results.json")
    assert again["tokens"] == whole["tokens"] and len(fed) == 6
    assert at_four["seconds"] < again["seconds"] < at_four["seconds"] + 60
    assert "of training" in (folder / "model" / "README.md").read_text()


def goes_on(align, folder: Path, model: Path, pairs: Path, *more: str) -> Path:
    """A copy of a run of four steps, as one that was killed behind its first checkpoint and typed again leaves it."""
    cut = killed_before_its_end(shutil.copytree(folder, folder.with_name("cut")), "checkpoint-4")
    torch.manual_seed(1)
    result = align(*quick(model, pairs, f"run_dir={cut}", *FOUR_STEPS, *more))
    assert result.status == 0 and "checkpoint-2" in result.out, result.err
    return cut


FOUR_STEPS = ["optimizer.max_steps=4", "train.save_every_steps=2", "optimizer.warmup_steps=0"]


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["rmsprop", "adafactor"])  # of torch, and of transformers
def test_a_run_that_goes_on_has_the_state_of_its_optimizer(align, composed, tmp_path, tiny_llama, pairs_file, optim):
    words = [f"optimizer.optim={optim}"]
    whole = train(composed, tmp_path / "whole", tiny_llama, pairs_file, *FOUR_STEPS, *words)
    cut = goes_on(align, whole, tiny_llama, pairs_file, *words)
    assert timeless(metrics(cut)) == timeless(metrics(whole))
    assert all(torch.equal(value, weights(cut)[name]) for name, value in weights(whole).items())


@pytest.mark.slow
def test_a_run_that_goes_on_draws_the_same_random_numbers(align, composed, tmp_path, tiny_llama, pairs_file):
    code = tmp_path / "noisy.py"
    code.write_text(
        "import random\nimport torch\n"
        "from dataclasses import dataclass\n"
        "from objectives import Objective, PairLoss, register\n"
        "@register('noisy')\n@dataclass(frozen=True, kw_only=True)\n"
        "class Noisy(Objective):\n"
        "    needs = frozenset({'logp'})\n"
        "    def __call__(self, chosen, rejected):\n"
        "        loss = (rejected.logp - chosen.logp) * torch.rand_like(chosen.logp) * random.random()\n"
        "        return PairLoss(loss, chosen.logp.detach(), rejected.logp.detach(), {})\n"
    )
    words = [f"++objective.code={code}", "++objective.name=noisy", "~objective.beta", "~objective.label_smoothing"]
    whole = train(composed, tmp_path / "whole", tiny_llama, pairs_file, *FOUR_STEPS, *words)
    cut = goes_on(align, whole, tiny_llama, pairs_file, *words)
    assert timeless(metrics(cut)) == timeless(metrics(whole))


@pytest.mark.slow
def test_a_checkpoint_of_an_adapter_holds_the_adapter_only_and_goes_on(
    align, composed, tmp_path, tiny_llama, pairs_file
):
    pytest.importorskip("peft")
    words = ["model.lora={r: 4, target_modules: all-linear}"]
    whole = train(composed, tmp_path / "whole", tiny_llama, pairs_file, *FOUR_STEPS, *words)
    assert all("lora_" in name for name in load_file(whole / "checkpoints" / "checkpoint-2" / "model.safetensors"))
    cut = goes_on(align, whole, tiny_llama, pairs_file, *words)
    assert timeless(metrics(cut)) == timeless(metrics(whole))
    ours, theirs = (load_file(folder / "model" / "adapter_model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


def command(folder: Path, model: Path, pairs: Path, *more: str) -> list[str]:
    return [*quick(model, pairs, f"run_dir={folder}", "tracker=none", "cluster.cpu_threads=1", *more)]


@pytest.mark.slow
def test_a_run_that_is_killed_and_typed_again_equals_one_that_was_not(tmp_path, tiny_gemma2, pairs_file, own_cache):
    words = ["objective=wpo", "optimizer.max_steps=12", "train.save_every_steps=2", "train.eval_every_steps=3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ALIGN_CACHE": str(own_cache)}

    def line(folder):
        return [sys.executable, "-m", "align", *command(folder, tiny_gemma2, pairs_file, *words)]

    def whole_run(folder):
        return subprocess.run(line(folder), env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert whole_run(whole).returncode == 0
    with subprocess.Popen(line(killed), env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + 120
        while not (killed / "checkpoints" / "checkpoint-4" / "made_by.json").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    assert not (killed / "results.json").exists()

    again = whole_run(killed)
    assert again.returncode == 0 and "going on from" in again.stdout, again.stderr
    assert timeless(metrics(killed)) == timeless(metrics(whole))
    assert metrics(killed, "eval/loss") == metrics(whole, "eval/loss")
    results, wanted = (json.loads((folder / "results.json").read_text()) for folder in (killed, whole))
    cost, cost_of_whole = results.pop("cost"), wanted.pop("cost")
    assert results == wanted and cost["tokens"] == cost_of_whole["tokens"]
    assert all(torch.equal(value, weights(killed)[name]) for name, value in weights(whole).items())


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_process_equals_two(tmp_path, tiny_llama, own_cache):
    """Also where pairs cannot be shared evenly: 37 of training, so the last step has 5, and 7 of two held-out groups."""
    held = write_jsonl(tmp_path / "held.jsonl", [pair_row(i, group="odd" if i % 2 else "even") for i in range(50, 57)])
    pairs_file = write_jsonl(tmp_path / "train.jsonl", [pair_row(i, group="even") for i in range(37)])
    words = [
        "objective=wpo",
        f"dataset.eval_path={held}",
        "dataset.group_by=group",
        "optimizer.max_steps=6",  # an epoch, and a step of the next
        "engine.tokens_per_micro_batch=150",
        "optimizer.learning_rate=1e-3",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ALIGN_CACHE": str(own_cache), "OMP_NUM_THREADS": "1"}
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]),
    ):
        line = [*launcher, "-m", "align", *command(tmp_path / name, tiny_llama, pairs_file, *words)]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        for name in a:
            if not name.endswith("_per_second"):
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), name
    assert metrics(tmp_path / "one", "eval/loss")[-1] == pytest.approx(
        metrics(tmp_path / "two", "eval/loss")[-1], rel=1e-4, abs=1e-5
    )
    assert {"eval/accuracy/odd", "eval/accuracy/even"} <= metrics(tmp_path / "two", "eval/loss")[-1].keys()
    assert (tmp_path / "two" / "held_out.jsonl").read_text() == (tmp_path / "one" / "held_out.jsonl").read_text()
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-4, atol=1e-6)
