"""The table of activation classes: whole, in order, and the only place that names them."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path

import efflaunch
from efflaunch.memory.activation_classes import CLASSES, COMMON, LAYER_INPUT, RESIDUAL, activation_classes, after_attention
from efflaunch.memory.policy import KEPT, MOVED, MemoryPolicy, Split
from efflaunch.model.config import ModelConfig
from efflaunch.model.spec import model_spec

from .settings import LLAMA_8B

ROOT = Path(efflaunch.__file__).parent
FOLDERS = ("bench", "estimate", "launcher", "memory", "model", "parallel", "training")


def test_classes_are_made_from_earlier_ones() -> None:
    for index, kind in enumerate(CLASSES):
        assert set(kind.made_from) <= set(CLASSES[:index]) and bool(kind.made_from) == (kind is not LAYER_INPUT)
    assert after_attention(CLASSES) == CLASSES[CLASSES.index(RESIDUAL) :]
    assert activation_classes(model_spec(ModelConfig(**LLAMA_8B)))[: len(COMMON)] == COMMON


def test_a_policy_has_a_split_for_each_class() -> None:
    names = [kind.name for kind in CLASSES]
    assert len(set(names)) == len(names)
    assert set(names) == {field.name for field in fields(MemoryPolicy) if isinstance(getattr(MemoryPolicy(), field.name), Split)}
    policy = MemoryPolicy().with_splits(dict.fromkeys(names, MOVED))
    assert list(policy.splits) == names and all(policy.split(kind) == MOVED for kind in CLASSES)


def test_a_decision_is_kept_whatever_the_policy() -> None:
    routing = replace(RESIDUAL, name="routing", decision=True)
    assert all(policy.split(routing) == KEPT for policy in (MemoryPolicy(), MemoryPolicy(residual=MOVED)))


def test_no_other_source_spells_their_names() -> None:
    """`layer_input`, `attention_output` are keys of a configuration as well, and `residual` is a step of a layer.

    `mlp` also names matrices that adapters are put beside (model/adapters/names.py).
    """
    names = {kind.name for kind in CLASSES} - {"layer_input", "attention_output", "residual"}
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        if path.name == "activation_classes.py" or path == ROOT / "model" / "adapters" / "names.py":
            continue
        spelt = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)} & names
        assert not spelt, f"{path}: {spelt}"
