"""Responses and scores, as their stages write them, become the pairs that are worked by hand here."""

import json
import math
from dataclasses import replace

import pytest
from sampling import sample_by

from align.choices import Rejected
from align.config import SamplingConfig, SelectionConfig
from align.data.prompts import Candidate, PromptRow
from align.data.rows import read_pair
from align.onpolicy.sample import read_samples
from align.onpolicy.samplers import Sample
from align.onpolicy.score import annotate, read_scores
from align.onpolicy.scorers.base import Identity, Kind, Scores
from align.onpolicy.select import choose, scored_prompts, write_pairs
from align.say import UserError

#: At this temperature a score that is higher by 1 wins with sigmoid(ln 3) = 3/4, and one by 2 with 9/10.
SELECTION = SelectionConfig(temperature=1 / math.log(3))

#: To each prompt the responses, with their tokens and scores.
SAID = {
    "a": [("cat", 4, 0.0), ("dog", 4, 1.0), ("cow", 4, -1.0)],
    "same": [("cat", 4, 1.0), ("cat", 4, 1.0), ("cat", 4, 1.0)],
    "level": [("cat", 4, 1.0), ("dog", 4, 1.0), ("cow", 4, 1.0)],
    "unscored": [("cat", 4, 1.0), ("dog", 4, math.nan), ("cow", 4, 0.0)],
    "close": [("cat", 4, 1.0), ("dog", 4, 1.0), ("cow", 4, 0.75)],
    "ties": [("long winner", 8, 1.0), ("winner", 5, 1.0), ("loser", 3, 0.0)],  # held out
}
HELD_OUT = ("ties",)


def prompt_row(name, *candidates):
    return PromptRow(
        id=f"id-{name}",
        text=[{"role": "user", "content": name}],
        split="held_out" if name in HELD_OUT else "train",
        candidates=tuple(Candidate(origin="gpt4", text=text) for text in candidates),
    )


def sampled(folder, tokenizer, said=SAID, candidates=None, samples=3):
    """Responses as sample.py writes them: `said`, whatever a model would say."""
    prompts = [prompt_row(name, *(candidates or {}).get(name, ())) for name in said]
    told = iter(said.values())

    def sampler(asked, _):
        return [
            [Sample(text=text, response_ids=[7] * tokens, finished=True) for text, tokens, _ in next(told)[:samples]]
            for _ in asked
        ]

    settings = SamplingConfig(samples=samples, prompts_per_shard=2)
    sample_by(sampler, prompts, settings, folder, tokenizer, seed=42, iteration=1)
    return folder


class Scorer:
    """Gives each prompt's responses, in their order, the values that it is told."""

    def __init__(self, values, kind=Kind.pointwise):
        self.values = values
        self.identity = Identity(kind=kind, name="by hand", revision="1", template="a text")

    def __call__(self, items):
        return [Scores(values=self.values[item.prompt[-1]["content"]]) for item in items]


def scored(folder, responses, values=None, kind=Kind.pointwise):
    """Scores as score.py writes them."""
    values = values or {name: [score for _, _, score in said] for name, said in SAID.items()}
    annotate(read_samples(responses), Scorer(values, kind), folder)
    return folder


@pytest.fixture
def folders(tmp_path, tokenizer):
    """Responses and their scores."""
    responses = sampled(tmp_path / "responses", tokenizer)
    return responses, scored(tmp_path / "scores", responses)


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# By hand -----------------------------------------------------------------------------------------------------------


def test_the_pair_of_three_responses_is_the_one_worked_by_hand(folders, tmp_path):
    write_pairs(*folders, SELECTION, tmp_path / "pairs", seed=42)
    row, _ = lines(tmp_path / "pairs" / "train.jsonl")
    # Scores 0, 1, -1:    cat  dog  cow      mean over all three, itself included
    #              cat  [ 1/2  1/4  3/4 ]    1/2
    #              dog  [ 3/4  1/2  9/10]    (15 + 10 + 18) / 60 = 43/60
    #              cow  [ 1/4  1/10 1/2 ]    (5 + 2 + 10) / 60 = 17/60
    assert row == {
        "id": "id-a",
        "iteration": 1,
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": "dog",
        "rejected": "cow",
        "chosen_score": 1.0,
        "rejected_score": -1.0,
        "chosen_win_prob": pytest.approx(43 / 60),
        "rejected_win_prob": pytest.approx(17 / 60),
        "chosen_origin": "policy",
        "rejected_origin": "policy",
    }
    assert read_pair(row) == ([{"role": "user", "content": "a"}], "dog", "cow"), "as training reads it"


