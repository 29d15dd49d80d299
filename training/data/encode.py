"""From raw records to token ids and loss masks. One Encoder per process.

Note: what is learnt
    Text: every token. Prompt and completion: the completion, tokenised by itself so that the border is exact.
    Pairs and completions (answers.py): the answers, each after its prompt.
    Chat: the assistant's turns. Where the chat template has {% generation %} tags they say which tokens those are;
    otherwise the conversation is rendered turn by turn, and what an assistant turn adds after the generation
    prompt (its end-of-turn token included) is learnt. That needs each rendering to be a prefix of the next:
    a template that rewrites earlier turns is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError
from .answers import Document, answer_documents, has_answers
from .indexed import Kind
from .inputs import Format, RawBatch
from .tokenizer import load_tokenizer

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """What the command line says about tokenisation; the same in every worker."""

    tokenizer: str
    text_field: str = "text"
    append_eos: bool | None = None
    """None: after texts and completions, not after chats, whose template ends turns itself."""
    eos_token: str | None = None
    chat_template: str | None = None
    """Jinja text; None: the tokenizer's own."""
    skip_bad: bool = False
    """Records that cannot be used are counted and left out instead of stopping the work."""


@dataclass(slots=True)
class Encoded:
    """Documents of one batch in order, all of one kind, and (reason, where) of what was left out."""

    documents: list[Document] = field(default_factory=list)
    first: str = ""
    """Where the first document is from."""
    skipped: list[tuple[str, str]] = field(default_factory=list)


