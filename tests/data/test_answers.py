"""Pairs and rewarded completions: from records to corpora, what a run reads of them, and what bad ones are called."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efflaunch.errors import DataError
from efflaunch.parallel.sequence.solve import solve_static
from efflaunch.training.config import Objective, TrainConfig
from efflaunch.training.data.answers import advantages
from efflaunch.training.data.builtin import train_tokenizer
from efflaunch.training.data.config import DataConfig, LongDocuments
from efflaunch.training.data.encode import EncodeOptions
from efflaunch.training.data.indexed import IndexedCorpus, Kind
from efflaunch.training.data.prepare import PrepareRequest, prepare
from efflaunch.training.data.scores import Scores, corpus_digest, run_scores, write_origins
from efflaunch.training.data.shard import build_shard
from efflaunch.training.data.source import DataSource, open_data

PAIRS = [
    {"prompt": "Two plus two?", "chosen": " Four.", "rejected": " I think it is five."},
    {"prompt": "", "chosen": "Be kind.", "rejected": "Be"},
    {"prompt": "And three?", "chosen": " Three is three.", "rejected": " Two."},
]
GROUPS = [
    {"prompt": "Two plus two?", "completions": [{"text": " Four.", "reward": 1}, {"text": " Five is more.", "reward": 0.0}]},
    {"prompt": "Kind?", "completions": [{"text": f" {word}", "reward": 2} for word in ("is", "be", "and")]},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tok") / "tokenizer"
    train_tokenizer(["Two plus two is four and three is five, be kind and use assistant words."] * 3, 320, folder)
    return str(folder)


def made(rows: list[Any], tokenizer: str, folder: Path, **options: Any) -> dict[str, Any]:
    """What `data prepare` makes of JSON lines, at folder/c."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = PrepareRequest([str(path)], str(folder / "c"), EncodeOptions(tokenizer, **options))
    return prepare(request, lambda progress: None)


def opened(folder: Path, objective: Objective, **changes: Any) -> DataSource:
    config = DataConfig(name="t", prefixes=[str(folder / "c")], max_seq_len=100, global_batch_tokens=1000)
    return open_data(replace(config, **changes), 0, 400, objective)


def decode(tokenizer: str, ids: np.ndarray) -> str:
    from tokenizers import Tokenizer

    return str(Tokenizer.from_file(tokenizer + "/tokenizer.json").decode(ids.tolist(), skip_special_tokens=False))


def test_a_pair_is_two_items_whose_answers_are_learnt(tokenizer: str, tmp_path: Path) -> None:
    metadata = made(PAIRS, tokenizer, tmp_path)
    corpus = IndexedCorpus(str(tmp_path / "c"))
    assert metadata["kind"] == "pairs" and metadata["documents"] == corpus.num_documents == 3
    assert metadata["lengths"]["max"] == corpus.lengths.max() and metadata["tokens"] == corpus.num_tokens
    for index, row in enumerate(PAIRS):
        first, second = corpus.parts(index)
        for name, start, stop in (("chosen", 0, first), ("rejected", first, first + second)):
            ids, mask = corpus.tokens(index, start, stop), corpus.mask(index, start, stop)
            assert mask is not None and decode(tokenizer, ids) == row["prompt"] + row[name] + "<|endoftext|>"
            assert not mask[0], "nothing is before it"
            learnt = decode(tokenizer, ids[mask])
            assert learnt == row[name] + "<|endoftext|>" if row["prompt"] else learnt in (row[name] + "<|endoftext|>")[1:]


def test_completions_are_documents_with_advantages(tokenizer: str, tmp_path: Path) -> None:
    metadata = made(GROUPS, tokenizer, tmp_path)
    corpus = IndexedCorpus(str(tmp_path / "c"))
    assert metadata["kind"] == "completions" and corpus.num_documents == 5 and corpus.kind is Kind.COMPLETIONS
    each = math.sqrt(0.5) * math.sqrt(2) / 2 / (math.sqrt(0.5) + 1e-4)
    assert [corpus.advantage(index) for index in range(5)] == pytest.approx([each, -each, 0, 0, 0])
    assert np.fromfile(tmp_path / "c.scalars.bin")[::2].tolist() == [1, 0, 2, 2, 2]
    assert decode(tokenizer, corpus.tokens(1, 0, int(corpus.lengths[1]))) == "Two plus two? Five is more.<|endoftext|>"


