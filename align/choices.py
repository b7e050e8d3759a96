"""The choices of knobs that take one of a few words, with what each word means."""

from enum import Enum


class ResponseMask(Enum):
    """Which tokens are scored as the response (FACTS: SimPO's code scores the header, TRL and most others do not)."""

    completion = "completion"  # what the model would generate: the content and the end-of-turn token
    with_header = "with_header"  # also the header that opens the assistant's turn


class Truncation(Enum):
    """What becomes of a pair whose prompt and longer response exceed `max_length`."""

    papers = "papers"  # trl 0.9.6: keep the prompt's last tokens, then cut both responses
    drop = "drop"  # leave the pair out, and count it


class SystemMessage(Enum):
    """How a system message reaches the chat template."""

    template = "template"  # as a system turn; the template must know that role
    merge = "merge"  # in front of the first user turn, for templates without a system role (Gemma)


class Layout(Enum):
    """How prompts and responses are fed (align/engine/layout.py); each serves more models and feeds more than the one above."""

    shared = "shared"  # one row without padding, a prompt once per pair
    packed = "packed"  # one row without padding, a prompt with each response
    padded = "padded"  # a row per response


class Device(Enum):
    """What a process computes on."""

    auto = "auto"  # a GPU where there is one, else the CPU
    cpu = "cpu"
    gpu = "gpu"  # refused where there is none


class Strategy(Enum):
    """What the processes of a run share out among them; the results differ by rounding only."""

    auto = "auto"  # single for one process; ddp where a device can hold all of it, else fsdp
    single = "single"  # one process
    ddp = "ddp"  # pairs: each process holds weights, gradients and optimizer
    fsdp = "fsdp"  # pairs, weights, gradients and optimizer: torch's FSDP2
    zero2 = "zero2"  # pairs, gradients and optimizer: DeepSpeed
    zero3 = "zero3"  # pairs, weights, gradients and optimizer: DeepSpeed


class Launcher(Enum):
    """Who starts the processes. Inside torchrun, accelerate launch or srun nobody does: they are there."""

    local = "local"  # this machine, at once
    slurm = "slurm"  # the batch system: `python -m align` submits and returns


class Precision(Enum):
    """What forwards compute in; weights are float32."""

    auto = "auto"  # bf16 on a GPU that has it, else fp32
    bf16 = "bf16"  # bf16 autocast over float32 master weights
    fp32 = "fp32"


class Source(Enum):
    """Where the pairs come from."""

    dataset = "dataset"  # they are the dataset's own
    selfplay = "selfplay"  # the policy answers the dataset's prompts, a scorer says which answers are better


class Backend(Enum):
    """Who draws the responses."""

    hf = "hf"  # the policy in this process, by transformers
    vllm = "vllm"  # vLLM in this process
    openai = "openai"  # servers at `urls`


class Rejected(Enum):
    """Which candidate is rejected."""

    worst = "worst"  # the lowest score
    random = "random"  # any whose text is not the chosen one's


class WinProb(Enum):
    """What the win probability of a response is taken against."""

    all = "all"  # the policy's samples, itself included: SPPO's soft target
    pair = "pair"  # the other of the pair


class TrackerName(Enum):
    """Where metrics go besides metrics.jsonl."""

    wandb = "wandb"
    trackio = "trackio"
    tensorboard = "tensorboard"
    none = "none"


class TrackerMode(Enum):
    """wandb only."""

    auto = "auto"  # online with a key, else offline
    online = "online"
    offline = "offline"
