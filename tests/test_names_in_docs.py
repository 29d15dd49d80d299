"""Files that pages and docstrings name are there, and the picture of the floors is the order that imports are held to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from efflaunch.tests.test_house import FLOOR, ORDER, name, sources

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATH = re.compile(r"(?<![\w/.\-{}])((?:[a-z_]+/)+[A-Za-z_]+\.(?:py|yaml|sbatch|md|txt|h|cpp))\b")
OWN = {*FLOOR, "tests", "conf", "docs", "slurm"}
"""Folders of the repository: a path that begins with another is a user's."""


def named(text: str) -> list[str]:
    paths = PATH.findall(text)
    return [path for path in paths if path.partition("/")[0] in OWN and "NAME" not in path]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_in_pages_are_there(page: Path) -> None:
    missing = [path for path in named(page.read_text()) if not (ROOT / path).exists() and not (page.parent / path).exists()]
    assert not missing


def test_files_named_in_sources_are_there() -> None:
    missing = [
        f"{name(source)} names {path}"
        for source in sources("")
        if "tests" not in source.relative_to(ROOT).parts[:1]
        for path in named(source.read_text())
        if not (ROOT / path).exists() and not (source.parent / path).exists()
    ]
    assert not missing


def test_pages_link_to_pages_that_are_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def sections(page: Path) -> set[str]:
    """Anchors of a page's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_link_to_sections_that_are_there() -> None:
    links = [(page, target, anchor) for page in PAGES for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text())]
    missing = [
        (page.name, target, anchor) for page, target, anchor in links if anchor not in sections(page.parent / target if target else page)
    ]
    assert len(links) > 10 and not missing


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_are_short(page: Path) -> None:
    """About 1,200 words at most beside code and tables; reasons go to docs/design/. The page of figures is written by a program."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    words = sum(len(line.split()) for line in text.splitlines() if not line.startswith("|"))
    assert words <= 1250 or page.name == "benchmarks.md"


def test_the_picture_of_the_floors_is_the_order_of_imports() -> None:
    picture = re.search(r"## The floors.*?```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert picture is not None
    drawn = [tuple(word for word in re.split(r"\s{2,}", line) if word in FLOOR) for line in picture[1].splitlines()]
    flat = [folder for floor in drawn for folder in floor]
    assert flat == [folder for floor in ORDER for folder in floor]


def test_no_file_holds_two_versions_of_a_line() -> None:
    """A merge that was not ended leaves them; in Python nothing would run, in pages and configuration nobody would notice."""
    marks = re.compile(r"^(<{7} |={7}$|>{7} )", re.MULTILINE)
    written = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "pyproject.toml", *(ROOT / "conf").rglob("*.yaml")]
    written += [path for kind in ("*.json", "*.txt") for path in (ROOT / "tests" / "golden").rglob(kind)]
    assert not [str(path.relative_to(ROOT)) for path in written if marks.search(path.read_text(encoding="utf-8"))]
