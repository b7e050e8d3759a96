"""The page as a reader has it: in a real Chromium, from disk, at phone and desktop width, in light and dark."""

import csv
import os
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from test_report import write_run, write_suite

from align.report.page import report

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        known = CHROMIUM or playwright.chromium.executable_path
        if not Path(known).exists():
            pytest.skip("no Chromium: apt install chromium, playwright install chromium, or set CHROMIUM")
        opened = playwright.chromium.launch(executable_path=known, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Six methods, some with three seeds, a grid among them; benchmarks; a run that failed and one that collapsed."""
    runs = tmp_path_factory.mktemp("page") / "runs"
    for objective, better in (("dpo", 0.0), ("wpo", 0.6)):
        for seed in (1, 2, 3):
            write_run(runs / f"{objective}-{seed}", objective, seed, better)
    for beta in (1.0, 2.0):
        for ratio in (0.3, 0.5):
            hyper = {"beta": beta, "gamma_beta_ratio": ratio}
            write_run(runs / f"simpo-{beta}-{ratio}", "simpo", better=beta / 10, hyper=hyper)
    for seed in (1, 2, 3):
        lengths = {"lc_win_rate": 0.7 + seed / 100, "win_rate": 0.65, "length": 1833.0}
        write_suite(runs / f"wpo-{seed}", "alpaca_eval", "805 instructions", **lengths)
        write_suite(runs / f"wpo-{seed}", "lm_eval", "tasks", mmlu=0.7, arc=0.5 + seed / 10)
    write_run(runs / "dpo-4", seed=4, state="failed")
    write_run(runs / "wpo-4", "wpo", seed=4, state="collapsed")
    return report([str(runs)])


@pytest.fixture(scope="module", params=[PHONE, DESKTOP], ids=["phone", "desktop"])
def watched(request, browser):
    """A tab, what its pages complained about, and what they asked for."""
    context = browser.new_context(viewport=request.param, color_scheme="light")
    tab = context.new_page()
    complaints, requests = [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda asked: requests.append(asked.url))
    yield tab, complaints, requests
    context.close()


@pytest.fixture
def tab(watched, made):
    """The page, opened; at the end nothing was asked for and nothing was complained about."""
    tab, complaints, requests = watched
    requests.clear()
    tab.goto(made.as_uri())
    yield tab
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [made.as_uri()]


def test_the_page_is_as_wide_as_the_screen_and_its_tables_scroll(tab):
    width = tab.viewport_size["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    right = """nodes => nodes.filter(node => node.checkVisibility() && !node.closest(".scroll"))
        .map(node => node.getBoundingClientRect().right)"""
    ends = tab.locator("svg, select, button, article, .scroll").evaluate_all(right)
    assert len(ends) > 20 and max(ends) <= width + 1


def test_the_table_says_what_results_csv_says(tab, made):
    with (made.parent / "results.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["state"] == "complete"]
    shown = shown_in(tab, "Answers to held-out prompts")
    labels = {row["method"] for row in rows}
    assert shown.keys() == labels | {"start model"} and len(labels) == 6
    for label in labels:
        own = [row for row in rows if row["method"] == label]
        assert int(shown[label]["seeds"]) == len(own)
        for head, name, digits in (
            ("win rate", "win_rate", 3),
            ("length", "sample_length", 1),
            ("KL", "kl_policy_start", 2),
        ):
            mean = fmean(float(row[name]) for row in own)
            assert shown[label][head].split("\n")[0] == f"{mean:.{digits}f}"
        percent = [
            f"{100 * fmean(float(row[part]) for row in own):.0f}" for part in ("win_share", "tie_share", "loss_share")
        ]
        assert re.findall(r"\d+", shown[label]["win / tie / loss, %"]) == percent


def test_cost_and_benchmarks_are_those_of_results_csv(tab, made):
    with (made.parent / "results.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["state"] == "complete"]
    costs = shown_in(tab, "Held-out pairs and cost")
    for label in {row["method"] for row in rows}:
        own = [row for row in rows if row["method"] == label]
        assert costs[label]["time"] == f"{fmean(float(row['cost/seconds']) for row in own):.1f} s"
        assert costs[label]["tokens"] == "1.2M" and costs[label]["peak memory"] == "0.84 GiB"
        accuracy = fmean(float(row["accuracy/mean_logp"]) for row in own)
        assert costs[label]["accuracy, mean_logp"].split("\n")[0] == f"{accuracy:.3f}"
    wpo = [row for row in rows if row["method"] == "wpo"]
    (benchmarks,) = shown_in(tab, "Benchmarks").values()
    assert benchmarks["seeds"] == "3 of 3" and benchmarks["AE2 length"].startswith("1833")
    for head, name in (("AE2 LC", "alpaca_eval/lc_win_rate"), ("MMLU", "lm_eval/mmlu")):
        assert benchmarks[head].split("\n")[0] == f"{100 * fmean(float(row[name]) for row in wpo):.1f}"
    further = shown_in(tab, "Suite lm_eval")["wpo"]["arc"]
    assert further.split("\n")[0] == f"{fmean(float(row['lm_eval/arc']) for row in wpo):.3f}"


def shown_in(tab, title: str) -> dict[str, dict[str, str]]:
    """The cells of a table of methods, by label and head."""
    read = """table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText.trim()))"""
    heads, *lines = tab.locator(f"h3:text-is('{title}') + .scroll table").evaluate(read)
    plain = [head.replace("\xa0", " ") for head in heads]
    return {cells[0]: {h: c.replace("\xa0", " ") for h, c in zip(plain, cells, strict=True)} for cells in lines}


def test_two_methods_are_chosen_and_the_verdict_is_read(tab):
    tab.select_option("#method-a", label="wpo")
    tab.select_option("#method-b", label="dpo")
    by_win_rate, by_accuracy = tab.locator("#said p").all_inner_texts()
    assert by_win_rate.startswith("Win rate: wpo is above dpo: significant, +")
    assert by_accuracy.startswith("Accuracy by mean_logp: ")
    tab.select_option("#method-a", label="dpo")
    assert tab.inner_text("#said") == "Choose two methods."


def test_two_runs_are_chosen_and_only_what_differs_is_shown(tab):
    def choose(select, name):
        labels = tab.locator(f"{select} option").all_inner_texts()
        tab.select_option(select, label=next(label for label in labels if f"({name})" in label))

    choose("#run-a", "dpo-1")
    choose("#run-b", "dpo-3")
    rows = [row.locator("td").all_inner_texts() for row in tab.locator("#settings-rows tr").all()]
    assert rows == [["seed", "1", "3"], ["cache_dir", "/cache/1", "/cache/3"]]
    assert tab.locator("#settings-rows tr.no").count() == 1  # where the cache is cannot change the result
    choose("#run-b", "simpo-2.0-0.3")
    rows = {row.locator("td").first.inner_text() for row in tab.locator("#settings-rows tr").all()}
    assert rows == {"objective.name", "objective.beta", "objective.gamma_beta_ratio"}
    choose("#run-b", "dpo-1")
    assert tab.locator("#settings-rows tr").count() == 0 and tab.is_visible("#alike")


def test_answers_stand_side_by_side_for_the_chosen_prompt(tab):
    assert tab.locator("#answers article").count() == 7  # the start model and six methods
    assert tab.inner_text("#asked") == "please list 0 cities"
    tab.click("#after")
    assert tab.inner_text("#asked") == "please list 1 cities"
    tab.click("#before")
    tab.click("#before")
    assert tab.inner_text("#asked") == "please list 11 cities"
    tab.select_option("#which", "all")
    assert tab.locator("#answers article").count() == 11
    assert "rome wpo 2 0" in tab.inner_text("#answers")


def test_a_method_stands_out_in_the_curves_when_it_is_chosen(tab):
    button = tab.locator("button[data-series]").first
    series = button.get_attribute("data-series")
    button.click()
    assert tab.locator(f"#curves .series.{series}.faint").count() == 0
    assert tab.locator("#curves .series.faint").count() > 0
    button.click()
    assert tab.locator("#curves .series.faint").count() == 0


def test_a_sweep_over_two_numbers_is_a_map_of_its_four_means(tab, made):
    with (made.parent / "results.csv").open() as lines:
        grid = [row for row in csv.DictReader(lines) if row["objective"] == "simpo"]
    words = tab.locator("#sweeps figure").first.locator("text").all_text_contents()
    assert {f"{float(row['win_rate']):.3f}" for row in grid} <= {*words}
    assert {"beta", "gamma_beta_ratio", "1", "2", "0.3", "0.5"} <= {*words}


def test_every_link_of_the_page_leads_to_a_section(tab):
    for link in tab.locator("nav a").all():
        link.click()
        assert tab.locator(link.get_attribute("href")).is_visible()
    assert "the loss is not finite" in tab.inner_text("#runs")
    assert "collapsed, at step 2: answers repeat themselves" in tab.inner_text("#runs")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(browser, made, scheme):
    context = browser.new_context(viewport=DESKTOP, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(made.as_uri())
    read = "node => [getComputedStyle(node).color, getComputedStyle(document.body).backgroundColor]"
    for what, ratio in (("h1", 7), ("td", 7), (".note", 4.5), ("td small", 4.5), ("nav a", 4.5)):
        ink, paper = tab.locator(what).first.evaluate(read)
        assert contrast(ink, paper) >= ratio, (what, ink, paper)
    fill = tab.locator("#methods svg text").first.evaluate("node => getComputedStyle(node).fill")
    assert contrast(fill, paper) >= 4.5
    context.close()


def contrast(one: str, other: str) -> float:
    """The WCAG's contrast ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_it_prints_dark_on_white_whatever_the_screen(browser, made):
    context = browser.new_context(viewport=DESKTOP, color_scheme="dark")
    tab = context.new_page()
    tab.goto(made.as_uri())
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not tab.is_visible("nav")
    assert len(tab.pdf()) > 10_000
    context.close()
