"""What a record is, decided by its fields: a text, an exchange, a chat, a preference, or rewarded completions.

Note: order of the rules
    A text field that was asked for by name, then `chosen`/`rejected`, then `completions`, then a conversation, then `prompt` and
    `completion`, then `instruction` and `output`, then the text field. Prompts and answers are texts, or messages; where one of them is
    messages the others become turns of it, and the record's system turn, tools and arguments of the template are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .messages import Chat, bad_record, kind_of, messages_or_text, read_chat, read_template_kwargs, read_tools, shown
from .rewards import Reward, read_reward
from .token_answers import IDS, PROMPT_IDS, TokenAnswer, read_token_ids
from .whole_texts import split_pair

CONVERSATIONS = ("messages", "conversations", "conversation")
ANSWERS = ("chosen", "rejected", "completions")
"""Fields that make a record a preference or a group of completions."""
MAIN_FIELDS = (*CONVERSATIONS, *ANSWERS, "prompt", "completion", "instruction")
"""Any of these, or the text field, makes a record."""
_CONTEXT = ("system", "tools", "functions", "chat_template_kwargs")
_LABELS = ("label", "kto_tag")
FIELDS = (*MAIN_FIELDS, *_CONTEXT, "input", "output", "history", "rewards", PROMPT_IDS, *_LABELS)
"""Every field that means something besides the text field."""
TEXT = "text"
"""The text field, unless another is asked for."""
LISTS = ("completions", "rewards", "history", PROMPT_IDS)
"""Fields that hold lists of other things than messages."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and what is learnt to follow it, both as they stand."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, each with it."""

    chosen: Exchange | Chat
    rejected: Exchange | Chat


@dataclass(frozen=True, slots=True)
class Group:
    """Completions of one prompt, each with it, and their rewards."""

    completions: list[Exchange | Chat | TokenAnswer]
    rewards: list[Reward]


Record = str | Exchange | Chat | Preference | Group


def read_record(where: str, row: dict[str, Any], text_field: str) -> Record:
    """What the row is. DataError for fields that are missing or are not what they should be."""
    row = {name: value for name, value in row.items() if value is not None}
    if text_field != TEXT and isinstance(row.get(text_field), str):
        # It was asked for by name.
        return str(row[text_field])
    if any(name in row for name in ANSWERS):
        return _group(where, row) if "completions" in row else _preference(where, row)
    if any(name in row for name in CONVERSATIONS):
        _check_unlabelled(where, row)
        chat = _conversation(where, row)
        if "completion" in row and chat.messages[-1]["role"] != "assistant":
            return _answered(where, row, _unlearnt(chat), _answer(where, row["completion"], "completion"))
        return _with_context(where, row, chat)
    if "prompt" in row and "completion" in row:
        _check_unlabelled(where, row)
        return _exchange(where, row)
    if "instruction" in row and not isinstance(row.get(text_field), str):
        _check_unlabelled(where, row)
        return _answered(where, row, _instruction(where, row), _string(where, row, "output"))
    text = row.get(text_field)
    if isinstance(text, str):
        return text
    expected = f"a string in '{text_field}', or 'messages', or 'prompt' and 'completion', a pair or 'completions'"
    actual = f"{type(text).__name__} in '{text_field}'" if text is not None else f"fields {', '.join(sorted(row)) or '(none)'}"
    raise bad_record(where, actual, expected, "--text-field NAME")


def _conversation(where: str, row: dict[str, Any]) -> Chat:
    given = [name for name in CONVERSATIONS if name in row]
    if len(given) > 1:
        raise bad_record(where, f"'{given[0]}' beside '{given[1]}'", "one conversation")
    return read_chat(where, row[given[0]], given[0])


def _check_unlabelled(where: str, row: dict[str, Any]) -> None:
    """Raise DataError for unpaired preferences: an answer labelled as bad must not be learnt."""
    for name in _LABELS:
        if isinstance(row.get(name), bool) or str(row.get(name)).lower() in ("true", "false"):
            raise bad_record(where, f"{row[name]} in '{name}' of an answer", "no label: pairs and rewards are what is learnt from")


def _with_context(where: str, row: dict[str, Any], chat: Chat) -> Chat:
    """The conversation with the record's system turn, tools and arguments of the template."""
    tools = read_tools(where, row.get("tools"))
    if tools is None and (functions := read_tools(where, row.get("functions"))):
        tools = [{"type": "function", "function": function} for function in functions]
    kwargs = read_template_kwargs(where, row.get("chat_template_kwargs"))
    return replace(_with_system(where, row, chat), tools=tools, template_kwargs=kwargs)


