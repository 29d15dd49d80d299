"""The settings that a rank is started with."""

from __future__ import annotations

from typing import Protocol

from ..checkpoint.config import CheckpointConfig
from ..cluster.config import ClusterConfig
from ..memory.config import MemoryConfig
from ..model.config import ModelConfig
from ..parallel.config import ParallelConfig
from .config import TrainConfig
from .data.config import DataConfig
from .optimizers.config import OptimConfig
from .reporting.config import LoggingConfig


class RunSettings(Protocol):
    """What training reads of the whole configuration (launcher.config.Config)."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def optim(self) -> OptimConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def memory(self) -> MemoryConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def cluster(self) -> ClusterConfig: ...
    @property
    def logging(self) -> LoggingConfig: ...
