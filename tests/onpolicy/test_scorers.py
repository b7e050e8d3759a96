"""Scorers against slow plain computations, on tiny random twins made on the spot; the judge against a server process."""

import importlib.metadata
import itertools
import math
import threading
import time
from pathlib import Path

import judge_server
import pytest
import torch
from judge_server import KEY, Server
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from align.choices import SystemMessage
from align.config import JudgeConfig, ScorerConfig, check_node
from align.files import file_fingerprint
from align.launch.rank import Rank
from align.onpolicy.samplers import servers
from align.onpolicy.scorers import llm_judge, models, pairrm, registry
from align.onpolicy.scorers.armorm import ArmoRM
from align.onpolicy.scorers.base import Identity, Item, Kind, Scores
from align.onpolicy.scorers.pairrm import MARKERS, MAX_SOURCE, MAX_TOKENS, PairRM
from align.onpolicy.select import win_probs
from align.playground import task
from align.say import UserError

RANK = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)
ITEMS = [
    Item(prompt="name 3 animals", responses=["cat, dog, cow", "cat", "thing thing thing thing thing thing"]),
    Item(
        prompt=[
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "what can i do"},
            {"role": "user", "content": "name one city, and say why you like it so much"},
        ],
        responses=["oslo", "paris, because"],
    ),
    Item(prompt=[{"role": "user", "content": "a"}], responses=["b"]),
]

LLAMA_3 = (
    "{% for message in messages %}{% set text = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{{ (bos_token + text) if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_3_TOKENS = ["<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
PAIRRM_TOKENS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *MARKERS]


def byte_tokenizer(special: list[str]) -> Tokenizer:
    """A token for every byte, and the special ones in front."""
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    return tokenizer


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Llama-3's template and special tokens; a BOS is added unasked, as Llama-3's does."""
    backend = byte_tokenizer(LLAMA_3_TOKENS)
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA_3
    )


def pairrm_tokenizer() -> PreTrainedTokenizerFast:
    backend = byte_tokenizer(PAIRRM_TOKENS)
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
    )  # fmt: skip


def llama_config(**fields) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, "num_labels": 1, "initializer_range": 0.3, **fields,
        }
    )  # fmt: skip


def deberta_config(**fields) -> DebertaV2Config:
    """DeBERTa-v3's kind of attention, small."""
    return DebertaV2Config(
        **{
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 512, "relative_attention": True,
            "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False, "type_vocab_size": 0, "pad_token_id": 0, "initializer_range": 0.3,
            "num_labels": 1, **fields,
        }
    )  # fmt: skip


def randomly(make, seed: int = 0):
    """What `make` makes, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def save(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def change_weights(folder: str, change) -> None:
    """Let `change` have its way with the tensors of a checkpoint."""
    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def alone(items) -> list[Item]:
    """Items of one response each."""
    return [Item(prompt=item.prompt, responses=[response]) for item in items for response in item.responses]


def flat(scores: list[Scores]) -> list[float]:
    return [value for some in scores for value in some.values]


def messages_of(item: Item) -> list[dict]:
    prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
    return [*prompt, {"role": "assistant", "content": item.responses[0]}]


# By name --------------------------------------------------------------------------------------------------------------


def make_one(cfg, rank):
    """A third party's scorer: the length, over its setting."""

    class Length:
        identity = Identity(kind=Kind.pointwise, name=f"length:{cfg.path}", revision="1", template="none")

        def __call__(self, items):
            return [Scores(values=[len(r) / float(cfg.path) for r in item.responses]) for item in items]

    return Length()


def test_a_package_registers_a_scorer_by_entry_point(monkeypatch):
    entry = importlib.metadata.EntryPoint("length", "test_scorers:make_one", "align.scorers")
    real = importlib.metadata.entry_points

    def entry_points(**selection):
        if selection.get("group") != "align.scorers":
            return real(**selection)
        return [entry] if selection.get("name") in (None, "length") else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    made = registry.build(ScorerConfig(name="length", path="2"), RANK)
    assert flat(made([Item(prompt="", responses=["four", "a"])])) == [2.0, 0.5]
    names = "armorm, length, llm_judge, pairrm, program, reward_model, and module:function"
    with pytest.raises(UserError, match=rf"scorer.name=lenght is unknown \(did you mean length\?\); there are {names}"):
        registry.build(ScorerConfig(name="lenght"), RANK)


