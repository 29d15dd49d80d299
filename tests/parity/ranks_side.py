"""What the ranks of a parity row do: build the sharded model, load the reference's weights, execute the plan, report."""

from __future__ import annotations

import tempfile
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from efflaunch.errors import ConfigError
from efflaunch.memory.config import AttentionTiling
from efflaunch.memory.offload.open import open_store
from efflaunch.memory.policy import KEPT, MOVED, MemoryPolicy, Split
from efflaunch.model.adapters.config import NO_ADAPTER
from efflaunch.model.build import RouterSettings, build_model, use_expert_order
from efflaunch.model.weights import persistent_buffers
from efflaunch.parallel.pipeline.config import PipelineOrder
from efflaunch.parallel.pipeline.place import StagePlace
from efflaunch.parallel.sequence.attention import CpuKernel
from efflaunch.parallel.sharding.parts import write_shard
from efflaunch.parallel.topology import build_topology
from efflaunch.training.micro_batches import count_targets, read_step
from efflaunch.training.objectives.heads import LanguageModelling
from efflaunch.training.step import backward_step
from efflaunch.training.step_setup import StepSetup


class ListSource:
    """Documents and targets in memory, as a DataSource of one step."""

    def __init__(self, documents, targets):
        self.documents, self.targets = documents, targets

    def lengths(self, step):
        return tuple(len(tokens) for tokens in self.documents)

    def parts(self, step, index):
        return (len(self.documents[index]),)

    def tokens(self, step, index, start, stop):
        return self.documents[index][start:stop], self.targets[index][start:stop]


def _shares(split, **others):
    """The same shares of every class between attention and the layer's ends."""
    return MemoryPolicy(query=split, key_value=split, residual=split, mlp=split, **others)


POLICIES = {
    "keep": MemoryPolicy(graph=True, attention_output=KEPT, query=KEPT, key_value=KEPT, residual=KEPT, mlp=KEPT),
    "recompute": MemoryPolicy(),
    "keep_attention": MemoryPolicy(attention_output=KEPT),
    "chunks_5": MemoryPolicy(chunk_tokens=5),
    "chunks_16": MemoryPolicy(chunk_tokens=16),
    "chunks_16_keep_attention": MemoryPolicy(attention_output=KEPT, chunk_tokens=16),
    "alst": MemoryPolicy(layer_input=MOVED, chunk_tokens=7),
    "streambp": MemoryPolicy(attention=AttentionTiling.CHUNKS, chunk_tokens=7),
    "streambp_11_host": MemoryPolicy(layer_input=MOVED, attention_output=MOVED, attention=AttentionTiling.CHUNKS, chunk_tokens=11),
    "memo_0": MemoryPolicy(layer_input=MOVED, attention_output=MOVED),
    "memo_0.3": _shares(Split(host=0.3), layer_input=MOVED, attention_output=MOVED),
    "memo_1": _shares(MOVED, layer_input=MOVED, attention_output=MOVED),
    "upipe": MemoryPolicy(layer_input=MOVED, head_groups=2, chunk_tokens=13),
    "upipe_stored": _shares(Split(keep=0.2, host=0.5), attention_output=Split(keep=0.4, host=0.6), head_groups=2, segment_layers=2),
    "everything kept by class": _shares(KEPT, attention_output=KEPT),
    "shares_streamed": _shares(
        Split(keep=0.2, host=0.3),
        layer_input=Split(keep=0.5, host=0.5),
        attention_output=Split(keep=0.7, host=0.3),
        attention=AttentionTiling.CHUNKS,
        chunk_tokens=9,
        segment_layers=2,
    ),
    "segments_2": MemoryPolicy(segment_layers=2),
    "chunks_1": MemoryPolicy(chunk_tokens=1),
    "streambp_1": MemoryPolicy(layer_input=MOVED, attention=AttentionTiling.CHUNKS, chunk_tokens=1),
    "streambp_1000": MemoryPolicy(mlp=MOVED, attention=AttentionTiling.CHUNKS, chunk_tokens=1000),
    "streambp_stored": MemoryPolicy(
        query=MOVED, key_value=Split(0.3, 0.7), attention=AttentionTiling.CHUNKS, chunk_tokens=9, segment_layers=3
    ),
    "upipe_3": MemoryPolicy(head_groups=3, chunk_tokens=20),
    "upipe_8": MemoryPolicy(layer_input=MOVED, query=Split(host=0.5), attention_output=MOVED, head_groups=8, chunk_tokens=20),
    "segments_3_host": MemoryPolicy(
        segment_layers=3, layer_input=MOVED, attention_output=MOVED, attention=AttentionTiling.CHUNKS, chunk_tokens=16
    ),
}


class StrictStore:
    """A host store that copies as late as it may, spoils what is no longer to be used, and has everything asked for ahead of its use."""

    def __init__(self):
        self.parcels, self.asked = {}, set()

    def put(self, rows):
        key = object()
        self.parcels[key] = [rows, rows.clone(), None]
        return key

    def prefetch(self, key):
        assert key in self.parcels
        self.asked.add(key)

    def get(self, key):
        rows, copy, back = self.parcels[key]
        assert back is None, "read twice without being done with it"
        assert key in self.asked, "read without having been asked for"
        self.asked.discard(key)
        assert torch.equal(rows, copy), "what was given away was written into"
        self.parcels[key][2] = copy.clone()
        return self.parcels[key][2]

    def done(self, key):
        self.parcels[key][2].fill_(float("nan"))
        self.parcels[key][2] = None

    def drop(self, key):
        del self.parcels[key]

    def reset(self):
        self.parcels.clear()
        self.asked.clear()


