"""Tool calls and tools of messages, in every form that datasets hold them in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .test_records import ANSWER, CALL, USER
from .test_records import read_chat as _chat

CALLS = [
    {"tool_calls": [CALL]},
    {"tool_calls": [{**CALL, "id": None, "function": {"name": "add", "arguments": '{"a": 2}'}}]},
    {"tool_calls": '[{"name": "add", "arguments": {"a": 2}}]'},
    {"tool_calls": [{"name": "add", "arguments": {"a": 2}}], "content": None},
    {"function_call": {"name": "add", "arguments": '{"a": 2}'}},
    {"function_call": None, "tool_calls": {"type": "function", "function": '{"name": "add", "arguments": {"a": 2}}'}},
]


@pytest.mark.parametrize("call", CALLS)
def test_tool_calls_in_every_form(call: dict[str, Any]) -> None:
    chat = _chat(messages=[USER, {"role": "assistant", **call}])
    assert chat.messages[1] == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
    }
    assert chat.verbatim is not None and chat.verbatim[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 2}'


def test_empty_arguments_are_an_empty_object() -> None:
    for given in ("", "{}", {}, None):
        chat = _chat(messages=[USER, {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": given}}]}])
        assert chat.messages[1]["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


def test_tools_as_json_text_and_their_nulls() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
    with_nulls = {"type": "function", "function": {**tool["function"], "description": None}, "strict": None}  # type: ignore[dict-item]
    text = {"type": "function", "function": {"name": "add", "parameters": '{"type": "object", "properties": {"a": {"type": "integer"}}}'}}
    for given in ([tool], json.dumps([tool]), [with_nulls], [json.dumps(tool)], tool, [text]):
        assert _chat(messages=[USER, ANSWER], tools=given).tools == [tool]
    function = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    assert _chat(messages=[USER, ANSWER], functions=[function]).tools == [tool]
    for nothing in ([], "", "[]", None, "null"):
        assert _chat(messages=[USER, ANSWER], tools=nothing).tools is None
