"""What templates leave out of a conversation, and what only looks as if they did."""

from __future__ import annotations

import pytest

from efflaunch.training.data.chat_doubts import left_out, unlearnt_turns
from efflaunch.training.data.messages import Chat, read_chat, read_tools

CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Two  plus\ntwo? "},
    CALL,
    {"role": "tool", "content": '{"sum": "4"}'},
    {"role": "assistant", "content": "Four.", "reasoning_content": "two twos"},
]
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def conversation() -> Chat:
    read = read_chat("r", MESSAGES)
    return Chat(read.messages, read.learnt, read.verbatim, read_tools("r", TOOLS), {"enable_thinking": True})


WHOLE = 'tools: add. Be kind. Two plus two? add(2) {"sum": "4"} two twos Four.'


@pytest.mark.parametrize(
    ("text", "template", "expected"),
    [
        (WHOLE, "{{ enable_thinking }}", []),
        (WHOLE.replace('{"sum": "4"}', '"{\\"sum\\": \\"4\\"}"'), "{{ enable_thinking }}", []),
        (WHOLE.replace("Be kind.", ""), "{{ enable_thinking }}", ["a turn of role system"]),
        (WHOLE.replace("plus", "and"), "{{ enable_thinking }}", ["a turn of role user"]),
        (WHOLE.replace("sum", ""), "{{ enable_thinking }}", ["a turn of role tool"]),
        (WHOLE.replace("add", ""), "{{ enable_thinking }}", ["tools"]),
        (WHOLE, "{{ thinking }}", ["enable_thinking of chat_template_kwargs"]),
    ],
)
def test_what_is_left_out_around_the_answers(text: str, template: str, expected: list[str]) -> None:
    assert left_out(conversation(), text, template) == expected


def test_turns_whose_text_is_not_learnt() -> None:
    chat = conversation()
    assert unlearnt_turns(chat, range(len(chat.messages)), WHOLE) == 0
    assert unlearnt_turns(chat, [4], "Four.") == 1, "the reasoning is not there"
    assert unlearnt_turns(chat, [2, 4], "two twos Four.") == 1, "the call is not there"
    assert unlearnt_turns(chat, [0, 1, 3], "") == 0, "turns of others"
