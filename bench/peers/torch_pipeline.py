"""torch.distributed.pipelining's 1F1B on Hugging Face's own layers, and ours on the same model, ranks and tokens, in turns."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ...memory.policy import KEPT, MemoryPolicy
from ...model.build import build_model
from ...parallel.pipeline.place import StagePlace
from ...parallel.sequence.kernels import block_kernel
from ...parallel.sequence.plan import Group, MicroBatch, StepPlan
from ...parallel.topology import Topology, build_topology
from ...training.micro_batches import count_targets, read_step
from ...training.objectives.heads import LanguageModelling
from ...training.step import backward_step
from ...training.step_setup import StepSetup
from .shape import Shape

CPU = torch.device("cpu")
LAYERS, MICRO_BATCHES = 4, 8
KEEP = MemoryPolicy(graph=True, attention_output=KEPT, query=KEPT, key_value=KEPT, residual=KEPT, mlp=KEPT)


def lengths_of(tokens: int, kind: str) -> tuple[int, ...]:
    """Tokens of each micro-batch's one document: all alike, or from an eighth of `tokens` up to all of them."""
    if kind == "equal":
        return (tokens,) * MICRO_BATCHES
    return tuple(max(2, tokens * share // 8) for share in (8, 1, 2, 1, 4, 1, 2, 1))


class Documents:
    """One document a micro-batch, in memory, as a data source of one step."""

    def __init__(self, lengths: tuple[int, ...], vocab_size: int) -> None:
        generator = np.random.default_rng(0)
        self.tokens_of = [generator.integers(0, vocab_size, length, dtype=np.int64) for length in lengths]

    def lengths(self, step: int) -> tuple[int, ...]:
        return tuple(map(len, self.tokens_of))

    def parts(self, step: int, index: int) -> tuple[int, ...]:
        return (len(self.tokens_of[index]),)

    def tokens(self, step: int, index: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        targets = np.append(self.tokens_of[index][1:], -100)
        return self.tokens_of[index][start:stop], targets[start:stop]


class HalfOfModel(nn.Module):
    """Every second half of a Hugging Face model, as a stage of torch's: (1, S) ids in first, (1, S, V) logits out last."""

    def __init__(self, config: PretrainedConfig, rank: int) -> None:
        super().__init__()
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        half = LAYERS // 2
        self.layers = nn.ModuleList(list(model.model.layers)[rank * half : (rank + 1) * half])
        self.embed, self.rotary = (model.model.embed_tokens if rank == 0 else None), model.model.rotary_emb
        self.norm: nn.Module | None = model.model.norm if rank == 1 else None
        self.head: nn.Module | None = model.lm_head if rank == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.embed is None else self.embed(x)
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        tables = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=tables, position_ids=positions, attention_mask=None, use_cache=False)
        return hidden if self.norm is None or self.head is None else self.head(self.norm(hidden))


class Theirs:
    """torch's schedule; unequal micro-batches are padded to the longest, whose padding has no loss."""

    def __init__(self, config: PretrainedConfig, rank: int, documents: Documents) -> None:
        longest = max(documents.lengths(0))
        self.rank, self.module = rank, HalfOfModel(config, rank)
        self.ids = torch.zeros(MICRO_BATCHES, longest, dtype=torch.int64)
        self.targets = torch.full((MICRO_BATCHES, longest), -100)
        for index, length in enumerate(documents.lengths(0)):
            ids, targets = documents.tokens(0, index, 0, length)
            self.ids[index, :length], self.targets[index, :length] = torch.from_numpy(ids), torch.from_numpy(targets)
        count = int((self.targets != -100).sum())

        def loss(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum") / count

        self.schedule = Schedule1F1B(PipelineStage(self.module, rank, 2, CPU), MICRO_BATCHES, loss_fn=loss, scale_grads=False)

    def step(self) -> None:
        """Gradients of one step, thrown away."""
        if self.rank == 0:
            self.schedule.step(self.ids)
        else:
            self.schedule.step(target=self.targets)
        self.module.zero_grad()


class Ours:
    """Our stages, every activation kept, as autograd does."""

    def __init__(self, config: PretrainedConfig, topology: Topology, documents: Documents) -> None:
        assert topology.pipeline is not None
        half, rank = LAYERS // 2, topology.stage_index
        place = StagePlace((range(rank * half, (rank + 1) * half),), rank, topology.pipeline)
        self.model = build_model(
            config, KEEP, topology.mesh, device=CPU, compute_dtype=torch.float32, seed=0, loss_chunk_tokens=1024, place=place
        )
        plan = StepPlan(1, documents.lengths(0), tuple(MicroBatch((Group(0, 1, 1, (index,)),)) for index in range(MICRO_BATCHES)))
        self.setup = StepSetup(model=self.model, topology=topology, kernel=block_kernel(CPU), device=CPU, reduce_each=False)
        self.works = read_step(documents, 0, plan, 0)  # type: ignore[arg-type]
        self.targets = count_targets(self.works, topology, CPU)

    def step(self) -> None:
        """Gradients of one step, thrown away."""
        backward_step(self.setup, self.works, LanguageModelling(self.targets, CPU))
        self.model.zero_grad()


def compete(rank: int, ranks: int, store: Path, tokens: int, kind: str, rounds: int, results: Any) -> None:
    """Tokens a second of both, in turns, on each rank; rank 0 reports the slower rank's."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    fields = Shape(4, 64).fields(LAYERS)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    documents = Documents(lengths_of(tokens, kind), config.vocab_size)
    ours, theirs = Ours(config, build_topology(replicate=1, device="cpu", stages=2), documents), Theirs(config, rank, documents)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for turn in range(rounds + 1):
        for name, contestant in (("ours", ours), ("torch", theirs)):
            seconds = _timed(contestant)
            if turn:  # the first warms up
                times[name].append(seconds)
    if rank == 0:
        ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(times["ours"], times["torch"], strict=True)]
        results.put({"step_s": times, "speed_over_torch": statistics.median(ratios), "tokens": sum(documents.lengths(0))})
    dist.barrier()
    dist.destroy_process_group()


def _timed(contestant: Ours | Theirs) -> float:
    dist.barrier()
    begun = time.perf_counter()
    contestant.step()
    took = torch.tensor(time.perf_counter() - begun, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)
