"""How even the use of experts is, from counts of rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from efflaunch.memory.executor.mixture import ExpertLoad
from efflaunch.training.reporting.expert_balance import agreed_rows, balance, balance_fields, drops


def test_even_use_is_one() -> None:
    assert balance([[5, 5, 5, 5], [1, 1, 1, 1]], (2, 3)) == {
        "expert_load": 1.0,
        "expert_load_layer": 2,
        "expert_load_mean": 1.0,
        "idle_experts": 0,
    }


def test_the_busiest_expert_is_named_with_its_layer() -> None:
    numbers = balance([[4, 4, 4, 4], [0, 0, 12, 4], [3, 3, 5, 5]], (1, 4, 5))
    assert numbers["expert_load"] == 3.0 and numbers["expert_load_layer"] == 4 and numbers["idle_experts"] == 2
    assert numbers["expert_load_mean"] == (1.0 + 3.0 + 1.25) / 3


def test_a_step_without_tokens_divides_by_nothing() -> None:
    assert balance([[0, 0]], (0,)) == {"expert_load": 0.0, "expert_load_layer": 0, "expert_load_mean": 0.0, "idle_experts": 2}


def test_models_without_experts_have_none_and_send_nothing() -> None:
    nothing: Any = None
    dense: Any = SimpleNamespace(has_experts=False)
    assert agreed_rows(ExpertLoad(), nothing) == (None, ()) and balance_fields(dense, None, (), nothing) == {}


def test_dropped_rows_are_counted_of_all_that_were_wanted() -> None:
    assert drops([[4, 4, 1], [8, 0, 3]]) == {"dropped_rows": 4, "dropped_share": 0.25}
    assert drops([[0, 0, 0]]) == {"dropped_rows": 0, "dropped_share": 0.0}
