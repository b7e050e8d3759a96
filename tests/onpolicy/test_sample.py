"""Samplers keep one contract, whatever the backend; the stage shares its work, survives kill -9, and mixes nothing."""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny, save_tiny
from sampling import RANK, policy_of, sample_by
from transformers import AutoModelForCausalLM, AutoTokenizer

from align import engine
from align.choices import Backend, Layout
from align.config import RunConfig, SamplingConfig, check_node
from align.data.prompts import Candidate, PromptRow
from align.model.chat import prompt_ids, stop_token_ids
from align.onpolicy.sample import answering_cluster, read_samples, sample_from
from align.onpolicy.samplers import Prompt, Sample, hf_sampler, openai_sampler, seeds, servers, vllm_sampler
from align.onpolicy.samplers.hf import _choose, _least_kept
from align.say import UserError

SERVER = Path(__file__).with_name("openai_server.py")
OPTIONS = SamplingConfig(temperature=1.0, top_p=0.95, max_new_tokens=16)
TEXTS = ["name a cat", "żółw, 猫 and 🐈", "b" * 60, "please list 3 tools, numbered", "x"]


def bent(folder: Path, tokenizer, model_type: str, **fields) -> Path:
    """A tiny model whose distributions are neither flat nor certain, and that stops now and then."""
    path = save_tiny(folder, tokenizer, model_type, **fields)
    model = AutoModelForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer) -> Path:
    return bent(tmp_path_factory.mktemp("bent_llama"), tokenizer, "llama")


@pytest.fixture(scope="session")
def gemma2(tmp_path_factory, tokenizer) -> Path:
    return bent(
        tmp_path_factory.mktemp("bent_gemma2"), tokenizer, "gemma2", sliding_window=8, query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0, final_logit_softcapping=4.0,
    )  # fmt: skip


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def asked(tokenizer, texts=TEXTS, samples=4, seed=0) -> list[Prompt]:
    return [Prompt(token_ids=prompt_ids(text, tokenizer), seeds=seeds(seed, 0, text, samples)) for text in texts]


def openai(tokenizer, urls, path=None, **fields):
    """A sampler of what servers serve."""
    return openai_sampler(tokenizer, SamplingConfig(backend=Backend.openai, urls=urls, **fields), path)


def flat(drawn: list[list[Sample]]) -> list[Sample]:
    return [sample for own in drawn for sample in own]


# Servers -----------------------------------------------------------------------------------------------------------


class Server:
    """A process of openai_server.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SERVER), str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def behave(self, **how) -> int:
        """Change how it behaves. Returns the number of completions so far."""
        request = urllib.request.Request(f"{self.url}/test", json.dumps(how).encode())
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)["completions"]


@pytest.fixture(scope="session")
def one_server(llama):
    server = Server(llama)
    yield server
    server.kill()


@pytest.fixture
def server(one_server, monkeypatch):
    """The server, as it should be."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    one_server.behave(mode="normal", token_ids=True)
    return one_server


# The contract ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["hf", "openai", "openai without token ids", "vllm"])
def backend(request, llama, tokenizer):
    """A sampler of the tiny Llama, and whether it returns the very token ids that were drawn."""
    if request.param == "hf":
        yield hf_sampler(load(llama), tokenizer), True
    elif request.param == "vllm":
        if importlib.util.find_spec("vllm") is None:
            pytest.skip("vllm is not installed: it wants other versions of transformers than align")
        with vllm_sampler(str(llama), tokenizer) as sampler:
            yield sampler, True
    else:
        server = request.getfixturevalue("server")
        exact = request.param == "openai"
        server.behave(token_ids=exact)
        yield openai(tokenizer, [server.url], requests_at_once=4), exact


