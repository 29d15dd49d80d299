"""launcher.nodes=MIN:MAX: how many nodes an attempt gets, and what becomes of its layout and memory plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from efflaunch.errors import ConfigError, PlanError
from efflaunch.launcher.config.compose import changed, compose
from efflaunch.launcher.config.ledger import plan
from efflaunch.launcher.config.node_range import NodeRange, node_range
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.run_config import Config
from efflaunch.launcher.config.schema import dump_config, load_config
from efflaunch.launcher.elastic_nodes import MemoryCheck, check_nodes_memory, size_for, sized, usable
from efflaunch.launcher.rundir.run_dir import make_run_dir, read_attempt, read_run, store_config, write_attempt
from efflaunch.units import parse_nodes

BASE = ("+experiment=quickstart", "launcher=slurm", "cluster.ranks_per_node=2")
LARGE = ("+experiment=llama70b_512k", "launcher=slurm", "memory=auto", "launcher.nodes=2:4")


def make(*overrides: str) -> Config:
    return compose([*BASE, *overrides])


def roomy(config: Config) -> None:
    """Any memory plan does."""


def never(*sizes: int) -> MemoryCheck:
    """A room in which these numbers of nodes have too little memory."""

    def room(config: Config) -> None:
        if config.cluster.num_nodes in sizes:
            raise PlanError("memory", found="too little", expected="more", hint="more nodes")

    return room


@pytest.mark.parametrize(("given", "text"), [(4, "4"), ("4", "4"), ("2:4", "2:4"), ("2-4", "2:4"), (" 2 : 4 ", "2:4")])
def test_how_nodes_are_written(given: object, text: str) -> None:
    assert parse_nodes(given) == text


@pytest.mark.parametrize("given", ["", "a", "2:", "1:2:3", True, 2.5, "-1"])
def test_what_is_no_number_of_nodes(given: object) -> None:
    with pytest.raises(ValueError, match="nodes as a number or like 2:4"):
        parse_nodes(given)


def test_the_range_is_the_clusters_own_number_unless_given() -> None:
    assert node_range(make("cluster.num_nodes=3")) == NodeRange(3, 3)
    ranged = make("launcher.nodes=2:5")
    assert node_range(ranged) == NodeRange(2, 5) and ranged.cluster.num_nodes == 5
    assert load_config(dump_config(ranged)) == ranged
    assert str(node_range(ranged)) == "2:5" and str(NodeRange(3, 3)) == "3" and 2 in NodeRange(2, 5) and 6 not in NodeRange(2, 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("launcher.nodes=4:2",), r"launcher\.nodes: found 4:2; expected MIN:MAX with 1 <= MIN <= MAX.*\n  Try: launcher\.nodes=2:4"),
        (("launcher.nodes=0",), r"launcher\.nodes: found 0"),
        (("launcher.nodes=many",), r"launcher\.nodes: found the text 'many'; expected nodes as a number or like 2:4"),
        (("launcher.nodes=2:4", "cluster.num_nodes=3"), r"cluster\.num_nodes: found 3 with launcher\.nodes=2:4; expected 4, or only one"),
    ],
)
def test_what_cannot_be_asked_for(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(*overrides)


def test_a_run_resumes_with_another_range() -> None:
    config = changed(make("launcher.nodes=2:4"), parse_overrides(["launcher.nodes=1:3"]), None)
    assert config.launcher.nodes == "1:3" and config.cluster.num_nodes == 3
    with pytest.raises(ConfigError, match=r"cluster\.num_nodes: found 2 with launcher\.nodes=2:4"):
        changed(make("launcher.nodes=2:4"), parse_overrides(["cluster.num_nodes=2"]), None)


@pytest.mark.parametrize(("available", "num_nodes"), [(9, 4), (4, 4), (3, 3), (2, 2), (1, 0), (0, 0)])
def test_as_many_as_there_are(available: int, num_nodes: int) -> None:
    config = make("launcher.nodes=2:4")
    sizing = size_for(config, available, roomy)
    assert sizing.num_nodes == num_nodes and sizing.waits == (num_nodes == 0)
    assert sizing.config == (replace(config, cluster=replace(config.cluster, num_nodes=num_nodes)) if num_nodes else config)


def test_sizes_that_do_not_fit_are_passed_over() -> None:
    config = make("launcher.nodes=2:6")
    assert size_for(config, 6, never(6, 5)).num_nodes == 4
    passed = size_for(config, 5, never(5))
    assert passed.num_nodes == 4 and "5 nodes would not do (memory: found" not in passed.reason and "5 nodes would not do" in passed.reason
    waits = size_for(config, 3, never(2, 3))
    assert waits.waits and waits.reason.startswith("3 nodes available, 4 needed at least; 3 nodes would not do (memory: too little)")
    assert usable(config, never(2, 3, 6)) == NodeRange(4, 5) and usable(config, roomy) == NodeRange(2, 6)


def test_one_number_is_taken_as_it_is() -> None:
    config = make("launcher.nodes=3")
    assert usable(config, never(3)) == NodeRange(3, 3) and size_for(config, 4, never(3)).num_nodes == 3
    assert size_for(config, 2).waits and size_for(config, 2).reason == "2 nodes available, 3 needed"


def test_a_range_in_which_nothing_works() -> None:
    with pytest.raises(ConfigError, match=r"launcher\.nodes: found 2:3, where 3 nodes would not do \(memory: too little\); 2 nodes would"):
        size_for(make("launcher.nodes=2:3"), 3, never(2, 3))
    with pytest.raises(ConfigError, match="expected a number of nodes the run can be laid over"):
        usable(make("launcher.nodes=2:3"), never(2, 3))


def test_weights_follow_the_ranks() -> None:
    """Copies that share `shard` ranks: the number of copies follows where it can, else weights go over all ranks."""
    config = make("launcher.nodes=1:4", "parallel.replicate=4", "parallel.shard=2")
    for num_nodes, replicate, shard in ((4, 4, 2), (3, 3, 2), (2, 2, 2), (1, 1, 2)):
        parallel = sized(config, num_nodes, roomy).parallel
        assert (parallel.replicate, parallel.shard) == (replicate, shard)
    plain = make("launcher.nodes=1:4", "parallel.shard=8")
    assert sized(plain, 3, roomy).parallel.shard is None and sized(plain, 4, roomy).parallel.shard == 8
    copies = make("launcher.nodes=1:4", "parallel.replicate=4")
    assert [sized(copies, n, roomy).parallel.replicate for n in (4, 3, 2, 1)] == [4, 3, 4, 2]


def test_longer_pieces_on_fewer_ranks() -> None:
    """An SP degree there are no ranks for is chosen anew; where the longest sequence needs it, ranks hold more of it."""
    config = make("launcher.nodes=1:4", "data.max_seq_len=8K", "data.global_batch_tokens=16K", "parallel.tokens_per_rank=1K")
    assert plan(sized(config, 4, roomy)).layout.sp_degree == 8
    one = sized(config, 1, roomy)
    assert one.parallel.tokens_per_rank == 4096 and plan(one).layout.sp_degree == 2
    given = make("launcher.nodes=1:4", "parallel.sequence=static", "parallel.sp_degree=8")
    assert sized(given, 4, roomy).parallel.sp_degree == 8 and sized(given, 3, roomy).parallel.sp_degree is None
    for num_nodes in (1, 2, 3, 4):
        kept = sized(config, num_nodes, roomy)
        assert (kept.data, kept.train, kept.optim) == (config.data, config.train, config.optim)


def test_memory_is_planned_anew() -> None:
    """By the real planner: a 70B model on 3 or 4 nodes of 8 GPUs; on 2 not even its states fit."""
    config = compose([*LARGE])
    three = size_for(config, 3)
    assert three.num_nodes == 3 and plan(three.config).fits and plan(three.config).layout.world_size == 24
    waits = size_for(config, 2)
    assert waits.waits and "2 nodes available, 3 needed at least; 2 nodes would not do (memory: " in waits.reason
    two = replace(three.config, cluster=replace(config.cluster, num_nodes=2))
    with pytest.raises(ConfigError, match=r"GiB at least on each GPU of 75\.1 GiB: .*optimizer states"):
        check_nodes_memory(two)


def test_what_an_attempt_keeps(tmp_path: Path) -> None:
    config = make("launcher.nodes=1:3")
    make_run_dir(tmp_path)
    store_config(tmp_path, config)
    config = read_run(tmp_path).config
    smaller = sized(config, 2, roomy)
    assert write_attempt(tmp_path, 1, config) == [] and write_attempt(tmp_path, 2, smaller) == ["cluster.num_nodes: 3 -> 2"]
    assert read_attempt(tmp_path, 1) == config and read_attempt(tmp_path, 2) == smaller and read_attempt(tmp_path, 3) == config
