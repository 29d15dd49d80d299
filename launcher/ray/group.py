"""The agents of one attempt: an actor on every node of a placement group, watched until all have ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, EfflaunchError
from ..nodes.meeting import Meeting
from ..nodes.preflight import Row, table
from ..rundir.run_dir import HASH_FILE
from .keeper import NodeCard, NodeKeeper

_LOOK_S = 0.3
PEERS_PATIENCE_S = 30.0
"""Seconds the others may take to end by themselves once an agent failed or was lost."""


@dataclass
class Member:
    """One node of the attempt: its actor and how that ended."""

    actor: Any
    card: NodeCard
    name: str
    code: int | None = None
    """Exit code of the node's agent, once that has ended."""
    lost: str = ""
    """Why the node will not answer any more; empty while it may."""
    num_read: int = 0
    question: Any = None
    """The answer that is waited for."""
    tail: bytes = b""

    @property
    def has_ended(self) -> bool:
        """Return whether the agent has ended or is lost, so that nothing is to be waited for."""
        return self.code is not None or bool(self.lost)


@dataclass
class Group:
    """Members are in the order of their nodes; the first is the head."""

    placement: Any
    members: list[Member]
    say: Callable[[str], None]
    failed_at: float | None = field(default=None)

    @classmethod
    def form(cls, placement: Any, bundle: Mapping[str, float], *, timeout_s: float, say: Callable[[str], None]) -> Group:
        """Start an actor on each bundle; EfflaunchError, with the placement given back, where one does not come up."""
        from ray.util import remove_placement_group

        try:
            actors = [_make_actor(placement, index, bundle) for index in range(placement.bundle_count)]
            cards = _ask_all([actor.introduce.remote() for actor in actors], timeout_s)
            return cls(placement, _members(actors, cards), say)
        except BaseException:
            remove_placement_group(placement)
            raise

    def check_shared(self, run_dir: Path, timeout_s: float) -> None:
        """ConfigError, with a table, where a node does not see the run directory that this process sees.

        The agents look closer, but a head without it could not even say so.
        """
        expected = (run_dir / HASH_FILE).read_text()
        answers = _ask_all([member.actor.sees.remote(str(run_dir)) for member in self.members], timeout_s)
        problems = [
            problem or ("" if seen == expected else "sees another run.yaml: the run directory is not shared") for seen, problem in answers
        ]
        rows = [
            Row(host=member.name, problems=(why,) if why else (), details="") for member, why in zip(self.members, problems, strict=True)
        ]
        bad = [row.host for row in rows if row.problems]
        if bad:
            raise ConfigError(
                "nodes of the run",
                found=f"some that cannot do their part:\n{table(sorted(rows, key=lambda row: not row.problems))}\n",
                expected="the run directory on every node",
                hint=f"run.root=DIR on storage that all of them share, or leave them out: launcher.ray.exclude=[{','.join(bad)}]",
            )

    def meet(self, attempt: int, job: str, *, interface: str | None, timeout_s: float) -> Meeting:
        """Return where the agents are to meet. ConfigError for a loopback address that another node was to reach."""
        address, port = _ask_all([self.members[0].actor.meeting_point.remote(job, interface)], timeout_s)[0]
        others = {member.card.address for member in self.members[1:]}
        if address.startswith("127.") and not all(other.startswith("127.") for other in others):
            raise ConfigError(
                f"address of node {self.members[0].name}",
                found=address,
                expected="one that the other nodes can reach",
                hint="ray start --node-ip-address=ADDRESS on that node, or launcher.ray.interface=eth0",
            )
        return Meeting(attempt, address, port, int(timeout_s))

    def start(self, arguments: Sequence[str], meeting: Meeting, *, work_dir: str, variables: Mapping[str, str], timeout_s: float) -> None:
        """Start the agents with `arguments` and where they meet. ConfigError where a node cannot."""
        run_dir, *more = arguments
        questions = []
        for node, member in enumerate(self.members):
            own = ["--node", str(node), "--num-nodes", str(len(self.members)), "--name", member.name]
            questions.append(member.actor.start.remote([run_dir, str(meeting), *own, *more], work_dir, dict(variables)))
        _ask_all(questions, timeout_s)

    def look(self) -> bool:
        """Hear what is new, for a moment; whether all have ended. What agents print is said."""
        import ray

        waiting = [member for member in self.members if not member.has_ended]
        for member in waiting:
            if member.question is None:
                member.question = member.actor.look.remote(member.num_read)
        answered: list[Any] = []
        if waiting:
            answered, _ = ray.wait([member.question for member in waiting], num_returns=len(waiting), timeout=_LOOK_S)
        news = [self._take_answer(member) for member in waiting if member.question in answered]
        if not any(news):
            time.sleep(_LOOK_S)
        if self.failed_at is None and any(member.lost or member.code for member in self.members):
            self.failed_at = time.monotonic()
        return all(member.has_ended for member in self.members)

    def _take_answer(self, member: Member) -> bool:
        """Take an answer; whether there was anything new in it."""
        import ray

        question, member.question = member.question, None
        try:
            code, text = ray.get(question)
        except ray.exceptions.ActorUnavailableError:
            # Not dead, as far as Ray knows: it is asked again.
            return False
        except ray.exceptions.RayError as error:
            member.lost = _reason(error)
            self.say(f"node {member.name} is lost: {member.lost}")
            return True
        member.num_read += len(text)
        # Its last words come before its exit code counts.
        member.code = code if not text else None
        self._print(member, text, is_last=member.code is not None)
        return bool(text) or code is not None

    def _print(self, member: Member, text: bytes, *, is_last: bool) -> None:
        *lines, member.tail = (member.tail + text).split(b"\n")
        lines += [member.tail] if is_last and member.tail else []
        name = f"{member.name}: " if len(self.members) > 1 and member is not self.members[0] else ""
        for line in lines:
            self.say(name + line.decode("utf-8", "replace"))

    @property
    def is_overdue(self) -> bool:
        """Return whether the others have had the time they need to see that one has failed."""
        return self.failed_at is not None and time.monotonic() - self.failed_at > PEERS_PATIENCE_S

    def signal(self, number: int) -> None:
        """Send the signal to every agent that runs."""
        for member in self.members:
            if not member.has_ended:
                member.actor.signal.remote(number)

    def close(self) -> None:
        """End what still runs and give the nodes back."""
        import ray
        from ray.util import remove_placement_group

        for member in self.members:
            ray.kill(member.actor, no_restart=True)
        remove_placement_group(self.placement)

    def lost(self) -> dict[int, str]:
        """Return why each node that went away is lost, by its number."""
        return {node: f"{member.name}, {member.lost}" for node, member in enumerate(self.members) if member.lost}


