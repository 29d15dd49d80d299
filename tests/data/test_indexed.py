"""Megatron's format: read and written byte for byte as megatron-core 0.16.1 does, and damaged files named.

The golden files were written by megatron-core's IndexedDatasetBuilder.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from efflaunch.errors import DataError
from efflaunch.training.data.indexed import IndexedCorpus, dtype_for
from efflaunch.training.data.writer import IndexedWriter, document_lengths

from .corpora import write_corpus

GOLDEN = Path(__file__).parent / "golden"
UINT16_DOCUMENTS = [[1, 2, 3], [65000], [], [7, 8, 9, 10, 11], [0, 65499]]
ITEM_DOCUMENTS = [[1, 2, 3, 4, 5], [150000], [6, 7, 8, 9]]


def _documents(prefix: Path) -> list[list[int]]:
    corpus = IndexedCorpus(str(prefix))
    return [corpus.tokens(d, 0, int(corpus.lengths[d])).tolist() for d in range(corpus.num_documents)]


def test_reads_what_megatron_wrote() -> None:
    assert _documents(GOLDEN / "megatron_uint16") == UINT16_DOCUMENTS


def test_reads_documents_of_several_items_with_modes() -> None:
    assert _documents(GOLDEN / "megatron_int32_items") == ITEM_DOCUMENTS


def test_writes_the_bytes_megatron_writes(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", UINT16_DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert filecmp.cmp(tmp_path / f"c{suffix}", GOLDEN / f"megatron_uint16{suffix}", shallow=False)


@pytest.mark.parametrize(("code", "dtype"), [(1, "uint8"), (2, "int8"), (3, "int16"), (4, "int32"), (5, "int64"), (8, "uint16")])
def test_every_integer_type(tmp_path: Path, code: int, dtype: str) -> None:
    write_corpus(tmp_path / "c", [[1, 2], [127]], dtype=dtype)
    header = (tmp_path / "c.idx").read_bytes()[:34]
    assert header == b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 2, 3)
    assert _documents(tmp_path / "c") == [[1, 2], [127]]


def test_the_token_type_is_megatrons_choice() -> None:
    assert (dtype_for(65499), dtype_for(65500)) == ("uint16", "int32")


def test_reads_a_part_of_a_document(tmp_path: Path) -> None:
    corpus = IndexedCorpus(write_corpus(tmp_path / "c", [[5, 6], [10, 11, 12, 13]], [[1, 1], [0, 1, 0, 1]]))
    assert corpus.tokens(1, 1, 3).tolist() == [11, 12]
    assert corpus.tokens(1, 1, 3).dtype == np.int64
    mask = corpus.mask(1, 1, 4)
    assert mask is not None and mask.tolist() == [True, False, True]
    assert corpus.tokens(0, 1, 1).tolist() == []


def test_offsets_beyond_two_gibibytes(tmp_path: Path) -> None:
    """A sparse .bin of 2^31 + 8 tokens: pointers, starts and reads are 64-bit."""
    lengths = np.array([2**31 - 1, 5, 4], dtype="<i4")
    starts = np.array([0, 2**31 - 1, 2**31 + 4], dtype=np.int64)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 4) + lengths.tobytes() + (starts * 4).tobytes()
    (tmp_path / "c.idx").write_bytes(index + np.arange(4, dtype="<i8").tobytes())
    with open(tmp_path / "c.bin", "wb") as stream:
        stream.seek(4 * (2**31 - 1))
        stream.write(np.arange(100, 109, dtype="<i4").tobytes())
    corpus = IndexedCorpus(str(tmp_path / "c"))
    assert corpus.num_tokens == 2**31 + 8
    assert corpus.tokens(1, 0, 5).tolist() == [100, 101, 102, 103, 104]
    assert corpus.tokens(2, 1, 4).tolist() == [106, 107, 108]
    assert corpus.tokens(0, 2**31 - 3, 2**31 - 1).tolist() == [0, 0]


def test_writer_pointers_are_64_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of lengths that sum to more than 2^31, without the tokens."""
    writer = IndexedWriter(str(tmp_path / "c"), "int32")
    writer.documents = 3
    lengths = np.array([2**31 - 1, 5, 4], dtype="<i4")
    writer._lengths.write(lengths.tobytes())
    writer.seal()
    writer.close()
    raw = (tmp_path / "c.idx.part").read_bytes()
    assert np.frombuffer(raw, "<i8", 3, offset=34 + 12).tolist() == [0, 4 * (2**31 - 1), 4 * (2**31 + 4)]
    assert document_lengths(str(tmp_path / "c"), 3).tolist() == lengths.tolist()


