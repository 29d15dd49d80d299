"""What is suggested really fits, by the same ledger."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest

from efflaunch.errors import PlanError
from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.ledger import Ledger
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.estimate.suggestion_moves import OTHERWISE, SETTINGS, Change
from efflaunch.estimate.suggestions import check_budget, check_fits, suggest
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import plan
from efflaunch.memory.config import ActivationPlace, MemoryConfig
from efflaunch.model.spec import model_spec
from efflaunch.parallel.config import GradReduce

from .settings import GIB, Ledgers, cluster, make_ledger, policy

M = 1 << 20
K = 1 << 10
AUTO = MemoryConfig(name="auto", solve=True)
TOO_LARGE = Ledgers(
    {
        "1M on eight": partial(make_ledger, length=M, tokens_per_rank=128 * K, machines=cluster(device_memory_bytes=76 * GIB)),
        "4M on eight": partial(make_ledger, length=4 * M, tokens_per_rank=512 * K),
        "keep": partial(make_ledger, length=128 * K, tokens_per_rank=16 * K, memory=policy("keep", "keep")),
        "whole gradients": partial(
            make_ledger,
            length=32 * K,
            tokens_per_rank=16 * K,
            batch=M,
            grad_reduce=GradReduce.STEP,
            machines=cluster(device_memory_bytes=50 * GIB),
        ),
        "replicas": partial(make_ledger, length=8 * K, tokens_per_rank=8 * K, replicate=8, machines=cluster(num_nodes=1)),
        "loss": partial(make_ledger, length=8 * K, tokens_per_rank=8 * K, loss_chunk=8 * K, machines=cluster(device_memory_bytes=28 * GIB)),
        "few ranks used": partial(
            make_ledger, length=128 * K, tokens_per_rank=128 * K, sp_degree=1, machines=cluster(device_memory_bytes=40 * GIB)
        ),
        "solved": partial(make_ledger, length=M, tokens_per_rank=128 * K, memory=AUTO, machines=cluster(device_memory_bytes=18 * GIB)),
        "solved with given chunks": partial(
            make_ledger,
            length=M,
            tokens_per_rank=128 * K,
            memory=replace(AUTO, chunk_tokens=64 * K),
            machines=cluster(device_memory_bytes=36 * GIB),
        ),
        "host budget": partial(
            make_ledger,
            length=M,
            tokens_per_rank=128 * K,
            memory=replace(AUTO, host_budget=GIB, chunk_tokens=16 * K),
            machines=cluster(device_memory_bytes=34 * GIB),
        ),
    }
)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_suggestions_fit(name: str) -> None:
    ledger = TOO_LARGE[name]
    assert not ledger.fits
    suggestions = suggest(ledger)
    assert suggestions and len(suggestions) <= 4
    for entry in suggestions:
        assert entry.ledger.fits and entry.overrides and entry.reason
        assert all("=" in override and " " not in override for override in entry.overrides)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("keep", ("memory=auto",)),
        ("whole gradients", ("parallel.grad_reduce=micro_batch",)),
        ("replicas", ("parallel.replicate=1", "parallel.shard=null")),
        ("loss", ("memory=auto",)),
        ("few ranks used", ("memory=auto",)),
        ("1M on eight", ("memory=auto",)),
        ("4M on eight", ("memory=auto",)),
        ("solved with given chunks", ("memory.chunk_tokens=null",)),
    ],
)
def test_the_least_intrusive_comes_first(name: str, first: tuple[str, ...]) -> None:
    assert suggest(TOO_LARGE[name])[0].overrides == first


def test_changes_are_stacked_where_one_is_not_enough() -> None:
    ledger = make_ledger(
        length=8 * K,
        tokens_per_rank=8 * K,
        batch=M,
        memory=policy("keep", "keep"),
        grad_reduce=GradReduce.STEP,
        machines=cluster(ranks_per_node=8, device_memory_bytes=34 * GIB),
    )
    (suggestions,) = suggest(ledger, most=1)
    assert suggestions.ledger.fits and suggestions.overrides[:2] == ("memory=auto", "parallel.grad_reduce=micro_batch")


ALST = MemoryConfig(
    name="alst",
    layer_input=ActivationPlace.HOST,
    attention_output=ActivationPlace.RECOMPUTE,
    activations=ActivationPlace.RECOMPUTE,
    chunk_tokens=4 * K,
)
HOST = Ledgers(
    {
        "solved": partial(
            make_ledger,
            length=M, tokens_per_rank=128 * K, memory=AUTO, machines=cluster(device_memory_bytes=30 * GIB, host_memory_bytes=60 * GIB),
        ),
        "given": partial(make_ledger, length=M, tokens_per_rank=128 * K, machines=cluster(host_memory_bytes=140 * GIB), memory=ALST),
    }
)  # fmt: skip
"""Settings whose host memory is too small."""


def moved(ledger: Ledger) -> dict[str, list[Change]]:
    """Every change there is for the configuration, by the name of its kind."""
    suggestions = {move.__name__.strip("_"): list(move(ledger.asked)) for move in (*SETTINGS, *OTHERWISE)}
    return {name: changes for name, changes in suggestions.items() if changes}


@pytest.mark.parametrize(
    ("ledgers", "name", "kinds"),
    [
        (HOST, "solved", {"states_on_host", "files", "larger_host", "larger_device", "more_nodes", "in_backward", "adapters", "shorter"}),
        (HOST, "given", {"auto", "chunks", "segments", "states_on_host", "files", "larger_host", "more_nodes", "in_backward", "few_bits"}),
        (TOO_LARGE, "few ranks used", {"spread"}),
        (TOO_LARGE, "host budget", {"whole_host"}),
    ],
)
def test_every_kind_of_change_is_there_and_says_what_it_is(ledgers: Ledgers, name: str, kinds: set[str]) -> None:
    suggestions = moved(ledgers[name])
    assert kinds <= set(suggestions)
    words = {
        "few_bits": "NOT EXACT",
        "larger_host": "more host memory",
        "files": "DIRECTORY stands for one on a local disk",
        "segments": "layer's input waits",
        "in_backward": "run twice",
        "more_nodes": "ranks",
        "adapters": "another result than training all of it",
    }
    for name, part in words.items():
        assert all(part in change.reason for change in suggestions.get(name, [])), name


def test_a_host_that_is_too_small_gets_files_more_memory_or_segments() -> None:
    suggested = {entry.overrides[0].split("=")[0]: entry for entry in suggest(HOST["given"], most=20)}
    assert {"memory.segment_layers", "memory.offload_dir", "cluster.host_memory_bytes", "cluster.num_nodes"} <= set(suggested)
    assert not HOST["given"].host.fits and suggested["memory.offload_dir"].ledger.file_bytes > 0
    assert [entry.overrides for entry in suggest(HOST["given"], most=20, elsewhere=False)] == [
        entry.overrides
        for name, entry in suggested.items()
        if name not in ("memory.offload_dir", "cluster.host_memory_bytes", "cluster.device_memory_bytes", "adapter")
    ]


WORDS: dict[str, list[str]] = {
    "1M, small GPUs": ["+experiment=llama8b_1M", "cluster.device_memory_bytes=18GiB"],
    "1M, small host": ["+experiment=llama8b_1M", "memory=alst", "cluster.host_memory_bytes=60GiB"],
    "keep": ["+experiment=llama8b_128k_sft", "memory=keep", "cluster.device_memory_bytes=40GiB"],
    "quickstart": ["+experiment=quickstart", "cluster.device_memory_bytes=600MiB"],
    "70B": ["+experiment=llama70b_512k", "cluster.device_memory_bytes=30GiB"],
}


@pytest.mark.parametrize("name", WORDS)
def test_what_is_suggested_can_be_typed_and_then_fits(name: str) -> None:
    """Each suggestion as overrides of the same command: composed, planned from nothing, it fits, with the figures it was shown with."""
    words = WORDS[name]
    suggestions = suggest(plan(compose(words)), most=20)
    assert suggestions
    for entry in suggestions:
        typed = plan(compose([*words, *entry.overrides]))
        assert typed.fits, entry.overrides
        assert (typed.device.peak_bytes, typed.host.peak_bytes) == (entry.ledger.device.peak_bytes, entry.ledger.host.peak_bytes)
        assert typed.timing.step_s == pytest.approx(entry.ledger.timing.step_s), entry.overrides


def test_simpler_changes_are_named_too() -> None:
    assert ("train.loss_chunk_tokens=1024",) in [entry.overrides for entry in suggest(TOO_LARGE["loss"])]
    assert ("memory.host_budget=null",) in [entry.overrides for entry in suggest(TOO_LARGE["host budget"])]
    assert ("memory=recompute",) in [entry.overrides for entry in suggest(TOO_LARGE["keep"])]


def test_a_budget_below_what_no_policy_changes_is_refused() -> None:
    """The error names what is there whatever the policy, the least that works, and changes that do."""
    with pytest.raises(PlanError) as caught:
        check_fits(TOO_LARGE["solved"])
    text = str(caught.value)
    for part in ("optimizer states", "whatever the policy", "cluster.num_nodes=", "cluster.device_memory_bytes="):
        assert part in text
    check_fits(make_ledger(length=M, tokens_per_rank=128 * K, memory=AUTO))
    check_fits(TOO_LARGE["keep"])  # not solved: the ledger's word is an upper bound, and its user's risk


def test_a_given_policy_that_breaks_a_given_host_budget_is_refused() -> None:
    """Unlike the ledger's bounds, the budget is a number somebody typed; what is to be typed instead fits."""
    memo = MemoryConfig(
        name="memo", layer_input=ActivationPlace.HOST, attention_output=ActivationPlace.HOST, activations=ActivationPlace.HOST
    )
    ledger = make_ledger(length=64 * K, tokens_per_rank=8 * K, memory=replace(memo, host_budget=1 << 20))
    with pytest.raises(PlanError, match=r"memory.host_budget: found 1.0 MiB") as caught:
        check_budget(ledger)
    least = re.search(r"memory.host_budget=(\d+)MiB", caught.value.hint)
    assert least is not None and "memory=auto" in caught.value.hint
    check_budget(make_ledger(length=64 * K, tokens_per_rank=8 * K, memory=replace(memo, host_budget=int(least[1]) << 20)))
    check_budget(make_ledger(length=64 * K, tokens_per_rank=8 * K, memory=memo))


def test_what_fits_needs_no_advice() -> None:
    assert suggest(make_ledger(length=128 * K, tokens_per_rank=16 * K)) == ()


def test_chunks_are_suggested_where_a_layer_is_too_large():
    """The million-token experiment without its chunks does not fit one node; with them it does."""
    config = compose(["+experiment=llama8b_1M", "memory=recompute"], None)
    ledger = build_ledger(
        PlanInputs.make(
            spec=model_spec(config.model),
            parallel=config.parallel,
            memory=config.memory,
            train=config.train,
            data=config.data,
            cluster=config.cluster,
        )
    )
    assert not ledger.fits and ("memory.chunk_tokens=16K",) in [entry.overrides for entry in suggest(ledger)]
