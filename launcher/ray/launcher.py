"""Run on a Ray cluster: as a job handed to its server, or in the foreground on the cluster around this process or one started here."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ... import __version__
from ...errors import EXIT_DONE, ConfigError, EfflaunchError
from ...utils.atomic_files import write_atomic
from ...utils.text import typed
from ..agent.signals import on_stop_signals, stop_signals_kept
from ..backend import Launch, Standing, announce, job_exists, note_refused, print_submitted
from ..config.run_config import Config
from ..env import chosen_variables, ray_server, set_variables
from ..live_display import Display, NoDisplay, make_display
from ..nodes.outcome import store_queued
from ..output import lenient_file, steady_output
from ..run_watcher import Guard, note_output, stop_notice
from ..rundir import state
from ..rundir.lock import holding
from ..rundir.metrics_reader import MetricsFollower
from ..rundir.notices import Notices
from ..rundir.run_dir import RUN_FILE, make_run_dir
from ..rundir.state import RunState
from . import client, files
from .attempts import Driver
from .cluster import joined, started
from .files import Submission
from .request import FOLDER, HERE, Caller, JobRequest, check_ray, demand, describe_request, job_request
from .upload import measure, stage

_ENDS = {"STOPPED": "cancelled", "SUCCEEDED": state.DONE}


class RayLauncher:
    """See backends.Launcher."""

    def check(self, config: Config) -> None:
        check_ray(config, ray_server(), set_variables(config.launcher.ray.env))
        if config.launcher.ray.local:
            from ..machine_checks import check_machine

            check_machine(config)
        measure(config.launcher.ray.code, config.launcher.ray.max_upload_bytes)

    def describe(self, launch: Launch) -> str:
        if not _is_submitted(launch.config):
            return _describe_foreground(launch)
        ray = launch.config.launcher.ray
        return describe_request(_request(launch), measure(ray.code, ray.max_upload_bytes))

    def submit(self, launch: Launch) -> int:
        return self._hand_over(launch) if _is_submitted(launch.config) else _run_here(launch)

    def _hand_over(self, launch: Launch) -> int:
        server = client.JobServer(_address(launch.config))
        run_dir = launch.run_dir.resolve()
        _check_idle(run_dir)
        make_run_dir(run_dir, private=launch.config.run.private)
        with holding(run_dir):
            # Again, now that nobody else can submit: two may have looked at once.
            _check_idle(run_dir)
            request, number = _request(launch), _prepare(launch, run_dir)
            stage(run_dir, launch.config.launcher.ray.code, request.working_dir)
            files.write_submission(run_dir, Submission(job=request.submission_id, address=request.address, number=number))
            try:
                server.submit(request)
            except EfflaunchError:
                note_refused(run_dir)
                raise
        print_submitted(f"job {request.submission_id} submitted to Ray {server.version} at {request.address}", launch)
        return EXIT_DONE

    def status(self, run_dir: Path, run_state: RunState) -> Standing:
        submission = files.read_submission(run_dir)
        if submission is None:
            return Standing(state=run_state.state)
        if not submission.address:
            return _standing_here(run_dir, run_state, submission.job)
        server = client.reach(submission.address)
        if isinstance(server, EfflaunchError):
            return Standing(state=run_state.state, detail=f"job {submission.job}; {str(server).splitlines()[0]}", job=submission.job)
        return reconcile(run_state, submission.job, server.find(submission.job))

    def cancel(self, run_dir: Path, run_state: RunState, *, now: bool) -> str:
        submission = files.read_submission(run_dir)
        standing = self.status(run_dir, run_state)
        if submission is None or standing.state not in state.ACTIVE:
            hint = typed("status", run_dir)
            raise ConfigError(str(run_dir), found=f"nothing running, state {standing.state}", expected="a run to stop", hint=hint)
        # The driver reads it, so it also works where the job server is not to be reached.
        files.request_stop(run_dir, submission.job, files.NOW if now else files.SAVE)
        if not now:
            return f"job {submission.job} is told to finish its step, save and stop"
        if submission.address:
            client.JobServer(submission.address).stop(submission.job)
        return f"job {submission.job} ended; its last checkpoint stands"

    def logs(self, run_dir: Path) -> list[Path]:
        submission = files.read_submission(run_dir)
        if submission is not None and submission.address:
            _fetch_log(run_dir, submission)
        return sorted((run_dir / FOLDER).glob("*.out"), key=lambda path: path.stat().st_mtime)


def _is_submitted(config: Config) -> bool:
    return not config.launcher.ray.local and _address(config) != HERE


def _address(config: Config) -> str:
    return config.launcher.ray.address or ray_server() or HERE


def _request(launch: Launch) -> JobRequest:
    run_dir, before = launch.run_dir.resolve(), files.read_submission(launch.run_dir)
    caller = Caller(
        run_dir=run_dir,
        work_dir=Path.cwd(),
        number=before.number + 1 if before else 1,
        variables=chosen_variables(launch.config.launcher.ray.env),
        version=__version__,
        entry=launch.entry,
    )
    return job_request(launch.config, caller, _address(launch.config))


def _prepare(launch: Launch, run_dir: Path) -> int:
    """Make or revise the record of a launch in the run directory, whose lock is held; returns the number of the launch."""
    is_resumed, before = (run_dir / RUN_FILE).is_file(), files.read_submission(run_dir)
    files.clear(run_dir)
    announce(launch.run_dir, is_resumed, *store_queued(run_dir, launch.config))
    return before.number + 1 if before else 1


def _check_idle(run_dir: Path) -> None:
    """ConfigError where a job of this run already waits or runs."""
    submission = files.read_submission(run_dir)
    if submission is None or not submission.address:
        return
    server = client.reach(submission.address)
    # A cluster that is gone has taken its jobs with it; the driver's lock is looked at in any case.
    facts = None if isinstance(server, EfflaunchError) else server.find(submission.job)
    if facts is not None and facts.is_alive:
        raise job_exists(run_dir, f"job {facts.job}, {facts.state}")


def reconcile(run_state: RunState, job: str, facts: client.JobFacts | None) -> Standing:
    """The run's state by its own file and by Ray, which knows better whether anything lives. Pure."""
    if facts is None:
        gone = run_state.state in state.ACTIVE
        return Standing(state="died" if gone else run_state.state, detail=f"job {job}, which Ray does not know", job=job)
    message = f" ({facts.message.splitlines()[0][:200]})" if facts.message and facts.state in ("PENDING", "FAILED") else ""
    detail = f"job {job} {facts.state}{message}"
    if facts.is_alive or run_state.state not in state.ACTIVE:
        return Standing(state=run_state.state, detail=detail, job=job)
    return Standing(state=_ENDS.get(facts.state, "died"), detail=detail, job=job)


