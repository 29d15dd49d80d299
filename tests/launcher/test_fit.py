"""Machines that cannot run what is asked for, and what they are told to type instead."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from efflaunch.cluster.config import Device
from efflaunch.errors import EXIT_USER, ConfigError
from efflaunch.estimate.footprint.host import arena_bytes
from efflaunch.launcher.config.checks import check_config
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import plan
from efflaunch.launcher.hardware import Machine, available_memory, this_machine
from efflaunch.launcher.machine_checks import MachineError, check_free, check_machine, check_node, local_overrides
from efflaunch.launcher.visible_gpus import Gpu
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S

GIB = 1 << 30
EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))
NO_GPU = Machine((), 2, 16 * GIB)


def gpus(count: int, gib: float) -> Machine:
    return Machine(tuple(Gpu("H100", int(gib * GIB)) for _ in range(count)), 64, 1000 * GIB)


def test_no_gpu() -> None:
    with pytest.raises(MachineError) as caught:
        check_machine(compose(["+experiment=llama8b_1M"]), NO_GPU)
    error = caught.value
    assert str(error).startswith(
        "llama8b_1M: needs 8 GPUs with 79.1 GiB, found none.\n  Try: efflaunch plan +experiment=llama8b_1M to see what it needs"
    )
    assert error.exit_code == EXIT_USER
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("machine", "found"),
    [(gpus(4, 79.6), "found 4 with 79.6 GiB."), (gpus(8, 39.4), "found 8 with 39.4 GiB."), (gpus(1, 10), "found 1 with 10 GiB.")],
)
def test_too_few_or_too_small(machine: Machine, found: str) -> None:
    with pytest.raises(MachineError, match=re.escape(f"llama8b_1M: needs 8 GPUs with 79.1 GiB, {found}")):
        check_machine(compose(["+experiment=llama8b_1M"]), machine)


def test_one_node_of_several() -> None:
    config = compose(["+experiment=llama70b_512k"])
    assert config.cluster.num_nodes > 1
    total = config.cluster.num_nodes * config.cluster.ranks_per_node
    nodes = config.cluster.num_nodes
    message = f"needs {total} GPUs with 79.1 GiB on {nodes} nodes, found 8 with 79.6 GiB on this machine, which is one node."
    with pytest.raises(MachineError, match=re.escape(message)):
        check_machine(config, gpus(8, 79.6))


def test_a_node_of_several() -> None:
    config = compose(["+experiment=llama70b_512k"])
    check_node(config, gpus(8, 79.6))
    check_free(config, gpus(8, 79.6))
    busy = Machine((*gpus(7, 79.6).gpus, Gpu("H100", int(79.6 * GIB), 12 * GIB)), 64, 1000 * GIB)
    with pytest.raises(MachineError, match=r"GPUs: needs 8 with nothing on them, found 7 free; one of the others has 12\.0 GiB left"):
        check_free(config, busy)


def test_several_nodes_without_a_scheduler() -> None:
    config = compose(["+experiment=quickstart", "cluster.num_nodes=2"])
    with pytest.raises(MachineError, match=r"needs 2 nodes, found this machine, which is one node\.\n  Try: launcher=slurm on a SLURM"):
        check_machine(config)


def test_enough_gpus() -> None:
    """As many as it has ranks, and not one less."""
    config = compose(["+experiment=llama8b_1M"])
    check_machine(config, gpus(8, 79.6))
    with pytest.raises(MachineError, match="needs 8 GPUs with 79.1 GiB, found 7 with 79.6 GiB"):
        check_machine(config, gpus(7, 79.6))


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if not name.startswith("quickstart")])
def test_what_is_suggested_composes_and_runs_here(experiment: str) -> None:
    """The message's own last line is what a person pastes."""
    with pytest.raises(MachineError) as caught:
        check_machine(compose([f"+experiment={experiment}"]), NO_GPU)
    typed = caught.value.hint.splitlines()[-1].split()
    assert typed[0] == "efflaunch"
    config = compose(typed[1:])
    check_config(config)
    check_machine(config, NO_GPU)
    assert config.experiment == experiment and config.cluster.device is Device.CPU and config.data.builtin is not None


def test_a_layout_that_does_not_suit_this_machine_is_reset() -> None:
    config = compose(
        [
            "+experiment=llama8b_1M",
            "parallel.sp_degree=8",
            "parallel.scheme=hybrid",
            "parallel.ulysses_degree=4",
            "parallel.replicate=1",
            "parallel.shard=8",
        ]
    )
    here = compose(["+experiment=llama8b_1M", *local_overrides(config)])
    check_machine(here, NO_GPU)
    assert here.cluster.device is Device.CPU and here.parallel.ulysses_degree is None and here.parallel.sp_degree is None


def test_too_many_ranks_for_the_cores() -> None:
    config = compose(["+experiment=quickstart", "cluster.ranks_per_node=16"])
    with pytest.raises(MachineError) as caught:
        check_machine(config, NO_GPU)
    assert str(caught.value) == (
        "cluster.ranks_per_node: needs 4 cores for 16 ranks, found 2 (at most 4 ranks a core).\n  Try: cluster.ranks_per_node=8"
    )
    check_machine(compose(["+experiment=quickstart", "cluster.ranks_per_node=8"]), NO_GPU)


def test_too_many_ranks_for_the_memory() -> None:
    config = compose(["+experiment=quickstart"])
    each = plan(config).device.peak_bytes
    with pytest.raises(MachineError) as caught:
        check_machine(config, Machine((), 8, int(3.1 * each)))
    assert re.match(
        r"quickstart: needs \d\.\d GiB of memory for 4 ranks, found \d\.\d GiB free\.\n  Try: cluster\.ranks_per_node=", str(caught.value)
    )
    check_machine(compose(["+experiment=quickstart", *caught.value.hint.split()]), Machine((), 8, int(3.1 * each)))


