"""`data prepare`: every format, several processes, killed anywhere and run again, the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import DataError
from efflaunch.tests.limits import ENDS_S, wait_until
from efflaunch.training.data import inputs as inputs_module
from efflaunch.training.data.builtin import train_tokenizer
from efflaunch.training.data.encode import EncodeOptions
from efflaunch.training.data.indexed import IndexedCorpus
from efflaunch.training.data.inputs import Cursor, Format, find_inputs, read_batches
from efflaunch.training.data.prepare import PrepareProgress, PrepareRequest, prepare

PROCESS = Path(__file__).with_name("prepare_process.py")


def _nothing(progress: PrepareProgress) -> None:
    pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tok") / "tokenizer"
    train_tokenizer(["the quick brown fox number 0123456789 jumps over the lazy dog"] * 3, 300, folder)
    return str(folder)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One input of each format, each of several batches, with masks in the middle and documents too short on the way."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "texts" / "deep").mkdir(parents=True)
    for number in range(700):
        (folder / "texts" / ("deep" if number % 2 else ".") / f"{number:03}.txt").write_text("" if number == 5 else f"text number {number}")
    rows = [{"prompt": f"number {n} ", "completion": f"quick {n}"} if n % 3 else {"text": f"line number {n}"} for n in range(1100)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    table = pyarrow.table({"text": [f"row number {n}" for n in range(1300)], "other": list(range(1300))})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=600)
    datasets.Dataset.from_dict({"text": [f"fox number {n}" for n in range(1100)]}).save_to_disk(str(folder / "saved"))
    return [str(folder / name) for name in ("texts", "lines.jsonl", "table.parquet", "saved")]


@pytest.fixture(scope="module")
def whole(everything: list[str], tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of `everything`, made without interruption in this process."""
    out = tmp_path_factory.mktemp("whole") / "c"
    prepare(PrepareRequest(everything, str(out), EncodeOptions(tokenizer), num_workers=1), _nothing)
    return out


def _texts(prefix: Path, tokenizer: str) -> list[str]:
    from tokenizers import Tokenizer

    corpus, loaded = IndexedCorpus(str(prefix)), Tokenizer.from_file(tokenizer + "/tokenizer.json")
    documents = (corpus.tokens(d, 0, int(corpus.lengths[d])).tolist() for d in range(corpus.num_documents))
    return [loaded.decode(ids, skip_special_tokens=False).removesuffix("<|endoftext|>") for ids in documents]


def check_same_corpus(one: Path, two: Path) -> None:
    for suffix in (".bin", ".idx", ".mask.bin", ".json"):
        assert Path(f"{one}{suffix}").read_bytes() == Path(f"{two}{suffix}").read_bytes(), suffix
    names = sorted(path.name for path in two.parent.iterdir())
    assert names == sorted(f"{two.name}{suffix}" for suffix in (".bin", ".idx", ".mask.bin", ".json"))


def test_every_format_gives_its_documents_in_order(whole: Path, tokenizer: str) -> None:
    names = sorted(range(0, 700, 2), key="{:03}.txt".format)
    expected = [f"text number {n}" for n in [*names, *range(1, 700, 2)] if n != 5]
    expected += [f"number {n} quick {n}" if n % 3 else f"line number {n}" for n in range(1100)]
    expected += [f"row number {n}" for n in range(1300)] + [f"fox number {n}" for n in range(1100)]
    assert _texts(whole, tokenizer) == expected


def test_metadata_tells_what_was_done(whole: Path, everything: list[str], tokenizer: str) -> None:
    metadata = json.loads(Path(f"{whole}.json").read_text())
    corpus = IndexedCorpus(str(whole))
    assert (metadata["documents"], metadata["tokens"]) == (corpus.num_documents, corpus.num_tokens) == (4199, int(corpus.lengths.sum()))
    assert metadata["loss_tokens"] == sum(Path(f"{whole}.mask.bin").read_bytes()) < metadata["tokens"]
    assert metadata["skipped"] == {"fewer than 2 tokens": {"count": 1, "first": everything[0] + "/deep/005.txt"}}
    assert metadata["tokenizer"]["path"] == tokenizer and metadata["tokenizer"]["vocab_size"] == 300
    assert metadata["lengths"]["max"] == int(corpus.lengths.max()) and metadata["lengths"]["min"] == int(corpus.lengths.min())
    assert metadata["inputs"]["files"] == 703


