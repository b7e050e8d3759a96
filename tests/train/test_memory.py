"""What a process holds in training: worked by hand, counted in torch and DeepSpeed, and the facts that decide."""

from dataclasses import asdict, replace

import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from align.choices import Strategy
from align.engine import head
from align.train import memory
from align.train.memory import Setup, Shape, choose, fits, need, tokens_that_fit, which_fit

SINGLE, DDP, FSDP = Strategy.single, Strategy.ddp, Strategy.fsdp
ZERO2, ZERO3 = Strategy.zero2, Strategy.zero3
DIVIDING = [FSDP, ZERO2, ZERO3]
GB = 10**9
M = 10**6

# 10 layers of 90M weights, and 100M in the head, 100000 x 1000.
BILLION = Shape(parameters=1000 * M, layers=10, hidden=1000, vocabulary=100_000)
FULL = Setup(
    shape=BILLION, trained=1000 * M, optimizer="adamw_torch", bf16=True, checkpointing=True, on_gpu=True, world=4
)
ALONE = replace(FULL, world=1)
ADAPTER = replace(FULL, trained=10 * M)


def hub_model(name: str, **changes) -> Setup:
    shape = Shape(**yaml.safe_load((ROOT / f"conf/model/{name}.yaml").read_text())["shape"])
    setup = replace(FULL, shape=shape, trained=shape.parameters, world=8)
    return replace(setup, **changes)


GEMMA = hub_model("gemma2_9b")


def millions(needed: memory.Need) -> dict[str, float]:
    return {name: size / M for name, size in asdict(needed).items() if size}


# By hand ------------------------------------------------------------------------------------------------------------

# Of 1000 tokens, the same by every strategy: 10 bytes for each of 1000 x 100000 logits, which a tile of 2**27 can hold,
# and 4 for each gradient of the head; 85 bytes in the layer that lives and 4 in each of 10 residuals.
TOKENS = {"head": 10 * 100 + 4 * 100, "activations": 85 + 40}


@pytest.mark.parametrize(
    "setup, strategy, expected, total",
    [
        # Casts of all weights to 2 bytes; but the square roots that AdamW takes are more, when those are gone.
        (ALONE, SINGLE, {"weights": 4000, "gradients": 4000, "optimizer": 8000, "passing": 2000, "step": 4000}, 20_000),
        # The same, and the buckets.
        (
            FULL,
            DDP,
            {"weights": 4000, "gradients": 4000, "optimizer": 8000, "buckets": 4000, "passing": 2000, "step": 4000},
            24_000,
        ),
        # A quarter. 3 layers and the head gathered, 2 * 370; gradients: a layer's in 2 and 4 bytes, the head's in 2.
        (FULL, FSDP, {"weights": 1000, "gradients": 1000, "optimizer": 2000, "passing": 1480, "step": 1000}, 7005),
        # 2 bytes of each weight and 4 of a quarter; 2 buckets of 500M; gradients: a quarter's and the head's in 2.
        (
            FULL,
            ZERO2,
            {"weights": 3000, "gradients": 1000, "optimizer": 2000, "buckets": 2000, "passing": 700, "step": 1000},
            10_225,
        ),
        # 2 + 4 bytes of a quarter; one bucket; all of a billion weights may be alive, and the head's gradient.
        (
            FULL,
            ZERO3,
            {"weights": 1500, "gradients": 1000, "optimizer": 2000, "buckets": 1000, "passing": 2200, "step": 1000},
            9225,
        ),
    ],
    ids=lambda value: value.value if isinstance(value, Strategy) else "",
)
def test_a_billion_weights_on_four_gpus_take_in_megabytes_what_a_hand_counts(setup, strategy, expected, total):
    needed = need(setup, strategy, 1000)
    assert millions(needed) == TOKENS | expected
    assert needed.total == total * M


@pytest.mark.parametrize(
    "strategy, weights, passing",
    [
        (SINGLE, 4000, 0),  # nothing is cast
        (FSDP, 1000, 4 * 370 + 8 * 90 + 4 * 100),
        (ZERO2, 4000 + 1000, 4 * (250 + 100)),
        (ZERO3, 1000, 4 * (1000 + 100)),  # the shares are the master weights
    ],
)
def test_in_float32_copies_are_twice_as_wide_or_not_made(strategy, weights, passing):
    setup = replace(ALONE if strategy is SINGLE else FULL, bf16=False)
    found = millions(need(setup, strategy, 1000))
    assert (found["weights"], found.get("passing", 0)) == (weights, passing)
    assert found["activations"] == 129 + 40


