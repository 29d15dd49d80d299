"""Chats: the ids transformers gives, what is learnt of them, templates that change earlier turns, and what is doubtful or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from efflaunch.errors import ConfigError, DataError
from efflaunch.training.data.chat import Turns
from efflaunch.training.data.encode import Encoded, EncodeOptions, Encoder
from efflaunch.training.data.inputs import Cursor, Format, RawBatch

from .small_tokenizers import KINDS, save_tokenizer

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TAGGED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|> \n {%- generation %}{{ m.content }}<|end|>"
    "{%- endgeneration %}{% else %}<|{{ m.role }}|> {{ m.content }} <|end|>{% endif %}{% endfor %}"
)
THINKING = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content -%}
{%- if m.role == 'assistant' and loop.index0 < ns.last -%}{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
<|{{ m.role }}|>{{ content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- if enable_thinking is false -%}<think></think>{%- endif -%}{%- endif -%}
"""
TALK = [
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "<think>two</think>\nFour."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "<think>three</think>\nFive."},
]
KIND = [{"role": m["role"], "content": m["content"].rpartition("\n")[2]} for m in TALK]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save_tokenizer(kind, root / kind) for kind in KINDS}


def _encoded(folder: str, row: Any, **options: Any) -> Encoded:
    return Encoder(EncodeOptions(folder, **options)).encode(RawBatch(Format.PARQUET, [("r", row)], Cursor(), 0))


def _pieces(folder: str, encoded: Encoded) -> list[list[str]]:
    """Each document as texts that are by turns not learnt and learnt."""
    from tokenizers import Tokenizer

    tokenizer, out = Tokenizer.from_file(folder + "/tokenizer.json"), []
    for document in encoded.documents:
        runs: list[list[int]] = [[]]
        for token, learnt in zip(document.ids.tolist(), document.mask.tolist(), strict=True):
            if learnt == (len(runs) % 2 == 1):
                runs.append([])
            runs[-1].append(token)
        out.append([tokenizer.decode(run, skip_special_tokens=False) for run in runs])
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [PLAIN, TAGGED])
def test_ids_are_those_of_transformers_and_only_answers_are_learnt(folders: dict[str, str], kind: str, template: str) -> None:
    """Also where the tokenizer trims: characters of the template that no token has do not end the search for a turn's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    encoded = _encoded(folders[kind], {"messages": KIND}, chat_template=template)
    (document,) = encoded.documents
    assert document.ids.tolist() == tokenizer.apply_chat_template(KIND, chat_template=template)["input_ids"]
    (pieces,) = _pieces(folders[kind], encoded)
    learnt = ["".join(piece.split()).lower().replace("<unk>", "") for piece in pieces[1::2]]
    assert learnt == ["four.<|end|>", "five.<|end|>"]
    assert encoded.warnings == [] and encoded.turn_ends == {"<|end|>"}


@pytest.mark.parametrize("answer", ["Four.", " Four.", "\n\nFour."])
def test_a_token_that_swallows_white_space_belongs_to_its_own_turn(folders: dict[str, str], answer: str) -> None:
    """The white space may be the answer's first; the token before it is the generation prompt's."""
    messages = [{"role": "user", "content": " Two? "}, {"role": "assistant", "content": answer}]
    for options in ({}, {"special_tokens": "text"}):
        (document,) = _encoded(folders["stripping"], {"messages": messages}, chat_template=PLAIN, **options).documents
        learnt = document.ids[document.mask].tolist()
        assert [learnt.count(token) for token in (3, 4, 5)] == [0, 0, 1] and learnt[-1] == 5
        (pieces,) = _pieces(folders["stripping"], _encoded(folders["stripping"], {"messages": messages}, chat_template=PLAIN, **options))
        assert pieces[1].strip() == "Four.<|end|>"


def test_each_turn_is_learnt_in_the_rendering_it_had(folders: dict[str, str]) -> None:
    first = ["<|user|>Two plus two?<|end|><|assistant|>", "<think>two</think>\nFour.<|end|>"]
    second = [
        "<|user|>Two plus two?<|end|><|assistant|>Four.<|end|><|user|>And three?<|end|><|assistant|>",
        "<think>three</think>\nFive.<|end|>",
    ]
    for turns, expected in ((Turns.AUTO, [first, second]), (Turns.EACH, [first, second]), (Turns.LAST, [second])):
        encoded = _encoded(folders["trimming"], {"messages": TALK}, chat_template=THINKING, turns=turns)
        assert _pieces(folders["trimming"], encoded) == expected
        assert [what.partition(",")[0] for what, _ in encoded.warnings] == ["the chat template changes earlier turns"] * (
            turns is Turns.AUTO
        )
    with pytest.raises(DataError, match="renders turn 2 differently once other turns follow; .*\n  Try: --turns auto"):
        _encoded(folders["trimming"], {"messages": TALK}, chat_template=THINKING, turns=Turns.ALL)
    later = [*KIND[:2], *TALK, *KIND[2:]]
    with pytest.raises(DataError, match="renders turn 4 differently once other turns follow"):
        _encoded(folders["trimming"], {"messages": later}, chat_template=THINKING, turns=Turns.ALL)


def test_turns_that_stay_as_they_were_share_a_document(folders: dict[str, str]) -> None:
    """Steps between two of the user's turns keep their reasoning; the answer before them does not."""
    steps = [*TALK, {"role": "tool", "content": "three"}, {"role": "assistant", "content": "<think>is</think>\nSix."}]
    encoded = _encoded(folders["byte_level"], {"messages": steps}, chat_template=THINKING)
    first, second = _pieces(folders["byte_level"], encoded)
    assert first[1::2] == ["<think>two</think>\nFour.<|end|>"]
    assert second[1::2] == ["<think>three</think>\nFive.<|end|>", "<think>is</think>\nSix.<|end|>"]
    (one,) = _pieces(folders["byte_level"], _encoded(folders["byte_level"], {"messages": TALK}, chat_template=PLAIN, turns=Turns.LAST))
    assert one[1::2] == ["<think>three</think>\nFive.<|end|>\n"]
    each = _pieces(folders["byte_level"], _encoded(folders["byte_level"], {"messages": TALK}, chat_template=TAGGED, turns=Turns.EACH))
    assert [piece[1:] for piece in each] == [["<think>two</think>\nFour.<|end|>"], ["<think>three</think>\nFive.<|end|>"]]


