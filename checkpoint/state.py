"""Defines what a checkpoint holds as tensors: weights, optimizer states and each rank's random number generators.

Keys: `model.NAME`, `optimizer.NAME.STATE` (both by parameter name, so any world size can read them) and
`rng.RANK.GENERATOR` (bytes of one rank, useless to another layout).
"""

from __future__ import annotations

import json
import random
from collections.abc import Hashable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .flat import Piece
from .reader import SavedTensor

MODEL, OPTIMIZER, RNG = "model.", "optimizer.", "rng."


class State(Protocol):
    """What a checkpoint engine saves and restores of one rank, whoever shards it. Every rank calls every method, in the same order."""

    def tensors(self) -> dict[str, Tensor]:
        """Live tensors by key (`model.NAME`, `optimizer.NAME.STATE`), no copies; of sharded ones this rank's part is meant."""
        ...

    def changing_in_forward(self) -> set[str]:
        """Keys of what a forward may change (statistics, router biases): saved as it is at the call, not later."""
        ...

    def allocate(self, saved: dict[str, SavedTensor]) -> None:
        """Empty the optimizer and give it the states that `saved` names, unset, for a restore to fill."""
        ...

    def local(self, value: Tensor, offsets: tuple[int, ...]) -> Tensor:
        """This rank's own memory of one of the tensors, of the piece that starts at `offsets`. Called for each at every save: fast."""
        ...

    def pieces(self, value: Tensor) -> list[Piece]:
        """All this rank's memory of one of the tensors, each piece with its offsets in the whole, by dim."""
        ...

    def sharding(self, value: Tensor) -> Hashable:
        """A key that changes when the tensor lies over the ranks in another way: files are planned anew then."""
        ...


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights among a state's tensors: parameters and buffers, without the optimizer's states."""
    return {key: value for key, value in tensors.items() if key.startswith(MODEL)}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters once each (tied ones under their first name) and persistent buffers; the live tensors, no copies."""
    buffers: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, value in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                buffers[name] = value
    # Neither detached nor as state_dict() has them: with many sharded ones that takes longer than the rest of a save.
    return {MODEL + name: value for name, value in (*model.named_parameters(), *buffers.items())}


def changing_in_forward(model: nn.Module) -> set[str]:
    """Keys of what a forward may change (statistics, router biases): saved as it is at the call, not later."""
    return {MODEL + name for name, _ in model.named_buffers()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The states of every parameter that has some, by name; the live tensors. Hyperparameters belong to the configuration.

    An optimizer whose states are of a kind of their own says by `plain_state` what they are as plain tensors.
    """
    tensors = {}
    plain = getattr(optimizer, "plain_state", lambda value: value)
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"optimizer state {key} of {name} is not a tensor"
            tensors[f"{OPTIMIZER}{name}.{key}"] = plain(value)
    return tensors


def allocate_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, SavedTensor]) -> None:
    """Empties the optimizer and gives it the states that `saved` names, unset: sharded like their parameter where alike."""
    optimizer.state.clear()
    trainable = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter not in trainable:
            continue
        for key, entry in saved_states(saved, name):
            dtype = entry.dtype
            if entry.size == parameter.shape and parameter.ndim:
                value: Tensor = torch.empty_like(parameter, dtype=dtype)
            else:
                value = torch.empty(entry.size, dtype=dtype, device=parameter.device)
            optimizer.state[parameter][key] = value.detach()


def saved_states(saved: dict[str, SavedTensor], name: str) -> list[tuple[str, SavedTensor]]:
    """Optimizer states that a checkpoint holds of a parameter, by their own names (`exp_avg`)."""
    prefix = f"{OPTIMIZER}{name}."
    return [(key[len(prefix) :], entry) for key, entry in saved.items() if key.startswith(prefix) and "." not in key[len(prefix) :]]


def differences(model: dict[str, Tensor], saved: dict[str, SavedTensor]) -> list[str]:
    """One line per weight that a checkpoint holds otherwise than the model, in the model's order."""
    lines = []
    for key, value in model.items():
        name, ours = key[len(MODEL) :], _shape(value.shape, value.dtype)
        if key not in saved:
            lines.append(f"{name}: not in the checkpoint, {ours} in the model")
        elif (theirs := _shape(saved[key].size, saved[key].dtype)) != ours:
            lines.append(f"{name}: {theirs} in the checkpoint, {ours} in the model")
    for key, entry in saved.items():
        if key.startswith(MODEL) and key not in model:
            lines.append(f"{key[len(MODEL) :]}: {_shape(entry.size, entry.dtype)} in the checkpoint, not in the model")
    return lines


def _shape(size: Iterable[int], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, size)) or 'scalar'} {str(dtype).removeprefix('torch.')}"


def rng_tensors(rank: int) -> dict[str, Tensor]:
    """This rank's generators as bytes: torch (and its current CUDA device), NumPy's and Python's global ones."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    inner = numpy_state["state"]
    numpy_json = {**numpy_state, "state": {"key": inner["key"].tolist(), "pos": inner["pos"]}}
    states = {"torch": torch.get_rng_state(), "numpy": _to_bytes(numpy_json), "python": _to_bytes(random.getstate())}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"{RNG}{rank}.{key}": value for key, value in states.items()}


def set_rng(tensors: dict[str, Tensor], rank: int) -> None:
    """Restore what rng_tensors returned, exactly."""
    states = {key[len(f"{RNG}{rank}.") :]: value for key, value in tensors.items()}
    torch.set_rng_state(states["torch"])
    numpy_json = _from_bytes(states["numpy"])
    numpy_json["state"]["key"] = np.array(numpy_json["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_json)
    version, words, gauss = _from_bytes(states["python"])
    random.setstate((version, tuple(words), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_rng(seed: int, step: int, rank: int) -> None:
    """Seed generators as a function of (seed, step, rank): where the saved ones belong to another layout."""
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    torch.manual_seed(int(mixed[0]))
    np.random.seed(int(mixed[1]))
    random.seed(int(mixed[2]))


def _to_bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(value: Tensor) -> Any:
    return json.loads(bytes(value.numpy()))
