"""House rules, read from the source: sizes, who may import whom, what must stay light, what must be packaged."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("bench", "checkpoint", "cluster", "estimate", "launcher", "memory", "model", "parallel", "training", "utils", "tests")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500


def sources(*folders: str) -> list[Path]:
    """Python files below these folders; `""`: every folder of code and the root."""
    if folders == ("",):
        folders = CODE_FOLDERS
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


ORDER = (
    ("bench",),
    ("launcher",),
    ("training",),
    ("estimate",),
    ("model",),
    ("memory", "parallel"),
    ("checkpoint", "cluster"),
    ("utils",),
    ("units",),
    ("errors",),
)
"""Who may import whom: a folder imports from itself and from those after it. Anybody may import a config.py for its types."""
FLOOR = {folder: number for number, floor in enumerate(ORDER) for folder in floor}
RUNTIMES_OF_LAUNCHER = {"hydra", "omegaconf", "ray"}


@dataclass(frozen=True)
class Link:
    """One imported name: from which file, of which file, in which line."""

    source: str
    target: str
    line: int


def links() -> list[Link]:
    """All imports of the package's own modules, those inside functions and for type checkers alone included."""
    files = {name(path) for path in sources("") if "tests" not in path.relative_to(ROOT).parts[:1]}
    modules = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in files}
    named = []
    for file in sorted(files):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for module in imported_modules(ast.Module(body=[node], type_ignores=[]), ROOT / file):
                    module = module.removeprefix("efflaunch.")
                    target = modules.get(module) or modules.get(module.rpartition(".")[0])
                    if target is not None and target != file:
                        named.append(Link(file, target, node.lineno))
    return named


def test_no_circle_of_imports() -> None:
    """Counted with imports inside functions and under TYPE_CHECKING: a circle is one thing in two files."""
    below: dict[str, set[str]] = {}
    for link in links():
        below.setdefault(link.source, set()).add(link.target)
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_folders_import_one_way() -> None:
    def floor(file: str) -> int:
        return FLOOR.get(file.partition("/")[0].removesuffix(".py"), -1)

    upward = [
        f"{link.source}:{link.line} imports {link.target}"
        for link in links()
        if floor(link.target) < floor(link.source) and not link.target.endswith("/config.py") and floor(link.source) >= 0
    ]
    assert not upward
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} - {"tests", "conf", "slurm"}
    assert packages == {folder for floor in ORDER for folder in floor} - {"units", "errors"}, "every folder has its place in the order"


def test_the_root_holds_folders_and_four_files() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "units.py"}


def test_only_the_launcher_knows_hydra_and_ray() -> None:
    for path in sources("training", "estimate", "model", "parallel", "memory", "checkpoint", "cluster", "utils"):
        heads = {module.partition(".")[0] for module in imported_modules(ast.parse(path.read_text()), path)}
        assert not heads & RUNTIMES_OF_LAUNCHER, name(path)


def test_folders_say_what_they_answer() -> None:
    """The docstring of a package: a question, and what may be imported from it."""
    for path in sources(*FLOOR, "conf", "slurm"):
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert "?" in text.partition("\n")[0] and len(text) > 80, name(path)


HEAVY = {"torch", "transformers", "ray", "hydra", "omegaconf", "numpy", "datasets", "tokenizers", "pyarrow"}
IMPORTED_LATE = {"launcher/agent/elastic.py", "launcher/commands/data_progress.py"}
"""Modules of launcher/ that may: an agent imports the first once it is one, `data prepare` the second once it works."""
PURE_FOLDERS = ("launcher", "estimate", "cluster", "utils", "parallel/experts")
"""Folders of deciding code and of what it stands on: none of it may load what only a rank needs."""
PURE_FILES = (
    *("model/config.py", "model/spec.py", "model/hf_fields.py", "memory/config.py", "memory/policy.py", "memory/ranges.py"),
    *("parallel/config.py", "parallel/layout.py", "parallel/sequence/plan.py", "parallel/sequence/degrees.py"),
    *("parallel/sharding/config.py", "parallel/sharding/engine.py", "parallel/sharding/deepspeed_settings.py", "checkpoint/boxes.py"),
    *("parallel/pipeline/plan.py", "training/optimizers/engine_check.py"),
    *("checkpoint/config.py", "checkpoint/interval.py", "checkpoint/throttle.py", "checkpoint/sizes.py", "checkpoint/replica/plan.py"),
    *(
        "training/config.py",
        "training/data/config.py",
        "training/evaluation/config.py",
        "training/optimizers/config.py",
        "training/reporting/config.py",
    ),
)
"""What they import of the folders that run."""
NUMERIC = {"numpy", "scipy", "numba"}
"""Deciding code may compute; only the command line's own modules may not load these before they have to."""


