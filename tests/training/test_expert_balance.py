"""How even the use of experts is, from counts of rows."""

from __future__ import annotations

from efflaunch.training.reporting.expert_balance import agreed_balance, balance


def test_even_use_is_one() -> None:
    assert balance([[5, 5, 5, 5], [1, 1, 1, 1]]) == {
        "expert_load": 1.0,
        "expert_load_layer": 0,
        "expert_load_mean": 1.0,
        "idle_experts": 0,
    }


def test_the_busiest_expert_is_named_with_its_layer() -> None:
    numbers = balance([[4, 4, 4, 4], [0, 0, 12, 4], [3, 3, 5, 5]])
    assert numbers["expert_load"] == 3.0 and numbers["expert_load_layer"] == 1 and numbers["idle_experts"] == 2
    assert numbers["expert_load_mean"] == (1.0 + 3.0 + 1.25) / 3


def test_a_step_without_tokens_divides_by_nothing() -> None:
    assert balance([[0, 0]]) == {"expert_load": 0.0, "expert_load_layer": 0, "expert_load_mean": 0.0, "idle_experts": 2}


def test_models_without_experts_have_none_and_send_nothing() -> None:
    assert agreed_balance(None, None) == {}  # type: ignore[arg-type]
