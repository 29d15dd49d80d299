"""Three steps of Muon on real gloo ranks against torch.optim.Muon and AdamW on one plain Hugging Face process.

Newton-Schulz rounds to bfloat16 in both, on one rank and in one process alike. What goes in agrees to about 1e-13 in float64, so it is the
same bfloat16 number but for those within that of the middle between two: rows hold to 1e-10. One flipped bit would show as 1e-5.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

from efflaunch.tests.parity.optimizers_side import RATES, run_updates
from efflaunch.tests.parity.reference import lift_to_float64, reference_loss, reference_model
from efflaunch.tests.parity.test_optimizers import CLIP, LAYOUTS, LENGTHS
from efflaunch.tests.parity.test_parity import make_documents, static, worst
from efflaunch.tests.ranks import RankPool
from efflaunch.training.optimizers.adamw import is_decayed

ROWS = {
    **{name: LAYOUTS[name] for name in ("two ranks", "hsdp 2x2", "accumulation, reduced each time", "barrier-free", "two stages")},
    "tied embeddings, segments": LAYOUTS["tied embeddings, segments"],
    "four ranks": (4, {}, lambda: static(4, 4, 4)),
    "experts on ranks in equal numbers": (2, {"family": "qwen3_moe"}, lambda: static(2, 2, 2)),
    "experts on ranks in unequal numbers": (4, {"family": "gpt_oss"}, lambda: static(4, 2, 2)),
    "a shared expert": (2, {"family": "qwen2_moe"}, lambda: static(2, 2, 2)),
}


@pytest.fixture(scope="module")
def pool():
    with RankPool() as pool:
        yield pool


class PlainMuon:
    """torch.optim.Muon over views of a model's matrices, and torch's AdamW over the rest."""

    def __init__(self, model, is_interleaved):
        self.model, self.views = model, []
        owners = {p: module for module in reversed(list(model.modules())) for p in module.parameters(recurse=False)}
        rest = {True: [], False: []}
        for name, p in model.named_parameters():
            is_muons = ".layers." in name and p.ndim > 1 and min(p.shape[-2:]) > 1 and not name.endswith("bias")
            if is_muons:
                self.views += [(nn.Parameter(cut(p.data)), p, cut) for cut in _cuts(name, p, is_interleaved)]
            else:
                rest[is_decayed(owners[p], p)].append(p)
        self.muon = torch.optim.Muon([view for view, _, _ in self.views], weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        groups = [{"params": rest[decayed], "weight_decay": 0.3 * decayed} for decayed in (True, False)]
        self.adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-8, foreach=False)

    def step(self, rate):
        for view, p, cut in self.views:
            assert view.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
            view.grad = cut(p.grad)
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def _cuts(name, p, is_interleaved):
    if p.ndim == 2:
        return [lambda t: t]
    every = range(p.shape[0])
    if not name.endswith("gate_up_proj"):
        return [lambda t, e=e: t[e] for e in every]
    if is_interleaved:
        return [lambda t, e=e, s=s: t[e, :, s::2] for e in every for s in (0, 1)]
    half = p.shape[1] // 2
    return [lambda t, e=e, s=s: t[e, s : s + half] for e in every for s in (0, half)]


@lru_cache(maxsize=8)
def plain(family, clip):
    """First weights, losses and weights after three steps of the plain model."""
    lift_to_float64()
    model = reference_model(family, torch.float64)
    first = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer, losses = PlainMuon(model, family == "gpt_oss"), []
    for rate in RATES:
        model.zero_grad()
        loss = reference_loss(model, *make_documents(LENGTHS))
        loss.backward()
        losses.append(loss.item())
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)
        optimizer.step(rate)
    return first, losses, {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("row", "clip"), [*((row, None) for row in ROWS), ("hsdp 2x2", CLIP)])
def test_three_steps_equal_torchs_muon_and_adamw(pool, row, clip):
    ranks, case, plan = ROWS[row]
    case = {"family": "llama", "dtype": "float64", **case}
    first, losses, trained = plain(case["family"], clip)
    optim = {"algorithm": "muon", "grad_clip": clip}
    got_losses, _, weights, model, _ = pool.run(run_updates, case, first, *make_documents(LENGTHS), plan(), optim, ranks=ranks)[0]
    assert got_losses == pytest.approx(losses, rel=1e-10)
    error, name = worst(weights, trained)
    assert error <= 1e-10, f"{name} is off by {error:.1e}"
    assert all(np.array_equal(model[name], weights[name]) for name in weights)