def _with_system(where: str, row: dict[str, Any], chat: Chat) -> Chat:
    system = _string(where, row, "system") if row.get("system") else ""
    if not system:
        return chat
    if not chat.messages or chat.messages[0]["role"] != "system":
        return _joined(_turn("system", system), chat)
    if chat.messages[0].get("content") != system:
        raise bad_record(where, "a system turn beside another text in 'system'", "one of them")
    return chat


def _check_no_context(where: str, row: dict[str, Any]) -> None:
    """Raise DataError for texts beside what only a template could put around them."""
    chat = _with_context(where, row, Chat([], []))
    if chat.messages or chat.tools or chat.template_kwargs:
        name = next(name for name in _CONTEXT if row.get(name))
        raise bad_record(
            where, f"'{name}' beside texts, which no template is put around", "messages as prompt or answer, or it in the texts"
        )


def _instruction(where: str, row: dict[str, Any]) -> Chat:
    """`instruction` and `input` as the user's turn, after the exchanges of `history`, whose answers are learnt."""
    chat = Chat([], [])
    history = row.get("history", [])
    if not isinstance(history, list):
        raise bad_record(where, f"{kind_of(history)} in 'history'", "a list of pairs: what the user said, what was answered")
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise bad_record(where, f"{shown(pair)} in 'history'", "pairs of strings: what the user said, what was answered")
        chat = _joined(_joined(chat, _turn("user", pair[0])), _turn("assistant", pair[1]))
    given = _string(where, row, "input") if row.get("input") else ""
    text = _string(where, row, "instruction")
    user = _turn("user", f"{text}\n{given}" if text and given else text or given)
    return _joined(chat, user)


def _exchange(where: str, row: dict[str, Any]) -> Exchange | Chat:
    prompt = _prompt(where, row)
    assert prompt is not None
    return _answered(where, row, prompt, _answer(where, row["completion"], "completion"))


