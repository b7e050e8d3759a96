"""`python -m align evaluate` as its user meets it: every suite on tiny runs, what it leaves, how it goes on, what it refuses.

The judge is a program that counts vowels, so that every win rate can be worked out from the answers in the files.
"""

import contextlib
import json
import logging
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev

import conftest
import pytest
from conftest import ROOT, Result, pair_row, quick, write_jsonl
from judge_server import Server, first_wins
from safetensors.torch import load_file

from align.evaluation.evaluate import with_evaluations
from align.evaluation.settings import SUITES

VOWELS = """
def count(prompt, response):
    return sum(letter in "aeiou" for letter in response) / 10
"""
SHORT = ["sampling.samples=2", "sampling.max_new_tokens=6"]


def typed(home: Path, *words: str, evaluates: bool = True) -> Result:
    """`align evaluate <words>`, or `align <words>`, in this process and in the folder `home`."""
    words = tuple(sorted(words, key=lambda word: not word.startswith("-")))
    more = ["cluster.cpu_threads=1", f"cache_dir={home / 'cache'}"]
    more += [] if any(word.startswith("cluster=") for word in words) else ["cluster=cpu"]
    with contextlib.chdir(home):
        return conftest.typed(home, *(["evaluate"] if evaluates else []), *words, *more)


def in_one_line(result: Result) -> str:
    assert result.status == 1, result
    assert result.err.count("\n") == 1 and result.err.startswith("align: "), result.err
    return result.err


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_llama) -> Path:
    """A folder with runs of all kinds under runs/, each of two steps; tests copy what they change."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "vowel_share.py").write_text(VOWELS)
    pairs = write_jsonl(folder / "pairs.jsonl", [pair_row(i, kind="odd" if i % 2 else "even") for i in range(40)])
    words = [*quick(tiny_llama, pairs), "dataset.judge=vowel_share:count", "dataset.eval_fraction=0.2", "tracker=none"]
    words += ["evaluation.samples_per_prompt=2", "evaluation.max_new_tokens=6"]
    runs = {
        "dpo": [],
        "lora": ["model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"],
        "sppo": [
            "objective=sppo",
            "source=selfplay",
            "iterations=2",
            "sampling.samples=3",
            "sampling.max_new_tokens=6",
        ],
    }
    for name, more in runs.items():
        result = typed(folder, *words, *more, f"run_dir=runs/{name}", evaluates=False)
        assert result.status == 0, result.err
    return folder


@pytest.fixture
def copy(home, tmp_path):
    """The folder again, for a test that changes it."""
    return Path(shutil.copytree(home, tmp_path / "home", ignore=shutil.ignore_patterns("evaluation")))


def read(file: Path):
    return json.loads(file.read_text())


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def results_of(home: Path, run: str, suite: str, *words: str) -> dict[str, float]:
    """What a suite finds, by names without the suite's."""
    result = typed(home, f"run=runs/{run}", f"suite={suite}", *words)
    assert result.status == 0, result.err
    name = next((word.removeprefix("suite.name=") for word in words if word.startswith("suite.name=")), suite)
    found = read(home / "runs" / run / "evaluation" / name / "results.json")
    assert all(key.startswith(f"{name}/") and isinstance(value, float) for key, value in found.items())
    for key in found:
        assert key in result.out  # the printed table
    return {key.removeprefix(f"{name}/"): value for key, value in found.items()}


# Composing ------------------------------------------------------------------------------------------------------------


def test_every_suite_composes_and_is_of_its_kind():
    from align.cli.compose import CONF

    assert {file.stem for file in CONF.glob("suite/*.yaml")} == SUITES.keys()
    for name in SUITES:
        result = typed(Path.cwd(), f"suite={name}", "run=runs/x", "--cfg=job")
        assert result.status == 0 and f"kind: {name}\n" in result.out and f"name: {name}\n" in result.out, result


def test_composing_an_evaluation_imports_no_torch():
    import subprocess

    code = "import sys; sys.argv[1:] = ['evaluate', 'run=x', '--cfg', 'job']; import runpy\n"
    code += "runpy.run_module('align', run_name='__main__'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


# pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["dpo", "lora"])
def test_on_its_held_out_pairs_a_run_has_the_accuracies_of_its_training(home, run):
    found, before = results_of(home, run, "pairs"), read(home / "runs" / run / "results.json")
    for name in ("accuracy/mean_logp", "accuracy/log_ratio", "mean_logp/chosen", "mean_logp/rejected"):
        assert found[name] == pytest.approx(before["trained"][name], abs=1e-5)
    assert found["start/accuracy/mean_logp"] == pytest.approx(before["start"]["accuracy/mean_logp"])
    assert found["pairs"] == 8  # a fifth of 40


def test_accuracies_of_a_file_of_pairs_are_those_of_the_models_own_logits_and_by_group(home, tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["suite.path=pairs.jsonl", "suite.group_by=kind", "suite.name=all", "suite.limit=12"]
    found = results_of(home, "dpo", "pairs", *words)
    logps = load_file(home / "runs" / "dpo" / "evaluation" / "all" / "logp.safetensors")
    trained, tokenizer = (of.from_pretrained(home / "runs/dpo/model") for of in (AutoModelForCausalLM, AutoTokenizer))
    means = []
    for i in range(12):
        pair = pair_row(i)
        prompt = tokenizer.apply_chat_template(pair["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for at, side in enumerate(("chosen", "rejected")):
            answer = tokenizer(pair[side][0]["content"] + "<end_of_turn>", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = trained(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
            assert logps["policy"][i, at].item() == pytest.approx(logp, abs=1e-3)
            means.append(logp / len(answer))
    right = [chosen > rejected for chosen, rejected in zip(means[::2], means[1::2], strict=True)]
    assert found["accuracy/mean_logp"] == pytest.approx(fmean(right))
    assert found["accuracy/mean_logp/odd"] == pytest.approx(fmean(right[1::2]))
    assert found["mean_logp/chosen"] == pytest.approx(fmean(means[::2]), abs=1e-4)
    assert found["pairs"] == 12


def test_pairs_of_a_run_of_selfplay_are_those_of_its_last_iteration(home):
    found = results_of(home, "sppo", "pairs")
    held_out = (home / "runs/sppo/iter_2/pairs/held_out.jsonl").read_text().splitlines()
    assert found["pairs"] == len(held_out)
    assert found["accuracy/mean_logp"] == pytest.approx(
        read(home / "runs/sppo/results.json")["trained"]["accuracy/mean_logp"]
    )


# judge ----------------------------------------------------------------------------------------------------------------


def vowels_of(folder: Path) -> dict[str, list[float]]:
    """Of each prompt, the scores of its answers."""
    made: dict[str, list[float]] = {}
    for row in rows(folder):
        made.setdefault(row["prompt_id"], []).append(sum(letter in "aeiou" for letter in row["response"]) / 10)
    return made


@pytest.mark.parametrize("run", ["dpo", "lora", "sppo"])
def test_the_win_rate_against_the_start_model_is_that_of_the_run_and_of_its_answers_in_the_files(home, run):
    found = results_of(home, run, "judge")  # sampled as the run's own evaluation: two answers of six tokens
    own = read(home / "runs" / run / "results.json")["trained"]
    assert (found["win_rate"], found["ties"], found["score"]) == (own["win_rate"], own["ties"], own["judge_score"])
    folder = home / "runs" / run / ("iter_2" if run == "sppo" else "") / "evaluation"
    start = home / "runs/sppo/iter_0/evaluation/responses" if run == "sppo" else folder / "responses_of_start"
    ours, theirs = vowels_of(folder / "responses"), vowels_of(start)
    assert ours.keys() == theirs.keys() and all(len(own) == 2 for own in ours.values())
    games = {p: [(a > b) + (a == b) / 2 for a in ours[p] for b in theirs[p]] for p in ours}
    by_prompt = [fmean(of_prompt) for of_prompt in games.values()]
    assert found["win_rate"] == pytest.approx(fmean(by_prompt))
    assert found["standard_error"] == pytest.approx(stdev(by_prompt) / len(by_prompt) ** 0.5)
    assert found["ties"] == pytest.approx(fmean(fmean(g == 0.5 for g in own) for own in games.values()))
    assert found["prompts"] == len(by_prompt) == 8
    answers = rows(folder / "responses")
    assert found["length"] == pytest.approx(fmean(len(row["response"]) for row in answers))
    assert found["tokens"] == pytest.approx(fmean(len(row["response_ids"]) for row in answers))
    assert found["score"] == pytest.approx(fmean(score for own in ours.values() for score in own))
    assert 0 < found["lc_win_rate"] < 1
    folder = home / "runs" / run / "evaluation" / "judge"
    assert not (folder / "responses").exists()  # read again, not drawn anew
    assert rates_of(folder) == pytest.approx(by_prompt)


def rates_of(folder: Path) -> list[float]:
    """The win rate of each prompt of samples.jsonl."""
    sides = [(line["scores"]["policy"], line["scores"]["opponent"]) for line in rows(folder)]
    return [fmean((a > b) + (a == b) / 2 for a in ours for b in theirs) for ours, theirs in sides]


def test_the_runs_own_answers_are_read_for_the_same_question_and_drawn_anew_for_another(home, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(home, tmp_path / "home"))
    named = ["scorer=program", "scorer.path=vowel_share:count"]  # as dataset.judge
    cases = {"own": [], "named": named, "first": ["suite.limit=4"], "seed": ["seed=7"], "short": SHORT[1:]}
    found = {name: results_of(copy, "dpo", "judge", f"suite.name={name}", *cases[name]) for name in cases}
    folders = {name: copy / "runs/dpo/evaluation" / name for name in cases}
    own = read(copy / "runs/dpo/results.json")["trained"]["win_rate"]
    assert found["own"] == found["named"] and found["own"]["win_rate"] == own
    read_again = {name for name, folder in folders.items() if not (folder / "responses").exists()}
    assert read_again == {"own", "named", "short"}  # six tokens are the run's
    assert rates_of(folders["first"]) == rates_of(folders["own"])[:4]  # the same prompts and seeds: the same answers
    ours, others = (
        {(row["prompt_id"], row["k"]): row["response"] for row in rows(folder / "responses")}
        for folder in (copy / "runs/dpo/evaluation", folders["seed"])
    )
    assert ours.keys() == others.keys() and ours != others
    with (copy / "vowel_share.py").open("a") as file:
        file.write("# another program\n")
    monkeypatch.delitem(sys.modules, "vowel_share")  # that of the folder which was copied
    results_of(copy, "dpo", "judge", "suite.name=changed")
    assert (copy / "runs/dpo/evaluation/changed/responses").exists()


def test_a_run_against_another_and_the_other_way_round(home):
    """Both draw other answers, so the rates need not add up; against itself a run's samples are two, too."""
    words = ["suite.name=other", *SHORT]
    ours = results_of(home, "dpo", "judge", "suite.against=runs/lora", *words)
    theirs = vowels_of(home / "runs/dpo/evaluation/other/responses_of_opponent")
    settings = read(home / "runs/dpo/evaluation/other/settings.json")
    assert "against runs/lora, judged by program:vowel_share:count" in settings["note"]
    assert ours["opponent/score"] == pytest.approx(fmean(s for own in theirs.values() for s in own))
    manifest = read(home / "runs/dpo/evaluation/other/responses_of_opponent/manifest.json")
    assert manifest["policy"] == settings["made_of"]["opponent"]


def test_against_a_file_of_answers_on_prompts_of_a_file_by_an_llm_judge_in_both_orders(home, tmp_path):
    prompts = [{"prompt": [{"role": "user", "content": f"please name {i} rivers"}]} for i in range(4)]
    asked = write_jsonl(home / "asked.jsonl", prompts)
    said = [{**row, "response": "so " * i + "no"} for i, row in enumerate(prompts[:3])]
    answers = write_jsonl(home / "answers.jsonl", said)
    server = Server(tmp_path / "log")
    try:
        words = [f"suite.prompts={asked}", f"suite.against={answers}", "suite.name=file", "scorer=llm_judge", *SHORT]
        words += [f"scorer.judge.urls=[{server.url}]", "scorer.judge.served_model=judge"]
        found = results_of(home, "dpo", "judge", *words)
        asked_for = len(server.answered())
        assert typed(home, "run=runs/dpo", "suite=judge", *words).status == 0
    finally:
        server.kill()
    assert asked_for == len(server.answered())  # complete: the judge is not paid twice
    folder = home / "runs/dpo/evaluation/file"
    ours: dict[str, list[str]] = {}
    for row in rows(folder / "responses"):
        if row["origin"] == "policy":
            ours.setdefault(row["prompt"][0]["content"], []).append(row["response"])
    assert len(ours) == found["prompts"] == 3  # the fourth prompt has no answer in the file

    def wins(a: str, b: str) -> float:
        if a == b:
            return 0.5
        of = [first_wins(x, y) for x, y in ((a, b), (b, a))]
        asked = [0.9 * p / (0.9 * p + 0.9 * (1 - p)) for p in of]  # as the server splits its mass
        return (asked[0] + 1 - asked[1]) / 2

    by_prompt = [fmean(wins(a, row["response"]) for a in ours[row["prompt"][0]["content"]]) for row in said]
    assert found["win_rate"] == pytest.approx(fmean(by_prompt), abs=1e-6)
    assert found["opponent/length"] == pytest.approx((2 + 5 + 8) / 3)
    assert "score" not in found  # this scorer only compares


# AlpacaEval and Arena-Hard --------------------------------------------------------------------------------------------


@pytest.fixture
def alpaca(copy):
    """Files as AlpacaEval has them, for three instructions."""
    texts = [f"please name {i} lakes" for i in range(3)]
    instructions = [{"instruction": text, "dataset": "koala", "output": "", "generator": "x"} for text in texts]
    reference = [{**row, "output": "an old lake" * (i + 1), "generator": "gpt"} for i, row in enumerate(instructions)]
    for name, made in (("instructions", instructions), ("reference", reference)):
        (copy / f"{name}.json").write_text(json.dumps(made))
    words = ["suite.instructions=instructions.json", "suite.reference=reference.json", "sampling.max_new_tokens=8"]
    return copy, words, texts


def test_answers_for_alpaca_eval_are_written_then_annotations_of_them_are_read(alpaca):
    home, words, texts = alpaca
    first = typed(home, "run=runs/dpo", "suite=alpaca_eval", *words)
    assert first.status == 0 and "Nobody has judged them yet" in first.out, first.err
    folder = home / "runs/dpo/evaluation/alpaca_eval"
    outputs = read(folder / "model_outputs.json")
    assert [row["instruction"] for row in outputs] == texts
    assert {row["generator"] for row in outputs} == {"dpo"} and {row["dataset"] for row in outputs} == {"koala"}
    assert not (folder / "results.json").exists()
    reference = read(home / "reference.json")
    judged = [
        {**row, "output_1": theirs["output"], "output_2": row["output"], "preference": preference, "annotator": "gpt"}
        for row, theirs, preference in zip(outputs, reference, (2.0, 1.25, 1.5), strict=True)
    ]
    (home / "annotations.json").write_text(json.dumps(judged))
    found = results_of(home, "dpo", "alpaca_eval", *words, "suite.annotations=annotations.json")
    assert found["win_rate"] == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert found["standard_error"] == pytest.approx(stdev([1, 0.25, 0.5]) / 3**0.5)
    assert found["length"] == pytest.approx(fmean(len(row["output"]) for row in outputs))
    assert found["reference/length"] == 22  # 11, 22 and 33 letters
    note = read(folder / "settings.json")["note"]
    assert note.startswith("AlpacaEval 2, 3 instructions, judged by gpt") and "no leaderboard figure" in note
    judged[0]["output_2"] = "somebody else's answer"
    (home / "annotations.json").write_text(json.dumps(judged))
    again = [*words, "suite.annotations=annotations.json", "suite.name=theirs"]
    result = typed(home, "run=runs/dpo", "suite=alpaca_eval", *again)
    assert result.status == 1 and "1 of 3 are not of this run's answers" in result.err.splitlines()[-1]


def test_our_scorer_makes_annotations_in_alpaca_evals_format(alpaca):
    home, words, texts = alpaca
    difficulties = "index,instruction_difficulty,std_delta_len,preference,not_gamed_baseline,model\n"
    difficulties += "".join(f"{i},{0.5 * i},{0.1 * i},{0.4 + 0.1 * i},False,gamed\n" for i in range(3))
    (home / "df_gamed.csv").write_text(difficulties)
    scorer = ["scorer=program", "scorer.path=vowel_share:count", "suite.difficulties=df_gamed.csv"]
    found = results_of(home, "sppo", "alpaca_eval", *words, *scorer)
    folder = home / "runs/sppo/evaluation/alpaca_eval"
    annotations = read(folder / "annotations.json")
    expected = []
    for row in annotations:
        a, b = (sum(letter in "aeiou" for letter in row[side]) for side in ("output_2", "output_1"))
        expected.append(1 + (a > b) + (a == b) / 2)
    assert [row["preference"] for row in annotations] == expected
    assert [row["instruction"] for row in annotations] == texts
    assert {(row["generator_1"], row["generator_2"]) for row in annotations} == {("gpt", "sppo")}
    assert found["win_rate"] == pytest.approx(fmean(expected) - 1)
    assert "no leaderboard figure" not in read(folder / "settings.json")["note"]


def test_alpaca_eval_says_what_is_missing(alpaca):
    home, words, _ = alpaca
    evaluated = ["run=runs/dpo", "suite=alpaca_eval"]
    scorer = ["scorer=program", "scorer.path=vowel_share:count"]
    said = in_one_line(typed(home, *evaluated, *words, *scorer, "suite.annotations=y.json"))
    assert "suite.annotations and scorer both say who judges" in said
    said = in_one_line(typed(home, *evaluated))
    assert "alpaca_eval.json of tatsu-lab/alpaca_eval cannot be had" in said and "suite.instructions=<file>" in said
    assert logging.getLogger("huggingface_hub").level == logging.ERROR  # or it tells of each of its retries
    said = in_one_line(typed(home, *evaluated, *words, "sampling.samples=2"))
    assert "takes one answer to a question, not sampling.samples=2" in said


def test_answers_for_arena_hard_are_written_in_the_format_of_its_questions_and_judgments_are_read(copy):
    today = [{"uid": f"u{i}", "category": "hard", "prompt": f"please name {i} hills"} for i in range(3)]
    before = [{"question_id": f"q{i}", "turns": [{"content": f"please name {i} hills"}]} for i in range(3)]
    write_jsonl(copy / "today.jsonl", today)
    write_jsonl(copy / "before.jsonl", before)
    words = ["run=runs/dpo", "suite=arena_hard", "sampling.max_new_tokens=6"]
    for name in ("today", "before"):
        result = typed(copy, *words, f"suite.questions={name}.jsonl", f"suite.name={name}")
        assert result.status == 0 and "Nobody has judged them yet" in result.out, result.err
    new, old = (rows(copy / "runs/dpo/evaluation" / name / "model_answer") for name in ("today", "before"))
    assert [(row["uid"], row["model"]) for row in new] == [(f"u{i}", "dpo") for i in range(3)]
    assert [(row["question_id"], row["model_id"]) for row in old] == [(f"q{i}", "dpo") for i in range(3)]
    texts = [row["messages"][-1]["content"]["answer"] for row in new]
    assert texts == [row["choices"][0]["turns"][0]["content"] for row in old]  # greedy: the same answers

    def games(*scores):
        return [score and {"score": score} for score in scores]

    judged = [
        {"uid": "u0", "model": "dpo", "judge": "gpt", "games": games("B>>A", "A>B")},  # clear win, win
        {"uid": "u1", "model": "dpo", "judge": "gpt", "games": games("A>B", "A=B")},  # loss, tie
        {"uid": "u2", "model": "dpo", "judge": "gpt", "games": games("A>B", None)},  # left out
    ]
    write_jsonl(copy / "judged.jsonl", judged)
    found = results_of(
        copy, "dpo", "arena_hard", "suite.name=today", "suite.questions=today.jsonl", "suite.judgments=judged.jsonl",
        "sampling.max_new_tokens=6",
    )  # fmt: skip
    assert found["win_rate"] == pytest.approx((3 + 1 + 0 + 0.5) / 6)
    assert found["questions"] == 2 and found["length"] == pytest.approx(fmean(map(len, texts)))
    write_jsonl(copy / "other.jsonl", [{**judged[0], "model": "gpt-2"}])
    said = in_one_line(typed(copy, *words, "suite.questions=today.jsonl", "suite.judgments=other.jsonl"))
    assert "has none of dpo, whose answers these are; it has gpt-2" in said


# The harness ----------------------------------------------------------------------------------------------------------

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_a_task_of_the_users_is_measured_by_the_harness_on_policy_and_start_model(home, tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("lm_eval")
    made = [{"question": f"name {i} birds:", "choices": [" owl", " thing"], "label": i % 2} for i in range(6)]
    (home / "tasks").mkdir()
    file = write_jsonl(home / "tasks" / "letters.jsonl", made)
    (home / "tasks" / "letters.yaml").write_text(TASK.format(file=file))
    words = ["suite.tasks=[letters]", "suite.task_folder=tasks", "suite.limit=5"]
    found = results_of(home, "dpo", "lm_eval", *words)

    def accuracy(folder) -> float:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        right = []
        for row in made[:5]:
            logps = []
            for choice in row["choices"]:
                question = tokenizer(row["question"]).input_ids
                answer = tokenizer(row["question"] + choice).input_ids[len(question) :]
                with torch.no_grad():
                    logits = model(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
                logps.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item())
            right.append((logps[1] > logps[0]) == (row["label"] == 1))
        return fmean(right)

    assert found["letters"] == pytest.approx(accuracy(home / "runs/dpo/model"))
    assert found["start/letters"] == pytest.approx(accuracy(tiny_llama))
    assert found["letters/standard_error"] >= 0
    assert len(list((home / "cache" / "lm_eval").glob("*/results.json"))) == 1  # the next run need not measure it again
    said = in_one_line(typed(home, "run=runs/dpo", "suite=lm_eval"))
    assert "suite=lm_eval needs tasks: e.g. 'suite.tasks=[gsm8k, mmlu]'" in said


@pytest.mark.slow  # the harness alone takes ten seconds to import
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loads", [OSError("Couldn't reach it\non the Hub"), RuntimeError("no script")])
def test_a_task_that_cannot_be_loaded_is_named_in_one_line(home, monkeypatch, loads):
    pytest.importorskip("lm_eval")
    import datasets

    def fail(*_, **__):
        raise loads

    monkeypatch.setattr(datasets, "load_dataset", fail)
    (home / "unreachable").mkdir(exist_ok=True)
    (home / "unreachable" / "far.yaml").write_text(TASK.format(file="far.jsonl").replace("letters", "far"))
    words = ["run=runs/dpo", "suite=lm_eval", "suite.name=far", "suite.tasks=[far]", "suite.task_folder=unreachable"]
    said = in_one_line(typed(home, *words))
    first = str(loads).partition("\n")[0]
    assert f"cannot load task far ({type(loads).__name__}: {first}): it takes a network, or HF_HOME=" in said
    assert "suite.task_folder=<folder of YAML files>" in said


# The folder, the card, the tracker ------------------------------------------------------------------------------------


def test_the_same_command_again_is_complete_and_other_settings_are_refused_under_the_same_name(copy, monkeypatch):
    told = []
    monkeypatch.setattr("align.tracking.trackers.add_results", lambda *of: told.append(of))
    words = ["run=runs/dpo", *SHORT]
    first = typed(copy, *words)
    folder = copy / "runs/dpo/evaluation/judge"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    again = typed(copy, *words)
    assert "This evaluation is complete: runs/dpo/evaluation/judge" in again.out and first.out.strip() in again.out
    assert {file: file.stat().st_mtime_ns for file in before} == before
    ((run_dir, cfg, results),) = told  # once
    assert run_dir == Path("runs/dpo") and cfg.objective["name"] == "dpo" and results == read(folder / "results.json")
    said = in_one_line(typed(copy, *words, "sampling.temperature=0.5", "seed=7"))
    assert "sampling.temperature: 1.0 -> 0.5; seed: 42 -> 7" in said and "give another suite.name=" in said
    assert typed(copy, *words, "seed=7", "suite.name=seven").status == 0


def test_what_was_sampled_and_scored_before_a_kill_is_kept(copy, monkeypatch):
    words = ["run=runs/dpo", *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr("align.evaluation.judging.write_samples", lambda *of: 1 / 0)  # as late as it can be
        with pytest.raises(ZeroDivisionError):
            typed(copy, *words)
    folder = copy / "runs/dpo/evaluation/judge"
    assert not (folder / "results.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("*/0*.jsonl")}
    assert len(kept) == 3  # a shard of each: responses of both, and scores
    assert typed(copy, *words).status == 0
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


@pytest.mark.slow
def test_the_model_card_has_a_section_of_all_evaluations_once(copy):
    for run, saved in (("dpo", "model"), ("sppo", "iter_2/policy")):
        card = copy / "runs" / run / saved / "README.md"
        card.write_text(before := with_evaluations(card.read_text(), {}))  # without what other tests have found
        first = results_of(copy, run, "judge", *SHORT)
        results_of(copy, run, "pairs")
        results_of(copy, run, "pairs")
        text = card.read_text()
        assert text.count("## Evaluation\n") == 1 and text.count("## Configuration\n") == 1
        assert f"| judge/win_rate | {first['win_rate']:.4g} |" in text and "| pairs/accuracy/mean_logp |" in text
        assert text.index("## Results") < text.index("## Evaluation") < text.index("## Configuration")
        assert with_evaluations(text, {}) == before  # nothing else is gone


@pytest.mark.slow
def test_several_runs_and_suites_are_evaluated_by_one_command(copy):
    result = typed(copy, "-m", "run=runs/dpo,runs/lora", "suite=judge,pairs", *SHORT)
    assert result.status == 0, result.err
    for run in ("dpo", "lora"):
        assert {file.parent.name for file in (copy / "runs" / run).glob("evaluation/*/results.json")} == {
            "judge",
            "pairs",
        }


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_share_an_evaluation_and_find_what_one_finds(copy):
    one = results_of(copy, "dpo", "judge", "suite.name=one", *SHORT)
    assert results_of(copy, "dpo", "judge", "suite.name=two", *SHORT, "cluster=cpu_2") == pytest.approx(one)


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "run has no value yet: type run=..."),
        (["run=runs/dop"], "run=runs/dop does not exist; it is taken from the working folder"),
        (["run=runs"], "run=runs is no run folder, as it has no config.yaml; there are runs in it: dpo, lora, sppo"),
        (["run=runs/dpo", "suite=jugde"], "there is no suite=jugde (did you mean judge?); suite is one of alpaca_eval, "),
        (["run=runs/dpo", "suite.agianst=x"], "unknown key suite.agianst (did you mean suite.against?); suite has kind, "),
        (["run=runs/dpo", "suite=pairs", "suite.limit=x"], "suite.limit: Value 'x' of type 'str' could not be converted"),
        (["run=runs/dpo", "suite=pairs", "suite.limit=0"], "suite.limit must be above 0, not 0"),
        (["run=runs/dpo", "suite=pairs", "suite.path=no.jsonl"], "no.jsonl does not exist; it is taken from the working"),
        (["run=runs/dpo", "suite=pairs", "suite.group_by=kid"], "has no column 'kid'"),
        (["run=runs/dpo", "suite.name=a/b"], "suite.name=a/b names a folder: letters, digits"),
        (["run=runs/dpo", "suite.against=runs/dop"], "suite.against=runs/dop does not exist"),
        (["run=runs/dpo", "suite.against=no.jsonl"], "no.jsonl does not exist"),
        (["run=runs/dpo", "suite.prompts=no.jsonl"], "suite.prompts=no.jsonl does not exist"),
        (["run=runs/dpo", "suite.prompts=runs/pairs"], "suite.prompts=runs/pairs does not exist"),
        (["run=runs/dpo", "suite=pairs", "suite.path=of/no/folder"], "suite.path=of/no/folder does not exist"),
        (["run=runs/dpo", "suite=arena_hard", "suite.questions=nofile"], "suite.questions=nofile does not exist; it is"),
        (["run=runs/dpo", "suite=alpaca_eval", "suite.instructions=nofile"], "suite.instructions=nofile does not exist"),
        (["run=runs/dpo", "sampling.sampels=3"], "unknown key sampling.sampels (did you mean sampling.samples?)"),
        (["run=runs/dpo", "sampling.temperature=0"], "sampling.temperature must be above 0, not 0.0"),
        (["run=runs/dpo", "scorer=armrom"], "there is no scorer=armrom (did you mean armorm?)"),
        (["run=runs/dpo", "scorer=program", "scorer.path=vowel_share:cuont"], 'is not "module:function" of something importable'),
        (["run=runs/dpo", "cluster=slurm_1x8"], "an evaluation runs where it is typed: put the command into a job of yours"),
        (["run=runs/dpo", "suite=arena_hard"], "suite.questions has no value yet: type suite.questions=..."),
        (["run=runs/dpo", "suite=arena_hard", "suite.questions=pairs.jsonl"], "is no question.jsonl of Arena-Hard"),
        (["run=runs/dpo", "sampling.backend=openai", "sampling.urls=[http://x]"], "serves one policy, and the opponent's"),
        (["run=runs/dpo", "objective=dpo"], "objective is no word of this command; --help lists those that are"),
        (["run=runs/dpo", "suite=lm_eval", "suite.tasks=gsm8k"], "suite.tasks takes a list: type 'suite.tasks=[first, second]'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_word_that_is_wrong_is_refused_in_one_line(home, words, says):
    before = sorted(home.rglob("evaluation/**/results.json"))
    assert says in in_one_line(typed(home, *words))
    assert sorted(home.rglob("evaluation/**/results.json")) == before


def test_a_run_that_is_not_complete_is_refused_with_the_command_that_finishes_it(copy):
    (copy / "runs/dpo/results.json").unlink()
    assert "run=runs/dpo is not complete: the command that began it" in in_one_line(typed(copy, "run=runs/dpo"))
    (copy / "runs/dpo/command.txt").write_text("python -m align objective=dpo\n")
    said = in_one_line(typed(copy, "run=runs/dpo"))
    assert "(python -m align objective=dpo) finishes it when it is typed again" in said
    (copy / "runs/dpo/collapsed.json").write_text(json.dumps({"step": 3, "why": "the loss is not finite"}))
    assert "never will be: it collapsed (the loss is not finite)" in in_one_line(typed(copy, "run=runs/dpo"))


def test_a_run_without_its_model_is_refused_and_an_iteration_of_selfplay_is_a_run_too(copy):
    shutil.rmtree(copy / "runs/dpo/model")
    assert "run=runs/dpo has lost its trained model" in in_one_line(typed(copy, "run=runs/dpo"))
    found = results_of(copy, "sppo/iter_1", "pairs")
    own = read(copy / "runs/sppo/iter_1/results.json")["trained"]
    assert found["accuracy/mean_logp"] == pytest.approx(own["accuracy/mean_logp"])


def test_a_folder_of_another_version_is_refused(copy):
    file = copy / "runs/dpo/config.yaml"
    file.write_text(file.read_text() + "\nnew_knob: 3\n")
    said = in_one_line(typed(copy, "run=runs/dpo"))
    assert "its config.yaml is of another version of align, or damaged (Key 'new_knob' not in 'RunConfig')" in said