def test_of_two_that_are_best_the_shorter_is_chosen_and_held_out_pairs_have_a_file_of_their_own(folders, tmp_path):
    write_pairs(*folders, SELECTION, tmp_path / "pairs", seed=42)
    (row,) = lines(tmp_path / "pairs" / "held_out.jsonl")
    assert (row["chosen"], row["rejected"]) == ("winner", "loser")  # 5 tokens, and the other of score 1 has 8
    assert row["chosen_win_prob"] == pytest.approx(7 / 12)  # (1/2 + 1/2 + 3/4) / 3
    assert row["rejected_win_prob"] == pytest.approx(1 / 3)  # (1/4 + 1/4 + 1/2) / 3
    assert {path.name for path in (tmp_path / "pairs").iterdir()} == {"manifest.json", "train.jsonl", "held_out.jsonl"}


def test_what_is_dropped_is_counted_for_each_split(folders, tmp_path):
    counts = write_pairs(*folders, replace(SELECTION, min_gap=0.5), tmp_path / "pairs", seed=42)
    assert counts == {
        "train": {
            "prompts": 5,
            "pairs": 1,
            "dropped": {
                "a score is not a finite number": 1,
                "all samples are identical": 1,
                "chosen and rejected score the same": 1,
                "scores closer than min_gap": 1,
            },
        },
        "held_out": {"prompts": 1, "pairs": 1, "dropped": {}},
    }


def test_a_split_may_be_left_without_pairs(tmp_path, tokenizer):
    responses = sampled(tmp_path / "responses", tokenizer, {"a": SAID["a"]})
    counts = write_pairs(responses, scored(tmp_path / "scores", responses), SELECTION, tmp_path / "pairs", seed=42)
    assert counts["held_out"] == {"prompts": 0, "pairs": 0, "dropped": {}}
    assert (tmp_path / "pairs" / "held_out.jsonl").read_text() == ""


def test_one_response_makes_no_pair(tmp_path, tokenizer):
    responses = sampled(tmp_path / "responses", tokenizer, {"a": SAID["a"]}, samples=1)
    scores = scored(tmp_path / "scores", responses, {"a": [1.0]})
    counts = write_pairs(responses, scores, SELECTION, tmp_path / "pairs", seed=42)
    assert counts["train"] == {"prompts": 1, "pairs": 0, "dropped": {"fewer than two candidates": 1}}


def test_a_pairwise_scorers_wins_are_the_scores(tmp_path, tokenizer):
    # cat beats dog with 0.9, dog beats cow with 0.6, cow beats cat with 0.7; the means are 17/30, 12/30 and 16/30.
    cycle = [[0.5, 0.9, 0.3], [0.1, 0.5, 0.6], [0.7, 0.4, 0.5]]
    responses = sampled(tmp_path / "responses", tokenizer, {"a": SAID["a"]})
    scores = scored(tmp_path / "scores", responses, {"a": cycle}, Kind.pairwise)
    write_pairs(responses, scores, SELECTION, tmp_path / "pairs", seed=42)
    (row,) = lines(tmp_path / "pairs" / "train.jsonl")
    assert (row["chosen"], row["rejected"]) == ("cat", "dog")
    for name in ("score", "win_prob"):
        assert (row[f"chosen_{name}"], row[f"rejected_{name}"]) == (pytest.approx(17 / 30), pytest.approx(12 / 30))


def test_a_pairwise_scorer_that_says_nothing_of_two_responses_drops_their_prompt(tmp_path, tokenizer):
    unclear = [[0.5, math.nan, 0.3], [math.nan, 0.5, 0.6], [0.7, 0.4, 0.5]]
    responses = sampled(tmp_path / "responses", tokenizer, {"a": SAID["a"]})
    scores = scored(tmp_path / "scores", responses, {"a": unclear}, Kind.pairwise)
    counts = write_pairs(responses, scores, SELECTION, tmp_path / "pairs", seed=42)
    assert counts["train"]["dropped"] == {"a score is not a finite number": 1}


