"""One training step's loss against TRL's own DPOTrainer: the same model, the same rows, the same numbers to 1e-4."""

import copy

import pytest
import torch
from conftest import pair_row
from transformers import AutoModelForCausalLM

from align import engine
from align.choices import Layout, Truncation
from align.config import TrainConfig
from align.data.pairs import Rules, as_group, render, tokenise
from align.data.rows import read_pair
from align.model.chat import end_of_turn
from objectives import Response, build

# TRL's default for a template without the newline behind the end of a turn: there both score the same tokens.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\\n' + m['content'] + '<end_of_turn>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def plain_tokenizer(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def rows():
    return [{k: v for k, v in pair_row(i).items() if k in ("prompt", "chosen", "rejected")} for i in range(8)]


@pytest.fixture
def models(tiny_llama):
    """(policy, reference), a little apart, so that a log-ratio is not 0."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.02 * torch.randn_like(weight)
        for model in (policy, reference):
            model.lm_head.weight *= 10  # peaked, so that a given token is seldom as likely as a sampled one
    return policy, reference


def trl_loss(models, rows, tokenizer, folder, **options) -> float:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    policy, reference = copy.deepcopy(models[0]), copy.deepcopy(models[1])
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        report_to="none",
        max_length=None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    trainer = trl.DPOTrainer(
        policy, reference, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    policy.eval()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return float(trainer.compute_loss(trainer.model, batch).detach())


def our_loss(models, rows, tokenizer, **objective) -> tuple[float, dict[str, torch.Tensor]]:
    rules = Rules(tokenizer=tokenizer, train=TrainConfig(truncation=Truncation.drop, max_length=500))
    texts = [render(read_pair(row), rules, end_of_turn(tokenizer)) for row in rows]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [dict(zip(names, ids, strict=True)) for ids in tokenise(texts, tokenizer)]
    batch = engine.collate([as_group(pair) for pair in pairs], Layout.shared, int(tokenizer.pad_token_id))
    made = build(objective)
    with torch.no_grad():
        statistics = []
        for model in map(copy.deepcopy, models):  # TRL calls the trunk by itself, which an attached one does not take
            engine.attach(model, Layout.shared)
            statistics.append(engine.response_statistics(model, batch, made.needs & {"log_sum_sq"}))
    statistics[0]["ref_logp"] = statistics[1]["logp"]
    sides = [{n: v.view(-1, 2)[:, side] for n, v in statistics[0].items() if n in made.needs} for side in (0, 1)]
    result = made(*(Response(**side) for side in sides))
    return float(result.loss.mean()), dict(result.metrics)


def test_dpo_equals_trl_sigmoid(models, rows, plain_tokenizer, tmp_path):
    theirs = trl_loss(models, rows, plain_tokenizer, tmp_path, loss_type="sigmoid", beta=0.3)
    ours, _ = our_loss(models, rows, plain_tokenizer, name="dpo", beta=0.3)
    assert abs(theirs - 0.6931) > 1e-3  # the models differ, so the comparison says something
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_sppo_hard_is_half_of_trl_sppo_hard(models, rows, plain_tokenizer, tmp_path):
    theirs = trl_loss(models, rows, plain_tokenizer, tmp_path, loss_type="sppo_hard", beta=0.5)
    ours, _ = our_loss(models, rows, plain_tokenizer, name="sppo", target="hard", beta=0.5)
    assert 2 * ours == pytest.approx(theirs, rel=1e-4)


def test_ipo_equals_trl_ipo(models, rows, plain_tokenizer, tmp_path):
    theirs = trl_loss(models, rows, plain_tokenizer, tmp_path, loss_type="ipo", beta=0.2)
    ours, _ = our_loss(models, rows, plain_tokenizer, name="ipo", tau=0.2)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_wpo_equals_trl_where_the_clamp_does_not_bind(models, rows, plain_tokenizer, tmp_path):
    ours, metrics = our_loss(models, rows, plain_tokenizer, name="wpo", base="dpo", beta=0.3)
    below_one = [i for i in range(len(rows)) if not metrics["weight_clamped"][i]]
    assert len(below_one) >= 3  # TRL has lost the clamp: only these rows are comparable
    rows = [rows[i] for i in below_one]
    theirs = trl_loss(models, rows, plain_tokenizer, tmp_path, loss_type="sigmoid", beta=0.3, use_weighting=True)
    ours, _ = our_loss(models, rows, plain_tokenizer, name="wpo", base="dpo", beta=0.3)
    assert ours == pytest.approx(theirs, abs=1e-4)
