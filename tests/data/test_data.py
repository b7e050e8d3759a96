"""Rows in, token ids out: every format, one BOS, what is scored, what is cut, what is dropped, and the cache."""

import json
import random
from collections import Counter

import datasets
import pytest
from conftest import ROOT, pair_row, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.choices import ResponseMask, SystemMessage, Truncation
from align.config import DatasetConfig, SourceConfig, TrainConfig
from align.data import rows
from align.data.pairs import Pairs, Rules, Text, check_bos, prepare_pairs, show_pair, tokenise, truncate
from align.data.rows import BadRow, Content, Rows, load_splits, read_pair, read_prompt
from align.model.chat import end_of_turn
from align.model.load import Start
from align.say import UserError

REAL = ROOT.parent / "shared" / "data"


def user(content):
    return {"role": "user", "content": content}


def bot(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def prepare(tokenizer, cache, *, merge=False, dataset=None, **train):
    """`data.prepare`, with short names for what the tests vary."""
    policy = SystemMessage.merge if merge else SystemMessage.template
    dataset = {"name": "test", **(dataset or {})}
    return prepare_pairs(
        DatasetConfig(**dataset),
        TrainConfig(**train),
        policy,
        Start(path="", fingerprint="start", tokenizer=tokenizer),
        cache,
    )


@pytest.fixture
def made(tmp_path):
    """Prepare rows from a file, all of them as training pairs."""

    def make(rows, tokenizer, *, dataset=None, **more):
        file = str(write_jsonl(tmp_path / "rows.jsonl", rows))
        dataset = {"path": file, "eval_path": file, **(dataset or {})}
        return prepare(tokenizer, tmp_path / "cache", dataset=dataset, **more)

    return make


@pytest.fixture
def made_one(made):
    """Prepare one row; the pair."""
    return lambda row, tokenizer, **more: made([row], tokenizer, **more).train[0]


SPECIAL = ["<pad>", "<eos>", "<bos>", "<user>", "<bot>", "<end>"]
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
WITHOUT_BOS = WITH_BOS.removeprefix("{{ bos_token }}")


def word_tokenizer(*, template=None, adds_bos=False, **tokens):
    """A token per word, so that the numbers below can be counted by eye: letters, and six special tokens."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", **tokens}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=SPECIAL[3:], chat_template=template, **tokens
    )


def words(tokenizer, pair):
    """Prompt, chosen and rejected of a pair, token by token, as one line each."""
    return [" ".join(tokenizer.convert_ids_to_tokens(pair[f"{side}_ids"])) for side in ("prompt", "chosen", "rejected")]


# Formats -----------------------------------------------------------------------------------------------------------

ASKED, GOOD, POOR = "name two animals:", "cat, dog", "thing"
SAME_PAIR = {
    "conversational, explicit prompt": {"prompt": [user(ASKED)], "chosen": [bot(GOOD)], "rejected": [bot(POOR)]},
    "conversational, implicit prompt": {"chosen": [user(ASKED), bot(GOOD)], "rejected": [user(ASKED), bot(POOR)]},
    "text prompt, answers that hold it": {
        "prompt": ASKED,
        "chosen": [user(ASKED), bot(GOOD)],
        "rejected": [user(ASKED), bot(POOR)],
    },
    "conversational prompt, text answers": {"prompt": [user(ASKED)], "chosen": GOOD, "rejected": POOR},
}
SAME_PLAIN_PAIR = {
    "plain, explicit prompt": {"prompt": ASKED, "chosen": f" {GOOD}", "rejected": f" {POOR}"},
    "plain, implicit prompt": {"chosen": f"{ASKED} {GOOD}", "rejected": f"{ASKED} {POOR}"},
}


@pytest.mark.parametrize("row", SAME_PAIR.values(), ids=SAME_PAIR)
def test_every_conversational_format_gives_the_same_pair(row, made_one, tokenizer):
    pair = made_one(row, tokenizer)
    prompt = "<bos><start_of_turn>user\nname two animals:<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.decode(pair["prompt_ids"]) == prompt
    assert tokenizer.decode(pair["chosen_ids"]) == "cat, dog<end_of_turn>"
    assert tokenizer.decode(pair["rejected_ids"]) == "thing<end_of_turn>"
    assert json.loads(pair["conversation"]) == [user(ASKED)]


@pytest.mark.parametrize("row", SAME_PLAIN_PAIR.values(), ids=SAME_PLAIN_PAIR)
def test_every_plain_format_gives_the_same_pair_which_ends_in_eos(row, made_one, tokenizer):
    pair = made_one(row, tokenizer)
    assert tokenizer.decode(pair["prompt_ids"]) == "name two animals:"
    assert tokenizer.decode(pair["chosen_ids"]) == " cat, dog<eos>"
    assert tokenizer.decode(pair["rejected_ids"]) == " thing<eos>"
    assert json.loads(pair["conversation"]) == ASKED


@pytest.mark.parametrize("row", SAME_PLAIN_PAIR.values(), ids=SAME_PLAIN_PAIR)
def test_wrap_plain_makes_the_pair_that_a_conversation_would(row, made_one, tokenizer):
    wrapped = made_one(row, tokenizer, dataset={"wrap_plain": True})
    spoken = made_one(SAME_PAIR["conversational, explicit prompt"], tokenizer)
    same = ("prompt_ids", "chosen_ids", "rejected_ids", "conversation")
    assert [wrapped[name] for name in same] == [spoken[name] for name in same]


BEFORE = [user("name an animal"), bot("cow"), user("another")]
LONGER = {
    "in the prompt": {"prompt": BEFORE, "chosen": [bot("pig")], "rejected": [bot("no")]},
    "in the answers": {"chosen": [*BEFORE, bot("pig")], "rejected": [*BEFORE, bot("no")]},
    "in both, as answers of several messages": {
        "prompt": BEFORE[:1],
        "chosen": [*BEFORE[1:], bot("pig")],
        "rejected": [*BEFORE[1:], bot("no")],
    },
}


@pytest.mark.parametrize("row", LONGER.values(), ids=LONGER)
def test_only_the_last_answer_of_several_turns_is_scored(row, made_one, tokenizer):
    pair = made_one(row, tokenizer)
    turns = ["user\nname an animal", "model\ncow", "user\nanother"]
    prompt = "".join(f"<start_of_turn>{turn}<end_of_turn>\n" for turn in turns)
    assert tokenizer.decode(pair["prompt_ids"]) == f"<bos>{prompt}<start_of_turn>model\n"
    assert tokenizer.decode(pair["chosen_ids"]) == "pig<end_of_turn>"
    assert tokenizer.decode(pair["rejected_ids"]) == "no<end_of_turn>"


def test_answers_of_several_messages_must_share_all_but_the_last(made, tokenizer):
    row = {
        "prompt": [user("a")],
        "chosen": [bot("b"), user("c"), bot("d")],
        "rejected": [bot("x"), user("c"), bot("e")],
    }
    pairs = made([row, pair_row(0)], tokenizer)
    assert pairs.counts["train"]["dropped"] == {"the prompts of chosen and rejected differ": 1}


def test_a_system_message_is_merged_into_the_first_user_turn(made_one, tokenizer):
    row = {"prompt": [system("Be brief."), *BEFORE], "chosen": [bot("pig")], "rejected": [bot("no")]}
    pair = made_one(row, tokenizer, merge=True)
    text = tokenizer.decode(pair["prompt_ids"])
    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\nname an animal<end_of_turn>\n")
    assert json.loads(pair["conversation"]) == [user("Be brief.\n\nname an animal"), *BEFORE[1:]]


def test_a_template_without_a_system_role_refuses_a_system_message_that_is_not_merged(made, tokenizer):
    row = {"prompt": [system("Be brief."), user("hello")], "chosen": [bot("pig")], "rejected": [bot("no")]}
    pairs = made([row, pair_row(0)], tokenizer)
    assert pairs.counts["train"] == {
        "pairs": 1,
        "dropped": {"the chat template refuses it: no role system": 1},
        "cut_pairs": 0,
        "cut_tokens": 0,
        "cut_prompts": 0,
    }


# Beginnings and ends ------------------------------------------------------------------------------------------------

TURN = {"prompt": [user("a b")], "chosen": [bot("c")], "rejected": [bot("d")]}


@pytest.mark.parametrize(
    ("template", "adds_bos", "first"),
    [(WITH_BOS, False, "<bos>"), (WITH_BOS, True, "<bos>"), (WITHOUT_BOS, True, "<bos>"), (WITHOUT_BOS, False, None)],
    ids=["from the template", "from both", "from the tokenizer", "from neither"],
)
def test_there_is_one_bos_whoever_writes_it(template, adds_bos, first, made_one):
    tokenizer = word_tokenizer(template=template, adds_bos=adds_bos)
    prompt = "<user> a b <end> <bot>" if first is None else "<bos> <user> a b <end> <bot>"
    assert words(tokenizer, made_one(TURN, tokenizer)) == [prompt, "c <end>", "d <end>"]


@pytest.mark.parametrize(("adds_bos", "prompt"), [(True, "<bos> a"), (False, "a")])
def test_a_plain_prompt_has_a_bos_where_the_tokenizer_adds_one(adds_bos, prompt, made_one):
    tokenizer = word_tokenizer(adds_bos=adds_bos)
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    assert words(tokenizer, made_one(row, tokenizer)) == [prompt, "b <eos>", "c <eos>"]


def test_a_tokenizer_without_bos_gives_none(made_one):
    tokenizer = word_tokenizer(template=WITHOUT_BOS, bos_token=None)
    assert words(tokenizer, made_one(TURN, tokenizer))[0] == "<user> a b <end> <bot>"


def test_a_tokenizer_whose_bos_is_its_eos_keeps_both_ends(made_one):
    tokenizer = word_tokenizer(bos_token="<eos>")  # as GPT-2's
    row = {"prompt": "a", "chosen": " b", "rejected": " c"}
    assert words(tokenizer, made_one(row, tokenizer)) == ["a", "b <eos>", "c <eos>"]


@pytest.mark.parametrize("side", ["prompt", "chosen", "rejected"])
def test_a_row_that_writes_the_bos_in_its_text_is_dropped_and_counted(side, made, tokenizer):
    row = pair_row(0)
    row[side] = [{**row[side][0], "content": "one <bos> two"}]
    pairs = made([row, pair_row(1)], tokenizer)
    assert (len(pairs.train), pairs.counts["train"]["dropped"]) == (1, {"a second BOS inside the text": 1})


def test_the_gate_before_step_one_refuses_two_bos(made):
    tokenizer = word_tokenizer(template=WITH_BOS)
    pairs = made([TURN, {**TURN, "chosen": [bot("e")]}], tokenizer)
    check_bos(pairs, tokenizer)
    doubled = pairs.train.map(lambda pair: {"prompt_ids": [2, *pair["prompt_ids"]]})
    with pytest.raises(UserError, match=r"prompts hold \[2\] BOS tokens .* expected one"):
        check_bos(Pairs(**{**vars(pairs), "train": doubled, "held_out": doubled}), tokenizer)


def test_the_end_of_turn_is_scored_once_and_the_newline_behind_it_is_not(made_one, tokenizer):
    assert end_of_turn(tokenizer) == ("<end_of_turn>", "\n")
    pair = made_one(pair_row(0), tokenizer)
    for side in ("chosen_ids", "rejected_ids"):
        tokens = tokenizer.convert_ids_to_tokens(pair[side])
        assert (tokens[-1], tokens.count("<end_of_turn>")) == ("<end_of_turn>", 1)


def test_an_answer_that_holds_its_own_end_is_not_ended_twice(made_one):
    spoken = word_tokenizer(template=WITH_BOS)
    row = {**TURN, "chosen": [bot("c <end>")]}
    assert words(spoken, made_one(row, spoken))[1:] == ["c <end>", "d <end>"]
    plain = word_tokenizer()
    row = {"prompt": "a", "chosen": " b <eos>", "rejected": " c"}
    assert words(plain, made_one(row, plain))[1:] == ["b <eos>", "c <eos>"]


def test_a_template_that_ends_no_turn_gets_the_eos(made_one):
    template = (
        "{% for m in messages %}{{ ' q ' if m.role == 'user' else ' r ' }}{{ m.content }} z{% endfor %}"
        "{% if add_generation_prompt %} r {% endif %}"
    )
    tokenizer = word_tokenizer(template=template)
    assert end_of_turn(tokenizer) == ("<eos>", " z")
    assert words(tokenizer, made_one(TURN, tokenizer)) == ["q a b z r", "c <eos>", "d <eos>"]


def test_with_header_moves_the_header_of_both_answers_from_prompt_to_response(made_one, tokenizer):
    completion = made_one(pair_row(0), tokenizer)
    header = made_one(pair_row(0), tokenizer, response_mask=ResponseMask.with_header)
    moved = tokenizer("<start_of_turn>model\n", add_special_tokens=False).input_ids
    assert len(moved) == 3  # <start_of_turn>, model, newline
    assert header["prompt_ids"] + moved == completion["prompt_ids"]
    for side in ("chosen_ids", "rejected_ids"):
        assert header[side] == moved + completion[side]


def test_a_token_that_straddles_prompt_and_response_is_split_there():
    vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "x", "ab"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert tokenizer("xabx").input_ids == [3, 4, 3]  # x ab x
    text = Text(prompt="xa", chosen="xabx<eos>", rejected="xaxx<eos>")
    prompt, chosen, rejected = next(tokenise([text], tokenizer))
    assert prompt == [3, 1]  # x a: what the policy is given, on both sides
    assert chosen == [2, 3, 0]  # b x <eos>
    assert rejected == [3, 3, 0]  # x x <eos>


# Truncation --------------------------------------------------------------------------------------------------------

LONG = {"prompt": "a b c d e f", "chosen": " g h i j", "rejected": " k"}  # with BOS and eos: 7, 5 and 2 tokens


def test_papers_truncation_by_hand(made_one):
    tokenizer = word_tokenizer(adds_bos=True)

    def cut(row, max_length):
        pair = made_one(row, tokenizer, max_length=max_length, max_prompt_length=5)
        return [*words(tokenizer, pair), pair["cut_tokens"]]

    assert cut(LONG, 12) == ["<bos> a b c d e f", "g h i j <eos>", "k <eos>", 0]  # 7 + 5 fit
    assert cut(LONG, 11) == ["<bos> c d e f", "g h i j <eos>", "k <eos>", 0]  # the last 5 of the prompt, then 5 + 5 fit
    assert cut(LONG, 8) == ["<bos> c d e f", "g h i", "k <eos>", 2]  # 8 - 5 = 3 are left of each answer
    short_prompt = {"prompt": "a", "chosen": " g h i j k l", "rejected": " m n o p"}  # 2, 7 and 5
    assert cut(short_prompt, 8) == ["<bos> a", "g h i", "m n o", 6]  # 3 too, although 6 would fit


def test_what_truncation_did_is_counted(made):
    tokenizer = word_tokenizer(adds_bos=True)
    short = {"prompt": "a", "chosen": " b", "rejected": " c"}
    counts = made([LONG, short], tokenizer, max_length=8, max_prompt_length=5).counts["train"]
    assert counts == {"pairs": 2, "dropped": {}, "cut_pairs": 1, "cut_tokens": 2, "cut_prompts": 1}


def test_drop_leaves_long_pairs_out_and_counts_them(made):
    tokenizer = word_tokenizer(adds_bos=True)
    short = {"prompt": "a", "chosen": " b", "rejected": " c"}  # 2 + 2 tokens
    pairs = made([LONG, short], tokenizer, max_length=11, max_prompt_length=5, truncation=Truncation.drop)
    assert pairs.counts["train"]["dropped"] == {"longer than max_length (11)": 1}
    assert words(tokenizer, pairs.train[0]) == ["<bos> a", "b <eos>", "c <eos>"]
    assert len(made([LONG], tokenizer, max_length=12, max_prompt_length=5, truncation=Truncation.drop).train) == 1


def test_answers_that_truncation_makes_equal_are_dropped(made):
    tokenizer = word_tokenizer()
    row = {"prompt": "a", "chosen": " b c d e", "rejected": " b c d f"}
    pairs = made([row, LONG], tokenizer, max_length=4, max_prompt_length=1)  # 3 tokens are left of an answer
    assert pairs.counts["train"]["dropped"] == {"chosen and rejected are the same after truncation": 1}


def trl_0_9_6(prompt, chosen, rejected, max_length, max_prompt_length):
    """FACTS, trap 3: `tokenize_row` of trl 0.9.6 with truncation_mode=keep_end, from its description."""
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longer > max_length:
        chosen, rejected = (answer[: max_length - max_prompt_length] for answer in (chosen, rejected))
    return prompt, chosen, rejected


@pytest.mark.parametrize("has_bos", [False, True])
def test_papers_truncation_is_that_of_trl_but_for_a_bos_that_is_kept(has_bos):
    tokenizer, chance = word_tokenizer(), random.Random(0)
    seen = Counter()
    for _ in range(2000):
        max_length = chance.randint(2, 30)
        lengths = TrainConfig(max_length=max_length, max_prompt_length=chance.randint(1, max_length - 1))
        rules = Rules(tokenizer=tokenizer, train=lengths)
        prompt = [*([2] if has_bos else []), *range(100, 100 + chance.randint(1, 40))]
        chosen, rejected = (list(range(at, at + chance.randint(1, 25))) for at in (200, 300))
        expected = trl_0_9_6(prompt, chosen, rejected, max_length, lengths.max_prompt_length)
        was_cut = len(expected[0]) < len(prompt)
        if has_bos and was_cut:
            expected = ([2, *expected[0][1:]], *expected[1:])
        assert truncate(prompt, chosen, rejected, rules) == expected
        seen[was_cut, len(expected[1]) < len(chosen)] += 1
    assert min(seen.values()) > 50 and len(seen) == 4  # prompt cut or not, answer cut or not


# Rows that cannot be trained on ------------------------------------------------------------------------------------

BAD_ROWS = {
    "empty response": pair_row(0, chosen=[bot("  \n")]),
    "chosen and rejected are the same": pair_row(0, chosen=[bot("cat")], rejected=[bot("cat")]),
    "the prompts of chosen and rejected differ": {
        "chosen": [user("a"), bot("cat")],
        "rejected": [user("b"), bot("dog")],
    },
    "the last turn is not the assistant's": pair_row(0, rejected=[bot("cat"), user("dog")]),
    "content is not text": pair_row(0, chosen=[bot(None)]),
    "a message has no role": pair_row(0, chosen=[{"content": "cat"}]),
    "empty prompt": {"prompt": [], "chosen": [bot("cat")], "rejected": [bot("dog")]},
    "chosen_score is not a number": pair_row(0, chosen_score=float("nan"), rejected_score=1.0),
    "rejected_score is not a number": pair_row(0, chosen_score=1.0, rejected_score="high"),
    "chosen_win_prob is not in [0, 1]": pair_row(0, chosen_win_prob=1.5),
    "the chat template refuses it: no role tool": pair_row(0, prompt=[{"role": "tool", "content": "4"}]),
    "a second BOS inside the text": pair_row(0, chosen=[bot("cat <bos>")]),
}


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_a_bad_row_is_dropped_and_counted_under_its_reason(reason, row, made, tokenizer):
    pairs = made([pair_row(1), row, pair_row(2)], tokenizer)
    assert pairs.counts["train"]["dropped"] == {reason: 1}
    assert pairs.train["row_id"][:] == ["row-1", "row-2"]


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS.items(), ids=BAD_ROWS)
def test_strict_names_file_row_and_reason(reason, row, made, tokenizer):
    with pytest.raises(UserError) as error:
        made([pair_row(1), pair_row(2), row], tokenizer, dataset={"strict": True})
    assert "rows.jsonl, row 3: " + reason in str(error.value)
    assert "dataset.strict=false" in str(error.value)


@pytest.mark.parametrize("bad", range(1, 9))
def test_strict_counts_rows_in_the_file_whichever_are_held_out(bad, tokenizer, tmp_path):
    rows = [pair_row(i, chosen=[bot("")]) if i + 1 == bad else pair_row(i) for i in range(8)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=rf"row {bad}: empty response"):
        prepare(tokenizer, tmp_path, dataset={"path": str(file), "eval_fraction": 0.5, "strict": True})


def test_strict_names_the_part_of_a_mix(tokenizer, tmp_path):
    good = str(write_jsonl(tmp_path / "good.jsonl", [pair_row(i) for i in range(4)]))
    poor = str(write_jsonl(tmp_path / "poor.jsonl", [pair_row(4), pair_row(5), pair_row(6, chosen=[bot("")])]))
    mix = {"one": SourceConfig(path=good, eval_path=good), "two": SourceConfig(path=poor, eval_path=good)}
    with pytest.raises(UserError, match="the mix, row 3 of two: empty response"):
        prepare(tokenizer, tmp_path, dataset={"mix": mix, "strict": True})


def test_nothing_left_is_an_error_that_counts_the_reasons(made, tokenizer):
    rows = [BAD_ROWS["empty response"], BAD_ROWS["empty response"], BAD_ROWS["content is not text"]]
    with pytest.raises(UserError, match="none of 3 rows can be used \\(empty response: 2, content is not text: 1\\)"):
        made(rows, tokenizer)


# Splits, mixes, columns --------------------------------------------------------------------------------------------


def asked(split):
    return set(split["conversation"])


SPLIT_ROWS = [pair_row(i % 50, id=f"{i}", chosen=[bot(f"cat {i}")]) for i in range(200)]  # 50 prompts, four rows each
IN_FORMAT = {
    "explicit": lambda row: row,
    "implicit": lambda row: {**row, "prompt": None, **{s: row["prompt"] + row[s] for s in ("chosen", "rejected")}},
    "plain": lambda row: {s: row[s][0]["content"] for s in ("prompt", "chosen", "rejected")},
    "plain, implicit": lambda row: {
        s: f"{row['prompt'][0]['content']}: {row[s][0]['content']}" for s in ("chosen", "rejected")
    },
}


@pytest.mark.parametrize("form", IN_FORMAT.values(), ids=IN_FORMAT)
def test_a_prompt_is_held_out_with_all_its_rows(form, tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [form(row) for row in SPLIT_ROWS])
    pairs = prepare(tokenizer, tmp_path, dataset={"path": str(file), "eval_fraction": 0.1})
    assert (len(pairs.train), len(pairs.held_out)) == (180, 20)  # 5 of 50 prompts, four rows each
    assert len(asked(pairs.train)) == 45 and len(asked(pairs.held_out)) == 5
    assert not asked(pairs.train) & asked(pairs.held_out)


def test_the_same_prompts_are_held_out_in_whichever_order_and_conversational_format(tokenizer, tmp_path):
    shuffled = random.Random(0).sample(SPLIT_ROWS, 200)
    orders = {"one": SPLIT_ROWS, "two": shuffled, "three": list(map(IN_FORMAT["implicit"], shuffled))}
    held = []
    for name, own in orders.items():
        file = write_jsonl(tmp_path / f"{name}.jsonl", own)
        held.append(asked(prepare(tokenizer, tmp_path, dataset={"path": str(file), "eval_fraction": 0.1}).held_out))
    assert held[0] == held[1] == held[2]


def parts(tmp_path, sizes, **more):
    """Sources of a mix with prompts of their own, and one held-out file."""
    held = write_jsonl(tmp_path / "held.jsonl", [pair_row(i) for i in range(1000, 1010)])
    made = {}
    for at, (name, (size, weight)) in enumerate(sizes.items()):
        rows = [pair_row(i, id=f"{name}-{i}") for i in range(at * 200, at * 200 + size)]
        file = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        made[name] = SourceConfig(path=str(file), eval_path=str(held), weight=weight, **more)
    return made


def test_a_mix_has_the_proportions_of_the_weights_and_no_row_twice(tokenizer, tmp_path):
    mix = parts(tmp_path, {"small": (40, 1.0), "large": (100, 2.0)})
    first, again = (prepare(tokenizer, tmp_path / c, dataset={"mix": mix, "group_by": "source"}).train for c in "ab")
    assert Counter(first["group"]) == {"small": 40, "large": 80}  # 40 / 1 < 100 / 2: the small one decides
    assert len(set(first["row_id"])) == 120
    assert list(first) == list(again)
    taken = [int(name.removeprefix("large-")) - 200 for name in first["row_id"] if name.startswith("large")]
    assert taken[:5] == [0, 1, 2, 3, 5] and taken[-1] == 98  # i * 100 // 80: evenly, not the first 80


def test_a_mix_never_trains_on_a_prompt_that_one_of_its_sources_holds_out(tokenizer, tmp_path):
    files = [
        write_jsonl(tmp_path / f"{n}.jsonl", [pair_row(i) for i in range(n)]) for n in (60, 100)
    ]  # 60 prompts in both
    mix = {file.stem: SourceConfig(path=str(file)) for file in files}
    pairs = prepare(tokenizer, tmp_path, dataset={"mix": mix, "eval_fraction": 0.2})
    assert len(pairs.held_out) > 20
    assert not asked(pairs.train) & asked(pairs.held_out)


def test_columns_are_renamed_and_win_over_those_of_our_name(made_one, tokenizer):
    row = pair_row(0)
    theirs = {"best": row["chosen"], "chosen": [bot("an index")], "worst": row["rejected"], "question": row["prompt"]}
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    renamed = made_one(theirs, tokenizer, dataset={"columns": columns})
    plain = made_one(row, tokenizer)
    assert [renamed[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")] == [
        plain[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")
    ]


def test_a_column_that_no_row_has_cannot_be_grouped_by(made, tokenizer):
    with pytest.raises(UserError, match=r"no column 'topic' \(dataset.group_by\); it has id, prompt"):
        made([pair_row(0)], tokenizer, dataset={"group_by": "topic"})


def test_limits_hold_for_usable_pairs(made, tokenizer):
    rows = [BAD_ROWS["empty response"], *(pair_row(i) for i in range(10))]
    pairs = made(rows, tokenizer, dataset={"limit": 4, "eval_limit": 3})
    assert pairs.train["row_id"][:] == ["row-0", "row-1", "row-2", "row-3"] and len(pairs.held_out) == 3


# Cache -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenised(monkeypatch):
    """How many texts have been tokenised."""
    count, original = Counter(), tokenise

    def counting(texts, tokenizer):
        count["texts"] += len(texts)
        return original(texts, tokenizer)

    monkeypatch.setattr("align.data.pairs.tokenise", counting)
    return count


def test_a_second_run_tokenises_nothing(made, tokenizer, tokenised):
    rows = [pair_row(i) for i in range(10)]
    first = made(rows, tokenizer)
    assert tokenised["texts"] == 20  # once for training, once as held-out pairs
    second = made(rows, tokenizer)
    assert tokenised["texts"] == 20
    assert (second.folder, second.counts, list(second.train)) == (first.folder, first.counts, list(first.train))


CHANGES = {
    "response_mask": {"response_mask": ResponseMask.with_header},
    "truncation": {"truncation": Truncation.drop},
    "max_length": {"max_length": 2047},
    "max_prompt_length": {"max_prompt_length": 1799},
    "system_message": {"merge": True},
    "limit": {"dataset": {"limit": 5}},
    "strict": {"dataset": {"strict": True}},
    "group_by": {"dataset": {"group_by": "id"}},
    "wrap_plain": {"dataset": {"wrap_plain": True}},
    "columns": {"dataset": {"columns": {"chosen": "rejected", "rejected": "chosen"}}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_setting_that_changes_pairs_is_prepared_anew(change, made, tokenizer, tokenised):
    rows = [pair_row(i) for i in range(10)]
    first, second = made(rows, tokenizer), made(rows, tokenizer, **change)
    assert first.fingerprint != second.fingerprint and tokenised["texts"] > 20


def test_changed_content_is_prepared_anew_under_the_same_name(made, tokenizer):
    first = made([pair_row(0), pair_row(1)], tokenizer)
    second = made([pair_row(0), pair_row(1, chosen=[bot("bear")])], tokenizer)
    assert first.fingerprint != second.fingerprint
    assert tokenizer.decode(second.train[1]["chosen_ids"]) == "bear<end_of_turn>"


def test_a_changed_template_or_tokenizer_is_prepared_anew(made):
    variants = [{"template": WITH_BOS}, {"template": WITHOUT_BOS}, {"template": WITHOUT_BOS, "adds_bos": True}]
    assert len({made([TURN], word_tokenizer(**variant)).fingerprint for variant in variants}) == 3


# Sources -----------------------------------------------------------------------------------------------------------


def stored_set(rows, folder):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


def stored_dict(rows, folder):
    stored = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(stored).save_to_disk(str(folder))
    return folder


def parquet_file(rows, folder):
    datasets.Dataset.from_list(rows).to_parquet(str(folder.with_suffix(".parquet")))
    return folder.with_suffix(".parquet")


def json_file(rows, folder):
    folder.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    return folder.with_suffix(".json")


def jsonl_of_windows(rows, folder):
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\r\n\r\n" for row in rows)
    folder.with_suffix(".jsonl").write_bytes(text.encode("utf-8-sig"))  # a byte-order mark, CRLF and blank lines
    return folder.with_suffix(".jsonl")


@pytest.mark.parametrize("write", [stored_set, stored_dict, parquet_file, json_file, jsonl_of_windows])
def test_every_kind_of_file_gives_the_same_pairs(write, made, tokenizer, tmp_path):
    rows = [pair_row(i, chosen=[bot(f"cat {i} \u2013 \u732b\u2028")]) for i in range(12)]
    expected = made(rows, tokenizer)
    path = str(write(rows, tmp_path / "source"))
    got = prepare(tokenizer, tmp_path / "cache", dataset={"path": path, "eval_path": path})
    assert list(got.train) == list(expected.train) and len(got.train) == 12
    assert list(got.held_out) == list(expected.held_out)


# Looking -----------------------------------------------------------------------------------------------------------


def test_the_first_pair_shows_the_prompt_and_every_scored_token(made_one, tokenizer):
    pair = made_one(SAME_PAIR["conversational, explicit prompt"], tokenizer)
    prompt, chosen, rejected = show_pair(pair, tokenizer).splitlines()
    size = len(pair["prompt_ids"])
    text = r"'<bos><start_of_turn>user\nname two animals:<end_of_turn>\n<start_of_turn>model\n'"
    assert prompt == f"prompt, {size} tokens, not scored: {text}"
    assert chosen.startswith("chosen, ") and chosen.endswith("|<end_of_turn>'")
    assert "tokens, all scored: 'cat|,| dog|<end_of_turn>'" in chosen
    assert "tokens, all scored: 'thing|<end_of_turn>'" in rejected


# Real data ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The development set: its tokenizer, its rows, and its pairs with system messages merged."""
    if not REAL.is_dir():
        pytest.skip(f"the development set is not at {REAL}")
    tokenizer = AutoTokenizer.from_pretrained(REAL / "tokenizer_gemma_shape_4k")
    dataset = {"path": str(REAL / "pairs_train.jsonl"), "eval_path": str(REAL / "pairs_test.jsonl")}
    cache = tmp_path_factory.mktemp("real")

    def make(**more):
        return prepare(tokenizer, cache, dataset=dataset, **more)

    rows = [json.loads(line) for line in (REAL / "pairs_train.jsonl").read_text(encoding="utf-8").splitlines()]
    return tokenizer, rows, make


def test_all_real_pairs_are_prepared(real):
    tokenizer, rows, make = real
    pairs = make(merge=True)
    # 1,476 and 176 rows by the set's README. 17 and 3 hold more than 2,048 of this small vocabulary's tokens.
    cut = {"cut_pairs": 17, "cut_tokens": 12807, "cut_prompts": 7}
    assert pairs.counts["train"] == {"pairs": 1476, "dropped": {}, **cut}
    held_out = pairs.counts["held_out"]
    assert (held_out["pairs"], held_out["cut_pairs"], held_out["cut_tokens"]) == (176, 3, 2362)
    assert not asked(pairs.train) & asked(pairs.held_out)
    check_bos(pairs, tokenizer)
    for row, pair in zip(rows, pairs.train, strict=True):
        assert len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) <= 2048
        if pair["cut_tokens"] == 0:
            for side in ("chosen", "rejected"):
                assert tokenizer.decode(pair[f"{side}_ids"]) == row[side][0]["content"].strip() + "<end_of_turn>"


