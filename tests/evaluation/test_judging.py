"""The judge of a run: any scorer, asked once, about all answers to a prompt together; and what its word comes to."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import Result, pair_row, quick, write_jsonl
from transformers import PreTrainedModel

from align import engine
from align.choices import Layout
from align.config import RunConfig, ScorerConfig
from align.evaluation import judging
from align.evaluation.judging import Contestant, Weight
from align.launch.rank import Rank
from align.onpolicy.sample import ResponseRow
from align.onpolicy.scorers.base import Identity, Kind, Scores

PROGRAMS = """
def short(prompt, answer):
    return 1 / (1 + len(answer))

def vowels(prompt, answer):
    return float(sum(letter in "aeiou" for letter in answer))

def slowly(prompt, answer):
    import os, pathlib, time
    time.sleep(0.02)
    pathlib.Path(f"judge-{os.getpid()}").touch()
    return vowels(prompt, answer)
"""

#: P(a beats b) by how many characters they have, which is 1/2 for equally long ones; what it saw is kept.
SCORERS = """
from align.onpolicy.scorers.base import Identity, Kind, Scores
asked = []

class Compares:
    identity = Identity(kind=Kind.pairwise, name="lengths", revision="1", template="none")

    def __call__(self, items):
        asked.extend(items)
        return [Scores(values=[[len(a) / (len(a) + len(b)) if a or b else 0.5 for b in i.responses] for a in i.responses]) for i in items]

def compares(cfg, where):
    return Compares()
