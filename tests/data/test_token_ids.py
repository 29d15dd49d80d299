"""Ids of texts and answers, for every kind of tokenizer: each special token once, and what decodes to what was written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from efflaunch.errors import ConfigError, DataError
from efflaunch.training.data.encode import EncodeOptions, Encoder
from efflaunch.training.data.inputs import Cursor, Format, RawBatch
from efflaunch.training.data.token_ids import TokenIds

from .small_tokenizers import KINDS, save_tokenizer

LOSSLESS = [kind for kind in KINDS if kind != "word_piece"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save_tokenizer(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, str]) -> dict[str, Any]:
    """Each as transformers has it."""
    from transformers import AutoTokenizer

    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


def _documents(folder: str, *rows: dict[str, Any], **options: Any) -> list[Any]:
    batch = RawBatch(Format.PARQUET, [(f"r{n}", row) for n, row in enumerate(rows)], Cursor(), 0)
    return Encoder(EncodeOptions(folder, **options)).encode(batch).documents


PAIRS = [
    ("Two plus two is", " four."),
    ("Two plus two is", "four"),
    ("Two plus two is ", "four"),
    ("play", "ing"),
    ("[INST] Kind? [/INST]", "words"),
    ("Two</s>", "four"),
    ("Two plus two is  ", "  four"),
]


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_completion_decode_to_what_was_written(
    folders: dict[str, str], loaded: dict[str, Any], kind: str, prompt: str, completion: str
) -> None:
    if kind == "unigram":
        prompt = prompt.replace("/", "").replace("?", "")  # it does not know these characters
    (document,) = _documents(folders[kind], {"prompt": prompt, "completion": completion})
    tokenizer = loaded[kind]
    start = [1] if kind != "unigram" else []
    assert document.ids[: len(start)].tolist() == start and document.ids[-1] == 2
    assert tokenizer.decode(document.ids[len(start) : -1]) == prompt + completion
    learnt = document.ids[document.mask]
    assert (tokenizer.decode(document.ids[len(start) : len(document.ids) - len(learnt)]) + completion) == prompt + completion
    # At the border nothing of the prompt changes: generation sees the same ids.
    alone = tokenizer(prompt)["input_ids"]
    assert document.ids[~document.mask].tolist() == (alone[:-1] if kind == "unigram" else alone)


def test_pieces_of_words_continue_after_the_border(folders: dict[str, str], loaded: dict[str, Any]) -> None:
    (document,) = _documents(folders["word_piece"], {"prompt": "play", "completion": "ing"})
    assert loaded["word_piece"].decode(document.ids[1:-1]) == "playing"
    (document,) = _documents(folders["word_piece"], {"prompt": "Two is ", "completion": "four"})
    assert loaded["word_piece"].decode(document.ids[1:-1]) == "two is four"
    assert loaded["word_piece"].decode(document.ids[document.mask][:-1]) == "four"


def test_a_token_across_the_border_that_nothing_follows_is_learnt(folders: dict[str, str]) -> None:
    """A tokenizer that has one token for a whole word it does not know."""
    (document,) = _documents(folders["unigram"], {"prompt": "12", "completion": "345"})
    assert document.ids.tolist()[-1] == 2 and document.mask.tolist()[-2:] == [True, True]
    with pytest.raises(DataError, match="no token to learn"):
        _documents(folders["word_piece"], {"prompt": "Two", "completion": "  "})


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_there_once(folders: dict[str, str], loaded: dict[str, Any], kind: str) -> None:
    """A rendered prompt brings its own: the ids are those of the same text without them."""
    start, tokenizer = "" if kind == "unigram" else "<s>", loaded[kind]
    plain = _documents(folders[kind], {"text": "Two plus two"}, {"text": f"{start}Two plus two</s>"}, {"text": f"{start}Two plus two"})
    counts = [(document.ids.tolist().count(1), document.ids.tolist().count(2)) for document in plain]
    assert counts == [(len(start) // 3, 1)] * 3
    assert plain[1].ids.tolist() == plain[2].ids.tolist()
    answers = [
        {"prompt": "Two is", "completion": " four"},
        {"prompt": f"{start}Two is", "completion": " four</s>"},
    ]
    for document in _documents(folders[kind], *answers):
        assert document.ids.tolist().count(1) == len(start) // 3 and document.ids.tolist().count(2) == 1
        assert document.mask[-1] and tokenizer.decode(document.ids[document.mask]).replace(" </s>", "</s>").strip() == "four</s>"


def test_answers_of_pairs_and_groups_have_them_once_too(folders: dict[str, str]) -> None:
    pair = {"prompt": "<s>Two is", "chosen": " four</s>", "rejected": " five"}
    (document,) = _documents(folders["byte_level"], pair)
    halves = np.split(document.ids, [document.first])
    assert [(half.tolist().count(1), half.tolist().count(2)) for half in halves] == [(1, 1), (1, 1)]
    group = {"prompt": "<s>Two is", "completions": [{"text": " four</s>", "reward": 1}, {"text": " five", "reward": 0}]}
    for document in _documents(folders["byte_level"], group):
        assert (document.ids.tolist().count(1), document.ids.tolist().count(2)) == (1, 1)


def test_a_prompt_is_tokenised_once_for_all_its_answers(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, texts = TokenIds._plain, []
    monkeypatch.setattr(TokenIds, "_plain", lambda ids, text: texts.append(text) or plain(ids, text))
    group = {"prompt": "Two is", "completions": [" four", " five", " kind"], "rewards": [1, 0, 0]}
    together = _documents(folders["byte_level"], group, {**group, "prompt": "Three is"})
    assert (texts.count("Two is"), texts.count("Three is")) == (1, 1)
    alone = [_documents(folders["byte_level"], {"prompt": "Three is", "completion": text})[0] for text in group["completions"]]
    assert [document.ids.tolist() for document in together[3:]] == [document.ids.tolist() for document in alone]


def test_a_prompts_own_end_token_stays(folders: dict[str, str], loaded: dict[str, Any]) -> None:
    """The ids are those that transformers gives for the whole, and the targets those after the prompt's."""
    tokenizer = loaded["byte_level"]
    (document,) = _documents(folders["byte_level"], {"prompt": "Two</s>", "completion": " is four</s>"})
    assert document.ids.tolist() == tokenizer("Two</s> is four</s>")["input_ids"]
    assert int(document.mask.sum()) == len(document.ids) - len(tokenizer("Two</s>")["input_ids"])


