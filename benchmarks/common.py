"""What benchmarks share: random pairs with realistic lengths, small models of real shapes, clocks, memory, the machine.

Nothing here knows what is compared. A measurement runs in a process of its own (`run_alone`), so that neither the
allocator nor the caches of one leave anything to the next. Left out: GPUs, and several processes at once.
"""

import ctypes
import gc
import hashlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from align import engine
from align.choices import Layout
from align.engine.batching import StepSampler
from align.launch.rank import Rank
from objectives import build

if TYPE_CHECKING:
    from align.train.job import PairBatch
    from align.train.loop import Loop

ROOT = Path(__file__).resolve().parent.parent

PAD, EOS = 0, 1  # token ids; neither is ever drawn, so what is padding shows in the ids themselves
MAX_LENGTH, MAX_PROMPT = 2048, 1800  # tokens, as in conf/: of prompt + response, of the prompt

Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids


# Pairs -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Lognormal token counts: the mean, and the standard deviation of the logarithm."""

    mean: float
    sigma: float

    def draw(self, count: int, generator: random.Random) -> list[int]:
        """One draw from each of `count` equally likely slices, shuffled: a few dozen pairs then have this mean too."""
        normal = statistics.NormalDist(-(self.sigma**2) / 2, self.sigma)
        values = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
        generator.shuffle(values)
        return [max(2, round(self.mean * torch.tensor(value).exp().item())) for value in values]


#: name -> (prompt, response). Both responses of a pair are drawn from the same lengths, independently.
PROFILES: dict[str, tuple[Lengths, Lengths]] = {
    "chat": (Lengths(44, 0.5), Lengths(390, 0.3)),  # a question, two samples of the policy
    "mixed": (Lengths(190, 1.1), Lengths(300, 0.7)),  # UltraFeedback: heavy tails, two different writers
    "long": (Lengths(650, 0.3), Lengths(95, 0.5)),  # summaries: almost everything is prompt
}


def make_pairs(profile: str, count: int, vocabulary: int, seed: int) -> list[Pair]:
    """Pairs of random tokens with the lengths of a profile; every response ends with `EOS`."""
    generator = random.Random(f"{seed}, {profile}")
    prompt, response = PROFILES[profile]
    lengths = [spread.draw(count, generator) for spread in (prompt, response, response)]
    pairs = []
    for prompt_tokens, *response_tokens in zip(*lengths, strict=True):
        prompt_tokens = min(prompt_tokens, MAX_PROMPT)
        chosen, rejected = (min(tokens, MAX_LENGTH - prompt_tokens) for tokens in response_tokens)

        def draw(tokens: int) -> list[int]:
            return [generator.randrange(2, vocabulary) for _ in range(tokens)]

        ids = {"prompt_ids": draw(prompt_tokens)}
        ids |= {"chosen_ids": [*draw(chosen - 1), EOS], "rejected_ids": [*draw(rejected - 1), EOS]}
        pairs.append(ids)
    return pairs


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Equal for equal token ids in equal order."""
    ids = [[pair[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for pair in pairs]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word per token: `text` writes ids down so that this tokenizer reads the same ids."""
    words = {"<pad>": PAD, "<eos>": EOS} | {str(i): i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def text(ids: Sequence[int]) -> str:
    """Words with a space before each, so that texts can be put together and stay apart as tokens."""
    return "".join(" <eos>" if i == EOS else f" {i}" for i in ids)


# Models ----------------------------------------------------------------------------------------------------------------

#: Fields of the configuration. `proportions` says how many weights come out.
SHAPES: dict[str, dict[str, Any]] = {
    # 9.8M weights, of which each embedding has 4.1M: a large vocabulary on a small trunk.
    "llama": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    },
    # Gemma-2-2B has 2.02B trunk weights to 590M of the tied embedding, 3.4 : 1, and an MLP of 4 times the hidden
    # size; so has this, in 7.0M : 2.1M. Hidden size and vocabulary shrink together: a logit costs 2 * hidden_size
    # FLOPs and a few elementwise operations, so a small hidden size with a large vocabulary would be all elementwise.
    # Of the L x L attention maps it has 14 (the 2B: 208): it is eager here, and they would outweigh everything.
    # The window is the 2B's: every other layer has one, and no sequence of these profiles reaches it.
    "gemma2": {
        "model_type": "gemma2", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024,
        "num_hidden_layers": 7, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128,
        "query_pre_attn_scalar": 128, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    },
    # The 2B's vocabulary on almost no trunk: what is left is the head.
    "gemma2_vocab": {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 64, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64,
        "query_pre_attn_scalar": 64, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    },
}  # fmt: skip


