"""Keeps float32 weights and moments in host memory and updates them there; the device has weights in compute precision.

Reduced gradients go to the host on a stream of their own while backward goes on. A worker thread adds them up, measures them
and, with update=backward, updates a module's weights (torch's fused CPU AdamW) and starts their way back while the device works
on the module before it. With update=step the gradients wait in host memory for the global norm, and the updates run at the end.

Note: who waits for whom. A reduction's copy follows it on its stream. The worker waits for the copy, so what it writes back
follows everything that read the module's old weights in this step. `finish` (or `apply`) waits for the worker and makes the device's
stream wait for the last weights. A staging buffer is reused after the copy that reads it has ended. No more than IN_FLIGHT modules'
gradients are on their way: then backward waits, and the CPU update is the bottleneck (launcher.threads_per_rank).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...parallel.sharding.parts import like, local
from ...utils.helper_thread import HelperThread
from .adamw import set_learning_rate
from .buckets import Bucket, check_all_arrived, find_buckets, keep_wide, watch
from .config import OptimConfig, Update
from .device import ClipByKnown, first_bad, only
from .norm import NormMeter, NormScope, clip_scale
from .transfer import Copied, Link, Staging, cut
from .updater import Gradients

IN_FLIGHT = 2
"""Modules whose gradients are being copied, added or applied, beside those that are held."""


@dataclass(slots=True)
class _Job:
    """A bucket's gradients on their way to the host, or (without `copied`) gradients that are held and to be applied."""

    bucket: int
    buffer: Tensor
    copied: Copied | None
    is_last: bool
    """Whether this is the last gradient of the step for its bucket."""