def test_an_end_token_before_the_last_line_break_is_an_end(folders: dict[str, str]) -> None:
    for row in ({"text": "Two is four</s>\n"}, {"prompt": "Two", "completion": " is four</s>\n"}):
        (document,) = _documents(folders["byte_level"], row)
        assert document.ids.tolist().count(2) == 1


def test_no_eos_adds_none_and_leaves_what_is_there(folders: dict[str, str]) -> None:
    for kind in ("byte_level", "unigram"):
        one, two = _documents(folders[kind], {"text": "Two is four"}, {"text": "Two is four</s>"}, append_eos=False)
        assert 2 not in one.ids.tolist() and two.ids.tolist() == [*one.ids.tolist(), 2]


def test_texts_of_special_tokens_alone(folders: dict[str, str]) -> None:
    (document,) = _documents(folders["byte_level"], {"text": ""}, {"text": "<s></s>"})
    assert document.ids.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["byte_level", "prepending", "metaspace_first"])
def test_special_tokens_may_be_plain_text(folders: dict[str, str], loaded: dict[str, Any], kind: str) -> None:
    rows = [{"text": "Two </s> is <s>four"}, {"prompt": "<s>Two", "completion": " is</s>"}]
    for row in rows:
        (document,) = _documents(folders[kind], row, special_tokens="text")
        ids = document.ids.tolist()
        assert (ids[0], ids[-1], ids.count(1), ids.count(2)) == (1, 2, 1, 1)
        assert loaded[kind].decode(ids[1:-1]) == "".join(row.values())


def test_what_the_tokenizer_makes_special_all_the_same_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"r0: found '</s>' in plain text, of which this tokenizer makes the special token all the same"):
        _documents(folders["unigram"], {"text": "Two</s> is"}, special_tokens="text")
    with pytest.raises(DataError, match="private-use characters that stand for special tokens"):
        _documents(folders["byte_level"], {"text": "Two \U00108001\U0010fffd\U0010fffd is"}, special_tokens="text")
    (document,) = _documents(folders["word_piece"], {"prompt": "Two i", "completion": "s</s>"}, special_tokens="text")
    assert document.mask.any() and not document.mask.all()
    with pytest.raises(ConfigError, match=r"--date: found 'monday'; expected a date like 2025-01-31"):
        _documents(folders["byte_level"], {"text": "Two is"}, date="monday")
