"""A ledger of what ranks say to each other, and what must hold of it. `record` runs on ranks, `check_*` in the test.

Recorded at torch's dispatcher, so whoever calls: FSDP2, layers, pipelines, tests. An entry names group, operation, numbers, dtype.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

POINT_TO_POINT = ("send", "recv_")
UNEQUAL = ("alltoall_base_", "alltoall_", "gather_", "scatter_")
"""Operations whose ranks give and get different amounts."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a rank."""

    group: str
    operation: str
    sizes: tuple[int, ...]
    """Numbers of each tensor; of an exchange also those sent to, and received from, each rank."""
    dtype: str
    peer: int | None = None
    """The other rank of a send or receive, in the run."""

    @property
    def is_collective(self) -> bool:
        """Whether all ranks of the group make it together."""
        return self.operation not in POINT_TO_POINT


Ledger = list[Call]
Members = dict[str, tuple[int, ...]]
"""Ranks of the run in each group, in the group's order."""


def recorded(work: Callable[..., Any], *args: Any) -> tuple[Any, Ledger, Members]:
    """What `work` returns on this rank, its calls in order, and its groups."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    ledger: Ledger = []
    members: Members = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "c10d":
                group = next(filter(None, (_group_of(arg) for arg in args)))
                members[group.group_name] = tuple(dist.get_process_group_ranks(group))
                ledger.append(_call(func._schema.name.partition("::")[2], args, group, members[group.group_name]))
            return func(*args, **(kwargs or {}))

    def _group_of(arg: Any) -> dist.ProcessGroup | None:
        return dist.ProcessGroup.unbox(arg) if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()) else None

    with Recorder():
        result = work(*args)
    return result, ledger, members


def _call(operation: str, args: Sequence[Any], group: Any, ranks: tuple[int, ...]) -> Call:
    tensors = list(_tensors(args))
    lists = [tuple(arg) for arg in args if isinstance(arg, list) and arg and all(isinstance(each, int) for each in arg)]
    sizes = tuple(tensor.numel() for tensor in tensors)
    dtype = str(tensors[0].dtype) if tensors else ""
    if operation in POINT_TO_POINT:
        return Call(group.group_name, operation, sizes, dtype, ranks[next(arg for arg in args if isinstance(arg, int))])
    return Call(group.group_name, operation, sizes + tuple(each for part in lists for each in part), dtype)


def _tensors(args: Any) -> Iterable[Any]:
    import torch

    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _tensors(arg)


def check_one_order(ledgers: Sequence[Ledger], members: Members) -> None:
    """All ranks of a group make the same collectives in the same order; each message that is sent is received."""
    for group, ranks in members.items():
        calls = {rank: [call for call in ledgers[rank] if call.group == group and call.is_collective] for rank in ranks}
        first = calls[ranks[0]]
        for rank, mine in calls.items():
            assert len(mine) == len(first), f"group {group}: {len(mine)} collectives on rank {rank}, {len(first)} on {ranks[0]}"
            for index, (call, other) in enumerate(zip(mine, first, strict=True)):
                assert _agree(call, other), f"group {group}, call {index}: {call} on rank {rank}, {other} on {ranks[0]}"
    messages: dict[tuple[str, int, int], dict[str, list[tuple[tuple[int, ...], str]]]] = defaultdict(lambda: defaultdict(list))
    for rank, ledger in enumerate(ledgers):
        for call in ledger:
            if not call.is_collective and call.peer is not None:
                ends = (rank, call.peer) if call.operation == "send" else (call.peer, rank)
                messages[call.group, *ends][call.operation].append((call.sizes, call.dtype))
    for ends, both in messages.items():
        assert both["send"] == both["recv_"], f"{ends}: sent {both['send']}, received {both['recv_']}"


def _agree(call: Call, other: Call) -> bool:
    same = (call.operation, call.dtype) == (other.operation, other.dtype)
    return same and (call.operation in UNEQUAL or call.sizes == other.sizes)


def check_first_calls(ledgers: Sequence[Ledger], members: Members) -> None:
    """All ranks of a group are in its first call."""
    for group, ranks in members.items():
        for rank in ranks:
            first = next((call for call in ledgers[rank] if call.group == group), None)
            assert first is not None and first.is_collective, f"group {group} of {ranks} begins with {first} on rank {rank}"


def check_no_circle(ledgers: Sequence[Ledger], members: Members) -> None:
    """Every rank comes to its end where each collective waits for all ranks of its group and nothing else waits."""
    left = [deque(call for call in ledger if call.is_collective) for ledger in ledgers]
    waiting: Counter[str] = Counter(queue[0].group for queue in left if queue)
    ready = [group for group, count in waiting.items() if count == len(members[group])]
    while ready:
        group = ready.pop()
        for rank in members[group]:
            left[rank].popleft()
            if left[rank]:
                waiting[left[rank][0].group] += 1
        waiting[group] -= len(members[group])
        heads = {left[rank][0].group for rank in members[group] if left[rank]}
        ready += [head for head in heads if waiting[head] == len(members[head]) and head not in ready]
    stuck = {rank: queue[0] for rank, queue in enumerate(left) if queue}
    assert not stuck, f"ranks wait for each other in a circle: {stuck}"


def check_ledgers(ledgers: Sequence[Ledger], members: Members) -> None:
    """All of it."""
    check_one_order(ledgers, members)
    check_first_calls(ledgers, members)
    check_no_circle(ledgers, members)
