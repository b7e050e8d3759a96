"""Who may import whom: down only, in the order of this list; stages meet in files and in `run`."""

import ast

import pytest
from conftest import ROOT

LAYERS = [
    {"config"},
    {"cache", "compose", "batching", "launch"},
    {"model", "engine"},
    {"rows", "sampling", "arguments", "tracking"},
    {"data"},
    {"reference", "trainer", "evaluate"},
    {"plan", "card"},
    {"run"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OWNERS = {"wandb": "tracking", "trackio": "tracking", "peft": "model", "hydra": "compose"}


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


FILES = sorted((ROOT / "align").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_imports_only_from_the_layers_below_it(file):
    if file.stem == "__init__":
        return
    own = {name.split(".")[1] for name in imports(file) if name.startswith("align.")}
    assert all(LEVEL[name] < LEVEL[file.stem] for name in own), own
    assert "playground" not in own


@pytest.mark.parametrize("package, owner", OWNERS.items())
def test_one_file_owns_an_optional_or_heavy_package(package, owner):
    users = {file.stem for file in FILES if any(name.split(".")[0] == package for name in imports(file))}
    assert users <= {owner, "__main__"} and owner in users
