"""The first stage of an iteration: K responses of the policy to every prompt, as rows in files.

    <folder>/manifest.json                   what the responses depend on; other inputs are refused in this folder
    <folder>/00000-of-00007.jsonl            the rows of a shard of prompts: written whole, or not there

Any number of processes, jobs and machines may be started on one folder: each takes the next shard that no one is
about, and at the end waits for what others have not finished, or finishes it itself where they were killed. Since
every response has a seed of its own, it does not matter who draws what. Left out: what the responses are worth
(annotate), and which prompts there are (prompts.py).
"""

import contextlib
import importlib.util
import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.choices import Backend
from align.config import RunConfig, SamplingConfig, check_node
from align.data.prompts import POLICY, Conversation, PromptRow
from align.files import Claim, claimed, fingerprint, lock_of, write_text, writing
from align.launch.cluster import cluster_of
from align.launch.rank import Cluster, Rank, free
from align.model.chat import prompt_ids, stop_token_ids, tokenizer_fingerprint
from align.model.policy import Policy
from align.onpolicy.samplers import Prompt, Sample, Sampler, hf_sampler, openai_sampler, seeds, vllm_sampler
from align.say import UserError

_VERSION = 2  # of rows and seeds: raise it when the same inputs would give others


_MANIFEST = "manifest.json"


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


def check_sampling(settings: SamplingConfig) -> None:
    """Raise UserError for values that cannot be."""
    check_node(settings, "sampling.")
    if settings.backend is Backend.vllm and importlib.util.find_spec("vllm") is None:
        raise UserError(
            "sampling.backend=vllm needs vllm in this environment; or start `vllm serve` in one of its own, and use "
            "sampling.backend=openai 'sampling.urls=[http://localhost:8000]'"
        )
    if (settings.backend is Backend.openai) != bool(settings.urls):
        raise UserError(
            "sampling.urls goes with sampling.backend=openai: e.g. sampling.backend=openai "
            "'sampling.urls=[http://localhost:8000]'"
        )


@contextlib.contextmanager
def open_sampler(
    settings: SamplingConfig,
    tokenizer: PreTrainedTokenizerBase,
    load: Callable[[], PreTrainedModel],
    path: str,
    served: str | None = None,
    revision: str | None = None,
    bf16: bool = False,
) -> Iterator[Sampler]:
    """The sampler that the settings name. Nothing is loaded before the block is entered, or kept after it.

    Args:
        load: the policy on its device, for backend hf.
        path: the policy's folder or name on the hub, for backend vllm.
        revision, bf16: of the policy on the hub, and what it computes in, for backend vllm.
        served: what the name that servers give the policy must end with, for backend openai; None: any will do.

    Raises:
        UserError: the backend is not installed, or no server answers.
    """
    if settings.backend is Backend.vllm:
        with vllm_sampler(path, tokenizer, revision, bf16) as sampler:
            yield sampler
    elif settings.backend is Backend.openai:
        yield openai_sampler(
            tokenizer,
            settings.urls,
            served_model=settings.served_model,
            served=served,
            path=path,
            requests_at_once=settings.requests_at_once,
        )
    else:
        yield hf_sampler(load(), tokenizer, settings.tokens_per_batch)


def sample_prompts(
    prompts: Sequence[PromptRow],
    opening: AbstractContextManager[Sampler],
    settings: SamplingConfig,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    policy: str,
    seed: int,
    iteration: int,
    what: str = "responses",
    silent: bool = False,
) -> None:
    """Write the rows of all prompts into `folder`, as far as they are not there. Returns when all are.

    Args:
        prompts: whose candidates of other origins become rows too.
        opening: e.g. `open_sampler(...)`; entered only if there is something to draw.
        policy: a fingerprint that changes when the policy does.
        what: is sampled, for the progress bar.
        silent: without one.

    Raises:
        UserError: a prompt without tokens or that comes twice, a folder that holds the responses of other inputs or
            cannot be written.
    """
    check_sampling(settings)
    ids = _token_ids(prompts, tokenizer)
    inputs = _inputs(prompts, settings, tokenizer, policy, seed, iteration)
    starts = range(0, len(prompts), settings.prompts_per_shard)
    shards = [prompts[at : at + settings.prompts_per_shard] for at in starts]
    files = _files(folder, inputs)
    _claim_folder(folder, inputs)

    def missing() -> list[int]:
        return [number for number, file in enumerate(files) if not file.exists()]

    def draw(sampler: Sampler, shard: Sequence[PromptRow]) -> list[ResponseRow]:
        asked = [
            Prompt(token_ids=ids[prompt.id], seeds=seeds(seed, iteration, prompt.id, settings.samples))
            for prompt in shard
        ]
        drawn = sampler(
            asked,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
        )
        return [
            row
            for prompt, samples in zip(shard, drawn, strict=True)
            for row in _rows(prompt, samples, iteration, tokenizer)
        ]

    if not missing():
        return
    bar = tqdm(total=len(prompts), desc=what, unit="prompt", disable=silent)
    with opening as sampler, bar:
        for wait in (False, True):  # first what no one is about, then what others have not finished
            for number in missing():
                with claimed(files[number], wait) as claim:
                    if claim is Claim.ours:
                        _write(files[number], draw(sampler, shards[number]))
                gone = set(missing())  # others have been at work too
                bar.update(sum(len(shard) for n, shard in enumerate(shards) if n not in gone) - bar.n)