def test_a_function_of_ones_own_makes_a_scorer():
    made = registry.build(ScorerConfig(name="test_scorers:make_one", path="4"), RANK)
    assert made.identity.name == "length:4" and flat(made(ITEMS[2:])) == [0.25]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "nothing"}, "scorer.name=nothing is unknown; there are armorm, .* and module:function"),
        ({"name": "os:nothing"}, 'scorer.name=os:nothing is not "module:function" of something importable'),
        ({"name": "builtins:print"}, "scorer.name=builtins:print made a NoneType, which is no scorer: align.onpolicy"),
        ({"name": "program"}, "needs scorer.path=module:function"),
        ({"name": "program", "path": "os:nothing"}, "scorer.path=os:nothing is not"),
        ({"name": "program", "path": "os:getcwd", "max_length": 3}, "scorer.max_length does nothing .*, which reads path"),
        ({"name": "pairrm", "path": "x", "template": "y"}, "scorer.template does nothing with scorer.name=pairrm"),
        ({"name": "program", "judge": JudgeConfig(served_model="x")}, "scorer.judge does nothing"),
        ({"name": "reward_model"}, "scorer.name=reward_model needs scorer.path: a hub name or a folder"),
        ({"name": "reward_model", "path": "/nowhere"}, "scorer.path=/nowhere does not exist"),
        ({"name": "reward_model", "path": "x", "tokens_per_batch": 0}, "scorer.tokens_per_batch must be above 0, not 0"),
        ({"name": "llm_judge"}, "needs scorer.judge.served_model"),
        ({"name": "llm_judge", "judge": JudgeConfig(served_model="x")}, "scorer.judge.urls is empty"),
        ({"name": "llm_judge", "judge": JudgeConfig(requests_at_once=0)}, "scorer.judge.requests_at_once must be above 0"),
        (
            {"name": "llm_judge", "template": "{prompt} {first}", "judge": JudgeConfig(["http://a"], "x")},
            "scorer.template lacks {second}; it must ask for m",
        ),
        (
            {"name": "llm_judge", "template": "no.txt", "judge": JudgeConfig(["http://a"], "x")},
            "scorer.template=no.txt is neither",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        check_node(cfg := ScorerConfig(**fields), "scorer.")
        registry.build(cfg, RANK)
    assert "\n" not in str(caught.value)


# Programs -------------------------------------------------------------------------------------------------------------


def test_a_program_scores_the_last_user_turn_as_the_built_in_judge_does():
    asked = task.prompts("test")[:3]
    items = [Item(prompt=[{"role": "user", "content": a}], responses=["cat, dog", "thing", ""]) for a in asked]
    scorer = registry.build(ScorerConfig(name="program", path="align.playground.task:judge"), RANK)
    assert [s.values for s in scorer(items)] == [[task.judge(a, r) for r in items[0].responses] for a in asked]
    assert scorer.identity == Identity(
        kind=Kind.pointwise,
        name="program:align.playground.task:judge",
        revision=file_fingerprint(Path(task.__file__)),
        template="the last user turn and the response, as texts",
    )


def say_nothing(prompt, response):
    """Forgets to return a number."""


def test_a_program_that_returns_no_number_is_said():
    scorer = registry.build(ScorerConfig(name="program", path="test_scorers:say_nothing"), RANK)
    with pytest.raises(UserError, match="program:test_scorers:say_nothing returned None and not a number"):
        scorer(ITEMS)


# Reward models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory) -> str:
    model = randomly(lambda: AutoModelForSequenceClassification.from_config(llama_config()))
    return save(tmp_path_factory.mktemp("reward"), model, llama_tokenizer())


def reward_scorer(folder: str, **fields):
    rank = fields.pop("rank", RANK)
    return registry.build(ScorerConfig(name="reward_model", path=folder, **fields), rank)


def last_logit(folder: str, item: Item) -> float:
    """Slow and plain: one row, the backbone's last hidden state, times the head's one row of weights."""
    weights = load_file(Path(folder) / "model.safetensors")
    backbone = LlamaModel(LlamaConfig.from_pretrained(folder)).eval()
    backbone.load_state_dict({key[6:]: value for key, value in weights.items() if key.startswith("model.")})
    text = "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages_of(item)
    )
    ids = llama_tokenizer()(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist().count(1) == 1 and ids[0, -1] == 2
    with torch.no_grad():
        state = backbone(ids).last_hidden_state[0, -1]
    return float(weights["score.weight"][0] @ state)


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 16384])
def test_a_reward_is_the_raw_logit_at_the_last_token_of_the_text_alone(reward_folder, tokens_per_batch):
    scores = reward_scorer(reward_folder, tokens_per_batch=tokens_per_batch)(ITEMS)
    assert [len(s.values) for s in scores] == [3, 2, 1]
    expected = [last_logit(reward_folder, item) for item in alone(ITEMS)]
    assert flat(scores) == pytest.approx(expected, abs=1e-5)
    assert max(abs(value) for value in expected) > 1  # no sigmoid: it would not go there
    assert [count["cut_tokens"] for s in scores for count in s.counts] == [0] * 6


@pytest.mark.parametrize("pad_token_id", [None, -1, 0, 2, 77], ids=lambda pad: f"pad {pad}")
def test_padding_changes_no_score_whatever_the_pad_token_is(tmp_path, pad_token_id):
    """None and -1: there is none. 2 is the end-of-turn that ends every text; 77 is a byte of the texts."""
    model = randomly(lambda: AutoModelForSequenceClassification.from_config(llama_config(pad_token_id=0)))
    model.config.pad_token_id = pad_token_id
    folder = save(tmp_path, model, llama_tokenizer())
    scorer = reward_scorer(folder)
    together, one_by_one = flat(scorer(ITEMS)), flat([scorer([item])[0] for item in alone(ITEMS)])
    assert together == pytest.approx(one_by_one, abs=1e-5)
    own = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [models.render(item, llama_tokenizer(), ScorerConfig(name="reward_model"))[0] for item in alone(ITEMS)]
    with torch.no_grad():
        forwards = [float(own(torch.tensor([row])).logits[0, 0]) for row in rows]
    assert together == pytest.approx(forwards, abs=1e-5)  # as the model's card would do it
    if pad_token_id != 2:
        assert together == pytest.approx([last_logit(folder, item) for item in alone(ITEMS)], abs=1e-5)


