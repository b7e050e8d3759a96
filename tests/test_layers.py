"""Who may import whom: down only, in the order of this list; stages meet in files and in `run`."""

import ast

import pytest
from conftest import ROOT

LAYERS = [
    {"config"},
    {"cache", "compose", "batching", "memory", "lifeline"},
    {"launch", "cost"},
    {"model", "engine", "strategy"},
    {"rows", "arguments", "tracking"},
    {"data"},
    {"onpolicy"},
    {"sentinel"},
    {"reference", "trainer", "judging"},
    {"plan", "card", "slurm"},
    {"train"},
    {"run"},
    {"stages"},
    {"selfplay"},
    {"__main__"},
    {"report"},
    {"suites"},
    {"sample", "annotate", "select", "evaluate", "dashboard"},  # commands of their own
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
INSIDE = {"engine": [{"layout"}, {"attention", "head"}, {"forward"}, {"budget"}, {"__init__"}]}  # packages, likewise
OWNERS = {
    "wandb": "tracking",
    "trackio": "tracking",
    "peft": "model",
    "hydra": "compose",
    "flash_attn": "engine",
    "deepspeed": "strategy",
    "matplotlib": "report",
    "submitit": "slurm",
    "vllm": "onpolicy",
    "lm_eval": "suites",
    "wandb_workspaces": "dashboard",
}


def imports(file) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "align" else {node.module}
            )
    return names


ALIGN = ROOT / "align"
FILES = sorted(file for file in ALIGN.rglob("*.py") if "playground" not in file.parts)


def layer(file) -> str:
    """What a file counts as: itself, or its package."""
    return file.relative_to(ALIGN).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{layer(file)}.{file.stem}")
def test_a_file_imports_only_from_the_layers_below_it(file):
    if file == ALIGN / "__init__.py":
        return
    own = {name.split(".")[1] for name in imports(file) if name.startswith("align.")}
    own -= set() if file.parent == ALIGN else {layer(file)}
    assert all(LEVEL[name] < LEVEL[layer(file)] for name in own), own
    assert "playground" not in own


@pytest.mark.parametrize("package, order", INSIDE.items())
def test_files_of_a_package_import_down_and_others_import_the_package(package, order):
    level = {name: number for number, names in enumerate(order) for name in names}
    for file in FILES:
        parts = {name.removeprefix(f"align.{package}.") for name in imports(file) if f"align.{package}." in name}
        inside = layer(file) == package
        assert all(level[part] < level[file.stem] for part in parts) if inside else not parts, (file, parts)
    assert {file.stem for file in FILES if layer(file) == package} == level.keys()


@pytest.mark.parametrize("package, owner", OWNERS.items())
def test_one_file_owns_an_optional_or_heavy_package(package, owner):
    users = {layer(file) for file in FILES if any(name.split(".")[0] == package for name in imports(file))}
    assert users <= {owner, "__main__"} and owner in users