def _standing_here(run_dir: Path, run_state: RunState, job: str) -> Standing:
    if run_state.state not in state.ACTIVE:
        return Standing(state=run_state.state, job=job)
    if not files.has_driver(run_dir):
        return Standing(state="died", detail="its driver ended without a word", job=job)
    return Standing(state=run_state.state, detail=f"process {run_state.pid} on {run_state.host}, in the foreground", job=job)


def _fetch_log(run_dir: Path, submission: Submission) -> None:
    """Fetch from Ray what the driver printed before, or instead of, writing into the run directory."""
    server, kept = client.reach(submission.address), files.output_file(run_dir, submission.job)
    if isinstance(server, EfflaunchError) or kept.is_file() or server.find(submission.job) is None:
        return
    text = server.logs(submission.job)
    if text:
        write_atomic(kept, text)


def _describe_foreground(launch: Launch) -> str:
    config = launch.config
    bundle = ", ".join(f"{name} {amount:g}" for name, amount in demand(config).items())
    where = "a Ray cluster started here, and ended with the run" if config.launcher.ray.local else "the Ray cluster around this process"
    words = ["python", "-m", "efflaunch.launcher.ray.task", str(launch.run_dir.resolve()), "ATTEMPT@ADDRESS:PORT+TIMEOUT"]
    words += ["--entry", launch.entry] if launch.entry else []
    return (
        f"# in the foreground, on {where}, with run.yaml as --print-config shows it\n"
        f"# {config.cluster.num_nodes} nodes (STRICT_SPREAD), reserved on each: {bundle}\n"
        f"{shlex.join(words)} # on each\n"
    )


def _run_here(launch: Launch) -> int:
    from ..end_report import report_end

    client.check_installed()
    config, run_dir = launch.config, launch.run_dir.resolve()
    make_run_dir(run_dir, private=config.run.private)
    (run_dir / FOLDER).mkdir(exist_ok=True)
    with files.only_driver(run_dir):
        with holding(run_dir):
            number = _prepare(launch, run_dir)
        job = f"foreground-{number}"
        files.write_submission(run_dir, Submission(job=job, address="", number=number))
        notices = Notices(run_dir, files.output_file(run_dir, job))
        guard = Guard("the display", notices)
        title = f"{config.experiment} - {launch.run_dir}"
        display: Display = guard(make_display, config.logging.display, title, config.logging.every_steps) or NoDisplay()
        try:
            with steady_output() as output, lenient_file(files.output_file(run_dir, job)) as keep:

                def say(line: str) -> None:
                    keep(line)
                    guard(display.note, line)

                def tick() -> None:
                    note_output(output, notices)
                    guard(lambda: display.show(follower.read()))

                follower = MetricsFollower(run_dir, from_end=True)
                code = _drive(launch, run_dir, job, say, tick, notices)
        finally:
            Guard("the end of the display", notices)(display.close)
    Guard("the report of the end", notices)(report_end, launch.run_dir, code)
    return code


def _drive(launch: Launch, run_dir: Path, job: str, say: Callable[[str], None], tick: Callable[[], None], notices: Notices) -> int:
    work_dir = launch.config.launcher.ray.work_dir or str(Path.cwd())
    with _cluster(launch.config) as variables:
        driver = Driver(run_dir, job=job, entry=launch.entry, work_dir=work_dir, say=say, tick=tick)
        driver.variables = {**variables, **chosen_variables(launch.config.launcher.ray.env)}
        with stop_signals_kept():
            _take_stops(driver, notices)
            return driver.run()


@contextmanager
def _cluster(config: Config) -> Iterator[dict[str, str]]:
    if config.launcher.ray.local:
        with started(config) as variables:
            yield variables
    else:
        with joined():
            yield {}


def _take_stops(driver: Driver, notices: Notices) -> None:
    """The first stop signal has the run save and end, a second Ctrl-C ends it now."""

    def stop(number: int, frame: FrameType | None) -> None:
        if driver.wish is None:
            # Two short writes: nothing else of this process writes there in between.
            notices.add(stop_notice(number))
        driver.stop(files.NOW if driver.wish and number == signal.SIGINT else files.SAVE)

    on_stop_signals(stop)