def test_an_encoder_with_a_classifier_is_a_reward_model_too(tmp_path):
    model = randomly(lambda: AutoModelForSequenceClassification.from_config(deberta_config()))
    tokenizer = pairrm_tokenizer()
    tokenizer.chat_template = "[CLS]{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}[SEP]{% endfor %}"
    scorer = reward_scorer(save(tmp_path, model, tokenizer))
    expected = []
    for item in alone(ITEMS):
        text = "[CLS]" + "".join(f"{m['role']}: {m['content']}[SEP]" for m in messages_of(item))
        with torch.no_grad():
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            expected.append(float(model(ids).logits[0, 0]))
    assert flat(scorer(ITEMS)) == pytest.approx(expected, abs=1e-5)


def test_a_text_that_is_too_long_loses_its_beginning_but_the_bos_and_it_is_counted(reward_folder):
    scorer = reward_scorer(reward_folder, max_length=60)
    item = Item(prompt="a" * 50, responses=["yes", "no"])
    scores = scorer([item])[0]
    rows = [ids for one in alone([item]) for ids in models.render(one, llama_tokenizer(), ScorerConfig())]
    assert scores.counts == [{"cut_tokens": len(row) - 60} for row in rows]
    assert models.cut(rows[0], 60) == ([1, *rows[0][-59:]], len(rows[0]) - 60)
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(reward_folder).eval()
        expected = [float(model(torch.tensor([[1, *row[-59:]]])).logits[0, 0]) for row in rows]
    assert list(scores.values) == pytest.approx(expected, abs=1e-5)
    assert scorer.identity.settings["max_length"] == 60


def test_weights_in_bfloat16_give_scores_that_are_not_rounded_to_it(reward_folder):
    """The head computes in float32: else many answers of a good policy would tie."""
    scorer = reward_scorer(reward_folder, rank=Rank(device=torch.device("cpu"), bf16=True, number=0, world=1))
    scores = torch.tensor(flat(scorer(ITEMS)))
    assert scorer._model.base_model.dtype == torch.bfloat16
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, torch.tensor(flat(reward_scorer(reward_folder)(ITEMS))), rtol=0.05, atol=0.2)
    assert scorer.identity != reward_scorer(reward_folder).identity


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("no head", lambda t: t.pop("score.weight"), "it lacks score.weight; its scores would come from random weights"),
        ("no layer", lambda t: [t.pop(k) for k in list(t) if "layers.1." in k],
         r"it lacks model.layers.1.input_layernorm.weight, [\w.]*, [\w.]* and 6 more;"),
        ("more", lambda t: t.update({"gating.weight": torch.ones(2)}),
         "it has weights that this model does not read: gating.weight;"),
        ("other shape", lambda t: t.update({"score.weight": torch.ones(2, 32)}), "score.weight|shape|size"),
    ],
)  # fmt: skip
def test_a_checkpoint_with_other_weights_than_the_model_is_refused(tmp_path, name, change, message):
    model = randomly(lambda: AutoModelForSequenceClassification.from_config(llama_config()))
    folder = save(tmp_path, model, llama_tokenizer())
    change_weights(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        reward_scorer(folder)(ITEMS)
    assert "\n" not in str(caught.value)


def test_a_language_model_is_no_reward_model(tmp_path):
    folder = save(tmp_path, randomly(lambda: LlamaForCausalLM(llama_config())), llama_tokenizer())
    with pytest.raises(UserError, match=r"it lacks score.weight; it has weights .* does not read: lm_head.weight;"):
        reward_scorer(folder)(ITEMS)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path):
    model = randomly(lambda: AutoModelForSequenceClassification.from_config(llama_config(num_labels=2)))
    with pytest.raises(UserError, match="has 2 labels, and a reward model has one"):
        reward_scorer(save(tmp_path, model, llama_tokenizer()))


def test_a_tokenizer_without_a_chat_template_needs_one(tmp_path, reward_folder):
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = None
    folder = save(tmp_path / "model", AutoModelForSequenceClassification.from_pretrained(reward_folder), tokenizer)
    with pytest.raises(UserError, match=r"has no chat template: give scorer.template"):
        reward_scorer(folder)
    (tmp_path / "template.jinja").write_text(LLAMA_3)
    for template in (str(tmp_path / "template.jinja"), LLAMA_3):
        scorer = reward_scorer(folder, template=template)
        assert flat(scorer(ITEMS)) == pytest.approx(flat(reward_scorer(reward_folder)(ITEMS)), abs=1e-6)
        assert scorer.identity.template == LLAMA_3
    with pytest.raises(UserError, match=r"scorer.template=nowhere is neither"):
        reward_scorer(folder, template="nowhere")