@pytest.mark.slow
def test_every_sampler_keeps_the_contract(backend, tokenizer):
    sampler, exact = backend
    stops = stop_token_ids(tokenizer)
    first = sampler(asked(tokenizer), OPTIONS)

    assert [len(own) for own in first] == [4] * len(TEXTS)
    assert all(len({sample.text for sample in own}) > 1 for own in first), "temperature > 0 gives different texts"
    for sample in flat(first):
        assert sample.finished == (sample.response_ids[-1] in stops)
        assert not set(sample.response_ids[:-1]) & set(stops)
        assert len(sample.response_ids) <= 16 or not exact
        assert sample.finished or len(sample.response_ids) == 16 or not exact
        assert "<end_of_turn>" not in sample.text and "<eos>" not in sample.text
        if exact:
            assert sample.text == tokenizer.decode(sample.response_ids, skip_special_tokens=True)
    assert {sample.finished for sample in flat(first)} == {True, False}

    assert sampler(asked(tokenizer), OPTIONS) == first, "the same seeds give the same samples"
    others = sampler(asked(tokenizer, seed=1), OPTIONS)
    assert not {s.text for s in flat(first)} & {s.text for s in flat(others) if len(s.response_ids) > 3}

    alone = [sampler([prompt], OPTIONS)[0] for prompt in asked(tokenizer, samples=2)]
    assert alone == [own[:2] for own in first], "a sample depends on neither its batch nor K"
    short = flat(sampler(asked(tokenizer), replace(OPTIONS, max_new_tokens=1)))
    assert all(len(sample.response_ids) == 1 for sample in short) or not exact  # bytes of half a letter, encoded again
    assert sampler([], OPTIONS) == []


def test_a_server_and_the_model_in_process_draw_the_same(server, llama, tokenizer):
    ours = hf_sampler(load(llama), tokenizer)(asked(tokenizer), OPTIONS)
    assert openai(tokenizer, [server.url])(asked(tokenizer), OPTIONS) == ours


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_a_line_says_what_to_type(tokenizer):
    with pytest.raises(UserError, match=r"vllm serve some/model.*sampling.urls"), vllm_sampler("some/model", tokenizer):
        pass


def test_seeds_differ_in_each_part_of_their_key_and_not_with_k():
    assert seeds(0, 0, "a", 5)[:2] == seeds(0, 0, "a", 2)
    some = [*seeds(0, 0, "a", 5), *seeds(1, 0, "a", 5), *seeds(0, 1, "a", 5), *seeds(0, 0, "b", 5)]
    assert len(set(some)) == 20 and all(0 <= seed < 2**31 for seed in some)
    assert seeds(0, 0, "a", 1) == [1503275356]  # a number for all machines: raise sample._VERSION if it changes


# In process --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_samples_depend_on_neither_batch_nor_attachment(kind, tokenizer, request):
    model = load(request.getfixturevalue(kind))
    together = hf_sampler(model, tokenizer)(asked(tokenizer), OPTIONS)
    assert hf_sampler(model, tokenizer, tokens_per_batch=1)(asked(tokenizer), OPTIONS) == together
    engine.attach(model, Layout.shared)
    model.config.use_cache = False  # as policies are loaded
    model.train()
    assert hf_sampler(model, tokenizer)(asked(tokenizer)[::-1], OPTIONS)[::-1] == together
    assert model.training


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_tokens_are_drawn_from_the_models_own_distribution(kind, tokenizer, request):
    """At top_p near 0 each token is the most probable one by a forward over the whole sequence, without a cache."""
    model = load(request.getfixturevalue(kind))
    prompts = asked(tokenizer, samples=2)
    drawn = hf_sampler(model, tokenizer)(prompts, SamplingConfig(temperature=1.0, top_p=1e-6, max_new_tokens=24))
    for prompt, own in zip(prompts, drawn, strict=True):
        assert own[0] == own[1]
        ids = torch.tensor([[*prompt.token_ids, *own[0].response_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == own[0].response_ids


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9)])
def test_frequencies_are_the_probabilities(temperature, top_p):
    """Two tokens of a tiny vocabulary, 20000 times: chi-square over all pairs that top_p leaves."""
    model = make_tiny("llama", vocab_size=12)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(0.35 * torch.randn(weight.shape, generator=generator))
    prompt = [3, 4, 5]

    def nucleus(ids: list[int]) -> torch.Tensor:
        """[V] by the definition: the smallest set of most probable tokens that reaches top_p."""
        with torch.no_grad():
            probs = (model(torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
        kept, mass = torch.zeros_like(probs), 0.0
        for token in probs.argsort(descending=True):
            if mass >= top_p:
                break
            kept[token], mass = probs[token], mass + probs[token]
        return kept / kept.sum()

    class Tokenizer:  # no token of the twelve is special
        eos_token_id, chat_template = 99, None

        def decode(self, ids, skip_special_tokens):
            return str(ids)

    draws = 20000
    sampler = hf_sampler(model, Tokenizer(), tokens_per_batch=10**6)
    some = Prompt(token_ids=prompt, seeds=seeds(0, 0, "x", draws))
    drawn = sampler([some], SamplingConfig(temperature=temperature, top_p=top_p, max_new_tokens=2))[0]
    counts = Counter(tuple(sample.response_ids) for sample in drawn)
    first = nucleus(prompt)
    expected = {
        (a, b): draws * (first[a] * p).item()
        for a in range(12) if first[a] > 0
        for b, p in enumerate(nucleus([*prompt, a])) if p > 0
    }  # fmt: skip
    assert set(counts) <= set(expected), "nothing outside the nucleus"
    if top_p < 1:
        assert 2 < len(expected) < 144
    common = {pair: n for pair, n in expected.items() if n >= 5}
    chi_square = sum((counts[pair] - n) ** 2 / n for pair, n in common.items())
    freedom = len(common) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 5.0])  # the nucleus has nearly all tokens, some hundred, a few