@pytest.mark.parametrize("template", [PLAIN, TAGGED])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_turns_may_be_left_out_of_what_is_learnt(folders: dict[str, str], template: str, mark: dict[str, Any]) -> None:
    messages = [KIND[0], {**KIND[1], **mark}, {**KIND[2], "weight": 0}, {**KIND[3], "weight": 1}]
    encoded = _encoded(folders["byte_level"], {"messages": messages}, chat_template=template)
    (pieces,) = _pieces(folders["byte_level"], encoded)
    assert [piece.strip() for piece in pieces[1::2]] == ["Five.<|end|>"] and "Four." in pieces[0]


def test_arguments_of_the_template(folders: dict[str, str]) -> None:
    row = {"messages": TALK[2:], "chat_template_kwargs": {"enable_thinking": False}}
    (pieces,) = _pieces(folders["byte_level"], _encoded(folders["byte_level"], row, chat_template=THINKING))
    assert pieces[0].endswith("<|assistant|><think>"), "what the prompt and the turn have in common is not learnt"
    row["chat_template_kwargs"] = '{"bos_token": "<|user|>"}'
    (pieces,) = _pieces(folders["byte_level"], _encoded(folders["byte_level"], row, chat_template=PLAIN))
    assert pieces[0].startswith("<|user|><|user|>\nAnd")
    with pytest.raises(DataError, match=r"r: found 'messages' in 'chat_template_kwargs'"):
        _encoded(folders["byte_level"], {**row, "chat_template_kwargs": {"messages": []}}, chat_template=PLAIN)


