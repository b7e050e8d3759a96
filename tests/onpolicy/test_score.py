"""Scores in shards: every row once and in order, whatever is killed meanwhile and however many work on it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from judge_server import KEY, Server

from align.config import JudgeConfig, ScorerConfig
from align.files import fingerprint
from align.launch.rank import Rank
from align.onpolicy import score
from align.onpolicy.score import annotate, read_scores
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Identity, Kind, Scores
from align.playground import task
from align.say import UserError

PROMPTS, K, OF_A_SHARD = 22, 3, 4  # six shards, the last of two prompts
RANK = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)


@dataclass(frozen=True)
class Row:
    """What the stage reads of a response."""

    iteration: int
    prompt_id: str
    k: int
    prompt: str | list
    response: str


ROWS = [
    Row(1, f"p-{n}", k, f"prompt {n}", "x" * (7 * n % 5) + "y" * k)
    for n in range(PROMPTS)
    for k in range(K)
]  # fmt: skip


class Length:
    """A scorer: the number of characters; `log`, where given, gets a line per response that it is asked about."""

    def __init__(self, log: Path | None = None, pause: float = 0.0, **identity) -> None:
        fields = {"kind": Kind.pointwise, "name": "length", "revision": "1", "template": "a text", **identity}
        self.identity, self.log, self.pause = Identity(**fields), log, pause
        self.asked = 0

    def __call__(self, items):
        time.sleep(self.pause)
        self.asked += sum(len(item.responses) for item in items)
        if self.log:
            with self.log.open("a") as file:
                file.writelines(f"{os.getpid()} {item.prompt}\n" for item in items for _ in item.responses)
        return [self.score(item) for item in items]

    def score(self, item) -> Scores:
        lengths = [len(response) for response in item.responses]
        if self.identity.kind is Kind.pointwise:
            return Scores(values=lengths, counts=[{"cut_tokens": length} for length in lengths])
        return Scores(values=[[(a > b) + 0.5 * (a == b) for b in lengths] for a in lengths])


class Giving(Length):
    """Gives what it is told to give."""

    def __init__(self, values, kind=Kind.pointwise, times: int = 1) -> None:
        super().__init__(kind=kind)
        self.values, self.times = values, times

    def __call__(self, items):
        return [Scores(values=self.values) for _ in items] * self.times


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(score, "_SHARD_PROMPTS", OF_A_SHARD)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def lines(folder: Path) -> list[str]:
    return shards(folder)[0].read_text().splitlines()


def keys(rows) -> list[tuple[int, str, int]]:
    return [(row["iteration"], row["prompt_id"], row["k"]) for row in rows]


ALL_KEYS = [(row.iteration, row.prompt_id, row.k) for row in ROWS]


def test_a_row_holds_its_key_its_score_and_who_gave_it(tmp_path):
    total = annotate(ROWS, Length(), tmp_path)
    rows = read_scores(tmp_path)
    assert keys(rows) == ALL_KEYS
    assert rows[5] == {
        "iteration": 1,
        "prompt_id": "p-1",
        "k": 2,
        "score": 4.0,
        "scorer": "length",
        "revision": "1",
        "template": fingerprint("a text"),
        "cut_tokens": 4,
    }
    assert [row["score"] for row in rows] == [len(row.response) for row in ROWS]
    assert total == Counter(cut_tokens=sum(len(row.response) for row in ROWS))
    assert [file.name for file in shards(tmp_path)] == [f"0000{n}-of-00006.jsonl" for n in range(6)]
    assert [len(file.read_text().splitlines()) for file in shards(tmp_path)] == [12, 12, 12, 12, 12, 6]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["scorer"]["template"] == "a text" and (manifest["prompts"], manifest["rows"]) == (22, 66)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "locks", *(f.name for f in shards(tmp_path))}


def test_a_pairwise_scorers_rows_hold_their_row_of_the_matrix(tmp_path):
    annotate(ROWS, Length(kind=Kind.pairwise), tmp_path)
    rows = read_scores(tmp_path)
    assert [row["wins"] for row in rows[:3]] == [[0.5, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 1.0, 0.5]]
    assert "score" not in rows[0]


def test_the_built_in_judge_scores_every_response(tmp_path):
    prompts = task.prompts("test")[:6]
    rows = [Row(2, p, k, [{"role": "user", "content": p}], r) for p in prompts for k, r in enumerate(["cat", "thing"])]
    scorer = registry.build(ScorerConfig(name="program", path="align.playground.task:judge"), RANK)
    assert annotate(rows, scorer, tmp_path) == Counter()
    assert [row["score"] for row in read_scores(tmp_path)] == [
        task.judge(p, r) for p in prompts for r in ("cat", "thing")
    ]


def test_responses_in_any_order_are_one_prompt_by_one_and_k_by_k_and_k_may_differ(tmp_path):
    rows = [*[row for row in ROWS if row.k != 1][::-1], *[row for row in ROWS if row.k == 1 and row.prompt_id != "p-3"]]
    annotate(rows, Length(), tmp_path)
    made = read_scores(tmp_path)
    assert sorted(keys(made)) == sorted((row.iteration, row.prompt_id, row.k) for row in rows)
    assert keys(made)[:3] == [(1, "p-21", 0), (1, "p-21", 1), (1, "p-21", 2)]
    assert [key[2] for key in keys(made) if key[1] == "p-3"] == [0, 2]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    rows = [row for row in ROWS if row.prompt_id == "p-0"]
    annotate(rows, Giving([1, math.nan, -math.inf]), tmp_path / "one")
    assert [json.loads(line)["score"] for line in lines(tmp_path / "one")] == [1.0, None, None]
    assert [math.isnan(row["score"]) for row in read_scores(tmp_path / "one")] == [False, True, True]
    wins = [[0.5, 0.25, math.nan], [0.75, 0.5, math.nan], [math.nan] * 3]
    annotate(rows, Giving(wins, Kind.pairwise), tmp_path / "two")
    assert next(json.loads(line)["wins"] for line in lines(tmp_path / "two")) == [0.5, 0.25, None]
    assert math.isnan(read_scores(tmp_path / "two")[2]["wins"][0])


@pytest.mark.parametrize(
    "scorer, message",
    [
        (Giving([1.0, 2.0]), "scorer length, prompt 'p-0': 2 values and 0 counts for 3 responses"),
        (Giving([1.0, 2.0, "good"]), "scorer length, prompt 'p-0': must be real number, not str"),
        (Giving([1.0, 2.0, 3.0], times=2), "scorer length answered 8 of 4 prompts"),
        (Giving([1.0, 2.0, 3.0], Kind.pairwise), "scorer length, prompt 'p-0': .*"),
        (Giving([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], Kind.pairwise), "preferences of 3 candidates must be 3 rows of as many"),
        (Giving([[0.5, 0.9, 0.5], [0.9, 0.5, 0.5], [0.5, 0.5, 0.5]], Kind.pairwise),
         r"P\(0 beats 1\) is 0.9 and P\(1 beats 0\) is 0.9; they must add up to 1"),
        (Giving([[0.5, 1.9, 0.5], [-0.9, 0.5, 0.5], [0.5, 0.5, 0.5]], Kind.pairwise), r"P\(0 beats 1\) is 1.9"),
        (Giving([[1.0, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], Kind.pairwise), r"P\(0 beats 0\) is 1.0 and"),
    ],
)  # fmt: skip
def test_what_cannot_be_scores_is_refused_and_not_written(tmp_path, scorer, message):
    with pytest.raises(UserError, match=message):
        annotate(ROWS, scorer, tmp_path)
    assert shards(tmp_path) == []


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "there are no responses to score"),
        ([*ROWS, ROWS[4]], "response 1 to prompt 'p-1' of iteration 1 comes twice"),
    ],
)
def test_responses_that_cannot_be_are_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        annotate(rows, Length(), tmp_path)


def test_a_second_call_asks_nothing(tmp_path):
    first = annotate(ROWS, Length(), tmp_path)
    scorer = Length()
    assert annotate(ROWS, scorer, tmp_path) == first and scorer.asked == 0


def test_after_a_failure_only_the_missing_shards_are_scored(tmp_path):
    scorer = Length()
    scorer.score = lambda item: 1 / 0 if item.prompt == "prompt 9" else Length.score(scorer, item)
    with pytest.raises(ZeroDivisionError):
        annotate(ROWS, scorer, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in shards(tmp_path)}
    assert len(before) == 2
    with pytest.raises(
        UserError, match=r"is not finished, 00002-of-00006.jsonl is missing: type the command that makes it again"
    ):
        read_scores(tmp_path)
    (tmp_path / "00002-of-00006.unfinished").write_text("half a shard")  # of one that was killed while it wrote
    again = Length()
    annotate(ROWS, again, tmp_path)
    assert again.asked == len(ROWS) - 2 * OF_A_SHARD * K and keys(read_scores(tmp_path)) == ALL_KEYS
    assert before.items() <= {file: file.stat().st_mtime_ns for file in shards(tmp_path)}.items()
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    "identity, what",
    [
        ({"revision": "2"}, "scorer.revision: 1 -> 2"),
        ({"name": "other"}, "scorer.name: length -> other"),
        ({"template": "another"}, "scorer.template: a text -> another"),
        ({"settings": {"max_length": 3}}, "scorer.settings.max_length: None -> 3"),
        ({"kind": Kind.pairwise}, "scorer.kind: pointwise -> pairwise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_scores_of_another_scorer_are_not_mixed_in(tmp_path, identity, what):
    annotate(ROWS, Length(), tmp_path)
    shards(tmp_path)[2].unlink()
    other = Length(**identity)
    with pytest.raises(UserError, match=rf"holds scores of other inputs \({what}\): delete it, or name another"):
        annotate(ROWS, other, tmp_path)
    assert other.asked == 0 and len(shards(tmp_path)) == 5


@pytest.mark.parametrize(
    "other",
    [
        [replace(ROWS[0], response="another"), *ROWS[1:]],
        [replace(row, prompt="?") if row.prompt_id == "p-0" else row for row in ROWS],
        [replace(row, iteration=2) for row in ROWS],
        ROWS[:-1],
    ],
    ids=["response", "prompt", "iteration", "fewer"],
)
def test_scores_of_other_responses_are_not_taken(tmp_path, other):
    annotate(ROWS, Length(), tmp_path)
    with pytest.raises(UserError, match=r"holds scores of other inputs \((prompts.*|)responses: .* -> .*\): delete it"):
        annotate(other, Length(), tmp_path)


def test_damage_is_said_and_not_taken_for_scores(tmp_path):
    annotate(ROWS, Length(), tmp_path)
    third = shards(tmp_path)[2]
    whole = third.read_text()
    third.write_text(whole[:-30])
    with pytest.raises(UserError, match=rf"{third.name} is damaged .*: delete it, and type the command that makes"):
        read_scores(tmp_path)
    third.write_text(whole[: whole.rindex("\n", 0, -1) + 1])
    with pytest.raises(UserError, match="holds 65 scores in place of 66"):
        read_scores(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(
        UserError, match=r"manifest.json is damaged .*: delete .*, and type the command that makes it again"
    ):
        read_scores(tmp_path)
    with pytest.raises(UserError, match=r"holds no scores: type align annotate run_dir=.* scorer=\.\.\. first"):
        read_scores(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*file.*: name another folder"):
        annotate(ROWS, Length(), tmp_path / "file" / "scores")


def test_ids_with_odd_line_ends_are_one_row_each(tmp_path):
    rows = [Row(1, f"a\u2028b\nc {n}", 0, "päärynä", "x") for n in range(2)]
    annotate(rows, Length(), tmp_path)
    assert [row["prompt_id"] for row in read_scores(tmp_path)] == [row.prompt_id for row in rows]


# Real processes -------------------------------------------------------------------------------------------------------


def work(folder: str, log: str, url: str) -> None:
    """What a process below does: score all responses by length, slowly, or by the judge at `url`."""
    score._SHARD_PROMPTS = OF_A_SHARD
    scorer = Length(Path(log), pause=0.1)
    if url:
        judge = JudgeConfig(urls=[url], served_model="judge")
        scorer = registry.build(ScorerConfig(name="llm_judge", judge=judge), RANK)
    annotate(ROWS, scorer, Path(folder))


def start(folder: Path, log: Path, url: str = "") -> subprocess.Popen:
    log.touch()
    code = "import sys, test_score; test_score.work(*sys.argv[1:])"
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "onpolicy"]))
    line = [sys.executable, "-c", code, str(folder), str(log), url]
    return subprocess.Popen(line, env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)


def wait_for_shards(folder: Path, count: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while len(shards(folder)) < count:
        if time.monotonic() > until or process.poll() is not None:
            process.kill()
            raise AssertionError(process.stderr.read())
        time.sleep(0.01)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_without_a_row_twice_or_missing(tmp_path):
    folder, log = tmp_path / "scores", tmp_path / "log"
    annotate(ROWS, Length(), tmp_path / "whole")
    for count in (1, 3):
        with start(folder, log) as process:
            wait_for_shards(folder, count, process)
            time.sleep(0.05)  # it is in the next shard
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL
    before = {file: file.stat().st_mtime_ns for file in shards(folder)}
    assert 3 <= len(before) < 6
    log.unlink()
    with start(folder, log) as process:
        assert process.wait(120) == 0, process.stderr.read()
    assert len(log.read_text().splitlines()) == len(ROWS) - len(before) * OF_A_SHARD * K
    assert read_scores(folder) == read_scores(tmp_path / "whole")
    assert before.items() <= {file: file.stat().st_mtime_ns for file in shards(folder)}.items()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_at_once_share_the_work(tmp_path):
    folder, log = tmp_path / "scores", tmp_path / "log"
    annotate(ROWS, Length(), tmp_path / "whole")
    with start(folder, log) as one, start(folder, log) as other:
        assert (one.wait(120), other.wait(120)) == (0, 0), one.stderr.read() + other.stderr.read()
    asked = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    assert Counter(prompt for _, prompt in asked) == Counter(row.prompt for row in ROWS)  # every response once
    assert read_scores(folder) == read_scores(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_that_is_done_waits_for_what_another_is_about_and_takes_it_over_if_that_dies(tmp_path):
    folder, log = tmp_path / "scores", tmp_path / "log"
    (folder / "locks").mkdir(parents=True)
    hold = (
        "import sys, time, filelock; ours = filelock.FileLock(sys.argv[1]); ours.acquire(); print(1); time.sleep(600)"
    )
    line = [sys.executable, "-u", "-c", hold, str(folder / "locks" / "00000-of-00006.jsonl.lock")]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            with start(folder, log) as process:
                wait_for_shards(folder, 5, process)
                time.sleep(0.3)
                held_back = process.poll() is None and not (folder / "00000-of-00006.jsonl").exists()
                holder.kill()
                assert process.wait(60) == 0, process.stderr.read()
        finally:
            holder.kill()
    assert held_back
    assert keys(read_scores(folder)) == ALL_KEYS


@pytest.mark.slow
def test_a_judged_run_survives_its_own_death_and_the_servers_and_the_key_is_in_no_file(tmp_path, monkeypatch):
    """Killed with a shard under way, then finished while the server is killed and started again."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    folder, log = tmp_path / "scores", tmp_path / "log"
    servers = [Server(tmp_path / "answers-0", "flaky")]
    try:
        with start(folder, log, servers[0].url) as process:
            wait_for_shards(folder, 2, process)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        kept = len(shards(folder))
        assert 2 <= kept < 6
        with start(folder, log, servers[0].url) as process:
            wait_for_shards(folder, kept + 1, process)
            servers[0].kill()
            servers.append(Server(tmp_path / "answers-1", "flaky", port=servers[0].port))
            assert process.wait(120) == 0, process.stderr.read()
    finally:
        for server in servers:
            if server.process.poll() is None:
                server.kill()
    rows = read_scores(folder)
    assert keys(rows) == ALL_KEYS
    for i, row in enumerate(ROWS):
        assert rows[i]["wins"][row.k] == 0.5 and sum(rows[i]["wins"]) == pytest.approx(0.5 + row.k, abs=1.0)
    names = ("prompt_tokens", "completion_tokens", "unreadable_verdicts")
    assert [sum(row[name] for row in rows) for name in names] == [11 * 22 * 6, 2 * 22 * 6, 0]
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        assert KEY not in file.read_text()
