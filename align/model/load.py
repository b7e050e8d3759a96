"""Policies and tokenizers: load, initialise, add or merge an adapter; and the fingerprints that are keys of caches.

The start model is always a folder or a hub name: a random or fitted one is written to a folder first, so that all code
after this file handles one kind of model. Weights are safetensors, float32, without dropout: the papers train without
it, and only then is a log-ratio to the start model 0 at step 0.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.config import ModelConfig, RunConfig
from align.files import build_once, file_fingerprint, fingerprint
from align.launch.rank import Rank
from align.model.chat import read_template, stop_token_ids, tokenizer_fingerprint
from align.say import UserError, first_line, resolve, say


@dataclass(frozen=True, kw_only=True)
class Start:
    """The start model: `path` for `from_pretrained`, and the tokenizer with the run's chat template.

    `fingerprint` changes with a local folder's weights or configuration, or with a hub model's revision.
    """

    path: str
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase


class NotHereError(UserError):
    """A hub model that cannot be downloaded: no network, another name, no access."""


def prepare_start(cfg: ModelConfig, cache: Path) -> Start:
    """Load the tokenizer, and initialise and fit the start model if it has no path (cached); or raise `UserError`."""
    if cfg.path is not None:
        tokenizer = _load_tokenizer(cfg, cfg.tokenizer or cfg.path, cfg.revision if cfg.tokenizer is None else None)
        key = fingerprint(cfg.path, cfg.revision, tokenizer.init_kwargs.get("_commit_hash"))
        if (folder := Path(cfg.path).expanduser()).is_dir():
            key = content_fingerprint(folder, ("*.safetensors", "config.json"))
        return Start(path=cfg.path, fingerprint=key, tokenizer=tokenizer)
    if cfg.tokenizer is None:
        raise UserError("model.init needs model.tokenizer: a folder, a hub name, or module:function")
    if ":" in cfg.tokenizer and not Path(cfg.tokenizer).exists():
        tokenizer = resolve(cfg.tokenizer, "model.tokenizer")()
    else:
        tokenizer = _load_tokenizer(cfg, cfg.tokenizer, None)
    code: list[str] = []
    if cfg.fit is not None:  # any Python file beside it may change the result
        beside = Path(inspect.getfile(resolve(cfg.fit, "model.fit"))).parent
        code = [cfg.fit, *(file_fingerprint(file) for file in sorted(beside.glob("*.py")))]
    key = fingerprint(cfg.init, cfg.init_seed, code, tokenizer_fingerprint(tokenizer), transformers.__version__)

    def build(into: Path) -> None:
        model = _initialise(cfg, tokenizer)
        if cfg.fit is not None:
            resolve(cfg.fit, "model.fit")(model, tokenizer)
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)

    folder = build_once(cache / "models" / f"{cfg.name}-{key}", build, what="start model")
    return Start(path=str(folder), fingerprint=key, tokenizer=tokenizer)


def content_fingerprint(folder: Path, patterns: Sequence[str]) -> str:
    """Return sixteen hex digits of the files in a folder that match any of the patterns, by name and content."""
    digest = xxhash.xxh3_128()
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**24):
                digest.update(block)
    return digest.hexdigest()[:16]


def _initialise(cfg: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    values = dict(cfg.init)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        config = AutoConfig.for_model(values.pop("model_type", ""), **{"vocab_size": len(tokenizer), **ids, **values})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.init: {' '.join(str(error).split())}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.init_seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = stop_token_ids(tokenizer)
    return model


def load_policy(cfg: ModelConfig, start: Start, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the policy as it is at step 0, adapter included, on the CPU.

    Args:
        seed: decides the initial weights of the adapter.
        dtype: type of the weights. Casting a model later is not the same: its rotary frequencies are buffers, and in
            bfloat16 their angles are radians off at 2,000 tokens.
    """
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            start.path,
            revision=cfg.revision,
            attn_implementation=cfg.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
            dtype=dtype,
            trust_remote_code=cfg.trust_remote_code,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if cfg.attn_implementation is not None and "attn_implementation" in str(error):
            reason = " ".join(str(error).split())
            raise UserError(f"model.attn_implementation={cfg.attn_implementation}: {reason}") from error
        raise cannot_load("model.path", start.path, error) from error
    if missing := sorted(loading["missing_keys"]):
        some = f"{len(missing)} weights ({', '.join(missing[:3])} ...)"
        raise UserError(f"model.path={start.path} lacks {some}: they would be random")
    if len(start.tokenizer) > (embeddings := model.get_input_embeddings().num_embeddings):
        raise UserError(
            f"the tokenizer has {len(start.tokenizer)} tokens and model {start.path} embeds only {embeddings}: "
            "model.tokenizer and model.path do not belong together"
        )
    model.config.use_cache = False
    if cfg.lora:
        model = _with_adapter(model, cfg.lora, seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # in some models it is an nn.Dropout
            module.attention_dropout = 0.0
    return model


def _with_adapter(model: PreTrainedModel, fields: dict[str, Any], seed: int) -> PreTrainedModel:
    try:
        import peft
    except ImportError as error:
        raise UserError("model.lora needs peft: pip install peft") from error
    if fields.get("lora_dropout"):
        raise UserError("model.lora.lora_dropout must be 0: with dropout the log-ratio to the start model is noise")
    transformers.set_seed(seed)
    try:
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model.lora: {str(error).removeprefix('LoraConfig.__init__() ')}; fields are peft.LoraConfig's"
        ) from error