def pure_sources() -> list[Path]:
    return [*sources(*PURE_FOLDERS), *(ROOT / file for file in PURE_FILES)]


@pytest.mark.parametrize("path", pure_sources(), ids=name)
def test_nothing_heavy_at_module_level(path: Path) -> None:
    if name(path) not in IMPORTED_LATE:
        modules = imported_modules(top_level(ast.parse(path.read_text())), path)
        allowed = set() if name(path).startswith("launcher/") else NUMERIC
        assert not {module.partition(".")[0] for module in modules} & HEAVY - allowed


def test_importing_the_launcher_stays_light() -> None:
    light = [name(path) for path in sources("launcher") if name(path) not in IMPORTED_LATE and path.name != "__main__.py"]
    assert not imported_by(light) & HEAVY


def test_deciding_code_loads_no_torch() -> None:
    """What folders of deciding code import, at any depth, is free of torch: a laptop without it can plan."""
    assert not imported_by([name(path) for path in sources("estimate", "cluster", "parallel/experts")]) & (HEAVY - NUMERIC)


def imported_by(files: list[str]) -> set[str]:
    """Top-level packages in memory after importing these modules and nothing else."""
    modules = [file[:-3].replace("/", ".").removesuffix(".__init__") for file in files]
    imports = f"[importlib.import_module('efflaunch.' + m) for m in {modules!r}]"
    code = f"import importlib, json, sys; {imports}; print(json.dumps([*sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True, timeout=600)
    return {module.partition(".")[0] for module in json.loads(result.stdout)}


def test_configuration_files_build_nothing() -> None:
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        assert "_target_" not in path.read_text(), name(path)


def test_every_package_is_packaged() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.parent for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    folders |= {path.parent for path in (ROOT / "conf").rglob("*.yaml")} | {ROOT / "slurm"}
    named = {".".join(["efflaunch", *folder.relative_to(ROOT).parts]) for folder in folders}
    listed = project["tool"]["setuptools"]["packages"]
    assert {package for package in named if not package.startswith("efflaunch.tests")} | {"efflaunch"} == set(listed)
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
        *extras["deepspeed"],
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
    "parallel/sharding/engine.py": "which modules are imported before ranks are forked",
    "parallel/sharding/experts.py": "experts over ranks, for the engine",
    "parallel/sharding/fsdp2.py": "the engine itself",
    "parallel/sharding/parts.py": "which part of a tensor a rank holds",
    "bench/bare_rank.py": "a plain loop to be measured against",
    "bench/contestants.py": "a plain loop to be measured against",
    "bench/chaos.py": "sharded tensors without any of our engines",
}
"""Everybody else asks these: a second engine touches parallel/sharding/ and training/engines.py."""


def engine_names(path: Path) -> set[str]:
    """What a source names of an engine: imports (also late ones, also by their name as text), names and attributes."""
    tree = ast.parse(path.read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    modules = {module for module in (*imported_modules(tree, path), *texts) if module.startswith(ENGINE_MODULES)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return modules | (names & ENGINE_NAMES)


def test_what_engines_are_made_of_is_named_in_few_files() -> None:
    folders = [folder for folder in CODE_FOLDERS if folder != "tests"]
    named = {name(path) for path in sources(*folders) if engine_names(path)}
    assert named == set(MAY_NAME_ENGINES)


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


@pytest.mark.parametrize("path", sources("training", "model", "parallel", "memory", "checkpoint", "utils"), ids=name)
def test_every_collective_names_its_group(path: Path) -> None:
    assert not unnamed_groups(path)


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
