"""The protocol of an engine: who holds one rank's weights, when its collectives run, and what it can be combined with. Pure.

Note: what an engine is not. Every engine runs the same layers, step plans and losses. It owns where weights, gradients and states
lie, the collectives between ranks that hold parts of them, and the update (training/optimizers/updater.py, `Updater`); what it
saves is a `checkpoint.state.State`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn


class Weights(Protocol):
    """One rank's weights and gradients. Every rank of a stage calls every method, in the same order, unless it says otherwise."""

    def forward(self, *inputs: Any) -> Tensor:
        """The model's own forward of `inputs`, its weights gathered as it goes. Collective where weights are sharded."""
        ...

    def prepare(self, *, reduce: bool, last: bool) -> None:
        """Set up the next `backward`: `reduce` gradients over the ranks, or add to whole local ones; `last` of the step."""
        ...

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Add the gradients of `output`, given its `gradient` (None: it is a scalar loss). Collective where weights are sharded."""
        ...

    def weight_pass(self, layers: Iterable[nn.Module]) -> None:
        """End a pass that adds gradients to whole weights' `grad` by itself: a layer's are there when `layers` comes to it.

        They are reduced or kept as `prepare` said. Collective.
        """
        ...

    def gathered(self, module: nn.Module) -> AbstractContextManager[None]:
        """Hold one module's weights whole inside, in backward too. Collective where they are sharded."""
        ...

    def keep_whole(self, *, keep: bool) -> None:
        """Gather all weights now and leave them whole after every pass, until it is called with False. Collective."""
        ...

    def forget(self) -> None:
        """Start anew after an exception inside a pass: weights sharded, gradients that no rank has reduced gone. Sends nothing."""
        ...


class PlainWeights:
    """Weights that lie whole on this rank, gradients that nobody else has: a model no engine has taken yet."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def forward(self, *inputs: Any) -> Tensor:
        """The model's own forward."""
        output: Tensor = self._model(*inputs)
        return output

    def prepare(self, *, reduce: bool, last: bool) -> None:
        """Nothing: there is nobody to reduce with."""

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> None:
        """Autograd's own backward."""
        output.backward(gradient)  # type: ignore[no-untyped-call]

    def weight_pass(self, layers: Iterable[nn.Module]) -> None:
        """Nothing but what `layers` does: gradients stay where they are."""
        deque(layers, maxlen=0)

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Weights are whole already."""
        yield

    def keep_whole(self, *, keep: bool) -> None:
        """Nothing: they are whole."""

    def forget(self) -> None:
        """Nothing is left of an aborted pass."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A setting that an engine cannot run."""

    key: str
    """The key as typed: `optim.update`, `parallel.barrier_free`."""
    values: tuple[str, ...]
    """Those it cannot run, as typed; or the only ones it can, where `accepts`."""
    reason: str
    """What the engine does or lacks, as the end of "the engine ..."."""
    accepts: bool = False

    def refuses(self, text: str) -> bool:
        """Whether the value, as typed, is refused."""
        return (text in self.values) is not self.accepts


@dataclass(frozen=True, slots=True)
class Package:
    """A package that an engine is made of, in the one version whose inner parts it is written for."""

    name: str
    version: str
    install: str
    """How to install it, as typed."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is known of an engine before anything is built; read by training/optimizers/engine_check.py."""

    name: str
    preload: tuple[str, ...]
    """Modules it is made of, for the agent to import once before it forks the ranks."""
    refused: tuple[Refused, ...] = ()
    package: Package | None = None
    """None: it comes with torch."""


FSDP2 = EngineFacts("fsdp2", ("torch.distributed.fsdp", "torch.distributed.tensor"))
"""torch's own, per decoder layer (fsdp2.py): it runs everything that can be configured."""
EXPERT_PARALLEL = EngineFacts(
    "fsdp2 with parallel.experts.ep above 1",
    FSDP2.preload,
    refused=(
        Refused("adapter.method", ("lora", "qlora"), "has experts on a mesh of their own, where frozen weights have not been tried"),
        Refused("parallel.barrier_free", ("true",), "has ranks exchange rows in every layer of every micro-batch"),
        Refused("optim.update", ("backward",), "reduces a layer's weights on two meshes at once"),
        Refused("optim.state_device", ("host",), "has no host weights on two meshes"),
        Refused("memory.compile", ("true",), "has layers whose weights are in part on other ranks"),
        Refused("memory.arena", ("planned",), "has tensors as large as what other ranks send"),
    ),
)
"""The same with experts spread over ranks (experts.py)."""
DEEPSPEED = EngineFacts(
    "deepspeed",
    FSDP2.preload,
    refused=(
        Refused("train.dtype", ("float64",), "keeps weights, gradients and states in float32"),
        Refused("optim.algorithm", ("adamw",), "flattens weights: no matrix is left to another optimizer", accepts=True),
        Refused("optim.update", ("backward",), "updates when all gradients are reduced"),
        Refused("optim.state_device", ("host",), "has no states in host memory here"),
        Refused("optim.state_dtype", ("float32",), "has moments in float32 alone", accepts=True),
        Refused("parallel.barrier_free", ("true",), "gathers weights or reduces gradients in every micro-batch"),
        Refused("parallel.grad_reduce", ("auto",), "reduces as its stage does: 1 once a step, 2 and 3 in every micro-batch", accepts=True),
        Refused("parallel.replicate", ("1",), "shards over all ranks", accepts=True),
        Refused("parallel.pipeline.stages", ("1",), "begins backward at a loss, which inner stages do not have", accepts=True),
        Refused("parallel.experts.ep", ("1",), "has no second mesh for experts", accepts=True),
        Refused("adapter.method", ("none",), "has not been tried with frozen weights", accepts=True),
        Refused("memory.compile", ("true",), "has not been tried with compiled steps"),
        Refused("memory.arena", ("planned",), "takes buffers that no plan knows of"),
    ),
    package=Package("deepspeed", "0.19.8", "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8"),
)
"""DeepSpeed's ZeRO, stages 1 to 3 (deepspeed.py)."""
