"""`python -m align dashboard entity/project [name=...] [group=...] [metric=result/win_rate] [--dry-run]`: wandb, set up.

Builds a workspace and a report in a wandb project that runs of align are in, and saves both: results, training curves
and hyperparameters, grouped by objective. `group=` shows the runs of one sweep, `metric=` is what runs are sorted by and
hyperparameters are held against. `--dry-run` prints both as JSON, with no login and no network, and saves nothing.

Only what is comparable between objectives is drawn: losses and rewards have each objective's own scale. Left out: what
wandb cannot do, which are intervals and tests (align report).
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align import metrics
from align.metrics import Metric, shown
from align.say import UserError, closest
from align.tracking import trackers

_USAGE = "python -m align dashboard entity/project [name=...] [group=...] [metric=result/win_rate] [--dry-run]"
_BY = "objective.name"
_BY_RUN = ("Hyperparameters", "Runs")  # sections of the report in which runs stand alone
_DRAWN = {"__id__", "id", "ref"}  # keys whose values wandb draws at random at every call

#: Settings that are drawn against the metric -> whether their axis is logarithmic.
_SETTINGS = {"objective.beta": True, "objective.gamma_beta_ratio": False, "optimizer.learning_rate": True}


@dataclass(frozen=True, kw_only=True)
class View:
    """The words of the command: which runs of which project are shown, by which metric."""

    entity: str
    project: str
    name: str
    group: str | None
    metric: str
    dry_run: bool

    @property
    def title(self) -> str:
        """The metric in words."""
        known = metrics.row(self.metric.removeprefix("result/"))
        return _title(known, "result") if known else self.metric

    @property
    def less_is_better(self) -> bool:
        """True where the least value is the best one."""
        return getattr(metrics.find(self.metric), "goal", None) == "minimize"


def view(words: Sequence[str]) -> View:
    """Parse the words of the command; `UserError` for an unknown word, or a metric that is a curve."""
    flags = {word for word in words if word.startswith("-")}
    options = dict(word.split("=", 1) for word in words if "=" in word and word not in flags)
    places = [word for word in words if "=" not in word and word not in flags]
    known = ["name", "group", "metric"]
    for word in [*sorted(flags - {"--dry-run"}), *sorted(options.keys() - set(known))]:
        raise UserError(f"unknown option {word}{closest(word.lstrip('-'), [*known, 'dry-run'])}: {_USAGE}")
    if not places:
        raise UserError("type which project: python -m align dashboard entity/project")
    if len(places) != 1 or places[0].count("/") != 1 or not all(places[0].split("/")):
        raise UserError(f"{' '.join(places)} is not one entity/project of wandb: {_USAGE}")
    entity, project = places[0].split("/")
    metric = options.get("metric", "result/win_rate")
    if "/" not in metric or metric.startswith(trackers.CURVES):
        raise UserError(
            f"metric={metric} is no result of a trained policy: type metric=result/{metric.partition('/')[2] or metric}, "
            "or a suite's, as in metric=alpaca_eval/lc_win_rate"
        )
    group = options.get("group")
    name = options.get("name") or (f"{group}: methods" if group else "Methods")
    return View(entity=entity, project=project, name=name, group=group, metric=metric, dry_run="--dry-run" in flags)


def dashboard(words: Sequence[str]) -> None:
    """Build workspace and report, and print or save them."""
    wanted = view(words)
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("the dashboard needs a package: pip install wandb-workspaces")
    if not wanted.dry_run and not trackers.has_wandb_key():
        raise UserError("no wandb key: type `wandb login`, or set WANDB_API_KEY; --dry-run does without")
    try:
        built = {"workspace": workspace(wanted), "report": report(wanted)}
        if wanted.dry_run:
            print(json.dumps({name: spec(one) for name, one in built.items()}, indent=1))
            return
        for one in built.values():
            one.save()
            print(one.url)
    except Exception as error:  # wandb's own, of many kinds
        raise UserError(f"wandb does not take it: {' '.join(str(error).split())[:300]}") from error


def spec(built: Any) -> dict[str, Any]:
    """Return a workspace or report as wandb stores it, without what differs at every call."""
    stored = built._to_model().model_dump_json(by_alias=True, exclude_none=True)
    return json.loads(stored, object_pairs_hook=lambda pairs: {key: value for key, value in pairs if key not in _DRAWN})


def workspace(wanted: View) -> Any:
    """Build the saved view of the project: all panels, runs grouped by objective, the best first."""
    import wandb_workspaces.workspaces as ws

    panels = _panels(wanted)
    return ws.Workspace(
        entity=wanted.entity,
        project=wanted.project,
        name=wanted.name,
        sections=[ws.Section(name=name, panels=some, is_open=name != "Cost") for name, some in panels.items()],
        settings=ws.WorkspaceSettings(x_axis=trackers.X_AXIS, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_filter(wanted),
            groupby=[ws.Config(_BY)],
            order=[ws.Ordering(ws.Summary(wanted.metric), ascending=wanted.less_is_better)],
        ),
        auto_generate_panels=False,
    )


def report(wanted: View) -> Any:
    """Build a page to write on: the same panels under headings, with what the numbers mean."""
    import wandb_workspaces.reports.v2 as wr

    # A run set is looked up in its project, which needs a login; without one it means the report's own.
    place = {} if wanted.dry_run else {"entity": wanted.entity, "project": wanted.project}
    said = {
        "Results": "Of the trained policies, on the same held-out prompts. Bars are means over an objective's runs, with "
        "their standard deviation. Read length and KL beside the win rate.",
        "Hyperparameters": f"A line is a run; the last axis is {wanted.title}.",
        "Training": "Means over an objective's runs, with their standard deviation. Losses and rewards are left out: each "
        "objective has its own scale.",
    }
    blocks: list[Any] = [wr.TableOfContents()]
    for name, panels in _panels(wanted).items():
        runset = wr.Runset(
            **place,
            name=wanted.group or "All runs",
            filters=_filter(wanted),
            groupby=[] if name in _BY_RUN else [f"config.{_BY}"],
            order=[wr.OrderBy(wr.SummaryMetric(wanted.metric), ascending=wanted.less_is_better)],
        )
        blocks += [wr.H2(name), *([wr.P(said[name])] if name in said else []), wr.PanelGrid([runset], panels=panels)]
    return wr.Report(
        entity=wanted.entity,
        project=wanted.project,
        title=wanted.name,
        description="Preference alignment methods side by side. Intervals and tests: python -m align report",
        blocks=blocks,
        width="fluid",
    )


def _filter(wanted: View) -> str:
    return f"Metric('Group') == {wanted.group!r}" if wanted.group else ""


def _panels(wanted: View) -> dict[str, list[Any]]:
    """Build the panels of each section, new ones at every call: each has an identity of its own."""
    import wandb_workspaces.reports.v2 as wr

    metric = wr.SummaryMetric(wanted.metric)
    grouped = {"groupby": wr.Config(_BY), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    results = {wanted.metric: wanted.title, **_titles("result", "answers", "pairs")}
    curves = {**_titles("eval", "pairs"), **_titles("train", "pairs")}
    against = {"result/sample_length": "length", "result/kl_policy_start": "KL from the start model"}
    scatter = [
        wr.ScatterPlot(title=f"{wanted.title}, against {words}", x=wr.SummaryMetric(name), y=metric)
        for name, words in against.items()
    ]
    axes = [wr.ParallelCoordinatesPlotColumn(wr.Config(name), log=log) for name, log in _SETTINGS.items()]
    axes.append(wr.ParallelCoordinatesPlotColumn(metric, inverted=wanted.less_is_better))

    def bars(titles: Mapping[str, str]) -> list[Any]:
        return [wr.BarPlot(title=title, metrics=[name], **grouped) for name, title in titles.items()]

    return {
        "Results": bars(results) + scatter,
        "Hyperparameters": [wr.ParallelCoordinatesPlot(title=f"Settings and {wanted.title}", columns=axes)],
        "Training": [
            wr.LinePlot(title=title, x=trackers.X_AXIS, y=[name], **grouped) for name, title in curves.items()
        ],
        "Runs": [wr.RunComparer(diff_only=True), wr.WeavePanelSummaryTable(table_name="samples")],
        "Cost": bars(_titles("result", "cost")),
    }


def _titles(place: Literal["result", "eval", "train"], *of: str) -> dict[str, str]:
    """Return the title of each metric that is drawn of a place, by its name in wandb."""
    return {f"{place}/{metric.name}": _title(metric, place) for metric in shown(place, *of)}


def _title(metric: Metric, place: str) -> str:
    label = metric.label("training" if place == "train" else "held-out")
    return label[0].upper() + label[1:]
