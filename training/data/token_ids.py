"""Turns texts into token ids: each special token once, answers that continue their prompt, special tokens in text or not.

Note: how
    The tokenizer's post-processor is taken off and what it adds is learnt from a probe, so that it is added only where a text
    does not have it already. (It also trims the offsets of some tokenizers: a token would seem to lie in the next turn.)
    An answer is what the prompt and it together have beyond the prompt's own ids. Where the border falls inside a token, or a space would
    come between them, the answer is tokenised by itself as a continuation, checked by decoding. Where no tokens say that, the token
    across the border is learnt.
    Special tokens as text (`--special-tokens text`): those a chat template writes are swapped for private-use characters that a copy of
    the tokenizer knows, and the copy takes all others for text. Both are as long as the token, so that offsets stay true.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Any

import numpy as np

_HIDDEN, _KEPT = 0x100000, 0x108000
"""First private-use characters for special tokens in a person's text, and for those that a template wrote."""
_FILL = "\U0010fffd"
_PRIVATE = re.compile("[\U00100000-\U0010fffd]")
_ANCHORS = ("\n", "a", ".", "1")
"""Texts to put before a continuation, so that the tokenizer does not take it for a beginning."""


class SpecialTokens(StrEnum):
    """What special tokens written in plain text are."""

    PARSE = "parse"
    TEXT = "text"


class NotText(ValueError):
    """A text cannot be tokenised as asked; the message is a clause, as in `found ...`."""


