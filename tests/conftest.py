"""What the tests share: a way to type a command, tiny models made on the spot, and small files of pairs."""

import contextlib
import functools
import gc
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: no test may wait for a network
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from align.__main__ import main
from align.cli import compose
from align.config import RunConfig
from align.say import UserError

ROOT = Path(__file__).resolve().parent.parent


def _absolute(name: str) -> Path:
    return Path(name).resolve()  # tests change the working folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--passed", type=_absolute, help="a file: tests named there are left out, those that pass are added"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    file = config.getoption("--passed")
    passed = set(file.read_text().splitlines()) if file and file.exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """A run collects garbage, which through all that was imported and kept before takes half a second each time."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    file = item.config.getoption("--passed")
    if file and report.when == "call" and report.passed:
        with file.open("a") as names:
            names.write(f"{item.nodeid}\n")
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--passed") and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # all have passed


@pytest.fixture(autouse=True)
def objectives_as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    from objectives import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture(autouse=True)
def commands_print_one_line() -> Iterator[None]:
    """`main` sets it for Hydra, and a command that a later test starts would print tracebacks."""
    yield
    os.environ.pop("HYDRA_FULL_ERROR", None)


@dataclass(frozen=True)
class Result:
    """What a command said and how it ended."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny models are slower on two threads than on one, and results depend on the number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for the session, outside the user's."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("ALIGN_CACHE", str(cache))
    return cache


def typed(home: Path, *words: str) -> Result:
    """Type `align <words>` in this process, with the modules in `home` at hand, for what several tests share."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["align", *words])
        patch.syspath_prepend(str(home))
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    return Result(status, out.getvalue(), err.getvalue())


@pytest.fixture
def align(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Type `align <words>` in a temporary working folder, in this process, without a tracker unless one is named."""

    monkeypatch.chdir(tmp_path)

    def run(*words: str, tracker: str = "none") -> Result:
        monkeypatch.setattr(sys, "argv", ["align", *words, *([f"tracker={tracker}"] if tracker else [])])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as end:
            status = 0 if end.code is None else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            elif isinstance(end.code, int):
                status = end.code
        said = capsys.readouterr()
        return Result(status, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def loader() -> compose.Loader:
    """What composes the words of a command."""
    return compose.Loader(create_config_search_path(str(compose.CONF)))


@pytest.fixture(scope="session")
def composition(loader) -> Callable[..., DictConfig]:
    """Words -> what `align <words>` composes, Hydra's own node too. Nothing runs, and the same words are composed once."""

    @functools.cache
    def node(*words: str) -> DictConfig:
        compose.install()  # a command that was typed in this process may have left another schema
        return loader.load_configuration("config", list(words), RunMode.RUN)

    return node


@pytest.fixture(scope="session")
def composed(composition, loader) -> Callable[..., RunConfig]:
    """Words -> the settings of a run that they compose: a choice of groups once, then the values, as Hydra does it."""
    folders = [*compose.CONF.iterdir(), *compose.shipped("experiments").iterdir()]
    groups = [folder.name for folder in folders if folder.is_dir()]

    def settings(*words: str) -> RunConfig:
        keys = {word: word.partition("=")[0] for word in words}
        chosen = [word for word, key in keys.items() if key.strip("+~") in groups or "/" in key]
        typed = [re.sub(compose._OPEN["config"], r"++\1", word) for word in words if word not in chosen]
        values = OverridesParser.create().parse_overrides(typed)
        loader.validate_sweep_overrides_legal(values, RunMode.RUN, from_shell=True)
        node = composition(*chosen).copy()
        with flag_override(node, ["readonly", "struct"], False):
            del node["hydra"]
        loader._apply_overrides_to_config(values, node)
        return OmegaConf.to_object(node)

    return settings


@pytest.fixture(scope="session")
def refusal(composed) -> Callable[..., str]:
    """Words -> the one line that refuses them, by what composes them or prepares the run: no model is loaded by then."""

    def line(*words: str) -> str:
        from align.runs.prepare import prepare

        with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as refused:
            prepare(composed(*words))
        said = compose.one_line(refused.value)
        assert "\n" not in said
        return said

    return line


@pytest.fixture
def jobs(align, monkeypatch) -> Callable[..., list[RunConfig]]:
    """Type a command and get the settings of each of its runs; nothing runs, and each returns 0.5."""

    def type_(*words: str) -> list[RunConfig]:
        configs: list[RunConfig] = []
        monkeypatch.setattr("align.runs.spine.carry_out", lambda cfg: configs.append(cfg) or 0.5)
        result = align(*words, tracker="")
        assert result.status == 0, result.err
        return configs

    return type_


@pytest.fixture(scope="session")
def tokenizer():
    """The built-in tokenizer: byte-level BPE with Gemma's turn markers."""
    from align.playground.tokenizer import build_tokenizer

    return build_tokenizer()


def make_tiny(model_type: str = "llama", **fields):
    """A randomly initialised model of a few thousand weights, the same at every call."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **{**shape, **fields})
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_tiny(folder: Path, tokenizer, model_type: str = "llama", **fields) -> Path:
    """`make_tiny` with its tokenizer, as a folder that `from_pretrained` takes."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    make_tiny(model_type, **{"vocab_size": len(tokenizer), **ids, **fields}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A Llama of 70 thousand weights, untied head."""
    return save_tiny(tmp_path_factory.mktemp("llama"), tokenizer, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_gemma2(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A Gemma-2 of 50 thousand weights: soft-caps, a sliding window, tied head."""
    return save_tiny(tmp_path_factory.mktemp("gemma2"), tokenizer, "gemma2", sliding_window=16, query_pre_attn_scalar=8)


def pair_row(i: int, **columns) -> dict:
    """A preference pair about animals, in TRL's conversational format with win probabilities."""
    animals = ["cat", "dog", "cow", "pig", "hen", "fox", "owl", "bear"]
    good = ", ".join(animals[(i + k) % 8] for k in range(2 + i % 3))
    return {
        "id": f"row-{i}",
        "prompt": [{"role": "user", "content": f"please name {2 + i % 3} animals, number {i}"}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": "thing, " * (i % 4) + "thing"}],
        "chosen_win_prob": 0.5 + 0.4 * ((i % 5) / 4),
        "rejected_win_prob": 0.5 - 0.4 * ((i % 3) / 2),
        **columns,
    }


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    """Rows as a JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Forty pairs as JSONL."""
    return write_jsonl(tmp_path / "pairs.jsonl", [pair_row(i) for i in range(40)])


def quick(model: Path, pairs: Path, *more: str) -> list[str]:
    """Words of a command that trains two steps of eight pairs on a tiny model, in about a second."""
    return [
        "model=local",
        f"model.path={model}",
        f"dataset.path={pairs}",
        "cluster=cpu",
        "train.pairs_per_step=8",
        "optimizer.max_steps=2",
        "optimizer.learning_rate=1e-3",
        *more,
    ]
