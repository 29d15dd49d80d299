"""Columns that are no plain values: JSON text by its type, and maps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .small_tokenizers import save_tokenizer
from .test_containers import ANSWER, TEMPLATE, USER, corpus_of, lines_of, tool_call


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer("byte_level", tmp_path_factory.mktemp("tok") / "tokenizer", TEMPLATE)


def test_columns_of_json_and_maps_are_objects(tokenizer: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [USER, tool_call("add", a=1, b=[1, None])]}, {"messages": [USER, tool_call("say", text="x")]}]
    (tmp_path / "rows.jsonl").write_bytes(lines_of(rows))
    expected = corpus_of(tmp_path / "rows.jsonl", tokenizer, tmp_path / "a" / "c")
    texts = pyarrow.array([json.dumps(message) for row in rows for message in row["messages"]])
    messages = pyarrow.ListArray.from_arrays([0, 2, 4], pyarrow.ExtensionArray.from_storage(pyarrow.json_(), texts))
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "json.parquet")
    assert corpus_of(tmp_path / "json.parquet", tokenizer, tmp_path / "b" / "c") == expected
    rows = [{"messages": [USER, ANSWER], "chat_template_kwargs": {"bos_token": "<s>"}}]
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    arguments = pyarrow.array([[("bos_token", "<s>")]], kind)
    table = pyarrow.table({"messages": pyarrow.array([row["messages"] for row in rows]), "chat_template_kwargs": arguments})
    pyarrow.parquet.write_table(table, tmp_path / "map.parquet")
    (tmp_path / "rows.jsonl").write_bytes(lines_of(rows))
    assert corpus_of(tmp_path / "map.parquet", tokenizer, tmp_path / "d" / "c") == corpus_of(
        tmp_path / "rows.jsonl", tokenizer, tmp_path / "e" / "c"
    )
