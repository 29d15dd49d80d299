"""Scoring before the first step, on real gloo ranks: the log-probabilities of a plain Hugging Face model, stopped anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from efflaunch.model.build import build_model
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sequence.solve import solve_static
from efflaunch.parallel.sharding.parts import write_shard
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.parity import objective_reference
from efflaunch.tests.parity.ranks_side import POLICIES
from efflaunch.tests.parity.reference import BASE, hf_config, lift_to_float64, reference_model
from efflaunch.tests.ranks import RankPool
from efflaunch.training.config import Objective
from efflaunch.training.data.answers import Document
from efflaunch.training.data.config import DataConfig, LongDocuments
from efflaunch.training.data.indexed import IndexedCorpus, Kind
from efflaunch.training.data.source import open_data
from efflaunch.training.data.writer import IndexedWriter
from efflaunch.training.score_corpus import fill_scores
from efflaunch.training.step_setup import StepSetup

PAIRS = ((4, 9, 3), (2, 30, 11), (6, 5, 5), (3, 60, 61), (1, 8, 8))
"""(prompt, chosen, rejected); the fourth is too long and left out."""


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def write(prefix: Path, kind: Kind) -> str:
    generator, writer = np.random.default_rng(5), IndexedWriter(str(prefix), "uint16")
    for prompt, *answers in PAIRS:
        halves = [generator.integers(0, BASE["vocab_size"], prompt + answer) for answer in answers]
        masks = [np.arange(len(half)) >= prompt for half in halves]
        if kind is Kind.PAIRS:
            writer.add_document(Document(np.concatenate(halves), np.concatenate(masks), kind, first=len(halves[0])))
        else:
            for half, mask in zip(halves, masks, strict=True):
                writer.add_document(Document(half, mask, kind))
    writer.finish({"kind": kind.value, "loss_mask": True})
    return str(prefix)


def _open(prefixes, objective):
    config = DataConfig(
        name="t", prefixes=prefixes, max_seq_len=64, global_batch_tokens=64, long_documents=LongDocuments.DROP
    )  # fmt: skip
    return open_data(config, 0, BASE["vocab_size"], objective)


class StopAt:
    """Asked after every step of scoring."""

    def __init__(self, step):
        self.left = step

    @property
    def requested(self):
        self.left -= 1
        return self.left == 0


def _score(prefixes, objective, weights, run_dir, ulysses, stop_at, name="w"):
    """(whether it came to the end, what was reported)."""
    torch.set_num_threads(1)
    lift_to_float64()
    ranks, device = dist.get_world_size(), torch.device("cpu")
    topology = build_topology(replicate=1, device="cpu")
    model = build_model(
        hf_config("llama"), POLICIES["recompute"], topology.mesh, device=device, compute_dtype=torch.float64, seed=0, loss_chunk_tokens=7
    )
    for key, parameter in model.named_parameters():
        write_shard(parameter, torch.from_numpy(weights[key]))
    source, reports = _open(prefixes, objective), []
    setup = StepSetup(model=model, topology=topology, kernel=CpuKernel(), device=device, reduce_each=False)
    session = SimpleNamespace(source=source, device=device, topology=topology, step_setup=setup)

    def plan(lengths):
        return solve_static(lengths, world_size=ranks, degree=ranks, ulysses=ulysses, tokens_per_rank=64, linear_cost_tokens=100)

    def report(event, **fields):
        reports.append(fields)

    missing = list(range(len(prefixes)))
    done = fill_scores(session, run_dir, missing, name, plan, stop=StopAt(stop_at if dist.get_rank() == ranks - 1 else 0), report=report)
    return done, reports


def truth(prefix, kind):
    lift_to_float64()
    model, corpus = reference_model("llama", torch.float64), IndexedCorpus(prefix)
    weights = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    values = []
    with torch.no_grad():
        for document in range(corpus.num_documents):
            length, at = int(corpus.lengths[document]), 0
            if length > 64:
                values.append(np.full(2 if kind is Kind.PAIRS else length, np.nan))
                continue
            for part in corpus.parts(document) or (length,):
                tokens, mask = corpus.tokens(document, at, at + part), corpus.mask(document, at, at + part)
                stored = np.append(0.0, objective_reference.log_probs(model, tokens).numpy()) * mask
                values.append(stored.sum(keepdims=True) if kind is Kind.PAIRS else stored)
                at += part
    return weights, np.concatenate(values)


@pytest.mark.parametrize(("ranks", "ulysses"), [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("kind", [Kind.PAIRS, Kind.COMPLETIONS])
def test_scores_are_those_of_the_plain_model(pool, tmp_path, kind, ranks, ulysses):
    prefix, objective = write(tmp_path / "c", kind), Objective.DPO if kind is Kind.PAIRS else Objective.GRPO
    weights, want = truth(prefix, kind)
    answers = pool.run(_score, [prefix], objective, weights, tmp_path / "run", ulysses, 0, ranks=ranks)
    assert all(done for done, _ in answers)
    stored = np.fromfile(tmp_path / "run" / "scores" / "0-c.ref.bin", dtype=np.float64 if kind is Kind.PAIRS else np.float32)
    np.testing.assert_allclose(stored, want, rtol=1e-11 if kind is Kind.PAIRS else 1e-6, equal_nan=True)
    reports = answers[0][1][-1]
    assert reports["done_tokens"] == reports["total_tokens"] == sum(length for length in IndexedCorpus(prefix).lengths if length <= 64)
    assert sorted(path.name for path in (tmp_path / "run" / "scores").iterdir()) == ["0-c.ref.bin", "origins.json"]


def test_stopped_scoring_resumes_where_it_was(pool, tmp_path):
    prefix = write(tmp_path / "c", Kind.PAIRS)
    weights, want = truth(prefix, Kind.PAIRS)
    run, scores = tmp_path / "run", tmp_path / "run" / "scores"

    def go(stop_at, name="w"):
        return pool.run(_score, [prefix], Objective.DPO, weights, run, 2, stop_at, name, ranks=2)[0]

    assert go(1)[0] is False
    state = json.loads((scores / "progress.json").read_text())
    assert 0 < state["rows_done"] < 4 and not (scores / "0-c.ref.bin").exists()
    # What a crash may leave beyond the committed state changes nothing: the same rows are written again.
    part = np.memmap(scores / "0-c.ref.bin.part", dtype=np.float64, mode="r+")
    part[2 * state["rows_done"] :] = 7.0
    part[6:8] = np.nan
    part.flush()
    done, reports = go(0)
    assert done and reports[0]["done_tokens"] > sum(sum(sizes) + sizes[0] for sizes in PAIRS[: state["rows_done"]])
    np.testing.assert_allclose(np.fromfile(scores / "0-c.ref.bin"), want, rtol=1e-11, equal_nan=True)


def test_an_unfinished_attempt_with_other_weights_is_begun_anew(pool, tmp_path):
    prefix = write(tmp_path / "c", Kind.PAIRS)
    weights, want = truth(prefix, Kind.PAIRS)
    other = {name: weight * 0.5 for name, weight in weights.items()}
    assert pool.run(_score, [prefix], Objective.DPO, other, tmp_path / "run", 1, 1, "other", ranks=1)[0][0] is False
    assert pool.run(_score, [prefix], Objective.DPO, weights, tmp_path / "run", 1, 0, "w", ranks=1)[0][0] is True
    np.testing.assert_allclose(np.fromfile(tmp_path / "run" / "scores" / "0-c.ref.bin"), want, rtol=1e-11, equal_nan=True)


def test_several_corpora_at_once(pool, tmp_path):
    prefixes = [write(tmp_path / name, Kind.COMPLETIONS) for name in ("a", "b")]
    weights, want = truth(prefixes[0], Kind.COMPLETIONS)
    assert pool.run(_score, prefixes, Objective.GRPO, weights, tmp_path / "run", 2, 0, ranks=2)[0][0] is True
    for name in ("0-a", "1-b"):
        stored = np.fromfile(tmp_path / "run" / "scores" / f"{name}.ref.bin", dtype=np.float32)
        np.testing.assert_allclose(stored, want, rtol=1e-6, equal_nan=True)
