"""trackio as its user has it, with no account: four methods of one sweep, in its own dashboard, in a real Chromium."""

import csv
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, pair_row, quick, write_jsonl
from test_tracking import JUDGE, JUDGED, figures

pytest.importorskip("trackio")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
LONGER = ["optimizer.max_steps=6", "train.eval_every_steps=2"]
METHODS = ["dpo", "simpo", "sppo", "wpo"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory, tiny_llama) -> Path:
    """The working folder of a sweep over four methods; trackio's own folder is in it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "my_judge.py").write_text(JUDGE)
    pairs = write_jsonl(folder / "pairs.jsonl", [pair_row(i) for i in range(40)])
    words = ["-m", f"objective={','.join(METHODS)}", "tracker=trackio", "tracker.group=study"]
    own = {"PYTHONPATH": str(ROOT), "ALIGN_CACHE": str(folder / "cache"), "TRACKIO_DIR": str(folder / "trackio")}
    line = [sys.executable, "-m", "align", *words, *JUDGED, *quick(tiny_llama, pairs, *LONGER), "cluster.cpu_threads=1"]
    done = subprocess.run(line, env=os.environ | own, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'trackio show --project "align"' in done.stdout
    return folder


@pytest.fixture(scope="module")
def runs(study) -> dict[str, Path]:
    """Each method's run folder."""
    return {name: next((study / "runs").glob(f"local-local-{name}-*")) for name in METHODS}


def rows(study: Path, query: str) -> list[tuple]:
    """Of trackio's file of the project."""
    with sqlite3.connect(study / "trackio" / "align.db") as project:
        return project.execute(query).fetchall()


def test_each_method_is_one_run_with_group_config_and_every_figure(study, runs):
    told: dict[str, list] = {}
    for name, step, metrics in rows(study, "select run_name, step, metrics from metrics order by id"):
        told.setdefault(name, []).append((step, json.loads(metrics)))
    configs = {name: json.loads(config) for name, config in rows(study, "select run_name, config from configs")}
    assert told.keys() == configs.keys() == {folder.name for folder in runs.values()}
    for method, folder in runs.items():
        *lines, samples, results = told[folder.name]
        assert lines == figures(folder)
        assert samples[0] == results[0] == 6 and len(samples[1]["samples"]["_value"]) == 2
        trained = json.loads((folder / "results.json").read_text())["trained"]
        assert {f"result/{name}": value for name, value in trained.items()}.items() <= results[1].items()
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert configs[folder.name]["_Group"] == config["tracker"]["group"] == "study"
        assert configs[folder.name]["objective.name"] == config["objective"]["name"] == method
        assert configs[folder.name]["train.pairs_per_step"] == config["train"]["pairs_per_step"] == 8


@pytest.fixture(scope="module")
def address(study) -> Iterator[str]:
    """Of the dashboard, as `trackio show` starts it."""
    environment = os.environ | {"TRACKIO_DIR": str(study / "trackio"), "PYTHONUNBUFFERED": "1", "BROWSER": "true"}
    line = [sys.executable, "-m", "trackio.cli", "show", "--project", "align"]
    with subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as dashboard:
        try:
            assert dashboard.stdout is not None
            said = next(line for line in dashboard.stdout if "http://" in line)
            found = re.search(r"http://127\.0\.0\.1:\d+", said)
            assert found is not None, said
            yield found[0]
        finally:
            dashboard.terminate()


@pytest.fixture
def tab(address):
    """The project's page at desktop width; at the end nothing was asked of another host."""
    with sync_api.sync_playwright() as playwright:
        known = CHROMIUM or playwright.chromium.executable_path
        if not Path(known).exists():
            pytest.skip("no Chromium: apt install chromium, playwright install chromium, or set CHROMIUM")
        browser = playwright.chromium.launch(executable_path=known, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        requests: list[str] = []
        tab.on("request", lambda asked: requests.append(asked.url))
        tab.goto(f"{address}/?project=align&metric_filter=eval/kl|result/win_rate&smoothing=0")
        yield tab
        assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
        browser.close()


def test_the_four_methods_are_in_one_chart_by_name(tab, runs, tmp_path):
    names = {folder.name for folder in runs.values()}
    for metric in ("eval/kl_start_policy", "result/win_rate"):
        chart = tab.locator(f'.plot-container[data-metric="{metric}"]')
        chart.locator("canvas").wait_for()
        assert set(chart.locator(".legend-label").all_inner_texts()) == names
    if wanted := os.environ.get("SCREENSHOT"):
        tab.screenshot(path=wanted)
    drawn = shown(tab, "eval/kl_start_policy", tmp_path)
    told = {
        (folder.name, step): values["eval/kl_start_policy"]
        for folder in runs.values()
        for step, values in figures(folder)
        if "eval/kl_start_policy" in values
    }
    assert len(told) == 16  # four runs, at four steps
    assert {(row["run"], int(row["step"])): float(row["eval/kl_start_policy"]) for row in drawn} == pytest.approx(told)
    bars = {row["run"]: float(row["result/win_rate"]) for row in shown(tab, "result/win_rate", tmp_path)}
    results = {f.name: json.loads((f / "results.json").read_text())["trained"]["win_rate"] for f in runs.values()}
    assert bars == pytest.approx(results)


def shown(tab, metric: str, folder: Path) -> list[dict[str, str]]:
    """The numbers of a chart, by its own button."""
    with tab.expect_download() as download:
        tab.locator(f'.plot-container[data-metric="{metric}"]').get_by_label("Download this plot").click()
    download.value.save_as(folder / "chart.csv")
    with (folder / "chart.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_the_bars_of_the_four_have_four_colours(tab, runs):
    chart = tab.locator('.plot-container[data-metric="result/win_rate"]')
    chart.locator("canvas").wait_for()
    legend = chart.locator(".legend-dot").evaluate_all("dots => dots.map(dot => getComputedStyle(dot).backgroundColor)")
    painted = chart.locator("canvas").evaluate(
        """canvas => {
            const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height), counts = {};
            for (let at = 0; at < data.length; at += 4) {
                const colour = `rgb(${data[at]}, ${data[at + 1]}, ${data[at + 2]})`;
                counts[colour] = (counts[colour] || 0) + 1;
            }
            return counts;
        }"""
    )
    assert len(set(legend)) == len(runs)
    assert all(painted.get(colour, 0) > 100 for colour in legend)  # pixels: a bar, not the edge of one
