"""Records as datasets hold them: what each becomes, and what bad ones are called."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from efflaunch.errors import DataError
from efflaunch.training.data.messages import Chat
from efflaunch.training.data.records import Exchange, Group, Preference, read_record

USER, ANSWER = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Four."}
OTHER = {"role": "assistant", "content": "Five."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}


def _read(**row: Any) -> Any:
    return read_record("r", row, "text")


def read_chat(**row: Any) -> Chat:
    record = _read(**row)
    assert isinstance(record, Chat)
    return record


SAME = [
    {"messages": [USER, ANSWER]},
    {"messages": [{**USER, "name": None, "tool_calls": None}, {**ANSWER, "tool_calls": []}]},
    {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}]},
    {"conversation": [{"role": "human", "content": "Two?"}, {"role": "gpt", "content": "Four."}]},
    {"messages": '[{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Four."}]'},
    {"messages": ['{"role": "user", "content": "Two?"}', '{"role": "assistant", "content": "Four."}']},
    {"messages": {"role": ["user", "assistant"], "content": ["Two?", "Four."], "name": [None, None]}},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Tw"}, {"type": "text", "text": "o?", "image_url": None}]},
            ANSWER,
        ]
    },
    {"messages": [{"role": "user", "content": ["Two", "?"]}, {"role": "assistant", "content": [{"text": "Four."}]}]},
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": [USER], "completion": "Four."},
    {"prompt": "Two?", "completion": ANSWER},
    {"prompt": [USER], "completion": "Four.", "system": "", "tools": "[]", "chat_template_kwargs": {}},
    {"messages": [{"role": "User", "content": "Two?"}, {"role": "model", "content": "Four."}]},
    {"prompt": '[{"role": "user", "content": "Two?"}]', "completion": '[{"content": "Four.", "role": "assistant"}]'},
    {"instruction": "Two?", "input": "", "output": "Four."},
    {"instruction": "Two?", "input": None, "output": "Four.", "system": "", "history": []},
]


@pytest.mark.parametrize("row", SAME)
def test_one_exchange_in_every_form(row: dict[str, Any]) -> None:
    assert read_chat(**row) == Chat([USER, ANSWER], [False, True])


def test_instructions_have_input_system_and_history() -> None:
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be kind.", "history": [["Hello", "Yes?"]]}
    chat = read_chat(**row)
    assert [(m["role"], m["content"]) for m in chat.messages] == [
        ("system", "Be kind."),
        ("user", "Hello"),
        ("assistant", "Yes?"),
        ("user", "Add.\n2, 2"),
        ("assistant", "4"),
    ]
    assert chat.learnt == [False, False, True, False, True]
    assert _read(text="plain", instruction="Add.") == "plain"


@pytest.mark.parametrize("name", ["body", "prompt", "output", "messages"])
def test_a_text_field_that_was_asked_for_comes_first(name: str) -> None:
    row = {"messages": [USER, ANSWER], "prompt": "a", "completion": "b", "instruction": "c", "output": "d", name: "wanted"}
    assert read_record("r", row, name) == "wanted"
    assert isinstance(read_record("r", {"messages": [USER, ANSWER], "text": "x"}, name), Chat)


def test_speakers_of_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "Two?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "Four.", "weight": 0},
    ]
    chat = read_chat(conversations=turns, system="Be kind.", tools='[{"name": "add", "parameters": {"type": "object"}}]')
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert chat.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    assert chat.learnt == [False, False, True, False, False]
    assert chat.tools == [{"name": "add", "parameters": {"type": "object"}}]


TOOL = {"type": "function", "function": {"name": "add"}}
CONTEXT = {"system": "Be kind.", "tools": [TOOL], "chat_template_kwargs": {"x": 1}}


def test_system_tools_and_arguments_are_those_of_every_record_with_messages() -> None:
    """Wherever the messages are; a system turn that is there already is the same one."""
    system = {"role": "system", "content": "Be kind."}

    def expected(answer: dict[str, Any]) -> Chat:
        return Chat([system, USER, answer], [False, False, True], None, [TOOL], {"x": 1})

    for row in (
        {"messages": [USER, ANSWER]},
        {"messages": [system, USER, ANSWER]},
        {"messages": [USER], "completion": "Four."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "Two?", "completion": [ANSWER]},
        {"prompt": [USER], "completion": "Four."},
        {"instruction": "Two?", "output": "Four."},
    ):
        assert read_chat(**row, **CONTEXT) == expected(ANSWER)
    for row in (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Two?", "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"messages": [USER], "chosen": "Four.", "rejected": "Five."},
    ):
        assert _read(**row, **CONTEXT) == Preference(expected(ANSWER), expected(OTHER))
    group = _read(prompt="Two?", completions=[[ANSWER], [OTHER]], rewards=[1, 0], **CONTEXT)
    assert group == Group([expected(ANSWER), expected(OTHER)], [1.0, 0.0])


@pytest.mark.parametrize("name", ["weight", "train", "loss", "trainable"])
def test_turns_say_that_they_are_not_learnt(name: str) -> None:
    chat = read_chat(messages=[USER, {**ANSWER, name: 0}, USER, {**ANSWER, name: True}])
    assert chat.learnt == [False, False, False, True] and not any(name in message for message in chat.messages)


def test_a_completion_follows_messages_that_end_before_it() -> None:
    chat = read_chat(messages=[USER, OTHER, USER], completion="Four.")
    assert chat == Chat([USER, OTHER, USER, ANSWER], [False, False, False, True])
    assert read_chat(messages=[USER, ANSWER], completion="Four.") == Chat([USER, ANSWER], [False, True])


def test_preferences_of_messages() -> None:
    expected = Preference(Chat([USER, ANSWER], [False, True]), Chat([USER, OTHER], [False, True]))
    for row in (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Two?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Two?", "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": "Four.", "rejected": "Five."},
        {"conversations": [{"from": "human", "value": "Two?"}], "chosen": {"from": "gpt", "value": "Four."}, "rejected": OTHER},
        {"instruction": "Two?", "chosen": "Four.", "rejected": "Five."},
    ):
        assert _read(**row) == expected
    assert _read(prompt="a", chosen="b", rejected="c") == Preference(Exchange("a", "b"), Exchange("a", "c"))
    earlier = [USER, {"role": "assistant", "content": "Hm."}, USER]
    chosen = _read(prompt=earlier, chosen=[ANSWER], rejected=[OTHER]).chosen
    assert chosen.learnt == [False, False, False, True], "answers inside the prompt are no answers"


def test_groups_of_messages() -> None:
    expected = Group([Chat([USER, ANSWER], [False, True]), Chat([USER, OTHER], [False, True])], [1.0, 0.0])
    for completions, rewards in (
        ([{"text": "Four.", "reward": 1}, {"text": "Five.", "reward": 0}], None),
        ([{"messages": [ANSWER], "reward": 1}, {"completion": [OTHER], "reward": 0}], None),
        ([[ANSWER], [OTHER]], [1, 0]),
        (["Four.", "Five."], [1, 0.0]),
        ([{**ANSWER, "reward": 1}, {"content": "Five.", "reward": 0}], None),
    ):
        assert _read(prompt=[USER], completions=completions, rewards=rewards) == expected
    assert _read(prompt="a", completions=["b", "c"], rewards=[1, 2]) == Group([Exchange("a", "b"), Exchange("a", "c")], [1.0, 2.0])


SYSTEM = {"role": "system", "content": "Be kind."}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [IMAGE, ANSWER]}, "r messages turn 1: found a part of type 'image_url' in 'content'"),
    ({"messages": [USER, {"role": "assistant"}]}, "turn 2: found no content in a turn of role 'assistant'"),
    ({"messages": [{"role": "user", "content": None}, ANSWER]}, "turn 1: found no content in a turn of role 'user'"),
    ({"messages": [USER, {"role": "assistant", "content": {"a": 1}}]}, "turn 2: found a dict in 'content'"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "turn 2: found 0.5 in 'weight'; expected 0 or 1"),
    ({"messages": [{**USER, "train": True}, ANSWER]}, "turn 1: found True in 'train' of a turn of role 'user'; expected 0"),
    ({"messages": [{"content": "a"}, ANSWER]}, "turn 1: found nothing in 'role'"),
    ({"messages": "Two?"}, "found text in 'messages' that is not JSON"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1: found 'narrator' in 'from'; expected one of human, user, gpt"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}]}, "that is not JSON"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "5"}}]}]}, "an int as arguments"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "found a tool call without a name"),
    ({"messages": [USER, ANSWER], "tools": "add(a, b)"}, "found text in 'tools' that is not JSON"),
    ({"messages": [USER, ANSWER], "tools": 5}, "found an int in 'tools'"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "found a list in 'chat_template_kwargs'"),
    ({"messages": [USER, {**ANSWER, "at": datetime.date(2025, 1, 1)}]}, "found a date .* inside a conversation"),
    ({"messages": [USER], "conversations": [USER]}, "found 'messages' beside 'conversations'"),
    (
        {"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"},
        "found a system turn beside another text in 'system'",
    ),
    ({"prompt": [USER, ANSWER], "completion": [OTHER]}, "found a prompt that ends with an assistant's turn"),
    ({"chosen": [USER, ANSWER], "rejected": [{"role": "user", "content": "?"}, OTHER]}, "that begin with different turns"),
    ({"prompt": "Which?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "found a 'prompt' that is not among the turns"),
    ({"chosen": [ANSWER], "rejected": [OTHER]}, "found nothing in 'prompt'"),
    ({"prompt": "a", "completions": ["b", "c"], "rewards": [1]}, "found 1 of them in 'rewards'; expected a list of 2 numbers"),
    ({"prompt": "a", "completions": ["b", "c"]}, "completion 1: found no reward"),
    (
        {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 10**400]},
        r"completion 2: found 1000\d+\.\.\.\d+ in 'reward'; expected a finite",
    ),
    ({"prompt": "a", "completion": "b", "label": False}, "found False in 'label' of an answer"),
    ({"prompt": "a", "completion": "b", "label": "True"}, "found True in 'label' of an answer"),
    ({"messages": [USER, ANSWER], "kto_tag": False}, "found False in 'kto_tag' of an answer"),
    ({"instruction": "a", "output": "b", "kto_tag": True}, "found True in 'kto_tag' of an answer"),
    ({"prompt": "a", "completion": "b", "system": "c"}, "found 'system' beside texts, which no template is put around"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}, "found 'tools' beside texts"),
    ({"prompt": "a", "completions": ["b", "c"], "rewards": [1, 2], "functions": [{"name": "f"}]}, "found 'functions' beside texts"),
    ({"prompt": "a", "completion": "b", "chat_template_kwargs": '{"c": 1}'}, "found 'chat_template_kwargs' beside texts"),
    ({"prompt": str([USER]), "completion": "b"}, "found messages in 'prompt' as Python prints them"),
    ({"messages": [USER, {**ANSWER, "mask": True}]}, "turn 2: found 'mask', which is not read; expected 'weight'"),
    ({"prompt": [USER, OTHER], "chosen": [USER, OTHER, ANSWER], "rejected": [USER, ANSWER]}, "that begin with different turns"),
    ({"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, {**USER, "content": "?"}, OTHER]}, "that begin with different turns"),
    ({"instruction": "a"}, "found nothing in 'output'"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, r"found \['c'\] in 'history'"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_records_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _read(**row)