def read_samples(folder: Path) -> list[ResponseRow]:
    """All rows of a finished folder, in the order of the prompts, the K of each together.

    Raises:
        UserError: a shard is missing or damaged.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except OSError as error:
        raise UserError(f"{folder} holds no responses, as it has no {_MANIFEST}: run align sample first") from error
    rows = []
    for file in _files(folder, manifest):
        try:
            with file.open() as lines:
                rows += [_read_row(line) for line in lines]
        except FileNotFoundError as error:
            raise UserError(f"{file} is not there yet: sampling is not finished, start it again") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it and sample again") from error
    expected = manifest["row_count"]
    if len({(row.prompt_id, row.k) for row in rows}) != len(rows) or len(rows) != expected:
        raise UserError(f"{folder} holds {len(rows)} rows in place of {expected}: delete it and sample again")
    return rows


def _read_row(line: str) -> ResponseRow:
    """A row of a shard; its token ids in an array, as a list of them takes twenty times the room."""
    row = ResponseRow(**json.loads(line))
    return replace(row, response_ids=array("i", row.response_ids))


def _rows(
    prompt: PromptRow, samples: Sequence[Sample], iteration: int, tokenizer: PreTrainedTokenizerBase
) -> list[ResponseRow]:
    """A prompt's samples, and behind them its candidates of other origins."""
    of_prompt = ResponseRow(iteration=iteration, prompt_id=prompt.id, k=0, prompt=prompt.text, split=prompt.split)
    own = [
        replace(of_prompt, response=sample.text, response_ids=sample.response_ids, finished=sample.finished)
        for sample in samples
    ]
    others = [
        replace(of_prompt, response=other.text, response_ids=_as_ids(other.text, tokenizer), origin=other.origin)
        for other in prompt.candidates
    ]
    return [replace(row, k=k) for k, row in enumerate([*own, *others])]


def _as_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the policy would have drawn to say this."""
    return [*tokenizer(text, add_special_tokens=False).input_ids, stop_token_ids(tokenizer)[-1]]


def _token_ids(prompts: Sequence[PromptRow], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The token ids of each prompt."""
    ids: dict[str, list[int]] = {}
    for prompt in prompts:
        if prompt.id in ids:
            raise UserError(f"prompt {prompt.id!r} comes twice: every prompt needs an id of its own")
        ids[prompt.id] = prompt_ids(prompt.text, tokenizer)
        if not ids[prompt.id]:
            raise UserError(f"prompt {prompt.id!r} is empty")
    return ids


def _inputs(
    prompts: Sequence[PromptRow],
    settings: SamplingConfig,
    tokenizer: PreTrainedTokenizerBase,
    policy: str,
    seed: int,
    iteration: int,
) -> dict[str, Any]:
    """All that decides the rows and how they lie in files."""
    return {
        "iteration": iteration,
        "seed": seed,
        "policy": policy,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prompts": fingerprint([asdict(prompt) for prompt in prompts]),
        "prompt_count": len(prompts),
        "row_count": settings.samples * len(prompts) + sum(len(prompt.candidates) for prompt in prompts),
        "backend": settings.backend.name,
        **{name: getattr(settings, name) for name in ("samples", "temperature", "top_p", "max_new_tokens")},
        "prompts_per_shard": settings.prompts_per_shard,
        "version": _VERSION,
    }


def _files(folder: Path, inputs: Mapping[str, Any]) -> list[Path]:
    """The shards of these inputs, in the order of the prompts."""
    shards = math.ceil(inputs["prompt_count"] / inputs["prompts_per_shard"])
    return [folder / f"{number:05}-of-{shards:05}.jsonl" for number in range(shards)]


def _claim_folder(folder: Path, inputs: dict[str, Any]) -> None:
    """Write the manifest, or compare it with the one that is there."""
    manifest = folder / _MANIFEST
    with _writing(folder):
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        with lock_of(manifest, -1):
            if not manifest.exists():
                write_text(manifest, json.dumps(inputs, indent=1) + "\n")
    there = json.loads(manifest.read_text())
    other = [f"{name} {there.get(name)}, now {inputs[name]}" for name in inputs if there.get(name) != inputs[name]]
    if other:
        raise UserError(f"{folder} holds responses of other inputs ({'; '.join(other)}): delete it, or name another")


def _write(file: Path, rows: Sequence[ResponseRow]) -> None:
    with _writing(file.parent):
        write_text(file, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def _writing(folder: Path) -> AbstractContextManager[None]:
    return writing(f"cannot write {folder}", ": name another folder")


def answering_fleet(cfg: RunConfig) -> Cluster:
    """The processes, checked for how answers are sampled."""
    check_sampling(cfg.sampling)
    cluster = cluster_of(cfg.cluster, cfg.plan)
    if cfg.sampling.backend is Backend.vllm and cluster.world > 1:
        raise UserError(
            f"sampling.backend=vllm is one engine in one process, and there are {cluster.world}: start a vLLM server for each "
            "GPU and give sampling.backend=openai 'sampling.urls=[...]', or sampling.backend=hf"
        )
    return cluster


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
    """Answers of a policy, into a folder; what is there is kept, and other processes do their share."""
    opening = open_sampler(
        settings,
        policy.start.tokenizer,
        lambda: policy.load(rank),
        policy.start.path,
        revision=policy.cfg.revision,
        bf16=rank.bf16,
        served="/".join(Path(policy.start.path).parts[-2:]) if policy.iteration else None,
    )
    with rank.autocast():
        sample_prompts(
            prompts,
            opening,
            settings,
            folder,
            tokenizer=policy.start.tokenizer,
            policy=policy.fingerprint,
            seed=cfg.seed,
            iteration=iteration,
            what=what,
            silent=not rank.is_first,
        )
    free()
