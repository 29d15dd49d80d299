"""Cost models read back from files that people and crashes damage."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from efflaunch.parallel.sequence.cost import CostModel, DegreeCost
from efflaunch.parallel.sequence.stored import load_cost

DEGREES = (
    DegreeCost(degree=1, ulysses=1, attention_s=1e-9, linear_s=1e-6, windowed_s=((64, 1e-9),)),
    DegreeCost(degree=2, ulysses=1, attention_s=1e-9, linear_s=1e-6, ring_s=1e-7),
)
COST = CostModel(world_size=2, tokens_per_rank=512, degrees=DEGREES, excluded=((4, "too many"),), beta_s=1e-3)


def stored() -> dict[str, Any]:
    return json.loads(json.dumps(asdict(COST)))  # type: ignore[no-any-return]


def test_what_was_stored_is_read_back() -> None:
    assert load_cost(stored()) == COST


@pytest.mark.parametrize("name", [name for name in stored() if name != "source"])
@pytest.mark.parametrize("value", [None, "x", [None], {}, float("nan"), True], ids=str)
def test_what_is_no_cost_model_is_refused(name: str, value: Any) -> None:
    if (name, value) == ("excluded", {}):
        # No rows.
        return
    with pytest.raises(ValueError, match="cost model|not enough|unpack|degree|found|convert|invalid"):
        load_cost({**stored(), name: value})


def test_rows_and_whole_models_that_are_none_are_refused() -> None:
    for row in (None, {}, {"degree": 1}, {**stored()["degrees"][0], "linear_s": "x"}, {**stored()["degrees"][0], "windowed_s": [[1]]}):
        with pytest.raises(ValueError):
            load_cost({**stored(), "degrees": [row]})
    for data in (None, [], {}, {"degrees": []}):
        with pytest.raises(ValueError, match="no cost model"):
            load_cost(data)  # type: ignore[arg-type]
