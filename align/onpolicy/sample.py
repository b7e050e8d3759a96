"""The first stage of an iteration: K responses of the policy to every prompt, as rows in shards (files.py).

    {"iteration", "prompt_id", "k", "prompt", "response", "response_ids", "finished", "split", "origin"}

Every response has a seed of its own, so it does not matter which process draws it.
"""

import contextlib
import importlib.util
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from align.choices import Backend
from align.config import RunConfig, SamplingConfig
from align.data.prompts import POLICY, PromptRow
from align.data.rows import Conversation
from align.files import Shards, fingerprint
from align.launch.rank import Cluster, Rank, cluster_of, free
from align.model.chat import prompt_ids, stop_token_ids, tokenizer_fingerprint
from align.model.load import Policy
from align.onpolicy.samplers import Prompt, Sample, Sampler, hf_sampler, openai_sampler, seeds, vllm_sampler
from align.say import UserError

_VERSION = 3  # of rows and seeds: raise it when the same inputs would give others


@dataclass(frozen=True, kw_only=True)
class ResponseRow:
    """A row of a shard; (iteration, prompt_id, k) is its key."""

    iteration: int
    prompt_id: str
    k: int  # of `SamplingConfig.samples`; candidates of other origins follow
    prompt: Conversation | str
    response: str = ""
    response_ids: Sequence[int] = field(default_factory=list)  # the stop token included
    finished: bool = True  # with a stop token; else cut at max_new_tokens
    split: str = "train"  # or held_out
    origin: str = POLICY  # hybrid data have candidates of other origins


def sample_from(
    policy: Policy,
    prompts: Sequence[PromptRow],
    cfg: RunConfig,
    settings: SamplingConfig,
    folder: Path,
    iteration: int,
    what: str,
    rank: Rank,
) -> None:
    """Write the rows of all prompts, and of their candidates of other origins, into `folder`, and return when all are there.

    The seed is that of `cfg`; `what` is sampled, for the progress bar.
    """
    tokenizer, size, samples = policy.start.tokenizer, settings.prompts_per_shard, settings.samples
    chunks = [prompts[at : at + size] for at in range(0, len(prompts), size)]
    count = samples * len(prompts) + sum(len(prompt.candidates) for prompt in prompts)
    shards = Shards(folder=folder, what="responses", count=len(chunks), rows=count)
    shards.begin(
        {
            "iteration": iteration,
            "seed": cfg.seed,
            "policy": policy.fingerprint,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "prompts": fingerprint([asdict(prompt) for prompt in prompts]),
            "backend": settings.backend,
            **{name: getattr(settings, name) for name in ("samples", "temperature", "top_p", "max_new_tokens")},
            "prompts_per_shard": size,
            "version": _VERSION,
        }
    )
    if not shards.missing():
        return
    with rank.autocast(), open_sampler(policy, settings, rank) as sampler:
        for number in shards.claim(what if rank.is_first else ""):
            asked = [
                Prompt(token_ids=prompt_ids(p.text, tokenizer), seeds=seeds(cfg.seed, iteration, p.id, samples))
                for p in chunks[number]
            ]
            if not all(prompt.token_ids for prompt in asked):  # a suite's question, to a policy that writes no BOS
                raise UserError("a prompt is empty: leave it out of the questions")
            made = zip(chunks[number], sampler(asked, settings), strict=True)
            rows = [row for prompt, own in made for row in _rows(prompt, own, iteration, tokenizer)]
            shards.write(number, map(asdict, rows))
    del sampler  # it holds the policy
    free()


def read_samples(folder: Path) -> list[ResponseRow]:
    """Return all rows of a finished folder, in the order of the prompts, the K of each together."""
    remedy = f"type align sample run_dir={folder.parent} first, with model= and dataset= as of this command"
    shards = Shards.open(folder, "responses", remedy)
    # token ids in an array, as a list of them takes twenty times the room
    return shards.read(lambda row: ResponseRow(**{**row, "response_ids": array("i", row["response_ids"])}))


def _rows(
    prompt: PromptRow, samples: Sequence[Sample], iteration: int, tokenizer: PreTrainedTokenizerBase
) -> list[ResponseRow]:
    """Return a prompt's samples, and behind them its candidates of other origins, as long as the policy would say them."""
    blank = ResponseRow(iteration=iteration, prompt_id=prompt.id, k=0, prompt=prompt.text, split=prompt.split)
    rows = [replace(blank, response=it.text, response_ids=it.response_ids, finished=it.finished) for it in samples]
    end = stop_token_ids(tokenizer)[-1]
    for other in prompt.candidates:
        ids = [*tokenizer(other.text, add_special_tokens=False).input_ids, end]
        rows.append(replace(blank, response=other.text, response_ids=ids, origin=other.origin))
    return [replace(row, k=k) for k, row in enumerate(rows)]


@contextlib.contextmanager
def open_sampler(policy: Policy, settings: SamplingConfig, rank: Rank) -> Iterator[Sampler]:
    """Yield the sampler of a policy that the settings name. Nothing is loaded before the block, or kept after it."""
    start = policy.start
    if settings.backend is Backend.vllm:
        with vllm_sampler(start.path, start.tokenizer, policy.cfg.revision, rank.bf16) as sampler:
            yield sampler
    elif settings.backend is Backend.openai:
        # the start model may be served under any name
        yield openai_sampler(start.tokenizer, settings, start.path if policy.iteration else None)
    else:
        yield hf_sampler(policy.load(rank), start.tokenizer, settings.tokens_per_batch)


def answering_cluster(cfg: RunConfig) -> Cluster:
    """Return the processes, checked for the backend that samples answers."""
    backend, served = cfg.sampling.backend, "sampling.backend=openai 'sampling.urls=[http://localhost:8000]'"
    if backend is Backend.vllm and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "sampling.backend=vllm needs vllm in this environment; or start `vllm serve` in one of its own, and use "
            f"{served}"
        )
    if (backend is Backend.openai) != bool(cfg.sampling.urls):
        raise UserError(f"sampling.urls goes with sampling.backend=openai: e.g. {served}")
    cluster = cluster_of(cfg.cluster, cfg.plan)
    if backend is Backend.vllm and cluster.world > 1:
        raise UserError(
            f"sampling.backend=vllm is one engine in one process, and there are {cluster.world}: start a vLLM server for each "
            "GPU and give sampling.backend=openai 'sampling.urls=[...]', or sampling.backend=hf"
        )
    return cluster
