"""The host optimizer's link and staging buffers, where copies come as late as they may and what was given back holds NaN."""

from __future__ import annotations

import threading

import torch

from efflaunch.training.optimizers.transfer import Staging


class LateCopied:
    """A copy that runs when something waits for it."""

    def __init__(self, link, pairs, check):
        self._link, self._pairs, self._check = link, pairs, check
        self._then = [source.clone() for _, source in pairs]

    def wait(self):
        with self._link.lock:
            for (target, source), then in zip(self._pairs, self._then, strict=True):
                same = torch.allclose(source, then, rtol=0.0, atol=0.0, equal_nan=True)
                assert same, f"{self._check} were written into before their copy"
                target.copy_(source)
            self._pairs, self._then = (), []


class LateLink:
    """transfer.Link on the CPU, but late. The targets of copies hold NaN until then."""

    def __init__(self, device):
        self.device, self.lock, self._up = device, threading.RLock(), []

    def to_host(self, pairs):
        _spoil(pairs)
        return LateCopied(self, pairs, "gradients")

    def to_device(self, pairs):
        _spoil(pairs)
        copied = LateCopied(self, pairs, "weights on the host")
        with self.lock:
            self._up.append(copied)
        return copied

    def join(self):
        with self.lock:
            while self._up:
                self._up.pop(0).wait()

    def host_buffer(self, num_elements, dtype):
        return torch.full((num_elements,), float("nan"), dtype=dtype)


class PoisonedHostStaging(Staging):
    """Buffers that hold NaN from when they are given back."""

    def give_back(self, buffer):
        buffer.fill_(float("nan"))
        super().give_back(buffer)


def _spoil(pairs):
    for target, _ in pairs:
        target.fill_(float("nan"))
