"""What of torch is private or young, where it is used, and that the lowest torch of pyproject.toml has it.

The suite runs on the torch of constraints.txt; of older ones the wheels of 2.11.0 and 2.12.0 were read, and SINCE says what they lack.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from efflaunch.tests.test_house import ROOT, name, sources

FOLDERS = ("checkpoint", "cluster", "estimate", "launcher", "memory", "model", "parallel", "training", "utils")
"""What users run; bench/ and tests/ go by the pinned torch."""
PRIVATE = {
    "torch.Tensor._make_wrapper_subclass": "checkpoint/flat.py",
    "torch._C._GLIBCXX_USE_CXX11_ABI": "memory/arena/build.py",
    "torch._dynamo.exc.TorchDynamoException": "memory/executor/compiled_graph.py",
    "torch._dynamo.mark_dynamic": "memory/executor/compiled_graph.py",
    "torch._foreach_mul_": "training/optimizers/device.py",
    "torch._grouped_mm": "memory/executor/grouped.py",
    "torch._inductor.cpp_builder.get_cpp_compiler": "memory/executor/compiled_graph.py",
    "torch._inductor.exc.InvalidCxxCompiler": "memory/executor/compiled_graph.py",
    "torch._subclasses.fake_tensor.FakeTensorMode": "memory/arena/fake.py",
    "torch.distributed.checkpoint.filesystem._StorageInfo": "checkpoint/archive.py",
    "torch.distributed.distributed_c10d._get_default_store": "checkpoint/rank_coordination.py",
    "torch.distributed.distributed_c10d._set_pg_timeout": "parallel/topology.py",
    "torch.distributed.fsdp._fully_shard._fsdp_common.FSDPMeshInfo": "parallel/sharding/experts.py",
    "torch.distributed.fsdp._fully_shard._fsdp_common.HSDPMeshInfo": "parallel/sharding/experts.py",
    "torch.distributed.fsdp._fully_shard._fsdp_common.ShardPlacementResult": "parallel/sharding/experts.py",
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset": "parallel/sharding/parts.py",
    "torch.ops.aten._flash_attention_backward": "parallel/sequence/flash.py",
    "torch.ops.aten._flash_attention_forward": "parallel/sequence/flash.py",
    "torch.ops.aten._scaled_dot_product_cudnn_attention": "parallel/sequence/flash.py",
    "torch.ops.aten._scaled_dot_product_cudnn_attention_backward": "parallel/sequence/flash.py",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "parallel/sequence/attention.py",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": "parallel/sequence/attention.py",
    "torch.utils._python_dispatch.TorchDispatchMode": "memory/arena/fake.py memory/arena/tracer.py model/proof/wide_floats.py",
    "torch.utils._pytree.tree_iter": "memory/arena/tracer.py",
    "torch.utils._triton.has_triton": "memory/executor/compiled_graph.py",
}
"""Every private name of torch that the sources import or call, and the places that may."""
OF_OBJECTS = {
    "torch.distributed.fsdp.FSDPModule": "reset_iter_state _get_fsdp_state",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState": "_fsdp_param_groups",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup": "fsdp_params reshard_after_backward",
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam": "_unsharded_param unsharded_accumulated_grad unsharded_param",
    "torch.distributed.elastic.agent.server.local_elastic_agent.LocalElasticAgent": "_start_workers _monitor_workers",
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous.StaticTCPRendezvous": "_store",
}
"""Names of torch's objects that parallel/sharding/fsdp2.py and launcher/agent/elastic.py read or replace, in no documentation of torch."""
SINCE = {
    "torch.distributed.fsdp.FSDPModule.reset_iter_state": (2, 13),
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState._fsdp_param_groups": (2, 12),
    "torch.distributed.fsdp._fully_shard._fsdp_common.ShardPlacementResult": (2, 12),
    "torch.nn.attention.activate_flash_attention_impl": (2, 11),
    "torch.nn.attention.current_flash_attention_impl": (2, 11),
    "torch.nn.attention.restore_flash_attention_impl": (2, 11),
}
"""The first torch that has what older ones lack."""
ARGUMENTS = {
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
    "_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state"
    " unused",
    "_scaled_dot_product_cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask",
    "_scaled_dot_product_cudnn_attention_backward": "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q"
    " cum_seq_k max_q max_k dropout_p is_causal",
    "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "grad_out query key value out logsumexp dropout_p is_causal",
}
"""Arguments of torch's attention operators by their places, as parallel/sequence calls them: those of 2.11, 2.12 and 2.13."""