def test_a_template_without_a_system_role_takes_it_merged(tmp_path, reward_folder):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LLAMA_3
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    item = Item(prompt=turns, responses=["hi"])
    with pytest.raises(UserError, match=r"refuses a conversation .*: set scorer.system_message=merge"):
        reward_scorer(reward_folder, template=strict)([item])
    merged = reward_scorer(reward_folder, template=strict, system_message=SystemMessage.merge)([item])
    assert flat(merged) == flat(reward_scorer(reward_folder)([Item(prompt="be kind\n\nhello", responses=["hi"])]))


def test_the_revision_changes_with_weights_and_template_but_not_with_the_folders_place(tmp_path, reward_folder):
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    one = reward_scorer(save(tmp_path / "a" / "rm", model, llama_tokenizer())).identity
    assert one == reward_scorer(save(tmp_path / "b" / "rm", model, llama_tokenizer())).identity
    assert one.name == "reward_model:rm" and len(one.revision) == 16
    change_weights(str(tmp_path / "b" / "rm"), lambda tensors: tensors["score.weight"].mul_(2))
    assert one.revision != reward_scorer(str(tmp_path / "b" / "rm")).identity.revision


def test_weights_are_loaded_at_the_first_call_only(reward_folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: loaded.append(1) or 1 / 0
    )
    scorer = reward_scorer(reward_folder)
    assert scorer.identity.kind is Kind.pointwise and loaded == []
    with pytest.raises(ZeroDivisionError):
        scorer(ITEMS)
    assert loaded == [1]


# ArmoRM ---------------------------------------------------------------------------------------------------------------


def armorm_config(**fields) -> LlamaConfig:
    return llama_config(num_objectives=19, gating_hidden_dim=24, gating_n_hidden=3, gating_temperature=2.0, **fields)


@pytest.fixture(scope="module")
def armorm_folder(tmp_path_factory) -> str:
    model = randomly(lambda: ArmoRM(armorm_config()))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        model.reward_transform_matrix.add_(0.3 * torch.randn(19, 19, generator=generator))
        model.gating.logit_scale.fill_(1.7)
        for layer in model.gating.layers:
            layer.bias.normal_(generator=generator)
    return save(tmp_path_factory.mktemp("armorm"), model, llama_tokenizer())


def armorm_scorer(folder: str, **fields):
    return registry.build(ScorerConfig(name="armorm", path=folder, **fields), RANK)


def armorm_by_hand(folder: str, item: Item) -> float:
    """The docstring's equations, one row, from the file's tensors."""
    weights = load_file(Path(folder) / "model.safetensors")
    backbone = LlamaModel(LlamaConfig.from_pretrained(folder)).eval()
    backbone.load_state_dict({key[6:]: value for key, value in weights.items() if key.startswith("model.")})
    *prompt, answer = messages_of(item)
    before = "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in prompt
    )
    after = f"<|start_header_id|>assistant<|end_header_id|>\n\n{answer['content']}<|eot_id|>"
    count = len(llama_tokenizer()(before, add_special_tokens=False).input_ids)
    ids = llama_tokenizer()(before + after, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        states = backbone(ids).last_hidden_state[0]
    rewards = weights["regression_layer.weight"] @ states[-1]
    x = states[count - 1]  # the <|eot_id|> of the user's turn
    for n in range(3):
        x = functional.relu(weights[f"gating.layers.{n}.weight"] @ x + weights[f"gating.layers.{n}.bias"])
    x = weights["gating.layers.3.weight"] @ x + weights["gating.layers.3.bias"]
    gate = weights["gating.logit_scale"] * torch.exp(x / 2.0) / torch.exp(x / 2.0).sum()
    adjusted = weights["reward_transform_matrix"].T @ rewards
    return sum(float(g * r) for g, r in zip(gate, adjusted, strict=True))


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 16384])
def test_armorm_is_the_published_equation(armorm_folder, tokens_per_batch):
    scores = armorm_scorer(armorm_folder, tokens_per_batch=tokens_per_batch)(ITEMS)
    expected = [armorm_by_hand(armorm_folder, item) for item in alone(ITEMS)]
    assert flat(scores) == pytest.approx(expected, abs=1e-5)
    assert len(set(map(str, expected))) == 6


def test_armorms_gate_does_not_see_the_response(armorm_folder, monkeypatch):
    gates = []
    scorer = armorm_scorer(armorm_folder)
    scorer._model.gating.register_forward_hook(lambda module, inputs, output: gates.append(output))
    scorer(ITEMS[:1])
    assert gates[0].shape == (3, 19)
    torch.testing.assert_close(gates[0][0], gates[0][1], atol=1e-6, rtol=0)
    torch.testing.assert_close(gates[0].sum(-1), torch.full((3,), 1.7))


