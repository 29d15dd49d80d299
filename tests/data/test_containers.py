"""The tokens do not depend on the container: the same records in every file format give the same corpus, byte for byte."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import DataError
from efflaunch.training.data.encode import EncodeOptions
from efflaunch.training.data.inputs import Format, find_inputs
from efflaunch.training.data.prepare import PrepareRequest, prepare

from .small_tokenizers import save_tokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content if m.content is defined else '' }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ m.keys() | list }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER, ANSWER, OTHER = ({"role": role, "content": text} for role, text in (("user", "Two?"), ("assistant", "Four."), ("assistant", "Five.")))
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
OTHER_TOOL = {"type": "function", "function": {"name": "say", "parameters": {"type": "object"}, "strict": True}}
"""Members that both have are in one order: a column knows no other."""


def tool_call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


RECORDS: dict[str, list[dict[str, Any]]] = {
    "documents": [
        {"text": "Two plus two is four."},
        {"prompt": "Two plus two is", "completion": " four."},
        {"prompt": "", "completion": "Five and three?"},
        {"messages": [USER, ANSWER]},
        {"messages": [USER, tool_call("add", a=2), {"role": "tool", "content": "4"}, ANSWER], "tools": [TOOL, OTHER_TOOL]},
        {"messages": [{**USER, "name": None}, tool_call("say", text="four", loud=None)], "tools": [OTHER_TOOL]},
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "chat_template_kwargs": {"x": "y"}},
        {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}]},
        {"instruction": "Two?", "input": "plus", "output": "Four."},
        {"text": None, "prompt": "Kind", "completion": " words", "tools": None},
    ],
    "pairs": [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": [tool_call("add", a=1)], "rejected": [tool_call("add", b="c")], "tools": [TOOL]},
    ],
    "completions": [
        {"prompt": [USER], "completions": [{"messages": [ANSWER], "reward": 1.0}, {"messages": [OTHER], "reward": 0.0}]},
        {"prompt": [USER, ANSWER, USER], "completions": [{"messages": [OTHER], "reward": 0.5}, {"messages": [ANSWER], "reward": 0.0}]},
    ],
}
TEXTS = {
    "texts": [{"text": 'Two, "plus"\ntwo'}, {"text": "Five"}, {"text": ""}, {"text": " three "}],
    "exchanges": [{"prompt": "Two is", "completion": " four"}, {"prompt": "", "completion": "five\nand"}],
    "preferences": [{"prompt": "Two is", "chosen": " four", "rejected": " five"}, {"prompt": "", "chosen": "a", "rejected": "kind"}],
}
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer("byte_level", tmp_path_factory.mktemp("tok") / "tokenizer", TEMPLATE)


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstandard_frames(data: bytes) -> bytes:
    import pyarrow

    # Two frames, as parallel compressors write.
    codec, middle = pyarrow.Codec("zstd"), len(data) // 2
    return bytes(codec.compress(data[:middle], asbytes=True) + codec.compress(data[middle:], asbytes=True))


def _write_all(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """The rows in every container, JSON lines first."""
    import datasets
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    plain = folder / "rows.jsonl"
    plain.write_bytes(lines_of(rows))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    for suffix, compress in {**COMPRESS, ".zst": zstandard_frames}.items():
        (folder / f"rows.jsonl{suffix}").write_bytes(compress(plain.read_bytes()))
    table = pyarrow.Table.from_pylist(_named(rows))
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
    pyarrow.feather.write_feather(table, folder / "rows.feather")
    pyarrow.parquet.write_table(_otherwise_typed(table), folder / "typed.parquet")
    pyarrow.feather.write_feather(_otherwise_typed(table), folder / "typed.feather", compression="zstd")
    dataset = datasets.Dataset(table)
    dataset.to_parquet(folder / "datasets.parquet")
    dataset.save_to_disk(folder / "saved")
    dataset.save_to_disk(folder / "shards", num_shards=2)
    dataset.with_format("numpy").save_to_disk(folder / "formatted")
    datasets.Dataset.from_json(str(plain), cache_dir=str(folder / "cache")).save_to_disk(folder / "loaded")
    with pyarrow.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    names = ("rows.json", *(f"rows.jsonl{s}" for s in (*COMPRESS, ".zst")), "rows.parquet", "rows.feather", "datasets.parquet")
    other = ("typed.parquet", "typed.feather", "saved", "shards", "formatted", "loaded", "stream.arrow")
    return [plain, *(folder / name for name in (*names, *other))]


def _otherwise_typed(table: Any) -> Any:
    """Texts as dictionaries, as categories are written, and as large strings."""
    import pyarrow

    columns = {name: table[name] for name in table.column_names}
    texts = [name for name, column in columns.items() if pyarrow.types.is_string(column.type)]
    for place, name in enumerate(texts):
        columns[name] = columns[name].dictionary_encode() if place % 2 else columns[name].cast(pyarrow.large_string())
    return pyarrow.table(columns)


def _named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # pyarrow takes the names of columns from the first row.
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def corpus_of(path: Path, tokenizer: str, out: Path, **options: Any) -> dict[str, bytes]:
    prepare(PrepareRequest([str(path)], str(out), EncodeOptions(tokenizer, **options), num_workers=1), lambda progress: None)
    return {path.name: path.read_bytes() for path in sorted(out.parent.iterdir()) if path.suffix != ".json"}


@pytest.mark.parametrize("kind", RECORDS)
def test_every_container_gives_the_samecorpus_of(tokenizer: str, tmp_path: Path, kind: str) -> None:
    paths = _write_all(RECORDS[kind], tmp_path)
    corpora = {path.name: corpus_of(path, tokenizer, tmp_path / "out" / path.name / "c") for path in paths}
    assert {name: corpus == corpora["rows.jsonl"] for name, corpus in corpora.items()} == dict.fromkeys(corpora, True)
    metadata = json.loads((tmp_path / "out" / "rows.jsonl" / "c.json").read_text())
    assert metadata["kind"] == kind and metadata["chat_template"] == TEMPLATE and metadata["end_of_turn"] == "<|end|>"
    assert metadata["documents"] == len(RECORDS[kind]) * (2 if kind == "completions" else 1)


@pytest.mark.parametrize("kind", TEXTS)
def test_csv_gives_the_samecorpus_of(tokenizer: str, tmp_path: Path, kind: str) -> None:
    rows = TEXTS[kind]
    (tmp_path / "rows.jsonl").write_bytes(lines_of(rows))
    expected = corpus_of(tmp_path / "rows.jsonl", tokenizer, tmp_path / "out" / "jsonl" / "c")
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert corpus_of(tmp_path / name, tokenizer, tmp_path / "out" / name / "c") == expected
    for suffix, compress in {**COMPRESS, ".zst": zstandard_frames}.items():
        (tmp_path / f"rows.csv{suffix}").write_bytes(compress((tmp_path / "rows.csv").read_bytes()))
        assert corpus_of(tmp_path / f"rows.csv{suffix}", tokenizer, tmp_path / "out" / suffix / "c") == expected


def test_messages_in_csv_are_json_text(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER], "tools": [TOOL]}, {"messages": [USER, OTHER]}]
    (tmp_path / "rows.jsonl").write_bytes(lines_of(rows))
    with open(tmp_path / "rows.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["messages", "tools"], *([json.dumps(row["messages"]), json.dumps(row.get("tools", []))] for row in rows)])
    expected = corpus_of(tmp_path / "rows.jsonl", tokenizer, tmp_path / "a" / "c")
    assert corpus_of(tmp_path / "rows.csv", tokenizer, tmp_path / "b" / "c") == expected


def test_messages_as_json_text_are_messages_in_every_container(tokenizer: str, tmp_path: Path) -> None:
    """A completion that is a list of other objects as JSON text stays the text it is."""
    rows = [
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        {"prompt": "Two?", "completion": json.dumps([{"name": "add", "arguments": {"a": 2}}])},
    ]
    plain = [{"prompt": [USER], "completion": [ANSWER]}, rows[1]]
    for name, lines in (("text", rows), ("lists", plain)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines_of(lines))
    with open(tmp_path / "rows.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    names = ("lists.jsonl", "text.jsonl", "rows.csv")
    expected, *others = [corpus_of(tmp_path / name, tokenizer, tmp_path / "out" / name / "c") for name in names]
    assert others == [expected, expected]


def test_a_directory_holds_records_or_texts(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("text\nTwo\n")
    (tmp_path / "README.md").write_text("About it.")
    with pytest.raises(
        DataError, match=r"found records \(.*a\.csv\) beside texts \(.*README\.md\); expected a directory of one kind"
    ) as error:
        find_inputs([str(tmp_path)], Format.AUTO)
    assert error.value.hint == f"name the files ({tmp_path}/*.csv), or --format text to take each file as one text"
    assert len(find_inputs([str(tmp_path)], Format.TEXT)) == 2
