"""The picture of the house in docs/architecture.md: who may import whom, and no circles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "longtake"

# A room may import the rooms listed; everything but `ops` may import `randomness`.
ALLOWED: dict[str, set[str]] = {
    "randomness": {"ops"},
    "planning": set(),
    "ops": set(),
    "diffusion": set(),
    "models": {"ops"},
    "weights": {"models"},
    "encoders": set(),
    "data": set(),
    "store": {"data", "encoders"},
    "parallel": {"models", "ops"},
    "training": {"ops", "parallel", "planning"},
    "pipeline": {"data", "diffusion", "encoders", "parallel", "store", "training"},
    "report": {"training"},
    "config": {
        "data",
        "diffusion",
        "encoders",
        "models",
        "ops",
        "parallel",
        "planning",
        "training",
    },
    "benchmark": {
        "config",
        "data",
        "diffusion",
        "encoders",
        "models",
        "ops",
        "parallel",
        "pipeline",
        "planning",
        "store",
        "training",
    },
    "programs": {
        "benchmark",
        "config",
        "data",
        "diffusion",
        "encoders",
        "models",
        "ops",
        "parallel",
        "pipeline",
        "planning",
        "report",
        "store",
        "training",
        "weights",
    },
}
# Planning is arithmetic that must run anywhere; it imports the standard library alone.
STANDARD_LIBRARY_ONLY = {"planning"}
OPTIONAL_PACKAGES = {"diffusers", "transformers", "tensorboard", "matplotlib", "wandb", "pyarrow"}
OPTIONAL_PACKAGES |= {"ray"}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _files() -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if _room(path) not in ("__init__", "__main__", "cli")
    ]


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_room_imports_only_what_the_picture_allows(path: Path):
    room = _room(path)
    everywhere = set() if room == "ops" else {"randomness"}
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "longtake" and len(parts) > 1:
            target = parts[1]
            assert target in ALLOWED[room] | {room} | everywhere, f"{room} imports {target}"
        elif room in STANDARD_LIBRARY_ONLY:
            import sys

            assert parts[0] in sys.stdlib_module_names, f"{room} imports {name}"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_not_imported_at_the_top(path: Path):
    tops = {name.split(".")[0] for name in _imports(path, top_level_only=True)}
    assert not tops & OPTIONAL_PACKAGES


def test_programs_do_not_import_one_another():
    for path in sorted((PACKAGE / "programs").glob("*.py")):
        assert not {name for name in _imports(path) if name.startswith("longtake.programs")}


def test_models_do_not_know_about_processes():
    words = ("dist", "mesh", "DTensor", "rank", "world_size")
    for path in sorted((PACKAGE / "models").glob("*.py")):
        names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
        assert not names & set(words), path.name


def test_nothing_unpickles_evaluates_or_shells_out():
    banned_modules = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    # The checkpoint reader subclasses the unpickler to forbid everything but a short list of names.
    allowed = {"training/safe_reading.py"}
    for path in sorted(PACKAGE.rglob("*.py")):
        where = str(path.relative_to(PACKAGE))
        if where not in allowed:
            assert not {name.split(".")[0] for name in _imports(path)} & banned_modules, where
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, where
            if isinstance(node, ast.keyword):
                trusted = isinstance(node.value, ast.Constant) and node.value.value is True
                assert not (node.arg == "shell" and trusted), where
                assert node.arg != "trust_remote_code", where
                untrusted = isinstance(node.value, ast.Constant) and node.value.value is False
                assert not (node.arg == "weights_only" and untrusted), where