def test_the_nucleus_of_a_large_vocabulary_is_the_smallest_set_that_reaches_top_p(sharpness):
    logits = sharpness * torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1)
    for row, least in zip(probs, _least_kept(probs, 0.9), strict=True):
        assert row[row >= least].sum() >= 0.9 - 1e-5
        assert row[row > least].sum() < 0.9 + 1e-5


def test_rounding_moves_boundaries_but_swaps_no_tokens():
    logits = torch.zeros(2, 1000) + 1e-7 * torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    roll = torch.full((2,), 0.6180339887, dtype=torch.float64)
    assert _choose(logits, roll, 1.0, 1.0).tolist() == [618, 618]


def test_the_last_token_can_be_drawn_and_no_impossible_one():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    draw = [_choose(logits, torch.tensor([roll], dtype=torch.float64), 1.0, 1.0).item() for roll in (0.0, 0.499, 0.5)]
    assert draw == [0, 0, 2]
    assert _choose(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0, 1.0).item() == 2


def test_a_policy_that_diverged_is_refused(llama, tokenizer):
    model = load(llama)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        hf_sampler(model, tokenizer)(asked(tokenizer), OPTIONS)


def test_out_of_memory_names_the_knob(llama, tokenizer, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError

    model = load(llama)
    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(UserError, match="tokens_per_batch=500"):
        hf_sampler(model, tokenizer, tokens_per_batch=1000)(asked(tokenizer), OPTIONS)


def test_a_prompt_is_computed_once_for_all_its_responses(llama, tokenizer):
    model = load(llama)
    fed = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: fed.append(tuple(inputs[0].shape)))
    prompt = asked(tokenizer, texts=["b" * 60], samples=5)
    hf_sampler(model, tokenizer)(prompt, OPTIONS)
    assert fed[0] == (1, len(prompt[0].token_ids))
    assert all(rows <= 5 and tokens == 1 for rows, tokens in fed[1:])


# Servers with faults -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode, timeout", [("errors", 60.0), ("slow", 3.0)])
def test_errors_and_silence_are_tried_again(mode, timeout, server, llama, tokenizer, monkeypatch):
    monkeypatch.setattr(servers, "TIMEOUT", timeout)
    some = asked(tokenizer, TEXTS[:2], samples=3)
    expected = hf_sampler(load(llama), tokenizer)(some, OPTIONS)
    server.behave(mode=mode)
    sampler = openai(tokenizer, [server.url], requests_at_once=4)
    assert sampler(some, OPTIONS) == expected


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_loses_nothing(llama, tokenizer):
    server = Server(llama)
    many = asked(tokenizer, samples=40)
    expected = hf_sampler(load(llama), tokenizer)(many, OPTIONS)
    drawn = []
    sampler = openai(tokenizer, [server.url], requests_at_once=4)
    thread = threading.Thread(target=lambda: drawn.append(sampler(many, OPTIONS)), daemon=True)
    try:
        thread.start()
        while server.behave() < 30 and thread.is_alive():
            time.sleep(0.02)
        server.kill()
        assert thread.is_alive() and not drawn
        server.start()
        thread.join(60)
        assert drawn == [expected]
    finally:
        server.kill()


@pytest.mark.slow
def test_servers_that_do_not_answer_are_left_alone(server, tokenizer, monkeypatch):
    dead = "http://127.0.0.1:9"
    sampler = openai(tokenizer, [dead, server.url], requests_at_once=4)
    started = time.monotonic()
    assert len(flat(sampler(asked(tokenizer), OPTIONS))) == 20
    assert time.monotonic() - started < 20
    monkeypatch.setattr(servers, "PATIENCE", 0.1)
    with pytest.raises(UserError, match=r"no answer from sampling.urls in 5 tries.*refused.*type the command again"):
        openai(tokenizer, [dead])(asked(tokenizer), OPTIONS)


