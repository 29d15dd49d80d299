"""Files of bytes: compressed or not, and the rows of CSV files. Which it is goes by the last suffix."""

from __future__ import annotations

import csv
import io
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import DataError
from .messages import bad_record
from .records import ANSWERS, FIELDS, LISTS

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_CHUNK = 1 << 20


def inner_suffix(path: str | Path) -> str:
    """The suffix that says what a file holds: `.jsonl` of x.jsonl.gz; `` where there is none."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def opened(path: str, start: int = 0) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file's content from byte `start` on, and the file itself, whose position says how far reading is.

    DataError for a compressed file that is damaged or cut short, whenever that shows.
    """
    damages: tuple[type[Exception], ...] = (EOFError, OSError, *_damages(path))
    try:
        with open(path, "rb") as raw:
            stream = _decompressed(path, raw)
            if stream is raw:
                raw.seek(start)
            else:
                _skip(stream, start)
            yield stream, raw
    except damages as error:
        if Path(path).suffix.lower() not in COMPRESSIONS or (isinstance(error, OSError) and error.errno is not None):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"input {path}", found=f"a damaged compressed file ({reason})", expected="a whole one", hint="compress or download it again"
        ) from error


def _decompressed(path: str, raw: BinaryIO) -> Any:
    # Each library is imported by the files that need it.
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        import gzip

        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        import bz2

        return bz2.BZ2File(raw)
    if suffix == ".xz":
        import lzma

        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
    return raw


def _damages(path: str) -> tuple[type[Exception], ...]:
    """What a library raises for damaged content, besides EOFError and OSError."""
    suffix = Path(path).suffix.lower()
    if suffix == ".xz":
        import lzma

        return (lzma.LZMAError,)
    if suffix == ".zst":
        import pyarrow

        return (pyarrow.ArrowException,)
    return (zlib.error,)


def _skip(stream: BinaryIO, count: int) -> None:
    while count > 0:
        piece = stream.read(min(count, _CHUNK))
        if not piece:
            return
        count -= len(piece)


def csv_rows(path: str) -> Iterator[tuple[int, tuple[list[str], list[str]], int]]:
    """Yields for each CSV or TSV row its line, the columns' names with its cells, and the bytes of the file read by then.

    Bytes that are no UTF-8 are kept as lone surrogates for `csv_row` to refuse. DataError for a file without a header.
    """
    csv.field_size_limit(sys.maxsize)  # documents are long
    with opened(path) as (stream, raw):
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines, delimiter="\t" if inner_suffix(path) == ".tsv" else ",", strict=True)
        header = _next_row(path, reader)
        if not header or len(set(header)) != len(header):
            actual = "no header" if not header else f"a header that names a column twice ({', '.join(header)})"
            raise DataError(
                f"input {path}", found=actual, expected="a first line that names the columns", hint="--format text reads it as text"
            )
        while True:
            line = reader.line_num + 1
            cells = _next_row(path, reader)
            if cells is None:
                return
            if cells:
                yield line, (header, cells), raw.tell()


def _next_row(path: str, reader: Any) -> list[str] | None:
    line = reader.line_num + 1
    try:
        row: list[str] | None = next(reader, None)
    except csv.Error as error:
        raise DataError(
            f"input {path} line {line}",
            found=f"a row that is no CSV ({error})",
            expected="cells, with quotes doubled inside quotes",
            hint="mend it",
        ) from error
    return row


def csv_row(where: str, raw: tuple[list[str], list[str]], text_field: str) -> dict[str, Any]:
    """The record of a CSV row: empty cells are absent, conversations are JSON text. DataError for a row of another width."""
    header, cells = raw
    if len(cells) != len(header):
        raise bad_record(
            where, f"{len(cells)} cells", f"{len(header)}, as many as the header has (quote texts with commas and line breaks)"
        )
    if any("\ud800" <= character <= "\udfff" for cell in cells for character in cell):
        raise bad_record(where, "bytes that are not UTF-8", "UTF-8 text")
    given = {name: cell for name, cell in zip(header, cells, strict=True) if name == text_field or name in FIELDS}
    row: dict[str, Any] = {name: _cell(name, cell) for name, cell in given.items() if cell}
    if not row and text_field in given:
        row[text_field] = ""
    if "prompt" in given and any(name in row for name in (*ANSWERS, "completion")):
        # An empty prompt looks like no prompt.
        row.setdefault("prompt", "")
    return row


def _cell(name: str, text: str) -> Any:
    """The cell, or the list it is the JSON text of, where the field holds nothing else; messages are read by `read_record`."""
    if name not in LISTS or not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
