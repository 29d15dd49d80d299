"""Reads conversations as datasets hold them into the messages that chat templates read. No tokenizer is needed here.

Note: what is accepted
    role/content messages, ShareGPT's from/value, one message alone, a JSON string of any of these, and columns of lists.
    Contents: a string, or a list of text parts, which are joined. Tool calls: arguments as an object or as JSON text.
    `weight` (0 or 1) and `train`, `loss` or `trainable` (true or false) say whether an assistant's turn is learnt.
    Null members are absent members: columns have them wherever another row has a value. Inside JSON text they stay.
"""

from __future__ import annotations

import json
import re
import reprlib
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataError

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Members that hold an assistant's reasoning, as transformers reads them."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
    "developer": "developer",
}
"""Datasets' names of speakers, in lower case, and what chat templates call them."""
_CALLS = ("function_call", "tool_call")
_RENDERING = {
    *("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "return_assistant_tokens_mask"),
}
"""Arguments of the rendering that a record does not decide."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_SAYS_LEARNT = ("weight", "train", "loss", "trainable")
_SAYS_OTHERWISE = ("mask", "masked", "loss_mask", "train_detail")
"""Members that say in some other way what is learnt: not read, and not passed over."""
_MESSAGES_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|from|content|value)\1\s*:""")


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, which of its turns are learnt, and what its template gets besides."""

    messages: list[dict[str, Any]]
    learnt: list[bool]
    verbatim: list[dict[str, Any]] | None = None
    """The messages with the arguments of tool calls as JSON text, for templates that take nothing else; None: no calls."""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def bad_record(where: str, actual: str, expected: str, hint: str = "mend it, or leave such records out with --skip-bad") -> DataError:
    """The error for a record that cannot be used."""
    return DataError(where, found=actual, expected=expected, hint=hint)


def kind_of(value: Any) -> str:
    """`a list`, or `nothing`, for messages."""
    return "nothing" if value is None else f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__}"


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    return reprlib.repr(value)


def check_characters(where: str, value: Any) -> None:
    """Raise DataError for halves of surrogate pairs, which JSON can write and no tokenizer can read."""
    if _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise bad_record(where, "half of a \\u surrogate pair, which is no character", "whole characters")


def without_nulls(where: str, value: Any) -> Any:
    """The value without null members, at any depth. DataError for what JSON does not have (dates, bytes)."""
    if isinstance(value, dict):
        return {str(name): without_nulls(where, member) for name, member in value.items() if member is not None}
    if isinstance(value, list):
        return [without_nulls(where, member) for member in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise bad_record(where, f"{kind_of(value)} ({shown(value)}) inside a conversation", "strings, numbers, lists and objects")


def read_chat(where: str, raw: Any, name: str = "messages") -> Chat:
    """The conversation in a record's member `name`. DataError, naming the turn, for what cannot be used."""
    entries = _entries(where, without_nulls(where, raw), name)
    messages, verbatim, learnt = [], [], []
    for number, entry in enumerate(entries, 1):
        message, arguments = _message(f"{where} {name} turn {number}", entry)
        learnt.append(_learnt(f"{where} {name} turn {number}", message))
        messages.append(message)
        verbatim.append(_with_text_arguments(message, arguments))
    called = any("tool_calls" in message for message in messages)
    return Chat(messages, learnt, verbatim if called else None)


def messages_or_text(where: str, text: str, name: str) -> Any:
    """The list of messages that a text is as JSON, or the text. DataError for messages as Python prints them."""
    beginning = _MESSAGES_TEXT.match(text)
    if beginning is None:
        return text
    if beginning[1] == "'":
        raise bad_record(where, f"messages in '{name}' as Python prints them", "a list of messages, or one as JSON text")
    try:
        value = _parsed(where, text, f"'{name}'")
    except DataError:
        return text
    return value if all(isinstance(entry, dict) and ("role" in entry or "from" in entry) for entry in value) else text


def read_tools(where: str, raw: Any) -> list[dict[str, Any]] | None:
    """A record's `tools`: a list, or a list as JSON text; schemas inside may be JSON text too. None where there are none."""
    raw = without_nulls(where, raw)
    tools = _parsed(where, raw, "'tools'") if isinstance(raw, str) and raw.strip() else raw
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise bad_record(where, f"{kind_of(tools)} in 'tools'", "a list of objects, each describing a tool")
    return [_tool(f"{where} tool {number}", tool) for number, tool in enumerate(tools, 1)]


def _tool(where: str, raw: Any) -> dict[str, Any]:
    tool = _parsed(where, raw, "a tool") if isinstance(raw, str) else raw
    if not isinstance(tool, dict):
        raise bad_record(where, kind_of(tool), "an object that describes a tool")
    for holder in (tool, tool.get("function")):
        # A schema that is text would reach the model as a quoted string.
        if isinstance(holder, dict) and isinstance(holder.get("parameters"), str):
            parameters = _parsed(where, holder["parameters"], "'parameters'")
            changed = {**holder, "parameters": parameters}
            tool = changed if holder is tool else {**tool, "function": changed}
    return tool


def read_template_kwargs(where: str, raw: Any) -> dict[str, Any]:
    """A record's `chat_template_kwargs`: an object, or one as JSON text."""
    raw = without_nulls(where, raw)
    kwargs = _parsed(where, raw, "'chat_template_kwargs'") if isinstance(raw, str) and raw.strip() else raw or {}
    if not isinstance(kwargs, dict):
        raise bad_record(where, f"{kind_of(kwargs)} in 'chat_template_kwargs'", "an object of names and values")
    own = sorted(_RENDERING & set(kwargs))
    if own:
        raise bad_record(where, f"'{own[0]}' in 'chat_template_kwargs'", "names that are not the rendering's own")
    return kwargs