def test_armorm_has_the_published_shape_where_its_config_does_not_say(tmp_path):
    model = ArmoRM(llama_config())
    assert {name: tuple(w.shape) for name, w in model.named_parameters() if not name.startswith("model.")} == {
        "reward_transform_matrix": (19, 19),
        "regression_layer.weight": (19, 32),
        "gating.logit_scale": (1,),
        "gating.layers.0.weight": (1024, 32),
        "gating.layers.0.bias": (1024,),
        "gating.layers.1.weight": (1024, 1024),
        "gating.layers.1.bias": (1024,),
        "gating.layers.2.weight": (1024, 1024),
        "gating.layers.2.bias": (1024,),
        "gating.layers.3.weight": (19, 1024),
        "gating.layers.3.bias": (19,),
    }
    assert model.gating.temperature == 10


def test_armorms_checkpoint_as_a_plain_reward_model_is_refused_by_name(armorm_folder):
    with pytest.raises(UserError, match=r"it lacks score.weight; it has weights .*: gating.layers.0.bias"):
        reward_scorer(armorm_folder)(ITEMS)


def test_a_plain_reward_model_as_armorm_is_refused_by_name(reward_folder):
    with pytest.raises(UserError, match=r"it lacks gating.layers.0.bias, .* more; it has .*: score.weight;"):
        armorm_scorer(reward_folder)(ITEMS)


def test_armorm_without_llama_3s_template_is_refused(tmp_path, armorm_folder):
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = LLAMA_3.replace("assistant", "model").replace("message['role']", "'model'")
    folder = save(tmp_path, ArmoRM.from_pretrained(armorm_folder), tokenizer)
    with pytest.raises(UserError, match=r"does not write .*assistant.* before an answer, as Llama-3's does"):
        armorm_scorer(folder)(ITEMS)


def test_armorm_says_nothing_of_a_response_that_leaves_no_room_for_the_boundary(armorm_folder):
    long = Item(prompt="hello", responses=["yes", "a" * 80])
    scores = armorm_scorer(armorm_folder, max_length=60)([long])[0]
    assert math.isfinite(scores.values[0]) and math.isnan(scores.values[1])
    assert scores.counts[1]["cut_tokens"] > 20


# PairRM ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairrm_folder(tmp_path_factory) -> str:
    model = randomly(lambda: PairRM(deberta_config()))
    with torch.no_grad():
        for n in (1, 4):
            model.head_layer[n].bias.normal_(generator=torch.Generator().manual_seed(n))
    return save(tmp_path_factory.mktemp("pairrm"), model, pairrm_tokenizer())


def pairrm_scorer(folder: str, **fields):
    return registry.build(ScorerConfig(name="pairrm", path=folder, **fields), RANK)


def pairrm_logit(folder: str, source: str, first: str, second: str) -> float:
    """The docstring's equations, one row in one order, from the file's tensors."""
    weights = load_file(Path(folder) / "model.safetensors")
    backbone = DebertaV2Model(DebertaV2Config.from_pretrained(folder)).eval()
    prefix = "pretrained_model."
    backbone.load_state_dict({key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)})
    texts = [f"<|source|>{source}", f"<|candidate1|>{first}", f"<|candidate2|>{second}"]
    parts = [pairrm_tokenizer()(f"[CLS]{text}[SEP]", add_special_tokens=False).input_ids for text in texts]
    with torch.no_grad():
        states = backbone(torch.tensor([[token for part in parts for token in part]])).last_hidden_state[0]
    starts = [0, len(parts[0]), len(parts[0]) + len(parts[1])]
    h = {marker: states[at + 1] for marker, at in zip(MARKERS, starts, strict=True)}  # behind its [CLS]

    def s(marker: str) -> float:
        x = torch.cat([h["<|source|>"], h[marker]])
        x = torch.tanh(weights["head_layer.1.weight"] @ x + weights["head_layer.1.bias"])
        return float(weights["head_layer.4.weight"][0] @ x + weights["head_layer.4.bias"][0])

    return s("<|candidate1|>") - s("<|candidate2|>")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pairrm_wins(folder: str, source: str, responses) -> list[list[float]]:
    """llm-blender's score of each response among all, and SPPO's sigmoid of their difference; slow and plain."""
    n = range(len(responses))
    logits = [[pairrm_logit(folder, source, a, b) for b in responses] for a in responses]
    scores = [sum(logits[i][j] - logits[j][i] for j in n) / len(n) for i in n]
    return [[sigmoid(scores[i] - scores[j]) for j in n] for i in n]


@pytest.mark.parametrize("tokens_per_batch", [1, 200, 16384])
def test_pairrm_is_the_published_equation_over_the_pool_in_both_orders(pairrm_folder, tokens_per_batch):
    scores = pairrm_scorer(pairrm_folder, tokens_per_batch=tokens_per_batch)(ITEMS)
    sources = [
        "name 3 animals",
        "user: hello\n\nassistant: what can i do\n\nuser: " + ITEMS[1].prompt[2]["content"],
        "a",
    ]
    for item, source, made in zip(ITEMS, sources, scores, strict=True):
        expected = pairrm_wins(pairrm_folder, source, item.responses)
        assert [list(row) for row in made.values] == [pytest.approx(row, abs=1e-5) for row in expected]
        for i, j in itertools.product(range(len(item.responses)), repeat=2):
            assert made.values[i][j] + made.values[j][i] == pytest.approx(1, abs=1e-12)
    one, other = (pairrm_logit(pairrm_folder, "name 3 animals", *pair) for pair in (("cat", "oslo"), ("oslo", "cat")))
    assert abs(one + other) > 0.1  # so that both orders are no formality
    assert scores[2].values == [[0.5]]


