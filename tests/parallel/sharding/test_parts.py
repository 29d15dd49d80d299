"""Which part of a tensor a rank holds, and norms over parts, on real gloo ranks: plain, replicated, and sharded on two axes at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from efflaunch.parallel.sharding.parts import groups_of_parts, is_sharded, like, local, memory_of, offsets, sharding, slices, write_shard
from efflaunch.tests.parallel.sharding.pair import Pair, two_axes
from efflaunch.tests.ranks import RankPool
from efflaunch.training.optimizers.adamw import clip_gradients
from efflaunch.training.optimizers.norm import NormMeter


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def norms() -> tuple[list[float], float, list[str]]:
    """Norm of each parameter alone, of all by the clipping of a step, and the kinds of placement there are."""
    model = two_axes()
    pieces_of = []
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
        meter = NormMeter()
        meter.add(parameter, local(parameter.grad))
        pieces_of.append(meter.total([parameter]))
    kinds = [type(placement).__name__ for parameter in model.parameters() for placement in parameter.placements]  # type: ignore[attr-defined]
    return pieces_of, clip_gradients(model, 1.0), kinds


def test_a_norm_counts_every_element_once_on_two_axes(pool: RankPool) -> None:
    """A strided shard says of itself that it is no shard: its ranks' elements were not added up once."""
    truth = [float(parameter.detach().norm()) for parameter in Pair().parameters()]
    whole = float(torch.cat([parameter.detach().flatten() for parameter in Pair().parameters()]).norm())
    for each, total, kinds in pool.run(norms, ranks=4):
        assert "_StridedShard" in kinds and "Replicate" in kinds
        assert each == pytest.approx(truth, rel=1e-12) and total == pytest.approx(whole, rel=1e-12)


def pieces() -> dict[str, tuple[tuple[slice, ...], Tensor]]:
    """Of each parameter this rank's index into the whole, and its numbers after `write_shard` of other ones; views are checked here."""
    model, out = two_axes(), {}
    for name, parameter in model.named_parameters():
        write_shard(parameter, torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape))
        part = memory_of(parameter)
        assert is_sharded(parameter) and part.data_ptr() == local(parameter).data_ptr() and not part.requires_grad
        assert offsets(parameter) == tuple(piece.start for piece in slices(parameter))
        rebuilt = like(parameter, part.float())
        assert rebuilt.shape == parameter.shape and rebuilt.dtype == torch.float32 and sharding(rebuilt) == sharding(parameter)
        out[name] = slices(parameter), part.clone()
    return out


def test_parts_are_where_they_say_and_cover_the_whole(pool: RankPool) -> None:
    for name, parameter in Pair().named_parameters():
        wanted = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
        covered = torch.zeros(parameter.shape)
        for index, part in (pieces_of[name] for pieces_of in pool.run(pieces, ranks=4)):
            assert torch.equal(part, wanted[index])
            covered[index] += 1
        assert (covered == (2 if name == "bias" else 1)).all(), "replicated on the tensor axis"


def test_a_plain_tensor_is_whole() -> None:
    value = torch.randn(3, 4, requires_grad=True)
    assert not is_sharded(value) and local(value) is value and like(value, value) is value
    assert offsets(value) == (0, 0) and slices(value) == (slice(0, 3), slice(0, 4)) and groups_of_parts(value) == ()
    write_shard(value, torch.ones(3, 4))
    assert (value == 1).all() and sharding(value) == "cpu"
    scalar = torch.tensor(2.0)
    write_shard(scalar, torch.tensor(5.0))
    assert scalar == 5 and slices(scalar) == ()


def partial() -> bool:
    """Whether a sum that is not reduced yet is refused."""
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (2,))
    value = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    try:
        groups_of_parts(value)
    except AssertionError:
        return True
    return False


def test_a_sum_that_is_not_reduced_has_no_norm(pool: RankPool) -> None:
    assert pool.run(partial, ranks=2) == [True, True]


def test_meshes_share_their_groups(pool: RankPool) -> None:
    assert all(pool.run(same_groups, ranks=2))


def same_groups() -> bool:
    """Two tensors of one mesh are measured together: the same group objects, so one collective for both."""
    mesh = init_device_mesh("cpu", (2,))
    first, second = (distribute_tensor(torch.ones(4, width), mesh, [Shard(0)]) for width in (1, 2))
    return all(a is b for a, b in product(groups_of_parts(first), groups_of_parts(second)))
