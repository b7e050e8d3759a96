"""What one process holds in training, in bytes, by strategy: arithmetic on a model's shape, for plans and for `auto`.

With P weights, T of them trained, s bytes of optimizer state each, n processes, and c = 2 bytes in bf16 or 4 in fp32:

              weights          gradients     state       buckets     with offload on the host
    single    4 P              4 T           s T
    ddp       4 P              4 T           s T         4 T
    fsdp      4 P / n          4 T / n       s T / n                 weights, gradients, state
    zero2     c P + 4 T / n    4 T / n       s T / n     2 c B       master weights (4 T / n), gradients, state
    zero3     c P / n + m      4 T / n       s T / n     c B         weights, gradients, state

where m = 4 T / n in bf16 and none in fp32. On top comes the larger of a micro-batch (weights made whole or cast, the
head's tiles, activations) and the optimizer's step: when one is there the other is gone.
Left out: maps of attention that keeps them, what a process loads before it divides, and other processes of the host.
The engine measures what is free (align/engine/budget.py); `USABLE` is the room for what nobody counts.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.choices import Strategy
from align.config import ModelConfig, RunConfig
from align.data.pairs import Pairs, pair_lengths
from align.engine.batching import CPU_TOKENS, fed_tokens
from align.launch.rank import Cluster
from align.model.load import Start
from align.say import UserError

GIB = 2**30
ENOUGH_TOKENS = (
    16384  # tokens keep a GPU busy: where memory is reckoned and not measured, more would be a risk for little
)


#: Of a device's memory: CUDA's and NCCL's own, and the gaps that allocations of many sizes leave.
USABLE = 0.85


#: Tokens of a micro-batch, at most: beyond it a GPU only needs more memory.
MOST_TOKENS = 65536


#: Values of an optimizer's state per trained weight (torch.optim, bitsandbytes); the first name that fits counts.
#: HF's RMSprop and SGD have no momentum, and Adafactor keeps rows and columns only.
_MOMENTS = {"ademamix": 3, "adam": 2, "rmsprop": 1, "adagrad": 1, "lion": 1, "adafactor": 0, "sgd": 0}


#: Kept by autograd per token, hidden unit and layer, in bf16 autocast and in float32, without attention maps: the most
#: of transformers' Llama and Mistral (62, 96), Gemma-2 (83, 123) and Qwen3 (85, 129) at their published proportions,
#: counted by saved-tensor hooks (tests/test_memory.py). The 34 of arXiv 2205.05198, section 4, are GPT's: its MLP is
#: narrower and has no gate, and its norms are not computed in float32.
_LAYER_BYTES = {True: 85, False: 129}


_RESIDUAL_BYTES = 4  # likewise with checkpointing, where a layer keeps its input alone


_TILE_LOGITS = {True: 2**27, False: 2**19}  # on a GPU, on a CPU: align/engine/head.py


_LOGIT_BYTES = 4 + 4 + 2  # a logit, its gradient, and that again in 16 bit as a factor of products


_DEEPSPEED = (Strategy.zero2, Strategy.zero3)


_DIVIDING = (Strategy.fsdp, *_DEEPSPEED)


_BUCKET = 500_000_000  # weights: reduce_bucket_size of deepspeed/runtime/zero/config.py


_LIVE = 1_000_000_000  # weights: stage3_max_live_parameters, likewise


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model, as far as memory asks; `model.shape` has the same keys."""

    parameters: int  # all weights, a tied head counted once
    layers: int
    hidden: int
    vocabulary: int  # rows of the embedding

    @property
    def head(self) -> int:
        """Weights of the head, which are also those of an embedding."""
        return min(self.vocabulary * self.hidden, self.parameters)

    @property
    def layer(self) -> int:
        """Weights of a layer; too many by a share of the head where it is not tied."""
        return (self.parameters - self.head) // self.layers


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What of a run decides its memory, besides the strategy and the tokens of a micro-batch."""

    shape: Shape
    trained: int  # weights that get gradients: all, or an adapter's
    optimizer: str  # TrainingArguments.optim
    bf16: bool
    checkpointing: bool
    on_gpu: bool
    world: int = 1
    offload: bool = False

    @property
    def width(self) -> int:
        """Bytes of a weight as layers compute with it."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one process, on its device but for `host`."""

    weights: int  # as stored: the process's share, master weights and DeepSpeed's copy in 16 bit
    gradients: int  # as kept from micro-batch to micro-batch
    optimizer: int  # state, which comes with the first step
    buckets: int  # in which gradients travel
    passing: int  # weights gathered or cast for a micro-batch, and gradients on their way to where they are kept
    head: int  # tiles of logits, and the sum that becomes the gradient of the head
    activations: int
    step: int  # copies that the optimizer's step makes
    host: int  # what offload keeps off the device

    @property
    def total(self) -> int:
        """The most at any time, on the device."""
        micro_batch = self.passing + self.head + self.activations
        return self.weights + self.gradients + self.optimizer + self.buckets + max(micro_batch, self.step)