def test_real_system_messages_are_refused_by_gemmas_template_unless_merged(real):
    counts = real[2](merge=False).counts
    reason = "the chat template refuses it: System role not supported"
    assert counts["train"]["dropped"] == {reason: 56}  # 62 rows have one by the set's README:
    assert counts["held_out"]["dropped"] == {reason: 6}  # 56 + 6


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("Q: hi A: yes", "Q: hi A: no", ("Q: hi A:", " yes", " no")),
        ("Q: hi A: yes", "Q: hi A: yes sir", ("Q: hi A:", " yes", " yes sir")),  # never in the middle of a word
        ("Q: hi\nA: b", "Q: hi\nA: c", ("Q: hi\nA:", " b", " c")),
    ],
)
def test_an_implicit_plain_prompt_ends_where_a_word_does(chosen, rejected, expected):
    assert read_pair({"chosen": chosen, "rejected": rejected}) == expected


def test_an_empty_side_is_a_bad_row_in_every_format():
    for row in (
        {"chosen": "", "rejected": "abc"},
        {"chosen": [], "rejected": [bot("a")]},
        {"chosen": None, "rejected": "a"},
    ):
        with pytest.raises(BadRow, match="empty response"):
            read_pair(row)


def test_a_side_may_repeat_its_prompt_and_a_text_prompt_may_have_an_answer_turn():
    expected = ([user("q")], "a", "b")
    repeated = {"prompt": [user("q")], "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}
    assert read_pair(repeated) == expected
    assert read_pair({"prompt": "q", "chosen": [bot("a")], "rejected": [bot("b")]}) == expected


def test_the_beginning_of_a_mix_keeps_its_shares():

    def part(name, count):
        made = [{"id": f"{name}{i}", "_number": i} for i in range(count)]
        return Rows(rows=made, fingerprint=name, where=name)

    mixed = rows._mix({"a": part("a", 90), "b": part("b", 30)}, {"a": 2.0, "b": 1.0}).rows
    assert len(mixed) == 90  # 30 of b are the scarcest: 60 of a go with them
    assert [sum(row["source"] == "b" for row in mixed[:n]) for n in (9, 30, 90)] == [3, 10, 30]


# Prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [*SAME_PAIR.values(), *SAME_PLAIN_PAIR.values()], ids=[*SAME_PAIR, *SAME_PLAIN_PAIR])
def test_the_prompt_of_a_pair_is_the_one_that_is_trained_on(row):
    for wrap in ({}, {"wrap_plain": True}):
        assert read_prompt({**row, **wrap}) == read_pair({**row, **wrap})[0]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "q"}, "q"),
        ({"prompt": "q", "wrap_plain": True}, [user("q")]),
        ({"prompt": [{"id": 3, **user("q")}]}, [user("q")]),
        ({"prompt": BEFORE}, BEFORE),
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "q"),  # no pair, and yet a prompt
        ({"prompt": [user("q")], "chosen": [], "rejected": None}, [user("q")]),
        ({"prompt": "q", "chosen": [bot("same")], "rejected": [bot("same")]}, [user("q")]),  # as its siblings have it
    ],
)
def test_a_row_without_a_pair_can_have_a_prompt(row, expected):
    assert read_prompt(row) == expected


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"prompt": "  "}, "empty prompt"),
        ({"prompt": []}, "empty prompt"),
        ({"prompt": [user("\n")]}, "empty prompt"),
        ({"prompt": [user(None)]}, "content is not text"),
        ({"prompt": 7}, "content is not text"),
        ({"prompt": ["q"]}, "a message has no role"),
        ({"prompt": None}, "empty response"),
        ({"chosen": "a", "rejected": "a"}, "empty prompt"),
    ],
)
def test_a_row_that_asks_nothing_says_why(row, reason):
    with pytest.raises(BadRow, match=f"^{reason}$"):
        read_prompt(row)


