"""`efflaunch data prepare`: documents to an indexed corpus. Resumable, atomic, the same bytes whatever happened on the way.

Beside the output lie, until it is whole: PREFIX.*.part (the corpus so far) and PREFIX.prepare.json (how far it got).
The final names appear at the end, the .idx last.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, UserError
from ...utils.atomic_files import write_atomic
from .encode import Encoded, EncodeOptions, Encoder, other_kind
from .indexed import dtype_for, read_metadata
from .inputs import Cursor, Format, Input, find_inputs, read_batches
from .tokenizer import read_vocabulary
from .workers import encode_all
from .writer import FINAL_SUFFIXES, IndexedWriter, WriterState, discard, document_lengths, publish

_MAX_REASONS = 100
_BYTES_PER_WORKER = 8 << 20
"""Below this much input another process costs more than it saves."""


@dataclass(frozen=True, slots=True)
class PrepareRequest:
    """What the command line asks for."""

    inputs: list[str]
    out: str
    encode: EncodeOptions
    format: Format = Format.AUTO
    num_workers: int | None = None
    """None: one per usable core, fewer for small inputs."""
    restart: bool = False
    """Throw away an unfinished earlier attempt."""
    commit_every_s: float = 5.0
    """Most work a kill can cost."""


@dataclass(frozen=True, slots=True)
class PrepareProgress:
    """Progress of the work; bytes are of the inputs. What an earlier attempt did is in `resumed_*`."""

    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    resumed_tokens: int
    documents: int
    tokens: int
    elapsed_s: float


@dataclass(slots=True)
class _State:
    """How far the work got, as written to PREFIX.prepare.json."""

    identity: dict[str, str]
    """Hashes of what the output depends on, by what a person would call it."""
    sealed: bool = False
    cursor: Cursor = field(default_factory=Cursor)
    writer: WriterState = field(default_factory=WriterState)
    done_bytes: int = 0
    skipped: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: dict[str, dict[str, Any]] = field(default_factory=dict)
    turn_ends: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        write_atomic(path, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> _State:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**raw, "cursor": Cursor(**raw["cursor"]), "writer": WriterState(**raw["writer"])})

    def note(self, encoded: Encoded) -> None:
        """Count what was left out, what is doubtful and how turns end."""
        for counts, entries in ((self.skipped, encoded.skipped), (self.warnings, encoded.warnings)):
            for reason, where in entries:
                # Reasons may hold what is in the record: there could be as many as records.
                reason = reason if reason in counts or len(counts) < _MAX_REASONS else "other reasons"
                counts.setdefault(reason, {"count": 0, "first": where})["count"] += 1
        self.turn_ends = sorted({*self.turn_ends, *encoded.turn_ends})


def prepare(request: PrepareRequest, report: Callable[[PrepareProgress], None]) -> dict[str, Any]:
    """Do the work, or resume it, and return what PREFIX.json says. `report` is called after each batch.

    DataError for inputs that cannot be used, for an output that is already something else, and for an unfinished
    attempt whose inputs, tokenizer or options were others.
    """
    inputs = find_inputs(request.inputs, request.format)
    encoder = Encoder(request.encode)
    identity = _identity(request, inputs, encoder)
    finished = _finished(request.out, _fingerprint(identity))
    if finished is not None:
        return finished
    state_path = Path(request.out + ".prepare.json")
    state = _resumed(request, state_path, identity) or _started(request.out, state_path, identity)
    if not state.sealed:
        with closing(IndexedWriter(request.out, dtype_for(encoder.vocab_size), resume=state.writer)) as writer:
            attempt = _Attempt(request, inputs, writer, state, state_path)
            attempt.write_or_leave_nothing(report)
            writer.seal(_metadata(attempt, encoder))
            state.sealed = True
            state.save(state_path)
            publish(request.out)
    publish(request.out)
    state_path.unlink(missing_ok=True)
    return read_metadata(request.out) or {}


@dataclass(slots=True)
class _Attempt:
    """The writing of one corpus, from where the state stands to the last document."""

    request: PrepareRequest
    inputs: list[Input]
    writer: IndexedWriter
    state: _State
    state_path: Path

    def write_or_leave_nothing(self, report: Callable[[PrepareProgress], None]) -> None:
        try:
            self.write(report)
        except UserError:
            # What was saved may go on with --skip-bad; where nothing was, the mended input must not look like a change.
            if self.state.writer.documents == 0:
                discard(self.request.out)
                self.state_path.unlink()
            raise

    def write(self, report: Callable[[PrepareProgress], None]) -> None:
        request, state, writer = self.request, self.state, self.writer
        total = sum(entry.size_bytes for entry in self.inputs)
        resumed, resumed_tokens = state.done_bytes, state.writer.tokens
        started = committed = time.monotonic()
        batches = read_batches(self.inputs, request.encode.text_field, state.cursor)
        for batch, encoded in encode_all(batches, request.encode, _num_workers(request, total - resumed)):
            for document in encoded.documents:
                if writer.documents and document.kind is not writer.kind:
                    raise other_kind(encoded.first, document.kind, writer.kind)
                writer.add_document(document)
            state.note(encoded)
            state.cursor, state.done_bytes = batch.after, batch.done_bytes
            if time.monotonic() - committed >= request.commit_every_s:
                self.commit()
                committed = time.monotonic()
            elapsed_s = time.monotonic() - started
            report(PrepareProgress(batch.done_bytes, total, resumed, resumed_tokens, writer.documents, writer.tokens, elapsed_s))
        self.commit()
        if writer.documents == 0:
            raise DataError(
                f"corpus {request.out}",
                found=f"no document to train on in {len(self.inputs)} inputs ({_skipped_text(state)})",
                expected="at least one of two tokens or more",
                hint="check the inputs and --text-field",
            )

    def commit(self) -> None:
        self.state.writer = self.writer.commit()
        self.state.save(self.state_path)


def _num_workers(request: PrepareRequest, num_bytes: int) -> int:
    if request.num_workers is not None:
        return request.num_workers
    return max(1, min(len(os.sched_getaffinity(0)), num_bytes // _BYTES_PER_WORKER))


def _identity(request: PrepareRequest, inputs: list[Input], encoder: Encoder) -> dict[str, str]:
    # Not skip_bad: with it, an attempt that stopped at a bad record can go on.
    options = {**asdict(request.encode), "tokenizer": None, "chat_template": None, "skip_bad": None}
    if not request.encode.reward_weights:
        # As versions that knew of none had it.
        del options["reward_weights"]
    parts = {
        "the inputs": "\n".join(map(repr, inputs)),
        "the tokenizer": encoder.identity(),
        "the options": json.dumps(options, sort_keys=True),
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}


def _fingerprint(identity: dict[str, str]) -> str:
    return hashlib.sha256("".join(identity.values()).encode()).hexdigest()


def _finished(out: str, fingerprint: str) -> dict[str, Any] | None:
    """What PREFIX.json says if this very work is already done; DataError if the place is taken by something else."""
    there = [out + suffix for suffix in FINAL_SUFFIXES if os.path.exists(out + suffix)]
    if not there or os.path.exists(out + ".prepare.json"):
        return None
    metadata = read_metadata(out) or {}
    if metadata.get("fingerprint") == fingerprint and os.path.exists(out + ".idx"):
        return metadata
    raise DataError(
        f"output {there[0]}",
        found="a file of another corpus, or of other inputs, tokenizer or options",
        expected="nothing there yet",
        hint="another --out, or remove it first",
    )


def _started(out: str, state_path: Path, identity: dict[str, str]) -> _State:
    state_path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in FINAL_SUFFIXES:
        # Only an attempt killed while it gave names, and now restarted, leaves any: _finished refuses all others.
        Path(out + suffix).unlink(missing_ok=True)
    state = _State(identity)
    state.save(state_path)
    return state


def _resumed(request: PrepareRequest, state_path: Path, identity: dict[str, str]) -> _State | None:
    if request.restart or not state_path.exists():
        return None
    state = _State.load(state_path)
    changed = " and ".join(name for name, value in identity.items() if state.identity.get(name) != value)
    if not changed:
        return state
    raise DataError(
        f"unfinished corpus {request.out}",
        found=f"that {changed} changed since it was started",
        expected="the same inputs, tokenizer and options, so that the result is one corpus",
        hint="undo the change, or throw away what was done: the same command with --restart",
    )


def _metadata(attempt: _Attempt, encoder: Encoder) -> dict[str, Any]:
    request, inputs, writer, state = attempt.request, attempt.inputs, attempt.writer, attempt.state
    vocabulary = read_vocabulary(request.encode.tokenizer)
    lengths = document_lengths(request.out, writer.documents, writer.items)
    quantiles = np.percentile(lengths, [0, 50, 90, 99, 100], method="nearest").astype(int).tolist()
    return {
        "kind": writer.kind.value,
        "documents": writer.documents,
        "tokens": writer.tokens,
        "loss_mask": state.writer.has_mask,
        "loss_tokens": writer.loss_tokens,
        "lengths": dict(zip(("min", "p50", "p90", "p99", "max"), quantiles, strict=True)),
        "skipped": state.skipped,
        "inputs": {"files": len(inputs), "bytes": sum(entry.size_bytes for entry in inputs)},
        "tokenizer": {
            "path": os.path.abspath(request.encode.tokenizer) if os.path.exists(request.encode.tokenizer) else request.encode.tokenizer,
            "vocab_size": max(encoder.vocab_size, vocabulary.size),
            "vocab_sha256": vocabulary.sha256,
            "eos_token": encoder.eos_token,
        },
        "chat_template": encoder.chat_template,
        "end_of_turn": state.turn_ends[0] if len(state.turn_ends) == 1 else None,
        "date": str(request.encode.date) if encoder.template_uses_date else None,
        "special_tokens": request.encode.special_tokens,
        "turns": request.encode.turns,
        "warnings": state.warnings,
        "fingerprint": _fingerprint(state.identity),
    }


def _skipped_text(state: _State) -> str:
    return ", ".join(f"{entry['count']} skipped: {reason}" for reason, entry in state.skipped.items()) or "none skipped"
