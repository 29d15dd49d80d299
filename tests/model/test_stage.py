"""A model cut into stages: one tensor goes between them, and losses and gradients are those of the whole, bit by bit.

Also more than one micro-batch in flight: in host stores of exactly the predicted capacity, and on sharded weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from efflaunch.memory.config import AttentionTiling
from efflaunch.memory.offload.open import open_store
from efflaunch.memory.policy import KEPT, MOVED, MemoryPolicy, Split
from efflaunch.model.build import build_model, install
from efflaunch.model.chunked_loss import LossOptions, cross_entropy
from efflaunch.model.stage import Stage, stage_of
from efflaunch.parallel.pipeline.place import StagePart
from efflaunch.parallel.pipeline.plan import parse
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sharding.engine import PlainWeights
from efflaunch.parallel.topology import build_topology
from efflaunch.tests.memory.test_saved import micro_batch
from efflaunch.tests.parity.ranks_side import POLICIES, ListSource, StrictStore
from efflaunch.tests.parity.reference import hf_config, lift_to_float64, reference_model
from efflaunch.tests.parity.test_parity import batch, make_documents, plan_of
from efflaunch.tests.ranks import RankPool
from efflaunch.training.micro_batches import count_targets, read_step
from efflaunch.training.objectives.heads import LanguageModelling
from efflaunch.training.step import backward_step
from efflaunch.training.step_setup import StepSetup

CPU = torch.device("cpu")
CHUNK = 16
CUT: dict[str, MemoryPolicy] = {
    "recompute": MemoryPolicy(),
    "keep": POLICIES["keep"],
    "segments that the cut divides": MemoryPolicy(segment_layers=2),
    "streamed, all moved": MemoryPolicy(
        layer_input=MOVED, attention_output=MOVED, mlp=MOVED, attention=AttentionTiling.CHUNKS, chunk_tokens=11, segment_layers=3
    ),
    "shares": MemoryPolicy(attention_output=KEPT, query=Split(0.25, 0.4), layer_input=Split(0.5, 0.5)),
}


def objective(head: Any) -> Tensor:
    return cross_entropy(head, 0.25)


def prepared(family: str, policy: MemoryPolicy) -> tuple[Any, StrictStore]:
    model, store = reference_model(family, torch.float32), StrictStore()
    install(model, policy, loss_chunk_tokens=CHUNK, store=store)
    return model, store


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def cut(model: Any, policy: MemoryPolicy, store: Any, *ends: int) -> list[Stage]:
    """Stages of one model in one process, up to the layers `ends`."""
    count, options = len(model.model.layers), LossOptions(CHUNK, getattr(model.config, "final_logit_softcapping", None))
    bounds = (0, *ends, count)
    stages = [
        Stage(model, [StagePart(range(a, b), a == 0, b == count)], options=options, policy=policy, store=store)
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    for stage in stages:
        # In one process the stages have one model: its root's forward is whichever of them runs.
        stage.weights = PlainWeights(stage)  # type: ignore[arg-type]
    return stages


def through(stages: list[Stage]) -> Tensor:
    """The loss of one micro-batch that goes through all stages and back, as tensors that a link could have carried."""
    tokens, attention = micro_batch()
    x, passes = None, []
    for stage in stages:
        passes.append(stage.forward(tokens, attention, objective if stage.parts[0].last else None, x))
        x = passes[-1].output.detach().clone()
    gradient = None
    for stage, done in zip(reversed(stages), reversed(passes), strict=True):
        gradient = stage.backward(done, gradient)
        gradient = None if gradient is None else gradient.clone()
    assert gradient is None, "the first stage received nothing"
    return passes[-1].output.detach()


@pytest.mark.parametrize("ends", [(2,), (1, 3), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", CUT)
def test_stages_have_the_gradients_of_the_whole(name: str, ends: tuple[int, ...]) -> None:
    whole, store = prepared("llama_deep", CUT[name])
    tokens, attention = micro_batch()
    loss = whole(tokens, attention, objective)
    loss.backward()
    model, pieces = prepared("llama_deep", CUT[name])
    got = through(cut(model, CUT[name], pieces, *ends))
    assert torch.equal(got, loss.detach()) and not pieces.parcels and not store.parcels
    wanted = gradients(whole)
    for key, gradient in gradients(model).items():
        assert torch.equal(gradient, wanted[key]), key


@pytest.mark.parametrize("family", ["llama_mha_tied", "gemma2"])
def test_a_tied_matrix_gets_the_gradients_of_both_ends(family: str) -> None:
    whole, _ = prepared(family, MemoryPolicy())
    tokens, attention = micro_batch()
    whole(tokens, attention, objective).backward()
    model, store = prepared(family, MemoryPolicy())
    through(cut(model, MemoryPolicy(), store, 1))
    wanted = gradients(whole)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-5, atol=1e-6)


def test_what_enters_and_leaves_follows_from_the_place() -> None:
    model, store = prepared("llama_deep", MemoryPolicy())
    first, last = cut(model, MemoryPolicy(), store, 2)
    tokens, attention = micro_batch()
    with pytest.raises(AssertionError):
        first(tokens, attention, objective)
    with pytest.raises(AssertionError):
        last(tokens, attention, objective)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


LENGTHS = (37, 5, 64, 18, 29)
PLAN = plan_of(2, batch((0, 2, 2, (2,))), batch((0, 2, 1, (0, 1))), batch((0, 1, 1, (3,)), (1, 1, 1, (4,))), lengths=LENGTHS)


def in_order(policy: str, schedules: list[str | None]) -> list[dict[str, np.ndarray]] | None:
    """Gradients by each schedule (None: the setup's own), and one entry per schedule; on rank 0."""
    torch.set_num_threads(1)
    lift_to_float64()
    topology, store = build_topology(replicate=1, device="cpu"), StrictStore()
    model = build_model(
        hf_config("llama_deep"), POLICIES[policy], topology.mesh,
        device=CPU, compute_dtype=torch.float64, seed=0, loss_chunk_tokens=CHUNK, store=store,
    )  # fmt: skip
    setup = StepSetup(model=model, topology=topology, kernel=CpuKernel(), device=CPU, reduce_each=False)
    works, found = read_step(ListSource(*make_documents(LENGTHS)), 0, PLAN, topology.stage_rank), []
    count = count_targets(works, topology, CPU)
    for text in schedules:
        called: list[int] = []
        order = None if text is None else parse(text)
        backward_step(setup, works, LanguageModelling(count, CPU), schedule=order, on_last=lambda called=called: called.append(1))
        assert called == [1] and not store.parcels
        found.append({name: np.array(p.grad.full_tensor()) for name, p in model.named_parameters()})  # type: ignore[union-attr]
        model.zero_grad()
    return found if dist.get_rank() == 0 else None


@pytest.mark.parametrize("policy", ["recompute", "shares_streamed"])
def test_any_order_of_passes_has_the_same_gradients_on_sharded_weights(pool: RankPool, policy: str) -> None:
    """Several micro-batches in flight, others first, and one more reduction in between: FSDP2 reduces what piled up."""
    orders = [None, "F0 F1 F2 B0 B1 B2 R2", "F2 F0 B2 F1 B0 R0 B1 R1", "G F0 F1 B1 B0 F2 B2 E"]
    first, *others = pool.run(in_order, policy, orders, ranks=2)[0]
    for found in others:
        for name, gradient in found.items():
            np.testing.assert_allclose(gradient, first[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_a_schedule_of_other_micro_batches_is_refused(pool: RankPool) -> None:
    with pytest.raises(Exception, match="not every micro-batch"):
        pool.run(in_order, "recompute", ["F0 B0 R0"], ranks=2)


def moving(count: int, room: int) -> int:
    """Most bytes of the host store with `count` micro-batches in flight, in a store of `room` bytes."""
    policy = MemoryPolicy(layer_input=MOVED, attention_output=MOVED)
    model = reference_model("llama_deep", torch.float32)
    store = open_store(device=CPU, capacity_bytes=room)
    try:
        install(model, policy, loss_chunk_tokens=CHUNK, store=store)
        stage = stage_of(model)
        passes = [stage.forward(*micro_batch(), objective) for _ in range(count)]
        for done in passes:
            stage.backward(done)
        return int(store.stats.high_water_bytes)
    finally:
        store.close()


def test_each_micro_batch_in_flight_takes_its_part_of_the_host_store() -> None:
    one = moving(1, 64 << 20)
    assert moving(3, 64 << 20) == 3 * one > 0
    assert moving(3, 3 * one) == 3 * one, "and no more room than that is needed"
    with pytest.raises(Exception, match="host"):
        moving(3, 2 * one)


def test_aborted_micro_batches_leave_the_host_store_to_the_next() -> None:
    model, store = prepared("llama_deep", CUT["streamed, all moved"])
    stage = stage_of(model)
    for _ in range(2):
        stage.forward(*micro_batch(), objective)
    assert store.parcels
    stage.forget()
    assert not store.parcels
    stage.backward(stage.forward(*micro_batch(), objective))
    assert not store.parcels
