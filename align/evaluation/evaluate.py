"""One evaluation: check the words, let the suite measure, and tell the run folder, the model card and the tracker.

    <run>/evaluation/<suite.name>/results.json    numbers by name; it is there when the evaluation is complete
                                 /settings.json   the values that decide them, and a line that says what they are
                                 /responses/, scores/ and other files of the suite

Typing the command again prints what there is; other settings under the same name are refused. What a killed command has
sampled and scored is kept. Left out: SLURM, where the command is put into a job of the user's (as for a stage alone).
"""

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from align import config
from align.choices import Launcher
from align.config import SamplingConfig
from align.evaluation import judging
from align.evaluation.base import Evaluation, TrainedRun, trained_run
from align.evaluation.settings import SUITES, EvaluateConfig, SuiteConfig, typed
from align.files import as_json, differences, write_json, write_text, writing
from align.launch import slurm
from align.launch.local import each, logs_of
from align.launch.rank import alone
from align.onpolicy.sample import answering_cluster
from align.say import UserError, is_first, quieten, say
from align.tracking import trackers

_SECTION = "## Evaluation"
_OWN = ("responses", "responses_of_start", "scores", "weights", "weights_of_start")  # of a run's evaluation folder


def evaluate(cfg: EvaluateConfig) -> None:
    """Measure a run by a suite, or print what was measured before."""
    quieten()
    slurm.take_place()
    evaluation = prepare(cfg)
    suite, folder = importlib.import_module(f"align.evaluation.{evaluation.suite.kind}"), evaluation.folder
    sampling = ("samples", "temperature", "top_p", "max_new_tokens")  # how fast answers come decides nothing
    inputs = as_json(
        {
            "suite": asdict(evaluation.suite),
            "policy": evaluation.policy.fingerprint,
            "sampling": {name: getattr(evaluation.cfg.sampling, name) for name in sampling},
            "seed": evaluation.cfg.seed,
            **suite.inputs(evaluation),
        }
    )
    results, settings = folder / "results.json", folder / "settings.json"
    if results.exists():
        _recognise(settings, inputs)
        say(f"This evaluation is complete: {folder}")
    else:
        with writing(f"cannot write {folder}", ""):
            folder.mkdir(parents=True, exist_ok=True)
        each(evaluation.cluster, logs_of(folder), _work, suite.work, evaluation)
        if not is_first():
            return
        with writing(f"cannot write {folder}", ""):
            if (measured := suite.measure(evaluation)) is None:
                return
            found, note = measured
            numbers = {f"{evaluation.suite.name}/{name}": float(value) for name, value in found.items()}
            write_json(settings, {"made_of": inputs, "note": note})
            write_json(results, numbers)
        trackers.add_results(evaluation.run.dir, evaluation.run.cfg, numbers)
    if is_first():
        write_card(evaluation.run)
        note = json.loads(settings.read_text())["note"]
        say(f"{note}\n{table(json.loads(results.read_text()))}\nresults  {results}")


def _work(work: Callable[..., None], evaluation: Evaluation[Any]) -> None:
    quieten()
    work(evaluation, alone(evaluation.cluster))


def prepare(cfg: EvaluateConfig) -> Evaluation[Any]:
    """Check what can be wrong with the words, and find the run's policy."""
    shape = SUITES.get(str(cfg.suite.get("kind")))
    if shape is None:
        raise UserError(f"there is no suite.kind={cfg.suite.get('kind')}; suite is one of {', '.join(SUITES)}")
    suite: SuiteConfig = typed("suite", shape, cfg.suite)
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", suite.name):
        raise UserError(f"suite.name={suite.name} names a folder: letters, digits, dots, dashes and underscores")
    if suite.name in _OWN:
        raise UserError(f"suite.name={suite.name} is where a run's own judge works: give another name")
    if suite.limit is not None and suite.limit <= 0:
        raise UserError(f"suite.limit must be above 0, not {suite.limit}")
    if cfg.cluster.launcher is Launcher.slurm:
        raise UserError(
            "an evaluation runs where it is typed: put the command into a job of yours, with cluster=auto (sbatch, srun)"
        )
    run = trained_run("run", cfg.run, Path(cfg.cache_dir).expanduser())
    as_run = judging.sampling_of(run.cfg.evaluation, run.cfg.sampling.tokens_per_batch)
    sampling: SamplingConfig = typed("sampling", as_run, cfg.sampling)
    merged = replace(
        run.cfg,
        scorer=run.cfg.scorer if cfg.scorer.name is None else cfg.scorer,
        cluster=cfg.cluster,
        cache_dir=cfg.cache_dir,
        seed=run.cfg.seed if cfg.seed is None else cfg.seed,
        sampling=sampling,
    )
    config.check(merged)
    return Evaluation(
        run=run,
        policy=run.policies()[-1],
        cfg=merged,
        scored_by_name=cfg.scorer.name is not None,
        suite=suite,
        folder=run.dir / "evaluation" / suite.name,
        cluster=answering_cluster(merged),
    )


def _recognise(settings: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse results of other settings."""
    try:
        before = json.loads(settings.read_text())["made_of"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{settings} is damaged: delete {settings.parent} to evaluate anew") from error
    if differs := differences(before, inputs):
        others = f"{settings.parent} holds results of other settings ({'; '.join(differs[:4])})"
        raise UserError(f"{others}: give another suite.name=, or delete that folder")


def table(results: Mapping[str, float]) -> str:
    """Return results as the terminal shows them."""
    width = max(map(len, results))
    return "\n".join(f"{name:<{width}}  {value:>10.4g}" for name, value in results.items())


def write_card(run: TrainedRun) -> None:
    """Put all evaluations of a run into its model card, in place of what the card says of them."""
    file = run.saved / "README.md"
    if not file.is_file():
        return
    evaluations = {}
    for results in sorted(run.dir.glob("evaluation/*/results.json")):
        note = json.loads((results.parent / "settings.json").read_text())["note"]
        evaluations[results.parent.name] = (note, json.loads(results.read_text()))
    card = file.read_text()
    if (new := with_evaluations(card, evaluations)) != card:
        with writing(f"cannot write {file}", ""):
            write_text(file, new)


def with_evaluations(card: str, evaluations: Mapping[str, tuple[str, Mapping[str, float]]]) -> str:
    """Return the card with the section about evaluations, (note, results) by name, before its configuration."""
    card = re.sub(rf"^{_SECTION}\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    lines = [_SECTION, ""] if evaluations else []
    for note, results in evaluations.values():
        rows = (f"| {name} | {value:.4g} |" for name, value in results.items())
        lines += [f"{note[0].upper()}{note[1:]}.", "", "| | |", "| --- | ---: |", *rows, ""]
    section = "".join(f"{line}\n" for line in lines)
    before, heading, after = card.partition("## Configuration\n")
    return f"{before}{section}{heading}{after}" if heading else f"{card}{section}"