@pytest.fixture
def three_by_hand(pairrm_folder, monkeypatch):
    """A PairRM whose network says: a beats b by 1 and -2, b beats c by 2 and -1, and of a and c always the first."""
    said = {"ab": 1.0, "ba": -2.0, "bc": 2.0, "cb": -1.0, "ac": 0.5, "ca": 0.5}
    letters = {pairrm_tokenizer().convert_tokens_to_ids(letter): letter for letter in "abc"}

    def forward(self, input_ids, attention_mask, markers):
        candidates = input_ids.gather(1, markers[:, 1:] + 1).tolist()  # the token behind the marker
        return torch.tensor([said[letters[first] + letters[second]] for first, second in candidates])

    monkeypatch.setattr(PairRM, "forward", forward)
    return pairrm_scorer(pairrm_folder)


def test_three_responses_by_hand_win_as_in_sppo(three_by_hand):
    """Leads: a over b 3, b over c 3, a over c 0. Scores, over 3: a 1, b 0, c -1."""
    scores = three_by_hand([Item(prompt="x", responses=["a", "b", "c"])])[0]
    by_hand = [
        [0.5, 0.731059, 0.880797],  # sigmoid of 0, 1, 2
        [0.268941, 0.5, 0.731059],
        [0.119203, 0.268941, 0.5],
    ]
    assert [list(row) for row in scores.values] == [pytest.approx(row, abs=1e-6) for row in by_hand]
    assert win_probs(scores.values) == pytest.approx([0.703952, 0.5, 0.296048], abs=1e-6)


def test_a_preference_of_pairrm_depends_on_the_pool(three_by_hand):
    pools = [["a", "c"], ["a", "b"], ["a", "b", "c", "c"]]
    alone, two, four = (s.values for s in three_by_hand([Item(prompt="x", responses=pool) for pool in pools]))
    assert alone == [[0.5, 0.5], [0.5, 0.5]]  # .88 with b in the pool
    assert two[0][1] == pytest.approx(sigmoid(1 - -2), abs=1e-12)  # .73 with c
    assert four[0] == pytest.approx([0.5, sigmoid(3 / 4 - 3 / 4), *[sigmoid(3 / 4 + 3 / 4)] * 2], abs=1e-12)


def test_scores_of_another_rule_are_of_another_pairrm(pairrm_folder):
    """Before, the [K][K] were the pairs' own and a response had 412 tokens: such folders must not be gone on with."""
    assert pairrm_scorer(pairrm_folder).identity.settings == {
        "wins": "sigmoid(score_i - score_j), score_i = mean_j(logit_ij - logit_ji)",
        "max_source": 1224,
        "max_tokens": 2048,
        "bf16": False,
    }


def test_pairrm_calls_equal_texts_equal(pairrm_folder):
    wins = pairrm_scorer(pairrm_folder)([Item(prompt="x", responses=["same", "other", "same"])])[0].values
    assert wins[0][2] == wins[2][0] == 0.5 and wins[0][1] == wins[2][1] != 0.5


def test_pairrm_cuts_each_part_to_its_own_limit_and_counts(pairrm_folder, monkeypatch):
    monkeypatch.setattr(pairrm, "MAX_SOURCE", 20)
    monkeypatch.setattr(pairrm, "MAX_TOKENS", 44)
    responses = ["a" * 9, "b" * 14, "c"]
    long, short = (Item(prompt="p" * n, responses=responses) for n in (30, 8))
    scores = pairrm_scorer(pairrm_folder)([long, short])
    # [CLS], the marker and [SEP] are three of the twenty, and of the twelve that these leave to either response.
    cuts = [("p" * 17, ["a" * 9, "b" * 9, "c"]), ("p" * 8, ["a" * 9, "b" * 13, "c"])]  # of 44, 11 leave 16 to each
    for made, (source, cut) in zip(scores, cuts, strict=True):
        expected = pairrm_wins(pairrm_folder, source, cut)
        assert [list(row) for row in made.values] == [pytest.approx(row, abs=1e-5) for row in expected]
    assert scores[0].counts == [{"cut_tokens": 2 * 13 + 5}, {"cut_tokens": 2 * (13 + 5)}, {"cut_tokens": 2 * 13 + 5}]
    assert scores[1].counts == [{"cut_tokens": 1}, {"cut_tokens": 2}, {"cut_tokens": 1}]


def test_pairrm_finds_its_markers_where_a_response_speaks_of_them(pairrm_folder):
    responses = ["see <|candidate2|> and <|source|>", "y"]
    made = pairrm_scorer(pairrm_folder)([Item(prompt="x", responses=responses)])[0].values
    assert made[0][1] == pytest.approx(pairrm_wins(pairrm_folder, "x", responses)[0][1], abs=1e-5)