def test_a_further_candidate_can_be_chosen_and_is_no_opponent(tmp_path, tokenizer):
    said = {"a": [("cat", 4, 0.0), ("cow", 4, -1.0)]}
    responses = sampled(tmp_path / "responses", tokenizer, said, candidates={"a": ["lion"]}, samples=2)
    scores = scored(tmp_path / "scores", responses, {"a": [0.0, -1.0, 1.0]})
    write_pairs(responses, scores, SELECTION, tmp_path / "pairs", seed=42)
    (row,) = lines(tmp_path / "pairs" / "train.jsonl")
    assert (row["chosen"], row["chosen_origin"], row["chosen_score"]) == ("lion", "gpt4", 1.0)
    assert (row["rejected"], row["rejected_origin"], row["rejected_score"]) == ("cow", "policy", -1.0)
    assert row["chosen_win_prob"] == pytest.approx(33 / 40)  # against cat 3/4 and cow 9/10
    assert row["rejected_win_prob"] == pytest.approx(3 / 8)  # against cat 1/4 and itself 1/2


def test_a_candidate_makes_a_pair_with_a_single_sample(tmp_path, tokenizer):
    said = {"a": SAID["a"]}
    responses = sampled(tmp_path / "responses", tokenizer, said, candidates={"a": ["worse"]}, samples=1)
    scores = scored(tmp_path / "scores", responses, {"a": [0.0, -1.0]})
    write_pairs(responses, scores, SELECTION, tmp_path / "pairs", seed=42)
    (row,) = lines(tmp_path / "pairs" / "train.jsonl")
    assert (row["chosen"], row["rejected"], row["rejected_origin"]) == ("cat", "worse", "gpt4")
    # against the policy's one sample: cat itself
    assert (row["chosen_win_prob"], row["rejected_win_prob"]) == (0.5, pytest.approx(1 / 4))


def test_the_rejected_at_random_depends_on_the_seed(folders):
    responses, scores = (read(folder) for read, folder in zip((read_samples, read_scores), folders, strict=True))
    settings = replace(SELECTION, rejected=Rejected.random)
    drawn = {seed: choose(responses, scores, settings, seed)[0]["train"][0]["rejected"] for seed in range(20)}
    assert set(drawn.values()) == {"cat", "cow"}
    assert drawn == {seed: choose(responses, scores, settings, seed)[0]["train"][0]["rejected"] for seed in range(20)}


# The folder --------------------------------------------------------------------------------------------------------


def test_the_same_inputs_again_write_nothing(folders, tmp_path):
    pairs = tmp_path / "pairs"
    first = write_pairs(*folders, SELECTION, pairs, seed=42)
    before = {file: file.stat().st_mtime_ns for file in pairs.iterdir()}
    assert write_pairs(*folders, replace(SELECTION), pairs, seed=42) == first
    assert {file: file.stat().st_mtime_ns for file in pairs.iterdir()} == before


def test_pairs_of_other_inputs_are_refused_and_the_difference_is_named(folders, tmp_path, tokenizer):
    responses, scores = folders
    pairs = tmp_path / "pairs"
    write_pairs(responses, scores, SELECTION, pairs, seed=42)

    def refused(responses=responses, scores=scores, settings=SELECTION, seed=42):
        with pytest.raises(UserError, match=r"holds pairs of other inputs .* delete it, or name another") as error:
            write_pairs(responses, scores, settings, pairs, seed=seed)
        return str(error.value)

    assert "(seed: 42 -> 43)" in refused(seed=43)
    text = refused(settings=replace(SELECTION, min_gap=0.5, rejected=Rejected.random))
    assert "(selection.min_gap: 0.0 -> 0.5; selection.rejected: worst -> random)" in text
    values = {name: [5.0, 4.0, 3.0] for name in SAID}
    other = tmp_path / "other_scores"
    annotate(read_samples(responses), replace_name(Scorer(values), "another"), other)
    assert "(scores: " in refused(scores=other)
    assert " -> None)" in refused(scores=tmp_path / "nothing")
    renamed = sampled(tmp_path / "renamed", tokenizer, candidates={"a": ["lion"]})
    assert "(responses: " in refused(responses=renamed)


