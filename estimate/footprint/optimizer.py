"""Optimizer states and what is left of gradients once they are taken, on the device and on the host. Pure."""

from __future__ import annotations

from ..muon import BYTES, muon_work
from ..optimizer_residency import IN_FLIGHT
from ..plan_inputs import PlanInputs, reduces_once
from .term import BACKWARD, Phase, Term, term


def weight_bytes(inputs: PlanInputs) -> int:
    """Bytes of one weight on the device, sharded: the master, or in compute precision where masters live on the host."""
    return inputs.width if inputs.residency.on_host else inputs.master


def moment_numbers(inputs: PlanInputs) -> float:
    """Numbers that the optimizer keeps of the stage's trained weights, over all shards."""
    return inputs.residency.state_numbers * inputs.trained_parameters - muon_work(inputs).parameters


def optimizer_states(inputs: PlanInputs) -> Term:
    """Optimizer states of one rank on the device."""
    each = 0.0 if inputs.residency.on_host else inputs.residency.moment_bytes or inputs.master
    return term("optimizer states", _states_note(inputs, each), each * moment_numbers(inputs) / inputs.layout.shard)


def _states_note(inputs: PlanInputs, each: float) -> str:
    share, several = f", 1/{inputs.layout.shard} of each", inputs.residency.state_numbers
    if inputs.residency.orthogonalise_steps:
        return f"float{8 * inputs.master}: momentum of matrices, two moments of the rest{share}"
    many = "two" if several == 2 else f"{several:g}"
    if inputs.residency.moment_bytes is None:
        return f"{many} float{8 * inputs.master} moment{'s' * (several != 1)}{share}"
    return f"{many} moments of {each:.3g} bytes a number{share}"


def whole_matrices(inputs: PlanInputs) -> Term:
    """Matrices that Muon orthogonalises, on their way or being worked on; 0 with another optimizer."""
    note = "bfloat16: sent, received and orthogonalised, the largest of a rank's rounds"
    return term("matrices, whole", note, BYTES * muon_work(inputs).live, (Phase.OPTIMIZER,))


def adds_up(inputs: PlanInputs) -> bool:
    """Whether reduced gradients of several micro-batches are added."""
    return inputs.layout.num_micro_batches > 1 and not reduces_once(inputs)


def gradients_left(inputs: PlanInputs, all_of_them: Term) -> Term:
    """Sharded gradients that are still on the device, of those that stay there to the end of the step."""
    layer, root = (
        inputs.master * _layer_numbers(inputs) // inputs.layout.shard,
        inputs.master * inputs.trained_root_parameters // inputs.layout.shard,
    )
    if inputs.residency.on_host:
        cast = inputs.width * _layer_numbers(inputs) // inputs.layout.shard if inputs.width < inputs.master else 0
        by_phase = dict.fromkeys(BACKWARD, min(IN_FLIGHT * layer, inputs.spec.num_layers * layer) + cast) | {Phase.REDUCE: root + layer}
        return Term(all_of_them.name, "on their way to the host, a few layers at a time", by_phase)
    if inputs.residency.in_backward:
        if adds_up(inputs):
            return Term(all_of_them.name, all_of_them.note, all_of_them.by_phase | {Phase.OPTIMIZER: 0})
        return Term(all_of_them.name, "freed layer by layer", dict.fromkeys(BACKWARD, layer) | {Phase.REDUCE: root})
    return all_of_them


def host_optimizer_bytes(inputs: PlanInputs) -> int:
    """Host bytes of one rank's optimizer: weights, moments, gradients that wait or add up, and page-locked buffers for what travels."""
    if not inputs.residency.on_host:
        return 0
    waiting = inputs.master if not inputs.residency.in_backward or adds_up(inputs) else 0
    moving = (inputs.master + inputs.width) * (IN_FLIGHT * _layer_numbers(inputs) + inputs.trained_root_parameters)
    return int((inputs.trained_parameters * (inputs.residency.state_bytes(inputs.master) + waiting) + moving) / inputs.layout.shard)


def _layer_numbers(inputs: PlanInputs) -> int:
    """Trained weights of the largest decoder layer, those on other ranks counted."""
    return inputs.layer_parameters if inputs.trains_all else inputs.trained_layer_parameters
