"""Small configurations and their ledgers, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from efflaunch.bench.traced import MODEL
from efflaunch.cluster.config import ClusterConfig, Device
from efflaunch.estimate.build import build_ledger
from efflaunch.estimate.ledger import Ledger
from efflaunch.estimate.plan_inputs import PlanInputs
from efflaunch.memory.config import ActivationPlace, MemoryConfig
from efflaunch.model.config import Family, ModelConfig
from efflaunch.model.spec import model_spec
from efflaunch.parallel.config import ParallelConfig
from efflaunch.training.config import Dtype, TrainConfig
from efflaunch.training.data.config import DataConfig

GIB = 1 << 30
LLAMA_8B: dict[str, Any] = {
    "name": "llama3_8b",
    "family": Family.LLAMA,
    "num_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_heads": 32,
    "num_kv_heads": 8,
    "vocab_size": 128256,
    "max_positions": 131072,
}
SMALL: dict[str, Any] = MODEL


def policy(activations: str = "recompute", attention_output: str = "recompute") -> MemoryConfig:
    return MemoryConfig(
        name="m",
        layer_input=ActivationPlace.KEEP,
        attention_output=ActivationPlace(attention_output),
        activations=ActivationPlace(activations),
    )


def cluster(**changes: Any) -> ClusterConfig:
    fields: dict[str, Any] = {
        "name": "c",
        "device": Device.CUDA,
        "num_nodes": 1,
        "ranks_per_node": 8,
        "device_memory_bytes": 80 * GIB,
        "host_memory_bytes": 2000 * GIB,
        "peak_flops": 1e15,
        "gemm_efficiency": 0.33,
        "attention_efficiency": 0.33,
        "intra_node_bandwidth": 450e9,
        "inter_node_bandwidth": 50e9,
        "host_link_bandwidth": 50e9,
        "reserve": 0.0,
    }
    return ClusterConfig(**{**fields, **changes})


def make_ledger(
    model: dict[str, Any] | None = None,
    *,
    length: int,
    tokens_per_rank: int,
    batch: int | None = None,
    memory: MemoryConfig | None = None,
    machines: ClusterConfig | None = None,
    dtype: Dtype = Dtype.BFLOAT16,
    loss_chunk: int = 2048,
    **parallel: Any,
) -> Ledger:
    return build_ledger(
        PlanInputs.make(
            spec=model_spec(ModelConfig(**(model or LLAMA_8B))),
            parallel=ParallelConfig(name="p", tokens_per_rank=tokens_per_rank, **parallel),
            memory=memory or policy(),
            train=TrainConfig(steps=1, dtype=dtype, loss_chunk_tokens=loss_chunk),
            data=DataConfig(name="d", max_seq_len=length, global_batch_tokens=batch or length),
            cluster=machines or cluster(),
        )
    )


class Ledgers(Mapping[str, Ledger]):
    """Ledgers by name, each made when it is first asked for: collecting tests solves nothing."""

    def __init__(self, makers: Mapping[str, Callable[[], Ledger]]) -> None:
        self._makers, self._made = makers, dict[str, Ledger]()

    def __getitem__(self, name: str) -> Ledger:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
