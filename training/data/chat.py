"""Renders conversations to text, and marks which characters of it are learnt.

Note: what is learnt
    Where the chat template has {% generation %} tags, what they enclose.
    Otherwise what an assistant's turn adds after the generation prompt, its end-of-turn token included: the conversation is rendered
    up to the turn, with and without it.

Note: turns that change
    Some templates render a turn differently once others follow (they drop earlier reasoning). A turn is learnt in the rendering it had
    when it was the last, so such a conversation becomes several documents. `auto` makes as few as that takes: turns whose renderings
    continue each other share one, and where all do, there is one document for the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from ...errors import ConfigError, DataError, UserError
from .chat_doubts import left_out, unlearnt_turns
from .messages import Chat, bad_record
from .token_ids import NotText, TokenIds

DATE = "2025-01-01"
"""What date functions in templates give unless the command line says otherwise: the same input gives the same bytes."""
_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END_GENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
_REASON_LENGTH = 300
"""Characters of what a template raises that a message shows."""
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_OPENED, _CLOSED = "\U0010fffe", "\U0010ffff"
"""Non-characters, which no text has: they mark what the tags enclose."""


class Turns(StrEnum):
    """Which of the assistant's turns are learnt in which document."""

    AUTO = "auto"
    ALL = "all"
    EACH = "each"
    LAST = "last"


@dataclass(slots=True)
class Rendering:
    """One document's text, and the characters of it that are learnt, as (begin, end) in order."""

    text: str
    spans: list[tuple[int, int]]
    ends_learnt: bool
    """Whether it ends with a turn that is learnt."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """An assistant's turn as the last of its conversation: the text up to its end, and where what is learnt of it begins."""

    begin: int
    text: str