def test_advantages() -> None:
    assert advantages([3.0, 1.0, 2.0]) == pytest.approx([1 / 1.0001, -1 / 1.0001, 0])
    assert advantages([0.5, 0.5]) == [0, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"rows.jsonl line 2: found nothing in 'rejected'; expected 'prompt', 'chosen' and 'rejected'"),
        ({"prompt": "a", "rejected": "b"}, r"line 2: found nothing in 'chosen'"),
        ({"chosen": "a", "rejected": "b"}, r"line 2: found nothing in 'prompt'"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, r"line 2: found 'chosen' that are no conversation"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, r"line 2: found no token to learn in 'rejected'"),
        (
            {"prompt": "a", "completions": [{"text": "b", "reward": 1}]},
            r"line 2: found 1 of them in 'completions'; .* two or more",
        ),
        ({"prompt": "a", "completions": "b"}, r"line 2: found a str in 'completions'"),
        ({"prompt": "a", "completions": [{"text": "b", "reward": 1}, {"text": "c"}]}, r"line 2 completion 2: found no reward"),
        ({"prompt": "a", "completions": [{"text": "b", "reward": "x"}] * 2}, r"line 2 completion 1: found 'x' in 'reward'"),
        ({"prompt": "a", "completions": [{"text": "b", "reward": float("nan")}] * 2}, r"completion 1: found nan in 'reward'"),
        ({"prompt": "a", "completions": [{"text": 7, "reward": 1}] * 2}, r"completion 1: found an int in 'text'"),
        ({"prompt": "a", "completions": [], "chosen": "b"}, r"line 2: found 'completions' beside 'chosen' or 'rejected'"),
        ({"text": "Two plus two is four."}, r"line 2: found documents after pairs; expected records of one kind"),
        (GROUPS[0], r"line 2: found completions after pairs"),
    ],
)
def test_bad_records_name_file_and_line(tokenizer: str, tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made([PAIRS[0], row, PAIRS[2]], tokenizer, tmp_path)
    assert made([PAIRS[0], row, PAIRS[2]], tokenizer, tmp_path, skip_bad=True)["documents"] == 2


def test_kinds_do_not_mix_across_batches(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 601: found completions after pairs"):
        made([PAIRS[0]] * 600 + [GROUPS[0]], tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("rows", "objective", "message"),
    [
        (PAIRS, Objective.LANGUAGE_MODELLING, "found pairs; expected documents, for train.objective=lang.*\n.*train.objective=dpo"),
        (PAIRS, Objective.GRPO, "found pairs; expected completions"),
        (GROUPS, Objective.DPO, "found completions; expected pairs.*\n.*train.objective=grpo"),
        ([{"text": "Two plus two"}], Objective.DPO, "found documents; expected pairs"),
    ],
)  # fmt: skip
def test_a_corpus_of_another_kind_is_refused(tokenizer: str, tmp_path: Path, rows: Any, objective: Objective, message: str) -> None:
    made(rows, tokenizer, tmp_path)
    with pytest.raises(DataError, match=message):
        opened(tmp_path, objective)


def test_pairs_are_never_split(tokenizer: str, tmp_path: Path) -> None:
    made(PAIRS, tokenizer, tmp_path)
    lengths = IndexedCorpus(str(tmp_path / "c")).lengths
    longest = int(lengths.max())
    with pytest.raises(
        DataError, match=rf"document 0: found {longest} tokens; .*\n.*data.max_seq_len={longest}, or data.long_documents=drop"
    ):
        opened(tmp_path, Objective.DPO, max_seq_len=longest - 1)
    kept = opened(tmp_path, Objective.DPO, max_seq_len=longest - 1, long_documents=LongDocuments.DROP)
    assert sorted(kept.table.document.tolist()) == [index for index in range(3) if lengths[index] < longest]


@pytest.mark.parametrize(("degree", "ulysses"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_shards_hold_both_halves_with_positions_of_their_own(tokenizer: str, tmp_path: Path, degree: int, ulysses: int) -> None:
    made(PAIRS, tokenizer, tmp_path)
    source = opened(tmp_path, Objective.DPO, global_batch_tokens=100)
    lengths = source.lengths(0)
    plan = solve_static(lengths, world_size=degree, degree=degree, ulysses=ulysses, tokens_per_rank=200, linear_cost_tokens=100)
    held: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for index in range(len(plan.micro_batches)):
        for rank in range(degree):
            shard, layout = build_shard(source, 0, plan, index, rank)
            assert layout is not None and layout.lengths == tuple(part.length for part in shard.parts)
            row = 0
            for piece in shard.slices:
                part = shard.parts[piece.sequence]
                rows = slice(row, row + len(piece))
                assert shard.position_ids[rows].tolist() == list(range(piece.start, piece.stop))
                values = zip(shard.position_ids[rows], shard.token_ids[rows], shard.target_ids[rows], strict=True)
                held.setdefault((part.sequence, part.number), []).extend((int(p), int(t), int(y)) for p, t, y in values)
                row += len(piece)
    assert len(held) == 2 * len(lengths)
    total = 0
    for (sequence, number), rows in held.items():
        document = source.sequence(0, sequence).document
        corpus, offset = source.corpora[0], 0 if number == 0 else source.parts(0, sequence)[0]
        length = source.parts(0, sequence)[number]
        ids, mask = corpus.tokens(document, offset, offset + length), corpus.mask(document, offset, offset + length)
        assert mask is not None
        targets = [int(t) if m else -100 for t, m in zip(ids[1:], mask[1:], strict=True)] + [-100]
        assert sorted(rows) == list(zip(range(length), ids.tolist(), targets, strict=True))
        total += sum(target != -100 for target in targets)
    assert total == source.num_target_tokens(0)


def _train(objective: Objective, **changes: Any) -> TrainConfig:
    return TrainConfig(steps=1, objective=objective, **changes)


def test_pair_scores_come_from_beside_the_corpus_first(tokenizer: str, tmp_path: Path) -> None:
    made(PAIRS, tokenizer, tmp_path)
    source, run = opened(tmp_path, Objective.DPO), tmp_path / "run"
    assert Scores(source, run, _train(Objective.DPO), "w").missing == [0]
    path = run_scores(run, 0, source.corpora[0])
    path.parent.mkdir(parents=True)
    np.arange(6.0).tofile(path)
    assert Scores(source, run, _train(Objective.DPO), "w").missing == [0], "of unknown origin"
    write_origins(run, {path.name: {"corpus": corpus_digest(source.corpora[0]), "weights": "w"}})
    assert Scores(source, run, _train(Objective.DPO), "other").missing == [0], "of other initial weights"
    assert Scores(source, run, _train(Objective.DPO), None).missing == []
    scores = Scores(source, run, _train(Objective.DPO), "w")
    for index in range(3):
        document = source.sequence(0, index).document
        assert scores.pair(0, index).tolist() == [2 * document, 2 * document + 1]
    np.full(6, -1.0).tofile(tmp_path / "c.ref.bin")
    assert Scores(source, run, _train(Objective.DPO), "w").pair(0, 0).tolist() == [-1, -1]


def test_completion_scores_are_of_the_next_token(tokenizer: str, tmp_path: Path) -> None:
    made(GROUPS, tokenizer, tmp_path)
    source = opened(tmp_path, Objective.GRPO)
    corpus = source.corpora[0]
    np.arange(corpus.num_tokens, dtype=np.float32).tofile(tmp_path / "c.old.bin")
    plain = Scores(source, tmp_path / "run", _train(Objective.GRPO), "w")
    assert plain.missing == [] and not plain.has_reference
    assert Scores(source, tmp_path / "run", _train(Objective.GRPO, grpo_kl_weight=0.1), "w").missing == [0]
    np.arange(corpus.num_tokens, dtype=np.float32)[::-1].tofile(tmp_path / "c.ref.bin")
    scores = Scores(source, tmp_path / "run", _train(Objective.GRPO, grpo_kl_weight=0.1), "w")
    for index in range(5):
        document = source.sequence(0, index).document
        length, start = int(corpus.lengths[document]), int(corpus.lengths[:document].sum())
        advantage, old, reference = scores.completion(0, index, 1, length)
        assert advantage == corpus.advantage(document) and reference is not None
        assert old.tolist() == [*range(start + 2, start + length), 0]
        assert reference.tolist() == [*(corpus.num_tokens - 1 - i for i in range(start + 2, start + length)), 0]
        assert plain.completion(0, index, 0, 2)[1].tolist() == [start + 1, start + 2]
        assert plain.completion(0, index, length - 1, length)[1].tolist() == [0]


def test_documents_left_out_when_scored_are_named(tokenizer: str, tmp_path: Path) -> None:
    made(PAIRS, tokenizer, tmp_path)
    source = opened(tmp_path, Objective.DPO)
    np.full(6, np.nan).tofile(tmp_path / "c.ref.bin")
    with pytest.raises(DataError, match=r"corpus .*c document \d tokens 0-\d+: found no log-probabilities"):
        Scores(source, tmp_path, _train(Objective.DPO), "w").pair(0, 0)


@pytest.mark.parametrize(("rows", "name", "objective"), [(PAIRS, "ref", Objective.DPO), (GROUPS, "old", Objective.GRPO)])
def test_a_companion_of_another_length_is_named(tokenizer: str, tmp_path: Path, rows: Any, name: str, objective: Objective) -> None:
    made(rows, tokenizer, tmp_path)
    np.zeros(3, dtype=np.float32).tofile(tmp_path / f"c.{name}.bin")
    with pytest.raises(DataError, match=rf"corpus file .*c\.{name}\.bin: found 12 bytes; expected \d+ bytes: .* numbers of"):
        Scores(opened(tmp_path, objective), tmp_path, _train(objective), "w")


@pytest.mark.parametrize(
    ("suffix", "message"), [(".scalars.bin", "reward and advantage of each document"), (".idx", "documents that are not two items each")]
)
def test_damaged_companions_of_the_corpus_are_named(tokenizer: str, tmp_path: Path, suffix: str, message: str) -> None:
    made(GROUPS, tokenizer, tmp_path)
    if suffix == ".idx":
        metadata = json.loads((tmp_path / "c.json").read_text())
        (tmp_path / "c.json").write_text(json.dumps({**metadata, "kind": "pairs"}))
    else:
        (tmp_path / "c.scalars.bin").write_bytes(b"0" * 8)
    with pytest.raises(DataError, match=message):
        IndexedCorpus(str(tmp_path / "c"))
