"""One evaluation: check the words, let the suite measure, and tell the run folder, the model card and the tracker.

    <run>/evaluation/<suite.name>/results.json    numbers by name; it is there when the evaluation is complete
                                 /settings.json   what they are made of, and what they are, in a line
                                 /responses/, scores/ and other files of the suite

Typing the command again prints what there is; other settings under the same name are refused. What a killed command has
sampled and scored is kept. Left out: SLURM, where the command is put into a job of the user's (as for a stage alone).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub

from align import config
from align.choices import Launcher
from align.config import SamplingConfig
from align.evaluation import judging
from align.evaluation.base import Evaluation, Outcome, TrainedRun, trained_run
from align.evaluation.settings import SUITES, EvaluateConfig, SuiteConfig, typed
from align.files import differences, write_json, write_text, writing
from align.launch import slurm
from align.launch.local import each, logs_of
from align.launch.rank import alone
from align.onpolicy.sample import answering_cluster
from align.say import UserError, is_first, quieten, resolve, say
from align.tracking import trackers

_SECTION = "## Evaluation"
_OWN = ("responses", "responses_of_start", "scores", "weights", "weights_of_start")  # of a run's evaluation folder


def evaluate(cfg: EvaluateConfig) -> None:
    """Measure a run by a suite, or print what was measured before.

    Raises:
        UserError: anything the user can put right.
    """
    _quieten()
    slurm.take_place()
    given = prepare(cfg)
    suite = f"align.evaluation.{given.suite.kind}"
    of_suite: dict[str, Any] = resolve(f"{suite}:made_of", "suite.kind")(given)
    made_of = json.loads(json.dumps({**_made_of(given), **of_suite}))
    results, settings = given.folder / "results.json", given.folder / "settings.json"
    if results.exists():
        _recognise(settings, made_of, given)
        say(f"This evaluation is complete: {given.folder}")
    else:
        each(given.cluster, logs_of(given.folder), _work, given, suite)
        if not is_first():
            return
        outcome: Outcome | None = resolve(f"{suite}:measure", "suite.kind")(given)
        if outcome is None:
            return
        numbers = {f"{given.suite.name}/{name}": float(value) for name, value in outcome.results.items()}
        with writing(f"cannot write {given.folder}", ""):
            write_json(settings, {"made_of": made_of, "note": outcome.note})
            write_json(results, numbers)
        trackers.add_results(given.run.dir, given.run.cfg, numbers)
    if is_first():
        write_card(given.run)
        numbers = json.loads(results.read_text())
        say(f"{json.loads(settings.read_text())['note']}\n{table(numbers)}\nresults  {results}")


def _quieten() -> None:
    quieten()
    huggingface_hub.logging.set_verbosity_error()  # without a network it tells of each of its retries; the error says all


def _work(given: Evaluation, suite: str) -> None:
    _quieten()
    resolve(f"{suite}:work", "suite.kind")(given, alone(given.cluster))


def prepare(cfg: EvaluateConfig) -> Evaluation:
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
    found = trained_run("run", cfg.run)
    sampling = _sampling(cfg, found)
    of_command = replace(
        found.cfg,
        scorer=cfg.scorer if cfg.scorer.name is not None else found.cfg.scorer,
        cluster=cfg.cluster,
        cache_dir=cfg.cache_dir,
        seed=found.cfg.seed if cfg.seed is None else cfg.seed,
        sampling=sampling,
    )
    config.check(of_command)
    return Evaluation(
        run=found,
        policy=found.policy(Path(cfg.cache_dir).expanduser()),
        cfg=of_command,
        scored_by_name=cfg.scorer.name is not None,
        suite=suite,
        sampling=sampling,
        folder=found.dir / "evaluation" / suite.name,
        cluster=answering_cluster(of_command),
    )


def _sampling(cfg: EvaluateConfig, found: TrainedRun) -> SamplingConfig:
    """As the run's own evaluation samples, but for what is typed."""
    default = judging.sampling_of(found.cfg.evaluation, found.cfg.sampling.tokens_per_batch)
    sampling: SamplingConfig = typed("sampling", default, cfg.sampling)
    return sampling


def _made_of(given: Evaluation) -> dict[str, Any]:
    """What decides the results of every suite; how fast they come does not."""
    sampling = ("samples", "temperature", "top_p", "max_new_tokens")
    return {
        "suite": asdict(given.suite),
        "policy": given.policy.fingerprint,
        "sampling": {name: getattr(given.sampling, name) for name in sampling},
        "seed": given.cfg.seed,
    }


def _recognise(settings: Path, made_of: Mapping[str, Any], given: Evaluation) -> None:
    """Refuse results of other settings."""
    try:
        before = json.loads(settings.read_text())["made_of"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{settings} is damaged: delete {given.folder} to evaluate anew") from error
    if differs := differences(before, made_of):
        raise UserError(
            f"{given.folder} holds results of other settings ({'; '.join(differs[:4])}): give another suite.name=, or "
            "delete that folder"
        )


# What people see ------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, float]) -> str:
    """Results as the terminal shows them."""
    width = max(map(len, results))
    return "\n".join(f"{name:<{width}}  {value:>10.4g}" for name, value in results.items())


def write_card(of: TrainedRun) -> None:
    """Put all evaluations of a run into its model card, in place of what the card says of them."""
    file = of.saved / "README.md"
    if not file.is_file():
        return
    evaluations = {}
    for made in sorted(of.dir.glob("evaluation/*/results.json")):
        note = json.loads((made.parent / "settings.json").read_text())["note"]
        evaluations[made.parent.name] = (note, json.loads(made.read_text()))
    card = file.read_text()
    if (new := with_evaluations(card, evaluations)) != card:
        with writing(f"cannot write {file}", ""):
            write_text(file, new)


def with_evaluations(card: str, evaluations: Mapping[str, tuple[str, Mapping[str, float]]]) -> str:
    """The card with the section about evaluations, (note, results) by name, before its configuration."""
    card = re.sub(rf"^{_SECTION}\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)
    lines = [_SECTION, ""] if evaluations else []
    for note, results in evaluations.values():
        rows = (f"| {name} | {value:.4g} |" for name, value in results.items())
        lines += [f"{note[0].upper()}{note[1:]}.", "", "| | |", "| --- | ---: |", *rows, ""]
    section = "".join(f"{line}\n" for line in lines)
    before, heading, after = card.partition("## Configuration\n")
    return f"{before}{section}{heading}{after}" if heading else f"{card}{section}"