def test_a_separator_that_a_response_speaks_of_is_a_space_to_pairrm(pairrm_folder):
    scorer = pairrm_scorer(pairrm_folder)
    spoken, space = (scorer([Item(prompt="x", responses=[text, "y"])])[0].values for text in ("a[SEP]b", "a b"))
    assert spoken == space


def test_pairrms_limits_are_the_published_ones():
    """1224 of the prompt and 412 of a response, which also gets half of what the prompt leaves of its own."""
    assert (MAX_SOURCE, MAX_TOKENS) == (1224, 1224 + 2 * 412)


@pytest.mark.parametrize("gone", ["head_layer.4.weight", "pretrained_model.encoder.LayerNorm.weight"])
def test_pairrm_without_a_weight_is_refused(tmp_path, pairrm_folder, gone):
    folder = save(tmp_path, PairRM.from_pretrained(pairrm_folder), pairrm_tokenizer())
    change_weights(folder, lambda tensors: tensors.pop(gone))
    with pytest.raises(UserError, match=rf"no checkpoint for scorer.name=pairrm: it lacks {gone};"):
        pairrm_scorer(folder)(ITEMS)


def test_a_bare_deberta_is_no_pairrm(tmp_path):
    folder = save(tmp_path, randomly(lambda: DebertaV2Model(deberta_config())), pairrm_tokenizer())
    with pytest.raises(UserError, match=r"it lacks head_layer.1.bias, head_layer.1.weight, .* and 1 more;"):
        pairrm_scorer(folder)(ITEMS)


def test_a_tokenizer_without_pairrms_markers_is_refused(tmp_path, pairrm_folder, reward_folder):
    folder = save(tmp_path, PairRM.from_pretrained(pairrm_folder), llama_tokenizer())
    with pytest.raises(UserError, match=r"lacks PairRM's special tokens <\|source\|>"):
        pairrm_scorer(folder)
    with pytest.raises(UserError, match="is a llama and not the deberta-v2 that PairRM is"):
        pairrm_scorer(reward_folder)
    with pytest.raises(UserError, match="is a deberta-v2 and not the Llama that ArmoRM is"):
        armorm_scorer(pairrm_folder)


# The judge ------------------------------------------------------------------------------------------------------------

RESPONSES = ["short", "a little longer", "by far the longest of these answers", "short"]
QUESTION = Item(prompt="what is {second} best?", responses=RESPONSES)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start judges; they end with the test."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    started = []

    def start(*modes: str, port: int = 0) -> Server:
        started.append(Server(tmp_path / f"answered-{len(started)}", *modes, port=port))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.kill()


def judge(*asked: Server, template=None, **fields):
    cfg = JudgeConfig(urls=[server.url for server in asked], served_model="judge", **fields)
    return registry.build(ScorerConfig(name="llm_judge", template=template, judge=cfg), RANK)


def by_hand(p=judge_server.first_wins, responses=RESPONSES) -> list[list[float]]:
    """Both orders, averaged; equal texts are equal."""
    return [[(p(a, b) + 1 - p(b, a)) / 2 if a != b else 0.5 for b in responses] for a in responses]


def assert_wins(scores: Scores, expected: list[list[float]]) -> None:
    assert [p for row in scores.values for p in row] == pytest.approx([p for row in expected for p in row], abs=1e-9)


def test_the_judge_is_asked_in_both_orders_and_its_log_probabilities_are_the_answer(serve):
    server = serve()
    scores = judge(server)([QUESTION])[0]
    assert_wins(scores, by_hand())
    asked = sorted((first, second) for _, _, first, second in server.answered())
    assert asked == sorted((a, b) for i, a in enumerate(RESPONSES) for j, b in enumerate(RESPONSES) if a != b)
    assert judge_server.first_wins("x", "x") > 0.6  # it likes the first place, and the average does not show it
    _, body, *_ = server.answered()[0]
    assert (body["model"], body["temperature"], body["logprobs"], body["top_logprobs"]) == ("judge", 0.0, True, 5)
    assert "what is {second} best?" in body["messages"][0]["content"]


@pytest.mark.parametrize("mode", ["text", "refuses"])
def test_without_log_probabilities_the_letter_in_the_text_decides(serve, mode):
    server = serve(mode)
    expected = by_hand(lambda a, b: float(judge_server.first_wins(a, b) > 0.5))
    assert_wins(judge(server)([QUESTION])[0], expected)
    assert 0.5 in expected[0] and 1.0 in expected[2]  # two verdicts for the first place, and two for one response
    if mode == "refuses":
        assert len(server.answered()) == 10 and all("logprobs" not in body for _, body, *_ in server.answered())


@pytest.mark.parametrize(
    "text, verdict",
    [("m", 1.0), ("M", 0.0), (" m.", 1.0), ("Model M is better", 0.0), ("**m**", 1.0), ("", None), ("m or M", None),
     ("Many more", None), ("I'm not sure", None), ("I'm for M", 0.0)],
)  # fmt: skip
def test_a_verdict_in_a_text_is_one_letter_that_stands_alone(text, verdict):
    assert llm_judge._by_text(text) == verdict