class ChatRenderer:
    """The tokenizer's chat template, and the rules above."""

    def __init__(self, tokenizer: Any, token_ids: TokenIds, *, turns: Turns, date: str, name: str) -> None:
        """`date` is an ISO date, with a time or not; `name` is what messages call the tokenizer."""
        self._tokenizer, self._token_ids, self._turns, self._name = tokenizer, token_ids, turns, name
        self._date = read_date(date)
        self.warnings: list[tuple[str, str]] = []
        """Doubts as (what, where); who reads them empties the list."""

    @property
    def uses_date(self) -> bool:
        """Whether the template asks for the date."""
        return "strftime_now" in str(self._tokenizer.chat_template)

    def check(self) -> None:
        """Raise ConfigError for a template that cannot be compiled."""
        template = self._tokenizer.chat_template
        for source in template.values() if isinstance(template, dict) else [template] if template is not None else []:
            self._compiled(str(source))

    def renderings(self, where: str, chat: Chat, *, one: bool = False) -> list[Rendering]:
        """The documents of a conversation (`one`: it must not become several). DataError for what the template refuses."""
        if not any(chat.learnt):
            roles = ", ".join(dict.fromkeys(str(message["role"]) for message in chat.messages))
            raise bad_record(
                where, f"no turn of the assistant's that is learnt, among turns of role {roles}", "one, with what is learnt in it"
            )
        turns = Turns.ALL if one and self._turns is not Turns.LAST else self._turns
        hidden = self._hidden(where, chat)
        template = self._template(where, hidden)
        hidden, text = self._readable(where, template, hidden)
        for what in left_out(hidden, text, template):
            self._warn(f"the chat template leaves out {what}", where)
        tagged = _GENERATION.search(_COMMENT.sub("", template)) is not None
        if tagged and turns in (Turns.AUTO, Turns.ALL) and _all_learnt(hidden):
            spans = self._tag_spans(where, template, hidden)
            out = [Rendering(text, spans, hidden.messages[-1]["role"] == "assistant")]
            self._check_kept(where, hidden, range(len(hidden.messages)), text)
        else:
            out = self._by_turns(where, template, hidden, text, tagged, turns)
        if len(out) > 1 and turns is Turns.AUTO:
            self._warn("the chat template changes earlier turns, so the conversation became several documents (--turns)", where)
        self._check_end(where, hidden, out[-1])
        return out

    def _readable(self, where: str, template: str, chat: Chat) -> tuple[Chat, str]:
        """The chat with the arguments of its tool calls as the template takes them, and its rendering."""
        if chat.verbatim is None:
            return chat, self._render(where, template, chat)
        as_text = replace(chat, messages=chat.verbatim, verbatim=None)
        try:
            text = self._render(where, template, chat)
        except DataError:
            # Some templates put arguments together as text and take no objects.
            return as_text, self._render(where, template, as_text)
        if any(source in text for source in _python_sources(chat)):
            # Others print what they get, which for an object is Python's notation.
            return as_text, self._render(where, template, as_text)
        return chat, text

    def _hidden(self, where: str, chat: Chat) -> Chat:
        hide = self._token_ids.hide
        try:
            messages, verbatim = ([_hidden_members(hide, m) for m in part or ()] for part in (chat.messages, chat.verbatim))
            return replace(
                chat,
                messages=messages,
                verbatim=verbatim or None,
                tools=hide(chat.tools),
                template_kwargs=hide(chat.template_kwargs),
            )
        except NotText as error:
            raise bad_record(where, str(error), "other characters, or --special-tokens parse") from error

    def _by_turns(self, where: str, template: str, chat: Chat, full: str, tagged: bool, turns: Turns) -> list[Rendering]:
        learnt = [number for number, is_learnt in enumerate(chat.learnt) if is_learnt]
        out: list[Rendering] = []
        changed = last = -1
        for number in learnt[-1:] if turns is Turns.LAST else learnt:
            turn = self._turn(where, template, chat, number, tagged)
            self._check_kept(where, chat, [number], turn.text[turn.begin :])
            spans = [(turn.begin, len(turn.text))]
            if tagged:
                upto = replace(chat, messages=chat.messages[: number + 1])
                spans = [span for span in self._tag_spans(where, template, upto) if span[0] >= turn.begin]
            if out and turns is not Turns.EACH and turn.text.startswith(out[-1].text):
                out[-1] = Rendering(turn.text, [*out[-1].spans, *spans], True)
            else:
                changed = last if changed < 0 else changed
                out.append(Rendering(turn.text, spans, True))
            last = number
        if not out:
            return [Rendering(full, [], False)]
        continues = full.startswith(out[-1].text)
        if turns is Turns.ALL and (len(out) > 1 or not continues):
            raise self._rewritten(where, last if changed < 0 else changed)
        if continues and turns is not Turns.EACH:
            out[-1] = Rendering(full, out[-1].spans, chat.learnt[-1])
        return out

    def _turn(self, where: str, template: str, chat: Chat, number: int, tagged: bool) -> _Turn:
        after = self._render(where, template, chat, number + 1)
        if number == 0:
            return _Turn(self._first_begin(where, template, chat, after), after)
        before = self._render(where, template, chat, number, prompt=not tagged)
        if after.startswith(before):
            return _Turn(len(before), after)
        bare = self._render(where, template, chat, number)
        if not after.startswith(bare):
            raise bad_record(
                where,
                f"a chat template that renders what is before turn {number + 1} differently once that turn follows",
                "the text before the assistant's turn to stay as it was",
                "--chat-template FILE.jinja with {% generation %} tags around the assistant's tokens",
            )
        common = next((n for n, (one, two) in enumerate(zip(before, after, strict=False)) if one != two), len(after))
        prompt = self._token_ids.show(before[len(bare) :])
        self._warn(f"the chat template's generation prompt is {prompt!r}, but an assistant's turn begins otherwise in training", where)
        return _Turn(common, after)

    def _first_begin(self, where: str, template: str, chat: Chat, after: str) -> int:
        """Where the assistant's turn begins in a conversation that begins with it."""
        try:
            before = self._render(where, template, chat, 0, prompt=True)
        except DataError:
            before = None
        if before is not None and after.startswith(before):
            return len(before)
        marked = replace(chat, messages=[{"role": "assistant", "content": _OPENED}], verbatim=None)
        before, mark, _ = self._render(where, template, marked).partition(_OPENED)
        if not mark or not after.startswith(before):
            raise bad_record(
                where,
                "a conversation that begins with the assistant, of which the chat template does not show where its turn begins",
                "a system or user turn first",
            )
        return len(before)

    def _tag_spans(self, where: str, template: str, chat: Chat) -> list[tuple[int, int]]:
        """The characters of the rendering that the {% generation %} tags enclose."""
        marked = _GENERATION.sub(rf"{{%\1 if true %}}{{{{ '{_OPENED}' }}}}{{% endif \2%}}", template)
        marked = _END_GENERATION.sub(rf"{{%\1 if true %}}{{{{ '{_CLOSED}' }}}}{{% endif \2%}}", marked)
        text, pieces = self._render(where, template, chat), self._render(where, marked, chat)
        spans, at = [], 0
        for piece in re.split(f"[{_OPENED}{_CLOSED}]", pieces):
            spans.append((at, at + len(piece)))
            at += len(piece)
        if re.sub(f"[{_OPENED}{_CLOSED}]", "", pieces) != text:
            raise bad_record(
                where,
                "{% generation %} tags inside what the chat template then changes",
                "tags around text that stays as it is",
                "--chat-template FILE.jinja",
            )
        return [(begin, end) for begin, end in spans[1::2] if begin < end]

    def _render(self, where: str, template: str, chat: Chat, count: int | None = None, *, prompt: bool = False) -> str:
        """The first `count` messages (None: all), and the generation prompt where asked for."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # The compiled template is shared by all who render it: each sets its own date.
        self._compiled(template).environment.globals["strftime_now"] = self._date.strftime
        arguments: dict[str, Any] = {**self._tokenizer.special_tokens_map, **chat.template_kwargs, "tools": chat.tools}
        try:
            rendered: Any = render_jinja_template(
                conversations=[chat.messages[:count]],
                chat_template=template,
                add_generation_prompt=prompt,
                **arguments,
            )
        # A template is a program: whatever it raises is about the record it was given.
        except Exception as error:
            reason = self._token_ids.show(str(error))[:_REASON_LENGTH] or type(error).__name__
            raise bad_record(where, f"messages the chat template refuses ({reason})", "roles and contents it knows") from error
        return str(rendered[0][0])

    def _template(self, where: str, chat: Chat) -> str:
        if self._tokenizer.chat_template is None:
            raise ConfigError(
                f"{where}, tokenizer {self._name}",
                found="no chat template, and a chat to render",
                expected="one",
                hint="--chat-template FILE.jinja",
            )
        try:
            return str(self._tokenizer.get_chat_template(None, chat.tools))
        except ValueError as error:
            names = ", ".join(sorted(self._tokenizer.chat_template))
            raise ConfigError(
                f"tokenizer {self._name}", found=f"chat templates named {names}", expected="one named default", hint="--chat-template FILE"
            ) from error

    def _compiled(self, template: str) -> Any:
        import jinja2
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            return _compile_jinja_template(template)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template of tokenizer {self._name}, line {error.lineno}",
                found=f"what is no Jinja ({error.message})",
                expected="a chat template",
                hint="--chat-template FILE.jinja",
            ) from error

    def _check_kept(self, where: str, chat: Chat, numbers: Iterable[int], learnt: str) -> None:
        """Warn where a turn's own text is not in what was rendered of it."""
        for _ in range(unlearnt_turns(chat, numbers, learnt)):
            self._warn("the chat template leaves out part of an assistant's turn, which is then not learnt", where)

    def _check_end(self, where: str, chat: Chat, rendering: Rendering) -> None:
        """Warn where the end of the assistant's turn is not learnt: such a model does not stop."""
        if not rendering.spans or chat.messages[-1]["role"] != "assistant" or not chat.learnt[-1]:
            return
        begin, end = rendering.spans[-1]
        rest = self._token_ids.show(rendering.text[end:]).strip()
        if rest:
            self._warn(f"the {{% generation %}} tags leave out the end of the assistant's turn, {rest!r}: it is not learnt", where)
        elif self._token_ids.ending(rendering.text[begin:end].rstrip()) is None:
            self._warn(
                "the chat template ends the assistant's turn with no special token: nothing is learnt that says where to stop", where
            )

    def _rewritten(self, where: str, turn: int) -> UserError:
        return bad_record(
            where,
            f"a chat template that renders turn {turn + 1} differently once other turns follow",
            "each turn to be added at the end, for --turns all",
            "--turns auto, which learns each turn in the rendering it had when it was the last",
        )

    def _warn(self, what: str, where: str) -> None:
        self.warnings.append((what, where))


def read_date(text: str) -> datetime:
    """The date behind `--date`. ConfigError for what is none."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError("--date", found=repr(text), expected="a date like 2025-01-31", hint=f"--date {DATE}") from error


def _python_sources(chat: Chat) -> list[str]:
    """Arguments of tool calls as Python would print them, where JSON would not."""
    calls = (call for message in chat.messages for call in message.get("tool_calls", ()))
    arguments = [call["function"]["arguments"] for call in calls]
    return [str(value) for value in arguments if str(value) != json.dumps(value, ensure_ascii=False)]


def _all_learnt(chat: Chat) -> bool:
    pairs = zip(chat.messages, chat.learnt, strict=True)
    return all(is_learnt for message, is_learnt in pairs if message["role"] == "assistant")


def _hidden_members(hide: Callable[[Any], Any], message: dict[str, Any]) -> dict[str, Any]:
    # Roles become part of the template's own tokens.
    return {name: value if name == "role" else hide(value) for name, value in message.items()}
