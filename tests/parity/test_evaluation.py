"""Evaluation on real gloo ranks against plain Hugging Face: every layout gives the loss of one process that sees what each target sees."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.tests.parity.evaluation_side import (
    ANSWERS,
    CONTEXT,
    LENGTHS,
    LONGEST,
    corpus,
    documents,
    evaluate,
    find_needles,
    needle_texts,
    reference,
    train,
)
from efflaunch.tests.ranks import RankPool


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def log_probs(model, tokens):
    """Log-probabilities (T, V) of what follows each token."""
    ids = torch.as_tensor(np.asarray(tokens)).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=torch.arange(ids.shape[1]).unsqueeze(0), use_cache=False).logits[0]
    return F.log_softmax(logits, -1)


@lru_cache
def truth(family, masked):
    """Losses by the definitions of docs/evaluation.md, a target at a time: (whole, short, beyond, by length, by position)."""
    model, _ = reference(family)
    tokens, masks = documents()
    whole, short, beyond, at = [], [], [], {length: [] for length in LENGTHS}
    by_context = {}
    for row, mask in zip(tokens, masks, strict=True):
        loss = Losses(model, row)
        for target in range(1, len(row)):
            if masked and not mask[target]:
                continue
            # Documents over data.max_seq_len are cut: what came before the cut is not seen.
            piece = (target - 1) // LONGEST * LONGEST
            whole.append(loss(piece, target))
            context = target - piece
            by_context.setdefault(1 << (context - 1).bit_length(), []).append(whole[-1])
            if context > CONTEXT:
                beyond.append(whole[-1])
                # Every half of the short context another window begins.
                step = CONTEXT // 2
                short.append(loss(piece + (context - 1 - CONTEXT) // step * step + step, target))
            end = -(-target // max(LENGTHS)) * max(LENGTHS)
            if end <= len(row) and target > end - min(LENGTHS) // 2:
                for length in LENGTHS:
                    at[length].append(loss(end - length, target))
    return whole, short, beyond, at, by_context


class Losses:
    """`(begin, target)`: the loss of a document's token `target` for a model that sees the tokens from `begin` on up to it."""

    def __init__(self, model, row):
        self._model, self._row, self._known = model, row, {}

    def __call__(self, begin, target):
        # What comes behind a token is not seen by it, so one pass serves all targets behind one beginning.
        if begin not in self._known:
            self._known[begin] = log_probs(self._model, self._row[begin : begin + LONGEST])
        return -float(self._known[begin][target - 1 - begin, self._row[target]])


ROWS = {
    "one rank": ({}, ("static", 1, 1, 1)),
    "two ranks, data parallel": ({}, ("static", 2, 1, 1)),
    "Ulysses 2": ({}, ("static", 2, 2, 2)),
    "ring 2": ({}, ("static", 2, 2, 1)),
    "hybrid 2x2": ({}, ("static", 4, 4, 2)),
    "adaptive": ({}, ("adaptive", 4, 0, 0)),
    "idle ranks": ({}, ("idle", 4, 2, 2)),
    "loss mask, ring 2": ({"masked": True}, ("static", 2, 2, 1)),
    "keep, HSDP": ({"policy": "keep", "replicate": 2}, ("static", 4, 2, 2)),
    "streambp on the host": ({"policy": "streambp_11_host"}, ("static", 2, 2, 2)),
    "gemma2, caps and windows": ({"family": "gemma2"}, ("static", 2, 2, 1)),
    "qwen3 moe": ({"family": "qwen3_moe", "router": (0.3, 0.05)}, ("static", 2, 2, 2)),
    "qwen3 moe, EP 2, adaptive": ({"family": "qwen3_moe", "ep": 2}, ("adaptive", 4, 0, 0)),
    "mixtral, a capacity that drops rows in training": ({"family": "mixtral", "capacity": 0.25}, ("static", 1, 1, 1)),
    "mixtral, EP 4, idle ranks": ({"family": "mixtral", "ep": 4}, ("idle", 4, 2, 2)),
    "2 stages": ({"stages": 2}, ("static", 1, 1, 1)),
    "2 stages, GPipe, ring 2, loss mask": ({"stages": 2, "order": PipelineOrder.GPIPE, "masked": True}, ("static", 2, 2, 1)),
    "2 stages, adaptive, streambp": ({"stages": 2, "policy": "streambp_11_host"}, ("adaptive", 2, 0, 0)),
    "2 stages of 2, idle ranks": ({"stages": 2}, ("idle", 2, 1, 1)),
    "2 stages, interleaved": ({"stages": 2, "virtual": 2, "order": PipelineOrder.INTERLEAVED, "family": "gemma2"}, ("static", 1, 1, 1)),
    "2 stages, mixtral, EP 2": ({"stages": 2, "family": "mixtral", "ep": 2, "capacity": 0.25}, ("static", 2, 1, 1)),
}


