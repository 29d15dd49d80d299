"""Sources without a test of their own name: listed in golden/without_test.txt, which can only become shorter.

A source has a test where `test_NAME.py` lies in the folder of its own path below tests/, or in one on the way to it. What is listed may
well be covered by tests of what uses it; the list says where a newcomer finds no test by name.
`python -m efflaunch.tests.test_mirrors` prints the list as it would be now, for a tree that was moved.
"""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
LIST = TESTS / "golden" / "without_test.txt"
NO_CODE = {"tests", "docs", "conf", "slurm", "build"}


def sources() -> list[Path]:
    """Every source of the package, from the root on; an __init__ or __main__ is its folder's."""
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    kept = [path for path in paths if path.parts[0] not in NO_CODE and not any(part.startswith(".") for part in path.parts)]
    return sorted(path for path in kept if path.stem not in ("__init__", "__main__"))


def looked_for(source: Path) -> list[Path]:
    """Where a test of that name would be looked for: in the mirrored folder first."""
    parts = source.parent.parts
    folders = [Path(*kept) for kept in _parts_of(parts)]
    return [folder / f"test_{source.stem}.py" for folder in sorted(folders, key=lambda folder: -len(folder.parts))]


def _parts_of(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every choice of the parts that keeps their order."""
    chosen: list[tuple[str, ...]] = [()]
    for part in parts:
        chosen += [(*before, part) for before in chosen]
    return chosen


def without_test() -> list[str]:
    return [str(source) for source in sources() if not any((TESTS / path).exists() for path in looked_for(source))]


def listed() -> list[str]:
    return [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]


def test_a_new_source_has_a_test_of_its_name() -> None:
    new = sorted(set(without_test()) - set(listed()))
    assert not new, f"write tests/{looked_for(Path(new[0]))[0]} for {new[0]} (and so on for {new[1:]})"


def test_the_list_only_becomes_shorter() -> None:
    over = sorted(set(listed()) - set(without_test()))
    assert not over, f"take out of {LIST.relative_to(ROOT)}, for they have a test or are gone: {over}"
    assert listed() == sorted(set(listed()))


def test_where_a_test_is_looked_for() -> None:
    assert looked_for(Path("units.py")) == [Path("test_units.py")]
    assert looked_for(Path("launcher/nodes/outcome.py"))[0] == Path("launcher/nodes/test_outcome.py")
    assert Path("launcher/test_outcome.py") in looked_for(Path("launcher/nodes/outcome.py"))
    assert Path("parallel/test_outcome.py") not in looked_for(Path("launcher/nodes/outcome.py"))


if __name__ == "__main__":
    print("\n".join(without_test()))
