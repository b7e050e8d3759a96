"""What the libraries are told: precision under FSDP2, DeepSpeed's settings, and strategies that cannot work."""

import pytest
import torch
from conftest import make_tiny
from oracle import group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from align import engine
from align.choices import Layout, Strategy
from align.launch import strategy
from align.launch.rank import Cluster, Rank
from align.say import UserError


def place(which: Strategy, bf16: bool = True, **more) -> Rank:
    return Rank(device=torch.device("cpu"), bf16=bf16, number=0, world=1, strategy=which, **more)


@pytest.fixture
def one_rank(tmp_path):
    """A process group of one, as FSDP2 asks for."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_under_fsdp_in_bf16_statistics_and_gradients_stay_float32(kind, one_rank):
    """accelerate's own policy casts outputs: a sum of log-probabilities near -50 would be rounded to a quarter."""
    policy = make_tiny(kind, vocab_size=128)
    engine.attach(policy, Layout.shared)
    batch = engine.collate([group(9, 5, 7), group(4, 3, 8)], Layout.shared, 0)
    exact = engine.response_statistics(policy, batch, ["log_sum_sq"])
    here = place(Strategy.fsdp)
    with here.autocast():
        autocast = engine.response_statistics(policy, batch, ["log_sum_sq"])
    for part in [*policy.model.layers, policy]:
        fully_shard(part, mesh=one_rank, mp_policy=strategy.precision_of_fsdp(here))
    with here.autocast():
        sharded = engine.response_statistics(policy, batch, ["log_sum_sq"])
    for name, values in sharded.items():
        assert values.dtype == torch.float32
        # no worse than bf16 autocast, give or take the residual stream, which is bf16 here and float32 there
        assert (values - exact[name]).abs().max() <= 3 * (autocast[name] - exact[name]).abs().max() + 1e-4, name
    sharded["logp"].sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in policy.parameters())


def test_deepspeed_sums_micro_batches_in_float32_and_clips_as_the_others_do():
    made = strategy.deepspeed_config(place(Strategy.zero3, offload=True), clip=0.5)
    assert made["data_types"] == {"grad_accum_dtype": "fp32"} and made["bf16"] == {"enabled": True}
    assert made["gradient_clipping"] == 0.5 and made["gradient_accumulation_steps"] == 1
    zero = made["zero_optimization"]
    assert zero["stage"] == 3 and {zero["offload_optimizer"]["device"], zero["offload_param"]["device"]} == {"cpu"}
    two = strategy.deepspeed_config(place(Strategy.zero2, offload=True), clip=1.0)
    assert two["zero_optimization"]["stage"] == 2 and "offload_param" not in two["zero_optimization"]


def test_an_absent_deepspeed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(strategy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"zero2 needs deepspeed: pip install deepspeed, or use cluster.strategy=fsdp"):
        strategy.check(Cluster(device="cuda", per_node=2, strategy=Strategy.zero2))
    strategy.check(Cluster(device="cuda", per_node=2, strategy=Strategy.fsdp))


def test_what_decides_rounding_is_part_of_the_references_key():
    names = {which: place(which).numerics for which in Strategy if which is not Strategy.auto}
    assert names[Strategy.single] == names[Strategy.ddp] == "bf16 autocast"
    assert names[Strategy.fsdp] == names[Strategy.zero2] == names[Strategy.zero3] == "bf16 weights"
    assert place(Strategy.fsdp, bf16=False).numerics == "fp32"