def test_several_processes_write_the_same_bytes(whole: Path, everything: list[str], tokenizer: str, tmp_path: Path) -> None:
    prepare(PrepareRequest(everything, str(tmp_path / "c"), EncodeOptions(tokenizer), num_workers=2), _nothing)
    check_same_corpus(whole, tmp_path / "c")


def _run(folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    path = folder.parent / f"{folder.name}.settings.json"
    path.write_text(json.dumps(settings))
    return subprocess.run([sys.executable, str(PROCESS), str(path)], capture_output=True, text=True, timeout=ENDS_S)


def test_killed_and_run_again_gives_the_same_bytes(whole: Path, everything: list[str], tokenizer: str, tmp_path: Path) -> None:
    """kill -9 inside each format in turn, then while the final names are given."""
    out = tmp_path / "out" / "c"
    arguments = {"inputs": everything, "out": str(out), "encode": {"tokenizer": tokenizer}, "num_workers": 1}
    # The second attempt dies with three batches written and not committed.
    for batches, commit_every_s in ((1, 0), (3, 1e9), (3, 0), (3, 0), (4, 0)):
        killed = _run(out.parent, arguments=arguments, kill_after_batches=batches, commit_every_s=commit_every_s)
        assert killed.returncode == -9, killed.stderr
        assert not any(Path(f"{out}{suffix}").exists() for suffix in (".bin", ".idx", ".json", ".mask.bin"))
    for renames in (1, 2):
        assert _run(out.parent, arguments=arguments, kill_at_rename=renames).returncode == -9
        assert not Path(f"{out}.idx").exists()
    finished = _run(out.parent, arguments=arguments)
    assert finished.returncode == 0, finished.stderr
    check_same_corpus(whole, out)


def test_workers_do_not_outlive_a_killed_parent(everything: list[str], tokenizer: str, tmp_path: Path) -> None:
    arguments = {"inputs": everything, "out": str(tmp_path / "c"), "encode": {"tokenizer": tokenizer}, "num_workers": 2}
    killed = _run(tmp_path, arguments=arguments, kill_after_batches=1)
    assert killed.returncode == -9, killed.stderr
    workers = json.loads(killed.stdout)
    assert len(workers) == 2
    wait_until(lambda: not any(_alive(worker) for worker in workers), "workers outlived their parent")


def _alive(pid: int) -> bool:
    try:
        # A process nobody has waited for yet is dead, too.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_reading_may_start_after_any_batch(everything: list[str]) -> None:
    inputs = find_inputs(everything, Format.AUTO)
    batches = list(read_batches(inputs, "text", Cursor()))
    records = [record for batch in batches for record in batch.records]
    assert [batch.done_bytes for batch in batches] == sorted(batch.done_bytes for batch in batches)
    assert batches[-1].done_bytes == sum(entry.size_bytes for entry in inputs)
    seen = 0
    for batch in batches:
        seen += len(batch.records)
        rest = [record for later in read_batches(inputs, "text", batch.after) for record in later.records]
        assert rest == records[seen:]


def test_a_parquet_row_group_behind_the_cursor_is_not_read(everything: list[str]) -> None:
    (entry,) = find_inputs([everything[2]], Format.AUTO)
    first, *_ = read_batches([entry], "text", Cursor(0, 650, 650))
    assert first.records[0] == (f"{everything[2]} row 651", {"text": "row number 650"})


def _texts_request(tmp_path: Path, tokenizer: str, *names: str, **changes: Any) -> PrepareRequest:
    folder = tmp_path / "in"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"the quick {name}")
    return replace(PrepareRequest([str(folder)], str(tmp_path / "out" / "c"), EncodeOptions(tokenizer), num_workers=1), **changes)


