"""Score responses: rows of (iteration, prompt_id, k) in, rows with a score or with wins out, in shards of files.

A shard is some prompts with all their responses. It is written under a lock, to a temporary name, and renamed, so a
killed run goes on without a row twice or missing, and several processes on one folder share the work. A manifest
tells what the folder is about: other responses or another scorer are refused, and scores of two are never mixed.

    manifest.json                 fingerprint of the responses; the scorer, with its template in full
    00000-of-00008.jsonl          {"iteration", "prompt_id", "k", "score": s or "wins": [K], "scorer", "revision",
                                   "template": fingerprint, and what the scorer counts, such as "cut_tokens"}

`score` is the scorer's number for response k; `wins` are P(response k beats response j), j in the order of the k.
null is a number that is not finite. Left out: how anything is scored (scorers/), and what follows from it (select.py).
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from align.config import RunConfig
from align.files import Claim, claimed, fingerprint, lock_of, write_text, writing
from align.launch.rank import Rank, free
from align.onpolicy.sample import ResponseRow
from align.onpolicy.scorers import registry
from align.onpolicy.scorers.base import Identity, Item, Kind, Prompt, Scorer, Scores
from align.say import UserError

_SHARD_PROMPTS = 32  # what a killed run loses at most, and pays a judge for twice


_BAR_SHARDS = 4  # below it, a progress bar is noise


_VERSION = 1  # of what a shard holds: raise it when that changes


_ROUNDING = 1e-3  # by which P(i beats j) + P(j beats i) may miss 1


_COLUMNS = ("iteration", "prompt_id", "k", "score", "wins", "scorer", "revision", "template")


class Response(Protocol):
    """A row of what was sampled, whose key is (iteration, prompt_id, k). `sample.ResponseRow` is one."""

    @property
    def iteration(self) -> int:
        """Of self-play."""

    @property
    def prompt_id(self) -> str:
        """Tells prompts apart."""

    @property
    def k(self) -> int:
        """Which of the prompt's responses."""

    @property
    def prompt(self) -> Prompt:
        """What was asked."""

    @property
    def response(self) -> str:
        """What was answered, as text."""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A prompt of an iteration and its K responses, in the order of k."""

    iteration: int
    prompt_id: str
    ks: list[int]
    item: Item


def annotate(responses: Sequence[Response], scorer: Scorer, folder: Path, *, silent: bool = False) -> Counter[str]:
    """Score all responses into `folder`; what is there already is kept. Any number of processes may do so at once.

    Args:
        responses: in any order, which all processes must share.
        silent: no progress bar, for all processes of a machine but the first.

    Returns:
        What the scorer counts, over all rows: tokens that were cut, tokens that a judge was paid for.

    Raises:
        UserError: the folder holds scores of other responses or of another scorer; a response comes twice; the
            scorer gives what cannot be a score; the folder cannot be written.
    """
    groups = _by_prompt(responses)
    shards = [groups[at : at + _SHARD_PROMPTS] for at in range(0, len(groups), _SHARD_PROMPTS)]
    _claim_folder(folder, _manifest(groups, len(shards), scorer.identity))
    files = _files(folder, len(shards))
    to_do = [number for number, file in enumerate(files) if not file.exists()]
    waiting = sum(len(shards[number]) for number in to_do)
    silent = silent or len(to_do) < _BAR_SHARDS
    with tqdm(total=waiting, desc=f"scores by {scorer.identity.name}", unit="prompt", disable=silent) as bar:
        for patient in (False, True):  # first what no one is about, then what others have not finished
            left = []
            for number in to_do:
                with claimed(files[number], patient) as claim:
                    if claim is Claim.ours:
                        _write(files[number], _score(shards[number], scorer))
                    if claim is Claim.theirs:
                        left.append(number)
                    else:
                        bar.update(len(shards[number]))
            to_do = left
    return counts(read_scores(folder))


def read_scores(folder: Path) -> list[dict[str, Any]]:
    """The rows that `annotate` wrote, in the order of the responses' prompts and of k; a null is NaN.

    Raises:
        UserError: scores are missing or damaged; the message says what to do.
    """
    manifest = _read_manifest(folder / "manifest.json")
    if manifest is None:
        raise UserError(f"{folder} holds no scores: run align annotate first")
    rows: list[dict[str, Any]] = []
    for file in _files(folder, manifest["shards"]):
        try:
            with file.open(encoding="utf-8") as lines:
                made = [json.loads(line) for line in lines]
        except FileNotFoundError as error:
            raise UserError(f"{folder} is not finished, {file.name} is missing: run align annotate again") from error
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}): delete it and run align annotate again") from error
        for row in made:
            if "score" in row:
                row["score"] = _number(row["score"])
            else:
                row["wins"] = [_number(p) for p in row["wins"]]
        rows += made
    if len(rows) != manifest["rows"]:
        raise UserError(f"{folder} has {len(rows)} scores of {manifest['rows']}: delete the folder and start again")
    return rows


def counts(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """What the scorer counts, summed over rows of `read_scores`."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update({name: value for name, value in row.items() if name not in _COLUMNS})
    return total


