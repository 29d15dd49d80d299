"""What a rank is started with: its settings, and the flag by which it is stopped."""

from __future__ import annotations

from typing import Protocol

from ..estimate.plan_inputs import Configured
from .evaluation.config import EvalConfig
from .reporting.config import LoggingConfig


class Stop(Protocol):
    """The stop flag: set by a signal, and only read in training."""

    @property
    def requested(self) -> bool: ...


class RunSettings(Configured, Protocol):
    """What training reads of the whole configuration (launcher.config.Config): what estimates read, what to judge and to report."""

    @property
    def eval(self) -> EvalConfig: ...
    @property
    def logging(self) -> LoggingConfig: ...
