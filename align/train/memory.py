"""Bytes that one process holds in training: arithmetic on a model's shape by strategy, and a measurement on a GPU.

A process holds weights, gradients, optimizer state and buckets, and on top the larger of a micro-batch (weights in
passing, the head, activations) and the optimizer's step, as each is freed before the other. docs/memory.md derives all
terms and names their sources. Left out: attention maps of backends that keep them, a process before it divides its
weights, and other processes of the host; `USABLE` leaves room for what is not counted.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from align.choices import Strategy
from align.config import ModelConfig, RunConfig
from align.data.pairs import Pairs, as_group, pair_lengths
from align.engine import collate, response_statistics
from align.engine.batching import CPU_TOKENS, fed_tokens
from align.launch.rank import Cluster, Rank
from align.model.load import Start
from align.say import UserError, unknown_key
from align.train.job import PairData

GIB = 2**30
USABLE = 0.85  # of a device's memory: the rest is CUDA's, NCCL's, and gaps between allocations
ENOUGH_TOKENS = 16384  # keep a GPU busy: if memory is calculated and not measured, more is a risk for little
MOST_TOKENS = 65536  # of a micro-batch: beyond it a GPU only needs more memory
_PROBES = (2048, 6144)  # tokens of the two micro-batches by which a GPU is measured
#: Float32 values of optimizer state per trained weight, by the first word that an optimizer's name contains.
_MOMENTS = {"ademamix": 3, "adam": 2, "rmsprop": 1, "adagrad": 1, "lion": 1, "adafactor": 0, "sgd": 0}
_LAYER_BYTES = {True: 85, False: 129}  # kept by autograd per token, hidden unit and layer: in bf16, in float32
_RESIDUAL_BYTES = 4  # the same with checkpointing, which keeps only the input of a layer
_TILE_LOGITS = {True: 2**27, False: 2**19}  # on a GPU, on a CPU: align/engine/head.py
_LOGIT_BYTES = 4 + 4 + 2  # a logit, its gradient, and the gradient in 16 bit as a factor of products
_BUCKET, _LIVE = 500_000_000, 1_000_000_000  # weights: DeepSpeed's reduce_bucket_size, stage3_max_live_parameters
_DIVIDING = (Strategy.fsdp, Strategy.zero2, Strategy.zero3)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Measures of a model; `model.shape` has the same keys."""

    parameters: int  # all weights, a tied head counted once
    layers: int
    hidden: int
    vocabulary: int  # rows of the embedding

    @property
    def head(self) -> int:
        """Weights of the head, and of an embedding."""
        return min(self.vocabulary * self.hidden, self.parameters)

    @property
    def layer(self) -> int:
        """Weights of a layer; if the head is not tied, too many by a share of it."""
        return (self.parameters - self.head) // self.layers


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Properties of a run that decide its memory, besides the strategy and the tokens of a micro-batch."""

    shape: Shape
    trained: int  # weights that get gradients: all, or an adapter's
    optimizer: str  # optimizer.optim
    bf16: bool
    checkpointing: bool
    on_gpu: bool
    world: int = 1
    offload: bool = False

    @property
    def state(self) -> int:
        """Bytes of optimizer state for all trained weights; for an unknown optimizer those of Adam."""
        moments = next((count for family, count in _MOMENTS.items() if family in self.optimizer), 2)
        in_8_bit = max(0, self.trained - self.shape.head) if "8bit" in self.optimizer else 0
        return moments * (4 * (self.trained - in_8_bit) + in_8_bit)


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one process, on its device except for `host`."""

    weights: int  # stored: the process's share, master weights, and DeepSpeed's copy in 16 bit
    gradients: int  # kept from micro-batch to micro-batch
    optimizer: int  # state, which exists from the first step on
    buckets: int  # buffers in which gradients travel
    passing: int  # weights gathered or cast for a micro-batch, and gradients before they are added up
    head: int  # tiles of logits, and the gradient of the head
    activations: int
    step: int  # copies made by the optimizer's step
    host: int  # everything that offload keeps off the device

    @property
    def total(self) -> int:
        """Largest use of the device at any time."""
        micro_batch = self.passing + self.head + self.activations
        return self.weights + self.gradients + self.optimizer + self.buckets + max(micro_batch, self.step)


