"""Records to tokens and masks: what is learnt is checked by decoding it, and every bad record has its message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efflaunch.errors import ConfigError, DataError
from efflaunch.training.data.builtin import train_tokenizer
from efflaunch.training.data.encode import Encoded, EncodeOptions, Encoder
from efflaunch.training.data.inputs import Cursor, Format, RawBatch

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
REWRITING = "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else '...' }}{% endfor %}"
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "Four \u2713"},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "Five"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tok") / "tokenizer"
    train_tokenizer(["Two plus two is four and three is five, be kind and use assistant words."] * 3, 320, folder)
    return str(folder)


def _encode(tokenizer: str, *rows: Any, kind: Format = Format.PARQUET, **options: Any) -> Encoded:
    batch = RawBatch(kind, [(f"r{index}", row) for index, row in enumerate(rows)], Cursor(), 0)
    return Encoder(EncodeOptions(tokenizer, **options)).encode(batch)


def _decode(tokenizer: str, ids: np.ndarray) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(tokenizer + "/tokenizer.json").decode(ids.tolist(), skip_special_tokens=False))


def _learnt(tokenizer: str, row: Any, **options: Any) -> tuple[str, str]:
    """The whole document, and the part of it that is learnt, as text."""
    (document,) = _encode(tokenizer, row, **options).documents
    ids, mask = document.ids, document.mask
    assert mask is not None and mask.shape == ids.shape
    return _decode(tokenizer, ids), _decode(tokenizer, ids[mask])


def test_text_ends_with_the_end_token_unless_an_option_says_otherwise(tokenizer: str) -> None:
    for options, end in (({}, "<|endoftext|>"), ({"append_eos": True}, "<|endoftext|>"), ({"append_eos": False}, "")):
        (document,) = _encode(tokenizer, {"text": "two plus two"}, **options).documents
        ids, mask = document.ids, document.mask
        assert mask is None
        assert _decode(tokenizer, ids) == "two plus two" + end


def test_the_text_field_has_any_name(tokenizer: str) -> None:
    (document,) = _encode(tokenizer, {"body": "two plus"}, text_field="body").documents
    ids = document.ids
    assert _decode(tokenizer, ids) == "two plus<|endoftext|>"


def test_only_the_completion_is_learnt(tokenizer: str) -> None:
    row = {"prompt": "Two plus two is", "completion": " four"}
    assert _learnt(tokenizer, row) == ("Two plus two is four<|endoftext|>", " four<|endoftext|>")
    assert _learnt(tokenizer, row, append_eos=False) == ("Two plus two is four", " four")
    assert _learnt(tokenizer, {"prompt": "", "completion": "four"}) == ("four<|endoftext|>", "four<|endoftext|>")


def test_only_the_assistants_turns_are_learnt(tokenizer: str) -> None:
    whole, learnt = _learnt(tokenizer, {"messages": TALK}, chat_template=PLAIN)
    assert whole == "".join(f"<|{m['role']}|>{m['content']}<|endoftext|>" for m in TALK)
    assert learnt == "Four \u2713<|endoftext|>Five<|endoftext|>"


def test_generation_tags_decide_where_there_are_any(tokenizer: str) -> None:
    whole, learnt = _learnt(tokenizer, {"messages": TALK}, chat_template=TAGGED)
    assert whole.endswith("<|user|>And three?<|assistant|>Five!")
    assert learnt == "Four \u2713!Five!"


def test_chats_get_an_end_token_only_when_asked(tokenizer: str) -> None:
    whole, learnt = _learnt(tokenizer, {"messages": TALK}, chat_template=TAGGED, append_eos=True)
    assert whole.endswith("Five!<|endoftext|>") and learnt.endswith("Five!<|endoftext|>")
    whole, learnt = _learnt(tokenizer, {"messages": [*TALK, TALK[1]]}, chat_template=TAGGED, append_eos=True)
    assert whole.endswith("two?<|endoftext|>") and learnt == "Four \u2713!Five!"


def test_tools_reach_the_template(tokenizer: str) -> None:
    template = "{{ tools | length if tools else 0 }}" + PLAIN
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}
    assert _learnt(tokenizer, {"messages": TALK, "tools": [tool]}, chat_template=template)[0].startswith("1<|system|>")


def test_a_template_that_rewrites_turns_is_refused(tokenizer: str) -> None:
    with pytest.raises(DataError) as error:
        _encode(tokenizer, {"messages": TALK}, chat_template=REWRITING)
    assert str(error.value) == (
        "r0: found a chat template that renders what is before turn 3 differently once that turn follows; "
        "expected the text before the assistant's turn to stay as it was.\n"
        "  Try: --chat-template FILE.jinja with {% generation %} tags around the assistant's tokens"
    )


def test_truncation_saved_with_a_tokenizer_is_not_applied(tokenizer: str, tmp_path: Path) -> None:
    content = json.loads(Path(tokenizer, "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "two plus two is four and three"
    (document,) = _encode(str(tmp_path / "tokenizer.json"), {"text": text}, append_eos=False).documents
    ids = document.ids
    assert _decode(tokenizer, ids) == text


def test_an_end_token_the_tokenizer_adds_itself_is_not_doubled(tokenizer: str, tmp_path: Path) -> None:
    content = json.loads(Path(tokenizer, "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(Path(tokenizer, "tokenizer_config.json").read_text())
    (document,) = _encode(str(tmp_path), {"text": "two plus"}).documents
    ids = document.ids
    assert _decode(tokenizer, ids) == "two plus<|endoftext|>"
    assert _learnt(str(tmp_path), {"prompt": "two", "completion": " plus"}) == ("two plus<|endoftext|>", " plus<|endoftext|>")


def test_whole_surrogate_pairs_are_characters(tokenizer: str) -> None:
    (document,) = _encode(tokenizer, rb'{"text": "a \ud83d\ude00"}', kind=Format.JSONL).documents
    ids = document.ids
    assert _decode(tokenizer, ids) == "a \U0001f600<|endoftext|>"


def test_a_byte_order_mark_is_no_text(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbftwo plus")
    batch = RawBatch(Format.TEXT, [(str(path), str(path))], Cursor(), 0)
    (document,) = Encoder(EncodeOptions(tokenizer)).encode(batch).documents
    ids = document.ids
    assert _decode(tokenizer, ids) == "two plus<|endoftext|>"


def test_short_documents_are_skipped_with_a_reason(tokenizer: str) -> None:
    encoded = _encode(tokenizer, {"text": ""}, {"text": "two plus"}, {"text": "a"}, append_eos=False)
    assert encoded.skipped == [("fewer than 2 tokens", "r0"), ("fewer than 2 tokens", "r2")]
    assert len(encoded.documents) == 1


BAD: list[tuple[Any, Format, str]] = [
    (b"{nope", Format.JSONL, r"r0: found a line that is not JSON \(.+\); expected one JSON object a line"),
    (b'{"text": "\xff"}', Format.JSONL, r"r0: found a line that is not JSON \(.+\); expected one JSON object a line"),
    (rb'{"text": "a \ud83d b"}', Format.JSONL, r"r0: found half of a \\u surrogate pair, which is no character; expected whole characters"),
    (b"[1, 2]", Format.JSONL, r"r0: found a JSON list; expected one JSON object a line"),
    (b'{"b": 1, "a": 2}', Format.JSONL, r"r0: found fields a, b; expected a string in 'text', or 'messages', or 'prompt' and 'completion'"),
    (b"{}", Format.JSONL, r"r0: found fields \(none\); expected a string in 'text'"),
    (b'{"text": 5}', Format.JSONL, r"r0: found int in 'text'; expected a string in 'text'"),
    ({"prompt": "a", "completion": ["b"]}, Format.PARQUET, r"r0: found 'completion' that are no conversation; expected a list of objects"),
    ({"prompt": "a", "completion": 5}, Format.PARQUET, r"r0: found an int in 'completion'; expected a string, or a list of messages"),
    ({"prompt": "a b c", "completion": ""}, Format.PARQUET, r"r0: found no token to learn; expected a completion or an assistant turn"),
    (
        {"messages": []},
        Format.PARQUET,
        r"r0: found 'messages' that are no conversation; expected a list of objects with 'role' and 'content'",
    ),
    ({"messages": ["hi"]}, Format.PARQUET, r"r0: found 'messages' that are no conversation"),
    (
        {"messages": TALK[:2]},
        Format.PARQUET,
        r"r0: found no turn of the assistant's that is learnt, among turns of role system, user; expected one",
    ),
]


@pytest.mark.parametrize(("row", "kind", "message"), BAD)
def test_bad_records_are_named_or_counted(tokenizer: str, row: Any, kind: Format, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _encode(tokenizer, row, kind=kind, chat_template=PLAIN)
    assert len(_encode(tokenizer, row, kind=kind, chat_template=PLAIN, skip_bad=True).skipped) == 1


def test_a_template_that_refuses_a_role(tokenizer: str) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"r0: found messages the chat template refuses \(no system role\)"):
        _encode(tokenizer, {"messages": TALK}, chat_template=template)


def test_a_file_that_is_not_utf8(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\xff")
    batch = RawBatch(Format.TEXT, [(str(path), str(path))], Cursor(), 0)
    with pytest.raises(DataError, match=r"x\.txt: found a file that is not UTF-8 \(byte 3\); expected UTF-8 text"):
        Encoder(EncodeOptions(tokenizer)).encode(batch)


def test_answers_that_hold_their_prompt_are_warned_about(tokenizer: str) -> None:
    doubt = "an answer begins with its whole prompt, which is then there twice"
    for row, count in (
        ({"prompt": "two plus", "completion": "two plus two"}, 1),
        ({"prompt": "two plus", "chosen": "two plus two", "rejected": "two plus plus"}, 2),
        ({"prompt": "two plus", "completion": " two plus"}, 0),
        ({"prompt": " ", "completion": " two"}, 0),
    ):
        assert [what for what, _ in _encode(tokenizer, row).warnings] == [doubt] * count


def test_a_missing_end_token_or_template_stops_even_when_skipping(tokenizer: str, tmp_path: Path) -> None:
    bare = str(shutil.copy(tokenizer + "/tokenizer.json", tmp_path / "bare.json"))
    with pytest.raises(ConfigError, match="found no end-of-text token; expected one, to end each document with") as error:
        _encode(bare, {"text": "two plus"}, skip_bad=True)
    assert error.value.hint == "--eos-token TOKEN, or --no-eos"
    with pytest.raises(ConfigError, match=r"found no token '</s>'; expected one"):
        _encode(bare, {"text": "two plus"}, eos_token="</s>")
    with pytest.raises(ConfigError, match=r"r0, tokenizer .* found no chat template, and a chat to render; expected one") as error:
        _encode(bare, {"messages": TALK}, skip_bad=True)
    assert error.value.hint == "--chat-template FILE.jinja"
    (document,) = _encode(bare, {"text": "two plus"}, eos_token="<|endoftext|>").documents
    ids = document.ids
    assert _decode(tokenizer, ids) == "two plus<|endoftext|>"


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer as Llama 2's and Mistral's: spaces become underscores, one is put in front, bytes fall back."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(["Two plus two? Four Five And three?"] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    folder = tmp_path_factory.mktemp("tok")
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    return str(folder)


def test_turns_are_found_where_the_tokenizer_rewrites_spaces(sentencepiece_like: str) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    _, learnt = _learnt(sentencepiece_like, {"messages": TALK[1:]}, chat_template=template)
    assert learnt.split() == ["Four", "\u2713</s>", "Five</s>"]
