"""The engine against an oracle that holds every logit: values, gradients, and what is never in memory."""

import pytest
import torch
from conftest import save_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from align import engine
from align.config import UserError

EXTRAS = ("entropy", "log_max", "log_sum_sq")
PAIRS = [
    {"prompt_ids": [2, 5, 9, 11], "chosen_ids": [20, 21, 22, 5], "rejected_ids": [30, 5]},
    {"prompt_ids": [2, 7], "chosen_ids": [40], "rejected_ids": [50 + i for i in range(33)]},
    {"prompt_ids": [2] + [60 + i for i in range(29)], "chosen_ids": [3, 4, 5], "rejected_ids": [8, 9, 10, 5]},
]


def oracle(model, pairs):
    """Statistics of each response, one row at a time, from the model's own full logits. [2b]"""
    sums = {name: [] for name in ("logp", *EXTRAS)}
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(pair["prompt_ids"]) - 1 : -1].float()
            logp = logits.log_softmax(-1)
            sums["logp"].append(logp.gather(-1, torch.tensor(pair[side])[:, None]).sum())
            sums["log_sum_sq"].append((logp.exp() ** 2).sum(-1).log().sum())
            sums["log_max"].append(logp.amax(-1).sum())
            sums["entropy"].append(-(logp.exp() * logp).sum())
    return {name: torch.stack(values) for name, values in sums.items()}


@pytest.fixture(params=["llama", "gemma2", "mistral", "qwen3"])
def model(request, tmp_path, tokenizer):
    fields = {"sliding_window": 8} if request.param in ("gemma2", "mistral") else {}
    if request.param == "gemma2":
        fields |= {"query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}  # low, so that leaving it out shows
    folder = save_tiny(tmp_path, tokenizer, request.param, **fields)
    attention = "eager" if request.param == "gemma2" else None
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for weight in made.parameters():  # larger than at initialisation: flat logits would hide a mistake
            weight.mul_(3.0)
    return made


def test_statistics_and_gradients_equal_the_full_logits(model, monkeypatch):
    monkeypatch.setattr(engine, "_CHUNK_ELEMENTS", 7 * model.config.vocab_size)  # several chunks, the last one short
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0])
    expected = oracle(model, PAIRS)
    (expected["logp"] * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    engine.attach(model)
    batch = engine.collate_pairs(PAIRS, pad_token_id=0)
    made = engine.response_statistics(model, batch, EXTRAS)
    (made["logp"] * weights).sum().backward()

    assert made["length"].tolist() == [4, 1, 3, 2, 33, 4]
    for name in ("logp", *EXTRAS):
        torch.testing.assert_close(made[name], expected[name], rtol=1e-5, atol=1e-5)
    for name, p in model.named_parameters():
        assert (p.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


def test_only_logp_carries_a_gradient(model):
    engine.attach(model)
    made = engine.response_statistics(model, engine.collate_pairs(PAIRS, 0), EXTRAS)
    assert [name for name, values in made.items() if values.requires_grad] == ["logp"]


def test_what_pads_a_row_changes_nothing(model):
    engine.attach(model)
    with torch.no_grad():
        together = engine.response_statistics(model, engine.collate_pairs(PAIRS, 0), EXTRAS)
        padded_with_another = engine.response_statistics(model, engine.collate_pairs(PAIRS, 99), EXTRAS)
        alone = engine.response_statistics(model, engine.collate_pairs(PAIRS[:1], 0), EXTRAS)
    torch.testing.assert_close(together["logp"], padded_with_another["logp"])
    torch.testing.assert_close(together["logp"][[0, 3]], alone["logp"], rtol=1e-5, atol=1e-5)


def test_an_attached_model_still_generates_and_saves_under_its_own_name(model, tmp_path, tokenizer):
    kind = type(model).__name__
    engine.attach(model)
    engine.attach(model)  # a second time changes nothing
    assert model.generate(torch.tensor([[2, 5]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 5)
    model.save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.architectures == [kind]


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_of_all_logits_exists_in_a_training_step(tmp_path, tokenizer, monkeypatch):
    vocabulary = 20_000
    folder = save_tiny(tmp_path, tokenizer, vocab_size=vocabulary)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine.attach(model)
    pairs = [{"prompt_ids": [2, 5], "chosen_ids": [7] * 60, "rejected_ids": [8] * 50} for _ in range(4)]
    batch = engine.collate_pairs(pairs, 0)
    monkeypatch.setattr(engine, "_CHUNK_ELEMENTS", 16 * vocabulary)
    with Largest() as seen:
        engine.response_statistics(model, batch, EXTRAS)["logp"].sum().backward()
    embedding = model.get_input_embeddings().weight.numel()  # [V, H], which the optimizer holds anyway
    assert seen.elements <= max(16 * vocabulary, embedding)
    assert seen.elements < batch["input_ids"].numel() * vocabulary / 10  # [2B, L, V] would be ten times as much


def test_a_model_that_transforms_its_logits_unknown_to_us_is_refused(tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, tokenizer), dtype=torch.float32)

    class Scaled(type(model)):
        def forward(self, *args, **inputs):
            out = super().forward(*args, **inputs)
            out.logits = out.logits * 5
            return out

    model.__class__ = Scaled
    engine.attach(model)
    batch = engine.collate([([2, 5, 9], [20, 21, 5])], 0)
    with pytest.raises(UserError, match="differ from the model's own"):
        engine.check_against_logits(model, batch)


@pytest.mark.parametrize("field, value", [("logit_scale", 0.25), ("logits_scaling", 4.0)])
def test_logit_scales_of_cohere_and_granite_are_applied(field, value, tmp_path, tokenizer):
    kind = {"logit_scale": "cohere", "logits_scaling": "granite"}[field]
    folder = save_tiny(tmp_path, tokenizer, kind, **{field: value})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    engine.attach(model)
    engine.check_against_logits(model, engine.collate([([2, 5, 9], [20, 21, 5])], 0))