def test_a_conversation_may_begin_with_the_assistant(folders: dict[str, str]) -> None:
    for template in (PLAIN, TAGGED, "{{ '' if messages[0].role else '' }}" + PLAIN):
        encoded = _encoded(folders["byte_level"], {"messages": KIND[1:]}, chat_template=template)
        (pieces,) = _pieces(folders["byte_level"], encoded)
        assert [piece.strip() for piece in pieces[1::2]] == ["Four.<|end|>", "Five.<|end|>"] and "<|assistant|>" in pieces[0]


DOUBTFUL = [
    (
        TAGGED.replace("<|end|>{%- endgeneration %}", "{%- endgeneration %}<|end|>"),
        r"tags leave out the end of the assistant's turn, '<\|end\|>'",
    ),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "ends the assistant's turn with no special token"),
    (PLAIN.replace("m.content", "m.content.split('.')[0]"), "leaves out part of an assistant's turn"),
    ("{% set messages = messages[1:] %}<|user|>" + PLAIN, "leaves out a turn of role user"),
    (PLAIN.replace("<|assistant|>\n{% endif", "<|assistant|>\n<think>{% endif"), r"generation prompt is '<\|assistant\|>\\n<think>', but"),
]


@pytest.mark.parametrize(("template", "message"), DOUBTFUL)
def test_doubtful_templates_are_warned_about(folders: dict[str, str], template: str, message: str) -> None:
    import re

    encoded = _encoded(folders["byte_level"], {"messages": KIND[:2]}, chat_template=template)
    assert len(encoded.warnings) == 1 and re.search(message, encoded.warnings[0][0])
    assert encoded.documents[0].mask.any()


REFUSED = ["{{ 1 / 0 }}", "{{ messages[9].role }}", "{{ messages[0].content + 1 }}", "{{ raise_exception('no') }}", "{{ range(10**9) }}"]


@pytest.mark.parametrize("template", [*REFUSED, "{{ messages.__class__.mro }}", "{{ [1] | map('x') | list }}"])
def test_whatever_a_template_raises_is_the_records_error(folders: dict[str, str], template: str) -> None:
    with pytest.raises(DataError, match=r"r: found messages the chat template refuses \(.+\); expected roles and contents it knows"):
        _encoded(folders["byte_level"], {"messages": KIND}, chat_template=template)
    assert len(_encoded(folders["byte_level"], {"messages": KIND}, chat_template=template, skip_bad=True).skipped) == 1


def test_refusals_name_their_cause(folders: dict[str, str]) -> None:
    rewriting = "{% for m in messages %}<|{{ m.role }}|>{{ m.content if loop.last else '...' }}{% endfor %}"
    with pytest.raises(DataError, match="renders what is before turn 2 differently once that turn follows"):
        _encoded(folders["byte_level"], {"messages": KIND[:2]}, chat_template=rewriting)
    with pytest.raises(ConfigError, match=r"chat template of tokenizer .*, line 1: found what is no Jinja \("):
        _encoded(folders["byte_level"], {"text": "Two"}, chat_template="{% if %}")
    moved = "{% for m in messages %}{% set x %}{% generation %} {{ m.content }}{% endgeneration %}{% endset %}{{ x | trim }}{% endfor %}"
    with pytest.raises(DataError, match="tags inside what the chat template then changes"):
        _encoded(folders["byte_level"], {"messages": KIND[:2]}, chat_template=moved)