class TokenIds:
    """A tokenizer, and what is put around texts."""

    def __init__(self, backend: Any, special_tokens: SpecialTokens, eos_id: int | None, *, ends: bool = True) -> None:
        """`backend` is a `tokenizers.Tokenizer`. `ends`: texts and answers end with `eos_id` (None: with what the tokenizer adds)."""
        self._bare = _without_post_processor(backend)
        self._prefix, suffix = _added_around(backend, self._bare)
        self._end = [] if not ends else suffix if eos_id in (None, *suffix[-1:]) else [eos_id]
        added = backend.get_added_tokens_decoder()
        self._special: dict[int, str] = {i: str(token.content) for i, token in added.items() if token.special}
        self._added = tuple(str(token.content) for token in added.values())
        flags = {i: (token.lstrip, token.rstrip) for i, token in added.items() if token.content.strip()}
        self._stripping = {i: pair for i, pair in flags.items() if any(pair)}
        """Tokens that swallow white space on their left or right, by id."""
        self._end_text = str(backend.id_to_token(self._end[-1])) if self._end else ""
        self._copy = _Copy(self._bare, self._special) if special_tokens is SpecialTokens.TEXT else None
        self._tokenizer = self._bare if self._copy is None else self._copy.tokenizer
        self._prompt: tuple[str | None, list[int], str] = (None, [], "")

    @property
    def has_end(self) -> bool:
        """Whether there is something that texts and answers end with."""
        return bool(self._end)

    def ending(self, text: str) -> str | None:
        """The token, of those added to the vocabulary as ends of turns are, that a text ends with; None: with none."""
        return max((token for token in self._added if text.endswith(token)), key=len, default=None)

    def whole(self, texts: list[str]) -> list[np.ndarray | NotText]:
        """Ids (int32) of texts with a beginning and an end, none of an empty text; NotText in the place of what cannot be tokenised."""
        out: list[np.ndarray | NotText] = []
        for text, encoding in zip(texts, self._tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            try:
                ids = self._checked(text, encoding.ids)
            except NotText as error:
                out.append(error)
            else:
                out.append(np.array(self._begun(self._ended(text, ids)) if ids else [], dtype=np.int32))
        return out

    def continued(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt, with its beginning, and of the answer after it, with its end; no answer has no end."""
        first, shown = self._prompt_ids(prompt)
        if not answer:
            return first, []
        joint = self._begun(self._plain(prompt + answer))
        rest = joint[len(first) :] if joint[: len(first)] == first else None
        if prompt or rest is None:
            exact = shown + answer
            if rest is None or self._decoded(joint) != exact:
                first, rest = self._chosen(prompt, answer, first, joint, (exact, self._decoded(joint)))
        return first, self._ended(answer, rest) if rest else []

    def _prompt_ids(self, prompt: str) -> tuple[list[int], str]:
        """Ids of a prompt and what they decode to; those of the last one are kept, for prompts have several answers."""
        if prompt != self._prompt[0]:
            ids = self._begun(self._plain(prompt))
            self._prompt = (prompt, ids, self._decoded(ids))
        return self._prompt[1:]

    def ended(self, text: str, ids: np.ndarray) -> np.ndarray:
        """The ids of a rendered chat, with the end token if they do not have it."""
        return np.array(self._ended(text, ids.tolist()), dtype=np.int32)

    def rendered(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids (int32) of a rendered chat as it stands, and the characters each begins at and ends before (int64)."""
        if self._copy is not None:
            text = self._copy.keep(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        ids = np.array(self._checked(text, encoding.ids, rendered=True), dtype=np.int32)
        for place in np.flatnonzero(np.isin(ids, list(self._stripping))) if self._stripping else ():
            # The white space it swallows may be the next turn's, which does not make the token one of it.
            begin, end = offsets[place]
            left, right = self._stripping[int(ids[place])]
            offsets[place] = (begin + _blanks(text[begin:end]) * left, end - _blanks(text[begin:end][::-1]) * right)
        return ids, offsets[:, 0], offsets[:, 1]

    def hide(self, value: Any) -> Any:
        """The value with the special tokens in its strings out of a template's sight, where they are text."""
        return value if self._copy is None else self._copy.hide(value)

    def show(self, text: str) -> str:
        """A rendering as a person reads it."""
        return text if self._copy is None else self._copy.show(text)

    def _chosen(
        self, prompt: str, answer: str, first: list[int], joint: list[int], targets: tuple[str, str]
    ) -> tuple[list[int], list[int]]:
        """Prompt and answer where the ids of both together do not say it: the answer as a continuation that decodes to the best target."""
        continuations = [self._plain(answer)]
        for anchor in _ANCHORS:
            before, both = self._plain(anchor), self._plain(anchor + answer)
            if both[: len(before)] == before and len(both) > len(before):
                continuations.append(both[len(before) :])
        decoded = [self._decoded(first + rest) for rest in continuations]
        if targets[0] in decoded:
            return first, continuations[decoded.index(targets[0])]
        if joint[: len(first)] == first and len(joint) > len(first):
            return first, joint[len(first) :]
        if targets[1] in decoded:
            return first, continuations[decoded.index(targets[1])]
        ends = np.array(self._tokenizer.encode(prompt + answer, add_special_tokens=False).offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
        added = len(joint) - len(ends)
        border = added + int(np.argmax(ends > len(prompt))) if (ends > len(prompt)).any() else len(joint)
        return joint[:border], joint[border:]

    def _plain(self, text: str) -> list[int]:
        return self._checked(text, self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _checked(self, text: str, ids: list[int], *, rendered: bool = False) -> list[int]:
        return ids if self._copy is None else self._copy.originals(text, ids, rendered=rendered)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._bare.decode(ids, skip_special_tokens=False))

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if ids[: len(self._prefix)] == self._prefix and self._copy is None else [*self._prefix, *ids]

    def _ended(self, text: str, ids: list[int]) -> list[int]:
        if not self._end or ids[-len(self._end) :] == self._end:
            return ids
        # An end token before a last line break has ended the text, too.
        is_there = self._copy is None and text.rstrip().endswith(self._end_text) and self._end[-1] in ids[-8:]
        return ids if is_there else [*ids, *self._end]


class _Copy:
    """A tokenizer for which special tokens are text, except where `keep` put the private-use characters that stand for them."""

    def __init__(self, bare: Any, special: dict[int, str]) -> None:
        from tokenizers import AddedToken, Tokenizer

        self.tokenizer = Tokenizer.from_str(bare.to_str())
        self.tokenizer.encode_special_tokens = True
        self._special = special
        flags = bare.get_added_tokens_decoder()
        stands = {token: _stand_in(_KEPT + n, text) for n, (token, text) in enumerate(special.items())}
        self.tokenizer.add_tokens(
            [
                AddedToken(stand, special=False, normalized=False, lstrip=flags[i].lstrip, rstrip=flags[i].rstrip)
                for i, stand in stands.items()
            ]
        )
        self._original = {self.tokenizer.token_to_id(stand): token for token, stand in stands.items()}
        self._kept = {special[token]: stand for token, stand in stands.items()}
        self._hidden = {text: _stand_in(_HIDDEN + n, text) for n, text in enumerate(special.values())}
        self._shown = {stand: text for text, stand in self._hidden.items()}
        self._tokens, self._stands = _any_of(self._hidden), _any_of(self._shown)

    def hide(self, value: Any) -> Any:
        """Strings at any depth, with the special tokens in them replaced. NotText for private-use characters of ours."""
        if isinstance(value, str):
            if match := _PRIVATE.search(value):
                raise NotText(f"the private-use character U+{ord(match[0]):X}, which stands for special tokens here")
            return self._tokens.sub(lambda match: self._hidden[match[0]], value)
        if isinstance(value, dict):
            return {name: self.hide(member) for name, member in value.items()}
        return [self.hide(member) for member in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        return self._stands.sub(lambda match: self._shown[match[0]], text)

    def keep(self, text: str) -> str:
        """A rendering with the template's special tokens replaced, and those of `hide` as they were."""
        return self.show(self._tokens.sub(lambda match: self._kept[match[0]], text))

    def originals(self, text: str, ids: list[int], *, rendered: bool) -> list[int]:
        """The tokenizer's own ids. NotText where a special token came out of plain text (`rendered`: not of the template's)."""
        if not rendered and self._original.keys() & set(ids):
            raise NotText("private-use characters that stand for special tokens here")
        for token_id in self._special.keys() & set(ids):
            # The token for what is unknown, and those of bytes, come of other texts.
            if self._special[token_id] in text:
                raise NotText(f"{self._special[token_id]!r} in plain text, of which this tokenizer makes the special token all the same")
        return [self._original.get(token_id, token_id) for token_id in ids]


def _blanks(text: str) -> int:
    """White space that a text begins with."""
    return len(text) - len(text.lstrip())


def _stand_in(code: int, text: str) -> str:
    return chr(code) + _FILL * (len(text) - 1)


def _any_of(texts: dict[str, str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _without_post_processor(backend: Any) -> Any:
    from tokenizers import Tokenizer

    # A tokenizer.json may also carry the truncation and padding of the run that saved it.
    content = {**json.loads(backend.to_str()), "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(content))


def _added_around(backend: Any, bare: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer's post-processor puts before and after a text."""
    from tokenizers import Tokenizer

    probe = Tokenizer.from_str(backend.to_str())
    probe.no_truncation()
    probe.no_padding()
    inner: list[int] = bare.encode("a", add_special_tokens=False).ids
    full: list[int] = probe.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(inner) + 1):
        if full[start : start + len(inner)] == inner:
            return full[:start], full[start + len(inner) :]
    return [], []
