"""Which prompts are answered: each once, under one id wherever it comes from; and answers that others gave to them."""

from copy import copy

import pytest
from conftest import pair_row, write_jsonl

from align.choices import SystemMessage
from align.config import DatasetConfig, ModelConfig, PairSourceConfig, RunConfig, TrainConfig
from align.data.prompts import PromptRow, Prompts, load_prompts
from align.data.rows import read_pair
from align.files import fingerprint as fingerprint_of
from align.model.load import Start
from align.say import UserError


def turn(role, content):
    return {"role": role, "content": content}


def user(content):
    return turn("user", content)


HELD_OUT = [{"prompt": [user("name an owl")]}]


@pytest.fixture
def loaded(tmp_path, tokenizer):
    """Load the prompts of two files of rows."""

    def load(train, held_out=HELD_OUT, *, candidates=None, merge=False, longest=100, tokenizer=tokenizer, **dataset):
        files = {
            "path": str(write_jsonl(tmp_path / "train.jsonl", train)),
            "eval_path": str(write_jsonl(tmp_path / "held_out.jsonl", held_out)),
        }
        cfg = RunConfig(
            model=ModelConfig(system_message=SystemMessage.merge if merge else SystemMessage.template),
            dataset=DatasetConfig(name="test", **files, **dataset),
            source=PairSourceConfig(candidates=candidates or {}),
            train=TrainConfig(max_prompt_length=longest),
        )
        return load_prompts(cfg, Start(path="", fingerprint="start", tokenizer=tokenizer), tmp_path / "cache")

    return load


def asked(*texts):
    """Rows of one user turn each."""
    return [{"prompt": [user(text)]} for text in texts]


def texts(prompts):
    """What is asked, of prompts with one turn."""
    return [prompt.text if isinstance(prompt.text, str) else prompt.text[0]["content"] for prompt in prompts]


def test_a_prompts_id_is_the_fingerprint_of_what_it_says(loaded):
    prompts = loaded([{"id": "row-7", "source": "a", "prompt": [{"extra": 1, **user("name a cat")}]}])
    again = loaded(asked("name a dog", "name a cat"))
    assert prompts.train == [
        PromptRow(id=fingerprint_of([user("name a cat")]), text=[user("name a cat")], split="train")
    ]
    assert prompts.train[0].id == again.train[1].id == "d4f7368a56d1a29c"  # for all machines: seeds derive from it
    assert prompts.held_out[0].split == "held_out"
    assert prompts.all == prompts.train + prompts.held_out


def test_tokens_are_those_that_the_policy_is_given(loaded, tokenizer):
    prompts = loaded(asked("name a cat"))
    text = "<bos><start_of_turn>user\nname a cat<end_of_turn>\n<start_of_turn>model\n"
    assert prompts.tokens[prompts.train[0].id] == len(tokenizer(text, add_special_tokens=False).input_ids)
    assert set(prompts.tokens) == {prompt.id for prompt in prompts.all}


def test_a_prompt_is_asked_once_and_a_held_out_one_never_in_training(loaded):
    prompts = loaded(asked("a", "b", "a", "owl", "b", "a"), asked("owl", "hen", "owl"))
    assert (texts(prompts.train), texts(prompts.held_out)) == (["a", "b"], ["owl", "hen"])
    # train: the second and third a, the second b, and the owl; held out: the second owl
    assert prompts.dropped == {
        "train": {"the prompt is there already": 4},
        "held_out": {"the prompt is there already": 1},
    }


def test_prompts_that_are_too_long_are_dropped_and_the_knob_is_named(loaded):
    prompts = loaded(asked("a", "cat " * 40, "b", "dog " * 50), longest=30)
    assert texts(prompts.train) == ["a", "b"]
    assert prompts.dropped["train"] == {"longer than train.max_prompt_length (30 tokens)": 2}
    assert max(prompts.tokens.values()) <= 30


