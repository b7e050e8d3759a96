"""Plans of machines that are not here: micro-batches, memory of a device, what would fit; without GPU, hub or network."""

import pytest
from conftest import pair_row, write_jsonl


@pytest.fixture
def many(tmp_path):
    """300 pairs with a prompt held out here and there."""
    return write_jsonl(tmp_path / "many.jsonl", [pair_row(i) for i in range(300)])


def plan(align, pairs, *words):
    result = align("objective=wpo", "plan=true", "dataset=local", f"dataset.path={pairs}", *words)
    assert result.status == 0, result.err
    return {line[:12].strip(): line[12:] for line in result.out.splitlines()}, result


def gib(text: str) -> float:
    return float(text.split(" GiB")[0])


def test_the_published_run_is_planned_for_eight_gpus_without_any_and_without_the_hub(align, many):
    lines, result = plan(align, many, "model=gemma2_9b", "cluster=h100x8")
    # 2 epochs of 128 pairs a step (FACTS, WPO-HB); about 285 of the 300 pairs are not held out: 3 steps an epoch.
    assert lines["steps"].startswith("6 of 128 pairs (3 an epoch)")
    assert lines["processes"] == "8 on cuda, fsdp, bf16"
    assert lines["a step"].startswith("16 pairs a process, in 1.0 micro-batches")  # 128 / 8
    assert lines["would fit"] == "fsdp, zero2, zero3"
    # 9.24e9 weights: (4 weights + 4 gradients + 8 AdamW) / 8 processes = 17.2 GiB, and what passes through.
    assert 20 < gib(lines["memory"]) < 60 and "of 80 a process: weights 4.3, gradients 4.3" in lines["memory"]
    assert "34.4 GiB of host memory while the model loads" in lines["memory"]  # 4 x 9.24e9
    assert "cannot be had from the hub" in result.out and "built-in tokenizer" in result.out


def test_a_plan_for_a_gpu_that_is_too_small_warns_and_names_what_would_fit(align, many):
    with pytest.warns(UserWarning, match=r"172 GiB by cluster.strategy=single and has 80: .*cluster.offload=true"):
        lines, _ = plan(align, many, "model=gemma2_9b", "cluster=gpu_1", "cluster.gpu_memory_gib=80")
    assert lines["would fit"] == "no strategy"
    with pytest.warns(UserWarning, match=r"by cluster.strategy=ddp and has 80: .*cluster.strategy=fsdp would"):
        plan(align, many, "model=gemma2_9b", "cluster=h100x8", "cluster.strategy=ddp")


@pytest.mark.parametrize("model, strategy", [("gemma2_2b", "ddp"), ("gemma2_9b", "fsdp")])
def test_auto_shares_out_what_a_gpu_cannot_hold_and_only_that(align, many, model, strategy):
    lines, _ = plan(align, many, f"model={model}", "cluster=gpus_8", "cluster.gpu_memory_gib=80")
    assert lines["processes"] == f"8 on cuda, {strategy}, bf16"


def test_offload_moves_the_optimizer_to_the_host_so_that_one_gpu_holds_nine_billion(align, many):
    lines, _ = plan(
        align, many, "model=gemma2_9b", "cluster=gpu_1", "cluster.gpu_memory_gib=80", "cluster.offload=true"
    )
    assert lines["processes"] == "1 on cuda, fsdp, offload, bf16" and "GiB in host memory" in lines["memory"]


def test_more_pairs_a_process_than_fit_become_micro_batches(align, tmp_path):
    words = "please tell me about the bear " * 40
    long = [pair_row(i, prompt=[{"role": "user", "content": f"{i} {words}"}]) for i in range(140)]
    pairs = write_jsonl(tmp_path / "long.jsonl", long)
    lines, _ = plan(
        align, pairs, "model=gemma2_9b", "cluster=h100x8", "engine.tokens_per_micro_batch=1024", "model.tokenizer=null"
    )
    in_micro_batches = float(lines["a step"].split(" in ")[1].split(" ")[0])
    assert in_micro_batches > 2


def test_a_batch_job_is_planned_with_its_nodes(align, many):
    lines, _ = plan(align, many, "model=gemma2_9b", "cluster=slurm_2x8")
    assert lines["processes"] == "2 nodes x 8 on cuda, fsdp, bf16"
    assert lines["a step"].startswith("8 pairs a process")


def test_a_plan_of_a_model_that_is_here_needs_no_shape(align, tiny_llama, many):
    lines, _ = plan(align, many, "model=local", f"model.path={tiny_llama}", "cluster=cpu_2", "train.pairs_per_step=8")
    assert "(0.1M weights)" in lines["memory"] and "would fit" not in lines