class Encoder:
    """A loaded tokenizer and the rules above."""

    def __init__(self, options: EncodeOptions) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer)
        self._backend: Any = self.tokenizer.backend_tokenizer
        # A tokenizer.json may carry the truncation and padding of the run that saved it.
        self._backend.no_truncation()
        self._backend.no_padding()
        if options.chat_template is not None:
            self.tokenizer.chat_template = options.chat_template
        self._eos = self._eos_id()

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The Jinja text chats are rendered with; several by name where the tokenizer has several."""
        template: str | dict[str, str] | None = self.tokenizer.chat_template
        return template

    @property
    def eos_token(self) -> str | None:
        """The end token, as text."""
        return self.options.eos_token or self.tokenizer.eos_token

    def identity(self) -> str:
        """Text that changes with anything that could change what is written."""
        return json.dumps([self._backend.to_str(), self.tokenizer.chat_template, self._eos])

    def encode(self, batch: RawBatch) -> Encoded:
        """Tokenise a batch. DataError for the first record that cannot be used, unless told to skip."""
        out = Encoded()
        slots: list[list[Document] | int] = []
        texts: list[str] = []
        for where, raw in batch.records:
            try:
                content = self._content(batch.format, where, raw)
                if isinstance(content, str):
                    slots.append(len(texts))
                    texts.append(content)
                elif has_answers(content):
                    slots.append(answer_documents(self, where, content))
                else:
                    slots.append([Document(*self._masked(where, content))])
            except DataError as error:
                slots.append([])
                self._refuse(error, where, out)
        plain = self._texts(texts)
        for (where, _), slot in zip(batch.records, slots, strict=True):
            for document in slot if isinstance(slot, list) else [Document(plain[slot], None)]:
                self._keep(where, document, out)
        return out

    def _keep(self, where: str, document: Document, out: Encoded) -> None:
        if len(document.ids) < 2:
            out.skipped.append(("fewer than 2 tokens", where))
        elif document.mask is not None and not document.mask[1:].any():
            self._refuse(_bad(where, "no token to learn", "a completion or an assistant turn that is not empty"), where, out)
        elif out.documents and out.documents[0].kind is not document.kind:
            self._refuse(other_kind(where, document.kind, out.documents[0].kind), where, out)
        else:
            out.first = out.first or where
            out.documents.append(document)

    def _refuse(self, error: DataError, where: str, out: Encoded) -> None:
        if not self.options.skip_bad:
            raise error
        out.skipped.append((error.found, where))

    def _content(self, kind: Format, where: str, raw: Any) -> str | dict[str, Any]:
        """The text of a record, or its row if it needs a mask."""
        if kind is Format.TEXT:
            return _read_text(raw)
        row = _parse_line(where, raw) if kind is Format.JSONL else raw
        if row.get("messages") is not None or has_answers(row) or (row.get("prompt") is not None and row.get("completion") is not None):
            return dict(row)
        text = row.get(self.options.text_field)
        if isinstance(text, str):
            return text
        expected = f"a string in '{self.options.text_field}', or 'messages', or 'prompt' and 'completion', a pair or 'completions'"
        found = (
            f"{type(text).__name__} in '{self.options.text_field}'" if text is not None else f"fields {', '.join(sorted(row)) or '(none)'}"
        )
        raise _bad(where, found, expected, "--text-field NAME")

    def _masked(self, where: str, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if row.get("messages") is not None:
            return self._chat(where, row["messages"], row.get("tools"))
        prompt, completion = row["prompt"], row["completion"]
        if not isinstance(prompt, str) or not isinstance(completion, str):
            found = f"{type(prompt).__name__} and {type(completion).__name__} in 'prompt' and 'completion'"
            raise _bad(where, found, "two strings (conversations go into 'messages')")
        first = self.prompt_ids(prompt)
        ids = np.array([*first, *self.answer_ids(completion)], dtype=np.int32)
        return ids, np.arange(len(ids)) >= len(first)

    def prompt_ids(self, text: str) -> list[int]:
        """What comes before an answer."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=True).ids
        # An end token is added by some tokenizers, as if the prompt were all.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def answer_ids(self, text: str) -> list[int]:
        """An answer, tokenised by itself, and the end token; nothing for an empty one."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [*ids, *self._end()] if ids else []

    def _texts(self, texts: list[str]) -> list[np.ndarray]:
        out = []
        for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=True):
            ids = encoding.ids
            end = self._end() if ids else []
            # Some tokenizers add the end token themselves.
            out.append(np.array(ids if ids[-1:] == end else [*ids, *end], dtype=np.int32))
        return out

    def _chat(self, where: str, messages: Any, tools: Any) -> tuple[np.ndarray, np.ndarray]:
        _check_messages(where, messages)
        template = self.tokenizer.chat_template
        if template is None:
            found = "no chat template, and a chat to render"
            raise ConfigError(
                f"{where}, tokenizer {self.options.tokenizer}", found=found, expected="one", hint="--chat-template FILE.jinja"
            )
        spans: list[tuple[int, int]]
        if _GENERATION_TAG.search(template if isinstance(template, str) else json.dumps(template)):
            ids, mask = self._tagged_chat(where, messages, tools)
        else:
            text, spans = self._rendered_spans(where, messages, tools)
            encoding = self._backend.encode(text, add_special_tokens=False)
            ids = np.array(encoding.ids, dtype=np.int32)
            starts = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
            mask = np.zeros(len(ids), dtype=bool)
            for begin, end in spans:
                mask |= (starts >= begin) & (starts < end)
        if self.options.append_eos and self._eos is not None:
            ids = np.append(ids, np.int32(self._eos))
            mask = np.append(mask, messages[-1]["role"] == "assistant")
        return ids, mask

    def _tagged_chat(self, where: str, messages: Any, tools: Any) -> tuple[np.ndarray, np.ndarray]:
        wanted = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        out = self._apply(where, messages, tools, **wanted)
        return np.array(out["input_ids"], dtype=np.int32), np.array(out["assistant_masks"], dtype=bool)

    def _rendered_spans(self, where: str, messages: Any, tools: Any) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the characters of each assistant turn in it."""
        full = self._apply(where, messages, tools, tokenize=False)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(where, messages[:turn], tools, tokenize=False, add_generation_prompt=True)
            after = self._apply(where, messages[: turn + 1], tools, tokenize=False)
            if not (full.startswith(after) and after.startswith(before)):
                raise _bad(
                    where,
                    f"a chat template that renders turn {turn + 1} differently once other turns follow",
                    "each turn to be added at the end",
                    "--chat-template FILE.jinja with {% generation %} tags around the assistant's tokens",
                )
            spans.append((len(before), len(after)))
        return full, spans

    def _apply(self, where: str, messages: Any, tools: Any, **wanted: Any) -> Any:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools or None, **wanted)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise _bad(where, f"messages the chat template refuses ({error})", "roles and contents it knows") from error

    def _eos_id(self) -> int | None:
        token = self.options.eos_token
        found = self.tokenizer.eos_token_id if token is None else self._backend.token_to_id(token)
        if found is None and (token is not None or self.options.append_eos):
            raise self._no_eos()
        return None if found is None or self.options.append_eos is False else int(found)

    def _end(self) -> list[int]:
        """What follows a text or a completion."""
        if self.options.append_eos is False:
            return []
        if self._eos is None:
            raise self._no_eos()
        return [self._eos]

    def _no_eos(self) -> ConfigError:
        token = self.options.eos_token
        return ConfigError(
            f"tokenizer {self.options.tokenizer}",
            found="no end-of-text token" if token is None else f"no token {token!r}",
            expected="one, to end each document with",
            hint="--eos-token TOKEN, or --no-eos",
        )


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(path, f"a file that is not UTF-8 (byte {error.start})", "UTF-8 text") from error


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _bad(where, f"a line that is not JSON ({error})", "one JSON object a line") from error
    if not isinstance(row, dict):
        raise _bad(where, f"a JSON {type(row).__name__}", "one JSON object a line")
    if b"\\ud" in line.lower() and _LONE_SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise _bad(where, "half of a \\u surrogate pair, which is no character", "whole characters")
    return row


def _check_messages(where: str, messages: Any) -> None:
    valid = isinstance(messages, list) and messages and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    if not valid:
        raise _bad(where, "'messages' that are no conversation", "a list of objects with 'role' and 'content'")
    if messages[0]["role"] == "assistant":
        raise _bad(where, "a conversation that starts with the assistant", "a system or user turn first")


def other_kind(where: str, found: Kind, expected: Kind) -> DataError:
    """The error for a record that does not belong to the corpus the others make."""
    return _bad(where, f"{found.value} after {expected.value}", "records of one kind in one corpus", "one --out for each kind of record")


def _bad(where: str, found: str, expected: str, hint: str = "mend it, or leave such records out with --skip-bad") -> DataError:
    return DataError(where, found=found, expected=expected, hint=hint)