@pytest.mark.parametrize("words", [["memory=memo", "memory.host_fraction=1.0"], ["optim.state_device=host"]])
def test_what_waits_on_the_host_is_this_machines_memory_too(words: list[str]) -> None:
    """Ranks without a GPU share one memory with what they move out of their own."""
    config = compose(["+experiment=quickstart", *words])
    terms = {entry.name: entry.num_bytes for entry in plan(config).host.terms}
    waiting = sum(size for name, size in terms.items() if name.endswith("on the host"))
    assert waiting > 0
    check_machine(config, Machine((), 8, terms["ranks"] + terms["data staging"] + waiting))
    with pytest.raises(MachineError, match="of memory for 4 ranks"):
        check_machine(config, Machine((), 8, terms["ranks"] + terms["data staging"] + waiting // 2))


def test_nothing_fits_in_no_memory() -> None:
    with pytest.raises(MachineError, match=r"a smaller model, data.max_seq_len or parallel.tokens_per_rank"):
        check_machine(compose(["+experiment=quickstart"]), Machine((), 8, 1 << 20))


def test_the_quickstart_runs_on_a_laptop() -> None:
    """Two cores and 5 of 8 GiB are enough, and it is known what is not."""
    config = compose(["+experiment=quickstart"])
    terms = {entry.name: entry.num_bytes for entry in plan(config).host.terms}
    needed = terms["ranks"] + terms["data staging"]
    assert needed < 5 * GIB
    check_machine(config, Machine((), 2, needed))
    with pytest.raises(MachineError, match="of memory for 4 ranks"):
        check_machine(config, Machine((), 2, needed // 2))


def test_this_machine_is_looked_at() -> None:
    here = this_machine(Device.CPU)
    assert here.gpus == () and here.num_cores >= 1
    assert (1 << 20) < available_memory() < (1 << 50)


BAD = [
    (["data.global_batch_tokens=4K"], "data.global_batch_tokens: found 4K; expected at least data.max_seq_len=8K"),
    (["parallel.sequence=static", "parallel.sp_degree=3"], "parallel.sp_degree: found 3; expected a power of two up to 4 (4 ranks)"),
    (["parallel.sp_degree=2"], "parallel.sp_degree: found 2 with parallel.sequence=adaptive; expected null"),
    (["parallel.barrier_free=true", "parallel.grad_reduce=micro_batch"], "parallel.grad_reduce: found micro_batch with"),
    (["parallel.replicate=3"], "parallel.replicate: found 3 copies over 4 ranks"),
    (["parallel.shard=3"], "parallel.shard: found replicate 1 x shard 3 = 3 ranks; expected 4 ranks"),
    (["parallel.tokens_per_rank=1K"], "parallel.tokens_per_rank: found 1K x 4 ranks = 4K tokens"),
    (["model.num_kv_heads=3"], "model.num_kv_heads: found 3 KV heads for 8 heads"),
    (
        ["parallel.sequence=static", "cluster.ranks_per_node=16", "parallel.sp_degree=16", "parallel.scheme=ulysses"],
        "parallel.sp_degree: found 16 Ulysses ranks for 8 attention heads",
    ),
    (["model.extra.attention_dropout=0.1"], "model.extra.attention_dropout: found 0.1; expected 0"),
    (["train.loss_chunk_tokens=0"], "train.loss_chunk_tokens: found 0; expected 1 or more"),
    (["train.steps=0"], "train.steps: found 0; expected 1 or more"),
    (["parallel.scheme=hybrid"], "parallel.ulysses_degree: found nothing with parallel.scheme=hybrid"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=lambda value: str(value)[:40])
def test_compose_refuses_what_does_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(["+experiment=quickstart", *overrides])


def test_where_activations_are_to_be_moved_is_looked_at_before_ranks_start(tmp_path: Path) -> None:
    words = ["+experiment=quickstart", "memory=alst"]
    check_machine(compose([*words, f"memory.offload_dir={tmp_path}"]), NO_GPU)
    with pytest.raises(ConfigError, match=r"memory.offload_dir=.*none: found no such file or directory.*\n.*mkdir -p"):
        check_machine(compose([*words, f"memory.offload_dir={tmp_path}/none"]), NO_GPU)
    with pytest.raises(ConfigError, match=r"memory.offload_dir=/proc: found 0 B free"):
        check_machine(compose([*words, "memory.offload_dir=/proc"]), NO_GPU)


def test_nothing_is_looked_at_where_nothing_is_moved() -> None:
    config = compose(["+experiment=quickstart", "memory=keep", "memory.offload_dir=/nonesuch"])
    check_machine(config, NO_GPU)
    assert not arena_bytes(plan(config).inputs)
    with pytest.raises(ConfigError, match="memory.offload_dir=/nonesuch: found no such file or directory"):
        check_machine(compose(["+experiment=quickstart", "memory=alst", "memory.offload_dir=/nonesuch"]), NO_GPU)


def test_looking_at_the_directory_imports_no_torch() -> None:
    code = (
        "import sys; from efflaunch.launcher.config.compose import compose; from efflaunch.launcher.machine_checks import check_machine;"
        "check_machine(compose(['+experiment=quickstart', 'memory=alst', 'memory.offload_dir=/tmp'])); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=ENDS_S, check=True)
    assert done.stdout.split()[-1] == "False"
