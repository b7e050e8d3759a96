"""Suite `lm_eval`: tasks of EleutherAI's lm-evaluation-harness, for what preference training costs elsewhere.

    <task>                    its first metric, as the task lists them: GSM8K's exact_match,strict-match, MMLU's acc
    <task>/standard_error     the harness's own
    start/<task>              the start model's; <task> - start/<task> is the alignment tax

The start model is measured once for all runs that share the cache. All metrics of the policy are in lm_eval.json of the
folder. Tasks come from the hub, or from suite.task_folder. Left out: several processes (the first one does it alone).
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.evaluation.base import Evaluation
from align.evaluation.settings import LmEvalConfig
from align.files import build_once, file_fingerprint, fingerprint, write_json, writing
from align.launch.rank import Rank, free
from align.model.load import Policy
from align.say import UserError, closest, first_line, say

_ALL = "lm_eval.json"  # all metrics of the policy, as the harness has them


def inputs(evaluation: Evaluation[LmEvalConfig]) -> dict[str, Any]:
    """Return the harness's version, the precision, and fingerprints of the user's tasks."""
    suite = evaluation.suite
    if not suite.tasks:
        raise UserError("suite=lm_eval needs tasks: e.g. 'suite.tasks=[gsm8k, mmlu]'")
    return {
        "suite": {**asdict(suite), "batch_size": None, "task_folder": None},
        "tasks": _code(suite),
        "harness": _harness().__version__,
        "bf16": evaluation.cluster.bf16,
    }


def work(evaluation: Evaluation[LmEvalConfig], rank: Rank) -> None:
    """Measure the policy, and the start model where it is asked for and not in the cache, in the first process."""
    if not rank.is_first:
        return
    tasks = _tasks(evaluation.suite)
    metrics = _evaluate(evaluation, evaluation.policy, tasks, rank)
    if evaluation.suite.start:
        start = evaluation.run.start()
        folder = _folder_of_start(evaluation, start)
        build_once(folder, lambda into: write_json(into / "results.json", _evaluate(evaluation, start, tasks, rank)))
    with writing(f"cannot write {evaluation.folder}", ""):
        write_json(evaluation.folder / _ALL, metrics)


def measure(evaluation: Evaluation[LmEvalConfig]) -> tuple[dict[str, float], str]:
    """Return the tasks' first metrics."""
    suite = evaluation.suite
    results = figures(json.loads((evaluation.folder / _ALL).read_text()), suite.tasks)
    if suite.start:
        folder = _folder_of_start(evaluation, evaluation.run.start())
        start = figures(json.loads((folder / "results.json").read_text()), suite.tasks)
        results |= {f"start/{name}": value for name, value in start.items() if not name.endswith("/standard_error")}
    note = f"lm-evaluation-harness {_harness().__version__}, {', '.join(suite.tasks)}"
    note += f", the first {suite.limit} examples of each" if suite.limit else ""
    return results, note


def figures(metrics: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """Return the first metric of each task, and its standard error, of the harness's `results`. Pure.

    Where one of the tasks is a pattern or a tag, all that was measured is shown.
    """
    results: dict[str, float] = {}
    shown = tasks if all(task in metrics for task in tasks) else list(metrics)  # of a group not its 57 parts
    for task in shown:
        numbers = {k: float(v) for k, v in metrics[task].items() if isinstance(v, int | float) and "," in k}
        first = next((name for name in numbers if "_stderr," not in name), None)
        if first is None:  # a group that the harness does not average
            continue
        results[task] = numbers[first]
        error = numbers.get(first.replace(",", "_stderr,", 1), math.nan)
        results |= {} if math.isnan(error) else {f"{task}/standard_error": error}
    return results


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(f"suite=lm_eval needs a package: pip install 'lm-eval>=0.4.9,<1' ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises on words that are not the user's
    return lm_eval


def _code(suite: LmEvalConfig) -> dict[str, str]:
    """Return fingerprints of the user's task files."""
    if suite.task_folder is None:
        return {}
    folder = Path(suite.task_folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"suite.task_folder={suite.task_folder} is no folder; it is taken from {Path.cwd()}")
    return {str(file.relative_to(folder)): file_fingerprint(file) for file in sorted(folder.rglob("*.*"))}


def _tasks(suite: LmEvalConfig) -> Any:
    """Return the harness's list of tasks, with the user's own; each that is asked for can be loaded."""
    _harness()
    from lm_eval.tasks import TaskManager

    is_own = suite.task_folder is not None
    with _loading(f"suite.task_folder={suite.task_folder}" if is_own else "its list of tasks"):
        manager = TaskManager(include_path=suite.task_folder, include_defaults=not is_own)
        if is_own and not all(manager.match_tasks([name]) for name in suite.tasks):
            manager = TaskManager(include_path=suite.task_folder)  # half a minute: the harness's own are 14,000
    load = getattr(manager, "load", None) or manager.load_task_or_group  # as older versions call it
    for name in suite.tasks:  # all names before the first is loaded, which may come from the hub
        if not manager.match_tasks([name]):
            raise UserError(
                f"suite.tasks: the harness has no task {name}{closest(name, manager.all_tasks)}; "
                "tasks of yours are found by suite.task_folder=<folder of YAML files>"
            )
    for name in suite.tasks:  # before a policy is loaded; the harness loads them once more, from the disk
        with _loading(f"task {name}"):
            load([name])
    return manager


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn errors of the harness, the hub and code in a task, which share no base class, into one line."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"suite=lm_eval: the harness cannot load {what} ({type(error).__name__}: {first_line(error)[:200]}): it takes a network, or "
            "HF_HOME=<folder that has its data>, or a task of yours, suite.task_folder=<folder of YAML files>"
        ) from error


def _folder_of_start(evaluation: Evaluation[LmEvalConfig], start: Policy) -> Path:
    """Return the folder of the start model's metrics, for all runs that have it."""
    suite = evaluation.suite
    asked = {**asdict(suite), "name": None, "batch_size": None, "task_folder": _code(suite)}
    key = fingerprint(start.fingerprint, _harness().__version__, evaluation.cluster.bf16, evaluation.cfg.seed, asked)
    return evaluation.run.cache / "lm_eval" / key


def _evaluate(
    evaluation: Evaluation[LmEvalConfig], policy: Policy, tasks: Any, rank: Rank
) -> dict[str, dict[str, Any]]:
    """Return `results` of the harness, and of its groups."""
    from lm_eval.models.huggingface import HFLM

    suite = evaluation.suite
    say(f"{', '.join(suite.tasks)}, {evaluation.run.name if policy.iteration else 'its start model'}")
    model = policy.load(rank)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    measured = _harness().simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=policy.start.tokenizer, batch_size=suite.batch_size),
        tasks=list(suite.tasks),
        num_fewshot=suite.num_fewshot,
        limit=suite.limit,
        apply_chat_template=suite.chat_template,
        task_manager=tasks,
        log_samples=False,
        bootstrap_iters=1000,  # for standard errors that have no formula
        **dict.fromkeys(seeds, evaluation.cfg.seed),
    )
    del model
    free()
    assert measured is not None  # None is for ranks other than the first
    return {**measured["results"], **measured.get("groups", {})}
