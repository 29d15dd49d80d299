"""The cost model of FSMoE's testbeds against the milliseconds its paper prints."""

from __future__ import annotations

import pytest

from efflaunch.parallel.experts.cost import ExpertLayer, Operator
from efflaunch.parallel.experts.testbeds import DROPLESS, TESTBEDS

GPT2_XL = {"hidden": 1600, "ffn": 6400, "heads": 25, "products": 2}
MIXTRAL = {"hidden": 4096, "ffn": 14336, "heads": 32, "products": 3}
TABLE_2 = {
    # Milliseconds a layer forward, B=4, L=1024: both all-to-alls, all-reduce, all-gather, reduce-scatter, experts, attention.
    ("A", "GPT2-XL"): (6.9, 5.26, 4.6, 5.4, 3.1, 1.7),
    ("A", "Mixtral-7B"): (19.5, 26.45, 12.3, 13.7, 15.6, 4.1),
    ("B", "GPT2-XL"): (11.2, 7.3, 15.5, 15.7, 6.7, 4.5),
    ("B", "Mixtral-7B"): (28.3, 32.1, 39.6, 40.8, 58.5, 9.5),
}


def modelled_ms(testbed: str, model: str) -> tuple[float, ...]:
    sizes = GPT2_XL if model == "GPT2-XL" else MIXTRAL
    cost = TESTBEDS[testbed].cost(ExpertLayer(batch=4, tokens=1024, capacity=1.2, **sizes))
    of = {row.operator: 1e3 * row.seconds(1.0) for row in cost.forward}
    assert cost.gradient is not None
    # Grouped-query attention is not modelled: Mixtral's dense weights are 2.5 M^2, not 4 M^2.
    elements = cost.gradient.elements if model == "GPT2-XL" else 2.5 * sizes["hidden"] ** 2 / TESTBEDS[testbed].ranks_per_node
    return (
        of[Operator.DISPATCH] + of[Operator.COMBINE],
        1e3 * cost.gradient.seconds(elements),
        of[Operator.EXPERT_GATHER] + of[Operator.ATTENTION_GATHER],
        of[Operator.EXPERT_SCATTER] + of[Operator.ATTENTION_SCATTER],
        of[Operator.EXPERTS],
        of[Operator.ATTENTION],
    )


def test_the_model_fits_what_the_paper_printed() -> None:
    """Far off are attention of grouped queries (testbeds A and B, by 39 %) and GPT2-XL's small collectives and products on A."""
    errors = {
        (*layer, column): modelled / printed - 1
        for layer, columns in TABLE_2.items()
        for column, (modelled, printed) in enumerate(zip(modelled_ms(*layer), columns, strict=True))
    }
    assert len(errors) == 24 and sum(abs(error) <= 0.135 for error in errors.values()) >= 19
    assert max(map(abs, errors.values())) <= 0.40


@pytest.mark.parametrize("name", TESTBEDS)
def test_the_sweep_is_the_papers(name: str) -> None:
    layers = list(TESTBEDS[name].sweep())
    assert len(layers) == len(set(layers)) == 1458
    assert {layer.ffn // layer.hidden for layer in layers} == {2, 3, 4}
    assert {layer.capacity for layer in layers} == {1.2, 2.4, DROPLESS}