@pytest.mark.parametrize(
    "strategy, on_device, on_host",
    [
        (FSDP, {"passing": 1480}, 1000 + 1000 + 2000),
        # Masters, gradients in two buffers, state and the way back; the device keeps 2 bytes a weight.
        (ZERO2, {"weights": 2000, "buckets": 2000, "passing": 400}, 1000 + 2 * 1000 + 2000 + 500),
        (ZERO3, {"buckets": 1000, "passing": 2200}, 500 + 1000 + 2 * 1000 + 2000),
    ],
)
def test_offload_moves_what_a_process_keeps_to_the_host(strategy, on_device, on_host):
    assert millions(need(replace(FULL, offload=True), strategy, 1000)) == TOKENS | on_device | {"host": on_host}


def test_a_frozen_weight_has_neither_gradient_nor_state():
    needed = millions(need(replace(ADAPTER, world=1), SINGLE, 1000))
    assert (needed["weights"], needed["gradients"], needed["optimizer"], needed["step"]) == (4000, 40, 80, 40)
    assert needed["passing"] == 2 * (90 + 100)  # casts of a layer at a time, and of the head
    assert needed["head"] == 1000 + 40  # at most the adapter's weights are the head's
    without = need(replace(ADAPTER, world=1, checkpointing=False), SINGLE, 1000)
    assert without.passing == 2000 * M  # every layer keeps its casts for the backward
    assert without.activations == 850 * M  # 10 layers of 85 bytes


def test_a_tile_bounds_the_head_however_many_the_tokens():
    assert need(FULL, FSDP, 10**6).head == 10 * 2**27 + 400 * M
    assert need(replace(FULL, on_gpu=False), FSDP, 10**6).head == 10 * 2**19 + 400 * M


# What the constants stand for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, made",
    [
        ("adamw_torch", torch.optim.AdamW),
        ("adamw_torch_fused", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
        ("adagrad", torch.optim.Adagrad),
        ("sgd", torch.optim.SGD),
    ],
)
def test_the_state_of_torchs_optimizers_is_as_large_as_counted(name, made):
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones(1000)
    optimizer = made([weight], lr=0.1)
    optimizer.step()
    kept = sum(v.nbytes for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.numel() == 1000)
    assert need(replace(ALONE, optimizer=name), SINGLE, 1).optimizer == kept / 1000 * 1000 * M


@pytest.mark.parametrize(
    "name, megabytes",
    [
        ("adafactor", 0),
        ("lion_32bit", 4000),
        ("lion_8bit", 900 + 400),  # 100M weights of the embedding stay in float32
        ("adamw_bnb_8bit", 2 * (900 + 400)),
        ("ademamix", 12_000),
        ("apollo_adamw", 8000),
        ("lomo", 8000),  # not known: as Adam
    ],
)
def test_the_state_of_other_optimizers_goes_by_their_moments_and_bits(name, megabytes):
    assert need(replace(ALONE, optimizer=name), SINGLE, 1).optimizer == megabytes * M


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_bnb_8bit", "paged_lion_32bit"])
def test_a_fused_step_copies_nothing_except_that_deepspeed_flattens_its_gradients(name):
    assert need(replace(FULL, optimizer=name), FSDP, 1).step == 0
    assert need(replace(FULL, optimizer=name), ZERO2, 1).step == 1000 * M


def test_the_tiles_are_those_of_the_engine():
    assert {True: head._TILE["cuda"], False: head._TILE["cpu"]} == memory._TILE_LOGITS


def test_buckets_and_live_weights_are_deepspeeds_defaults():
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig()
    assert (config.reduce_bucket_size, config.max_live_parameters) == (memory._BUCKET, memory._LIVE)


