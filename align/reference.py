"""The reference as a data column: log pi_ref of every response, computed once from the start policy and cached.

Training then holds one model, and a sweep over beta and gamma pays for the reference once. The reference is the
policy as it is at step 0, adapter included, so a log-ratio starts at exactly what the engine's rounding leaves.
The key covers the weights themselves, the pairs (data, tokenizer, template, truncation, mask) and the precision.
"""

from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from align.batching import plan_micro_batches
from align.cache import build_once
from align.config import fingerprint
from align.engine import collate_pairs, evaluating, response_statistics
from align.launch import Place

_FORWARD_ONLY = 4  # a pass without gradients takes that many times the tokens of a training micro-batch


def reference_logps(
    policy: PreTrainedModel,
    weights: str,
    pairs: datasets.Dataset,
    pairs_fingerprint: str,
    lengths: list[int],
    where: Place,
    *,
    budget: int,
    pad_token_id: int,
    cache: Path,
    name: str,
) -> Tensor:
    """`[N, 2]` float32 nats: ref_logp of the chosen and of the rejected response of each pair. Cached.

    Args:
        policy: `engine.attach`ed, at step 0, on its device; `weights` is its fingerprint.
        lengths: tokens of prompt + longer response, per pair; `budget` is a training micro-batch's.
        name: of the split, for the progress bar and the file.
    """
    folder = cache / "reference" / fingerprint(weights, pairs_fingerprint, name, where.bf16)

    def build(into: Path) -> None:
        logps = torch.empty(len(pairs), 2)
        groups = plan_micro_batches(lengths, _FORWARD_ONLY * budget)
        description = f"reference log-probabilities, {name}"
        with evaluating(policy), tqdm(total=len(pairs), desc=description, unit="pair", disable=len(groups) < 8) as bar:
            for group in groups:
                batch = {
                    k: v.to(where.device) for k, v in collate_pairs(pairs.select(group).to_list(), pad_token_id).items()
                }
                with where.autocast():
                    logp = response_statistics(policy, batch, ())["logp"]
                logps[group] = logp.view(2, -1).T.cpu()
                bar.update(len(group))
        save_file({"logp": logps}, str(into / "logp.safetensors"))

    return load_file(str(build_once(folder, build) / "logp.safetensors"))["logp"]