def test_the_same_command_again_does_nothing(tmp_path: Path, tokenizer: str) -> None:
    request = _texts_request(tmp_path, tokenizer, "a.txt", "b.txt")
    first = prepare(request, _nothing)
    before = os.stat(request.out + ".bin").st_mtime_ns
    assert prepare(request, _nothing) == first
    assert os.stat(request.out + ".bin").st_mtime_ns == before


def test_another_corpus_is_never_overwritten(tmp_path: Path, tokenizer: str) -> None:
    request = _texts_request(tmp_path, tokenizer, "a.txt")
    prepare(request, _nothing)
    (tmp_path / "in" / "b.txt").write_text("more")
    with pytest.raises(
        DataError, match=r"output .*c\.bin: found a file of another corpus, or of other inputs, .*; expected nothing there"
    ) as error:
        prepare(request, _nothing)
    assert error.value.hint == "another --out, or remove it first"


class _Stop(Exception):
    pass


def _interrupted(request: PrepareRequest) -> None:
    """Commit one batch, then stop."""

    def stop(progress: PrepareProgress) -> None:
        raise _Stop

    with pytest.raises(_Stop):
        prepare(replace(request, commit_every_s=0.0), stop)


def test_changed_inputs_or_tokenizer_do_not_mix(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "_BATCH_RECORDS", 1)
    request = _texts_request(tmp_path, tokenizer, "a.txt", "b.txt")
    _interrupted(request)
    with pytest.raises(DataError) as error:
        prepare(replace(request, encode=EncodeOptions(tokenizer, append_eos=False)), _nothing)
    assert str(error.value).startswith(
        f"unfinished corpus {request.out}: found that the tokenizer and the options changed since it was started"
    )
    (tmp_path / "in" / "b.txt").write_text("something else")
    with pytest.raises(
        DataError, match="found that the inputs changed since it was started; expected the same inputs, tokenizer and"
    ) as error:
        prepare(request, _nothing)
    assert error.value.hint.endswith("the same command with --restart")
    prepare(replace(request, restart=True), _nothing)
    assert _texts(Path(request.out), tokenizer) == ["the quick a.txt", "something else"]


def test_a_bad_record_leaves_nothing_and_the_mended_input_works(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "the quick"}\n{"nope": 1}\n')
    request = PrepareRequest([str(path)], str(tmp_path / "out" / "c"), EncodeOptions(tokenizer), num_workers=1)
    with pytest.raises(DataError, match=r"x\.jsonl line 2: found fields nope"):
        prepare(request, _nothing)
    assert list((tmp_path / "out").iterdir()) == []
    path.write_text('{"text": "the quick"}\n')
    assert prepare(request, _nothing)["documents"] == 1


def test_an_attempt_stopped_by_a_bad_record_resumes_skipping(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "_BATCH_RECORDS", 1)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "the quick"}\n{"nope": 1}\n{"text": "lazy dog"}\n')
    request = PrepareRequest([str(path)], str(tmp_path / "c"), EncodeOptions(tokenizer), num_workers=1, commit_every_s=0.0)
    with pytest.raises(DataError, match=r"x\.jsonl line 2: found fields nope"):
        prepare(request, _nothing)
    skipping = replace(request, encode=EncodeOptions(tokenizer, skip_bad=True))
    assert prepare(skipping, _nothing)["skipped"] == {"fields nope": {"count": 1, "first": f"{path} line 2"}}
    assert _texts(tmp_path / "c", tokenizer) == ["the quick", "lazy dog"]


def test_a_bad_record_in_a_worker_is_the_same_error(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"nope": 1}\n')
    with pytest.raises(DataError, match=r"x\.jsonl line 1: found fields nope"):
        prepare(PrepareRequest([str(path)], str(tmp_path / "c"), EncodeOptions(tokenizer), num_workers=2), _nothing)


