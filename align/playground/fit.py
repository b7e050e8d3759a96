"""Fit of a randomly initialised model to imperfect demonstrations: the built-in start model, in about 25 s.

Maximum likelihood. The model is meant to be mediocre: right often enough that its best sample shows the task, wrong
often enough that there is something to learn.
"""

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.model.chat import prompt_ids
from align.onpolicy.batches import pad
from align.playground import task

STEPS, BATCH, LEARNING_RATE = 360, 64, 3e-3


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Train `model` in place, on the CPU. Deterministic."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    pairs = list(task.demonstrations(STEPS * BATCH, seed=1))
    model.train()
    progress = tqdm(range(STEPS), desc="fitting the built-in start model (once, then cached)", unit="step")
    for step in progress:
        ids, labels = _batch(pairs[step * BATCH : (step + 1) * BATCH], tokenizer)
        loss = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(nats_per_token=f"{loss.item():.2f}")
    model.eval()


def _batch(pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and labels `[b, L]`; the prompt and the padding are not labelled."""
    texts, targets = [], []
    for prompt, answer in pairs:
        asked = prompt_ids([{"role": "user", "content": prompt}], tokenizer)
        response = tokenizer(answer + "<end_of_turn>", add_special_tokens=False).input_ids
        texts.append(asked + response)
        targets.append([-100] * len(asked) + response)
    cpu = torch.device("cpu")
    ids, _ = pad(texts, int(tokenizer.pad_token_id), cpu, side="right")
    return ids, pad(targets, -100, cpu, side="right")[0]
