"""Tokenizers load the same way whichever door they come in by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.errors import DataError
from efflaunch.tests.limits import ENDS_S
from efflaunch.training.data.builtin import train_tokenizer
from efflaunch.training.data.tokenizer import load_tokenizer, read_vocabulary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tok") / "tokenizer"
    train_tokenizer(["some words to learn from"], 270, folder)
    return folder


def test_the_file_and_its_directory_are_one_vocabulary(tokenizer: Path) -> None:
    assert read_vocabulary(str(tokenizer)) == read_vocabulary(str(tokenizer / "tokenizer.json"))
    assert read_vocabulary(str(tokenizer)).size == 270


def test_the_short_way_loads_what_auto_tokenizer_loads(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(str(tokenizer)), AutoTokenizer.from_pretrained(str(tokenizer))
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.eos_token_id == theirs.eos_token_id == 0


def test_a_named_class_is_respected(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}))
    assert type(load_tokenizer(str(tmp_path))).__name__.startswith("GPT2Tokenizer")


BESIDE = {
    "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}),
    "special_tokens_map.json": json.dumps({"eos_token": "<|endoftext|>"}),
    "chat_template.jinja": "{{ messages }}",
    "added_tokens.json": json.dumps({"<new>": 270}),
}


@pytest.mark.parametrize("names", [tuple(BESIDE), *((name,) for name in BESIDE)], ids=lambda names: "+".join(names))
def test_what_lies_beside_a_file_is_its_own(
    tokenizer: Path, tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class, special tokens and template, whether the file or its directory is named."""
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    for name in names:
        (tmp_path / name).write_text(BESIDE[name])
    monkeypatch.chdir(tmp_path)
    for place in ("tokenizer.json", str(tmp_path / "tokenizer.json")):
        file, folder = load_tokenizer(place), load_tokenizer(str(tmp_path))
        assert type(file) is type(folder) and file.get_vocab() == folder.get_vocab()
        assert (file.special_tokens_map, file.chat_template) == (folder.special_tokens_map, folder.chat_template)
    assert file.eos_token == ("<|endoftext|>" if set(names) & {"tokenizer_config.json", "special_tokens_map.json"} else None)
    (tmp_path / "tokenizer.json").rename(tmp_path / "other.json")
    assert load_tokenizer(str(tmp_path / "other.json")).eos_token is None, "a file by another name is a tokenizer of its own"


def test_loading_a_plain_tokenizer_leaves_torch_out(tokenizer: Path) -> None:
    code = (
        "import sys\nfrom efflaunch.training.data.tokenizer import load_tokenizer\n"
        "load_tokenizer(sys.argv[1])\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tokenizer)], capture_output=True, text=True, timeout=ENDS_S)
    assert done.stdout == "False\n", done.stderr


def test_a_broken_configuration_is_named(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer .*: found nothing that can be loaded \(.+\); expected a tokenizer\.json, a directory"):
        load_tokenizer(str(tmp_path))


def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to itself transformers asks on the terminal, and waits 15 s for the answer."""
    mark = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: ...\n")
    names = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", **names}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", **names}))
    monkeypatch.setattr("builtins.input", lambda *given: pytest.fail("asked a person"))
    monkeypatch.setattr("signal.alarm", lambda seconds: pytest.fail("waits for a person"))
    with pytest.raises(DataError, match="nothing that can be loaded"):
        load_tokenizer(str(tmp_path))
    assert not mark.exists()


@pytest.mark.parametrize("place", ["./missing/tokenizer.json", "/no/such/dir", "../up", "a/b/c", "missing.json", "~/x", "a--b/c"])
def test_what_can_be_no_hub_name_is_not_asked_for(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *given, **named: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="no such file or directory"):
        load_tokenizer(place)