def test_a_server_that_decodes_greedily_is_refused(server, tokenizer):
    server.behave(mode="greedy")
    with pytest.raises(UserError, match="equal answers at temperature 2: it decodes greedily"):
        openai(tokenizer, [server.url])(asked(tokenizer), OPTIONS)


def test_the_key_is_sent_and_never_shown(server, tokenizer, monkeypatch, capsys):
    server.behave(mode="wants_key")
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        openai(tokenizer, [server.url])(asked(tokenizer), OPTIONS)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert openai(tokenizer, [server.url])(asked(tokenizer), OPTIONS)
    for mode in ("refuses", "redirects"):
        server.behave(mode=mode, elsewhere=f"{server.url}/v1/completions")
        with pytest.raises(UserError, match=r"status (400|307)") as refused:
            openai(tokenizer, [server.url])(asked(tokenizer), OPTIONS)
        assert "secret" not in str(refused.value) + "".join(capsys.readouterr())
    with pytest.raises(UserError, match="OPENAI_API_KEY") as refused:
        openai(tokenizer, ["http://me:secret@host"])
    assert "secret" not in str(refused.value)


# The stage ---------------------------------------------------------------------------------------------------------

PROMPTS = [PromptRow(id=f"p{i}", text=[{"role": "user", "content": f"name {i} 猫"}], split="train") for i in range(20)]
SETTINGS = SamplingConfig(samples=3, temperature=0.9, max_new_tokens=8, prompts_per_shard=4)


def job(model: Path, folder: Path, seconds: float) -> None:
    """A process that samples `PROMPTS`, some seconds a shard; it leaves a line for each that it has begun."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    draw = hf_sampler(load(model), tokenizer)

    def slowly(prompts, settings):
        with (folder.parent / "begun").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return draw(prompts, settings)

    sample_by(slowly, PROMPTS, SETTINGS, folder, tokenizer)


def start_job(*arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=job, args=arguments)
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(llama, tokenizer, tmp_path_factory):
    """Rows of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "responses"
    job(llama, folder, 0.0)
    return read_samples(folder)


def test_rows_are_complete_readable_and_in_order(uninterrupted, llama, tokenizer, tmp_path):
    assert [(row.iteration, row.prompt_id, row.k) for row in uninterrupted] == [
        (2, f"p{i}", k) for i in range(20) for k in range(3)
    ]
    assert {row.origin for row in uninterrupted} == {"policy"}
    drawn = hf_sampler(load(llama), tokenizer)(
        [Prompt(token_ids=prompt_ids(PROMPTS[5].text, tokenizer), seeds=seeds(7, 2, "p5", 3))], SETTINGS
    )
    assert [row.response for row in uninterrupted[15:18]] == [sample.text for sample in drawn[0]]
    folder = tmp_path / "responses"
    job(llama, folder, 0.0)
    line = (folder / "00001-of-00005.jsonl").read_text().splitlines()[3]
    assert '"prompt_id": "p5"' in line and "猫" in line and '"origin": "policy"' in line


def test_a_finished_folder_is_not_sampled_again(llama, tokenizer, tmp_path):
    folder = tmp_path / "responses"
    job(llama, folder, 0.0)

    @contextlib.contextmanager
    def opening():
        raise AssertionError("opened")
        yield

    sample_by(None, PROMPTS, SETTINGS, folder, tokenizer, opening=opening())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_jobs_on_one_folder_share_the_work(uninterrupted, llama, tmp_path):
    folder = tmp_path / "responses"
    jobs = [start_job(llama, folder, 0.5) for _ in range(2)]
    for process in jobs:
        process.join(120)
        assert process.exitcode == 0
    begun = Counter((tmp_path / "begun").read_text().split())
    assert sum(begun.values()) == 5, "each shard once"
    assert len(begun) == 2, "and both have worked"
    assert read_samples(folder) == uninterrupted


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_job_is_continued_without_a_row_twice_or_missing(uninterrupted, llama, tmp_path):
    folder = tmp_path / "responses"
    process = start_job(llama, folder, 0.3)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = sorted(folder.glob("*.jsonl"))
    assert 2 <= len(left) < 5
    with pytest.raises(UserError, match="not finished"):
        read_samples(folder)
    (folder / "00004-of-00005.unfinished").write_text('{"half a row')  # as a kill in the middle of writing leaves it
    before = {file: file.stat().st_mtime_ns for file in left}
    job(llama, folder, 0.0)
    assert read_samples(folder) == uninterrupted
    assert {file: file.stat().st_mtime_ns for file in left} == before, "what was finished is not drawn again"


