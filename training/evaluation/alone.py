"""Evaluates a checkpoint or a model directory without training: the ranks' side of `efflaunch evaluate`.

REQUEST_FILE in the run directory says which checkpoint; without one the weights are those of `model.path`. Results are `eval` events in
metrics.jsonl, as a training run's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ...checkpoint import state
from ...checkpoint.files import read_state
from ...checkpoint.reader import DamageError, Reader
from ...errors import EXIT_DONE, EXIT_PREEMPTED, CheckpointError
from ...model.adapters.base import check_same_base
from ...model.build import position_of
from ...model.spec import active_layer_parameters, model_spec
from ...parallel.config import SequenceMode
from ...parallel.layout import solve_layout
from ...parallel.sequence.service import PlanRequest, static_plan
from ...parallel.sequence.solve import solve_greedy
from ...parallel.sharding.engine import FSDP2
from ...parallel.topology import Topology
from ...utils.heartbeat import Heartbeat
from ..agreed_ledger import agreed_ledger
from ..agreed_order import take_planned_order
from ..engines import builder_of
from ..make_groups import make_groups
from ..optimizers.build import Trained
from ..reporting.metrics import Metrics
from ..run_settings import RunSettings, Stop
from ..session import agreed_adapter, joined_ranks, plain_config, rank_kernel, stage_place, step_setup
from ..step_planner import resolve_costs
from ..step_setup import StepSetup
from .config import NEEDLES
from .corpus import open_corpora
from .measure import Evaluator, Plan
from .needles import make_needles, needle_tokenizer

REQUEST_FILE = "evaluate.json"
PRELOAD = FSDP2.preload
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Built:
    """A model built to be judged, and for nothing else."""

    device: torch.device
    topology: Topology
    model: PreTrainedModel
    step_setup: StepSetup


def evaluate(config: RunSettings, run_dir: Path, stop: Stop, pulse: Heartbeat) -> int:
    """Evaluate on every corpus of the configuration; exit code 0, or 75 after a stop. Collective over the ranks the agent started."""
    request = json.loads((run_dir / REQUEST_FILE).read_text(encoding="utf-8"))
    spec = model_spec(config.model)
    with joined_ranks(config.cluster, config.parallel.collective_timeout_s) as device:
        # First, for their errors come soonest.
        corpora = open_corpora(
            config.eval, max_seq_len=config.data.max_seq_len, vocab_size=spec.vocab_size, tokenizer=config.data.tokenizer
        )
        pulse.at("making needles")
        needles = make_needles(config.eval, needle_tokenizer(config.eval, config.data), spec.vocab_size)
        pulse.at("building the model")
        built, plan = _build(config, device, request["checkpoint"], pulse.at)
        position_of(built.model).listener = pulse.at
        evaluator = Evaluator(
            built,
            plan,
            batch_tokens=config.data.global_batch_tokens,
            vocab_size=spec.vocab_size,
            context_tokens=config.eval.context_tokens,
        )
        with Metrics(run_dir, config.logging, plain_config(config), False, rank=built.topology.rank) as metrics:
            for corpus in corpora:
                begun = time.monotonic()
                result = evaluator.corpus(corpus, _Progress(built, stop, corpus.name, metrics.write))
                if result is None:
                    return EXIT_PREEMPTED
                metrics.write("eval", step=int(request["step"] or 0), **result.fields(), eval_s=time.monotonic() - begun)
            if needles is not None:
                begun = time.monotonic()
                found = evaluator.needles(needles, _Progress(built, stop, NEEDLES, metrics.write))
                if found is None:
                    return EXIT_PREEMPTED
                metrics.write("eval", step=int(request["step"] or 0), **found.fields(), eval_s=time.monotonic() - begun)
    return EXIT_DONE


class _Progress:
    """Reports how far an evaluation is; says no once any rank is to stop."""

    def __init__(self, built: Built, stop: Stop, corpus: str, report: Callable[..., None]) -> None:
        self._built, self._stop, self._corpus, self._report = built, stop, corpus, report
        self._reported = time.monotonic()

    def __call__(self, done: int, total: int) -> bool:
        if time.monotonic() - self._reported > REPORT_EVERY_S:
            self._reported = time.monotonic()
            self._report("eval_progress", corpus=self._corpus, done_tokens=done, total_tokens=total)
        flags = torch.tensor(int(self._stop.requested), device=self._built.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._built.topology.world)
        return not bool(flags)


def _build(config: RunSettings, device: torch.device, checkpoint: str | None, beat: Callable[[str], None]) -> tuple[Built, Plan]:
    """The model with its weights, and how sequences are planned. Collective."""
    spec, parallel, data = model_spec(config.model), config.parallel, config.data
    layout = solve_layout(parallel, config.cluster, spec, max_seq_len=data.max_seq_len, global_batch_tokens=data.global_batch_tokens)
    kernel, _ = rank_kernel(config, layout, device)
    topology = make_groups(config, layout, device)
    if checkpoint is not None:
        check_base(config, Path(checkpoint), agreed_adapter(config, topology))
    ledger = agreed_ledger(config, device)
    # A checkpoint of adapters leaves out the frozen weights beside them.
    build, load, place = builder_of(config), checkpoint is None or config.adapter.is_trained, stage_place(topology, ledger)
    policy, mesh = ledger.inputs.policy, topology.experts
    trained = build(config, policy, topology.mesh, device, None, load=load, on_progress=beat, expert_mesh=mesh, place=place)
    take_planned_order(trained.model, ledger.inputs, topology)
    if checkpoint is not None:
        load_checkpoint(trained, Path(checkpoint), topology)
    request = PlanRequest(
        cost=resolve_costs(config, ledger.slowest, device, None).model,
        static_degree=layout.sp_degree,
        static_ulysses=layout.ulysses,
        linear_cost_tokens=active_layer_parameters(spec) / spec.query_size,
        certify=False,
    )
    # The cost model is arithmetic, or of one file: the same on every rank.
    adaptive = parallel.sequence is SequenceMode.ADAPTIVE
    plan: Plan = (lambda lengths: solve_greedy(lengths, request.cost)) if adaptive else (lambda lengths: static_plan(lengths, request))
    return Built(device, topology, trained.model, step_setup(trained.model, topology, ledger.inputs, device, kernel)), plan


def check_base(config: RunSettings, path: Path, adapter: Mapping[str, Any] | None) -> None:
    """Raise ConfigError where the checkpoint's adapters are of other frozen weights than `adapter` says, as a resume does."""
    try:
        contents = read_state(path)
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    check_same_base(contents["metadata"].get("adapter"), adapter, config.model, int(contents["step"]))


