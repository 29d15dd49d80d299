"""Which pipeline suits a configuration best: each number of stages and each order is planned as a whole, memory policy included.

Imports no torch. What is compared are the ledgers that `efflaunch plan` shows for the same keys, so a choice is made by nothing else
than what is told of it. GPipe's order is left out: it takes as long as 1f1b and holds more. Orders of slices and in a V are not run yet
(docs/pipelines.md), so none is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ...errors import ConfigError, PlanError
from ...estimate.ledger import Ledger
from ...estimate.stages import least_step_s
from ...model.spec import model_spec
from ...parallel.pipeline.config import PipelineConfig, PipelineOrder
from ...units import format_seconds, format_tokens
from ...utils.divisors import divisors
from . import checks
from .ledger import plan, plan_inputs
from .run_config import Config

VIRTUAL_STAGES = (2, 4)
"""Virtual stages of each rank that are tried: more of them send more, and few models have the layers."""

_KEY = "parallel.pipeline"


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineTrial:
    """One way to cut the model into stages: what to type for it, and its ledger."""

    overrides: tuple[str, ...]
    config: Config
    ledger: Ledger | None = None
    """None: it was refused or cannot be the fastest, `reason` says which."""
    reason: str = ""
    least_s: float = 0.0
    """Seconds a step takes at least, whatever is kept, moved and recomputed."""

    @property
    def fits(self) -> bool:
        return self.ledger is not None and self.ledger.fits

    @property
    def rank(self) -> tuple[float, ...]:
        """Sort key, best first: what fits by time, then what does not by how near it comes, then the others; few stages first."""
        stages = self.config.parallel.pipeline.stages
        if self.ledger is None:
            return (2.0, self.least_s or float("inf"), stages)
        if self.ledger.fits:
            return (0.0, self.ledger.timing.step_s, stages)
        return (1.0, max(account.peak_bytes / account.usable_bytes for account in self.ledger.accounts), stages)

    def describe(self) -> str:
        """How it is cut, its order and what a step takes, in words."""
        pipeline = self.config.parallel.pipeline
        name = f"{pipeline.stages} stages, {pipeline.order.value}" if pipeline.stages > 1 else "no stages"
        name += f" with {pipeline.virtual} virtual stages a rank" * (pipeline.virtual > 1)
        if self.ledger is None:
            return f"{name}: {self.reason}"
        return f"{name}: {format_seconds(self.ledger.timing.step_s)} a step" + ", and does not fit" * (not self.ledger.fits)


def decide_pipeline(config: Config, tell: Callable[[str], None]) -> Config:
    """`config` with parallel.pipeline.auto decided: the fastest that fits, of equal ones that with fewest stages.

    Where nothing fits it is what comes nearest, which planning and starting then refuse as any other. `tell` gets a line before the
    search and one after it. ConfigError where the keys that are to be decided are given.
    """
    _check_open(config.parallel.pipeline)
    count = sum(1 for _ in candidates(config))
    if count > 1:
        tell(f"{_KEY}.auto: planning {count} ways to cut the model into stages")
    trials = try_pipelines(config)
    best, whole = trials[0], next(trial for trial in trials if trial.config.parallel.pipeline.stages == 1)
    beside = f"; {whole.describe()}" if best is not whole else ""
    tell(f"{_KEY}.auto: {best.describe()}{beside}; as typed: {' '.join(best.overrides)}")
    return best.config


def try_pipelines(config: Config) -> Sequence[PipelineTrial]:
    """All candidates, the best first, with the ledgers of those that may be it.

    Errors of the model without stages are raised, those of stages are reasons. What takes longer than the fastest that fits, whatever
    its memory policy, is not planned.
    """
    whole, *others = candidates(config)
    checks.check_config(whole.config)
    trials = [replace(whole, ledger=plan(whole.config))]
    tried = sorted(map(_bounded, others), key=lambda trial: trial.least_s)
    for trial in tried:
        best_s = min((one.ledger.timing.step_s for one in trials if one.ledger is not None and one.fits), default=float("inf"))
        if not trial.reason and trial.least_s >= best_s:
            trial = replace(trial, reason=f"takes {format_seconds(trial.least_s)} at least")
        trials.append(trial if trial.reason else replace(trial, ledger=plan(trial.config)))
    return sorted(trials, key=lambda trial: trial.rank)


def _bounded(trial: PipelineTrial) -> PipelineTrial:
    """The trial with a bound of its step time, or with what refuses it."""
    try:
        checks.check_config(trial.config)
        return replace(trial, least_s=least_step_s(plan_inputs(trial.config)))
    except (ConfigError, PlanError) as error:
        return replace(trial, reason=f"{error.where}: {error.found}")


def candidates(config: Config) -> Iterator[PipelineTrial]:
    """Ways there are ranks and layers for, with room for the longest sequence on the ranks of a stage; first the one without stages."""
    layers, world = model_spec(config.model).num_layers, config.cluster.num_nodes * config.cluster.ranks_per_node
    given = config.parallel.pipeline.micro_batches
    yield _candidate(config, PipelineConfig(micro_batches=given))
    for stages in divisors(world):
        if 2 <= stages <= layers:
            for order in (PipelineOrder.ONE_F_ONE_B, PipelineOrder.ZERO_BUBBLE):
                yield _candidate(config, PipelineConfig(stages=stages, order=order, micro_batches=given))
            for virtual in VIRTUAL_STAGES:
                if stages * virtual <= layers:
                    order = PipelineOrder.INTERLEAVED
                    yield _candidate(config, PipelineConfig(stages=stages, order=order, virtual=virtual, micro_batches=given))


def _candidate(config: Config, pipeline: PipelineConfig) -> PipelineTrial:
    """The configuration with these stages, and with more tokens a rank where those of one stage could not hold a longest sequence."""
    overrides = [f"{_KEY}.stages={pipeline.stages}"]
    overrides += [f"{_KEY}.order={pipeline.order.value}"] * (pipeline.order is not PipelineOrder.ONE_F_ONE_B)
    overrides += [f"{_KEY}.virtual={pipeline.virtual}"] * (pipeline.virtual > 1)
    ranks = config.cluster.num_nodes * config.cluster.ranks_per_node // pipeline.stages
    # Sequence groups have powers of two of ranks.
    least = -(-config.data.max_seq_len // (1 << (ranks.bit_length() - 1)))
    parallel = replace(config.parallel, pipeline=pipeline)
    if pipeline.stages > 1 and parallel.tokens_per_rank < least:
        parallel = replace(parallel, tokens_per_rank=least)
        overrides.append(f"parallel.tokens_per_rank={format_tokens(least).replace(',', '')}")
    return PipelineTrial(overrides=tuple(overrides), config=replace(config, parallel=parallel))


def _check_open(pipeline: PipelineConfig) -> None:
    """ConfigError where a key is given that is to be decided."""
    default = PipelineConfig()
    for key in ("stages", "order", "virtual", "layers"):
        value = getattr(pipeline, key)
        if value != getattr(default, key):
            text, usual = (str(getattr(one, "value", one)) for one in (value, getattr(default, key)))
            raise ConfigError(
                f"{_KEY}.{key}",
                found=f"{text} with {_KEY}.auto=true",
                expected="one of the two: auto decides stages, order, virtual and layers",
                hint=f"{_KEY}.{key}={usual.replace('None', 'null')}, or {_KEY}.auto=false",
            )