def test_tags_inside_macros_are_where_they_are(folders: dict[str, str]) -> None:
    template = (
        "{% macro turn(m) %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    (pieces,) = _pieces(folders["byte_level"], _encoded(folders["byte_level"], {"messages": KIND}, chat_template=template))
    assert pieces[1::2] == ["Four.<|end|>", "Five.<|end|>"]


def test_dates_are_pinned(folders: dict[str, str]) -> None:
    template = "{{ strftime_now('%Y is %d %b') }}" + PLAIN
    default, other = Encoder(EncodeOptions(folders["byte_level"], chat_template=template)), {"date": "2024-02-29"}
    assert default.template_uses_date
    batch = RawBatch(Format.PARQUET, [("r", {"messages": KIND})], Cursor(), 0)
    (pinned,) = _pieces(folders["byte_level"], _encoded(folders["byte_level"], {"messages": KIND}, chat_template=template, **other))
    (repeated,) = _pieces(folders["byte_level"], default.encode(batch))
    assert repeated[0].startswith("2025 is 01 Jan<s>") and pinned[0].startswith("2024 is 29 Feb<s>")


@pytest.mark.parametrize("kind", ["byte_level", "prepending", "metaspace_first"])
def test_special_tokens_of_messages_may_be_plain_text(folders: dict[str, str], kind: str) -> None:
    """The template's own stay tokens, and the mask stays where it was."""
    messages = [{"role": "user", "content": "Two <|end|> two</s>"}, {"role": "assistant", "content": "Four</s>."}]
    encoded = _encoded(folders[kind], {"messages": messages}, chat_template=PLAIN, special_tokens="text")
    (document,) = encoded.documents
    ids = document.ids.tolist()
    assert [ids.count(token) for token in (1, 2, 3, 4, 5)] == [1, 0, 1, 1, 2]
    (pieces,) = _pieces(folders[kind], encoded)
    assert pieces[1].replace(" ", "") == "Four</s>.<|end|>\n" and pieces[0].replace(" ", "").endswith("two</s><|end|>\n<|assistant|>\n")
    with pytest.raises(DataError, match=r"found the private-use character U\+100000"):
        _encoded(
            folders[kind],
            {"messages": [{"role": "user", "content": "\U00100000"}, messages[1]]},
            chat_template=PLAIN,
            special_tokens="text",
        )


OBJECTS = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
)
TEXTS = OBJECTS.replace("c.function.arguments | tojson", "'(' + c.function.arguments + ')'")


@pytest.mark.parametrize("arguments", [{"a": 2, "b": "two"}, '{"a": 2, "b": "two"}'])
def test_arguments_are_encoded_once(folders: dict[str, str], arguments: Any) -> None:
    """As transformers renders objects; a template that takes JSON text alone gets it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["byte_level"])
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}]}
    row = {"messages": [KIND[0], call, {"role": "tool", "content": "4"}, KIND[1]], "tools": [tool]}
    encoded = _encoded(folders["byte_level"], row, chat_template=OBJECTS)
    call["tool_calls"][0]["function"]["arguments"] = {"a": 2, "b": "two"}  # type: ignore[index]
    expected = tokenizer.apply_chat_template(row["messages"], tools=[tool], chat_template=OBJECTS)["input_ids"]
    assert encoded.documents[0].ids.tolist() == expected
    (pieces,) = _pieces(folders["byte_level"], encoded)
    assert pieces[1::2] == ['add{"a": 2, "b": "two"}<|end|>\n', "Four.<|end|>\n"]
    printed = _encoded(folders["byte_level"], row, chat_template=OBJECTS.replace("arguments | tojson", "arguments"))
    assert printed.documents[0].ids.tolist() == expected, "not as Python prints objects"
    (pieces,) = _pieces(folders["byte_level"], _encoded(folders["byte_level"], row, chat_template=TEXTS))
    assert pieces[1] == 'add({"a": 2, "b": "two"})<|end|>\n'


def test_an_end_token_is_not_added_twice_to_a_chat(folders: dict[str, str]) -> None:
    template = PLAIN.replace("<|end|>\n{% endfor", "</s>\n{% endfor")
    (document,) = _encoded(folders["byte_level"], {"messages": KIND}, chat_template=template, append_eos=True).documents
    assert document.ids.tolist().count(2) == 4


def test_a_tokenizer_with_several_templates(folders: dict[str, str], tmp_path: Path) -> None:
    folder = save_tokenizer("byte_level", tmp_path / "tok", PLAIN)
    (tmp_path / "tok" / "additional_chat_templates").mkdir()
    (tmp_path / "tok" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }}" + PLAIN)
    (tmp_path / "tok" / "chat_template.jinja").write_text(PLAIN)
    encoder = Encoder(EncodeOptions(folder))
    assert isinstance(encoder.chat_template, dict)
    tool = {"type": "function", "function": {"name": "f"}}
    (pieces,) = _pieces(folder, _encoded(folder, {"messages": KIND[:2], "tools": [tool]}))
    assert pieces[0].startswith("1<s>")