def test_a_prompt_may_be_just_as_long_as_is_allowed(loaded):
    tokens = loaded(asked("x"), asked("name a cat")).tokens[fingerprint_of([user("name a cat")])]
    assert texts(loaded(asked("x"), asked("name a cat"), longest=tokens).held_out) == ["name a cat"]
    with pytest.raises(UserError, match=rf"none of 1 held_out prompts is left \(longer than .*\({tokens - 1} tokens\)"):
        loaded(asked("x"), asked("name a cat"), longest=tokens - 1)


def test_a_system_message_goes_into_the_first_user_turn_where_the_model_takes_none(loaded):
    rows = [{"prompt": [turn("system", "be brief"), user("name a cat")]}]
    merged = loaded([*rows, *asked("be brief\n\nname a cat")], merge=True)
    assert [prompt.text for prompt in merged.train] == [[user("be brief\n\nname a cat")]]
    assert merged.dropped["train"] == {"the prompt is there already": 1}
    assert loaded([*rows, *asked("a")]).dropped["train"] == {"the chat template refuses it: no role system": 1}


BAD = {
    "the last turn of the prompt is not the user's": [user("a"), turn("assistant", "b")],
    "empty prompt": [user(" ")],
    "content is not text": [user(None)],
    "a message has no role": [{"content": "a"}],
}


@pytest.mark.parametrize("reason", BAD)
def test_what_cannot_be_answered_is_counted_or_with_strict_an_error_with_its_row(reason, loaded):
    rows = [*asked("a"), {"prompt": BAD[reason]}]
    prompts = loaded(rows)
    assert (texts(prompts.train), prompts.dropped["train"]) == (["a"], {reason: 1})
    with pytest.raises(UserError, match=rf"train.jsonl, row 2: {reason} \(dataset.strict=false drops"):
        loaded(rows, strict=True)


def test_a_pairs_prompt_must_end_with_the_users_turn_too(loaded):
    answers = {"chosen": [turn("assistant", "yes")], "rejected": [turn("assistant", "no")]}
    prompts = loaded([*asked("a"), {"prompt": [user("b"), turn("assistant", "well")], **answers}])
    assert prompts.dropped["train"] == {"the last turn of the prompt is not the user's": 1}


def test_strict_has_nothing_against_several_rows_of_one_prompt(loaded):
    prompts = loaded(asked("a", "a", "owl"), asked("owl"), strict=True)
    assert prompts.dropped == {"train": {"the prompt is there already": 2}, "held_out": {}}


def test_plain_prompts_stay_plain_and_wrap_plain_makes_them_turns(loaded, tokenizer):
    rows, held_out = [{"prompt": "name a cat:"}], [{"prompt": "name an owl:"}]
    plain = loaded(rows, held_out)
    assert plain.train[0].text == "name a cat:" and plain.train[0].id == fingerprint_of("name a cat:")
    assert plain.tokens[plain.train[0].id] == len(tokenizer("name a cat:").input_ids)
    wrapped = loaded(rows, held_out, wrap_plain=True)
    assert wrapped.train == loaded(asked("name a cat:"), held_out).train


def test_conversations_without_a_chat_template_say_what_to_give(loaded, tokenizer):
    bare = copy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match=r"no chat template: give model.chat_template"):
        loaded(asked("a"), tokenizer=bare)
    assert texts(loaded([{"prompt": "a"}], [{"prompt": "b"}], tokenizer=bare).train) == ["a"]


def test_limits_count_the_prompts_that_are_left(loaded):
    prompts = loaded(asked("a", "a", "b", "c", "d"), asked("e", "e", "f", "g"), limit=3, eval_limit=2)
    assert (texts(prompts.train), texts(prompts.held_out)) == (["a", "b", "c"], ["e", "f"])
    # of what lies behind the limit nothing is counted
    assert prompts.dropped == {
        "train": {"the prompt is there already": 1},
        "held_out": {"the prompt is there already": 1},
    }


def test_no_prompt_left_says_why(loaded):
    with pytest.raises(
        UserError, match=r"train.jsonl: none of 2 train prompts is left \(the prompt is there already: 2"
    ):
        loaded(asked("owl", "owl"), asked("owl"))


