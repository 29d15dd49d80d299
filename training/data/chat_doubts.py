"""Finds what a chat template left out of a conversation. Pure: texts are compared without their white space."""

from __future__ import annotations

import json
from collections.abc import Iterable

from .messages import REASONING, Chat


def unlearnt_turns(chat: Chat, numbers: Iterable[int], learnt: str) -> int:
    """How many of the turns that are to be learnt have content, reasoning or calls that are not in what was rendered of them."""
    rendered = _compact(learnt)
    count = 0
    for number in numbers:
        message = chat.messages[number]
        texts = [message.get(name) for name in ("content", *REASONING)]
        texts += [call["function"]["name"] for call in message.get("tool_calls", ())]
        count += chat.learnt[number] and any(isinstance(text, str) and _compact(text) not in rendered for text in texts)
    return count


def left_out(chat: Chat, text: str, template: str) -> list[str]:
    """What of the conversation around the assistant's turns is not in its rendering, as ends of `the chat template leaves out ...`."""
    rendered, out = _compact(text), []
    for message in chat.messages:
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str):
            continue
        # Some templates write what tools answer as a JSON string.
        if _compact(content) not in rendered and _compact(json.dumps(content, ensure_ascii=False)[1:-1]) not in rendered:
            out.append(f"a turn of role {message['role']}")
    names = [holder.get("name") for tool in chat.tools or () for holder in (tool, tool.get("function")) if isinstance(holder, dict)]
    if any(isinstance(name, str) and _compact(name) not in rendered for name in names):
        out.append("tools")
    out += [f"{name} of chat_template_kwargs" for name in chat.template_kwargs if name not in template]
    return list(dict.fromkeys(out))


def _compact(text: str) -> str:
    return "".join(text.split())
