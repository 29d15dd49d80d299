"""Updaters beside their numbers (tests/parity/test_optimizers.py): what is refused, what a bad gradient does, what checkpoints hold."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from efflaunch.errors import ConfigError
from efflaunch.estimate.optimizer_residency import IN_FLIGHT
from efflaunch.tests.limits import ENDS_S
from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training.optimizer_side import Run
from efflaunch.tests.training.small import backward, plain_model, shard
from efflaunch.training.config import Dtype
from efflaunch.training.optimizers import host
from efflaunch.training.optimizers.buckets import find_buckets
from efflaunch.training.optimizers.check import check_residency, describe, inexact
from efflaunch.training.optimizers.config import ClipMode, OptimConfig, StateDevice, StateDtype, Update
from efflaunch.training.optimizers.transfer import Link, Staging, cut

HOST, DEVICE = StateDevice.HOST, StateDevice.DEVICE
MODES = {
    "device": {},
    "device, backward": {"update": Update.BACKWARD},
    "host": {"state_device": HOST},
    "host, backward": {"state_device": HOST, "update": Update.BACKWARD},
}


def config(**changes: Any) -> OptimConfig:
    return OptimConfig(**({"name": "test", "lr": 1e-2, "weight_decay": 0.3, "grad_clip": None} | changes))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": Update.BACKWARD, "grad_clip": 1.0}, r"optim\.update: found backward .*grad_clip=1 .*Try: optim\.clip_mode=two_pass"),
        ({"clip_mode": ClipMode.TWO_PASS, "grad_clip": 1.0}, r"optim\.clip_mode: found two_pass with optim\.update=step"),
        ({"clip_mode": ClipMode.PREVIOUS_NORM, "grad_clip": 1.0, "state_device": HOST}, r"found previous_norm with optim\.update=step"),
        ({"clip_mode": ClipMode.TWO_PASS, "update": Update.BACKWARD}, r"found two_pass with optim\.grad_clip=null"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        check_residency(config(**changes), Dtype.BFLOAT16)


def test_fewer_bits_are_refused_where_there_is_more_than_float32() -> None:
    with pytest.raises(ConfigError, match=r"8bit with train\.dtype=float64"):
        check_residency(config(state_dtype=StateDtype.INT8), Dtype.FLOAT64)
    check_residency(config(state_dtype=StateDtype.INT8), Dtype.FLOAT32)


def test_what_is_not_exact_is_said_loudly() -> None:
    loose = config(update=Update.BACKWARD, grad_clip=1.0, clip_mode=ClipMode.PREVIOUS_NORM, state_dtype=StateDtype.BFLOAT16)
    check_residency(loose, Dtype.FLOAT32)
    assert len(inexact(loose)) == 2 and describe(loose).count("NOT EXACT") == 2
    for fields in MODES.values():
        assert not inexact(config(**fields)) and "NOT EXACT" not in describe(config(**fields))
    assert describe(config()) == "AdamW, states in device memory, updated after backward"


def _bucket_names() -> list[tuple[str, list[str]]]:
    return [(bucket.name, bucket.names) for bucket in find_buckets(shard(plain_model()))]


def test_a_bucket_is_what_is_reduced_together(pool: RankPool) -> None:
    (root, *layers) = pool.run(_bucket_names, ranks=2)[0]
    assert root == ("", ["embed.weight", "norm.weight", "norm.bias"])  # the head is tied
    assert [name for name, _ in layers] == ["layers.0", "layers.1"]
    assert sum(len(names) for _, names in layers) + 3 == len(list(plain_model().parameters()))


def _with_a_bad_gradient(fields: dict[str, Any]) -> tuple[Any, dict[str, Tensor], dict[str, Tensor], float]:
    run = Run(config(**fields))
    before = {name: local.clone() for name, local in _locals(run).items()}
    run.spoil = True
    gradients = run.step(0)
    run.updater.close()
    return gradients, before, _locals(run), gradients.norm


def _locals(run: Run) -> dict[str, Tensor]:
    return {name: (p.to_local() if hasattr(p, "to_local") else p).detach() for name, p in run.weights.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_not_finite_names_its_layer_on_every_rank_and_is_not_applied(pool: RankPool, mode: str) -> None:
    in_backward = "backward" in mode
    for rank, (gradients, before, after, norm) in enumerate(pool.run(_with_a_bad_gradient, MODES[mode], ranks=2)):
        assert math.isnan(norm)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        if not in_backward:
            assert not changed and not gradients.partly_applied
            assert mode == "device" or gradients.first_bad == "layers.0"
            continue
        assert gradients.first_bad == "layers.0" and gradients.partly_applied
        assert any(name.startswith("layers.1.") for name in changed), "the layer before it in backward was updated"
        if rank == 1:  # whose shard has the number that is none
            assert not any(name.startswith("layers.0.") for name in changed)


def _train_and_save(folder: Path, fields: dict[str, Any], replicate: int) -> dict[str, Tensor]:
    run = Run(config(**fields), folder=folder, replicate=replicate)
    for step in range(2):
        run.step(step)
    run.save(2)
    run.engine.wait() if hasattr(run.engine, "wait") else None
    saved = run.tensors()
    run.updater.close()
    return saved


def _resume(folder: Path, fields: dict[str, Any], replicate: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was restored, and the same after two more steps."""
    run = Run(config(**fields), folder=folder, replicate=replicate, seed=5)
    assert run.restore() == 2
    restored = run.tensors()
    for step in range(2, 4):
        run.step(step)
    run.updater.close()
    return restored, run.tensors()