def is_private(dotted: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in dotted.split("."))


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Dotted names of torch with a private part that a file imports, or reaches from a module it imports."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.partition(".")[0] == "torch"]
            known |= {alias.asname or "torch": alias.name if alias.asname else "torch" for alias in names}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "torch":
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    yield from (dotted for dotted in known.values() if is_private(dotted))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            head, _, rest = ast.unparse(node).partition(".")
            if head in known and all(part.isidentifier() for part in rest.split(".")):
                yield f"{known[head]}.{rest}"


def resolved(dotted: str) -> Any:
    """What a dotted name stands for in this torch."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return found
    raise AssertionError(dotted)


def version(requirement: str) -> tuple[int, ...]:
    """The number of `torch>=2.13` or `torch==2.13.0`: major and minor."""
    found = re.fullmatch(r"torch[>=]=(\d+)\.(\d+).*", requirement)
    assert found is not None, requirement
    return int(found[1]), int(found[2])


def floor() -> tuple[int, ...]:
    """The lowest torch that the package installs beside."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch_line,) = [line for line in project["dependencies"] if line.startswith("torch>")]
    return version(torch_line)


def test_private_names_are_used_where_the_table_says() -> None:
    found: dict[str, set[str]] = {}
    for path in sources(*FOLDERS):
        for dotted in private_uses(ast.parse(path.read_text())):
            found.setdefault(dotted, set()).add(name(path))
    found.pop("torch._C")  # on the way to what is asked of it
    assert found == {dotted: set(places.split()) for dotted, places in PRIVATE.items()}


@pytest.mark.parametrize(
    "code, uses",
    [
        ("from torch._inductor import exc", ["torch._inductor.exc"]),
        ("import torch\ntorch._grouped_mm(a, b)", ["torch._grouped_mm"]),
        ("import torch.distributed as dist\nx = dist.distributed_c10d._world", ["torch.distributed.distributed_c10d._world"]),
        ("import torch\nself._x = torch.ones(1)._y", []),
        ("from .torch import _other", []),
    ],
)
def test_a_private_use_is_found(code: str, uses: list[str]) -> None:
    assert list(private_uses(ast.parse(code))) == uses


@pytest.mark.parametrize("dotted", PRIVATE)
def test_this_torch_has_it(dotted: str) -> None:
    assert resolved(dotted) is not None


@pytest.mark.parametrize("owner", OF_OBJECTS)
def test_objects_of_this_torch_have_it(owner: str) -> None:
    """A method or property of the class, or made by it."""
    kind = resolved(owner)
    made = [each for each in OF_OBJECTS[owner].split() if not hasattr(kind, each)]
    text = inspect.getsource(kind) if made else ""
    assert [each for each in made if not re.search(rf"self\.{each}\b|\b{each}:", text)] == []


def test_the_floor_has_everything() -> None:
    """Nothing that is used is younger than the lowest torch; the one that all tests run on is no older than it."""
    assert floor() == max(SINCE.values())
    of_objects = {f"{owner}.{each}" for owner, names in OF_OBJECTS.items() for each in names.split()}
    assert {dotted for dotted in SINCE if is_private(dotted)} <= PRIVATE.keys() | of_objects
    (pinned,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert version(pinned) >= floor()
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= floor()


@pytest.mark.parametrize("operator", ARGUMENTS)
def test_operators_take_their_arguments_in_these_places(operator: str) -> None:
    schema = getattr(torch.ops.aten, operator).default._schema
    wanted = ARGUMENTS[operator].split()
    assert [argument.name for argument in schema.arguments][: len(wanted)] == wanted
    after = {argument.name for argument in schema.arguments if argument.kwarg_only}
    assert "scale" in after and (not operator.startswith("_flash") or {"window_size_left", "window_size_right"} <= after)
