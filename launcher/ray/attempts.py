"""Attempt after attempt on a Ray cluster this process is connected to.

Reserves nodes, starts an agent on each, watches them, decides what follows the attempt and restarts the group
where that helps.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import EXIT_PREEMPTED, EXIT_RETRY, EfflaunchError
from ..config.node_range import node_range
from ..config.run_config import Config
from ..config.secrets import redact
from ..elastic_nodes import Sizing, size_for
from ..env import secrets
from ..nodes.faulty_nodes import excluded_names, leave_out
from ..nodes.next_action import Decision, Verdict, decide_next
from ..nodes.outcome import close_attempt, conclude, decided, describe_end, gather, is_open
from ..rundir import state
from ..rundir.lock import lock_in_time, release
from ..rundir.metrics_index import newest_step
from ..rundir.run_dir import keep_private, read_run, write_attempt
from ..rundir.state import Attempt, Failure, RunState, read_state, write_state
from .files import NOW, SAVE, requested_stop
from .group import Group
from .placement import draining, fitting, no_placement, node_offers, reserve
from .request import FOLDER, demand

_LOOK_AROUND_S = 1.0
"""Between looks at what people and the cluster want."""
_GATHER_S = 10.0
"""Seconds to wait for nodes up to the MAX of launcher.nodes where MIN are there."""


class Driver:
    """`job`: its name; `say` prints a line; `tick` is called a few times a second."""

    def __init__(
        self, run_dir: Path, *, job: str, entry: str | None, work_dir: str, say: Callable[[str], None], tick: Callable[[], None]
    ) -> None:
        self.run_dir, self.job, self.entry, self.work_dir, self.tick = run_dir, job, entry, work_dir, tick
        self.say: Callable[[str], None] = lambda line: say(redact(line, secrets()))
        self.variables: dict[str, str] = {}
        """Variables for the agents, beside what Ray's workers have."""
        self.config: Config = read_run(run_dir).config
        keep_private(self.config.run.private)
        self.offers = node_offers
        self.started = time.monotonic()
        self.wish: str | None = None
        """SAVE or NOW once a person asked the run to stop; None before."""
        self.is_draining = False
        self.looked_at = 0.0

    def stop(self, how: str = SAVE) -> None:
        """End the run for good; called from a signal handler."""
        self.wish = NOW if NOW in (how, self.wish) else SAVE

    def run(self) -> int:
        """The job's exit code, with state.json saying the same."""
        while True:
            decision = self._attempt()
            if decision.verdict not in (Verdict.AGAIN, Verdict.REQUEUE):
                return int(decision.verdict)

    def _attempt(self) -> Decision:
        self.is_draining = False
        # The ranks of the last attempt are gone once this is free.
        release(lock_in_time(self.run_dir))
        gone: dict[int, str] = {}
        try:
            sizing = self._sizing()
            group = self._form(sizing.num_nodes) if sizing is not None else None
            if group is not None and sizing is not None:
                try:
                    self._begin(group, sizing)
                    self._watch(group)
                finally:
                    group.close()
                gone = group.lost()
        except EfflaunchError as error:
            return self._refused(error)
        return self._conclude(gone, is_formed=group is not None)

    def _sizing(self) -> Sizing | None:
        """Choose how many nodes the attempt takes; None where a stop came first. ConfigError where none come in time."""
        wanted, bundle, timeout_s = node_range(self.config), demand(self.config), self.config.launcher.ray.placement_timeout_s
        if wanted.least == wanted.most:
            return Sizing(num_nodes=wanted.most, config=self.config, reason=f"{wanted.most} nodes")
        start, tried = time.monotonic(), -1
        while not self._look_around():
            waited, offers = time.monotonic() - start, self.offers()
            free = sum(offer.can(bundle) for offer in fitting(offers, bundle, self._exclude()))
            # Those of the last attempt are given back in a moment, and a node that is replaced comes soon or late.
            if free != tried and (free >= wanted.most or waited > _GATHER_S):
                tried, sizing = free, size_for(self.config, min(free, wanted.most))
                if not sizing.waits:
                    return sizing
                self.say(f"waiting for nodes, at most {timeout_s:g} s: {sizing.reason}")
            if waited > timeout_s:
                raise no_placement(offers, bundle, wanted.least, self._exclude(), timeout_s)
            time.sleep(_LOOK_AROUND_S)
        return None

    def _exclude(self) -> list[str]:
        return excluded_names(self._run_state(), self.config.launcher.ray)

    def _form(self, num_nodes: int) -> Group | None:
        """Nodes with an actor on each; None where a stop came first."""
        ray, timeout_s = self.config.launcher.ray, self.config.launcher.start_timeout_s
        bundle, patience_s = demand(self.config), ray.placement_timeout_s
        placement = reserve(bundle, num_nodes, self._exclude(), timeout_s=patience_s, is_over=self._look_around, say=self.say)
        if placement is None:
            return None
        return Group.form(placement, bundle, timeout_s=timeout_s, say=self.say)

    def _begin(self, group: Group, sizing: Sizing) -> None:
        launcher, run_state = self.config.launcher, self._run_state()
        number, names = len(run_state.attempts) + 1, tuple(member.name for member in group.members)
        interface, timeout_s = launcher.ray.interface, launcher.start_timeout_s
        group.check_shared(self.run_dir, timeout_s)
        meeting = group.meet(number, self.job, interface=interface, timeout_s=timeout_s)
        changes = write_attempt(self.run_dir, number, sizing.config)
        world_size = sizing.num_nodes * sizing.config.cluster.ranks_per_node
        attempt = Attempt(number=number, started=time.time(), num_nodes=sizing.num_nodes, world_size=world_size, hosts=names)
        starting = replace(run_state, state=state.STARTING, exit_code=None, ended=None, world_size=world_size)
        write_state(self.run_dir, replace(starting, attempts=(*run_state.attempts, attempt)))
        self.say(f"attempt {number} on {sizing.reason}: {', '.join(names)}; agents meet at {meeting.address}:{meeting.port}")
        for line in changes:
            self.say(f"  {line}")
        arguments = [str(self.run_dir), *(["--entry", self.entry] if self.entry else [])]
        group.start(arguments, meeting, work_dir=self.work_dir, variables=self.variables, timeout_s=timeout_s)

    def _watch(self, group: Group) -> None:
        passed_on: str | None = None
        mine = {member.card.id for member in group.members}
        while not group.look():
            self.tick()
            self._look_around(mine)
            if self.wish == SAVE:
                # From a signal, perhaps: the word that was left before it may say more.
                self.stop(requested_stop(self.run_dir, self.job) or SAVE)
            wish = NOW if self.wish == NOW else SAVE if self.wish or self.is_draining else None
            if wish != passed_on:
                passed_on = wish
                group.signal(signal.SIGQUIT if wish == NOW else signal.SIGUSR2)
            if group.is_overdue:
                self.say("agents that did not see that another had failed are ended")
                return

    def _look_around(self, mine: set[str] | None = None) -> bool:
        """Return whether the run is to stop: by a person's word, by its time limit or because a node of `mine` is taken away."""
        if time.monotonic() - self.looked_at >= _LOOK_AROUND_S:
            self.looked_at = time.monotonic()
            how = requested_stop(self.run_dir, self.job)
            if how is not None:
                self.stop(how)
            limit_s = self.config.launcher.ray.time_limit_s
            if limit_s is not None and self.wish is None and time.monotonic() - self.started > limit_s:
                self.say(f"launcher.ray.time_limit_s={limit_s:g} s are over")
                self.stop()
            if mine and not self.is_draining and mine & draining():
                self.is_draining = True
                self.say("a node of this run is about to be taken away: the step is finished and saved")
        return self.wish is not None

    def _run_state(self) -> RunState:
        run_state = read_state(self.run_dir)
        assert run_state is not None, "whoever starts a run writes state.json first"
        return replace(run_state, job=self.job, host=os.uname().nodename, pid=os.getpid())

    def _conclude(self, gone: dict[int, str], *, is_formed: bool) -> Decision:
        """Close the attempt, and say what follows."""
        run_state = self._run_state()
        lost_node = bool(gone)
        if not is_formed:
            # Nothing ran: the last checkpoint is all there is to save.
            run_state = replace(run_state, attempts=(*run_state.attempts, Attempt(number=len(run_state.attempts) + 1, started=time.time())))
            run_state = state.end_attempt(run_state, exit_code=EXIT_PREEMPTED, failure=None, last_step=newest_step(self.run_dir))
        elif is_open(run_state):
            run_state, lost_node = self._close(run_state, gone)
        run_state, left_out = self._leave_out(run_state)
        launcher, cancelled = self.config.launcher, self.wish is not None
        decision = decide_next(run_state, launcher, launcher.ray, cancelled=cancelled, lost_node=lost_node or left_out)
        conclude(self.run_dir, run_state, decision)
        self._print_end(run_state.attempts[-1], decision)
        return decision

    def _close(self, run_state: RunState, gone: dict[int, str]) -> tuple[RunState, bool]:
        """(state with the last attempt ended, whether a node of it is gone) from what its nodes left."""
        attempt, output = run_state.attempts[-1], Path(FOLDER) / f"{self.job}.out"
        exit_code, failure, silent = gather(
            self.run_dir, self.config, attempt.number, num_nodes=attempt.num_nodes, output=output, gone=gone
        )
        lost = [attempt.hosts[node] for node in gone if node < len(attempt.hosts)]
        ranks_per_node = self.config.cluster.ranks_per_node
        return close_attempt(self.run_dir, run_state, exit_code, failure, lost=lost, ranks_per_node=ranks_per_node), silent

    def _leave_out(self, run_state: RunState) -> tuple[RunState, bool]:
        """(state, whether a node of the last attempt is left out from now on)."""
        run_state, new = leave_out(run_state, self.config.launcher.ray, self._is_enough)
        for host, why in new.items():
            self.say(f"{host} is left out from now on: {why}")
        return run_state, bool(new)

    def _is_enough(self, excluded: Sequence[str]) -> bool:
        return len(fitting(self.offers(), demand(self.config), excluded)) >= node_range(self.config).least

    def _refused(self, error: EfflaunchError) -> Decision:
        """An attempt that did not begin: nothing that is tried again at once would help it."""
        run_state = self._run_state()
        if not is_open(run_state):
            run_state = replace(run_state, attempts=(*run_state.attempts, Attempt(number=len(run_state.attempts) + 1, started=time.time())))
        is_first = len(run_state.launch_attempts) == 1
        # Nodes that were there when the run began may come back: that is no mistake of its configuration.
        code = error.exit_code if is_first else EXIT_RETRY
        failure = Failure(rank=-1, message=str(error), traceback="", log=FOLDER, is_user_error=True)
        run_state = state.end_attempt(run_state, exit_code=code, failure=failure, last_step=newest_step(self.run_dir))
        reason = "would fail again in the same way" if is_first else "could not be restarted"
        decision = Decision(verdict=Verdict(code), reason=reason)
        conclude(self.run_dir, decided(run_state, decision), decision)
        self._print_end(run_state.attempts[-1], decision)
        return decision

    def _print_end(self, attempt: Attempt, decision: Decision) -> None:
        for line in describe_end(self.run_dir, attempt, decision.reason):
            self.say(line)
