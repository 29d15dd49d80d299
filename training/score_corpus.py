"""Scores the corpora's answers under a run's initial weights before the first step, where an objective needs that.

One pass over every document, forward alone, in the order of the corpora, with the same sequence groups as training. Rank 0
collects and writes; a stop or a crash costs what came after the last commit. Files appear under their names once all is done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..model.chunked_loss import chunked_log_probs
from ..parallel.sequence.plan import StepPlan
from ..utils.atomic_files import sync, write_atomic
from ..utils.decode import decode, set_aside
from .data.indexed import Kind
from .data.scores import corpus_digest, run_scores, score_shape, write_origins
from .data.source import DataSource
from .forward_only import forward_only
from .micro_batches import MicroBatchWork, read_step
from .run_settings import Stop
from .session import Session

COMMIT_EVERY_S = 5.0
STATE = "progress.json"
log = logging.getLogger(__name__)
ScoredTokens = tuple[int, int, np.ndarray]
"""Scores as (corpus, first number in its file, values to put or add there)."""


def fill_scores(
    session: Session,
    run_dir: Path,
    missing: list[int],
    weights: str,
    plan: Callable[[tuple[int, ...]], StepPlan],
    *,
    stop: Stop,
    report: Callable[..., None],
) -> bool:
    """Score the corpora `missing` (by index) into RUN_DIR/scores; False where a stop was requested before the end.

    `weights`: a name of the weights the model has now; an unfinished attempt with others, or other documents, is begun anew.
    `plan`: from the lengths of some sequences to who computes which. `report` is called with how far it is. Collective over all ranks.
    """
    rows, world = np.flatnonzero(np.isin(session.source.table.corpus, missing)), session.topology
    store = _Store(session.source, run_dir, missing, weights) if world.rank == 0 else None
    first = torch.tensor(store.rows_done if store is not None else 0, device=session.device)
    dist.broadcast(first, 0, group=world.world)
    done, total = int(first), int(session.source.table.lengths_of(rows).sum())
    tokens_done, source = int(session.source.table.lengths_of(rows[:done]).sum()), session.source.in_order(rows[done:])
    begun = time.monotonic()
    for step in range(source.sampler.num_steps):  # type: ignore[union-attr]
        lengths = source.lengths(step)
        scored = _score_step(session, source, step, plan(lengths))
        gathered: list[Any] | None = [None] * world.world_size if store is not None else None
        dist.gather_object(scored, gathered, dst=0, group=world.world)
        done, tokens_done = done + len(lengths), tokens_done + sum(lengths)
        if store is not None and gathered is not None:
            store.add([piece for pieces in gathered for piece in pieces], done)
            if store.is_due or done == len(rows):
                store.commit()
                report("score", done_tokens=tokens_done, total_tokens=total, elapsed_s=time.monotonic() - begun)
        if _any_rank(stop.requested, session) and done < len(rows):
            if store is not None:
                store.commit()
            return False
    if store is not None:
        store.finish()
    dist.barrier(group=world.world)
    return True


def _any_rank(flag: bool, session: Session) -> bool:
    flags = torch.tensor(int(flag), device=session.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=session.topology.world)
    return bool(flags)


def _score_step(session: Session, source: DataSource, step: int, plan: StepPlan) -> list[ScoredTokens]:
    """This rank's part of the sequences of a step."""
    scored: list[ScoredTokens] = []
    works = read_step(source, step, plan, session.topology.stage_rank, shares_experts=session.topology.shares_experts)
    for work, values in forward_only(session.step_setup, works, lambda work: chunked_log_probs):
        scored += _pieces(source, step, work, values.double().cpu().numpy())
    return scored


