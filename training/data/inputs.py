"""What `data prepare` reads: files and directories become inputs, inputs become batches of raw records, in a fixed order.

Reading can start anywhere: a cursor after each batch says where the next one begins. Heavy libraries are imported by
the formats that need them. Text files are read by whoever encodes them, so one process need not read everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...errors import DataError

RECORD_FIELDS = ("messages", "tools", "prompt", "completion", "chosen", "rejected", "completions")
"""Columns that mean something besides the text field."""
_BATCH_BYTES = 1 << 20
_BATCH_RECORDS = 512


class Format(Enum):
    """How an input is read; `auto` goes by the file name."""

    AUTO = "auto"
    TEXT = "text"
    JSONL = "jsonl"
    PARQUET = "parquet"
    DATASETS = "datasets"


@dataclass(frozen=True, slots=True)
class Input:
    """One file, or one `datasets` directory, and what it looked like when it was found."""

    path: str
    format: Format
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where reading goes on: `offset` is a byte in JSONL and a row in tables; `record` counts from 1 in messages."""

    input: int = 0
    offset: int = 0
    record: int = 0


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Records as they were found: (where, content). Content is a path (text), a line (JSONL) or a row."""

    format: Format
    records: list[tuple[str, Any]]
    after: Cursor
    done_bytes: int
    """Input bytes behind `after`, over all inputs."""


def find_inputs(arguments: list[str], wanted: Format) -> list[Input]:
    """Inputs behind the command line, directories recursed in sorted order. DataError where there is nothing to read."""
    found: list[Input] = []
    for argument in arguments:
        path = Path(argument)
        if not path.exists():
            raise _unusable(argument, "nothing there", "a file or a directory")
        if path.suffix.lower() == ".json" and path.is_file() and wanted is Format.AUTO:
            kind = "a .json file, which may be lines of JSON or one text"
            raise DataError(f"input {argument}", found=kind, expected="a format", hint="--format jsonl, or --format text")
        inside = list(_walk(path, wanted))
        if not inside:
            raise _unusable(argument, "a directory without files", "at least one file to read")
        found += inside
    return found


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


def _format_of(path: Path, wanted: Format) -> Format:
    if wanted is Format.DATASETS:
        raise _unusable(str(path), "a file", "a directory written by datasets' save_to_disk")
    if wanted is not Format.AUTO:
        return wanted
    return {".jsonl": Format.JSONL, ".ndjson": Format.JSONL, ".parquet": Format.PARQUET}.get(path.suffix.lower(), Format.TEXT)


def _input(path: Path, kind: Format, files: list[Path]) -> Input:
    stats = [file.stat() for file in files]
    return Input(str(path), kind, sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0))


def read_batches(inputs: list[Input], text_field: str, start: Cursor) -> Iterator[RawBatch]:
    """Everything from `start` on, in order. Where batches are cut does not change what is read."""
    starts = [0, *accumulate(entry.size_bytes for entry in inputs)]
    here = start
    while here.input < len(inputs):
        entry = inputs[here.input]
        batches: Iterable[RawBatch]
        if entry.format is Format.TEXT:
            batches = [_text_batch(inputs, here.input, starts)]
        elif entry.format is Format.JSONL:
            batches = _jsonl_batches(entry, here, starts[here.input])
        else:
            batches = _table_batches(entry, text_field, here, starts[here.input])
        for batch in batches:
            yield batch
            here = batch.after


def _text_batch(inputs: list[Input], first: int, starts: list[int]) -> RawBatch:
    """As many text files in a row as make a batch; at least one."""
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
    with open(entry.path, "rb") as stream:
        stream.seek(offset)
        for line in stream:
            offset, number, size = offset + len(line), number + 1, size + len(line)
            if line.strip():
                records.append((f"{entry.path} line {number}", line))
            if size >= _BATCH_BYTES or len(records) >= _BATCH_RECORDS:
                yield RawBatch(Format.JSONL, records, Cursor(start.input, offset, number), before + offset)
                records, size = [], 0
    yield RawBatch(Format.JSONL, records, Cursor(start.input + 1), before + entry.size_bytes)


def _table_batches(entry: Input, text_field: str, start: Cursor, before: int) -> Iterator[RawBatch]:
    total, rows = _open_parquet(entry, text_field) if entry.format is Format.PARQUET else _open_dataset(entry, text_field)
    for first, chunk in rows(start.offset):
        records = [(f"{entry.path} row {first + k + 1}", row) for k, row in enumerate(chunk)]
        stop = first + len(chunk)
        yield RawBatch(entry.format, records, Cursor(start.input, stop, stop), before + entry.size_bytes * stop // max(total, 1))
    yield RawBatch(entry.format, [], Cursor(start.input + 1), before + entry.size_bytes)


def _open_parquet(entry: Input, text_field: str) -> tuple[int, Any]:
    """Number of rows, and a function from a first row to an iterator of (row number, rows)."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(entry.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unusable(entry.path, f"no Parquet file ({str(error).splitlines()[0]})", "a file written as Parquet") from error
    columns = _known_columns(entry, file.schema_arrow.names, text_field)

    def rows(first: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        at = 0
        for group in range(file.num_row_groups):
            stop = at + file.metadata.row_group(group).num_rows
            # Whole row groups before the first wanted row are not read at all.
            for batch in file.iter_batches(batch_size=_BATCH_RECORDS, row_groups=[group], columns=columns) if stop > first else ():
                skip = max(first - at, 0)
                if skip < batch.num_rows:
                    yield at + skip, batch.slice(skip).to_pylist()
                at += batch.num_rows
            at = stop

    return file.metadata.num_rows, rows


def _open_dataset(entry: Input, text_field: str) -> tuple[int, Any]:
    import datasets

    try:
        loaded = datasets.load_from_disk(entry.path)
    except Exception as error:  # the library raises many kinds for damaged directories
        found = f"no readable dataset ({str(error).splitlines()[0]})"
        raise _unusable(entry.path, found, "a directory written by datasets' save_to_disk") from error
    if isinstance(loaded, datasets.DatasetDict):
        found = f"several splits ({', '.join(loaded)})"
        raise DataError(f"input {entry.path}", found=found, expected="one split", hint=os.path.join(entry.path, next(iter(loaded))))
    table = loaded.select_columns(_known_columns(entry, loaded.column_names, text_field))

    def rows(first: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start in range(first, len(table), _BATCH_RECORDS):
            columns = table[start : start + _BATCH_RECORDS]
            yield start, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    return len(table), rows


def _known_columns(entry: Input, names: list[str], text_field: str) -> list[str]:
    known = [name for name in names if name == text_field or name in RECORD_FIELDS]
    if not known:
        raise DataError(
            f"input {entry.path}",
            found=f"columns {', '.join(names)}",
            expected=f"'{text_field}', or 'messages', or 'prompt' and 'completion'",
            hint=f"--text-field {names[0] if names else 'NAME'}",
        )
    return known


def _unusable(path: str, found: str, expected: str) -> DataError:
    return DataError(
        f"input {path}", found=found, expected=expected, hint="efflaunch data prepare INPUT ... (see efflaunch data prepare --help)"
    )
