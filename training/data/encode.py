"""Encodes raw records as token ids and loss masks. One Encoder per process.

Note: what is learnt
    Text: every token. Prompt and completion: the completion (token_ids.py says where it begins).
    Pairs and completions (answers.py): the answers, each after its prompt.
    Chat: the assistant's turns (chat.py). A token is learnt where any character of it is: the offsets say which.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import ConfigError, DataError
from .answers import Document, answer_documents
from .chat import DATE, ChatRenderer, Rendering, Turns
from .indexed import Kind
from .inputs import Format, RawBatch
from .messages import Chat, bad_record, check_characters
from .records import TEXT, Exchange, Group, Preference, Record, read_record
from .streams import csv_row, opened
from .token_answers import TokenAnswer
from .token_ids import NotText, SpecialTokens, TokenIds
from .tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """The command line's options on tokenisation; the same in every worker."""

    tokenizer: str
    text_field: str = TEXT
    append_eos: bool | None = None
    """None: after texts and completions, not after chats, whose template ends turns itself."""
    eos_token: str | None = None
    chat_template: str | None = None
    """Jinja text; None: the tokenizer's own."""
    skip_bad: bool = False
    """Records that cannot be used are counted and left out instead of stopping the work."""
    special_tokens: SpecialTokens = SpecialTokens.PARSE
    turns: Turns = Turns.AUTO
    date: str = DATE
    """What date functions in chat templates give."""
    reward_weights: tuple[tuple[str, float], ...] = ()
    """Names and weights of rewards, where completions have several."""


@dataclass(slots=True)
class Encoded:
    """Documents of one batch in order, all of one kind, and (reason, where) of what was left out or is doubtful."""

    documents: list[Document] = field(default_factory=list)
    first: str = ""
    """Place that the first document is from."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    turn_ends: set[str] = field(default_factory=set)
    """Special tokens that the assistant's turns end with."""


