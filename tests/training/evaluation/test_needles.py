"""Needles as tokens: lengths, where answers begin, what is refused, and what their results are called."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from efflaunch.errors import ConfigError, DataError
from efflaunch.launcher.commands.evaluate import describe
from efflaunch.launcher.rundir.metrics_events import is_sound
from efflaunch.launcher.rundir.progress import evaluation_text
from efflaunch.training.data import builtin
from efflaunch.training.data.config import DataConfig
from efflaunch.training.data.source import IGNORE
from efflaunch.training.data.tokenizer import load_tokenizer
from efflaunch.training.evaluation.best import Best
from efflaunch.training.evaluation.config import EvalConfig, metric_names
from efflaunch.training.evaluation.needle_config import NeedleConfig
from efflaunch.training.evaluation.needle_texts import NeedleTask
from efflaunch.training.evaluation.needles import Cell, NeedleResult, NeedleTally, check_needles, make_needles, needle_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE that puts a token before and one behind each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = "A number of the harbour is 123456. Rain fell on the roofs until the evening. Answer: Question: "
    made.train_from_iterator([text] * 4, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    made.enable_truncation(64)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return str(path)


def config(**fields: object) -> EvalConfig:
    return EvalConfig(name="t", needles=NeedleConfig(**({"lengths": [400, 900], "depths": [0.0, 1.0], "samples": 2} | fields)))


def test_every_text_fits_and_its_answer_counts(tokenizer: str) -> None:
    needles, backend = make_needles(config(), tokenizer, 320), load_tokenizer(tokenizer).backend_tokenizer
    assert needles is not None and len(needles.cells) == 2 * 4 * 2 * 2
    for length, cell in zip(needles.corpus.lengths.tolist(), needles.cells, strict=True):
        assert 0 <= cell.length - length < 70, "about a sentence is missing at most"
    source, seen = needles.source(2000, 320), 0
    for step in range(source.num_steps):
        for index, length in enumerate(source.lengths(step)):
            ids, targets = source.tokens(step, index, 0, length)
            answer = targets[targets != IGNORE]
            assert ids[0] == 0 and (targets[-1] == IGNORE) and (np.append(ids[1:], IGNORE)[-1 - len(answer) : -1] == answer).all()
            text = backend.decode(ids.tolist(), skip_special_tokens=True)
            assert text.endswith(backend.decode(answer.tolist())) and text[: -len(backend.decode(answer.tolist()))].endswith("Answer:")
            seen += 1
    assert seen == len(needles.cells)
    again = make_needles(config(), tokenizer, 320)
    assert again is not None and all((again.corpus.tokens(i, 0, 5) == needles.corpus.tokens(i, 0, 5)).all() for i in range(seen))


def test_what_cannot_be_made(tokenizer: str) -> None:
    assert make_needles(EvalConfig(), None, 10) is None and check_needles(config(), tokenizer, 320) is None
    with pytest.raises(ConfigError, match=r"eval.needles: found no tokenizer"):
        check_needles(config(), None, 320)
    room = r"eval.needles.lengths: found 20; expected room for the needles and the question of one_key: \d+"
    with pytest.raises(ConfigError, match=room) as error:
        check_needles(config(lengths=[20]), tokenizer, 320)
    most = int(str(error.value.hint).partition("[")[2].partition("]")[0])
    assert check_needles(config(lengths=[most], tasks=[NeedleTask.ONE_KEY]), tokenizer, 320) is None
    with pytest.raises(DataError, match=r"token id \d+; expected 0 to 9"):
        check_needles(config(), tokenizer, 10)


def small(folder: Path, kind: str) -> str:
    """A tokenizer that lacks something."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    letters = {character: number for number, character in enumerate("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:? ")}
    words = {"A": 0, "number": 1, "of": 2, ".": 3, "[UNK]": 4}
    if kind == "no digits":
        made = Tokenizer(models.BPE({key: value for key, value in letters.items() if not key.isdigit()}, []))
    elif kind == "no letters":
        made = Tokenizer(models.BPE(letters, []))
        made.normalizer = normalizers.Replace(Regex("[A-Za-z]"), "")
    elif kind == "unigram":
        made = Tokenizer(models.Unigram([("?", 0.0), *((key, -1.0) for key in letters if key not in "?7")], unk_id=0))
    else:
        made = Tokenizer(models.WordLevel(words, unk_token="[UNK]") if kind == "unknown" else models.WordLevel(words, unk_token="none"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("no digits", r"'\d', '\d', "),
        ("no letters", "'R', 'a', 'i', 'n', 'f', ..."),
        ("words", "'Rain', 'fell', 'on', 'the', 'roofs', ..."),
        ("unknown", "'Rain', 'fell', 'on', 'the', 'roofs', ..."),
        ("unigram", "'7'"),
    ],
)
def test_a_tokenizer_that_cannot_write_the_texts_is_refused(tmp_path: Path, kind: str, lost: str) -> None:
    name = small(tmp_path / "small", kind)
    for make in (check_needles, make_needles):
        with pytest.raises(ConfigError, match=rf"eval.needles: found tokenizer .*, which cannot write {lost}"):
            make(config(), name, 320)


