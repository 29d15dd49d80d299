"""What `data prepare` reads: files and directories become inputs, inputs become batches of raw records, in a fixed order.

Reading can start anywhere: a cursor after each batch says where the next one begins. Heavy libraries are imported by
the formats that need them. Text files are read by whoever encodes them, so one process need not read everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...errors import DataError
from .streams import csv_rows, inner_suffix, opened
from .tables import Rows, open_arrow, open_dataset, open_json, open_parquet, readable_columns, unusable

_BATCH_BYTES = 1 << 20
_BATCH_RECORDS = 512


class Format(Enum):
    """How an input is read; `auto` goes by the file name."""

    AUTO = "auto"
    TEXT = "text"
    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"
    ARROW = "arrow"
    DATASETS = "datasets"


_FORMATS = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl"), Format.JSONL),
    **dict.fromkeys((".csv", ".tsv"), Format.CSV),
    **dict.fromkeys((".parquet", ".pq"), Format.PARQUET),
    **dict.fromkeys((".arrow", ".feather"), Format.ARROW),
}


@dataclass(frozen=True, slots=True)
class Input:
    """One file, or one `datasets` directory, and what it looked like when it was found."""

    path: str
    format: Format
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where reading resumes: `offset` is a byte of (uncompressed) JSONL and a row of tables; `record` counts from 1 in messages."""

    input: int = 0
    offset: int = 0
    record: int = 0


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Records as they are read: (where, content). Content is a path (text), a line (JSONL), a header and cells (CSV) or a row."""

    format: Format
    records: list[tuple[str, Any]]
    after: Cursor
    done_bytes: int
    """Input bytes behind `after`, over all inputs."""


def find_inputs(arguments: list[str], wanted: Format) -> list[Input]:
    """Inputs behind the command line, directories recursed in sorted order. DataError where there is nothing to read."""
    inputs: list[Input] = []
    for argument in arguments:
        path = Path(argument)
        if not path.exists():
            raise unusable(argument, "nothing there", "a file or a directory")
        inside = list(_walk(path, wanted))
        if not inside:
            raise unusable(argument, "a directory without files", "at least one file to read")
        if wanted is Format.AUTO and path.is_dir():
            _check_mixture(argument, inside)
        inputs += inside
    return inputs


def _walk(path: Path, wanted: Format) -> Iterator[Input]:
    if path.is_file():
        yield _input(path, _format_of(path, wanted), [path])
        return
    if _is_dataset(path) and wanted in (Format.AUTO, Format.DATASETS):
        yield _input(path, Format.DATASETS, sorted(entry for entry in path.rglob("*") if entry.is_file()))
        return
    for entry in sorted(path.iterdir()):
        # Hidden files and folders are tools' own (.git, .cache): nobody means them by naming a directory.
        # Links to folders may lead back up; pipes, sockets and dangling links are no documents.
        folder = entry.is_dir() and not entry.is_symlink()
        if not entry.name.startswith(".") and (folder or entry.is_file()):
            yield from _walk(entry, wanted)


def _is_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _check_mixture(argument: str, inside: list[Input]) -> None:
    """Raise DataError for a directory where some files are records and others are texts: a README is no document of a table's."""
    records = next((entry.path for entry in inside if entry.format is not Format.TEXT), None)
    text = next((entry.path for entry in inside if entry.format is Format.TEXT), None)
    if records is not None and text is not None:
        raise DataError(
            f"input {argument}",
            found=f"records ({records}) beside texts ({text})",
            expected="a directory of one kind",
            hint=f"name the files ({argument}/*{inner_suffix(records)}), or --format text to take each file as one text",
        )


def _format_of(path: Path, wanted: Format) -> Format:
    if wanted is Format.DATASETS:
        raise unusable(str(path), "a file", "a directory written by datasets' save_to_disk")
    if wanted is not Format.AUTO:
        return wanted
    suffix = inner_suffix(path)
    if suffix == ".json":
        return _format_of_json(path)
    return _FORMATS.get(suffix, Format.TEXT)


def _format_of_json(path: Path) -> Format:
    with opened(str(path)) as (stream, _):
        head = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"[":
        return Format.JSON
    kind = "a .json file, which may be lines of JSON or one text"
    raise DataError(f"input {path}", found=kind, expected="a format", hint="--format jsonl, or --format text")