def _by_prompt(responses: Sequence[Response]) -> list[_Group]:
    """The responses of each prompt together, prompts in the order of their first response."""
    found: dict[tuple[int, str], dict[int, str]] = {}
    prompts: dict[tuple[int, str], Prompt] = {}
    for row in responses:
        key = (row.iteration, row.prompt_id)
        texts = found.setdefault(key, {})
        if row.k in texts:
            raise UserError(f"response {row.k} to prompt {row.prompt_id!r} of iteration {row.iteration} comes twice")
        if prompts.setdefault(key, row.prompt) != row.prompt:
            raise UserError(f"prompt {row.prompt_id!r} of iteration {row.iteration} stands for two different prompts")
        texts[row.k] = row.response
    if not found:
        raise UserError("there are no responses to score")
    return [
        _Group(
            iteration=iteration,
            prompt_id=prompt_id,
            ks=sorted(texts),
            item=Item(prompt=prompts[iteration, prompt_id], responses=[texts[k] for k in sorted(texts)]),
        )
        for (iteration, prompt_id), texts in found.items()
    ]


def _manifest(groups: list[_Group], shards: int, identity: Identity) -> dict[str, Any]:
    digest = hashlib.sha256()
    for group in groups:
        digest.update(json.dumps(asdict(group), sort_keys=True).encode())
    manifest = {
        "version": _VERSION,
        "responses": digest.hexdigest()[:16],
        "scorer": {**asdict(identity), "kind": identity.kind.value},
        "shards": shards,
        "prompts": len(groups),
        "rows": sum(len(group.ks) for group in groups),
    }
    read_back: dict[str, Any] = json.loads(json.dumps(manifest))  # tuples become lists, as in the file
    return read_back


def _claim_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or see that the one that is there says the same."""
    file = folder / "manifest.json"
    with _writing(folder):
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        with lock_of(file, -1):
            before = _read_manifest(file)
            if before is None:
                write_text(file, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
                return
    if before == manifest:
        return
    if before.get("scorer") != manifest["scorer"]:
        theirs, ours = before.get("scorer", {}), manifest["scorer"]
        key = next(key for key in ours if theirs.get(key) != ours[key])
        what = f"of another scorer ({key} was {_short(theirs.get(key))}, is now {_short(ours[key])})"
    else:
        what = "of other responses" if before.get("responses") != manifest["responses"] else "in other shards"
    raise UserError(f"{folder} holds scores {what}: delete it to score anew, or name another folder")


def _read_manifest(file: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): delete {file.parent} and start again") from error
    return manifest


def _score(groups: list[_Group], scorer: Scorer) -> str:
    """The lines of a shard."""
    identity = scorer.identity
    made = scorer([group.item for group in groups])
    if len(made) != len(groups):
        raise UserError(f"scorer {identity.name} answered {len(made)} of {len(groups)} prompts")
    by_whom = {
        "scorer": identity.name,
        "revision": identity.revision,
        "template": fingerprint(identity.template),
    }
    lines = []
    for group, scores in zip(groups, made, strict=True):
        try:
            _check(scores, identity.kind, len(group.ks))
        except (TypeError, ValueError) as error:
            raise UserError(f"scorer {identity.name}, prompt {group.prompt_id!r}: {error}") from error
        for i, k in enumerate(group.ks):
            key = {"iteration": group.iteration, "prompt_id": group.prompt_id, "k": k}
            value = _json(scores.values[i], identity.kind)
            lines.append(
                json.dumps(
                    {**key, **value, **by_whom, **(scores.counts[i] if scores.counts else {})}, ensure_ascii=False
                )
            )
    return "".join(f"{line}\n" for line in lines)


def _check(scores: Scores, kind: Kind, count: int) -> None:
    """Raise `ValueError` or `TypeError` for what cannot be the scores of `count` responses."""
    values: Any = scores.values
    if len(values) != count or len(scores.counts) not in (0, count):
        raise ValueError(f"{len(values)} values and {len(scores.counts)} counts for {count} responses")
    if kind is Kind.pointwise:
        for value in values:
            math.isfinite(value)  # a TypeError where it is no number
        return
    if any(len(row) != count for row in values):
        raise ValueError(f"the wins of {count} responses must be that many rows of that many")
    for i in range(count):
        for j in range(count):
            p, q = values[i][j], values[j][i]
            if math.isfinite(p) and math.isfinite(q) and not (0 <= p <= 1 and abs(p + q - 1) <= _ROUNDING):
                raise ValueError(f"P({i} beats {j}) is {p} and P({j} beats {i}) is {q}: both orders must add up to 1")


def _json(value: Any, kind: Kind) -> dict[str, Any]:
    """What a row says of a response; JSON has no NaN and no infinity."""

    def finite(number: float) -> float | None:
        return float(number) if math.isfinite(number) else None

    return {"score": finite(value)} if kind is Kind.pointwise else {"wins": [finite(p) for p in value]}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _files(folder: Path, shards: int) -> list[Path]:
    return [folder / f"{number:05}-of-{shards:05}.jsonl" for number in range(shards)]


def _write(file: Path, text: str) -> None:
    with _writing(file.parent):
        write_text(file, text)


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) < 60 else f"{text[:57]}..."


def _writing(folder: Path) -> AbstractContextManager[None]:
    return writing(f"cannot write scores to {folder}", ": name another folder")


def score_responses(rows: Sequence[ResponseRow], cfg: RunConfig, folder: Path, rank: Rank) -> None:
    """Scores of responses, into a folder; what is there is kept, and other processes do their share."""
    counts = annotate(rows, registry.build(registry.scorer_of(cfg), rank), folder, silent=not rank.is_first)
    if counts and rank.is_first:
        print(", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()), flush=True)
    free()