@pytest.mark.parametrize(
    "what, change",
    [
        ("temperature: 0.9 -> 0.5", {"settings": replace(SETTINGS, temperature=0.5)}),
        ("rows: 60 -> 80; samples: 3 -> 4", {"settings": replace(SETTINGS, samples=4)}),
        ("prompts_per_shard: 4 -> 5; shards: 5 -> 4", {"settings": replace(SETTINGS, prompts_per_shard=5)}),
        ("policy: .* -> .*", {"fingerprint": "another"}),
        ("seed: 7 -> 8", {"seed": 8}),
        ("iteration: 2 -> 3", {"iteration": 3}),
        ("prompts: .* -> .*; rows: 60 -> 57", {"prompts": PROMPTS[1:]}),
    ],
)
def test_other_inputs_are_not_mixed_with_old_shards(what, change, llama, tokenizer, tmp_path):
    folder = tmp_path / "responses"
    job(llama, folder, 0.0)
    inputs = {"prompts": PROMPTS, "settings": SETTINGS, **change}
    with pytest.raises(UserError, match=f"holds responses of other inputs \\({what}\\): delete it, or name another"):
        sample_by(None, folder=folder, tokenizer=tokenizer, **inputs)


def test_knobs_of_speed_may_change_between_runs(llama, tokenizer, tmp_path):
    job(llama, tmp_path / "responses", 0.0)
    faster = replace(SETTINGS, tokens_per_batch=64, requests_at_once=2)
    sample_by(None, PROMPTS, faster, tmp_path / "responses", tokenizer)


def test_an_empty_prompt_and_bad_folders_are_one_line(tokenizer, tmp_path):
    with pytest.raises(UserError, match="a prompt is empty"):
        sample_by(said, [*PROMPTS, replace(PROMPTS[0], text="")], SETTINGS, tmp_path / "empty", tokenizer)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        sample_by(None, PROMPTS, SETTINGS, tmp_path / "file", tokenizer)
    with pytest.raises(UserError, match=r"made.responses holds no responses: type align sample run_dir=.*made first"):
        read_samples(tmp_path / "made" / "responses")


