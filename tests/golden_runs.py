"""Record what eight tiny runs come to, or check that they still come to the same, to the bit.

    python tests/golden_runs.py record       writes tests/golden/runs.json
    python tests/golden_runs.py check        exits with 1 unless all is equal to the bit
    python tests/golden_runs.py check --within 1e-6 --only dpo,lora    two of them, after a change of rounding

The runs are commands as a user types them, and only files of the run folder are read, so a refactor of the insides
leaves this file alone. Recorded are every metric, start.json, results.json, summary.json and a hash of the trained
weights; left out is what depends on the clock or on memory: `cost` and metrics `*_per_second`. Figures are equal to the
bit on one kind of processor with one version of torch; the header of the file says which.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, pair_row, save_tiny, write_jsonl
from safetensors.torch import load_file

FILE = ROOT / "tests" / "golden" / "runs.json"
SMALL = 0.1  # below it a difference counts relative to this: a KL of 0.005 nats is a difference of sums of 50
JUDGE = "def vowels(prompt, response):\n    return sum(c in 'aeiou' for c in response) / max(1, len(response))\n"

COMMON = "cluster=cpu cluster.cpu_threads=1 tracker=none model=local optimizer.learning_rate=1e-3 seed=3 \
evaluation.samples_per_prompt=2 evaluation.max_new_tokens=8"
PAIRS = f"{COMMON} dataset.path=train.jsonl dataset.eval_path=held_out.jsonl train.pairs_per_step=8 \
optimizer.max_steps=6 train.eval_every_steps=2 train.save_every_steps=2 sentinel.sample_every_steps=3"
DPO = f"{PAIRS} model.path=gemma2 objective=dpo dataset.judge=judge:vowels engine.tokens_per_micro_batch=96"

#: The words of each run, the longest first.
RUNS = {
    "selfplay": f"{COMMON} model.path=llama objective=sppo source=selfplay iterations=2 dataset.path=train_prompts.jsonl \
dataset.limit=12 dataset.eval_path=held_out_prompts.jsonl dataset.eval_limit=4 scorer=program scorer.path=judge:vowels \
sampling.samples=3 sampling.max_new_tokens=8 train.pairs_per_step=4 train.eval_every_steps=2 optimizer.max_steps=6",
    "two_processes": f"{DPO} cluster=cpu_2 cluster.strategy=ddp",
    "resumed": DPO,  # and killed after its first checkpoint
    "dpo": DPO,
    "simpo": f"{PAIRS} model.path=llama objective=simpo scorer=program scorer.path=judge:vowels",
    "wpo": f"{PAIRS} model.path=gemma2 objective=wpo engine.layout=packed engine.tokens_per_micro_batch=96",
    "ipo": f"{PAIRS} model.path=llama objective=ipo engine.layout=padded engine.tokens_per_micro_batch=96",
    "lora": f"{DPO} model.lora={{r:4,target_modules:all-linear}}",
}


def header() -> dict[str, str]:
    """Return what decides the last bits of a figure."""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())  # none on ARM
    return {
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "processor": names[0] if names else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def prepare(folder: Path) -> None:
    """Write the models, the pairs, the prompts and the judge that the commands name."""
    from align.playground.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    save_tiny(folder / "llama", tokenizer, tie_word_embeddings=False)
    save_tiny(folder / "gemma2", tokenizer, "gemma2", sliding_window=16, query_pre_attn_scalar=8)
    train, held_out = ([pair_row(i) for i in numbers] for numbers in (range(40), range(100, 108)))
    for split, pairs in {"train": train, "held_out": held_out}.items():
        write_jsonl(folder / f"{split}.jsonl", pairs)
        write_jsonl(folder / f"{split}_prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs])
    (folder / "judge.py").write_text(JUDGE)


def start(name: str, home: Path) -> subprocess.Popen[str]:
    """Start the command of a run, with a folder and a cache of its own."""
    alone = [f"run_dir={home / name / 'run'}", f"cache_dir={home / name / 'cache'}"]
    environment = {"PYTHONPATH": f"{home}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    (home / name).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "align", *RUNS[name].split(), *alone]
    with (home / name / "said.txt").open("w") as said:
        return subprocess.Popen(command, cwd=home, env=os.environ | environment, stdout=said, stderr=said, text=True)


def finish(name: str, home: Path) -> dict[str, Any]:
    """Run to the end and return the figures. `resumed` is killed after its first checkpoint and started again."""
    folder, goes_on = home / name / "run", ""
    if name == "resumed":
        goes_on = "/checkpoint-[24]\n"
        with start(name, home) as process:
            while process.poll() is None and not list(folder.glob("checkpoints/checkpoint-2/made_by.json")):
                time.sleep(0.001)
            process.kill()
    status, said = start(name, home).wait(), (home / name / "said.txt").read_text()
    if status or not re.search(goes_on, said):
        raise SystemExit(f"{name} ended with status {status} and should have said {goes_on!r}:\n{said[-3000:]}")
    return figures(folder)


def figures(folder: Path) -> dict[str, Any]:
    """Read a run folder: the series of each metric as [step, value], each other figure, a hash of each trained model."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.json*")):
        at = " ".join([part for part in file.relative_to(folder).parts if part.startswith("iter_")] + [file.name])
        if file.name == "metrics.jsonl":
            for row in map(json.loads, file.read_text().splitlines()):
                for metric in row.keys() - {"step"}:
                    if not metric.endswith("_per_second"):
                        found.setdefault(f"{at} {metric}", []).append([row["step"], row[metric]])
        elif file.name in ("start.json", "results.json", "summary.json"):
            found |= flat({key: value for key, value in json.loads(file.read_text()).items() if key != "cost"}, at)
    for model in [*folder.rglob("model"), *folder.rglob("policy")]:
        found[f"{model.relative_to(folder)} sha256"] = weights_hash(model)
    return dict(sorted(found.items()))


