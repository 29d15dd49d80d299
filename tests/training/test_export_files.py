"""Out comes what went in: tokenizer files byte for byte, the template trained with, generation settings, the end of the turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import CheckpointError
from efflaunch.model.export_files import Origins, origins_of, write_files
from efflaunch.model.portable_config import unsaid_to_old, with_old_fields

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TRAINED = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>\n{% endfor %}"
CORPUS: dict[str, Any] = {"chat_template": TRAINED, "end_of_turn": "<|end|>", "loss_mask": True, "tokenizer": {"eos_token": "<eos>"}}


def make_tokenizer(folder: Path, **settings: Any) -> Path:
    """A tokenizer directory: `<eos>` is 2 and `<|end|>` is 3; `settings` of its tokenizer_config.json, none: there is none."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    # Odd spacing, that a rewrite would lose.
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n \n")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}) + "  ")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_every_file_comes_along_as_it_was(tmp_path: Path, out: Path) -> None:
    source = make_tokenizer(tmp_path / "t", eos_token="<eos>", chat_template=[{"name": "default", "template": CHAT}])
    (source / "additional_chat_templates").mkdir()
    for name in ("special_tokens_map.json", "tokenizer.model", "merges.txt", "vocab.txt", "additional_chat_templates/tools.jinja"):
        (source / name).write_text(f"of {name}\r\n")
    (source / "generation_config.json").write_text('{"temperature":0.6,  "eos_token_id":[2,3]}')
    (source / "model.safetensors").write_text("no tokenizer's")
    wanted = {name: data for name, data in contents(source).items() if name != "model.safetensors"}
    corpus = CORPUS | {"chat_template": {"default": CHAT, "tools": "of additional_chat_templates/tools.jinja\n"}}
    report = write_files(Origins((str(source),), str(source), (corpus,)), out)
    assert contents(out) == wanted
    assert (report.tokenizer, report.chat_template, report.end_of_turn, report.notes) == (str(source), "tokenizer", "<|end|>", ())