def test_a_damaged_shard_is_named(llama, tmp_path):
    folder = tmp_path / "responses"
    job(llama, folder, 0.0)
    shard = folder / "00001-of-00005.jsonl"
    rows = shard.read_text().splitlines(keepends=True)
    shard.write_text("".join(rows[:-1]) + rows[-1][:20])
    with pytest.raises(UserError, match=r"00001-of-00005.jsonl is damaged .*: delete it, and type the command that"):
        read_samples(folder)
    shard.write_text("".join(rows[:-1]))
    with pytest.raises(UserError, match="holds 59 responses in place of 60: delete it"):
        read_samples(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "sampling.temperature must be above 0"),
        ({"samples": 0}, "sampling.samples"),
        ({"top_p": 1.5}, "sampling.top_p must lie in"),
        ({"backend": Backend.openai}, "sampling.urls goes with sampling.backend=openai"),
        ({"urls": ["http://a"]}, "sampling.urls goes with sampling.backend=openai"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        check_node(cfg := RunConfig(sampling=SamplingConfig(**change), cache_dir=""), "")
        answering_cluster(cfg)


def test_the_settings_open_their_backend(server, llama, tokenizer, tmp_path, uninterrupted):
    policy, cfg = policy_of(tokenizer, llama), RunConfig(seed=7)
    for settings in (SETTINGS, replace(SETTINGS, backend=Backend.openai, urls=[server.url])):
        folder = tmp_path / settings.backend.name
        sample_from(policy, PROMPTS, cfg, settings, folder, 2, "responses", RANK)
        assert read_samples(folder) == uninterrupted


# Candidates and splits ---------------------------------------------------------------------------------------------


def two_prompts(origin="gpt4"):
    """One to train on, to which others have answered, and one that is held out."""
    others = (Candidate(origin=origin, text="lion, lynx"), Candidate(origin="human", text=" a cat"))
    return [replace(PROMPTS[0], candidates=others), replace(PROMPTS[1], split="held_out")]


def said(prompts, settings):
    """A sampler that says the same to all."""
    return [[Sample(text="owl", response_ids=[9, 1], finished=True) for _ in prompt.seeds] for prompt in prompts]


def test_candidates_are_rows_behind_the_samples_and_every_row_knows_its_split(tokenizer, tmp_path):
    sample_by(said, two_prompts(), SETTINGS, tmp_path, tokenizer)
    rows = read_samples(tmp_path)
    assert [(row.prompt_id, row.k, row.origin, row.response, row.split) for row in rows] == [
        ("p0", 0, "policy", "owl", "train"),
        ("p0", 1, "policy", "owl", "train"),
        ("p0", 2, "policy", "owl", "train"),
        ("p0", 3, "gpt4", "lion, lynx", "train"),
        ("p0", 4, "human", " a cat", "train"),
        ("p1", 0, "policy", "owl", "held_out"),
        ("p1", 1, "policy", "owl", "held_out"),
        ("p1", 2, "policy", "owl", "held_out"),
    ]
    assert [row.prompt for row in rows] == [PROMPTS[0].text] * 5 + [PROMPTS[1].text] * 3
    assert json.loads((tmp_path / "manifest.json").read_text())["rows"] == 3 + 2 + 3


def test_a_candidate_is_as_long_as_if_the_policy_had_said_it(tokenizer, tmp_path):
    sample_by(said, two_prompts(), SETTINGS, tmp_path, tokenizer)
    for row in read_samples(tmp_path)[3:5]:
        assert row.finished and row.response_ids[-1] in stop_token_ids(tokenizer)
        assert tokenizer.decode(row.response_ids[:-1]) == row.response, "and one token that ends it"


def test_a_prompts_samples_do_not_depend_on_its_candidates(llama, tokenizer, uninterrupted, tmp_path):
    sample_by(hf_sampler(load(llama), tokenizer), two_prompts(), SETTINGS, tmp_path, tokenizer)
    own = [row for row in read_samples(tmp_path) if row.origin == "policy"]
    assert [replace(row, split="train") for row in own] == uninterrupted[:6]


@pytest.mark.parametrize(
    "other",
    [
        two_prompts("gpt5"),
        [replace(prompt, split="train") for prompt in two_prompts()],
        [two_prompts()[0], replace(two_prompts()[1], candidates=(Candidate(origin="gpt4", text="ape"),))],
    ],
    ids=["origin", "split", "candidate"],
)
def test_other_candidates_or_splits_are_not_mixed_with_old_shards(other, tokenizer, tmp_path):
    sample_by(said, two_prompts(), SETTINGS, tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"other inputs \(prompts: .*\): delete it, or name another"):
        sample_by(said, other, SETTINGS, tmp_path, tokenizer)


# Servers that may hold another policy ------------------------------------------------------------------------------


def test_a_server_that_holds_another_policy_is_refused(server, llama, tokenizer):
    def draw(path="runs/x/iter_1/policy", **knobs):
        sampler = openai(tokenizer, [server.url], path=path, **knobs)
        return sampler(asked(tokenizer, TEXTS[:1], samples=1), OPTIONS)

    before = server.behave()
    with pytest.raises(UserError) as refused:
        draw()
    assert str(refused.value) == (
        f"sampling.urls: the server holds {llama.name}, and these are to be answers of runs/x/iter_1/policy: serve it "
        "under that name (vllm serve runs/x/iter_1/policy), then the same command goes on"
    )
    with pytest.raises(UserError, match=r"the server holds runs/x/iter_0/policy, and"):
        draw(served_model="runs/x/iter_0/policy")
    assert server.behave() == before, "nothing was drawn"
    assert draw(llama.name) == draw(llama.name, served_model=llama.name) == draw(None)


@pytest.mark.parametrize("name", ["/data/x/iter_1/policy", "iter_1/policy/"])
def test_where_a_server_keeps_the_policy_is_its_own_affair(name, tokenizer, monkeypatch):
    class Answers:  # as of a server that gives the policy this name
        def __init__(self, *_, **__):
            pass

        def ask(self, path, body=None, over=None):
            if path == "/models":
                return {"data": [{"id": name}]}
            assert body["model"] == name
            return {"choices": [{"text": "owl", "token_ids": [9, 1], "finish_reason": "stop"}]}

    monkeypatch.setattr("align.onpolicy.samplers.openai.Servers", Answers)
    sampler = openai(tokenizer, ["http://a"], path="runs/x/iter_1/policy")
    assert sampler(asked(tokenizer, TEXTS[:1], samples=1), OPTIONS)[0][0].response_ids == [9, 1]
    with pytest.raises(UserError, match="the server holds"):
        openai(tokenizer, ["http://a"], path="runs/x/iter_11/policy")(asked(tokenizer, TEXTS[:1]), OPTIONS)