class HostUpdater:
    """Owns the host weights of `model` (training/optimizers/masters.py) and the optimizer over them."""

    def __init__(
        self,
        model: nn.Module,
        weights: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: OptimConfig,
        device: torch.device,
        scope: NormScope | None = None,
    ) -> None:
        self.weights, self.optimizer, self._config, self._scope = weights, optimizer, config, scope
        self._in_backward = config.update is Update.BACKWARD
        self._clip = ClipByKnown(config)
        self._scale = 1.0
        self._live = find_buckets(model)
        named = dict(weights.named_parameters())
        self._masters: list[list[nn.Parameter]] = [[named[name] for name in bucket.names] for bucket in self._live]
        wide, narrow = local(self._masters[0][0]).dtype, local(self._live[0].parameters[0]).dtype
        if wide != narrow:
            keep_wide(self._live)
        self._link = Link(device)
        self._down, self._up = Staging(self._link, wide), Staging(self._link, narrow)
        self._sums: dict[int, Tensor] = {}
        """Sums over micro-batches, or gradients that wait for the norm, by bucket."""
        self._pending: list[tuple[Tensor, Copied]] = []
        self._meter, self._finite = NormMeter(scope), list[tuple[Bucket, Tensor]]()
        self._measuring, self._complete = False, False
        self._before_update: Callable[[], None] = lambda: None
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._room = threading.Semaphore(IN_FLIGHT)
        self._failure: BaseException | None = None
        self._worker = HelperThread(self._work, "optimizer")
        self._worker.start()
        watch(self._live, self._reduced)

    @property
    def measures_first(self) -> bool:
        return self._in_backward and self._clip.measures_first

    def start(self, rate: float, before_update: Callable[[], None]) -> None:
        set_learning_rate(self.optimizer, rate)
        self._before_update, self._measuring = before_update, self.measures_first
        self._clear()
        self._scale = self._clip.scale

    def before_final_backward(self) -> None:
        if self._in_backward and not self._measuring:
            self._before_update()
        self._complete = True

    def finish_measuring(self) -> Gradients:
        gradients = self._outcome(partly=False)
        self._clip.measured(gradients.norm)
        self._scale, self._measuring = self._clip.scale, False
        self._clear()
        return gradients

    def finish(self) -> Gradients:
        gradients = self._outcome(partly=self._in_backward)
        if self._in_backward:
            self._clip.finished(gradients.norm)
        else:
            self._scale = clip_scale(gradients.norm, self._config.grad_clip)
        return gradients

    def apply(self) -> None:
        if not self._in_backward:
            self._before_update()
            # The first layers' weights first: they are what the next forward pass starts with.
            for index, buffer in sorted(self._sums.items()):
                self._jobs.put(_Job(index, buffer, None, is_last=True))
        self._drain()
        self._link.join()
        self._clear()

    def discard(self) -> None:
        self._drain()
        self._clear()

    @torch.no_grad()
    def weights_changed(self) -> None:
        for index in range(len(self._live)):
            self._push(index)
        self._retire()
        self._link.join()

    def state_dict(self) -> dict[str, float]:
        return self._clip.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._clip.load_state_dict(state)

    def close(self) -> None:
        self._jobs.put(None)
        self._worker.join()

    @property
    def staging_bytes(self) -> int:
        """Bytes of page-locked host memory for copies under way."""
        return self._down.num_bytes + self._up.num_bytes

    def _clear(self) -> None:
        for buffer in self._sums.values():
            self._down.give_back(buffer)
        self._sums, self._meter, self._finite, self._complete = {}, NormMeter(self._scope), [], False

    # In backward, in the thread and on the stream that autograd runs the reduction's hooks in.

    def _reduced(self, bucket: Bucket) -> None:
        self._room.acquire()
        parts = [bucket.gradient(parameter) for parameter in bucket.parameters]
        buffer = self._down.take(sum(part.numel() for part in parts))
        copied = self._link.to_host(list(zip(cut(buffer, [part.shape for part in parts]), parts, strict=True)))
        self._jobs.put(_Job(bucket.index, buffer, copied, self._complete))
        for parameter in bucket.parameters:
            parameter.grad = None

    # In the worker.

    def _work(self) -> None:
        if self._link.device.type == "cuda":
            torch.cuda.set_device(self._link.device)
        while (job := self._jobs.get()) is not None:
            try:
                if self._failure is None:
                    with torch.no_grad():
                        self._do(job)
                else:
                    self._down.give_back(job.buffer)
            except BaseException as error:  # raised in the training thread by _drain
                self._failure = error
                self._down.give_back(job.buffer)
            finally:
                if job.copied is not None:
                    self._room.release()
                self._jobs.task_done()

    def _do(self, job: _Job) -> None:
        if job.copied is None:
            self._update(job.bucket, job.buffer)
            return
        job.copied.wait()
        total = self._added(job)
        if not job.is_last:
            self._sums[job.bucket] = total
            return
        finite = self._measure(job.bucket, total)
        if self._measuring:
            self._down.give_back(total)
        elif self._in_backward:
            if finite:
                self._update(job.bucket, total)
            self._down.give_back(total)
        else:
            self._sums[job.bucket] = total

    def _added(self, job: _Job) -> Tensor:
        """The bucket's sum so far, in a buffer that is not job's where there was one before."""
        total = self._sums.pop(job.bucket, None)
        if total is None:
            return job.buffer
        total.add_(job.buffer)
        self._down.give_back(job.buffer)
        return total

    def _measure(self, index: int, total: Tensor) -> bool:
        masters = self._masters[index]
        for master, gradient in zip(masters, self._cut(index, total), strict=True):
            self._meter.add(master, gradient)
        finite = self._meter.is_finite(masters)
        self._finite.append((self._live[index], finite))
        return bool(finite)

    def _update(self, index: int, total: Tensor) -> None:
        masters = self._masters[index]
        for master, gradient in zip(masters, self._cut(index, total), strict=True):
            if self._scale < 1.0:
                gradient.mul_(self._scale)
            master.grad = like(master, gradient)
        with only(self.optimizer, masters):
            self.optimizer.step()
        for master in masters:
            master.grad = None
        self._push(index)

    def _push(self, index: int) -> None:
        """Start a bucket's weights on their way to the device, in its precision."""
        self._retire(leave=1)
        targets = [local(parameter) for parameter in self._live[index].parameters]
        buffer = self._up.take(sum(target.numel() for target in targets))
        parts = cut(buffer, [target.shape for target in targets])
        for part, master in zip(parts, self._masters[index], strict=True):
            part.copy_(local(master))
        self._pending.append((buffer, self._link.to_device(list(zip(targets, parts, strict=True)))))

    def _retire(self, leave: int = 0) -> None:
        """Give back the buffers of copies to the device, the oldest first, until so many are on their way."""
        while len(self._pending) > leave:
            buffer, copied = self._pending.pop(0)
            copied.wait()
            self._up.give_back(buffer)

    def _cut(self, index: int, total: Tensor) -> list[Tensor]:
        return cut(total, [local(master).shape for master in self._masters[index]])

    # In the training thread.

    def _drain(self) -> None:
        """Wait until the worker has done all it was given; its failure is raised here."""
        self._jobs.join()
        if self._failure is not None:
            raise self._failure
        self._retire()

    def _outcome(self, *, partly: bool) -> Gradients:
        self._drain()
        check_all_arrived(self._live)
        norm = self._meter.total(self.weights.parameters())
        bad = first_bad(self._finite, self._live, norm)
        return Gradients(norm, bad, partly_applied=partly and bad is not None)