def flat(value: Any, name: str) -> dict[str, Any]:
    """Return the leaves of nested JSON, each under its path."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, inner in items for path, leaf in flat(inner, f"{name} {key}").items()}


def weights_hash(folder: Path) -> str:
    """Hash names, types, shapes and bytes of all weights, sorted by name."""
    weights = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    made = hashlib.sha256()
    for name, value in sorted(weights.items()):
        made.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        made.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def distance(a: Any, b: Any) -> float:
    """Return the largest relative difference of two figures or series, inf if not comparable."""
    if type(a) is type(b) is list and len(a) == len(b):
        return max(map(distance, a, b))
    if type(a) is type(b) is float and math.isfinite(a - b):
        return abs(a - b) / max(abs(a), abs(b), SMALL)
    return 0.0 if repr(a) == repr(b) else math.inf


def compare(name: str, recorded: dict[str, Any], now: dict[str, Any], within: float | None) -> bool:
    """Print how a run differs from its record, and return True if that is allowed."""
    pairs = {key: (recorded.get(key), now.get(key)) for key in sorted({*recorded, *now})}
    apart = {key: distance(*both) for key, both in pairs.items() if repr(both[0]) != repr(both[1])}
    hashes = [key for key in apart if key.endswith("sha256")]
    # `within` is not for hashes, nor for accuracies: under the start model each pair is a tie, which rounding breaks.
    loose = [key for key in apart if (key in hashes or "accurac" in key) and None not in pairs[key]]
    bad = [key for key in apart if within is None or (key not in loose and apart[key] > within)]
    for key in sorted({*bad, *loose}):
        print(f"{name}: {key}: {apart[key]:.1e}\n    recorded {pairs[key][0]}\n    now      {pairs[key][1]}")
    most = max((value for key, value in apart.items() if key not in hashes), default=0.0)
    print(f"{name}: {len(apart)} of {len(pairs)} figures differ, by {most:.1e} at most; {len(hashes)} hashes differ")
    return not bad


def main(words: list[str] | None = None) -> int:
    """Record or check, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=["record", "check"])
    parser.add_argument("--within", type=float, help="relative difference of a metric that is allowed")
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(RUNS), help="runs, by comma")
    asked = parser.parse_args(words)
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {"header": {}, "runs": {}}
    if asked.do == "record" and recorded["header"] != header() and {*asked.only} != RUNS.keys():
        parser.error("the other runs were recorded on another machine or with other versions: record all of them")
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(2) as pool:
        prepare(Path(home))
        made = dict(zip(asked.only, pool.map(lambda name: finish(name, Path(home)), asked.only), strict=True))
    if asked.do == "record":
        runs = {name: made.get(name) or recorded["runs"][name] for name in RUNS}
        FILE.write_text(text({"header": header(), "runs": runs}) + "\n")
        return 0
    if recorded["header"] != header():
        print(f"recorded with {recorded['header']}\nthis is       {header()}")
    allowed = [compare(name, recorded["runs"][name], made[name], asked.within) for name in made]
    return 0 if all(allowed) else 1


def text(value: Any, depth: int = 0) -> str:
    """Return JSON with a line for each figure or series. Floats are written by repr, which loses no bit."""
    if not isinstance(value, dict):
        return json.dumps(value)
    lines = [f"{' ' * depth} {json.dumps(key)}: {text(inner, depth + 1)}" for key, inner in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


if __name__ == "__main__":
    sys.exit(main())