def _load_tokenizer(cfg: ModelConfig, path: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=cfg.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model.tokenizer" if cfg.tokenizer else "model.path", path, error) from error
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {path} has no tokenizer.json: align needs a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {path} has no eos_token: set one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked and never scored, so any token will do
    if cfg.chat_template is not None:
        tokenizer.chat_template = read_template("model.chat_template", cfg.chat_template)
    return tokenizer


def is_local(path: str) -> bool:
    """Tell a path on this machine from a name of the hub, which is owner/name."""
    return path.startswith(("/", ".", "~")) or Path(path).is_dir()


def cannot_load(key: str, path: str, error: Exception) -> UserError:
    """Return the error to raise: which knob, what was tried, and why it failed; `NotHereError` for a name of the hub."""
    reason, folder = first_line(error), Path(path).expanduser()
    if not is_local(path):
        asked = f"{key}={path} is no folder here and cannot be had from the hub"
        return NotHereError(f"{asked} (network, name, access token HF_TOKEN?): {reason}")
    if not folder.is_dir():
        return UserError(f"{key}={path} does not exist; it is taken from the working folder {Path.cwd()}")
    if not (folder / "tokenizer.json").is_file():
        reason = "it has no tokenizer.json"
    needed = "a folder with config.json, safetensors and a tokenizer"
    return UserError(f"{key}={path} cannot be loaded as {needed}: {reason}")


def policy_fingerprint(cfg: ModelConfig, start: Start, seed: int) -> str:
    """Return a key that changes with any weight of the policy at step 0, adapter included, or with its use."""
    adapter = [cfg.lora, seed] if cfg.lora else []
    return fingerprint(start.fingerprint, adapter, cfg.attn_implementation, transformers.__version__)


def start_model(cfg: RunConfig, cache: Path) -> Start:
    """Prepare the start model. A plan without access to it counts tokens with the built-in tokenizer, and says so."""
    try:
        return prepare_start(cfg.model, cache)
    except NotHereError as error:
        if not cfg.plan:
            raise
        say(f"align: {error}; the plan counts tokens by the built-in tokenizer: more of them, the same steps")
        tokenizer = resolve("align.playground.tokenizer:build_tokenizer", "model.tokenizer")()
        return Start(path=str(cfg.model.path), fingerprint="stand-in", tokenizer=tokenizer)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The start model, or the result of an iteration."""

    iteration: int  # that trained it; 0: the start model
    cfg: ModelConfig
    start: Start

    def load(self, rank: Rank) -> PreTrainedModel:
        """Load the weights for sampling. An untrained LoRA adapter is skipped: it is the identity."""
        dtype = torch.bfloat16 if rank.bf16 else torch.float32
        policy: Any = load_policy(replace(self.cfg, lora={}), self.start, seed=0, dtype=dtype)
        loaded: PreTrainedModel = policy.to(rank.device)
        return loaded

    @property
    def name(self) -> str:
        """Name for people: "start", "iteration 1", ..."""
        return f"iteration {self.iteration}" if self.iteration else "start"

    @property
    def fingerprint(self) -> str:
        """Key that changes with its weights."""
        return policy_fingerprint(replace(self.cfg, lora={}), self.start, seed=0)


def trained_from(before: Policy, folder: Path, cache: Path) -> Policy:
    """Return the policy that a training of `before` left in `folder`; an adapter is merged, into `merged` beside it."""

    def merge(into: Path) -> None:
        import peft

        whole = load_policy(replace(before.cfg, lora={}), before.start, seed=0)
        adapted: Any = peft.PeftModel.from_pretrained(whole, folder)
        adapted.merge_and_unload().save_pretrained(into)
        before.start.tokenizer.save_pretrained(into)

    plain = build_once(folder.with_name("merged"), merge, "give another run_dir=") if before.cfg.lora else folder
    cfg = replace(before.cfg, path=str(plain), revision=None, tokenizer=None, chat_template=None, init={}, fit=None)
    return Policy(iteration=before.iteration + 1, cfg=cfg, start=prepare_start(cfg, cache))