def _entries(where: str, raw: Any, name: str) -> list[dict[str, Any]]:
    expected = "a list of objects with 'role' and 'content'"
    if isinstance(raw, str):
        raw = _parsed(where, raw, f"'{name}'")
    if isinstance(raw, dict):
        columns = list(raw.values())
        if columns and all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1:
            # A sequence of structs, as `datasets` keeps it: one list for each member.
            raw = [{key: raw[key][row] for key in raw if raw[key][row] is not None} for row in range(len(columns[0]))]
        else:
            raw = [raw]
    if not isinstance(raw, list) or not raw:
        raise bad_record(where, f"'{name}' that are no conversation", expected)
    entries = [_parsed(where, entry, f"'{name}'") if isinstance(entry, str) and entry[:1] == "{" else entry for entry in raw]
    if not all(isinstance(entry, dict) for entry in entries):
        raise bad_record(where, f"'{name}' that are no conversation", expected)
    return entries


def _message(where: str, raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The message as templates read it, and the arguments of its tool calls as JSON text."""
    message = dict(raw)
    speaker = message.get("role", message.get("from"))
    if "role" not in message and "from" in message:
        message.pop("from")
        message["role"] = speaker
        if "value" in message:
            message["content"] = message.pop("value")
        if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
            raise bad_record(where, f"{shown(speaker)} in 'from'", f"one of {', '.join(_ROLES)}")
    if not isinstance(speaker, str) or not speaker:
        raise bad_record(where, f"{kind_of(speaker)} in 'role'", "a string: system, user, assistant or tool")
    message["role"] = _ROLES.get(speaker.lower(), speaker)
    if speaker in _CALLS:
        message["tool_calls"] = message.pop("content", None)
    if "content" in message:
        message["content"] = _content(where, message["content"])
    arguments = _take_calls(where, message)
    if "content" not in message and "tool_calls" not in message and not any(key in message for key in REASONING):
        raise bad_record(where, f"no content in a turn of role {shown(message['role'])}", "a string in 'content' (it may be empty)")
    return message, arguments


def _content(where: str, content: Any) -> str:
    """Text, or the texts of a list of parts, one after the other."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_record(where, f"{kind_of(content)} in 'content'", "a string, or a list of text parts (objects go in as JSON text)")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            what = f"a part of type {shown(part.get('type'))}" if isinstance(part, dict) else kind_of(part)
            raise bad_record(where, f"{what} in 'content'", 'text alone: {"type": "text", "text": ...}')
    return "".join(texts)


def _take_calls(where: str, message: dict[str, Any]) -> list[str]:
    """Bring `tool_calls`, and the older `function_call`, to a list of {"type", "function": {"name", "arguments"}}."""
    calls = message.pop("tool_calls", None)
    older = message.pop("function_call", None)
    calls = calls if calls not in (None, "", []) else older
    if calls in (None, "", []):
        return []
    if isinstance(calls, str):
        calls = _parsed(where, calls, "a tool call")
    pairs = [_call(where, call) for call in (calls if isinstance(calls, list) else [calls])]
    message["tool_calls"] = [call for call, _ in pairs]
    return [text for _, text in pairs]


def _call(where: str, raw: Any) -> tuple[dict[str, Any], str]:
    raw = _parsed(where, raw, "a tool call") if isinstance(raw, str) else raw
    call = raw if isinstance(raw, dict) and "function" in raw else {"type": "function", "function": raw}
    function = call["function"]
    function = _parsed(where, function, "a tool call") if isinstance(function, str) and function[:1] == "{" else function
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad_record(where, "a tool call without a name", 'objects {"name": ..., "arguments": {...}}')
    given = function.get("arguments", function.get("parameters", {}))
    text = given if isinstance(given, str) and given.strip() else None
    is_empty = given is None or given == [] or (isinstance(given, str) and text is None)
    arguments = {} if is_empty else given if text is None else _parsed(where, text, "arguments of a tool call")
    if not isinstance(arguments, dict):
        raise bad_record(where, f"{kind_of(arguments)} as arguments of a tool call", "an object, or an object as JSON text")
    kept = {key: value for key, value in function.items() if key not in ("arguments", "parameters")}
    return {**call, "function": {**kept, "arguments": arguments}}, text or json.dumps(arguments, ensure_ascii=False)


def _with_text_arguments(message: dict[str, Any], arguments: list[str]) -> dict[str, Any]:
    if not arguments:
        return message
    pairs = zip(message["tool_calls"], arguments, strict=True)
    calls = [{**call, "function": {**call["function"], "arguments": text}} for call, text in pairs]
    return {**message, "tool_calls": calls}


def _learnt(where: str, message: dict[str, Any]) -> bool:
    """Whether the turn is learnt; takes the members that say so out of the message."""
    answers = message["role"] == "assistant"
    learnt = answers
    other = next((name for name in _SAYS_OTHERWISE if name in message), None)
    if other is not None:
        raise bad_record(where, f"'{other}', which is not read", "'weight' (0 or 1) or 'train' (true or false) of an assistant's turn")
    for name in _SAYS_LEARNT:
        if name not in message:
            continue
        value = message.pop(name)
        if value not in (0, 1) or isinstance(value, str):
            raise bad_record(where, f"{shown(value)} in '{name}'", "0 or 1 (false or true): a turn is learnt or it is not")
        if value and not answers:
            raise bad_record(
                where, f"{shown(value)} in '{name}' of a turn of role {shown(message['role'])}", "0: only the assistant's turns are learnt"
            )
        learnt = learnt and bool(value)
    return learnt


def _parsed(where: str, text: str, what: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise bad_record(where, f"text in {what} that is not JSON ({error})", "JSON text, or the value itself") from error
    if "\\ud" in text.lower():
        check_characters(where, value)
    return value