def check_mean(found, losses, what):
    assert found["targets"] == len(losses) > 0, what
    assert abs(found["loss"] - np.mean(losses)) <= 1e-10 * np.mean(losses), f"{what}: {found['loss']} is not {np.mean(losses)}"


@pytest.mark.parametrize("row", ROWS)
def test_losses_equal_plain_hugging_face(pool, tmp_path, row):
    case, layout = ROWS[row]
    case = {"family": "llama", **case}
    _, weights = reference(case["family"])
    prefix = corpus(tmp_path, case.get("masked", False))
    answers = pool.run(evaluate, case, layout, weights, prefix, ranks=layout[1] * case.get("stages", 1))
    assert all(answer == answers[0] for answer in answers), "the same numbers to the last bit on every rank"
    found = answers[0]
    whole, short, beyond, at, by_context = truth(case["family"], case.get("masked", False))
    check_mean(found, whole, "whole")
    assert [entry["length"] for entry in found["lengths"]] == sorted(LENGTHS)
    assert len({entry["targets"] for entry in found["lengths"]}) == 1
    for entry in found["lengths"]:
        check_mean(entry, at[entry["length"]], f"{entry['length']} tokens of context")
    assert {entry["up_to"] for entry in found["positions"]} == set(by_context)
    for entry in found["positions"]:
        check_mean(entry, by_context[entry["up_to"]], f"up to {entry['up_to']}")
    context = found["context"]
    check_mean(context, beyond, "beyond the short context")
    assert abs(context["short_loss"] - np.mean(short)) <= 1e-10 * np.mean(short) and len(short) == len(beyond)
    assert context["gain"] == pytest.approx(np.mean(short) - np.mean(beyond), rel=1e-8)
    assert found["metrics"]["eval/held/loss_8"] == found["lengths"][0]["loss"]


NEEDLES = ("one rank", "hybrid 2x2", "adaptive", "idle ranks", "gemma2, caps and windows", "2 stages, GPipe, ring 2, loss mask")


@pytest.mark.parametrize("row", NEEDLES)
def test_needles_are_found_where_plain_hugging_face_finds_them(pool, row):
    case, layout = ROWS[row]
    case = {"family": "llama", **case}
    model, weights = reference(case["family"])
    texts = needle_texts(case["family"])
    answers = pool.run(find_needles, case, layout, weights, texts, ranks=layout[1] * case.get("stages", 1))
    assert all(answer == answers[0] for answer in answers), "the same numbers to the last bit on every rank"
    found, exact = answers[0]["needles"], []
    for cell, tokens, count in zip(found, texts, ANSWERS, strict=True):
        all_of_it = log_probs(model, tokens)
        places = range(len(tokens) - count - 1, len(tokens) - 1)
        due = sum(float(all_of_it[place, tokens[place + 1]]) for place in places)
        exact.append(float(all(int(all_of_it[place].argmax()) == tokens[place + 1] for place in places)))
        assert abs(cell["log_prob"] - due) <= 1e-10 * abs(due) and cell["exact"] == exact[-1]
    assert exact[::2] == [1.0] * 3 and sum(exact) == 3, "of those that are the model's own words, and of no other"
    assert answers[0]["targets"] == sum(ANSWERS) and answers[0]["metrics"]["eval/needles/exact"] == 3 / 5


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ({}, ("static", 2, 2, 2)),
        ({"policy": "keep", "barrier_free": True}, ("adaptive", 4, 0, 0)),
        ({"family": "qwen3_moe", "router": (0.3, 0.05), "ep": 2}, ("static", 2, 1, 1)),
        ({"stages": 2}, ("static", 2, 1, 1)),
    ],
    ids=["Ulysses", "barrier-free", "experts with router losses", "2 stages"],
)
def test_training_is_bit_equal_with_and_without(pool, tmp_path, case, layout):
    case = {"family": "llama", **case}
    _, weights = reference(case["family"])
    prefix, ranks = corpus(tmp_path, False), layout[1] * case.get("stages", 1)
    without, with_it = (pool.run(train, case, layout, weights, prefix, evaluates, ranks=ranks) for evaluates in (False, True))
    assert [losses for losses, _, _ in without] == [losses for losses, _, _ in with_it]
    for name, weight in without[0][1].items():
        assert np.array_equal(weight, with_it[0][1][name]), name
    found = with_it[0][2]
    assert len(set(found)) == 3, "what is judged are the weights of the moment"
