"""`objectives` stands on torch and the standard library; `align` knows its registry and no objective by name."""

import ast
import sys
from pathlib import Path

import objectives

ROOT = Path(objectives.__file__).resolve().parent.parent
CONCRETE = {file.stem for file in (ROOT / "objectives").glob("*.py")} - {"__init__", "base", "registry"}
ALLOWED = {"torch", "objectives", *sys.stdlib_module_names}


def imported(source: str) -> set[str]:
    """Dotted names of what a file imports, anywhere in it; `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def impurities(source: str) -> set[str]:
    """Imports that a file of `objectives` must not have."""
    names = imported(source)
    foreign = {name for name in names if name.split(".")[0] not in ALLOWED}
    return foreign | {name for name in names if f"{name}.".startswith("torch.distributed.")}


def concrete_objectives(source: str) -> set[str]:
    """Concrete objectives that a file of `align` names: imported, as an attribute of the package, or in a string."""
    names = imported(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {name for name in names if name.split(".")[0] == "objectives" and CONCRETE & set(name.split(".")[1:2])}


def test_there_are_files_to_look_at():
    assert {"dpo", "simpo", "sppo", "wpo", "ipo", "plus_sft"} <= CONCRETE
    assert (ROOT / "align" / "train/loop.py").is_file()


def test_objectives_import_torch_and_the_standard_library_only():
    foreign = {file.name: impurities(file.read_text()) for file in (ROOT / "objectives").glob("*.py")}
    assert {name: found for name, found in foreign.items() if found} == {}


def test_align_names_no_concrete_objective():
    named = {str(file): concrete_objectives(file.read_text()) for file in (ROOT / "align").rglob("*.py")}
    assert {name: found for name, found in named.items() if found} == {}


def test_the_check_of_objectives_catches_what_they_must_not_import():
    for source in (
        "import align.data",
        "from align import run",
        "import transformers",
        "import numpy as np",
        "def late():\n    import hydra",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
    ):
        assert impurities(source), source


def test_the_check_of_align_catches_every_way_to_name_an_objective_and_lets_the_registry_pass():
    for source in (
        "import objectives.dpo",
        "from objectives.dpo import DPO",
        "from objectives import wpo",
        "def late():\n    from objectives.simpo import SimPO",
        "import objectives\nobjectives.ipo.IPO()",
        "import importlib\nimportlib.import_module('objectives.sppo')",
    ):
        assert concrete_objectives(source), source
    for source in ("import objectives", "from objectives import build", "objectives.build({})"):
        assert not concrete_objectives(source), source
