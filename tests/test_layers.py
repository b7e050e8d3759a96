"""Who may import whom: down only, in the order of this list; rooms meet in files and in `runs`."""

import ast
import functools

from conftest import ROOT

LAYERS = [
    {"say"},
    {"choices", "files", "metrics", "stats"},
    {"config"},
    {"engine", "launch"},
    {"model"},
    {"data"},
    {"onpolicy", "tracking"},
    {"train"},
    {"evaluation"},
    {"runs"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
REPORT = {"say", "files", "metrics", "stats"}  # it knows files, and nothing of the machine
INSIDE = [
    {"layout"},
    {"attention", "head", "batching"},
    {"forward"},
    {"__init__"},
]  # of engine, whose face others import
OWNERS = {
    "wandb": "tracking",
    "trackio": "tracking",
    "wandb_workspaces": "tracking",
    "peft": "model",
    "hydra": "cli",
    "flash_attn": "engine",
    "deepspeed": "launch",
    "submitit": "launch",
    "matplotlib": "report",
    "jinja2": "report",
    "vllm": "onpolicy",
    "lm_eval": "evaluation",
}


@functools.cache
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
FILES = sorted(file for file in ALIGN.rglob("*.py") if file != ALIGN / "__init__.py")


def room(file) -> str:
    """The package of a file, or itself."""
    return file.relative_to(ALIGN).parts[0].removesuffix(".py")


def test_rooms_import_only_from_the_layers_below_them():
    for file in FILES:
        own = {name.split(".")[1] for name in imports(file) if name.startswith("align.")} - {room(file)}
        if room(file) == "report":
            assert own <= REPORT, (file, own - REPORT)
        elif room(file) != "playground":  # which is reached by name only
            assert all(LEVEL[name] < LEVEL[room(file)] for name in own), (file, own)


def test_files_of_the_engine_import_down_and_others_import_its_face():
    level = {name: number for number, names in enumerate(INSIDE) for name in names}
    for file in FILES:
        parts = {name.removeprefix("align.engine.") for name in imports(file) if name.startswith("align.engine.")}
        if room(file) == "engine":
            assert all(level[part] < level[file.stem] for part in parts), (file, parts)
        else:
            assert parts <= {"batching"}, (file, parts)
    assert {file.stem for file in FILES if room(file) == "engine"} == level.keys()


def test_one_room_owns_an_optional_or_heavy_package():
    for package, owner in OWNERS.items():
        users = {room(file) for file in FILES if any(name.split(".")[0] == package for name in imports(file))}
        assert users == {owner}, (package, users)