def _all_steps(fields: dict[str, Any]) -> dict[str, Tensor]:
    run = Run(config(**fields))
    for step in range(4):
        run.step(step)
    run.updater.close()
    return run.tensors()


def check_equal(gradients: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert gradients.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(gradients[name], wanted[name])] == []


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_a_run_resumes_bit_equal_wherever_its_states_live(pool: RankPool, tmp_path: Path, first: str, second: str) -> None:
    wanted = pool.run(_all_steps, MODES["device"], ranks=2)[0]
    saved = pool.run(_train_and_save, tmp_path / "run", MODES[first], 1, ranks=2)[0]
    restored, trained = pool.run(_resume, tmp_path / "run", MODES[second], 1, ranks=2)[0]
    check_equal(restored, saved)
    check_equal(trained, wanted)


@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (4, 1), (4, 2)], ids=["one", "four", "hsdp 2x2"])
@pytest.mark.parametrize("second", ["device", "host, backward"])
def test_another_number_of_ranks_finds_the_same_numbers(pool: RankPool, tmp_path: Path, ranks: int, replicate: int, second: str) -> None:
    saved = pool.run(_train_and_save, tmp_path / "run", MODES["host"], 1, ranks=2)[0]
    restored, trained = pool.run(_resume, tmp_path / "run", MODES[second], replicate, ranks=ranks)[0]
    check_equal(restored, saved)
    wanted = pool.run(_all_steps, MODES["device"], ranks=2)[0]
    for name, value in wanted.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("states", [DEVICE, HOST], ids=["device", "host"])
def test_the_previous_norm_survives_a_restart(pool: RankPool, tmp_path: Path, states: StateDevice) -> None:
    fields = {"state_device": states, "update": Update.BACKWARD, "grad_clip": 0.3, "clip_mode": ClipMode.PREVIOUS_NORM}
    wanted = pool.run(_all_steps, fields, ranks=2)[0]
    pool.run(_train_and_save, tmp_path / "run", fields, 1, ranks=2)
    check_equal(pool.run(_resume, tmp_path / "run", fields, 1, ranks=2)[0][1], wanted)


def test_a_failure_in_the_worker_is_raised_where_training_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(config(**MODES["host, backward"]))

    def fail() -> None:
        raise RuntimeError("no such update")

    monkeypatch.setattr(run.updater.optimizer, "step", fail)
    with pytest.raises(RuntimeError, match="no such update"):
        run.step(0)
    run.updater.close()


def _an_update_that_waits_for_the_next_layer() -> bool:
    run = Run(config(**MODES["host, backward"]))
    went_on, waited, update = threading.Event(), [], run.updater.optimizer.step
    run.model.layers[0].gate.register_post_accumulate_grad_hook(lambda parameter: went_on.set())

    def step() -> None:
        waited.append(went_on.wait(ENDS_S))
        update()

    run.updater.optimizer.step = step  # type: ignore[method-assign, assignment]
    run.step(0)
    run.updater.close()
    return len(waited) == 3 and all(waited)


def test_backward_continues_while_a_layer_is_updated(pool: RankPool) -> None:
    """The last layer's update waits for the first layer's gradient, which backward brings only if it does not wait for the update."""
    assert pool.run(_an_update_that_waits_for_the_next_layer, ranks=2) == [True, True]


def _buffer_bytes(fields: dict[str, Any]) -> tuple[int, int]:
    run = Run(config(**fields))
    for step in range(3):
        run.step(step)
    run.updater.close()
    assert isinstance(run.updater, host.HostUpdater)
    return run.updater.staging_bytes, sum(value.numel() * 4 for value in _locals(run).values())


def test_buffers_are_reused_and_only_a_few_modules_are_on_their_way(pool: RankPool) -> None:
    held, parameters = pool.run(_buffer_bytes, MODES["host"], ranks=2)[0]
    moving, _ = pool.run(_buffer_bytes, MODES["host, backward"], ranks=2)[0]
    assert held <= 2 * parameters + parameters  # every gradient, and weights on their way back
    assert moving <= 2 * parameters and host.IN_FLIGHT == IN_FLIGHT


def test_buffers_come_back() -> None:
    staging = Staging(Link(torch.device("cpu")), torch.float32)
    first, second = staging.take(6), staging.take(6)
    assert first.data_ptr() != second.data_ptr() and staging.num_bytes == 48
    staging.give_back(first)
    assert staging.take(6).data_ptr() == first.data_ptr() and staging.num_bytes == 48
    parts = cut(first, [torch.Size((2, 2)), torch.Size((0,)), torch.Size((2,))])
    assert [part.shape for part in parts] == [(2, 2), (0,), (2,)] and parts[2].data_ptr() == first[4:].data_ptr()


def test_an_updater_of_a_model_that_is_not_wrapped() -> None:
    """One process without FSDP: one bucket, the same calls."""
    runs = [Run(config(**fields)) for fields in MODES.values()]
    for run in runs:
        for step in range(2):
            run.step(step)
        run.updater.close()
        check_equal(run.tensors(), runs[0].tensors())
    reference = plain_model()
    backward(reference)
    assert all(parameter.grad is not None for parameter in reference.parameters())
