"""Rows of tables: Parquet, Arrow, `datasets` directories and JSON lists. Reading may begin at any row.

Each `open_*` gives the number of rows and a function from a first row to an iterator of (row number, rows as objects).
Values are as they are in JSON: maps become objects, and columns of JSON text (Arrow's extension type) are parsed.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from ...errors import DataError
from .records import FIELDS, MAIN_FIELDS
from .streams import opened

BATCH_ROWS = 512
Rows = Callable[[int], Iterator[tuple[int, list[dict[str, Any]]]]]


def open_parquet(path: str, text_field: str) -> tuple[int, Rows]:
    """The rows of a Parquet file. DataError if it is none, or has no column that is read."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise unusable(path, f"no Parquet file ({str(error).splitlines()[0]})", "a file written as Parquet") from error
    columns = readable_columns(path, file.schema_arrow.names, text_field)

    def rows(first: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        at = 0
        for group in range(file.num_row_groups):
            stop = at + file.metadata.row_group(group).num_rows
            # Whole row groups before the first wanted row are not read at all.
            for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=columns) if stop > first else ():
                skip = max(first - at, 0)
                if skip < batch.num_rows:
                    yield at + skip, _objects(batch.slice(skip))
                at += batch.num_rows
            at = stop

    return file.metadata.num_rows, rows


def open_arrow(path: str, text_field: str) -> tuple[int, Rows]:
    """The rows of an Arrow file (Feather too) or stream, as `datasets` caches are. DataError if it is none."""
    import pyarrow
    import pyarrow.ipc

    source = pyarrow.memory_map(path)
    try:
        try:
            table = pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowInvalid:
            source.seek(0)
            table = pyarrow.ipc.open_stream(source).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise unusable(path, f"no Arrow file ({str(error).splitlines()[0]})", "a file or stream written by Arrow") from error
    table = table.select(readable_columns(path, table.column_names, text_field))

    def rows(first: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start in range(first, table.num_rows, BATCH_ROWS):
            yield start, _objects(table.slice(start, BATCH_ROWS))

    return table.num_rows, rows


def open_dataset(path: str, text_field: str) -> tuple[int, Rows]:
    """The rows of a directory that `datasets` wrote. DataError if it cannot be read, or has several splits."""
    import datasets

    try:
        loaded = datasets.load_from_disk(path)
    except Exception as error:  # the library raises many kinds for damaged directories
        actual = f"no readable dataset ({str(error).splitlines()[0]})"
        raise unusable(path, actual, "a directory written by datasets' save_to_disk") from error
    if isinstance(loaded, datasets.DatasetDict):
        actual = f"several splits ({', '.join(loaded)})"
        raise DataError(f"input {path}", found=actual, expected="one split", hint=os.path.join(path, next(iter(loaded))))
    # The format it was saved with may give arrays instead of lists.
    table = loaded.select_columns(readable_columns(path, loaded.column_names, text_field)).with_format("arrow")

    def rows(first: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start in range(first, len(table), BATCH_ROWS):
            yield start, _objects(table[start : start + BATCH_ROWS])

    return len(table), rows


def open_json(path: str) -> tuple[int, Rows]:
    """The objects of a file that is one JSON list. DataError if it is none."""
    try:
        with opened(path) as (stream, _):
            content = json.loads(stream.read())
    except (ValueError, RecursionError) as error:
        raise unusable(path, f"a file that is not JSON ({error})", "a JSON list of objects") from error
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise unusable(path, f"JSON that is no list of objects ({type(content).__name__})", "a JSON list of objects")

    def rows(first: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        for start in range(first, len(content), BATCH_ROWS):
            yield start, content[start : start + BATCH_ROWS]

    return len(content), rows


def readable_columns(path: str, names: list[str], text_field: str) -> list[str]:
    """Names of the columns that are read. DataError where none of them makes a record."""
    if not any(name == text_field or name in MAIN_FIELDS for name in names):
        raise DataError(
            f"input {path}",
            found=f"columns {', '.join(names)}",
            expected=f"'{text_field}', or 'messages', or 'prompt' and 'completion'",
            hint=f"--text-field {shlex.quote(names[0]) if names else 'NAME'}",
        )
    return [name for name in names if name == text_field or name in FIELDS]


def unusable(path: str, actual: str, expected: str) -> DataError:
    """The error for an input that cannot be read."""
    return DataError(
        f"input {path}", found=actual, expected=expected, hint="efflaunch data prepare INPUT ... (see efflaunch data prepare --help)"
    )


def _objects(batch: Any) -> list[dict[str, Any]]:
    types = {field.name: field.type for field in batch.schema}
    plain = {name for name, kind in types.items() if not _has_special(kind)}
    rows: list[dict[str, Any]] = batch.to_pylist()
    if len(plain) == len(types):
        return rows
    return [{name: value if name in plain else _value(value, types[name]) for name, value in row.items()} for row in rows]


def _has_special(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_map(kind) or isinstance(kind, getattr(pyarrow, "JsonType", ())):
        return True
    return any(_has_special(kind.field(index).type) for index in range(kind.num_fields))


def _value(value: Any, kind: Any) -> Any:
    """A Python value of Arrow's, as JSON would have it."""
    import pyarrow

    if value is None:
        return None
    # pyarrow 18 has no such type.
    if isinstance(kind, getattr(pyarrow, "JsonType", ())):
        return json.loads(value)
    if pyarrow.types.is_map(kind):
        return {key: _value(member, kind.item_type) for key, member in value}
    if pyarrow.types.is_struct(kind):
        return {field.name: _value(value[field.name], field.type) for field in kind}
    if kind.num_fields == 1:
        return [_value(member, kind.field(0).type) for member in value]
    return value