def test_inputs_without_a_document(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "x.jsonl").write_text("\n")
    (tmp_path / "e.txt").write_text("")
    request = PrepareRequest(
        [str(tmp_path / "x.jsonl"), str(tmp_path / "e.txt")], str(tmp_path / "c"), EncodeOptions(tokenizer), num_workers=1
    )
    with pytest.raises(DataError, match=r"found no document to train on in 2 inputs \(1 skipped: fewer than 2 tokens\)"):
        prepare(request, _nothing)
    assert not any(path.name.startswith("c.") for path in tmp_path.iterdir())


def _bad_inputs(folder: Path) -> dict[str, tuple[str, Format, str]]:
    import datasets

    (folder / "empty").mkdir()
    (folder / "x.json").write_text("{}")
    (folder / "bad.parquet").write_bytes(b"no parquet")
    table = datasets.Dataset.from_dict({"body": ["a"], "id": [1]})
    table.save_to_disk(str(folder / "columns"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(folder / "splits"))
    return {
        "nowhere": ("nowhere", Format.AUTO, "input .*nowhere: found nothing there; expected a file or a directory"),
        "empty": ("empty", Format.AUTO, "input .*empty: found a directory without files; expected at least one file to read"),
        "json": (
            "x.json",
            Format.AUTO,
            r"found a \.json file, which may be lines of JSON or one text; expected a format.\n  Try: --format jsonl",
        ),
        "parquet": ("bad.parquet", Format.AUTO, r"bad\.parquet: found no Parquet file \(.*\); expected a file written as Parquet"),
        "columns": ("columns", Format.AUTO, "found columns body, id; expected 'text', or 'messages', .*\n  Try: --text-field body"),
        "splits": ("splits", Format.AUTO, r"found several splits \(train, test\); expected one split.\n  Try: .*splits/train"),
        "file": ("x.json", Format.DATASETS, "x.json: found a file; expected a directory written by datasets' save_to_disk"),
    }


@pytest.mark.parametrize("case", ["nowhere", "empty", "json", "parquet", "columns", "splits", "file"])
def test_inputs_that_cannot_be_read_are_named(tmp_path: Path, case: str) -> None:
    name, wanted, message = _bad_inputs(tmp_path)[case]
    with pytest.raises(DataError, match=message):
        list(read_batches(find_inputs([str(tmp_path / name)], wanted), "text", Cursor()))


def test_links_and_pipes_are_no_documents(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.txt").write_text("a")
    (folder / "link.txt").symlink_to(folder / "deep" / "a.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    assert [entry.path for entry in find_inputs([str(folder)], Format.AUTO)] == [f"{folder}/deep/a.txt", f"{folder}/link.txt"]


def test_restart_after_a_kill_while_names_were_given(everything: list[str], tokenizer: str, tmp_path: Path) -> None:
    """What the first attempt had already named goes too: its mask must not be read with the second corpus."""
    out = tmp_path / "out" / "c"
    arguments = {"inputs": everything[1:2], "out": str(out), "encode": {"tokenizer": tokenizer}, "num_workers": 1}
    assert _run(out.parent, arguments=arguments, kill_at_rename=2).returncode == -9
    assert Path(f"{out}.mask.bin").exists() and not Path(f"{out}.idx").exists()
    prepare(PrepareRequest(everything[2:3], str(out), EncodeOptions(tokenizer), num_workers=1, restart=True), _nothing)
    assert sorted(path.name for path in out.parent.iterdir()) == ["c.bin", "c.idx", "c.json"]
    assert IndexedCorpus(str(out)).num_documents == 1300


def test_hidden_files_are_left_alone_and_a_format_may_be_forced(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "in" / ".git").mkdir(parents=True)
    (tmp_path / "in" / ".git" / "config").write_text("hidden")
    (tmp_path / "in" / "x.data").write_text('{"text": "lazy dog"}\n')
    request = PrepareRequest([str(tmp_path / "in")], str(tmp_path / "c"), EncodeOptions(tokenizer), format=Format.JSONL, num_workers=1)
    prepare(request, _nothing)
    assert _texts(tmp_path / "c", tokenizer) == ["lazy dog"]