def load_checkpoint(trained: Trained, path: Path, topology: Topology) -> None:
    """Fill the weights from the checkpoint in `path`, each rank its part; CheckpointError where it is damaged or another model's.

    Collective where there are several stages.
    """
    own = trained.state
    weights = state.weights_of(own.tensors())
    elsewhere = _other_stages(weights, topology)
    try:
        reader = Reader(path)
        differing = state.differences(weights, {key: entry for key, entry in reader.tensors.items() if key not in elsewhere})
        if not differing:
            reader.read(weights, own.pieces)
    except (DamageError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error
    if differing:
        found = "another model's weights:\n    " + "\n    ".join(differing[:5])
        raise CheckpointError(str(path), found=found, expected="the weights of the configured model", hint="model settings as the run's")
    trained.updater.weights_changed()


def _damaged(path: Path, error: Exception) -> CheckpointError:
    hint = "efflaunch checkpoints RUN_DIR --verify finds a whole one; --step takes it"
    return CheckpointError(str(path), found=str(error), expected="a whole checkpoint", hint=hint)


def _other_stages(weights: Mapping[str, torch.Tensor], topology: Topology) -> set[str]:
    """Keys of the weights that other stages alone have. Collective where there are any."""
    if topology.pipeline is None:
        return set()
    keys: list[Any] = [None] * topology.world_size
    dist.all_gather_object(keys, list(weights), group=topology.world)
    return {key for row in keys for key in row} - set(weights)


def read_results(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fields of each corpus's evaluation among the events of an evaluation by itself."""
    found = [event for event in events if event["event"] == "eval"]
    return [{key: value for key, value in event.items() if key not in ("event", "time", "step")} for event in found]