def test_the_prompts_of_pairs_are_the_prompts_that_the_pairs_have(loaded):
    rows = [pair_row(0), pair_row(1, chosen=[]), pair_row(2, rejected=pair_row(2)["chosen"]), pair_row(0)]
    assert [prompt.text for prompt in loaded(rows).train] == [
        read_pair(pair_row(0))[0],
        pair_row(1)["prompt"],  # no pair to train on, yet a prompt to answer
        pair_row(2)["prompt"],
    ]


def test_all_formats_of_pairs_give_one_prompt(loaded):
    yes, no = turn("assistant", "yes"), turn("assistant", "no")
    rows = [
        {"prompt": [user("a")], "chosen": [yes], "rejected": [no]},
        {"prompt": None, "chosen": [user("a"), yes], "rejected": [user("a"), no]},
        {"prompt": "a", "chosen": [user("a"), yes], "rejected": [user("a"), no]},
        {"prompt": [user("a")], "chosen": "yes", "rejected": "no"},
        {"prompt": [user("a")], "chosen": None, "rejected": None},
    ]
    prompts = loaded(rows)
    assert texts(prompts.train) == ["a"] and prompts.dropped["train"] == {"the prompt is there already": 4}


def test_rows_without_prompts_are_one_line(loaded):
    with pytest.raises(UserError, match=r"train.jsonl has no column 'prompt'; it has messages; expected") as refused:
        loaded([{"messages": [user("a")]}])
    assert "\n" not in str(refused.value)