def _input(path: Path, kind: Format, files: list[Path]) -> Input:
    stats = [file.stat() for file in files]
    return Input(str(path), kind, sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0))


def read_batches(inputs: list[Input], text_field: str, start: Cursor) -> Iterator[RawBatch]:
    """Yields every batch from `start` on, in order. Where batches are cut does not change what is read."""
    starts = [0, *accumulate(entry.size_bytes for entry in inputs)]
    here = start
    while here.input < len(inputs):
        entry = inputs[here.input]
        batches: Iterable[RawBatch]
        if entry.format is Format.TEXT:
            batches = [_text_batch(inputs, here.input, starts)]
        elif entry.format is Format.JSONL:
            batches = _jsonl_batches(entry, here, starts[here.input])
        elif entry.format is Format.CSV:
            batches = _csv_batches(entry, text_field, here, starts[here.input])
        else:
            batches = _table_batches(entry, text_field, here, starts[here.input])
        for batch in batches:
            yield batch
            here = batch.after


def _text_batch(inputs: list[Input], first: int, starts: list[int]) -> RawBatch:
    """The next text files in a row that make a batch; at least one."""
    last = first
    while last < len(inputs) and last - first < _BATCH_RECORDS and starts[last] - starts[first] < _BATCH_BYTES:
        if inputs[last].format is not Format.TEXT:
            break
        last += 1
    records = [(entry.path, entry.path) for entry in inputs[first:last]]
    return RawBatch(Format.TEXT, records, Cursor(last), starts[last])


def _jsonl_batches(entry: Input, start: Cursor, before: int) -> Iterator[RawBatch]:
    records: list[tuple[str, bytes]] = []
    size, offset, number = 0, start.offset, start.record
    with opened(entry.path, offset) as (stream, raw):
        for line in stream:
            offset, number, size = offset + len(line), number + 1, size + len(line)
            if line.strip():
                records.append((f"{entry.path} line {number}", line))
            if size >= _BATCH_BYTES or len(records) >= _BATCH_RECORDS:
                done = min(offset if stream is raw else raw.tell(), entry.size_bytes)
                yield RawBatch(Format.JSONL, records, Cursor(start.input, offset, number), before + done)
                records, size = [], 0
    yield RawBatch(Format.JSONL, records, Cursor(start.input + 1), before + entry.size_bytes)


def _csv_batches(entry: Input, text_field: str, start: Cursor, before: int) -> Iterator[RawBatch]:
    records: list[tuple[str, Any]] = []
    size = row = 0
    for line, (header, cells), done in csv_rows(entry.path):
        if row == 0:
            readable_columns(entry.path, header, text_field)
        row += 1
        if row <= start.offset:
            continue
        records.append((f"{entry.path} line {line}", (header, cells)))
        size += sum(map(len, cells))
        if size >= _BATCH_BYTES or len(records) >= _BATCH_RECORDS:
            yield RawBatch(Format.CSV, records, Cursor(start.input, row, row), before + min(done, entry.size_bytes))
            records, size = [], 0
    yield RawBatch(Format.CSV, records, Cursor(start.input + 1), before + entry.size_bytes)


def _table_batches(entry: Input, text_field: str, start: Cursor, before: int) -> Iterator[RawBatch]:
    total, rows = _open_table(entry, text_field)
    for first, chunk in rows(start.offset):
        records = [(f"{entry.path} row {first + k + 1}", row) for k, row in enumerate(chunk)]
        stop = first + len(chunk)
        yield RawBatch(entry.format, records, Cursor(start.input, stop, stop), before + entry.size_bytes * stop // max(total, 1))
    yield RawBatch(entry.format, [], Cursor(start.input + 1), before + entry.size_bytes)


def _open_table(entry: Input, text_field: str) -> tuple[int, Rows]:
    if entry.format is Format.JSON:
        return open_json(entry.path)
    opens = {Format.PARQUET: open_parquet, Format.ARROW: open_arrow, Format.DATASETS: open_dataset}
    return opens[entry.format](entry.path, text_field)