def test_nothing_has_its_name_before_the_end(tmp_path: Path) -> None:
    writer = IndexedWriter(str(tmp_path / "c"), "uint16")
    writer.add(np.array([1, 2, 3]))
    writer.commit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin.part", "c.lengths.part"]
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_a_resumed_writer_drops_what_came_after_its_state(tmp_path: Path) -> None:
    first = IndexedWriter(str(tmp_path / "c"), "uint16")
    first.add(np.array([1, 2]))
    state = first.commit()
    first.add(np.array([3, 4]), np.array([False, True]))
    first.close()
    second = IndexedWriter(str(tmp_path / "c"), "uint16", resume=state)
    second.add(np.array([5, 6, 7]))
    second.finish()
    assert _documents(tmp_path / "c") == [[1, 2], [5, 6, 7]]
    assert not IndexedCorpus(str(tmp_path / "c")).has_mask


def test_two_writers_of_one_corpus(tmp_path: Path) -> None:
    first = IndexedWriter(str(tmp_path / "c"), "uint16")
    with pytest.raises(DataError, match=r"c\.bin\.part: found another process writing it; expected one writer"):
        IndexedWriter(str(tmp_path / "c"), "uint16")
    first.close()


def test_parts_shorter_than_their_state(tmp_path: Path) -> None:
    writer = IndexedWriter(str(tmp_path / "c"), "uint16")
    writer.add(np.array([1, 2]))
    state = writer.commit()
    writer.close()
    (tmp_path / "c.bin.part").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.bin\.part: found 0 bytes; expected at least 4 bytes, as its state file says") as error:
        IndexedWriter(str(tmp_path / "c"), "uint16", resume=state)
    assert error.value.hint == "start again: add --restart"


def test_unmasked_documents_before_masked_ones_are_learnt(tmp_path: Path) -> None:
    writer = IndexedWriter(str(tmp_path / "c"), "uint16")
    writer.add(np.array([1, 2]))
    writer.add(np.array([3, 4, 5]), np.array([False, False, True]))
    writer.add(np.array([6]))
    writer.finish()
    assert list((tmp_path / "c.mask.bin").read_bytes()) == [1, 1, 0, 0, 1, 1]
    assert writer.loss_tokens == 4


