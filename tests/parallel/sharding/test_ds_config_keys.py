"""The table of keys is whole: what the installed DeepSpeed reads is in it, by every name it has. Its sources are read, not run."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from efflaunch.launcher.config.schema import config_keys
from efflaunch.parallel.sharding.ds_config_keys import AGREES, FIXED, PASSED, TABLE, UNSUPPORTED, ZERO


def source(path: str) -> ast.Module:
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    return ast.parse((Path(spec.origin).parent / path).read_text())


def fields(path: str, name: str) -> Iterator[str]:
    """The keys of one of its groups, by both names where it has two."""
    (group,) = (node for node in ast.walk(source(path)) if isinstance(node, ast.ClassDef) and node.name == name)
    for node in group.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
            yield from (word.value.value for word in getattr(node.value, "keywords", ()) if word.arg == "alias")


def constants(path: str) -> dict[str, str]:
    """Its texts by the names of its constants."""
    assigned = [node for node in source(path).body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    return {node.targets[0].id: node.value.value for node in assigned if isinstance(node.value.value, str)}


def covered(name: str) -> bool:
    """Whether a row is of this key, of its group, or of keys in it."""
    return any(name == row or name.startswith(f"{row}.") or row.startswith(f"{name}.") for row in TABLE)


def test_every_key_of_zero_is_in_the_table() -> None:
    names = list(fields("runtime/zero/config.py", "DeepSpeedZeroConfig"))
    assert len(names) > 40 and [name for name in names if not covered(ZERO + name)] == []


def test_every_group_that_is_read_at_the_top_is_in_the_table() -> None:
    """Keys are read by `get_scalar_param(param_dict, NAME, ...)`, `NAME in param_dict` and `param_dict.get(NAME)`."""
    words = constants("runtime/constants.py")
    named = set()
    for node in ast.walk(source("runtime/config.py")):
        if isinstance(node, ast.Call) and any(isinstance(each, ast.Name) and each.id == "param_dict" for each in node.args):
            named |= {each.id for each in node.args if isinstance(each, ast.Name)}
        if isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) in ("param_dict", "param_dict.keys()"):
            named |= {each.id for each in ast.walk(node.left) if isinstance(each, ast.Name)}
    keys = {words[name] for name in named if name in words and not name.endswith("_DEFAULT")}
    assert {"train_batch_size", "torch_autocast", "gradient_allreduce_op", "wall_clock_breakdown"} <= keys
    assert [key for key in sorted(keys) if not covered(key)] == []


def test_what_it_has_given_up_is_in_the_table() -> None:
    (removed,) = (
        node.value
        for node in source("runtime/config.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_REMOVED_TOP_LEVEL_CONFIG_KEYS"
    )
    assert isinstance(removed, ast.Dict) and all(covered(ast.literal_eval(key)) for key in removed.keys if key is not None)


def test_each_key_stands_in_one_row_and_names_a_key_of_ours() -> None:
    rows = (*PASSED, *AGREES, *FIXED, *UNSUPPORTED)
    assert len({row.name for row in rows}) == len(rows) == len(TABLE)
    assert {row.ours for row in AGREES} <= set(config_keys())
    sent = {row.name for row in PASSED if row.sent_as is None}
    assert all(row.sent_as in sent for row in PASSED if row.sent_as is not None)