def need(setup: Setup, strategy: Strategy, tokens: int) -> Need:
    """Calculate the bytes of a process with micro-batches of so many tokens, as docs/memory.md derives them."""
    shape, p, t, s = setup.shape, setup.shape.parameters, setup.trained, setup.state

    def d(size: int) -> int:  # the part of one process; that of the last may be smaller
        return -(-size // setup.world)

    c = 2 if setup.bf16 else 4  # bytes of a weight in the computation of a layer
    layer, head = min(t, shape.layer), min(t, shape.head)  # trained weights of a layer, of the head
    casts = p if t == p or not setup.checkpointing else shape.layer + shape.head
    cast = 2 * casts if setup.bf16 else 0
    gathered = c * (3 * shape.layer + shape.head) + (c + 4) * layer + c * head
    summed = c * ((head if setup.offload else d(t)) + head)
    alive = c * (min(p, _LIVE + shape.head) + head)
    in_place = any(word in setup.optimizer for word in ("fused", "8bit", "32bit", "bnb"))
    roots = 4 * t if setup.on_gpu and not in_place else 0
    masters = 4 * t if setup.bf16 or setup.offload else 0
    # fmt: off
    weights, masters, gradients, state, buckets, passing, step, buffers = {
        #                weights    masters     gradients state buckets          passing   step      buffers on the host
        Strategy.single: (4 * p,    0,          4 * t,    s,    0,               cast,     roots,    0),
        Strategy.ddp:    (4 * p,    0,          4 * t,    s,    4 * t,           cast,     roots,    0),
        Strategy.fsdp:   (d(4 * p), 0,          d(4 * t), d(s), 0,               gathered, d(roots), 0),
        Strategy.zero2:  (c * p,    d(4 * t),   d(4 * t), d(s), 2 * c * _BUCKET, summed,   d(4 * t), d((4 + c) * t)),
        Strategy.zero3:  (d(c * p), d(masters), d(4 * t), d(s), c * _BUCKET,     alive,    d(4 * t), d(4 * t)),
    }[strategy]
    # fmt: on
    host = 0
    if setup.offload:  # to the host: all that stays from step to step, but for ZeRO-2's 16 bit weights
        assert strategy in _DIVIDING, f"{strategy.value} has nothing on the host"
        staying = weights if strategy is Strategy.zero2 else 0
        host = weights - staying + masters + gradients + state + buffers
        weights, masters, gradients, state, step = staying, 0, 0, 0, 0
    tile = min(_TILE_LOGITS[setup.on_gpu], tokens * shape.vocabulary)
    layers, residuals = (1, shape.layers) if setup.checkpointing else (shape.layers, 0)
    return Need(
        weights=weights + masters,
        gradients=gradients,
        optimizer=state,
        buckets=buckets,
        passing=passing,
        head=_LOGIT_BYTES * tile + 4 * head,
        activations=tokens * shape.hidden * (_LAYER_BYTES[setup.bf16] * layers + _RESIDUAL_BYTES * residuals),
        step=step,
        host=host,
    )


def fits(setup: Setup, strategy: Strategy, memory: int, tokens: int) -> bool:
    """Tell whether a device of `memory` bytes holds micro-batches of `tokens` tokens."""
    return need(setup, strategy, tokens).total <= USABLE * memory


def tokens_that_fit(setup: Setup, strategy: Strategy, memory: int) -> int:
    """Find the most tokens of a micro-batch that a device of `memory` bytes holds; 0 if it does not hold one."""
    counts = range(1, MOST_TOKENS + 1)
    return bisect_right(counts, USABLE * memory, key=lambda tokens: need(setup, strategy, tokens).total)


def which_fit(setup: Setup, memory: int, tokens: int) -> list[Strategy]:
    """List the strategies by which devices of `memory` bytes hold such micro-batches, the simplest first."""
    whole = [] if setup.offload else [Strategy.single if setup.world == 1 else Strategy.ddp]
    divided = _DIVIDING if setup.offload or setup.world > 1 else ()  # one process gains nothing without offload
    return [strategy for strategy in (*whole, *divided) if fits(setup, strategy, memory, tokens)]


def choose(setup: Setup, memory: int | None, tokens: int) -> Strategy:
    """Resolve `auto`: single for one process, DDP on CPUs and where GPUs of `memory` bytes surely hold it, else FSDP."""
    if setup.offload:
        return Strategy.fsdp
    if setup.world == 1:
        return Strategy.single
    held = not setup.on_gpu or (memory is not None and fits(setup, Strategy.ddp, memory, tokens))
    return Strategy.ddp if held else Strategy.fsdp


def setup(cfg: RunConfig, start: Start, cluster: Cluster) -> Setup:
    """Collect the properties of a run that decide its memory."""
    measures = shape(cfg.model, start)
    return Setup(
        shape=measures,
        trained=measures.parameters // (100 if cfg.model.lora else 1),  # an adapter is about a hundredth
        optimizer=cfg.optimizer.optim,
        bf16=cluster.bf16,
        checkpointing=cfg.engine.gradient_checkpointing,
        on_gpu=cluster.device == "cuda",
        world=cluster.world,
        offload=cluster.offload,
    )


def too_large(cfg: RunConfig, start: Start, cluster: Cluster, longest: int) -> str | None:
    """Warn if the GPUs will probably not hold the run; `longest` is the tokens of the longest pair."""
    run = setup(cfg, start, cluster)
    if cluster.memory is None or fits(run, cluster.strategy, cluster.memory, longest):
        return None
    needed = need(run, cluster.strategy, longest).total / GIB
    others = [name.value for name in which_fit(run, cluster.memory, longest)]
    remedy = f"cluster.strategy={others[0]} would" if others else "try cluster.offload=true, more GPUs, or model.lora"
    return (
        f"a GPU would need {needed:.0f} GiB by cluster.strategy={cluster.strategy.value} and has {cluster.memory / GIB:.0f}: "
        f"this run will probably not fit; {remedy}"
    )


def micro_batch_that_fits(cfg: RunConfig, start: Start, cluster: Cluster, longest: int) -> int:
    """Return `engine.tokens_per_micro_batch`, where it is auto by calculation; `longest` is the longest pair's tokens."""
    wanted = cfg.engine.tokens_per_micro_batch
    if isinstance(wanted, int):
        return wanted
    if cluster.memory is None:
        return CPU_TOKENS
    fitting = tokens_that_fit(setup(cfg, start, cluster), cluster.strategy, cluster.memory)
    return max(longest, min(ENOUGH_TOKENS, fitting))


def token_budget(policy: PreTrainedModel, data: PairData, statistics: Sequence[str], rank: Rank, later: int) -> int:
    """Measure the tokens of a micro-batch for a policy that is `attach`ed in the layout of `data` and on its GPU.

    Two micro-batches of the longest pairs run forward and backward; the difference of their peaks is the cost of a
    token. Not for sharded weights: a policy that is not wrapped yet does not gather any. `later` are bytes that come
    after a backward: optimizer state, buckets. Raises `UserError` where a pair is too long.
    """
    lengths = data.lengths
    longest = sorted(range(len(lengths)), key=lambda i: -sum(lengths[i]))[:8]
    policy.train()
    peaks: list[tuple[int, int]] = []
    for tokens in _PROBES:
        some = [longest[0]]
        while sum(sum(lengths[i]) for i in some) < tokens:
            some.append(longest[len(some) % len(longest)])
        torch.cuda.reset_peak_memory_stats(rank.device)
        before = torch.cuda.memory_allocated(rank.device)
        try:
            with rank.autocast():
                batch = collate([as_group(data.pairs[i]) for i in some], data.layout, pad_token_id=0).to(rank.device)
                response_statistics(policy, batch, statistics)["logp"].sum().backward()
        except torch.cuda.OutOfMemoryError as error:
            if peaks:
                break
            raise UserError(
                f"a pair of {batch.fed_tokens} tokens does not fit into this GPU's memory: set "
                "engine.gradient_checkpointing=true if it is not, or a smaller train.max_length"
            ) from error
        finally:
            policy.zero_grad(set_to_none=True)
        peaks.append((batch.input_ids.numel(), torch.cuda.max_memory_allocated(rank.device) - before))
    torch.cuda.empty_cache()
    return fitting_tokens(peaks, int(USABLE * (torch.cuda.mem_get_info(rank.device)[0] - later)))


def fitting_tokens(peaks: Sequence[tuple[int, int]], free: int) -> int:
    """Find the tokens whose peak is `free` bytes, on a straight line through the (tokens, peak bytes) of the probes."""
    (few, low), (many, high) = peaks[0], peaks[-1]
    if many == few:  # the second probe did not fit
        return few
    per_token = max(1.0, (high - low) / (many - few))
    return max(few, min(MOST_TOKENS, int(few + (free - low) / per_token)))


def longest_pair(cfg: RunConfig, pairs: Pairs) -> int:
    """Count the tokens of the longest pair, which a micro-batch must hold at least."""
    return max(fed_tokens([pair], cfg.engine.layout) for pair in pair_lengths(pairs.train))


def shape(cfg: ModelConfig, start: Start) -> Shape:
    """Return the measures of a model: those that `model.shape` has, and the others by its config.json."""
    values, known = dict(cfg.shape), [field.name for field in fields(Shape)]
    if others := values.keys() - {*known}:
        raise UserError(unknown_key(f"model.shape.{min(others)}", known))
    if len(values) == len(known):
        return Shape(**values)
    code = cfg.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(start.path, revision=cfg.revision, trust_remote_code=code)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.path={start.path} has no usable config.json: {reason}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=code)
    text, vocabulary = config.get_text_config(), model.get_input_embeddings().num_embeddings
    parameters = sum(p.numel() for p in model.parameters())
    found = Shape(parameters=parameters, layers=text.num_hidden_layers, hidden=text.hidden_size, vocabulary=vocabulary)
    return replace(found, **values)