def test_a_judge_without_a_verdict_says_half_and_is_counted(serve):
    scores = judge(serve("chatty"))([QUESTION])[0]
    assert_wins(scores, [[0.5] * 4] * 4)
    assert [count["unreadable_verdicts"] for count in scores.counts] == [2, 3, 3, 2]


def test_every_token_is_counted_where_the_response_stood_first(serve):
    scores = judge(serve())([QUESTION])[0]
    assert [count["prompt_tokens"] for count in scores.counts] == [22, 33, 33, 22]
    assert [count["completion_tokens"] for count in scores.counts] == [4, 6, 6, 4]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["flaky", "hangs"])
def test_a_server_that_fails_or_hangs_is_asked_again(serve, mode, monkeypatch):
    monkeypatch.setattr(servers, "TIMEOUT", 2.0)
    server = serve(mode)
    assert_wins(judge(server)([QUESTION])[0], by_hand())
    assert {(first, second) for _, _, first, second in server.answered()} == {
        (a, b) for a in RESPONSES for b in RESPONSES if a != b
    }


def test_requests_are_made_at_the_same_time(serve):
    began = time.monotonic()
    assert_wins(judge(serve("slow"), requests_at_once=10)([QUESTION])[0], by_hand())
    assert time.monotonic() - began < 5  # ten seconds one by one


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_loses_nothing(serve):
    items = [Item(prompt=f"question {n}", responses=["a", "bb", f"answer {n}"]) for n in range(10)]
    first = serve("slow")
    made = []
    thread = threading.Thread(target=lambda: made.extend(judge(first, requests_at_once=8)(items)))
    thread.start()
    while len(first.answered()) < 8:
        time.sleep(0.05)
    first.kill()
    time.sleep(1.0)
    second = serve(port=first.port)
    thread.join(60)
    assert len(made) == 10
    for item, scores in zip(items, made, strict=True):
        assert_wins(scores, by_hand(responses=item.responses))
    done = [[(body["messages"][0]["content"]) for _, body, *_ in server.answered()] for server in (first, second)]
    assert 8 <= len(done[0]) < 60 and len({*done[0], *done[1]}) == 60
    assert len(done[1]) <= 60 - len(done[0]) + 8  # only what was under way is asked again


def test_several_servers_share_the_requests_and_one_that_is_gone_costs_nothing(serve):
    one, other, gone = serve(), serve(), serve()
    gone.kill()
    assert_wins(judge(one, gone, other)([QUESTION])[0], by_hand())
    assert len(one.answered()) + len(other.answered()) == 10
    assert one.answered() and other.answered()


@pytest.mark.slow
def test_a_judge_that_is_not_there_is_said_when_patience_ends(serve, monkeypatch):
    monkeypatch.setattr(servers, "PATIENCE", 0.1)
    server = serve()
    server.kill()
    with pytest.raises(UserError, match=r"scorer.judge.urls"):
        judge(server)([QUESTION])


def test_a_server_that_is_no_judge_is_said(serve):
    with pytest.raises(UserError, match=r"answers with no chat completion: .*hello.*is scorer.judge.urls the address"):
        judge(serve("other"))([QUESTION])


def test_the_key_is_sent_to_the_server_and_said_nowhere_else(serve, capfd):
    server = serve()
    scorer = judge(server)
    made = scorer([QUESTION])
    assert {key for key, *_ in server.answered()} == {f"Bearer {KEY}"}
    with pytest.raises(UserError, match="key") as caught:
        judge(serve("locked"))([QUESTION])
    said = capfd.readouterr()
    assert KEY not in f"{caught.value} {scorer.identity} {made} {vars(scorer)} {said.out} {said.err}"


def test_an_address_with_a_key_in_it_is_refused_without_repeating_it():
    cfg = JudgeConfig(urls=[f"http://user:{KEY}@host/v1"], served_model="judge")
    with pytest.raises(UserError) as caught:
        registry.build(ScorerConfig(name="llm_judge", judge=cfg), RANK)
    assert KEY not in str(caught.value) and "OPENAI_API_KEY" in str(caught.value)


def test_a_template_of_ones_own_and_further_fields_of_the_request(serve, tmp_path):
    (tmp_path / "mine.txt").write_text('{prompt}? "output": """{first}""" or "output": """{second}"""')
    server = serve()
    scorer = judge(server, template=str(tmp_path / "mine.txt"), request={"max_tokens": None, "seed": 3})
    assert_wins(scorer([QUESTION])[0], by_hand())
    _, body, first, second = server.answered()[0]
    assert body["messages"] == [
        {"role": "user", "content": f'{QUESTION.prompt}? "output": """{first}""" or "output": """{second}"""'}
    ]
    assert body["seed"] == 3 and "max_tokens" not in body
    assert scorer.identity.template.startswith("{prompt}? ") and scorer.identity.name == "llm_judge:judge"


def test_without_a_key_none_is_sent(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server = serve()
    judge(server)([QUESTION])
    assert {key for key, *_ in server.answered()} == {""}
