"""docs/compare.md: every line says something of everybody, and what we say of ourselves leads to the page that shows it."""

from __future__ import annotations

import re

from efflaunch.tests.pages import DOCS

WORDS = {"yes", "partly", "no", "?"}


def _rows() -> list[list[str]]:
    lines = [line for line in (DOCS / "compare.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_cell_is_one_of_four_words() -> None:
    head, *rows = _rows()
    assert len(rows) > 30 and len({row[0] for row in rows}) == len(rows)
    for row in rows:
        assert len(row) == len(head) and all(re.split(r"[ :]", cell)[0] in WORDS for cell in row[1:]), row


def test_what_we_can_do_leads_to_its_page() -> None:
    for row in _rows()[1:]:
        linked = re.findall(r"\(([a-z_]+\.md)\)", row[-1])
        assert all((DOCS / page).is_file() for page in linked), row
        assert linked or row[-1] == "no", row
