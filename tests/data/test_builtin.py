"""The built-in corpus: deterministic, cached, built once by however many processes ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from efflaunch.errors import ConfigError
from efflaunch.tests.limits import ENDS_S
from efflaunch.training.data import builtin
from efflaunch.training.data.builtin import builtin_corpus, stdlib_files, train_tokenizer
from efflaunch.training.data.config import DataConfig
from efflaunch.training.data.indexed import IndexedCorpus
from efflaunch.training.data.source import open_data


@pytest.fixture
def few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A standard library of three files, one of them not UTF-8."""
    for name, content in (("a.py", b"import os\n" * 40), ("b.py", "print('\u00fc')\n".encode("latin-1")), ("c.py", b"x = 1\n")):
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in ("a.py", "b.py", "c.py")]
    monkeypatch.setattr(builtin, "stdlib_files", lambda: paths)
    return paths


def _text(tokenizer_dir: str, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(tokenizer_dir + "/tokenizer.json").decode(ids, skip_special_tokens=False))


def test_documents_are_the_files(few_files: list[Path], tmp_path: Path) -> None:
    made = builtin_corpus("python_stdlib", vocab_size=300, cache_dir=str(tmp_path / "cache"))
    corpus = IndexedCorpus(made.prefix)
    texts = [_text(made.tokenizer, corpus.tokens(d, 0, int(corpus.lengths[d])).tolist()) for d in range(corpus.num_documents)]
    assert texts == ["import os\n" * 40 + "<|endoftext|>", "x = 1\n<|endoftext|>"]


def test_training_opens_it(few_files: list[Path], tmp_path: Path) -> None:
    config = DataConfig(
        name="t", builtin="python_stdlib", vocab_size=300, cache_dir=str(tmp_path / "cache"), max_seq_len=32, global_batch_tokens=64
    )
    source = open_data(config, 0, 300)
    ids, targets = source.tokens(0, 0, 0, source.lengths(0)[0])
    assert ids.max() < 300 and np.array_equal(ids[1:], targets[:-1])


def test_a_changed_file_or_size_makes_another_corpus(few_files: list[Path], tmp_path: Path) -> None:
    made = [builtin_corpus("python_stdlib", vocab_size=size, cache_dir=str(tmp_path / "cache")).prefix for size in (300, 280, 300)]
    few_files[2].write_text("x = 2\n")
    made.append(builtin_corpus("python_stdlib", vocab_size=300, cache_dir=str(tmp_path / "cache")).prefix)
    assert made[0] == made[2] and len(set(made)) == 3


def test_files_are_read_again_only_where_they_changed(few_files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path / "cache")
    first = builtin_corpus("python_stdlib", vocab_size=300, cache_dir=cache)
    with monkeypatch.context() as unread:
        unread.setattr(builtin, "read_texts", lambda _: pytest.fail("read again"))
        assert builtin_corpus("python_stdlib", vocab_size=300, cache_dir=cache) == first
    touched = few_files[2].stat()
    os.utime(few_files[2], ns=(touched.st_atime_ns, touched.st_mtime_ns + 1))
    assert builtin_corpus("python_stdlib", vocab_size=300, cache_dir=cache) == first, "other times, the same texts"


def test_what_a_killed_builder_left_is_no_harm(few_files: list[Path], tmp_path: Path) -> None:
    first = builtin_corpus("python_stdlib", vocab_size=300, cache_dir=str(tmp_path / "one"))
    name = Path(first.tokenizer).name
    left = tmp_path / "two" / f"{name}.part"
    left.mkdir(parents=True)
    (left / "corpus.bin.part").write_bytes(b"rubbish")
    second = builtin_corpus("python_stdlib", vocab_size=300, cache_dir=str(tmp_path / "two"))
    for suffix in (".bin", ".idx"):
        assert Path(first.prefix + suffix).read_bytes() == Path(second.prefix + suffix).read_bytes()
    assert not left.exists()


_BUILD = """
import sys
from pathlib import Path
from efflaunch.training.data import builtin
builtin.stdlib_files = lambda: [Path(sys.argv[1])]
real = builtin._build
def counted(*given):
    with open(sys.argv[2] + "/built", "a") as stream:
        stream.write("once\\n")
    real(*given)
builtin._build = counted
print(builtin.builtin_corpus("python_stdlib", vocab_size=300, cache_dir=sys.argv[2]).prefix)
"""


def test_several_processes_build_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    command = [sys.executable, "-c", _BUILD, __file__, str(cache)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = {process.communicate(timeout=ENDS_S)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(outputs) == 1 and IndexedCorpus(outputs.pop().strip()).num_documents == 1
    assert (cache / "built").read_text() == "once\n"


def test_the_tokenizer_is_deterministic(tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in stdlib_files()[:12]]
    for name in ("a", "b"):
        train_tokenizer(texts, 500, tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_the_standard_library_is_large_and_long_tailed() -> None:
    sizes = sorted(path.stat().st_size for path in stdlib_files())
    assert len(sizes) > 500
    assert sizes[-1] > 20 * sizes[len(sizes) // 2]


def test_unknown_name_and_missing_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.builtin: found 'wikipedia'; expected python_stdlib"):
        builtin_corpus("wikipedia", vocab_size=300)
    with pytest.raises(ConfigError, match=r"data\.vocab_size: found None; expected at least 257"):
        builtin_corpus("python_stdlib", vocab_size=None)