"""


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch) -> None:
    """The judges can be imported, by this test alone."""
    (tmp_path / "my_programs.py").write_text(PROGRAMS)
    (tmp_path / "my_scorers.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("my_programs", "my_scorers"):
        sys.modules.pop(name, None)


JUDGED = ("win_rate", "judge_score", "kl_policy_start", "sample_entropy", "sample_length")


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def judged(align, tiny_llama, pairs_file, tmp_path):
    """Train two steps and judge eight answers to two prompts."""

    def run(name: str, *words: str) -> tuple[Path, Result]:
        folder = tmp_path / name
        short = ["evaluation.prompts=2", "evaluation.max_new_tokens=8", "optimizer.learning_rate=1e-2"]
        return folder, align(*quick(tiny_llama, pairs_file, f"run_dir={folder}", *short, *words))

    return run


@pytest.mark.slow
def test_a_scorer_judges_as_the_datasets_judge_does_and_takes_its_place(judged):
    by_dataset, result = judged("dataset", "dataset.judge=my_programs:vowels")
    assert result.status == 0, result.err
    by_scorer, result = judged(
        "scorer", "dataset.judge=my_programs:short", "scorer=program", "scorer.path=my_programs:vowels"
    )
    assert result.status == 0 and "judged by program:my_programs:vowels" in result.out, result.err
    for side in ("start", "trained"):
        assert read(by_dataset / "results.json")[side] == read(by_scorer / "results.json")[side]
    assert (by_dataset / "samples.jsonl").read_text() == (by_scorer / "samples.jsonl").read_text()


def test_the_figures_of_a_judge_by_numbers_can_be_worked_out_from_the_answers(judged):
    folder, result = judged("run", "dataset.judge=my_programs:vowels")
    assert result.status == 0, result.err
    rows = lines(folder / "samples.jsonl")
    assert len(rows) == 2 and rows[0].keys() == {"prompt", "start", "policy", "scores"}
    for row in rows:
        for side in ("start", "policy"):
            assert row["scores"][side] == [sum(letter in "aeiou" for letter in answer) for answer in row[side]]
    games = [(a, b) for row in rows for a in row["scores"]["policy"] for b in row["scores"]["start"]]
    made = read(folder / "results.json")
    assert len(games) == 32
    assert made["trained"]["win_rate"] == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in games) / 32)
    assert made["trained"]["ties"] == pytest.approx(sum(a == b for a, b in games) / 32)
    own = [(row["scores"]["start"][i], row["scores"]["start"][j]) for row in rows for i in range(4) for j in range(i)]
    assert made["start"]["ties"] == pytest.approx(sum(a == b for a, b in own) / 12)
    assert made["start"]["win_rate"] == 0.5 and made["start"]["kl_policy_start"] == 0
    assert made["trained"]["judge_score"] == pytest.approx(sum(a for a, _ in games) / 32)
    card = (folder / "model" / "README.md").read_text()
    for said in ("ties among the answers compared", "entropy of an answer", "repeated 4-grams"):
        assert said in card
    assert "repeated 4-grams" in result.out and "ties among" not in result.out


@pytest.mark.slow
def test_a_scorer_that_only_compares_is_told_all_answers_together_and_leaves_its_chances(judged):
    folder, result = judged("run", "scorer.name=my_scorers:compares")
    assert result.status == 0, result.err
    made, rows = read(folder / "results.json"), lines(folder / "samples.jsonl")
    assert [len(item.responses) for item in sys.modules["my_scorers"].asked] == [8, 8]
    for row in rows:
        assert row.keys() == {"prompt", "start", "policy", "chances"}
        for ours, of_ours in zip(row["policy"], row["chances"], strict=True):
            for theirs, chance in zip(row["start"], of_ours, strict=True):
                both = len(ours) + len(theirs)
                assert chance == pytest.approx(len(ours) / both if both else 0.5)
    chances = [chance for row in rows for of_ours in row["chances"] for chance in of_ours]
    assert made["trained"]["win_rate"] == pytest.approx(sum(chances) / 32)
    assert made["trained"]["ties"] == pytest.approx(sum(chance == 0.5 for chance in chances) / 32)
    assert "judge_score" not in made["trained"] and "sample_entropy" in made["trained"]


@pytest.mark.slow
def test_no_policy_is_in_memory_when_the_judge_is_asked(judged, monkeypatch):
    left, score = [], judging.score_responses

    def look(*args):
        gc.collect()
        left.extend(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, PreTrainedModel))
        return score(*args)

    gc.collect()
    before = sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())
    monkeypatch.setattr(judging, "score_responses", look)
    _, result = judged("run", "dataset.judge=my_programs:vowels")
    assert result.status == 0 and len(left) <= before, left


@pytest.mark.parametrize(
    "words, says",
    [
        (["scorer=program"], "scorer.name=program needs scorer.path=module:function"),
        (["scorer=program", "scorer.path=my_programs:none"], "scorer.path=my_programs:none is not"),
        (["scorer.name=pairrmm"], "scorer.name=pairrmm is unknown (did you mean pairrm?)"),
        (["scorer=reward_model", "scorer.path=/nowhere"], "scorer.path=/nowhere does not exist"),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_anything_starts(refusal, tiny_llama, pairs_file, words, says):
    assert says in refusal(*quick(tiny_llama, pairs_file, "tracker=none", *words))


@pytest.mark.slow
def test_another_scorer_is_another_run_and_how_fast_it_scores_is_not(judged):
    words = ["scorer=program", "scorer.path=my_programs:vowels"]
    folder, result = judged("run", *words)
    assert result.status == 0, result.err
    _, again = judged("run", *words, "cluster.cpu_threads=1")
    assert "This run is complete" in again.out
    _, other = judged("run", "scorer=program", "scorer.path=my_programs:short")
    assert other.status == 1 and "holds another run" in other.err and "scored_by: " in other.err
    assert read(folder / "identity.json")["scorer"].keys().isdisjoint({"tokens_per_batch", "judge"})


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_judge_together_and_find_what_one_finds(align, tiny_llama, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair_row(i) for i in range(80)])
    words = ["dataset.judge=my_programs:slowly", "dataset.eval_fraction=0.6", "optimizer.learning_rate=1e-2"]
    words += ["evaluation.max_new_tokens=8", "evaluation.samples_per_prompt=2", "cluster.cpu_threads=1"]
    found = {}
    for cluster in ("cpu", "cpu_2"):
        folder, before = tmp_path / cluster, set(tmp_path.glob("judge-*"))
        result = align(*quick(tiny_llama, pairs, f"run_dir={folder}", *words, f"cluster={cluster}"))
        assert result.status == 0, result.err
        found[cluster] = read(folder / "results.json")
        judges = set(tmp_path.glob("judge-*")) - before
        assert len(judges) == (2 if cluster == "cpu_2" else 1)  # more than 32 prompts are two shards of scores
        for name, shards in (("responses", 3), ("responses_of_start", 3), ("weights", 3), ("scores", 2)):
            assert len(list((folder / "evaluation" / name).glob("0*.jsonl"))) == shards
    for side in ("start", "trained"):
        one, two = ({k: found[cluster][side][k] for k in JUDGED} for cluster in ("cpu", "cpu_2"))
        assert two == pytest.approx(one, abs=1e-6)


# The parts ----------------------------------------------------------------------------------------------------------


class Says:
    """Gives each answer the number that it is."""

    identity = Identity(kind=Kind.pointwise, name="says", revision="1", template="none")

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, items):
        self.calls += len(items)
        return [Scores(values=[float(text) for text in item.responses]) for item in items]


def answers(name: str, *texts: list[str]) -> list[ResponseRow]:
    """To as many prompts as there are lists."""
    return [
        ResponseRow(
            iteration=0, prompt_id=f"{at}", k=k, prompt=f"ask {at}", response=text, response_ids=[5], origin=name
        )
        for at, own in enumerate(texts)
        for k, text in enumerate(own)
    ]


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """The judge's figures of given answers by `Says`, or another scorer, without any policy."""
    monkeypatch.setattr(
        judging, "weigh", lambda policy, rows, *more: [Weight(logp=0.0, entropy=0.0, length=1)] * len(rows)
    )

    def run(ours: list[ResponseRow], theirs: list[ResponseRow], scorer=None):
        said = {"policy": ours, "start": theirs}
        monkeypatch.setattr(judging, "answer", lambda contestant, *more: said[contestant.name])
        monkeypatch.setattr(judging.registry, "build", lambda cfg, rank: scorer or Says())
        sides = [Contestant(name=name, policy=None, stream=0, folder=tmp_path / "evaluation" / name) for name in said]
        cfg = RunConfig(scorer=ScorerConfig(name="says"))
        rank = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)
        return judging.judge(cfg, sides, [], 0, rank)

    return run