def test_no_sample_has_less_room_than_those_that_were_checked(tmp_path: Path) -> None:
    """Texts of one task are of unequal lengths where tokens are characters: places have longer and shorter names."""
    from tokenizers import Tokenizer, models

    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:? "
    Tokenizer(models.BPE({character: number for number, character in enumerate(characters)}, [])).save(str(tmp_path / "tokenizer.json"))
    name, own = str(tmp_path / "tokenizer.json"), {"tasks": [NeedleTask.ONE_KEY], "depths": [0.5]}
    refused = []
    for length in range(90, 120):
        errors = []
        for make in (check_needles, make_needles):
            try:
                make(config(lengths=[length], samples=12, **own), name, 320)
            except ConfigError as error:
                errors.append(str(error))
        assert len(errors) != 1 and len(set(errors)) < 2, length
        first_fits = True
        try:
            make_needles(config(lengths=[length], samples=1, **own), name, 320)
        except ConfigError:
            first_fits = False
        refused += [length] * (bool(errors) and first_fits)
    assert refused, "where the first sample has room and another has not"


def test_the_tokenizer_is_the_one_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "builtin_corpus", lambda name, **_: builtin.BuiltinCorpus("corpus", f"tokenizer of {name}"))
    own = DataConfig(name="t", max_seq_len=1024, global_batch_tokens=1024, builtin="python_stdlib", vocab_size=300)
    assert needle_tokenizer(config(), own) == "tokenizer of python_stdlib" and needle_tokenizer(EvalConfig(), own) is None
    assert needle_tokenizer(config(), replace(own, tokenizer="mine")) == "mine"
    assert needle_tokenizer(config(), replace(own, builtin=None)) is None


def result() -> NeedleResult:
    """Two texts of 400 tokens, one of them answered; one of 900 at which one token of two is the likeliest."""
    tally = NeedleTally(3)
    tally.add(np.array([0, 0, 1, 2, 2]), np.array([-0.5, -0.5, -4.0, -1.0, -2.0]), np.array([1, 1, 0, 1, 0]))
    cells = tuple(Cell(NeedleTask.ONE_KEY, length, 0.5) for length in (400, 400, 900))
    return NeedleResult(cells, NeedleTally(3).load(tally.vector()), 1700)


def test_results_have_their_names() -> None:
    fields = result().fields()
    assert fields["metrics"] == {
        "eval/needles/loss": 8 / 5, "eval/needles/exact": 1 / 3, "eval/needles/loss_400": 5 / 3, "eval/needles/loss_900": 1.5,
        "eval/needles/exact_400": 0.5, "eval/needles/exact_900": 0.0,
    }  # fmt: skip
    assert list(fields["metrics"]) == metric_names(config(), 1000)
    assert fields["needles"] == [
        {"task": "one_key", "length": 400, "depth": 0.5, "samples": 2, "exact": 0.5, "log_prob": -2.5},
        {"task": "one_key", "length": 900, "depth": 0.5, "samples": 1, "exact": 0.0, "log_prob": -3.0},
    ]
    event = json.loads(json.dumps({"event": "eval", "step": 3, **fields}))
    assert is_sound(event) and not is_sound(event | {"needles": [{"task": 1}]})
    assert evaluation_text(event) == "needles 1.6000 (400 1.6667, 900 1.5000), 33.3% exact"
    assert "  one_key          400  exact: 50% at 0.5" in describe({"place": "x", "step": 3, "corpora": [event]})


def test_more_exact_answers_are_better() -> None:
    metric = "eval/needles/exact_900"
    assert Best(metric, 0.5, 1).add(2, {metric: 0.7}) == Best(metric, 0.7, 2) and Best(metric, 0.5, 1).add(2, {metric: 0.3}).worse == 1
