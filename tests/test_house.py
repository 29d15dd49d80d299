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


ENGINE_NAMES = {"DTensor", "FSDPModule", "fully_shard", "distribute_tensor", "_StridedShard"}
ENGINE_MODULES = ("torch.distributed.tensor", "torch.distributed.fsdp")
MAY_NAME_ENGINES = {
    "parallel/sharding/fsdp2.py": "the engine itself",
    "parallel/sharding/parts.py": "which part of a tensor a rank holds",
    "bench/bare_rank.py": "a plain loop to be measured against",
    "bench/contestants.py": "a plain loop to be measured against",
    "bench/chaos.py": "sharded tensors without any of our engines",
}
"""Everybody else asks these: a second engine touches parallel/sharding/ and training/engines.py."""


def engine_names(path: Path) -> set[str]:
    """What a source names of an engine: imports (also late ones), names and attributes; words in texts are free."""
    tree = ast.parse(path.read_text())
    modules = {module for module in imported_modules(tree, path) if module.startswith(ENGINE_MODULES)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return modules | (names & ENGINE_NAMES)


def test_what_engines_are_made_of_is_named_in_few_files() -> None:
    folders = [folder for folder in CODE_FOLDERS if folder != "tests"]
    found = {name(path) for path in sources(*folders) if engine_names(path)}
    assert found == set(MAY_NAME_ENGINES)


COLLECTIVES = re.compile(
    r"^(all_gather|all_reduce|all_to_all|barrier|broadcast|gather|irecv|isend|monitored_barrier|recv|reduce|reduce_scatter|scatter|send)"
    r"(_object|_object_list|_single|_into_tensor|_tensor|_coalesced)?$"
)
ASKS = {"get_rank", "get_world_size"}
"""Of a group, too: what is as long as a group must not be as long as the world."""


def unnamed_groups(path: Path) -> list[str]:
    """Uses of torch.distributed's collectives that go to its default group because none is named, and such functions passed on."""
    tree = ast.parse(path.read_text())
    parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    out = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed")):
            continue
        if not (COLLECTIVES.match(node.attr) or node.attr in ASKS):
            continue
        call = parents[id(node)]
        if not isinstance(call, ast.Call):
            out.append(f"{name(path)}:{node.lineno}: {node.attr} without a call")
        elif call.func is node:
            # What is asked of a group has it as its only argument.
            if not (any(keyword.arg == "group" for keyword in call.keywords) or (node.attr in ASKS and call.args)):
                out.append(f"{name(path)}:{node.lineno}: {node.attr} of no group")
        elif not (ast.unparse(call.func).endswith("P2POp") and any(keyword.arg == "group" for keyword in call.keywords)):
            out.append(f"{name(path)}:{node.lineno}: {node.attr} passed on without a group")
    return out


MAY_ASK_THE_WORLD = {
    "checkpoint/rank_coordination.py": "a checkpoint is of the whole run, and also written without a process group",
}


@pytest.mark.parametrize("path", sources("training", "parallel", "memory", "checkpoint"), ids=name)
def test_every_collective_names_its_group(path: Path) -> None:
    found = unnamed_groups(path)
    if name(path) in MAY_ASK_THE_WORLD:
        assert found and all("get_" in line for line in found), "whatever it sends has a group of its own"
    else:
        assert not found


def test_the_walk_over_collectives_sees_what_it_is_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    lines = {
        "dist.all_reduce(x)": 1,
        "dist.all_reduce(x, dist.ReduceOp.MAX, group=g)": 0,
        "dist.barrier()": 1,
        "measure(together=dist.barrier)": 1,
        "torch.distributed.broadcast_object_list(x, 0, device=d)": 1,
        "dist.P2POp(dist.isend, x, 1)": 1,
        "dist.P2POp(dist.isend, x, group=g, group_peer=1)": 0,
        "dist.get_world_size()": 1,
        "dist.get_world_size(g)": 0,
        "dist.all_gather_object(rows, x)": 1,
        "dist.is_initialized()": 0,
        "self.all_reduce(x)": 0,
    }
    path = tmp_path / "one.py"
    for line, count in lines.items():
        path.write_text(line)
        assert len(unnamed_groups(path)) == count, line
