"""Words that knobs take, and their meaning."""

from enum import Enum


class ResponseMask(Enum):
    """Tokens that are scored as the response. SimPO's code scores the header; TRL and most others do not."""

    completion = "completion"  # those that the model would generate: the content and the end-of-turn token
    with_header = "with_header"  # also the header that opens the assistant's turn


class Truncation(Enum):
    """Treatment of a pair whose prompt and longer response exceed `max_length`."""

    papers = "papers"  # trl 0.9.6: keep the prompt's last tokens, then cut both responses
    drop = "drop"  # leave the pair out, and count it


class SystemMessage(Enum):
    """Place of a system message in the chat template."""

    template = "template"  # as a system turn; the template must know that role
    merge = "merge"  # in front of the first user turn, for templates without a system role (Gemma)


class Layout(Enum):
    """Arrangement of a batch; each serves more models than the one above it, and feeds more tokens."""

    shared = "shared"  # one row without padding, a prompt once per pair
    packed = "packed"  # one row without padding, a prompt with each response
    padded = "padded"  # a row per response


class Device(Enum):
    """Device of a process."""

    auto = "auto"  # a GPU if there is one, else the CPU
    cpu = "cpu"
    gpu = "gpu"  # an error if there is none


class Strategy(Enum):
    """Division of a run among its processes; results differ by rounding only."""

    auto = "auto"  # single for one process; ddp if a device can hold everything, else fsdp
    single = "single"  # one process
    ddp = "ddp"  # divides pairs: each process holds weights, gradients and optimizer
    fsdp = "fsdp"  # divides pairs, weights, gradients and optimizer: torch's FSDP2
    zero2 = "zero2"  # divides pairs, gradients and optimizer: DeepSpeed
    zero3 = "zero3"  # divides pairs, weights, gradients and optimizer: DeepSpeed


class Launcher(Enum):
    """Start of the processes. Inside torchrun, accelerate launch or srun they are running already."""

    local = "local"  # this machine, at once
    slurm = "slurm"  # the batch system: `python -m align` submits and returns


class Precision(Enum):
    """Numbers that forwards compute in; weights are float32."""

    auto = "auto"  # bf16 on a GPU that has it, else fp32
    bf16 = "bf16"  # bf16 autocast over float32 master weights
    fp32 = "fp32"


class Source(Enum):
    """Origin of the pairs."""

    dataset = "dataset"  # the dataset holds them
    selfplay = "selfplay"  # the policy answers the dataset's prompts, a scorer says which answers are better


class Backend(Enum):
    """Program that samples the responses."""

    hf = "hf"  # the policy in this process, by transformers
    vllm = "vllm"  # vLLM in this process
    openai = "openai"  # servers at `urls`


class Rejected(Enum):
    """Choice of the rejected candidate."""

    worst = "worst"  # the one with the lowest score
    random = "random"  # any one whose text differs from the chosen


class WinProb(Enum):
    """Opponents in the win probability of a response."""

    all = "all"  # the policy's samples, itself included: SPPO's soft target
    pair = "pair"  # the other response of the pair


class TrackerName(Enum):
    """Destination of metrics besides metrics.jsonl."""

    wandb = "wandb"
    trackio = "trackio"
    tensorboard = "tensorboard"
    none = "none"


class TrackerMode(Enum):
    """Mode of wandb."""

    auto = "auto"  # online with a key, else offline
    online = "online"
    offline = "offline"