def _make_actor(placement: Any, index: int, bundle: Mapping[str, float]) -> Any:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    rest = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    where = PlacementGroupSchedulingStrategy(placement_group=placement, placement_group_bundle_index=index)
    options = {"num_cpus": bundle.get("CPU", 0), "num_gpus": bundle.get("GPU", 0), "resources": rest}
    return ray.remote(NodeKeeper).options(max_restarts=0, scheduling_strategy=where, **options).remote()


def _members(actors: Sequence[Any], cards: Sequence[NodeCard]) -> list[Member]:
    from ... import __version__

    hosts = [card.host for card in cards]
    names = [card.host if hosts.count(card.host) == 1 else f"{card.host}/{card.id[:8]}" for card in cards]
    wrong = [f"{name} {card.version}" for name, card in zip(names, cards, strict=True) if card.version != __version__]
    if wrong:
        raise ConfigError(
            "efflaunch on the nodes", found=", ".join(wrong), expected=f"version {__version__} as here", hint="install it there"
        )
    return [Member(actor, card, name) for actor, card, name in zip(actors, cards, names, strict=True)]


def _ask_all(questions: Sequence[Any], timeout_s: float) -> list[Any]:
    """The answers; an error of ours as it was raised there, another as EfflaunchError."""
    import ray

    try:
        return list(ray.get(list(questions), timeout=timeout_s))
    except ray.exceptions.GetTimeoutError as error:
        raise EfflaunchError(f"an actor did not answer within launcher.start_timeout_s={timeout_s:g} s") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, EfflaunchError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        said = _reason(error)
        if "efflaunch" in str(error) and ("ModuleNotFoundError" in str(error) or "No module named" in str(error)):
            hint = "pip install efflaunch in the Python that Ray's nodes run, or in their image"
            raise ConfigError("a node of the Ray cluster", found="no efflaunch there", expected="the same as here", hint=hint) from error
        raise EfflaunchError(f"an actor did not come up: {said}") from error


def _reason(error: Exception) -> str:
    """The one line of Ray's many that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "died" in line.lower() or "cause" in line.lower() or "Error:" in line]
    # What follows are guesses at common causes.
    return (telling or lines or [type(error).__name__])[-1].partition(". ")[0][:300]
