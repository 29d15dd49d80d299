"""The tracer of live bytes under the name the benchmarks know it by; it lives with the arena, which plans from its traces."""

from __future__ import annotations

from ..memory.arena.tracer import StorageTracer

__all__ = ["StorageTracer"]
