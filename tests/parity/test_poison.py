"""The real executor over the real stores, where copies come as late as they may and memory that was given back holds NaN.

Gradients equal plain Hugging Face's all the same: on one rank, Ulysses 2 and ring 2, through host memory and through files. Host
optimizer states likewise: copies both ways run when something waits for them, weights are NaN until they are there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from efflaunch.memory.offload.host_store import ArenaStore
from efflaunch.memory.offload.streams import Transfers
from efflaunch.tests.memory.offload.late import late_store
from efflaunch.tests.parity.late_link import LateLink, PoisonedHostStaging
from efflaunch.tests.parity.optimizers_side import run_updates
from efflaunch.tests.parity.ranks_side import POLICIES, run_plans
from efflaunch.tests.parity.test_optimizers import EXACT, plain
from efflaunch.tests.parity.test_parity import MEMORY_PLANS, check_parity, make_documents, static, worst
from efflaunch.tests.ranks import RankPool
from efflaunch.training.optimizers import host
from efflaunch.training.optimizers.transfer import Copied

MOVING = [name for name, policy in POLICIES.items() if policy.uses_host]
SCHEMES = ("one rank, packed", "ulysses 2", "ring 2")
PLACES = ("memory", "files")
GRID = [(policy, scheme, place) for policy in MOVING for scheme in SCHEMES for place in PLACES]
SHORT = {(policy, SCHEMES[index % 3], PLACES[index // 3 % 2]) for index, policy in enumerate(MOVING)}
"""Every policy once, every scheme with both places."""


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


def run_late(case, *args):
    """run_plans over a late store; everything was copied out and in, and dropped."""
    with tempfile.TemporaryDirectory() as folder:
        store = late_store(Path(folder) if case["place"] == "files" else None)
        answer = run_plans(case | {"store": store}, *args)
        assert min(store.device.num_copies.values()) > 0, "nothing was moved"
        assert store.stats.waste_bytes == 0, "parcels were left"
        store.close()
    return answer


@pytest.mark.parametrize(
    "policy, scheme, place", [row if row in SHORT else pytest.param(*row, marks=pytest.mark.slow) for row in GRID], ids=str
)
def test_gradients_hold_with_late_copies_and_poisoned_memory(pool, policy, scheme, place):
    check_parity(pool, {"policy": policy, "family": "llama_deep", "place": place}, [MEMORY_PLANS[scheme]], run_late)


def run_forgetful(*args):
    """run_late where sources are let go of at once."""
    with mock.patch.object(Transfers, "_let_go", lambda transfers: transfers._leaving.clear()):
        return run_late(*args)


def run_early_done(*args):
    """run_late where landing buffers are given back as soon as they are read."""
    get = ArenaStore.get

    def read_and_return(store, parcel):
        rows = get(store, parcel)
        store._waiting[parcel].landing.fill_(0xFF)
        return rows

    with mock.patch.object(ArenaStore, "get", read_and_return):
        return run_late(*args)


def test_the_checks_see_what_they_are_there_for(pool):
    case = {"policy": "memo_1", "place": "memory"}
    with pytest.raises(AssertionError, match="let go of"):
        check_parity(pool, case, [MEMORY_PLANS["one rank, packed"]], run_forgetful)
    with pytest.raises(AssertionError, match="is off by|is not"):
        check_parity(pool, case, [MEMORY_PLANS["one rank, packed"]], run_early_done)


def run_late_updates(*args):
    """run_updates with late copies of gradients and weights."""
    with mock.patch.object(host, "Link", LateLink), mock.patch.object(host, "Staging", PoisonedHostStaging):
        return run_updates(*args)


@pytest.mark.parametrize("mode", [mode for mode in EXACT if mode.startswith("host")])
@pytest.mark.parametrize("scheme", ["one rank", "ulysses 2", pytest.param("ring 2", marks=pytest.mark.slow)])
def test_updates_on_the_host_hold_with_late_copies(pool, scheme, mode):
    ranks, ulysses = (1, 1) if scheme == "one rank" else (2, 2 if scheme == "ulysses 2" else 1)
    optim, (documents, targets) = EXACT[mode], make_documents((37, 5, 64, 18, 29))
    first, losses, _, trained = plain("llama", "float64", optim.get("grad_clip"))
    case, plan = {"family": "llama", "dtype": "float64"}, static(ranks, ranks, ulysses)
    got_losses, _, weights, model, _ = pool.run(run_late_updates, case, first, documents, targets, plan, optim, ranks=ranks)[0]
    assert got_losses == pytest.approx(losses, rel=1e-10)
    error, name = worst(weights, trained)
    assert error <= 1e-10, f"{name} is off by {error:.1e}"
    assert all(np.array_equal(model[name], weights[name]) for name in weights), "the model's weights are the updated ones"


class Unawaited(LateLink):
    """Nobody waits for weights: neither the host, with which `_retire` begins, nor the device's stream."""

    def to_device(self, pairs):
        super().to_device(pairs)
        return Copied(None, ())

    def join(self):
        self._up.clear()


def run_unawaited(*args):
    with mock.patch.object(host, "Link", Unawaited), mock.patch.object(host, "Staging", PoisonedHostStaging):
        return run_updates(*args)


def test_weights_that_nobody_waited_for_are_seen(pool):
    documents, targets = make_documents((37, 5, 64, 18, 29))
    first, losses, _, _ = plain("llama", "float64", None)
    case, plan = {"family": "llama", "dtype": "float64"}, static(1, 1, 1)
    got = pool.run(run_unawaited, case, first, documents, targets, plan, EXACT["host, step"], ranks=1)[0][0]
    assert np.isfinite(losses).all() and np.isnan(got).all()
