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

from align.evaluation.base import Evaluation, Outcome
from align.evaluation.settings import LmEvalConfig
from align.files import build_once, file_fingerprint, fingerprint, write_json, writing
from align.launch.rank import Rank, free
from align.model.policy import Policy
from align.say import UserError, closest, say

_ALL = "lm_eval.json"  # all metrics of the policy, as the harness has them


def made_of(given: Evaluation) -> dict[str, Any]:
    """The harness's version and tasks of the user's."""
    suite = _settings(given)
    if not suite.tasks:
        raise UserError("suite=lm_eval needs tasks: e.g. 'suite.tasks=[gsm8k, mmlu]'")
    return {
        "suite": {**asdict(suite), "batch_size": None, "task_folder": None},
        "tasks": _code(suite),
        "harness": _harness().__version__,
        "bf16": given.cluster.bf16,
    }


def work(given: Evaluation, rank: Rank) -> None:
    """The first process measures the policy, and the start model where it is asked for and not in the cache."""
    if not rank.is_first:
        return
    suite = _settings(given)
    found = _tasks(suite)
    all_of = _evaluate(given, given.policy, found, rank)
    if suite.start:
        start = given.run.start(given.cache)
        build_once(
            _folder_of_start(given, start),
            lambda into: write_json(into / "results.json", _evaluate(given, start, found, rank)),
        )
    with writing(f"cannot write {given.folder}", ""):
        given.folder.mkdir(parents=True, exist_ok=True)
        write_json(given.folder / _ALL, all_of)


def measure(given: Evaluation) -> Outcome:
    """The tasks' first metrics."""
    suite = _settings(given)
    results = figures(json.loads((given.folder / _ALL).read_text()), suite.tasks)
    if suite.start:
        folder = _folder_of_start(given, given.run.start(given.cache))
        start = figures(json.loads((folder / "results.json").read_text()), suite.tasks)
        results |= {f"start/{name}": value for name, value in start.items() if not name.endswith("/standard_error")}
    note = f"lm-evaluation-harness {_harness().__version__}, {', '.join(suite.tasks)}"
    note += f", the first {suite.limit} examples of each" if suite.limit else ""
    return Outcome(results=results, note=note)


def figures(all_of: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, float]:
    """The first metric of each of the tasks, and its standard error where there is one. Pure.

    Args:
        all_of: `results` of the harness: of each task its metrics as "acc,none" and "acc_stderr,none".
        tasks: as they were asked for; where one is a pattern or a tag, all that was measured is shown.
    """
    made: dict[str, float] = {}
    shown = tasks if all(task in all_of for task in tasks) else list(all_of)  # of a group not its 57 parts
    for task in shown:
        metrics = all_of[task]
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and "," in k}
        names = [name for name in numbers if "_stderr," not in name]
        if not names:  # a group that the harness does not average
            continue
        made[task] = numbers[names[0]]
        metric, _, kept = names[0].partition(",")
        error = numbers.get(f"{metric}_stderr,{kept}", math.nan)
        made |= {} if math.isnan(error) else {f"{task}/standard_error": error}
    return made


def _settings(given: Evaluation) -> LmEvalConfig:
    assert isinstance(given.suite, LmEvalConfig)
    return given.suite


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(f"suite=lm_eval needs a package: pip install 'lm-eval>=0.4.9,<1' ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it advises on words that are not the user's
    return lm_eval


def _code(suite: LmEvalConfig) -> dict[str, str]:
    """Fingerprints of the user's task files."""
    if suite.task_folder is None:
        return {}
    folder = Path(suite.task_folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"suite.task_folder={suite.task_folder} is no folder; it is taken from {Path.cwd()}")
    return {str(file.relative_to(folder)): file_fingerprint(file) for file in sorted(folder.rglob("*.*"))}


def _tasks(suite: LmEvalConfig) -> Any:
    """The harness's list of tasks, with the user's own, after a look whether all that are asked for can be had."""
    _harness()
    from lm_eval.tasks import TaskManager

    def unknown_to(manager: Any) -> list[str]:
        return [name for name in suite.tasks if not manager.match_tasks([name])]

    def load(manager: Any) -> Any:  # before a policy is, and once more by the harness, from the disk
        loads = getattr(manager, "load", None) or manager.load_task_or_group  # as older versions call it
        for name in suite.tasks:
            with _loading(f"task {name}"):
                loads([name])
        return manager

    if suite.task_folder is not None:  # its own 14,000 take half a minute to list
        with _loading(f"suite.task_folder={suite.task_folder}"):
            manager = TaskManager(include_path=suite.task_folder, include_defaults=False)
        if not unknown_to(manager):
            return load(manager)
    with _loading("its list of tasks"):
        manager = TaskManager(include_path=suite.task_folder)
    if unknown := unknown_to(manager):
        raise UserError(
            f"suite.tasks: the harness has no task {unknown[0]}{closest(unknown[0], manager.all_tasks)}; "
            "tasks of yours are found by suite.task_folder=<folder of YAML files>"
        )
    return load(manager)


@contextlib.contextmanager
def _loading(what: str) -> Iterator[None]:
    """Errors of what the harness loads, in one line: its own, the hub's, and those of code in a task share no base class."""
    try:
        yield
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UserError(
            f"suite=lm_eval: the harness cannot load {what} ({type(error).__name__}: {reason[:200]}): it takes a network, or "
            "HF_HOME=<folder that has its data>, or a task of yours, suite.task_folder=<folder of YAML files>"
        ) from error


def _folder_of_start(given: Evaluation, start: Policy) -> Path:
    """Where what the start model reaches is kept for all runs that have it."""
    suite = _settings(given)
    asked = {**asdict(suite), "name": None, "batch_size": None, "task_folder": _code(suite)}
    key = fingerprint(start.fingerprint, _harness().__version__, given.cluster.bf16, given.cfg.seed, asked)
    return given.cache / "lm_eval" / key


def _evaluate(given: Evaluation, policy: Policy, tasks: Any, rank: Rank) -> dict[str, dict[str, Any]]:
    """`results` of the harness, and of its groups."""
    from lm_eval.models.huggingface import HFLM

    suite = _settings(given)
    say(f"{', '.join(suite.tasks)}, {given.run.name if policy.iteration else 'its start model'}")
    loaded = policy.load(rank)
    made = _harness().simple_evaluate(
        model=HFLM(pretrained=loaded, tokenizer=policy.start.tokenizer, batch_size=suite.batch_size),
        tasks=list(suite.tasks),
        num_fewshot=suite.num_fewshot,
        limit=suite.limit,
        apply_chat_template=suite.chat_template,
        task_manager=tasks,
        log_samples=False,
        bootstrap_iters=1000,  # for standard errors that have no formula
        **dict.fromkeys(
            ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), given.cfg.seed
        ),
    )
    del loaded
    free()
    assert made is not None  # None is for ranks other than the first
    all_of = {**made["results"], **made.get("groups", {})}
    return json.loads(json.dumps(all_of, default=str))
