"""The page of a run: well-formed, by itself, with the run's figures in it, and nothing of the run's texts as markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from efflaunch.launcher.report.facts import read_facts
from efflaunch.launcher.report.page import page
from efflaunch.tests.launcher.report.evaluated_run import make_run

VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect"}


class Checker(HTMLParser):
    """Every element is closed in order; what could load something is noted."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.mistakes, self.loads, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self._look(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._look(tag, attributes)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.mistakes.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data):
        self.text.append(data)

    def _look(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "data", "action") or (name.endswith("href") and not str(value).startswith("#")):
                self.loads.append((tag, name, value))
        if tag in ("script", "iframe", "link", "object", "embed", "img"):
            self.loads.append((tag, "", ""))


def checked(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.mistakes == [] and checker.open == [], (checker.mistakes, checker.open)
    assert checker.loads == []
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    # Names of namespaces are no addresses that anybody reads.
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    return " ".join(checker.text)


def test_the_page_has_what_the_run_has(tmp_path):
    text = page(read_facts(make_run(tmp_path, mfu=0.4)))
    seen = checked(text)
    for words in (
        "mine", "revision 2", "done", "6 of 6", "7.0000 at step 1, 1.5000 at step 6", "2.2500", "1K 2.4500, 8K 2.2500", "+0.1250", "1,234",
        "rank 1 died & left <nothing>", "started again", "train.steps: 4 -> 6", "after step 2", "checkpoints/step-00000002", "MFU 40.0%",
        "holds: 1.0 GiB measured, 1.5 GiB predicted", "best, pinned", "held/<web>",
    ):  # fmt: skip
        assert words in seen, words
    assert text.count("<svg") == 8 and 'name="viewport"' in text and len(text) < 2_000_000


def test_a_run_that_has_not_started_has_a_page(tmp_path):
    run_dir = make_run(tmp_path)
    (run_dir / "metrics.jsonl").unlink()
    seen = checked(page(read_facts(run_dir)))
    assert "every key" in seen