def _pieces(source: DataSource, step: int, work: MicroBatchWork, values: np.ndarray) -> Iterator[ScoredTokens]:
    """Cut `values` (T,), the log-probability of each row's target, into pieces of sequences."""
    row = 0
    for piece in work.shard.slices:
        part, mine = work.shard.parts[piece.sequence], values[row : row + len(piece)]
        row += len(piece)
        sequence = source.sequence(step, part.sequence)
        corpus = source.corpora[sequence.corpus]
        if corpus.kind is Kind.PAIRS:
            yield sequence.corpus, 2 * sequence.document + part.number, mine.sum(keepdims=True)
            continue
        end = int(corpus.lengths[sequence.document])
        span = corpus.span(sequence.document, min(piece.start + 1, end), min(piece.stop + 1, end))
        if piece.start == 0:
            # The first token of a document is nobody's target.
            yield sequence.corpus, span.start - 1, np.zeros(1)
        yield sequence.corpus, span.start, mine[: span.stop - span.start]


@dataclass(frozen=True, slots=True)
class _Progress:
    """What progress.json holds."""

    identity: str
    rows_done: int


class _Store:
    """The files while they grow, on rank 0."""

    def __init__(self, source: DataSource, run_dir: Path, missing: list[int], weights: str) -> None:
        self._run_dir, self._state, self._identity = run_dir, run_dir / "scores" / STATE, _identity(source, missing, weights)
        self._origins = {
            run_scores(run_dir, index, corpus).name: {"corpus": corpus_digest(corpus), "weights": weights}
            for index, corpus in enumerate(source.corpora)
            if index in missing
        }
        self._state.parent.mkdir(parents=True, exist_ok=True)
        self._corpora = source.corpora
        self._paths = {index: run_scores(run_dir, index, source.corpora[index]) for index in missing}
        self.rows_done, self._committed = self._resumed(), time.monotonic()
        self._arrays = {index: self._open(path, *score_shape(source.corpora[index])) for index, path in self._paths.items()}

    def _resumed(self) -> int:
        if not self._state.exists():
            return 0
        try:
            kept = decode(_Progress, json.loads(self._state.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            log.warning("%s", set_aside(self._state, error))
            return 0
        if kept.identity != self._identity or kept.rows_done < 0 or not all(self._is_whole(index) for index in self._paths):
            return 0
        return kept.rows_done

    def _is_whole(self, index: int) -> bool:
        """Whether the unfinished file of a corpus has its length."""
        dtype, count = score_shape(self._corpora[index])
        part = _part(self._paths[index])
        return part.is_file() and part.stat().st_size == count * dtype.itemsize

    def _open(self, path: Path, dtype: np.dtype[Any], count: int) -> np.memmap[Any, Any]:
        array = np.memmap(_part(path), dtype=dtype, mode="r+" if self.rows_done else "w+", shape=(count,))
        if not self.rows_done:
            # Documents that this run leaves out stay so: they must not be taken for scored ones.
            array[:] = np.nan
        return array

    def add(self, scored: list[ScoredTokens], rows_done: int) -> None:
        """Add some whole sequences: sums of pairs in parts, one per slice; tokens once. Adding the same again changes nothing."""
        whole: dict[tuple[int, int, int], np.ndarray] = {}
        for corpus, first, values in scored:
            key = corpus, first, len(values)
            whole[key] = whole[key] + values if key in whole else values
        for (corpus, first, length), values in whole.items():
            self._arrays[corpus][first : first + length] = values
        self.rows_done = rows_done

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._committed >= COMMIT_EVERY_S

    def commit(self) -> None:
        for array in self._arrays.values():
            array.flush()
        write_atomic(self._state, json.dumps({"identity": self._identity, "rows_done": self.rows_done}))
        self._committed = time.monotonic()

    def finish(self) -> None:
        self.commit()
        # First: what is neither unfinished nor of known origin is done again.
        self._state.unlink()
        for path in self._paths.values():
            _part(path).replace(path)
        sync(self._state.parent)
        write_origins(self._run_dir, self._origins)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _identity(source: DataSource, missing: list[int], weights: str) -> str:
    """A digest that changes with the weights, the corpora scored and the documents trained on."""
    digest = hashlib.sha256(repr([weights, *((index, corpus_digest(source.corpora[index])) for index in missing)]).encode())
    for column in (source.table.corpus, source.table.document):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()