def _prompt(where: str, row: dict[str, Any]) -> str | Chat | None:
    """The prompt of a record with answers, wherever it is; None: it has none."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = messages_or_text(where, prompt, "prompt")
    if isinstance(prompt, str):
        # Rendered with a template only where the answers are messages.
        return prompt
    if prompt is not None:
        if not isinstance(prompt, (list, dict)):
            raise bad_record(where, f"{kind_of(prompt)} in 'prompt'", "a string, or a list of messages")
        return _unlearnt(read_chat(where, prompt, "prompt")) if prompt else Chat([], [])
    if any(name in row for name in CONVERSATIONS):
        return _unlearnt(_conversation(where, row))
    if "instruction" in row:
        return _unlearnt(_instruction(where, row))
    return None


def _answer(where: str, raw: Any, name: str) -> str | Chat:
    if isinstance(raw, str):
        raw = messages_or_text(where, raw, name)
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, (list, dict)):
        raise bad_record(where, f"{kind_of(raw)} in '{name}'", "a string, or a list of messages")
    return read_chat(where, raw, name)


def _answered(where: str, row: dict[str, Any], prompt: str | Chat, answer: str | Chat) -> Exchange | Chat:
    """The answer after its prompt; both are texts, or both become turns of one conversation."""
    if isinstance(prompt, str) and isinstance(answer, str):
        _check_no_context(where, row)
        return Exchange(prompt, answer)
    before = _turn("user", prompt) if isinstance(prompt, str) else prompt
    after = _turn("assistant", answer) if isinstance(answer, str) else answer
    if before.messages and before.messages[-1]["role"] == after.messages[0]["role"] == "assistant":
        raise bad_record(
            where, "a prompt that ends with an assistant's turn, and an answer that begins with one", "a prompt that ends before the answer"
        )
    return _with_context(where, row, _joined(before, after))


def _preference(where: str, row: dict[str, Any]) -> Preference:
    answers = []
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise bad_record(where, f"nothing in '{name}'", "'prompt', 'chosen' and 'rejected', texts or messages")
        answers.append(_answer(where, row[name], name))
    chosen, rejected = answers
    prompt = _prompt(where, row)
    if isinstance(chosen, Chat) and isinstance(rejected, Chat) and chosen.messages[0]["role"] not in ("assistant", "tool"):
        prompt, chosen, rejected = _common_prompt(where, prompt, chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, Chat):
        prompt, chosen, rejected = split_pair(where, prompt, chosen, rejected)
    if prompt is None:
        raise bad_record(where, "nothing in 'prompt'", "a string, or messages (in 'prompt', or at the beginning of both answers)")
    return Preference(_answered(where, row, prompt, chosen), _answered(where, row, prompt, rejected))


def _common_prompt(where: str, prompt: str | Chat | None, chosen: Chat, rejected: Chat) -> tuple[Chat, Chat, Chat]:
    """The beginning that two whole conversations share, and what is left of each."""
    given = prompt.messages if isinstance(prompt, Chat) else []
    if isinstance(prompt, Chat) and given and chosen.messages[: len(given)] != given:
        # The answers go on with turns of others: they are no whole conversations.
        return prompt, chosen, rejected
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    same = next((n for n, (one, two) in enumerate(pairs) if one != two), min(len(chosen.messages), len(rejected.messages)))
    same = min(same, len(chosen.messages) - 1, len(rejected.messages) - 1)
    if same == 0 or same < len(given) or any(chat.messages[same]["role"] in ("user", "system") for chat in (chosen, rejected)):
        raise bad_record(where, "'chosen' and 'rejected' that begin with different turns", "two answers to one prompt")
    if isinstance(prompt, str) and not any(m.get("content", "").strip() == prompt.strip() for m in chosen.messages[:same]):
        raise bad_record(where, "a 'prompt' that is not among the turns 'chosen' and 'rejected' begin with", "the same prompt")
    return _unlearnt(_part(chosen, 0, same)), _part(chosen, same, None), _part(rejected, same, None)


def _group(where: str, row: dict[str, Any]) -> Group:
    if any(name in row for name in ("chosen", "rejected")):
        raise bad_record(where, "'completions' beside 'chosen' or 'rejected'", "a pair, or a group of completions")
    prompt, entries = _prompt(where, row), row["completions"]
    prompt_ids = read_token_ids(where, row, PROMPT_IDS) if PROMPT_IDS in row else None
    if prompt is not None and prompt_ids is not None:
        raise bad_record(where, f"a prompt beside '{PROMPT_IDS}'", "one of them")
    if prompt is None and prompt_ids is None:
        raise bad_record(where, "nothing in 'prompt'", "a string, or a list of messages")
    if not isinstance(entries, list) or len(entries) < 2:
        what = f"{len(entries)} of them" if isinstance(entries, list) else kind_of(entries)
        raise bad_record(where, f"{what} in 'completions'", "a list of two or more: an advantage is over the others of the group")
    rewards = row.get("rewards", [None] * len(entries))
    if not isinstance(rewards, list) or len(rewards) != len(entries):
        actual = f"{len(rewards)} of them" if isinstance(rewards, list) else kind_of(rewards)
        raise bad_record(where, f"{actual} in 'rewards'", f"a list of {len(entries)} numbers, one for each completion")
    group = Group([], [])
    for number, (entry, reward) in enumerate(zip(entries, rewards, strict=True), 1):
        place = f"{where} completion {number}"
        raw = entry
        if isinstance(entry, dict):
            reward = entry.get("reward") if reward is None else reward
        group.rewards.append(read_reward(place, reward))
        if prompt_ids is not None:
            fields = entry if isinstance(entry, dict) else {}
            group.completions.append(TokenAnswer(prompt_ids, read_token_ids(place, fields, IDS)))
            continue
        if isinstance(entry, dict):
            raw = {name: value for name, value in entry.items() if name != "reward"}
            if "role" not in raw and "from" not in raw:
                raw = next((raw[name] for name in ("text", "content", "completion", *CONVERSATIONS) if raw.get(name) is not None), None)
        if raw is None:
            raise bad_record(place, "nothing in 'text'", "an object with a string 'text' (or 'messages') and a number 'reward'")
        assert prompt is not None
        group.completions.append(_answered(place, row, prompt, _answer(place, raw, "text")))
    return group


def _string(where: str, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise bad_record(where, f"{kind_of(value)} in '{name}'", "a string")
    return value


def _turn(role: str, content: str) -> Chat:
    return Chat([{"role": role, "content": content}], [role == "assistant"])


def _unlearnt(chat: Chat) -> Chat:
    return replace(chat, learnt=[False] * len(chat.learnt))


def _part(chat: Chat, start: int, stop: int | None) -> Chat:
    verbatim = None if chat.verbatim is None else chat.verbatim[start:stop]
    return Chat(chat.messages[start:stop], chat.learnt[start:stop], verbatim)


def _joined(first: Chat, second: Chat) -> Chat:
    """One conversation; tools and template arguments are those of the one that has them."""
    verbatim = None
    if first.verbatim is not None or second.verbatim is not None:
        verbatim = [*(first.verbatim or first.messages), *(second.verbatim or second.messages)]
    return Chat(
        [*first.messages, *second.messages],
        [*first.learnt, *second.learnt],
        verbatim,
        first.tools or second.tools,
        {**first.template_kwargs, **second.template_kwargs},
    )