class Encoder:
    """A loaded tokenizer and the rules above."""

    def __init__(self, options: EncodeOptions) -> None:
        self.options = options
        self.tokenizer = load_tokenizer(options.tokenizer)
        self._backend: Any = self.tokenizer.backend_tokenizer
        if options.chat_template is not None:
            self.tokenizer.chat_template = options.chat_template
        self._eos = self._eos_id()
        ends = options.append_eos is not False
        self._ids = TokenIds(self._backend, SpecialTokens(options.special_tokens), self._eos, ends=ends)
        self._chats = ChatRenderer(self.tokenizer, self._ids, turns=Turns(options.turns), date=options.date, name=options.tokenizer)
        if options.chat_template is not None:
            self._chats.check()
        self._turn_ends: set[str] = set()

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

    @property
    def template_uses_date(self) -> bool:
        """Whether `date` changes what chats are rendered to."""
        return self._chats.uses_date

    def identity(self) -> str:
        """Text that changes with anything that could change what is written."""
        return json.dumps([self._backend.to_str(), self.tokenizer.chat_template, self._eos])

    def encode(self, batch: RawBatch) -> Encoded:
        """Tokenise a batch. DataError for the first record that cannot be used, unless such records are skipped."""
        out = Encoded()
        slots: list[list[Document] | str] = []
        for where, raw in batch.records:
            try:
                slots.append(self._slot(batch.format, where, raw))
            except DataError as error:
                slots.append([])
                self._refuse(error, where, out)
        plain = iter(self._ids.whole([slot for slot in slots if isinstance(slot, str)]))
        for (where, _), slot in zip(batch.records, slots, strict=True):
            for document in [next(plain)] if isinstance(slot, str) else slot:
                if isinstance(document, NotText):
                    self._refuse(_not_text(where, document), where, out)
                else:
                    self._keep(where, document if isinstance(document, Document) else Document(document, None), out)
        out.warnings, self._chats.warnings = self._chats.warnings, []
        out.turn_ends, self._turn_ends = self._turn_ends, set()
        return out

    def _keep(self, where: str, document: Document, out: Encoded) -> None:
        if len(document.ids) < 2:
            out.skipped.append(("fewer than 2 tokens", where))
        elif document.mask is not None and not document.mask[1:].any():
            self._refuse(bad_record(where, "no token to learn", "a completion or an assistant turn that is not empty"), where, out)
        elif out.documents and out.documents[0].kind is not document.kind:
            self._refuse(other_kind(where, document.kind, out.documents[0].kind), where, out)
        else:
            out.first = out.first or where
            out.documents.append(document)

    def _refuse(self, error: DataError, where: str, out: Encoded) -> None:
        if not self.options.skip_bad:
            raise error
        out.skipped.append((error.found, where))

    def _slot(self, kind: Format, where: str, raw: Any) -> list[Document] | str:
        """A record's documents, or its text: those are tokenised together."""
        try:
            record = self._record(kind, where, raw)
            if isinstance(record, str):
                if record:
                    self._check_end()
                return record
            return self._documents(where, record)
        except RecursionError as error:
            raise bad_record(where, "values nested too deeply", "some hundred levels at most") from error

    def _record(self, kind: Format, where: str, raw: Any) -> Record:
        if kind is Format.TEXT:
            return read_text(raw)
        if kind is Format.JSONL:
            row = _parse_line(where, raw)
        elif kind is Format.CSV:
            row = csv_row(where, raw, self.options.text_field)
        else:
            row = raw
            if kind is Format.JSON:
                check_characters(where, row)
        return read_record(where, row, self.options.text_field)

    def _documents(self, where: str, record: Exchange | Chat | Preference | Group) -> list[Document]:
        if isinstance(record, (Preference, Group)):
            return answer_documents(self, where, record)
        if isinstance(record, Exchange):
            return [Document(*self.answer(where, record))]
        return [self._chat_document(where, rendering) for rendering in self._chats.renderings(where, record)]

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weights of rewards by name."""
        return dict(self.options.reward_weights)

    def answer(self, where: str, record: Exchange | Chat | TokenAnswer) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int32) and what is learnt of them (bool) of one answer after its prompt."""
        if isinstance(record, TokenAnswer):
            return record.document(where, self.vocab_size)
        if isinstance(record, Chat):
            (rendering,) = self._chats.renderings(where, record, one=True)
            document = self._chat_document(where, rendering)
            assert document.mask is not None
            return document.ids, document.mask
        self._check_end()
        if record.prompt.strip() and record.completion.startswith(record.prompt):
            self._chats.warnings.append(("an answer begins with its whole prompt, which is then there twice", where))
        try:
            first, second = self._ids.continued(record.prompt, record.completion)
        except NotText as error:
            raise _not_text(where, error) from error
        ids = np.array([*first, *second], dtype=np.int32)
        return ids, np.arange(len(ids)) >= len(first)

    def _chat_document(self, where: str, rendering: Rendering) -> Document:
        try:
            ids, starts, ends = self._ids.rendered(rendering.text)
        except NotText as error:
            raise _not_text(where, error) from error
        mask = np.zeros(len(ids), dtype=bool)
        for begin, end in rendering.spans:
            mask |= (starts < end) & (np.maximum(ends, starts + 1) > begin)
        if self.options.append_eos and self._eos is not None:
            ids = self._ids.ended(rendering.text, ids)
            mask = np.append(mask, [rendering.ends_learnt] * (len(ids) - len(mask)))
        if rendering.ends_learnt and (token := self._ids.ending(rendering.text.rstrip())):
            self._turn_ends.add(token)
        return Document(ids, mask)

    def _eos_id(self) -> int | None:
        """The token that ends documents; None: none does."""
        token = self.options.eos_token
        token_id = self.tokenizer.eos_token_id if token is None else self._backend.token_to_id(token)
        if token_id is None and (token is not None or self.options.append_eos):
            raise self._no_eos()
        return None if token_id is None or self.options.append_eos is False else int(token_id)

    def _check_end(self) -> None:
        if self.options.append_eos is not False and not self._ids.has_end:
            raise self._no_eos()

    def _no_eos(self) -> ConfigError:
        token = self.options.eos_token
        return ConfigError(
            f"tokenizer {self.options.tokenizer}",
            found="no end-of-text token" if token is None else f"no token {token!r}",
            expected="one, to end each document with",
            hint="--eos-token TOKEN, or --no-eos",
        )


def read_text(path: str) -> str:
    """The text of a file, compressed or not. DataError where it is not UTF-8."""
    try:
        with opened(path) as (stream, _):
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad_record(path, f"a file that is not UTF-8 (byte {error.start})", "UTF-8 text") from error


def _parse_line(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad_record(where, f"a line that is not JSON ({error})", "one JSON object a line") from error
    if not isinstance(row, dict):
        raise bad_record(where, f"a JSON {type(row).__name__}", "one JSON object a line")
    if b"\\ud" in line.lower():
        check_characters(where, row)
    return row


def other_kind(where: str, kind: Kind, expected: Kind) -> DataError:
    """The error for a record that does not belong to the corpus the others make."""
    return bad_record(
        where, f"{kind.value} after {expected.value}", "records of one kind in one corpus", "one --out for each kind of record"
    )


def _not_text(where: str, error: NotText) -> DataError:
    return bad_record(where, str(error), "text that can be tokenised as text", "mend it, --skip-bad, or --special-tokens parse")
