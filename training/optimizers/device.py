"""Updates weights on the device: all after backward, or each module within it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from ...parallel.sharding.parts import local
from ...parallel.topology import whole_world
from .adamw import clip_gradients, set_learning_rate
from .buckets import Bucket, check_all_arrived, find_buckets, watch
from .config import ClipMode, OptimConfig
from .norm import NormMeter, NormScope, clip_scale
from .updater import Gradients


class StepUpdater:
    """Updates once per step, from all gradients and their global norm."""

    measures_first = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, scope: NormScope | None = None) -> None:
        self.weights, self.optimizer, self._config, self._scope = model, optimizer, config, scope
        self._before_update: Callable[[], None] = _nothing

    def start(self, rate: float, before_update: Callable[[], None]) -> None:
        set_learning_rate(self.optimizer, rate)
        self._before_update = before_update

    def before_final_backward(self) -> None:
        """Does nothing: every gradient waits for `apply`."""

    def finish_measuring(self) -> Gradients:
        raise AssertionError("this updater does not measure first")

    def finish(self) -> Gradients:
        """Clips the gradients as well; a norm that is not finite leaves them as they are."""
        return Gradients(clip_gradients(self.weights, self._config.grad_clip, self._scope))

    def apply(self) -> None:
        self._before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        self.optimizer.zero_grad()

    def weights_changed(self) -> None:
        """Does nothing: the weights are the model's own."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Does nothing: no step needs anything of the one before."""

    def close(self) -> None:
        """Does nothing: there are no threads."""


class ClipByKnown:
    """Scales a step's gradients before they all exist: by the norm of a measuring pass, or of the step before."""

    def __init__(self, config: OptimConfig) -> None:
        self._max_norm = config.grad_clip
        self._by_previous = config.grad_clip is not None and config.clip_mode is ClipMode.PREVIOUS_NORM
        self._two_pass = config.grad_clip is not None and config.clip_mode is ClipMode.TWO_PASS
        self._norm: float | None = None

    @property
    def measures_first(self) -> bool:
        # The first step of a run has no step before it: it measures its own norm, and is exact.
        return self._two_pass or (self._by_previous and self._norm is None)

    @property
    def scale(self) -> float:
        """The factor of this step's gradients."""
        return 1.0 if self._norm is None else clip_scale(self._norm, self._max_norm)

    def measured(self, norm: float) -> None:
        """Take the norm this step is clipped by."""
        self._norm = norm

    def finished(self, norm: float) -> None:
        """Take the norm this step turned out to have."""
        self._norm = norm if self._by_previous else None

    def state_dict(self) -> dict[str, float]:
        return {"previous_norm": self._norm} if self._by_previous and self._norm is not None else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._norm = state.get("previous_norm") if self._by_previous else None


class BackwardUpdater:
    """Each module is updated where its gradients are reduced, on the stream of the reduction; then they are freed.

    Note: what is not finite. The fused update of a module skips itself on the device where one of its gradients is not finite
    (`found_inf`), so nothing waits for the device in backward. `finish` then tells every rank; modules updated before are in
    memory only, and the run has to end without a save.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: OptimConfig, scope: NormScope | None = None) -> None:
        self.weights, self.optimizer, self._scope = model, optimizer, scope
        self._clip = ClipByKnown(config)
        self._buckets = find_buckets(model)
        self._meter, self._measuring, self._complete = NormMeter(scope), False, False
        self._finite: list[tuple[Bucket, torch.Tensor]] = []
        self._before_update: Callable[[], None] = _nothing
        watch(self._buckets, self._reduced)

    @property
    def measures_first(self) -> bool:
        return self._clip.measures_first

    def start(self, rate: float, before_update: Callable[[], None]) -> None:
        set_learning_rate(self.optimizer, rate)
        self._before_update, self._measuring = before_update, self.measures_first
        self._clear()

    def before_final_backward(self) -> None:
        self._complete = True
        if not self._measuring:
            self._before_update()

    def finish_measuring(self) -> Gradients:
        gradients = self._outcome(partly=False)
        self._clip.measured(gradients.norm)
        self._measuring = False
        self._clear()
        return gradients

    def finish(self) -> Gradients:
        gradients = self._outcome(partly=True)
        self._clip.finished(gradients.norm)
        return gradients

    def apply(self) -> None:
        """Does nothing: every module was updated in backward."""
        self._clear()

    def discard(self) -> None:
        self._clear()

    def weights_changed(self) -> None:
        """Does nothing: the weights are the model's own."""

    def state_dict(self) -> dict[str, float]:
        return self._clip.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._clip.load_state_dict(state)

    def close(self) -> None:
        """Does nothing: there are no threads."""

    def _clear(self) -> None:
        self._meter, self._finite, self._complete = NormMeter(self._scope), [], False

    def _reduced(self, bucket: Bucket) -> None:
        if not self._complete:
            return  # a gradient that later micro-batches are added to
        gradients = [local(parameter.grad) for parameter in bucket.parameters if parameter.grad is not None]
        for parameter, gradient in zip(bucket.parameters, gradients, strict=True):
            self._meter.add(parameter, gradient)
        finite = self._meter.is_finite(bucket.parameters)
        self._finite.append((bucket, finite))
        if not self._measuring:
            if self._clip.scale < 1.0:
                torch._foreach_mul_(gradients, self._clip.scale)
            self._update(bucket, finite)
        for parameter in bucket.parameters:
            parameter.grad = None

    def _update(self, bucket: Bucket, finite: torch.Tensor) -> None:
        with only(self.optimizer, bucket.parameters):
            if isinstance(self.optimizer, torch.optim.AdamW):
                self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
                self.optimizer.step()
                del self.optimizer.found_inf  # type: ignore[attr-defined]
            elif bool(finite):  # other optimizers cannot skip on the device
                self.optimizer.step()

    def _outcome(self, *, partly: bool) -> Gradients:
        check_all_arrived(self._buckets)
        norm = self._meter.total(self.weights.parameters())
        bad = first_bad(self._finite, self._buckets, norm)
        return Gradients(norm, bad, partly_applied=partly and bad is not None)


def first_bad(finite: Sequence[tuple[Bucket, torch.Tensor]], buckets: Sequence[Bucket], norm: float) -> str | None:
    """The first module of any rank, in backward's order, with a gradient that is not finite. Collective if `norm` is not.

    A norm can overflow though every module's is finite: then the first module of backward is named.
    """
    if math.isfinite(norm):
        return None
    order = [bucket for bucket, _ in finite]
    mine = next((place for place, (_, good) in enumerate(finite) if not bool(good)), len(order))
    place = torch.tensor(mine, dtype=torch.int64, device=finite[0][1].device if finite else "cpu")
    if dist.is_initialized():
        dist.all_reduce(place, dist.ReduceOp.MIN, group=whole_world())
    return order[min(int(place), len(order) - 1)].label if order else buckets[0].label


@contextmanager
def only(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Restrict `optimizer.step` to these parameters: others may have gradients too, sums that are not complete yet."""
    chosen = set(parameters)
    everything = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter in chosen]
    try:
        yield
    finally:
        for group, whole in zip(optimizer.param_groups, everything, strict=True):
            group["params"] = whole


def _nothing() -> None:
    return None
