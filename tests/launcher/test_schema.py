"""Plain data to the configuration and back, and what a wrong key or value is answered."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from efflaunch.errors import EXIT_USER, ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.run_config import Config
from efflaunch.launcher.config.schema import config_keys, dump_config, load_config


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return dump_config(compose(["+experiment=quickstart"]))


def with_value(plain: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(plain)
    inner = data
    *parents, leaf = key.split(".")
    for parent in parents:
        inner = inner[parent]
    inner[leaf] = value
    return data


def test_round_trip_through_yaml(plain: dict[str, Any]) -> None:
    config = load_config(plain)
    assert isinstance(config, Config)
    assert load_config(yaml.safe_load(yaml.safe_dump(dump_config(config)))) == config
    assert dump_config(config) == plain


@settings(max_examples=50, deadline=None)
@given(
    lr=st.floats(1e-9, 1e3),
    betas=st.lists(st.floats(0, 1, exclude_max=True), max_size=3),
    seed=st.integers(0, 2**63),
    text=st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"))),
)
def test_round_trip_of_any_value(plain: dict[str, Any], lr: float, betas: list[float], seed: int, text: str) -> None:
    data = with_value(with_value(with_value(plain, "optim.lr", lr), "optim.betas", betas), "train.seed", seed)
    data = with_value(data, "model.extra", {"note": text, "nested": {"a": [1, None, True]}})
    assert dump_config(load_config(yaml.safe_load(yaml.safe_dump(data)))) == data


@pytest.mark.parametrize(
    ("key", "value", "loaded"),
    [
        ("data.max_seq_len", "1M", 1 << 20),
        ("data.global_batch_tokens", "32K", 1 << 15),
        ("cluster.device_memory_bytes", "80GiB", 80 << 30),
        ("cluster.device_memory_bytes", "80GB", 80_000_000_000),
        ("launcher.grace_s", "15m", 900.0),
        ("launcher.grace_s", 90, 90.0),
        ("optim.lr", "3e-4", 3e-4),
        ("optim.lr", 1, 1.0),
        ("optim.grad_clip", None, None),
        ("train.steps", 20.0, 20),
        ("logging.wandb", False, "off"),
        ("memory.activations", "recompute", "recompute"),
    ],
)
def test_values_as_people_write_them(plain: dict[str, Any], key: str, value: Any, loaded: Any) -> None:
    group, name = key.split(".")
    assert dump_config(load_config(with_value(plain, key, value)))[group][name] == loaded


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", "ten", "train.steps: found the text 'ten'; expected a whole number, 1 or more, at most"),
        ("train.steps", True, "train.steps: found the truth value True; expected a whole number, 1 or more, at most"),
        ("train.steps", None, "train.steps: found null; expected a whole number, 1 or more, at most"),
        ("train.steps", 1.5, "train.steps: found the number 1.5; expected a whole number, 1 or more, at most"),
        ("optim.lr", "fast", "optim.lr: found the text 'fast'; expected a number, more than 0, at most 1e+38."),
        ("data.prefixes", "a", "data.prefixes: found the text 'a'; expected a list, [a,b]."),
        ("data.prefixes", [1], "data.prefixes[0]: found the number 1; expected a text."),
        ("data.max_seq_len", "1Q", "data.max_seq_len: found the text '1Q'; expected tokens as a number or like 8192, 8K, 1M, 2 or more,"),
        (
            "memory.activations",
            "kep",
            "memory.activations: found the text 'kep'; expected one of keep, host, recompute.\n  Try: memory.activations=keep",
        ),
        ("logging.tensorboard", "yes please", "logging.tensorboard: found the text 'yes please'; expected true or false."),
        ("model.rope_scaling", 4, "model.rope_scaling: found the number 4; expected a group of keys."),
        ("train", 3, "train: found the number 3; expected a group of keys."),
    ],
)
def test_wrong_values(plain: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(with_value(plain, key, value))
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == EXIT_USER


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.stepps", "train.steps"),
        ("data.max_seq_lenn", "data.max_seq_len"),
        ("seq_len", "data.max_seq_len"),
        ("grad_clip", "optim.grad_clip"),
        ("optimizer", "optim"),
    ],
)
def test_unknown_key_names_the_nearest(plain: dict[str, Any], key: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(with_value(plain, key, 1))
    assert str(caught.value).startswith(f"{key}: found an unknown key; expected a key of ")
    assert caught.value.hint.startswith(f"did you mean {suggestion}")


def test_missing_key(plain: dict[str, Any]) -> None:
    data = copy.deepcopy(plain)
    del data["train"]["steps"]
    with pytest.raises(ConfigError, match=r"^train\.steps: found no value; expected a value: this key has no default"):
        load_config(data)


def test_every_key_is_listed(plain: dict[str, Any]) -> None:
    listed = set(config_keys())
    assert listed == set(_leaves(plain, listed))


def _leaves(data: dict[str, Any], keys: set[str], path: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict) and f"{path}{key}" not in keys:
            yield from _leaves(value, keys, f"{path}{key}.")
        else:
            yield f"{path}{key}"