def test_the_fingerprint_changes_with_any_prompt_split_or_candidate(loaded):
    rows = [{"prompt": "a", "gpt": "x"}, {"prompt": "b", "gpt": "y"}]
    first = loaded(rows, [{"prompt": "c", "gpt": "z"}]).fingerprint
    assert loaded(rows, [{"prompt": "c", "gpt": "z", "id": 3}]).fingerprint == first
    others = [
        loaded(rows[:1], [{"prompt": "c", "gpt": "z"}]),
        loaded(rows[::-1], [{"prompt": "c", "gpt": "z"}]),
        loaded(rows[:1], [{"prompt": "c", "gpt": "z"}, *rows[1:]]),
        loaded(rows, [{"prompt": "c", "gpt": "z"}], candidates={"gpt4": "gpt"}),
        loaded(rows, [{"prompt": "c", "gpt": "w"}], candidates={"gpt4": "gpt"}),
        loaded(rows, [{"prompt": "c", "gpt": "w"}], candidates={"gpt5": "gpt"}),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 7


# Shares of iterations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 10, 11])
def test_shares_hold_every_prompt_once_and_differ_by_one_at_most(count):
    train = [PromptRow(id=fingerprint_of(i), text=str(i), split="train") for i in range(count)]
    prompts = Prompts(train=train, held_out=[], tokens={}, dropped={})
    shares = [prompts.share(iteration, 3) for iteration in (1, 2, 3)]
    assert sorted(prompt.id for share in shares for prompt in share) == sorted(prompt.id for prompt in train)
    assert [len(share) for share in shares] == {3: [1, 1, 1], 10: [4, 3, 3], 11: [4, 4, 3]}[count]
    assert all(share == [prompt for prompt in train if prompt in share] for share in shares), "in the order of the rows"

    shuffled = Prompts(train=train[::-1], held_out=[], tokens={}, dropped={})
    assert [{p.id for p in shuffled.share(i, 3)} for i in (1, 2, 3)] == [{p.id for p in share} for share in shares]


def test_shares_are_taken_in_turn_from_the_ids_in_order():
    train = [PromptRow(id=name, text=name, split="train") for name in "dabec"]
    prompts = Prompts(train=train, held_out=[], tokens={}, dropped={})
    # in order a b c d e: the first of two iterations has a, c and e
    assert ["".join(p.id for p in prompts.share(i, 2)) for i in (1, 2)] == ["aec", "db"]


# Candidates --------------------------------------------------------------------------------------------------------


def answers(prompts):
    """Of the training prompts: (origin, text) of each candidate."""
    return [[(candidate.origin, candidate.text) for candidate in prompt.candidates] for prompt in prompts.train]


def test_candidates_come_from_a_column_of_texts_conversations_or_lists_of_either(loaded):
    said = [user("a"), turn("assistant", "said")]
    cells = ["text", said, ["one", " ", "two"], [said, [turn("assistant", "again")]], None, []]
    rows = [{"prompt": f"p{i}", "gpt": cell} for i, cell in enumerate(cells)]
    prompts = loaded(rows, [{"prompt": "q", "gpt": "held"}], candidates={"gpt4": "gpt"})
    expected = [["text"], ["said"], ["one", "two"], ["said", "again"], [], []]
    assert answers(prompts) == [[("gpt4", text) for text in texts] for texts in expected]
    assert [candidate.text for candidate in prompts.held_out[0].candidates] == ["held"]


def test_candidates_come_from_a_file_that_asks_the_same_as_text_or_as_messages(loaded, tmp_path):
    file = write_jsonl(
        tmp_path / "gpt4.jsonl",
        [
            {"prompt": "name a cat", "response": "lion"},  # a text is a user turn
            {"prompt": [user("name a cat")], "response": [turn("assistant", "lynx")]},
            {"prompt": [turn("system", "be brief"), user("name a dog")], "response": ["fox", "wolf"]},
            {"prompt": [user("name a hen"), turn("assistant", "which"), user("any")], "response": "owl"},
            {"prompt": "name a cow", "response": "yak"},  # is not asked
            {"prompt": None, "response": "none of ours"},
        ],
    )
    rows = [
        *asked("name a cat"),
        {"prompt": [turn("system", "be brief"), user("name a dog")]},
        {"prompt": [user("name a hen"), turn("assistant", "which"), user("any")]},
        *asked("name a pig", "any"),
    ]
    prompts = loaded(rows, merge=True, candidates={"gpt4": str(file)})
    assert answers(prompts) == [
        [("gpt4", "lion"), ("gpt4", "lynx")], [("gpt4", "fox"), ("gpt4", "wolf")], [("gpt4", "owl")], [], [],
    ]  # fmt: skip
    plain = loaded([{"prompt": "name a cat"}], candidates={"gpt4": str(file)})
    assert answers(plain) == [[("gpt4", "lion"), ("gpt4", "lynx")]]


def test_candidates_of_several_origins_stand_in_the_order_of_the_configuration(loaded):
    row = {"prompt": "a", "gpt": "x", "human": "y"}
    prompts = loaded([row], [{**row, "prompt": "b"}], candidates={"people": "human", "gpt4": "gpt"})
    assert answers(prompts) == [[("people", "y"), ("gpt4", "x")]]


def test_bad_candidates_are_one_line_that_names_the_knob(loaded, tmp_path):
    def refused(where, origin="gpt4"):
        with pytest.raises(UserError) as error:
            loaded([{"prompt": "a", "gpt": None}], [{"prompt": "b", "gpt": None}], candidates={origin: str(where)})
        assert "\n" not in str(error.value)
        return str(error.value)

    wrong = write_jsonl(tmp_path / "wrong.jsonl", [{"question": "a", "response": "x"}])
    others = write_jsonl(tmp_path / "others.jsonl", [{"prompt": "c", "response": "x"}])
    assert "source.candidates.gpt4=answer is no column of the prompts' rows, which have prompt, gpt, and no file" in (
        refused("answer")
    )
    assert "(source.candidates.gpt4) needs the columns prompt and response; it has question, response" in refused(wrong)
    assert (
        "others.jsonl holds no answer to any of the prompts; prompts must be equal to the letter, and its first is 'c'"
        in (refused(others))
    )
    assert refused("gpt") == "source.candidates.gpt4=gpt holds no answer to any of the prompts"
    assert refused("none.jsonl").startswith("source.candidates.gpt4=none.jsonl does not exist")
    assert "source.candidates.policy: that is the name of the policy's own answers" in refused("gpt", "policy")