def test_prompts_that_the_judge_cannot_judge_are_left_out_and_counted(compared, tmp_path, capsys):
    made = compared(answers("policy", ["2", "3"], ["5", "5"]), answers("start", ["1", "2"], ["nan", "0"]))
    policy, start = made["trained"], made["start"]
    assert policy["win_rate"] == (1 + 0.5 + 1 + 1) / 4 and policy["ties"] == 1 / 4  # 2 and 3 against 1 and 2
    assert (start["judge_score"], start["win_rate"], start["ties"]) == (1.5, 0.5, 0)
    assert lines(tmp_path / "samples.jsonl") == [
        {"prompt": "ask 0", "start": ["1", "2"], "policy": ["2", "3"], "scores": {"start": [1, 2], "policy": [2, 3]}}
    ]
    assert "says could not judge 1 of 2 prompts" in capsys.readouterr().out


def test_a_judge_without_a_word_on_anything_is_an_error(compared):
    with pytest.raises(ValueError, match="says has no finite score for any of the 1 prompts"):
        compared(answers("policy", ["1"]), answers("start", ["nan"]))


def test_what_was_judged_before_a_failure_is_kept(compared):
    first = answers("policy", *[["2"]] * 40), answers("start", *[["1"]] * 40)
    judge, fails = Says(), Says()
    fails.__class__ = type(
        "Fails", (Says,), {"__call__": lambda self, items: 1 / 0 if self.calls else Says.__call__(self, items)}
    )
    with pytest.raises(ZeroDivisionError):
        compared(*first, fails)
    assert fails.calls == 32  # a shard
    compared(*first, judge)
    assert judge.calls == 8


def test_one_answer_to_a_prompt_has_no_tie_with_another(compared):
    made = compared(answers("policy", ["1"]), answers("start", ["1"]))
    assert "ties" not in made["start"] and (made["trained"]["ties"], made["trained"]["win_rate"]) == (1, 0.5)


def test_entropy_is_over_tokens_and_kl_over_answers():
    own = [Weight(logp=-2.0, entropy=1.0, length=1), Weight(logp=-9.0, entropy=2.0, length=5)]
    by_start = [Weight(logp=-3.0, entropy=0.0, length=1), Weight(logp=-9.5, entropy=0.0, length=5)]
    assert judging.sample_entropy(own) == (1 + 2) / (1 + 5)
    assert judging.kl(own, by_start) == (1 + 0.5) / 2


def test_answers_are_weighed_in_their_order_and_each_alone(tiny_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    rank = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)
    engine.attach(policy, Layout.shared)
    asked = [("b", [7, 8, 9]), ("a", [11]), ("b", [4]), ("a", [12, 13])]  # by prompt: how they are fed
    rows = [
        ResponseRow(iteration=0, prompt_id=name, k=k, prompt=f"say {name}", response="", response_ids=ids)
        for k, (name, ids) in enumerate(asked)
    ]
    together = judging.weights(policy, tokenizer, rows, rank, layout=Layout.shared, budget=1000)
    assert [weight.length for weight in together] == [3, 1, 1, 2]
    for row, weight in zip(rows, together, strict=True):
        (alone,) = judging.weights(policy, tokenizer, [row], rank, layout=Layout.shared, budget=1000)
        assert (weight.logp, weight.entropy) == pytest.approx((alone.logp, alone.entropy), rel=1e-5)
    # A random model with small weights is nearly uniform.
    assert together[1].entropy == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), rel=0.02)
