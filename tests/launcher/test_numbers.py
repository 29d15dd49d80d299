"""Every numeric key of the schema with numbers that make no sense: refused with its range, or one that works."""

from __future__ import annotations

import math
import os
import typing
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from efflaunch.errors import EXIT_USER, ConfigError, UserError
from efflaunch.launcher.config.compose import check_config, compose
from efflaunch.launcher.config.node_range import resolve_nodes
from efflaunch.launcher.config.run_config import Config
from efflaunch.launcher.config.schema import dump_config, load_config, walk_fields
from efflaunch.tests.launcher.test_schema import with_value
from efflaunch.utils.ranges import Range, ranges_of

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "numeric_ranges.txt"
UPDATE = "EFFLAUNCH_UPDATE_GOLDEN"
NONSENSE: tuple[Any, ...] = (0, -1, -0.5, math.nan, math.inf, -math.inf, 10**30, 10**5000, 1e308, "nan", "1e400", "-1h", "0:0", True)
TAKES_ZERO = {
    "cluster.reserve",
    *(
        "train.seed",
        "train.z_loss",
        "train.router_balance",
        "train.router_z_loss",
        "train.router_bias_rate",
        "train.label_smoothing",
        "train.dpo_label_smoothing",
        "train.dpo_sft_weight",
        "train.grpo_kl_weight",
        "eval.needles.depths",
        "eval.needles.seed",
        "adapter.dropout",
        "optim.betas",
        "optim.weight_decay",
        "parallel.probe_s",
        "optim.warmup_steps",
        "optim.min_lr_ratio",
        "optim.muon_momentum",
    ),
    *("parallel.plan_timeout_s", "memory.host_fraction", "memory.host_budget", "checkpoint.max_slowdown"),
    *("launcher.max_restarts", "launcher.slurm.max_preemptions", "launcher.slurm.max_excluded", "launcher.ray.max_preemptions"),
    *("launcher.ray.max_excluded", "launcher.ray.placement_timeout_s", "launcher.ray.max_upload_bytes", "launcher.ray.driver_cpus"),
}
"""Keys whose zero means something: none, at once, or from the first on."""


def is_numeric(hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (int, float) or origin is Annotated:
        return True
    return origin is not None and any(is_numeric(argument) for argument in arguments)


def numeric_keys() -> dict[str, Any]:
    return {key: hint for key, hint, _ in walk_fields() if is_numeric(hint)}


def all_ranges(kind: type = Config, path: str = "") -> dict[str, Range]:
    ranges = {f"{path}{name}": allowed for name, allowed in ranges_of(kind).items()}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if hasattr(hint, "__dataclass_fields__"):
            ranges |= all_ranges(typing.cast(type, hint), f"{path}{name}.")
    return ranges


def test_every_numeric_key_has_a_range_as_recorded() -> None:
    """EFFLAUNCH_UPDATE_GOLDEN=1 writes the file anew."""
    ranges = all_ranges()
    text = "".join(f"{key}: {ranges[key]}\n" for key in numeric_keys())
    if os.environ.get(UPDATE):
        GOLDEN.write_text(text)
    assert set(ranges) == set(numeric_keys())
    assert text == GOLDEN.read_text()
    assert {key for key, allowed in ranges.items() if 0 in allowed} == TAKES_ZERO


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return dump_config(compose(["+experiment=quickstart"]))


@pytest.mark.parametrize("key", numeric_keys())
def test_nonsense_is_refused_or_right(plain: dict[str, Any], key: str) -> None:
    allowed, hint = all_ranges()[key], numeric_keys()[key]
    for number in NONSENSE:
        value: Any = number
        if "list" in str(hint):
            value = [number, number]
        elif "dict" in str(hint):
            value = {"thing": number}
        data = with_value(plain, key, value)
        numbers = isinstance(number, (int, float)) and not isinstance(number, bool)
        if numbers and number in allowed and (float(number).is_integer() or "float" in str(hint)):
            # Right by itself; with the other keys it is right, or refused as a mistake of the user.
            config = resolve_nodes(load_config(data))
            try:
                check_config(config)
            except UserError as error:
                assert error.exit_code == EXIT_USER
            continue
        with pytest.raises(ConfigError) as caught:
            load_config(data)
        error = caught.value
        assert error.where.startswith(key) and str(allowed) in error.expected, (number, str(error))
        assert error.hint.startswith(f"{key}=") and error.found, str(error)


def test_numbers_inside_free_values_are_finite(plain: dict[str, Any]) -> None:
    for key in ("model.rope_scaling", "model.extra"):
        with pytest.raises(ConfigError, match=rf"^{key}\.a\[1\]: found a number that is not one \(NaN\); expected a finite number"):
            load_config(with_value(plain, key, {"a": [1.0, math.nan]}))


def test_what_is_said(plain: dict[str, Any]) -> None:
    def message(key: str, value: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(with_value(plain, key, value))
        return str(caught.value)

    assert message("checkpoint.keep_every", 0) == (
        "checkpoint.keep_every: found 0; expected 1 or more, at most 1,000,000,000,000.\n"
        "  Try: checkpoint.keep_every=null, or a number such as 1000"
    )
    assert message("optim.lr", math.nan) == (
        "optim.lr: found a number that is not one (NaN); expected more than 0, at most 1e+38.\n  Try: optim.lr=0.0003, or what you need"
    )
    assert message("optim.betas", [0.9, 1]) == "optim.betas[1]: found 1; expected 0 to below 1.\n  Try: optim.betas=[0.9,0.95]"
    assert (
        message("launcher.nodes", "2:0")
        == "launcher.nodes: found 0; expected 1 or more, at most 65,536.\n  Try: launcher.nodes=null, or a number such as 1"
    )
    assert message("launcher.grace_s", "-5m").startswith(
        "launcher.grace_s: found the text '-5m'; expected seconds as a number or like 90, 15m, 4h, more than 0, at most 1.2096e+06."
    )
