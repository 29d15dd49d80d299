"""Compressed files and CSV: read from any place on, and named where they are damaged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from efflaunch.errors import DataError
from efflaunch.training.data import inputs as inputs_module
from efflaunch.training.data.inputs import Cursor, Format, find_inputs, read_batches

from .small_tokenizers import save_tokenizer
from .test_containers import COMPRESS, TEMPLATE, corpus_of, lines_of, zstandard_frames


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer("byte_level", tmp_path_factory.mktemp("tok") / "tokenizer", TEMPLATE)


def test_reading_resumes_in_the_middle_of_every_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "_BATCH_RECORDS", 2)
    rows = [{"text": f"number {n}\nof rows"} for n in range(7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f'"number {n}\nof rows"\n' for n in range(7)))
    for suffix, compress in {**COMPRESS, ".zst": zstandard_frames}.items():
        (tmp_path / f"rows.jsonl{suffix}").write_bytes(compress(lines_of(rows)))
    inputs = find_inputs([str(tmp_path)], Format.AUTO)
    batches = list(read_batches(inputs, "text", Cursor()))
    records = [record for batch in batches for record in batch.records]
    assert len(records) == 7 * 6 and batches[-1].done_bytes == sum(entry.size_bytes for entry in inputs)
    seen = 0
    for batch in batches:
        seen += len(batch.records)
        assert [record for later in read_batches(inputs, "text", batch.after) for record in later.records] == records[seen:]


DAMAGED = [
    (
        "x.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
        r"x\.jsonl\.gz: found a damaged compressed file \(.+\); expected a whole one",
    ),
    ("x.jsonl.bz2", b"BZh9 not at all", r"x\.jsonl\.bz2: found a damaged compressed file"),
    ("x.jsonl.xz", b"nothing of the kind", r"x\.jsonl\.xz: found a damaged compressed file"),
    ("x.jsonl.zst", b"nothing of the kind", r"x\.jsonl\.zst: found a damaged compressed file"),
    ("x.txt.gz", b"plain", r"x\.txt\.gz: found a damaged compressed file"),
    ("x.arrow", b"nothing", r"x\.arrow: found no Arrow file"),
    ("x.json", b"[1, 2]", r"x\.json: found JSON that is no list of objects"),
    ("x.json", b"[{", r"x\.json: found a file that is not JSON"),
    ("x.json", b'{"a": 1}', r"found a \.json file, which may be lines of JSON or one text"),
    ("x.csv", b"", r"x\.csv: found no header"),
    ("x.csv", b"a,a\n1,2\n", r"x\.csv: found a header that names a column twice"),
    ("x.csv", b"a,b\n1,2\n", r"x\.csv: found columns a, b; expected 'text'"),
    ("x.csv", b'text\n"open\n', r"x\.csv line 2: found a row that is no CSV"),
    ("x.csv", b"text,b\nTwo is,2\nThree\n", r"x\.csv line 3: found 1 cells; expected 2"),
    ("x.csv", b"text\nTwo is\n\xff\n", r"x\.csv line 3: found bytes that are not UTF-8"),
    ("x.csv", b"messages\n\"[{'role': 'user'}]\"\n", r"x\.csv line 2: found text in 'messages' that is not JSON"),
    ("x.jsonl", b"[" * 100000 + b"\n", r"x\.jsonl line 1: found a line that is not JSON"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_damaged_files_are_named(tokenizer: str, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        corpus_of(tmp_path / name, tokenizer, tmp_path / "c")