def _store(kind):
    """The store of a case, which may be one itself."""
    if not isinstance(kind, str):
        return kind
    if kind == "strict":
        return StrictStore()
    folder, room = tempfile.gettempdir() if kind == "files" else None, 64 << 20
    return open_store(device=torch.device("cpu"), capacity_bytes=room, offload_dir=folder, staging_bytes=8 << 20, piece_bytes=1 << 20)


def is_trained(case, name):
    """Whether a case trains a parameter: `trained` and `frozen` hold parts of names."""
    return any(part in name for part in case.get("trained", ("",))) and not any(part in name for part in case.get("frozen", ()))


def compiler(kind):
    """The backend of torch.compile of a case; inductor only where there is what it needs."""
    if kind != "inductor":
        return kind
    import torch._inductor.config as inductor

    from efflaunch.memory.executor.compiled_graph import check_compiler

    inductor.compile_threads = 1  # no pool of processes that would stay
    try:
        check_compiler(torch.device("cpu"))
    except ConfigError:
        return "aot_eager"
    return "inductor"


def run_plans(case, weights, documents, targets, plans, steps=0):
    """For each plan: (loss, gradients by name) on rank 0, None elsewhere; then `steps` AdamW steps of the first plan: weights."""
    from efflaunch.tests.parity.reference import hf_config, lift_to_float64

    torch.set_num_threads(1)
    if case["dtype"] == "float64":
        lift_to_float64()
    dtype = getattr(torch, case["dtype"])
    stages, config = case.get("stages", 1), hf_config(case["family"])
    topology = build_topology(replicate=case.get("replicate", 1), device="cpu", stages=stages, experts=case.get("ep", 1))
    model = build_model(
        config,
        replace(POLICIES[case.get("policy", "keep")], compile=compiler(case.get("compile"))),
        topology.mesh,
        device=torch.device("cpu"),
        compute_dtype=dtype,
        seed=0,
        loss_chunk_tokens=case.get("loss_chunk", 7),
        z_loss=case.get("z_loss", 0.0),
        store=_store(case.get("store", "strict")),
        expert_mesh=topology.experts,
        routers=RouterSettings(*case.get("router", (0.0, 0.0)), capacity_factor=case.get("capacity")),
        place=stage_place(topology, case.get("layers") or config.num_hidden_layers, case.get("virtual", 1)),
        adapter=case.get("adapter", NO_ADAPTER),
    )
    for name, parameter in model.named_parameters():
        write_shard(parameter, torch.from_numpy(weights[name]))
        if "adapter" not in case:
            parameter.requires_grad_(is_trained(case, name))
    for name, buffer in persistent_buffers(model).items():
        buffer.copy_(torch.from_numpy(weights[name]))
    if "expert_order" in case:
        use_expert_order(model, case["expert_order"])
    source, results = ListSource(documents, targets), []
    for plan in plans:
        loss = _gradients(model, topology, source, plan, case)
        results.append((loss, _gathered(model, topology, lambda p: p.grad)))
        model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        _gradients(model, topology, source, plans[0], case)
        optimizer.step()
        optimizer.zero_grad()
    trained = _gathered(model, topology, lambda p: p) if steps else None
    return (results, trained) if dist.get_rank() == 0 else None


def _gradients(model, topology, source, plan, case):
    works = read_step(source, 0, plan, topology.stage_rank, shares_experts=topology.shares_experts)
    count = count_targets(works, topology, torch.device("cpu"))
    reduce_each, device = case.get("reduce_each", False), torch.device("cpu")
    setup = StepSetup(
        model=model, topology=topology, kernel=CpuKernel(), device=device,
        reduce_each=reduce_each, barrier_free=case.get("barrier_free", False), order=case.get("order", PipelineOrder.ONE_F_ONE_B),
        gpipe_in_flight=case.get("gpipe", 1),
    )  # fmt: skip
    loss = backward_step(setup, works, LanguageModelling(count, device)).sum()
    dist.all_reduce(loss)
    return float(loss)


def stage_place(topology, layers, virtual=1):
    """This rank's place in a pipeline; `layers`: of each stage, or of the model, which is then cut evenly. None with one stage."""
    if topology.pipeline is None:
        return None
    count = topology.num_stages * virtual
    counts = layers if isinstance(layers, tuple) else [layers * (i + 1) // count - layers * i // count for i in range(count)]
    ends = [sum(counts[: i + 1]) for i in range(count)]
    own = range(topology.stage_index, count, topology.num_stages)
    return StagePlace(tuple(range(ends[i] - counts[i], ends[i]) for i in own), topology.stage_index, topology.pipeline)


def _gathered(model, topology, pick):
    """Whole tensors by name, of all stages."""
    picked = ((name, pick(parameter)) for name, parameter in model.named_parameters())
    return of_all_stages({name: np.array(value.full_tensor().detach()) for name, value in picked if value is not None}, topology)


def of_all_stages(found, topology):
    """Arrays by name of all stages; what two stages have is the same on both."""
    if topology.pipeline is None:
        return found
    stages = [None] * topology.num_stages
    dist.all_gather_object(stages, found, group=topology.pipeline.column)
    together = {}
    for stage in stages:
        for name in together.keys() & stage.keys():
            np.testing.assert_array_equal(together[name], stage[name])
        together |= stage
    return together