def replace_name(scorer, name):
    scorer.identity = replace(scorer.identity, name=name)
    return scorer


def test_a_folder_that_holds_something_else_is_refused(folders, tmp_path):
    (tmp_path / "pairs").mkdir()
    with pytest.raises(UserError, match=r"pairs holds no pairs: delete it, or name another"):
        write_pairs(*folders, SELECTION, tmp_path / "pairs", seed=42)


def test_stages_that_are_missing_are_named(folders, tmp_path):
    responses, scores = folders
    nothing = tmp_path / "nothing"
    with pytest.raises(UserError, match=r"nothing holds no scores: type align annotate run_dir=.* scorer=\.\.\. first"):
        write_pairs(responses, nothing, SELECTION, tmp_path / "pairs", seed=42)
    with pytest.raises(UserError, match="nothing holds no responses"):
        write_pairs(nothing, scores, SELECTION, tmp_path / "pairs", seed=42)
    (nothing / "locks").mkdir(parents=True)  # as scoring leaves it when it is killed at once
    with pytest.raises(UserError, match="nothing holds no scores"):
        write_pairs(responses, nothing, SELECTION, tmp_path / "pairs", seed=42)
    assert not (tmp_path / "pairs").exists()


def test_scores_of_fewer_responses_say_which_is_missing(tmp_path, tokenizer):
    two = sampled(tmp_path / "two", tokenizer, {"a": SAID["a"]}, samples=2)
    three = sampled(tmp_path / "three", tokenizer, {"a": SAID["a"]})
    scores = scored(tmp_path / "scores", two, {"a": [0.0, 1.0]})
    with pytest.raises(UserError, match=r"lack response 2 to prompt 'id-a': they are of other responses; delete them"):
        write_pairs(three, scores, SELECTION, tmp_path / "pairs", seed=42)


def test_wins_over_other_responses_are_refused_with_the_prompt(tmp_path, tokenizer):
    responses = sampled(tmp_path / "three", tokenizer, {"a": SAID["a"]})
    rows = read_samples(responses)
    scores = scored(tmp_path / "scores", responses, {"a": [[0.5] * 3] * 3}, Kind.pairwise)
    with pytest.raises(UserError, match=r"prompt 'id-a': preferences of 2 candidates must be 2 rows"):
        choose(rows[:2], read_scores(scores), SELECTION, 42)


def test_a_kill_while_pairs_are_written_leaves_no_folder_and_the_next_run_makes_it(folders, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs"

    def broken(*arguments):
        rows, counts = choose(*arguments)
        return {**rows, "held_out": [object()]}, counts  # fails when train.jsonl is written already

    with monkeypatch.context() as patch:
        patch.setattr("align.onpolicy.select.choose", broken)
        with pytest.raises(TypeError):
            write_pairs(*folders, SELECTION, pairs, seed=42)
    assert not pairs.exists()
    assert (tmp_path / "pairs.unfinished" / "train.jsonl").exists(), "what a kill would leave"
    write_pairs(*folders, SELECTION, pairs, seed=42)
    assert [len(lines(pairs / f"{split}.jsonl")) for split in ("train", "held_out")] == [2, 1]  # a and close
    assert not (tmp_path / "pairs.unfinished").exists()


def test_candidates_are_in_the_order_of_the_responses_whatever_the_order_of_the_scores(folders):
    rows, scores = read_samples(folders[0]), read_scores(folders[1])
    (prompt, *others) = scored_prompts(rows, scores[::-1])
    assert [prompt.id, *(other.id for other in others)] == [f"id-{name}" for name in SAID]
    assert [(c.text, c.length, c.score, c.origin) for c in prompt.candidates] == [
        ("cat", 4, 0.0, "policy"), ("dog", 4, 1.0, "policy"), ("cow", 4, -1.0, "policy"),
    ]  # fmt: skip
    assert prompt.preferences is None