def _patch(path: Path, at: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "no idx",
        lambda p: (p / "c.idx").unlink(),
        r"c\.idx: found no file; expected a Megatron indexed corpus \(PREFIX.idx and PREFIX.bin\)",
    ),
    ("no bin", lambda p: (p / "c.bin").unlink(), r"c\.bin: found no file; expected a Megatron indexed corpus"),
    ("empty idx", lambda p: (p / "c.idx").write_bytes(b""), r"c\.idx: found an empty file; expected a Megatron indexed corpus"),
    ("empty bin", lambda p: (p / "c.bin").write_bytes(b""), r"c\.bin: found an empty file"),
    ("short header", lambda p: (p / "c.idx").write_bytes(b"MMIDIDX"), r"c\.idx: found 7 bytes; expected at least 34 bytes of header"),
    (
        "magic",
        lambda p: _patch(p / "c.idx", 0, b"TNTIDX"),
        r"found a file that starts with b'TNTIDXX.*expected a Megatron index, which starts",
    ),
    ("version", lambda p: _patch(p / "c.idx", 9, b"\x02"), r"found index version 2; expected version 1"),
    ("float", lambda p: _patch(p / "c.idx", 17, b"\x07"), r"found token type code 7; expected an integer type: 1, 2, 3, 4, 5 or 8"),
    ("code", lambda p: _patch(p / "c.idx", 17, b"\x63"), r"found token type code 99"),
    (
        "cut idx",
        lambda p: (p / "c.idx").write_bytes((p / "c.idx").read_bytes()[:-8]),
        r"found 74 bytes; expected 82 bytes for 2 items and 2 doc",
    ),
    ("cut bin", lambda p: (p / "c.bin").write_bytes(b"\1\0\2\0"), r"c\.bin: found 4 bytes \(cut short\); expected 10 bytes: 5 tokens of 2"),
    ("long bin", lambda p: (p / "c.bin").write_bytes(bytes(12)), r"c\.bin: found 12 bytes \(too long\); expected 10 bytes"),
    ("length", lambda p: _patch(p / "c.idx", 34, b"\xff\xff\xff\xff"), r"found a negative item length"),
    ("pointer", lambda p: _patch(p / "c.idx", 50, b"\x05"), r"found items that do not lie end to end"),
    ("documents", lambda p: _patch(p / "c.idx", 74, b"\x01"), r"found a document list that does not cover the items in order"),
    ("cut mask", lambda p: (p / "c.mask.bin").write_bytes(b"\1"), r"c\.mask\.bin: found 1 bytes \(cut short\); expected 5 bytes"),
    (
        "no mask",
        lambda p: (p / "c.json").write_text('{"loss_mask": true}'),
        r"c\.mask\.bin: found no file; expected the loss mask that .*c\.json",
    ),
    ("json", lambda p: (p / "c.json").write_text("{"), r"c\.json: found a file that is not JSON"),
    ("deep json", lambda p: (p / "c.json").write_text("[" * 9000), r"c\.json: found a file that is not JSON"),
    ("json folder", lambda p: (p / "c.json").mkdir(), r"c\.json: found Is a directory"),
    ("kind", lambda p: (p / "c.json").write_text('{"kind": ["x"]}'), r"c\.json: found the kind \['x'\]; expected one of documents, pairs"),
    ("mask word", lambda p: (p / "c.json").write_text('{"loss_mask": 3}'), r"c\.json: found the loss_mask 3; expected true or false"),
    ("tokenizer", lambda p: (p / "c.json").write_text('{"tokenizer": "x"}'), r"c\.json: found the tokenizer 'x'"),
    ("words", lambda p: (p / "c.json").write_text('{"tokenizer": {"vocab_size": "9"}}'), r"c\.json: found the tokenizer"),
    ("folder", lambda p: ((p / "c.bin").unlink(), (p / "c.bin").mkdir()), r"c\.bin: found no plain file"),
]


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damaged_files_are_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2], [3, 4, 5]])
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        IndexedCorpus(prefix)
    assert "efflaunch data prepare INPUT" in error.value.hint
    assert error.value.exit_code == 93


def test_a_corpus_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c\.idx: found no tokens; expected at least one document"):
        IndexedCorpus(write_corpus(tmp_path / "c", [[], []]))


def test_a_file_name_instead_of_the_prefix(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2]])
    with pytest.raises(DataError, match="found a file name; expected the prefix of the pair") as error:
        IndexedCorpus(prefix + ".bin")
    assert error.value.hint == f"data.prefixes=[{prefix}]"


def test_metadata_is_read(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", [[1, 2]])
    assert IndexedCorpus(prefix).metadata is None
    (tmp_path / "c.json").write_text(json.dumps({"documents": 1}))
    assert IndexedCorpus(prefix).metadata == {"documents": 1}


def test_a_copied_megatron_corpus_is_used_as_it_is(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"megatron_uint16{suffix}", tmp_path / f"mine{suffix}")
    corpus = IndexedCorpus(str(tmp_path / "mine"))
    assert not corpus.has_mask and corpus.mask(0, 0, 3) is None
    assert corpus.num_tokens == 11
