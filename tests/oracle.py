"""Tiny models of several architectures, and what their responses' statistics are by the models' own logits."""

import copy
from functools import cache

import torch
from conftest import make_tiny

VOCABULARY = 101
STATISTICS = ("logp", "entropy", "log_max", "log_sum_sq")

#: Windows shorter than the sequences, and soft-caps so low that they bend most logits.
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},  # biases
    "qwen3": {},  # norms of queries and keys
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def ids(count, seed):
    """Token ids."""
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def group(prompt, *responses):
    """A prompt and its responses, of so many tokens."""
    return ids(prompt, prompt), [ids(tokens, 1000 * i + tokens) for i, tokens in enumerate(responses, 1)]


#: Pairs of 7, 311 and 40 tokens; both responses of one token, only the chosen, only the rejected.
UGLY = [group(3, 1, 3), group(170, 140, 1), group(38, 1, 1)]


@cache
def _tiny(kind):
    model = make_tiny(kind, vocab_size=VOCABULARY, **KINDS.get(kind, {}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():  # ten times the usual: flat attention and flat logits would hide a mistake
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.2 * noise if weight.ndim > 1 else weight + 0.1 * noise)
    return model


def tiny(kind):
    """A model of one's own; Gemma-2's own attention is the eager one, which alone knows its soft-cap."""
    return copy.deepcopy(_tiny(kind))


def oracle(model, groups):
    """Statistics of each response in the order of the groups, a row at a time, from all of the model's own logits. [R]"""
    sums = {name: [] for name in STATISTICS}
    for prompt, responses in groups:
        for response in responses:
            row = torch.tensor([prompt + response])
            logits = model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            exp = (logits - logits.amax(-1, keepdim=True)).exp()
            p = exp / exp.sum(-1, keepdim=True)
            sums["logp"].append(p.gather(-1, torch.tensor(response)[:, None]).log().sum())
            sums["entropy"].append(-torch.xlogy(p, p).sum())
            sums["log_max"].append(p.amax(-1).log().sum())
            sums["log_sum_sq"].append((p * p).sum(-1).log().sum())
    return {name: torch.stack(values) for name, values in sums.items()}


def gradients(model):
    """Of every trained weight, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def worst(made, expected):
    """The largest relative error: of a statistic over the responses, or of a weight's gradient, in the norm."""
    return max(((made[name] - value).norm() / value.norm()).item() for name, value in expected.items())


def mixed_signs(number):
    """Weights of the responses' log-probabilities in a loss, none of them like another."""
    return torch.tensor([(-1.0) ** i * (1 + i / 2) for i in range(number)])