# An eighth of the published widths; the vocabulary does not matter.
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
PROPORTIONS = {
    kind: dict(zip(WIDTHS, sizes, strict=True))
    for kind, sizes in {
        "llama": (512, 1792, 32, 8, 16),
        "gemma2": (448, 1792, 16, 8, 32),
        "qwen3": (128, 384, 16, 8, 16),
    }.items()
}


def kept_by_autograd(kind: str, layers: int, tokens: int, bf16: bool, checkpointing: bool) -> tuple[int, float]:
    """Bytes kept for the backward of one row: (activations, casts for each weight of a layer)."""
    config = AutoConfig.for_model(kind, vocab_size=64, num_hidden_layers=layers, **PROPORTIONS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    weights = list(model.parameters())
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    shapes = {size for weight in weights if weight.dim() == 2 for size in (weight.shape, weight.shape[::-1])}
    activations: dict[int, int] = {}
    casts: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            (casts if tensor.shape in shapes else activations)[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=bf16):
        last = model.model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
    del last
    return sum(activations.values()), sum(casts.values()) / sum(p.numel() for p in model.model.layers.parameters())


def bytes_a_layer(kind: str, bf16: bool, checkpointing: bool) -> tuple[float, float]:
    """(Per token and hidden unit, without what grows with the square of the tokens; casts for each weight)."""
    rates = []
    for tokens in (96, 192):
        one, three = (kept_by_autograd(kind, layers, tokens, bf16, checkpointing) for layers in (1, 3))
        rates.append((three[0] - one[0]) / 2 / tokens / PROPORTIONS[kind]["hidden_size"])
    return 2 * rates[0] - rates[1], three[1]


@pytest.mark.slow
def test_autograd_keeps_of_a_layer_what_was_counted():
    counted = {True: {"llama": 62, "gemma2": 83, "qwen3": 85}, False: {"llama": 96, "gemma2": 123, "qwen3": 129}}
    for bf16, rates in counted.items():
        found = {kind: bytes_a_layer(kind, bf16, checkpointing=False) for kind in PROPORTIONS}
        assert {kind: rate for kind, (rate, _) in found.items()} == pytest.approx(rates, abs=1)
        assert max(rates.values()) == memory._LAYER_BYTES[bf16]
        assert [casts for _, casts in found.values()] == pytest.approx([2.0 * bf16] * 3, abs=0.01)  # autocast's copies
    assert bytes_a_layer("llama", bf16=True, checkpointing=True) == (pytest.approx(memory._RESIDUAL_BYTES, abs=0.1), 0)


# What holds for every setup -----------------------------------------------------------------------------------------


def made_setup(layers: int, hidden: int, vocabulary: int, squares: int, adapter: bool, **rest) -> Setup:
    parameters = vocabulary * hidden + layers * squares * hidden**2
    shape = Shape(parameters=parameters, layers=layers, hidden=hidden, vocabulary=vocabulary)
    return Setup(shape=shape, trained=parameters // 200 + 1 if adapter else parameters, **rest)


setups = st.builds(
    made_setup,
    layers=st.integers(1, 80),
    hidden=st.integers(16, 8192),
    vocabulary=st.integers(100, 300_000),
    squares=st.integers(4, 16),
    adapter=st.booleans(),
    optimizer=st.sampled_from(["adamw_torch", "adamw_torch_fused", "rmsprop", "adamw_bnb_8bit"]),
    bf16=st.booleans(),
    checkpointing=st.booleans(),
    on_gpu=st.booleans(),
    world=st.integers(1, 64),
)


@settings(deadline=None)  # a machine may be busy
@given(setups, st.sampled_from(DIVIDING), st.booleans(), st.integers(0, 50_000))
def test_more_processes_never_need_more_of_each(setup, strategy, offload, tokens):
    fewer = need(replace(setup, offload=offload), strategy, tokens)
    more = need(replace(setup, offload=offload, world=setup.world + 1), strategy, tokens)
    assert more.total <= fewer.total
    assert more.host <= fewer.host


@settings(deadline=None)  # a machine may be busy
@given(setups, st.sampled_from([SINGLE, DDP, *DIVIDING]), st.integers(0, 50_000))
def test_an_adapter_and_fewer_tokens_never_need_more(setup, strategy, tokens):
    needed = need(setup, strategy, tokens).total
    assert need(replace(setup, trained=setup.trained // 2), strategy, tokens).total <= needed
    assert need(setup, strategy, tokens // 2).total <= needed


@settings(deadline=None)  # a machine may be busy
@given(setups, st.sampled_from([FSDP, ZERO3]), st.integers(0, 50_000))
def test_offload_frees_the_device_at_the_cost_of_the_host(setup, strategy, tokens):
    here, away = need(setup, strategy, tokens), need(replace(setup, offload=True), strategy, tokens)
    kept = here.weights + here.gradients + here.optimizer
    assert here.host == 0 and away.host >= kept
    assert away.weights + away.gradients + away.optimizer == 0 and away.total <= here.total


@settings(deadline=None)  # a machine may be busy
@given(setups, st.sampled_from([SINGLE, DDP, *DIVIDING]), st.integers(1, 200 * GB))
def test_the_tokens_that_fit_are_the_most_that_fit(setup, strategy, size):
    most = tokens_that_fit(setup, strategy, size)
    assert 0 <= most <= memory.MOST_TOKENS
    assert most == 0 or fits(setup, strategy, size, most)
    assert most == memory.MOST_TOKENS or not fits(setup, strategy, size, most + 1)


def test_memory_of_exactly_the_need_holds_exactly_these_tokens():
    size = -(-need(GEMMA, FSDP, 4096).total * 100 // 85)  # 15% stay free
    assert tokens_that_fit(GEMMA, FSDP, size) == 4096
    assert tokens_that_fit(GEMMA, FSDP, 10 * GB) == 0


# The facts that decide ----------------------------------------------------------------------------------------------


def test_nine_billion_weights_on_eight_gpus_of_80_gb_must_be_divided():
    assert which_fit(GEMMA, 80 * GB, 4096) == [FSDP, ZERO2, ZERO3]
    assert choose(GEMMA, 80 * GB, 4096) is FSDP
    assert need(GEMMA, DDP, 0).total > 20 * GEMMA.shape.parameters  # weights, gradients, buckets, two moments: 4 each
    stays = 16 * GEMMA.shape.parameters / 8  # 18.5 GB
    assert stays < need(GEMMA, FSDP, 4096).total < stays + 16 * GB


def test_nine_billion_weights_fit_one_gpu_of_80_gb_with_an_adapter_or_the_hosts_memory_alone():
    alone = hub_model("gemma2_9b", world=1)
    assert which_fit(alone, 80 * GB, 1) == []
    assert which_fit(replace(alone, trained=54 * M), 80 * GB, 4096) == [SINGLE]  # r=16 in all linear layers
    assert which_fit(replace(alone, offload=True), 80 * GB, 4096) == DIVIDING
    assert need(replace(alone, offload=True), FSDP, 4096).host == 16 * alone.shape.parameters  # 148 GB


def test_two_billion_weights_on_eight_gpus_of_80_gb_need_not_be_divided():
    assert choose(hub_model("gemma2_2b"), 80 * GB, 4096) is DDP
    assert choose(hub_model("gemma2_2b"), 40 * GB, 4096) is FSDP


def test_auto_is_single_for_one_process_ddp_on_cpus_and_fsdp_with_offload():
    assert choose(hub_model("gemma2_9b", world=1), 80 * GB, 4096) is SINGLE
    assert choose(hub_model("gemma2_9b", world=2, on_gpu=False, bf16=False), None, 4096) is DDP
    assert choose(replace(FULL, offload=True), 80 * GB, 4096) is FSDP


def test_auto_does_not_trust_gpus_that_it_does_not_know():
    assert choose(hub_model("gemma2_2b"), None, 4096) is FSDP


MODELS = sorted((ROOT / "conf/model").glob("*.yaml"))
HUB = [file.stem for file in MODELS if "path" in yaml.safe_load(file.read_text())]


@pytest.mark.parametrize("name", HUB)
def test_the_shape_of_a_hub_model_leaves_its_layers_12_hidden_squares_or_more(name):
    # 4 of attention and 8 of an MLP in GPT (arXiv 2001.08361, section 2.1); gates make it more, fewer key heads less.
    shape = hub_model(name).shape
    assert 12 <= shape.layer / shape.hidden**2 <= 16
