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
from efflaunch.training.data import inputs as inputs_module
from efflaunch.training.data.encode import EncodeOptions
from efflaunch.training.data.inputs import Cursor, Format, find_inputs, read_batches
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


def _call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


RECORDS: dict[str, list[dict[str, Any]]] = {
    "documents": [
        {"text": "Two plus two is four."},
        {"prompt": "Two plus two is", "completion": " four."},
        {"prompt": "", "completion": "Five and three?"},
        {"messages": [USER, ANSWER]},
        {"messages": [USER, _call("add", a=2), {"role": "tool", "content": "4"}, ANSWER], "tools": [TOOL, OTHER_TOOL]},
        {"messages": [{**USER, "name": None}, _call("say", text="four", loud=None)], "tools": [OTHER_TOOL]},
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "chat_template_kwargs": {"x": "y"}},
        {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}]},
        {"instruction": "Two?", "input": "plus", "output": "Four."},
        {"text": None, "prompt": "Kind", "completion": " words", "tools": None},
    ],
    "pairs": [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": [USER], "chosen": [_call("add", a=1)], "rejected": [_call("add", b="c")], "tools": [TOOL]},
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


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _zst(data: bytes) -> bytes:
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
    plain.write_bytes(_lines(rows))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    for suffix, compress in {**COMPRESS, ".zst": _zst}.items():
        (folder / f"rows.jsonl{suffix}").write_bytes(compress(plain.read_bytes()))
    table = pyarrow.Table.from_pylist(_named(rows))
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)
    pyarrow.feather.write_feather(table, folder / "rows.feather")
    dataset = datasets.Dataset(table)
    dataset.to_parquet(folder / "datasets.parquet")
    dataset.save_to_disk(folder / "saved")
    dataset.with_format("numpy").save_to_disk(folder / "formatted")
    datasets.Dataset.from_json(str(plain), cache_dir=str(folder / "cache")).save_to_disk(folder / "loaded")
    with pyarrow.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    names = ("rows.json", *(f"rows.jsonl{s}" for s in (*COMPRESS, ".zst")), "rows.parquet", "rows.feather", "datasets.parquet")
    return [plain, *(folder / name for name in (*names, "saved", "formatted", "loaded", "stream.arrow"))]


def _named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # pyarrow takes the names of columns from the first row.
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _corpus(path: Path, tokenizer: str, out: Path, **options: Any) -> dict[str, bytes]:
    prepare(PrepareRequest([str(path)], str(out), EncodeOptions(tokenizer, **options), num_workers=1), lambda progress: None)
    return {path.name: path.read_bytes() for path in sorted(out.parent.iterdir()) if path.suffix != ".json"}


@pytest.mark.parametrize("kind", RECORDS)
def test_every_container_gives_the_same_corpus(tokenizer: str, tmp_path: Path, kind: str) -> None:
    paths = _write_all(RECORDS[kind], tmp_path)
    corpora = {path.name: _corpus(path, tokenizer, tmp_path / "out" / path.name / "c") for path in paths}
    assert {name: corpus == corpora["rows.jsonl"] for name, corpus in corpora.items()} == dict.fromkeys(corpora, True)
    metadata = json.loads((tmp_path / "out" / "rows.jsonl" / "c.json").read_text())
    assert metadata["kind"] == kind and metadata["chat_template"] == TEMPLATE and metadata["end_of_turn"] == "<|end|>"
    assert metadata["documents"] == len(RECORDS[kind]) * (2 if kind == "completions" else 1)


@pytest.mark.parametrize("kind", TEXTS)
def test_csv_gives_the_same_corpus(tokenizer: str, tmp_path: Path, kind: str) -> None:
    rows = TEXTS[kind]
    (tmp_path / "rows.jsonl").write_bytes(_lines(rows))
    expected = _corpus(tmp_path / "rows.jsonl", tokenizer, tmp_path / "out" / "jsonl" / "c")
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        assert _corpus(tmp_path / name, tokenizer, tmp_path / "out" / name / "c") == expected
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress((tmp_path / "rows.csv").read_bytes()))
    assert _corpus(tmp_path / "rows.csv.gz", tokenizer, tmp_path / "out" / "gz" / "c") == expected


def test_messages_in_csv_are_json_text(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER], "tools": [TOOL]}, {"messages": [USER, OTHER]}]
    (tmp_path / "rows.jsonl").write_bytes(_lines(rows))
    with open(tmp_path / "rows.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([["messages", "tools"], *([json.dumps(row["messages"]), json.dumps(row.get("tools", []))] for row in rows)])
    expected = _corpus(tmp_path / "rows.jsonl", tokenizer, tmp_path / "a" / "c")
    assert _corpus(tmp_path / "rows.csv", tokenizer, tmp_path / "b" / "c") == expected


def test_columns_of_json_and_maps_are_objects(tokenizer: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [USER, _call("add", a=1, b=[1, None])]}, {"messages": [USER, _call("say", text="x")]}]
    (tmp_path / "rows.jsonl").write_bytes(_lines(rows))
    expected = _corpus(tmp_path / "rows.jsonl", tokenizer, tmp_path / "a" / "c")
    texts = pyarrow.array([json.dumps(message) for row in rows for message in row["messages"]])
    messages = pyarrow.ListArray.from_arrays([0, 2, 4], pyarrow.ExtensionArray.from_storage(pyarrow.json_(), texts))
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "json.parquet")
    assert _corpus(tmp_path / "json.parquet", tokenizer, tmp_path / "b" / "c") == expected
    rows = [{"messages": [USER, ANSWER], "chat_template_kwargs": {"bos_token": "<s>"}}]
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    arguments = pyarrow.array([[("bos_token", "<s>")]], kind)
    table = pyarrow.table({"messages": pyarrow.array([row["messages"] for row in rows]), "chat_template_kwargs": arguments})
    pyarrow.parquet.write_table(table, tmp_path / "map.parquet")
    (tmp_path / "rows.jsonl").write_bytes(_lines(rows))
    assert _corpus(tmp_path / "map.parquet", tokenizer, tmp_path / "d" / "c") == _corpus(
        tmp_path / "rows.jsonl", tokenizer, tmp_path / "e" / "c"
    )


def test_reading_resumes_in_the_middle_of_every_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "_BATCH_RECORDS", 2)
    rows = [{"text": f"number {n}\nof rows"} for n in range(7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text("text\n" + "".join(f'"number {n}\nof rows"\n' for n in range(7)))
    for suffix, compress in {**COMPRESS, ".zst": _zst}.items():
        (tmp_path / f"rows.jsonl{suffix}").write_bytes(compress(_lines(rows)))
    found = find_inputs([str(tmp_path)], Format.AUTO)
    batches = list(read_batches(found, "text", Cursor()))
    records = [record for batch in batches for record in batch.records]
    assert len(records) == 7 * 6 and batches[-1].done_bytes == sum(entry.size_bytes for entry in found)
    seen = 0
    for batch in batches:
        seen += len(batch.records)
        assert [record for later in read_batches(found, "text", batch.after) for record in later.records] == records[seen:]


DAMAGED = [
    (
        "x.jsonl.gz",
        gzip.compress(b'{"text": "a"}\n' * 99)[:-9],
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
        _corpus(tmp_path / name, tokenizer, tmp_path / "c")


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