def need(setup: Setup, strategy: Strategy, tokens: int) -> Need:
    """What a process holds with micro-batches of `tokens` tokens. More tokens never need less."""
    assert strategy is not Strategy.auto, "choose a strategy first"
    assert not setup.offload or strategy in _DIVIDING, f"{strategy.value} has nothing on the host"
    shape, trained = setup.shape, setup.trained
    stored = _stored(setup, strategy)
    leaving = set(stored) - ({"weights"} if strategy is Strategy.zero2 else set()) if setup.offload else set()
    here = {name: 0 if name in leaving else size for name, size in stored.items()}
    layers_alive = 1 if setup.checkpointing else shape.layers
    residual = _RESIDUAL_BYTES * shape.layers if setup.checkpointing else 0
    tile = min(_TILE_LOGITS[setup.on_gpu], tokens * shape.vocabulary)
    return Need(
        weights=here["weights"] + here["masters"],
        gradients=here["gradients"],
        optimizer=here["optimizer"],
        buckets=_buckets(setup, strategy),
        passing=_passing(setup, strategy),
        # From the second micro-batch on the head's gradient is made beside the one that it is added to.
        head=_LOGIT_BYTES * tile + 4 * min(trained, shape.head),
        activations=tokens * shape.hidden * (_LAYER_BYTES[setup.bf16] * layers_alive + residual),
        step=_step(setup, strategy),
        host=sum(stored[name] for name in leaving) + _host_buffers(setup, strategy),
    )


def fits(setup: Setup, strategy: Strategy, memory: int, tokens: int) -> bool:
    """Whether a device of `memory` bytes holds micro-batches of so many tokens."""
    return need(setup, strategy, tokens).total <= USABLE * memory


def tokens_that_fit(setup: Setup, strategy: Strategy, memory: int) -> int:
    """The most tokens of a micro-batch that a device of `memory` bytes holds; 0 where not one does."""
    counts = range(1, MOST_TOKENS + 1)
    return bisect_right(counts, USABLE * memory, key=lambda tokens: need(setup, strategy, tokens).total)


def which_fit(setup: Setup, memory: int, tokens: int) -> list[Strategy]:
    """Strategies by which devices of `memory` bytes hold micro-batches of so many tokens, the simplest first."""
    return [strategy for strategy in _possible(setup) if fits(setup, strategy, memory, tokens)]


def choose(setup: Setup, memory: int | None, tokens: int) -> Strategy:
    """What `auto` comes to: single for one process, DDP where GPUs of `memory` bytes surely hold it, else FSDP.

    On CPUs everything is taken to fit. `memory` is None there, and where the GPUs are not known.
    """
    if setup.offload:
        return Strategy.fsdp
    if setup.world == 1:
        return Strategy.single
    whole = memory is not None and fits(setup, Strategy.ddp, memory, tokens) if setup.on_gpu else True
    return Strategy.ddp if whole else Strategy.fsdp


def _possible(setup: Setup) -> Iterator[Strategy]:
    """Strategies for so many processes. To divide among one gains nothing, unless what is divided leaves the device."""
    if not setup.offload:
        yield Strategy.single if setup.world == 1 else Strategy.ddp
    if setup.offload or setup.world > 1:
        yield from _DIVIDING