@pytest.mark.parametrize("inline", [CHAT, [{"name": "default", "template": CHAT}, {"name": "rag", "template": "x"}], None])
def test_the_template_trained_with_takes_the_place_of_the_tokenizers(tmp_path: Path, out: Path, inline: object) -> None:
    from transformers import AutoTokenizer

    source = make_tokenizer(tmp_path / "t", eos_token="<eos>", chat_template=inline)
    if inline is None:
        (source / "chat_template.jinja").write_text(CHAT)
    report = write_files(Origins((str(source),), None, (CORPUS,), {"eos_token_id": 2, "bos_token_id": None}), out)
    assert report.chat_template == "corpus" and (out / "chat_template.jinja").read_text() == TRAINED
    assert json.loads((out / "tokenizer_config.json").read_text()).get("chat_template") is None
    assert AutoTokenizer.from_pretrained(out).chat_template == TRAINED
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_named_templates_come_back_by_their_names(tmp_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    source = make_tokenizer(tmp_path / "t", eos_token="<eos>")
    write_files(Origins((str(source),), None, (CORPUS | {"chat_template": {"default": CHAT, "tool_use": TRAINED}},)), out)
    assert AutoTokenizer.from_pretrained(out).chat_template == {"default": CHAT, "tool_use": TRAINED}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 2, "top_p": 0.9}, {"eos_token_id": [2, 3], "top_p": 0.9}),
        ({"eos_token_id": [2, 1]}, {"eos_token_id": [2, 1, 3]}),
        ({"top_k": 5}, {"top_k": 5, "eos_token_id": [2, 3]}),
        ({"eos_token_id": 3}, {"eos_token_id": 3}),
    ],
)
def test_generation_stops_at_the_end_of_the_turn(tmp_path: Path, out: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    source = make_tokenizer(tmp_path / "t", eos_token="<eos>", chat_template=TRAINED)
    (source / "generation_config.json").write_text(json.dumps(before))
    write_files(Origins((str(source),), str(source), (CORPUS,), {"eos_token_id": 2}), out)
    assert json.loads((out / "generation_config.json").read_text()) == after


def test_without_chats_generation_settings_are_not_touched(tmp_path: Path, out: Path) -> None:
    source = make_tokenizer(tmp_path / "t", eos_token="<eos>", chat_template=CHAT)
    (source / "generation_config.json").write_text('{"eos_token_id":  2}')
    plain = {"chat_template": CHAT, "end_of_turn": None, "loss_mask": False}
    report = write_files(Origins((str(source),), str(source), (plain,)), out)
    assert (out / "generation_config.json").read_bytes() == b'{"eos_token_id":  2}' and report.end_of_turn is None


def test_a_model_that_is_gone_is_said(tmp_path: Path, out: Path) -> None:
    """Its generation settings cannot come along."""
    source = make_tokenizer(tmp_path / "t", eos_token="<eos>", chat_template=CHAT)
    plain = {"chat_template": CHAT, "end_of_turn": None, "loss_mask": False}
    report = write_files(Origins((str(source),), f"{tmp_path}/gone", (plain,)), out)
    assert report.notes == (f"model {tmp_path}/gone is not on this machine: its generation settings, if it had any, are not in the export",)
    (tmp_path / "gone").mkdir()
    assert write_files(Origins((str(source),), f"{tmp_path}/gone", (plain,)), out).notes == ()


def test_corpora_of_earlier_versions_leave_the_end_of_the_turn_to_the_template(tmp_path: Path, out: Path) -> None:
    source = make_tokenizer(tmp_path / "t", eos_token="<eos>", chat_template=CHAT)
    assert write_files(Origins((str(source),), None, ({"loss_mask": True},)), out).end_of_turn == "<|end|>"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 3


def test_a_bare_file_keeps_what_lies_beside_it(tmp_path: Path, out: Path) -> None:
    source = make_tokenizer(tmp_path / "t", eos_token="<eos>", pad_token="<|end|>", tokenizer_class="GPT2Tokenizer")
    write_files(Origins((str(source / "tokenizer.json"),), None, ()), out)
    assert contents(out) == contents(source)


def test_a_bare_file_alone_gets_the_special_tokens_the_run_knows(tmp_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    source = make_tokenizer(tmp_path / "t").rename(tmp_path / "bare")
    (source / "tokenizer.json").rename(source / "mine.json")
    write_files(Origins((str(source / "mine.json"),), None, (CORPUS | {"chat_template": None},), {"pad_token_id": 3}), out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert (loaded.eos_token, loaded.pad_token) == ("<eos>", "<|end|>")
    assert (out / "tokenizer.json").read_bytes() == (source / "mine.json").read_bytes()


def test_the_tokenizer_is_known_from_the_corpus_or_the_model(tmp_path: Path, out: Path) -> None:
    of_corpus, of_model = make_tokenizer(tmp_path / "c", eos_token="<eos>"), make_tokenizer(tmp_path / "m", eos_token="<|end|>")
    (tmp_path / "w" / "runs").mkdir(parents=True)
    (tmp_path / "w" / "corpus.json").write_text(json.dumps({"tokenizer": {"path": str(of_corpus)}}))
    (tmp_path / "w" / "corpus.idx").touch()
    config = {"run": {"root": "runs", "id": "r"}, "data": {"prefixes": ["corpus"]}, "model": {"path": str(of_model)}}
    origins = origins_of(tmp_path / "w" / "runs" / "r", {"config": config, "tokenizer": None})
    assert origins.tokenizers == (str(of_corpus), str(of_model)), "relative paths of earlier versions start where the run did"
    assert write_files(origins, out).tokenizer == str(of_corpus)
    lost = Origins((str(tmp_path / "gone"), str(of_model)), None, ())
    report = write_files(lost, out)
    assert report.tokenizer == str(of_model) and f"{tmp_path / 'gone'} is not on this machine" in report.notes[0]
    assert write_files(Origins(("nobody/no-such-tokenizer",), None, ()), out).tokenizer is None


def test_a_damaged_file_is_named(tmp_path: Path, out: Path) -> None:
    source = make_tokenizer(tmp_path / "t", eos_token="<eos>")
    (source / "generation_config.json").write_text("[1")
    with pytest.raises(CheckpointError, match=r"generation_config.json: found no JSON object \(.*\); expected one"):
        write_files(Origins((str(source),), str(source), (CORPUS,)), out)


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}),
        (
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_the_old_form_says_the_same(rope: dict[str, Any], old: dict[str, Any]) -> None:
    fields = {"rope_parameters": rope, "dtype": "bfloat16"}
    assert with_old_fields(fields) == {**fields, **old, "torch_dtype": "bfloat16"} and unsaid_to_old(fields) is None


def test_what_the_old_form_cannot_say_is_said() -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert unsaid_to_old({"rope_parameters": {"full_attention": scaled, "sliding_attention": scaled}}) is not None
