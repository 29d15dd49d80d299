"""House rules, read from the source: sizes, who may import whom, what must stay light, what must be packaged."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("bench", "checkpoint", "launcher", "memory", "parallel", "training", "tests")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500


def sources(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return files if folders != CODE_FOLDERS else [*sorted(ROOT.glob("*.py")), *files]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(tree: ast.AST, path: Path) -> Iterator[str]:
    """Absolute-like names: relative imports are resolved inside the repository, as `launcher.config`."""
    here = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def top_level(tree: ast.Module) -> ast.Module:
    """The statements that run at import: no function bodies, no TYPE_CHECKING blocks."""
    is_lazy = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    kept = [
        node
        for node in tree.body
        if not isinstance(node, is_lazy) and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    return ast.Module(body=kept, type_ignores=[])


@pytest.mark.parametrize("path", sources(*CODE_FOLDERS), ids=name)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} in {name(path)} has {lines} lines"


@pytest.mark.parametrize("path", sources("training", "parallel", "memory", "checkpoint"), ids=name)
def test_dependencies_point_one_way(path: Path) -> None:
    forbidden = ("launcher", "efflaunch.launcher", "hydra", "omegaconf", "ray")
    tree = ast.parse(path.read_text())
    typed_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) not in typed_only and isinstance(node, (ast.Import, ast.ImportFrom)):
            for module in imported_modules(ast.Module(body=[node], type_ignores=[]), path):
                assert not module.startswith(tuple(f"{package}." for package in forbidden)) and module not in forbidden


HEAVY = {"torch", "transformers", "ray", "hydra", "omegaconf", "numpy", "datasets", "tokenizers", "pyarrow"}
IMPORTED_LATE = {"launcher/agent/elastic.py", "launcher/commands/data_progress.py"}
"""Modules of launcher/ that may: an agent imports the first once it is one, `data prepare` the second once it works."""


def planning_sources() -> list[Path]:
    decides = re.compile(r"(plan|solve|cost|ledger|policy|layout|spec|config|timing|terms|advice)\.py$")
    return [path for path in sources("training", "parallel", "memory", "checkpoint") if decides.search(path.name)]


@pytest.mark.parametrize("path", [*sources("launcher"), *planning_sources()], ids=name)
def test_nothing_heavy_at_module_level(path: Path) -> None:
    if name(path) not in IMPORTED_LATE:
        modules = imported_modules(top_level(ast.parse(path.read_text())), path)
        assert not {module.partition(".")[0] for module in modules} & HEAVY


def test_importing_the_launcher_stays_light() -> None:
    light = [name(path) for path in sources("launcher") if name(path) not in IMPORTED_LATE]
    modules = [path[:-3].replace("/", ".").removesuffix(".__init__") for path in light]
    imports = f"[importlib.import_module('efflaunch.' + m) for m in {modules!r}]"
    code = f"import importlib, json, sys; {imports}; print(json.dumps([*sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=120)
    assert not {module.partition(".")[0] for module in json.loads(result.stdout)} & HEAVY


def test_configuration_files_build_nothing() -> None:
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        assert "_target_" not in path.read_text(), name(path)


def test_every_package_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    folders |= {path.parent for path in (ROOT / "conf").rglob("*.yaml")} | {ROOT / "slurm"}
    found = {".".join(["efflaunch", *folder.relative_to(ROOT).parts]) for folder in folders}
    listed = project["tool"]["setuptools"]["packages"]
    assert {package for package in found if not package.startswith("efflaunch.tests")} | {"efflaunch"} == set(listed)
    assert listed == sorted(listed)


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["test"],
        *extras["ray"],
        *extras["wandb"],
        *extras["tensorboard"],
        *extras["plot"],
        *extras["bench"],
    ]
    names = {re.split(r"[\[<>=~! ]", requirement)[0].lower().replace("_", "-") for requirement in wanted} - {"efflaunch"}
    assert names <= pinned


def test_sources_are_ascii_in_comments() -> None:
    for path in sources(*CODE_FOLDERS):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.lstrip().startswith("#"):
                assert line.isascii(), f"{name(path)}:{number}"