def _share(size: int, setup: Setup, strategy: Strategy) -> int:
    """A process's part of what belongs to trained weights, in bytes; the last one's may be smaller."""
    return -(-size // setup.world) if strategy in _DIVIDING else size


def _stored(setup: Setup, strategy: Strategy) -> dict[str, int]:
    """Bytes of a process that stay from step to step, wherever they lie."""
    weights = (setup.width if strategy in _DEEPSPEED else 4) * setup.shape.parameters
    # ZeRO-2 clones its share; ZeRO-3 in fp32 has it, if it need not leave (stage3.py, _create_fp32_partitions).
    masters = strategy is Strategy.zero2 or (strategy is Strategy.zero3 and (setup.bf16 or setup.offload))
    return {
        "weights": weights if strategy is Strategy.zero2 else _share(weights, setup, strategy),
        "masters": _share(4 * setup.trained, setup, strategy) if masters else 0,
        "gradients": _share(4 * setup.trained, setup, strategy),  # at most: DeepSpeed's default is the weights' type
        "optimizer": _share(_state_bytes(setup), setup, strategy),
    }


def _buckets(setup: Setup, strategy: Strategy) -> int:
    """Bytes of buffers in which gradients travel, for as long as the run lasts."""
    if strategy is Strategy.ddp:
        return 4 * setup.trained  # what torch says that gradient_as_bucket_view would save
    count = {Strategy.zero2: 2, Strategy.zero3: 1}.get(strategy, 0)  # ZeRO-2 has a second for overlap_comm
    return count * setup.width * _BUCKET


def _passing(setup: Setup, strategy: Strategy) -> int:
    """Bytes of weights made whole or cast for a micro-batch, and of gradients before they are where they are kept."""
    shape, trained, width = setup.shape, setup.trained, setup.width
    layer_gradient, head_gradient = min(trained, shape.layer), min(trained, shape.head)
    if strategy is Strategy.fsdp:
        # A layer, the next one, and the buffer that the last came in: wait_for_unshard in torch's _fsdp_param_group.py.
        # The head stays gathered: reshard_after_forward=False of the tail in accelerate's fsdp_utils.py.
        gathered = width * (3 * shape.layer + shape.head)
        return gathered + (width + 4) * layer_gradient + width * head_gradient  # + 4: reduced in float32
    if strategy is Strategy.zero3:
        return width * (min(shape.parameters, _LIVE + shape.head) + head_gradient)
    if strategy is Strategy.zero2:
        # This process's share of a micro-batch's gradients; or a buffer for the largest one on its way to the host.
        own = head_gradient if setup.offload else _share(trained, setup, strategy)
        return width * (own + head_gradient)
    if not setup.bf16:
        return 0
    # Autocast keeps the copies of trained weights until the forward ends, and autograd those that no layer makes again.
    all_kept = trained == shape.parameters or not setup.checkpointing
    return 2 * (shape.parameters if all_kept else shape.layer + shape.head)


def _step(setup: Setup, strategy: Strategy) -> int:
    """Bytes of copies for the optimizer's step: at most one of the gradients, or of the moments."""
    # DeepSpeed makes one tensor of its gradients (`step` of stage_1_and_2.py). torch's foreach, its choice on a GPU,
    # takes all square roots at once (_foreach_sqrt in torch/optim/adam.py); fused kernels and bitsandbytes' do not.
    in_place = any(word in setup.optimizer for word in ("fused", "8bit", "32bit", "bnb"))
    copies = strategy in _DEEPSPEED or (setup.on_gpu and not in_place)
    return _share(4 * setup.trained, setup, strategy) if copies and not setup.offload else 0


def _host_buffers(setup: Setup, strategy: Strategy) -> int:
    """Bytes on the host besides what leaves the device."""
    if not setup.offload or strategy is Strategy.fsdp:
        return 0
    # DeepSpeed sums gradients up in one buffer and steps on another; ZeRO-2's weights return through a third.
    size = 4 + (setup.width if strategy is Strategy.zero2 else 0)
    return _share(size * setup.trained, setup, strategy)


def _state_bytes(setup: Setup) -> int:
    """Optimizer state of all trained weights; Adam's for a name that nobody knows."""
    name, trained = setup.optimizer, setup.trained
    moments = next((count for family, count in _MOMENTS.items() if family in name), 2)
    # An 8-bit optimizer keeps the embedding's in float32 (transformers/trainer.py, register_module_override).
    in_8_bit = max(0, trained - setup.shape.head) if "8bit" in name else 0
    return moments * (4 * (trained - in_8_bit) + in_8_bit)


def setup(cfg: RunConfig, start: Start, cluster: Cluster) -> Setup:
    """What of a run decides its memory."""
    of_model = shape(cfg.model, start)
    return Setup(
        shape=of_model,
        trained=of_model.parameters // (100 if cfg.model.lora else 1),  # an adapter is about a hundredth
        optimizer=str(cfg.optimizer.get("optim", "adamw_torch")),
        bf16=cluster.bf16,
        checkpointing=cfg.engine.gradient_checkpointing,
        on_gpu=cluster.device == "cuda",
        world=cluster.world,
        offload=cluster.offload,
    )


def settle_strategy(cfg: RunConfig, start: Start, cluster: Cluster, longest: int) -> Cluster:
    """The fleet with its strategy chosen where that is left to us; `longest` is the tokens of the longest pair."""
    if cluster.strategy is not Strategy.auto:
        return cluster
    chosen = choose(setup(cfg, start, cluster), cluster.memory, longest)
    return replace(cluster, strategy=chosen)


def too_large(cfg: RunConfig, start: Start, cluster: Cluster, longest: int) -> str | None:
    """A warning, if the GPUs will probably not hold the run; `longest` is the tokens of the longest pair."""
    made = setup(cfg, start, cluster)
    if cluster.memory is None or fits(made, cluster.strategy, cluster.memory, longest):
        return None
    needed = need(made, cluster.strategy, longest).total / GIB
    others = [name.value for name in which_fit(made, cluster.memory, longest)]
    remedy = f"cluster.strategy={others[0]} would" if others else "try cluster.offload=true, more GPUs, or model.lora"
    return (
        f"a GPU would need {needed:.0f} GiB by cluster.strategy={cluster.strategy.value} and has {cluster.memory / GIB:.0f}: "
        f"this run will probably not fit; {remedy}"
    )


def micro_batch_that_fits(cfg: RunConfig, start: Start, pairs: Pairs, cluster: Cluster) -> int:
    """Tokens of a micro-batch that a process of the fleet holds, by arithmetic; on a CPU a fixed number."""
    if cluster.memory is None:
        return CPU_TOKENS
    fitting = tokens_that_fit(setup(cfg, start, cluster), cluster.strategy, cluster.memory)
    return max(longest_pair(cfg, pairs), min(ENOUGH_TOKENS, fitting))


def longest_pair(cfg: RunConfig, pairs: Pairs) -> int:
    """Tokens of the longest pair: what a micro-batch must hold at least."""
    return max(fed_tokens([pair], cfg.engine.layout) for pair in pair_lengths(pairs.train))


def shape(cfg: ModelConfig, start: Start) -> Shape:
    """The model's measures, as far as memory asks: `model.shape` where it says them, else by its config.json."""
    said = dict(cfg.shape)
    known = {field.name for field in fields(Shape)}
    if unknown := said.keys() - known:
        raise UserError(f"unknown key model.shape.{min(unknown)}; model.shape has {', '.join(sorted(known))}")
    if not known <= said.keys():
        try:
            config = AutoConfig.from_pretrained(
                start.path, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model.path={start.path} has no usable config.json: {reason}") from error
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=cfg.trust_remote_code)
        text = config.get_text_config()
        said = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": text.num_hidden_layers,
            "hidden": text.hidden_size,
            "vocabulary": model.get_input_embeddings().num_embeddings,
            **said,
        }
    return Shape(**said)
