"""Token-local steps through torch.compile: one graph for all layers and lengths, the gradients of the plain steps, clear refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler

from efflaunch.bench.traced import Case, memory_config, predicted_by_phase, profiled_peak
from efflaunch.errors import ConfigError
from efflaunch.memory.config import ActivationPlace, Arena, AttentionTiling, MemoryConfig, check_memory
from efflaunch.memory.executor.compiled_graph import check_compiler
from efflaunch.memory.executor.compiled_steps import Graphs
from efflaunch.memory.policy import KEEP_ALL, KEPT, MemoryPolicy, Split, explicit_policy
from efflaunch.model.build import install
from efflaunch.model.chunked_loss import cross_entropy
from efflaunch.model.families.llama import LlamaLayer
from efflaunch.model.stage import Tokens
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sequence.clock import BusyClock
from efflaunch.parallel.sequence.layout import group_layout
from efflaunch.parallel.sequence.plan import Group
from efflaunch.parallel.sequence.runtime import sequence_attention
from efflaunch.tests.memory.test_saved import SOME, Alone
from efflaunch.tests.parity.ranks_side import StrictStore
from efflaunch.tests.parity.reference import BASE, reference_model
from efflaunch.tests.ranks import RankPool

LENGTHS = (23, 40, 1)
POLICIES = {
    "recompute": MemoryPolicy(),
    "chunks": MemoryPolicy(chunk_tokens=9),
    "keep": KEEP_ALL,
    "streambp": MemoryPolicy(attention=AttentionTiling.CHUNKS, chunk_tokens=11),
    "head groups": MemoryPolicy(head_groups=2, chunk_tokens=16),
    "shares": MemoryPolicy(attention_output=KEPT, query=SOME, key_value=SOME, residual=SOME, mlp=SOME, layer_input=Split(0.5, 0.5)),
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Whatever other tests compiled does not count here."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def micro_batch(lengths: tuple[int, ...]) -> tuple[Tokens, Any]:
    layout, group = group_layout(lengths, ulysses=1, ring=1), Group(0, 1, 1, tuple(range(len(lengths))))
    attention = sequence_attention(Alone(), CpuKernel(), group, layout, BusyClock(torch.device("cpu")))  # type: ignore[arg-type]
    ids = torch.arange(sum(lengths)) * 7 % BASE["vocab_size"]
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Tokens(ids, ids.roll(-1), positions, torch.cat([torch.full((n,), n) for n in lengths])), attention


def gradients(family: str, policy: MemoryPolicy, *batches: tuple[int, ...], frozen: str = "-") -> dict[str, Any]:
    """Of all batches together, in float64."""
    model = reference_model(family, torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    install(model, policy, loss_chunk_tokens=16, store=StrictStore() if policy.uses_host else None)
    for lengths in batches:
        model(*micro_batch(lengths), lambda head: cross_entropy(head, 1.0)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_equal(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    for name, gradient in plain.items():
        assert (ours[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-11 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_are_those_of_plain_steps(name: str) -> None:
    policy = POLICIES[name]
    check_equal(gradients("llama", replace(policy, compile="eager"), LENGTHS), gradients("llama", policy, LENGTHS))


SLOW_FAMILIES = ("qwen2", "llama_mha_tied", "mistral", "qwen3", "gemma3", "olmo2", "phi3", "glm4", "cohere2")


@pytest.mark.parametrize("family", ["gemma2", "smollm3", *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW_FAMILIES)])
def test_every_family(family: str) -> None:
    policy = POLICIES["chunks"]
    check_equal(gradients(family, replace(policy, compile="aot_eager"), LENGTHS), gradients(family, policy, LENGTHS))


@pytest.mark.parametrize(
    "name, frozen",
    [
        pytest.param("streambp", "norm", marks=pytest.mark.slow),
        ("streambp", "self_attn"),
        ("keep", "mlp."),
        ("keep", "layers.0."),
        pytest.param("chunks", "embed", marks=pytest.mark.slow),
    ],
)
def test_frozen_weights(name: str, frozen: str) -> None:
    policy = POLICIES[name]
    ours = gradients("llama", replace(policy, compile="aot_eager"), LENGTHS, frozen=frozen)
    check_equal(ours, gradients("llama", policy, LENGTHS, frozen=frozen))


GRAPHS = {"recompute": 8, "streambp": 10, "keep": 2}
"""before_attention (streambp: also of queries, and of keys and values alone), the sum, gate and up, the end; and their backwards."""


@pytest.mark.parametrize("name", GRAPHS)
def test_all_layers_and_lengths_share_one_graph_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Graphs] = []
    original = Graphs.__init__

    def remember(self: Graphs, backend: str) -> None:
        original(self, backend)
        made.append(self)

    monkeypatch.setattr(Graphs, "__init__", remember)
    gradients("llama_deep", replace(POLICIES[name], compile="aot_eager"), LENGTHS, (7, 5), (64, 3), (1,), (2,))
    assert [len(graphs) for graphs in made] == [GRAPHS[name]]
    assert counters["stats"]["unique_graphs"] == GRAPHS[name] and not counters["graph_break"]


def test_a_step_that_depends_on_the_number_of_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaLayer.mlp_out

    def longer(self: LlamaLayer, x: Tensor, gate: Tensor, up: Tensor, graph: bool = False) -> Tensor:
        return original(self, x, gate, up, graph) if x.shape[0] > 30 else original(self, 2 * x, gate, up, graph)

    monkeypatch.setattr(LlamaLayer, "mlp_out", longer)
    with pytest.raises(ConfigError, match=r"memory.compile.*mlp_out cannot be compiled: it depends on the number of tokens"):
        gradients("llama", replace(POLICIES["recompute"], compile="eager"), LENGTHS)


def test_a_step_that_reads_its_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaLayer.residual

    def positive(self: LlamaLayer, x: Tensor, o: Tensor, graph: bool = False) -> Tensor:
        return original(self, x, o, graph) if float(x.sum()) > 0 else x

    monkeypatch.setattr(LlamaLayer, "residual", positive)
    with pytest.raises(ConfigError, match="residual cannot be compiled") as caught:
        gradients("llama", replace(POLICIES["recompute"], compile="eager"), LENGTHS)
    assert caught.value.hint == "memory.compile=false"


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(ConfigError, match=r"(?s)no C\+\+ compiler.*install g\+\+"):
        check_compiler(torch.device("cpu"))


def test_what_a_configuration_says() -> None:
    given = MemoryConfig(
        name="m", layer_input=ActivationPlace.KEEP, attention_output=ActivationPlace.RECOMPUTE, activations=ActivationPlace.RECOMPUTE
    )
    assert explicit_policy(given).compile is None
    compiled = replace(given, compile=True)
    check_memory(compiled)
    assert explicit_policy(compiled).compile == "inductor"
    with pytest.raises(ConfigError, match=r"true with memory.arena=planned"):
        check_memory(replace(compiled, arena=Arena.PLANNED))


def has_compiler() -> bool:
    try:
        check_compiler(torch.device("cpu"))
    except ConfigError:
        return False
    return True


def compiled_peak(case: Case) -> int:
    """On a rank: most bytes of a step as the allocator counts them."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of processes that would stay
    return profiled_peak(case)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="recompute", marks=pytest.mark.slow),
        pytest.param({"attention": "chunks", "chunk_tokens": 128}, id="streambp", marks=pytest.mark.slow),
        pytest.param({"attention_output": "keep", "activations": "keep"}, id="keep"),
    ],
)
def test_the_ledger_is_an_upper_bound_of_compiled_steps_too(fields: dict[str, Any]) -> None:
    """The tracer does not see what compiled code allocates: here the allocator is asked, and agrees with the ledger on plain steps."""
    plain, compiled = (Case(name="case", memory=memory_config(compile=on, **fields)) for on in (False, True))
    predicted = max(predicted_by_phase(plain).values())
    assert max(predicted_by_phase(compiled).values()) == predicted
    with RankPool() as pool:
        assert pool.run(profiled_peak, plain, ranks=1)[0] == pytest.approx(predicted, rel=0.005)
        assert pool.run(compiled_peak, compiled, ranks=1)[0] <= predicted