@pytest.fixture
def splits(tmp_path, tokenizer):
    """Load the splits of a file of rows, and of one of held-out rows where they are given."""

    def load(made, content, held_out=None, **knobs):
        path = str(write_jsonl(tmp_path / "rows.jsonl", made))
        held = {} if held_out is None else {"eval_path": str(write_jsonl(tmp_path / "held_out.jsonl", held_out))}
        cfg = DatasetConfig(name="test", path=path, **held, **knobs)
        return load_splits(cfg, Start(path="", fingerprint="start", tokenizer=tokenizer), tmp_path, content)

    return load


def test_pairs_of_a_file_of_prompts_want_self_play(splits):
    with pytest.raises(UserError) as refused:
        splits([{"prompt": "q", "source": "a"}], Content.pairs)
    said = str(refused.value)
    assert "rows.jsonl has prompts and no column 'chosen', so there are no pairs to train on" in said
    assert "source=selfplay; it has prompt, source;" in said and "\n" not in said


def test_a_file_with_neither_names_the_column_and_those_that_are_there(splits):
    with pytest.raises(UserError, match=r"rows.jsonl has no column 'chosen'; it has text; expected chosen"):
        splits([{"text": "q"}], Content.pairs)
    with pytest.raises(UserError, match=r"rows.jsonl has no column 'prompt'; it has text; "):
        splits([{"text": "q"}], Content.prompts)
    loaded = splits([{"text": "q"}], Content.prompts, [{"text": "r"}], columns={"prompt": "text"})
    assert [read_prompt(row) for split in loaded.values() for row in split.rows] == ["q", "r"]


def test_prompts_are_held_out_as_those_of_pairs_are(splits):
    made = [pair_row(i) for i in range(40)]
    pairs = splits(made, Content.pairs, eval_fraction=0.2)
    prompts = splits([{"prompt": row["prompt"]} for row in made], Content.prompts, eval_fraction=0.2)
    for split, count in (("train", 32), ("held_out", 8)):  # a fifth of forty
        assert [row["prompt"] for row in prompts[split].rows] == [row["prompt"] for row in pairs[split].rows]
        assert len(prompts[split].rows) == count
