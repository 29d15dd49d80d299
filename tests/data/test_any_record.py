"""Whatever a record holds, it becomes documents or its own error: never another exception, and never tokens outside the vocabulary."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efflaunch.errors import DataError
from efflaunch.training.data.encode import EncodeOptions, Encoder
from efflaunch.training.data.inputs import Cursor, Format, RawBatch
from efflaunch.training.data.records import FIELDS

from .small_tokenizers import save_tokenizer
from .test_chat import THINKING

TEXTS = st.sampled_from(
    ["", " ", "Two plus", "<s>", "</s>", "<|end|>", "[", "{}", '[{"role": "user", "content": "a"}]', "\ud83d", "\u2713\n"]
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.floats(allow_nan=True), TEXTS)
NAMES = st.sampled_from(
    ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text", "weight", "reward"]
)
SPEAKERS = st.sampled_from(["user", "assistant", "system", "human", "gpt", "function_call", "tool"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=8)
CALLS = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXTS, "arguments": VALUES})}), max_size=2)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": SPEAKERS}, optional={"content": VALUES | TEXTS, "tool_calls": CALLS | VALUES, "weight": SCALARS}),
    max_size=4,
)
ROWS = st.dictionaries(st.sampled_from(["text", *FIELDS]), MESSAGES | TEXTS | VALUES, max_size=4)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Encoder]:
    root = tmp_path_factory.mktemp("tokenizers")
    options: list[dict[str, Any]] = [{}, {"special_tokens": "text", "turns": "each"}]
    return [
        Encoder(EncodeOptions(save_tokenizer(kind, root / f"{kind}{n}", THINKING), skip_bad=True, **chosen))
        for kind in ("byte_level", "prepending")
        for n, chosen in enumerate(options)
    ]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(ROWS)
def test_any_record_becomes_documents_or_its_error(encoders: list[Encoder], row: dict[str, Any]) -> None:
    line = json.dumps(row).encode()
    for encoder in encoders:
        out = encoder.encode(RawBatch(Format.JSONL, [("r", line)], Cursor(), 0))
        assert out.documents or out.skipped
        for document in out.documents:
            assert len(document.ids) >= 2 and document.ids.min() >= 0 and document.ids.max() < encoder.vocab_size
            assert document.mask is None or document.mask[1:].any()


@pytest.mark.parametrize("depth", [300, 900, 5000])
def test_records_nested_too_deeply_are_named(encoders: list[Encoder], depth: int) -> None:
    content = "[" * depth + "]" * depth
    for line in (f'{{"messages": {content}}}', f'{{"messages": [{{"role": "user", "content": {content}}}]}}'):
        (encoder, *_) = encoders
        assert encoder.encode(RawBatch(Format.JSONL, [("r", line.encode())], Cursor(), 0)).skipped
    with pytest.raises(DataError):
        Encoder(EncodeOptions(encoder.options.tokenizer)).encode(RawBatch(Format.JSONL, [("r", line.encode())], Cursor(), 0))
