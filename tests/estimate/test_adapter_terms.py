"""Estimates know what is trained: bytes of frozen weights, of the rest sixteen each; FLOPs; suggestions; DPO's reference."""

from __future__ import annotations

from dataclasses import replace

import pytest

from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.footprint.host import state_bytes
from efflaunch.estimate.footprint.term import Phase
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.suggestion_moves import LORA
from efflaunch.estimate.suggestions import suggest
from efflaunch.estimate.timing.flops import backward_flops, linear_flops, model_flops_per_token, reference_flops
from efflaunch.estimate.timing.step import estimate_time
from efflaunch.estimate.timing.update import update_time
from efflaunch.launcher.config.compose import compose
from efflaunch.model.adapters.nf4_layout import STRIP_NUMBERS, RowLayout
from efflaunch.model.adapters.targets import trained_numbers
from efflaunch.training.config import Objective


def inputs(*overrides: str, experiment: str = "llama8b_lora_1M_1gpu") -> PlanInputs:
    return PlanInputs.of(compose([f"+experiment={experiment}", "memory=recompute", "data.prefixes=[somewhere]", *overrides]))


def test_counts_of_rank_16_on_every_matrix_of_an_8b_model() -> None:
    s = inputs()
    per_layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert s.trained_layer_parameters == s.adapter_layer_parameters == per_layer
    assert s.trained_parameters == 32 * per_layer == 41_943_040
    assert s.parameters == 8_030_261_248 + s.trained_parameters
    assert inputs("adapter=none").trained_parameters == 8_030_261_248


def test_bytes_of_what_is_frozen_and_of_what_is_trained() -> None:
    s = inputs()
    terms = {entry.name: entry for entry in build_ledger(s).device.terms}
    frozen, trained = s.parameters - s.trained_parameters, s.trained_parameters
    assert terms["weights"].num_bytes == 2 * frozen + 4 * trained
    assert terms["optimizer states"].num_bytes == 8 * trained and state_bytes(s) == 12 * trained
    assert terms["gradients"].by_phase[Phase.OPTIMIZER] == 4 * trained
    assert terms.get("head gradient") is None or not terms["head gradient"].num_bytes
    host = {entry.name: entry for entry in build_ledger(inputs("optim.state_device=host")).device.terms}
    assert (host["weights"].num_bytes == 2 * s.parameters and "optimizer states" not in host) or not host["optimizer states"].num_bytes


def test_magnitudes_are_a_number_for_each_row_and_a_product_of_values_in_backward() -> None:
    plain, s = inputs(), inputs("adapter.dora=true")
    rows = 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096
    assert s.trained_layer_parameters == plain.trained_layer_parameters + rows
    assert backward_flops(s) - backward_flops(plain) == 2 * (s.turned_layer_parameters + s.adapter_layer_parameters + rows * 2)
    pieces = [{term.name: term for term in build_ledger(each).device.terms}["live layer, a piece"] for each in (plain, s)]
    assert pieces[1].by_phase[Phase.BACKWARD_MLP] - pieces[0].by_phase[Phase.BACKWARD_MLP] == 2 * 4096 * s.piece_tokens
    assert pieces[1].by_phase[Phase.FORWARD] == pieces[0].by_phase[Phase.FORWARD]


def test_parts_that_are_trained_whole_count() -> None:
    s = inputs("adapter.modules_to_save=[head,norms]")
    numbers = trained_numbers(s.adapter, s.spec)
    assert (numbers.head, numbers.embedding, numbers.last_norm, numbers.norms) == (128256 * 4096, 0, 4096, 2 * 4096)
    assert s.trained_root_parameters == 128256 * 4096 + 4096 and s.trained_head_parameters == s.head_parameters
    assert s.stage(range(31, 32)).trained_parameters == s.trained_root_parameters + s.trained_layer_parameters
    assert s.stage(range(1)).trained_root_parameters == 0


def test_a_frozen_weight_takes_four_flops_and_its_update_no_time() -> None:
    lora, full = inputs(), inputs("adapter=none")
    frozen = lora.active_parameters - 32 * lora.adapter_layer_parameters + lora.head_parameters
    assert model_flops_per_token(lora) == 4 * frozen + 6 * 32 * lora.adapter_layer_parameters
    assert model_flops_per_token(full) == 6 * frozen
    assert 0.6 < linear_flops(lora) / linear_flops(full) < 0.8
    assert update_time(lora).busy_s == pytest.approx(update_time(full).busy_s * lora.trained_parameters / full.trained_parameters)


def test_dpo_makes_its_reference_in_every_step() -> None:
    s = inputs()
    dpo = replace(s, train=replace(s.train, objective=Objective.DPO))
    attention, linear = reference_flops(dpo, 1 << 20)
    assert attention > 0 and linear == 2 * (8_030_261_248 - 128256 * 4096 - 4096) * (1 << 20) and reference_flops(s, 1 << 20) == (0.0, 0.0)
    assert estimate_time(dpo).compute_s > estimate_time(s).compute_s
    saved = replace(dpo, adapter=replace(dpo.adapter, modules_to_save=["norms"]))
    assert reference_flops(saved, 1 << 20) == (0.0, 0.0), "scored before the first step"


def test_adapters_are_suggested_where_all_weights_do_not_fit() -> None:
    ledger = build_ledger(inputs("adapter=none", "memory=auto", "data.max_seq_len=8K", "data.global_batch_tokens=8K",
                                 "parallel.tokens_per_rank=8K", "cluster.host_memory_bytes=64GiB"))  # fmt: skip
    found = [entry for entry in suggest(ledger) if "adapter=lora" in entry.overrides]
    assert not ledger.fits and len(found) == 1 and found[0].ledger.fits
    assert found[0].ledger.inputs.adapter == LORA and "another result" in found[0].reason
    # What ended on these machines is resumed, which adapters cannot be.
    assert not any("adapter=lora" in entry.overrides for entry in suggest(ledger, elsewhere=False))


def test_packed_matrices_take_their_bytes_and_are_wide_one_at_a_time() -> None:
    plain, packed = inputs(), inputs("adapter=qlora")
    each = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
    saved = sum(count * rows * (2 * columns - RowLayout(columns).num_bytes) for (rows, columns), count in each.items())
    assert (packed.packed_layer_savings, plain.packed_layer_savings, plain.packed_layer_parameters) == (saved, 0, 0)
    before, after = ({entry.name: entry for entry in build_ledger(s).device.terms} for s in (plain, packed))
    assert after["weights"].num_bytes == before["weights"].num_bytes - 32 * saved < before["weights"].num_bytes / 2.5
    assert before["layers, gathered"].num_bytes - after["layers, gathered"].num_bytes == saved
    wide = after["unpacked matrix"].by_phase
    assert wide[Phase.BACKWARD_MLP] == wide[Phase.FORWARD] == 2 * 14336 * 4096 + 6 * STRIP_NUMBERS and "unpacked matrix" not in before
    assert wide[Phase.BACKWARD_PROJECTIONS] == 2 * 4096 * 4096 + 6 * STRIP_NUMBERS
    assert after["optimizer states"] == before["optimizer states"] and packed.trained_parameters == plain.trained_parameters
    some = inputs("adapter=qlora", "adapter.quantized=[q_proj]")
    assert some.packed_layer_parameters == 4096 * 4096