def build_model(shape: str, vocabulary: int | None, seed: int) -> PreTrainedModel:
    """A randomly initialised model in float32; the same weights for the same arguments."""
    fields = {**SHAPES[shape], "max_position_embeddings": MAX_LENGTH, "use_cache": False}
    fields |= {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    fields["vocab_size"] = vocabulary or fields["vocab_size"]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


def proportions(model: PreTrainedModel) -> tuple[int, int]:
    """(weights of the trunk, weights of the head): the input embedding is a look-up and counts as neither, tied or not."""
    outer = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    trunk = sum(weight.numel() for weight in model.parameters() if id(weight) not in outer)
    return trunk, model.get_output_embeddings().weight.numel()


def pair_loop(
    policy: PreTrainedModel,
    pairs: Sequence[Pair],
    objective: dict[str, Any],
    folder: Path,
    *,
    layout: Layout,
    pairs_per_step: int,
    budget: int,
    learning_rate: float = 0.0,
    seed: int = 0,
) -> "tuple[Loop, Iterator[list[PairBatch]]]":
    """align's loop over these pairs, the reference column computed where the objective needs it, and its steps.

    The optimizer is the Trainer's default, AdamW, at a constant rate.
    """
    import datasets  # here: gpu.py does without, and takes the rest of this file

    from align.config import OptimizerConfig
    from align.launch.strategy import build_accelerator
    from align.train.job import PairData
    from align.train.loop import Loop
    from align.train.reference import reference_logps

    made = build(objective)
    rest = {"cut_tokens": 0, "cut_prompt_tokens": 0, "group": "", "row_id": ""}
    rest |= {"chosen_win_prob": 1.0, "rejected_win_prob": 0.0}
    rows = datasets.Dataset.from_list([{**pair, **rest} for pair in pairs])
    rank = Rank(device=torch.device("cpu"), bf16=False, number=0, world=1)
    engine.attach(policy, layout)
    data = PairData(rows, layout, PAD)
    if "ref_logp" in made.needs:
        data.ref_logp = reference_logps(
            policy, layout.name, data, fingerprint(pairs), rank, budget=budget, cache=folder, name="train"
        )
    steps = StepSampler(data.lengths, layout, pairs_per_step=pairs_per_step, world=1, rank=0, budget=budget, seed=seed)
    optimizer = OptimizerConfig(learning_rate=learning_rate, lr_scheduler_type="constant")
    loop = Loop(policy, made, optimizer, len(steps), budget, build_accelerator(rank, optimizer.max_grad_norm), rank)
    return loop, ([data.batch(some, rank.device) for some in share] for share in steps.epoch(0))


# Measuring -------------------------------------------------------------------------------------------------------------


class Memory:
    """Resident memory of this process in MB, above what it was when this was made."""

    def __init__(self) -> None:
        self._give_back()
        self.base = self._now()

    def start(self) -> None:
        """Count the peak from here: what earlier passes needed is given back first."""
        self._give_back()
        with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
            Path("/proc/self/clear_refs").write_text("5")  # the peak falls to what is resident now

    def _give_back(self) -> None:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def peak(self) -> float:
        """Largest resident memory since `start`, of the whole process."""
        try:
            return self._status("VmHWM")
        except OSError:
            per_mb = 1e6 if sys.platform == "darwin" else 1e3
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_mb

    def _now(self) -> float:
        try:
            return self._status("VmRSS")
        except OSError:
            return self.peak()  # the process is young: this is about what it has

    def _status(self, name: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024 / 1e6


class FedTokens:
    """Counts the tokens that a model embeds while it trains, and those of them that are padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.all = self.padding = 0
        self._hook = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def remove(self) -> None:
        """Count no more."""
        self._hook.remove()

    def _count(self, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # not a reference pass
            self.all += arguments[0].numel()
            self.padding += int((arguments[0] == PAD).sum())


class StepClock(TrainerCallback):
    """Seconds of the steps of a `transformers.Trainer`, and the peak memory of them all.

    The first step is left out of the seconds: it makes the optimizer's state and touches memory for the first time.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory, self.peak = memory, 0.0
        self.ends: list[tuple[float, float]] = []  # (CPU seconds, user + system, of all threads; wall seconds)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Forget the peak of what came before."""
        self.memory.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends behind the optimizer's update."""
        self.ends.append((time.process_time(), time.perf_counter()))
        self.peak = self.memory.peak()

    def seconds(self) -> tuple[float, float]:
        """(CPU, wall) of all steps but the first."""
        (cpu_first, wall_first), (cpu_last, wall_last) = self.ends[0], self.ends[-1]
        return cpu_last - cpu_first, wall_last - wall_first


# Processes and machines ------------------------------------------------------------------------------------------------


def run_alone(script: Path, spec: dict[str, Any], threads: int) -> dict[str, Any]:
    """What `script --leg <spec as JSON> --into <file>` writes to the file, run in a fresh process of this checkout.

    Raises:
        RuntimeError: it failed; the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "result.json"
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "disabled"}
        environment = {
            **os.environ,
            **quiet,
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_CACHE": folder,  # nothing of an earlier leg is found again
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        command = [sys.executable, str(script), "--leg", json.dumps(spec), "--into", str(into)]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{spec} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(into.read_text())
        return result


def machine() -> str:
    """Processor, cores and memory in a line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models_ = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models_[0].split(":")[1].strip() if models_ else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GB"


def versions(*packages: str) -> str:
    """Python's version and those of installed packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def commit() -> str:
    """The commit of this checkout, with a mark where files differ from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "no git commit"
    return done.stdout.strip()


def median_range(values: Sequence[float]) -> str:
    """`median [smallest, largest]`."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
