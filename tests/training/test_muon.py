"""Muon over shards against torch.optim.Muon in one process, and its way through checkpoints.

Newton-Schulz runs in bfloat16 in both, on the same numbers: element by element, what goes in differs by float64 rounding alone, which
bfloat16 does not see but for a number within 1e-16 of the middle between two. So 1e-10 holds here; a flipped bit would show as 1e-3.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from efflaunch.tests.ranks import RankPool
from efflaunch.tests.training.muon_side import config, resumed, trained, with_torchs_own
from efflaunch.training.optimizers.config import MuonScale
from efflaunch.training.optimizers.muon import orthogonal, update_scale

LAYOUTS = [(1, 1), (2, 1), (4, 1), (4, 2)]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


def check_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error = float((got[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-30))
        assert error <= 1e-10, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize(("ranks", "replicate"), LAYOUTS)
@pytest.mark.parametrize("scale", list(MuonScale), ids=lambda scale: scale.value)
def test_three_steps_equal_torchs_muon_and_adamw_in_one_process(pool: RankPool, scale: MuonScale, ranks: int, replicate: int) -> None:
    """Rows of 21 and 7 over 4 ranks: parts of unequal length, and of none."""
    settings = config(muon_scale=scale, muon_lr_ratio=2.0)
    for got in pool.run(trained, settings, replicate, ranks=ranks):
        check_equal(got, with_torchs_own(scale, ratio=2.0))


def test_without_a_process_group_and_with_clipping() -> None:
    expected = with_torchs_own(MuonScale.MATCH_RMS_ADAMW, max_norm=0.5)
    check_equal(trained(config(grad_clip=0.5), 1), expected)


def test_clipping_on_shards_is_by_the_norm_of_the_whole_gradient(pool: RankPool) -> None:
    expected = with_torchs_own(MuonScale.MATCH_RMS_ADAMW, max_norm=0.5)
    check_equal(pool.run(trained, config(grad_clip=0.5), 2, ranks=4)[0], expected)


@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (4, 2)])
def test_a_checkpoint_of_two_ranks_is_resumed_on_others(pool: RankPool, tmp_path: Path, ranks: int, replicate: int) -> None:
    whole = pool.run(trained, config(), 1, ranks=2)[0]
    pool.run(trained, config(), 1, 2, tmp_path, ranks=2)
    check_equal(pool.run(resumed, config(), replicate, tmp_path, ranks=ranks)[0], whole)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)], ids=str)
def test_newton_schulz_is_torchs_bit_for_bit_and_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    gradient = torch.randn(shape)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([parameter], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn="original")
    parameter.grad = gradient.clone()
    optimizer.step()
    ours = orthogonal(gradient.bfloat16(), 5)
    assert torch.equal(parameter.detach(), -ours.float() * update_scale(MuonScale.ORIGINAL, *shape))
    singular = torch.linalg.svdvals(ours.float())
    assert float(singular.min()) > 0.5 and float(singular.max()) < 1.5


def test_updates_are_as_large_as_adamws() -> None:
    """0.2 is the root mean square of AdamW's updates in arXiv 2502.16982, section 2.2."""
    torch.manual_seed(2)
    for shape in ((64, 16), (16, 64)):
        update = orthogonal(torch.randn(shape).bfloat16(), 5).float() * update_scale(MuonScale.MATCH_RMS_ADAMW, *shape)
        assert 0.12 < float(update.square().mean().sqrt()) < 0.28
