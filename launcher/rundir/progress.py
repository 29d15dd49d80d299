"""Progress of a run, folded from its metrics events. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...estimate.certificate import check_line
from ...units import format_bytes, format_precise, format_seconds, format_tokens
from .metrics_reader import Event

_RECENT_STEPS = 20
_NAMED = 8
"""Stragglers that are named at most."""
SHOWN = ("dpo_margin", "dpo_accuracy", "grpo_clip_fraction", "grpo_kl")
"""Numbers of an objective that a step's line shows."""


@dataclass(slots=True)
class RunProgress:
    """Everything known so far; `losses` holds the valid loss of each step (a resumed run does its lost steps again)."""

    steps: int = 0
    world_size: int = 0
    parameters: int = 0
    resumed_from: int | None = None
    losses: dict[int, float | None] = field(default_factory=dict)
    durations: dict[int, float] = field(default_factory=dict)
    last: Event | None = None
    total_tokens: int = 0
    peak_bytes: dict[int, int] = field(default_factory=dict)
    """Most memory of each rank, over all steps."""
    checkpoint: Event | None = None
    checkpoint_error: str | None = None
    mirror_error: str | None = None
    """Why the newest copy did not arrive in the second place; None: it did, or none was due."""
    stalls: list[float] = field(default_factory=list)
    """Seconds that training waited for each checkpoint."""
    durable: list[float] = field(default_factory=list)
    """Seconds from each save until it was committed on disk."""
    sequence: str = "static"
    """parallel.sequence of the run."""
    planner_error: str | None = None
    drift: dict[str, float] = field(default_factory=dict)
    """Measured over modelled time of the group degrees for which it is far from one."""
    stragglers: list[dict[str, Any]] = field(default_factory=list)
    """rank, host and ratio of each rank that is steadily slower than its plans predict."""
    memory: list[str] = field(default_factory=list)
    """The memory policy of the run, in clauses."""
    bound: str = ""
    """Most memory the run takes, by its certificate."""
    evaluations: dict[str, Event] = field(default_factory=dict)
    """The newest evaluation on each corpus."""
    best: Event | None = None
    """The checkpoint that train.keep_best pinned."""
    early_stop: Event | None = None
    """Why the run ended before its last step."""
    certificate: Event | None = None
    """The newest check of a measured step against it."""

    def apply(self, events: Iterable[Event]) -> RunProgress:
        """Take in new events, in order; returns itself."""
        handlers = {
            "start": self._start,
            "step": self._step,
            "checkpoint": self._saved,
            "checkpoint_failed": self._not_saved,
            "mirrored": self._mirrored,
            "mirror_failed": self._not_mirrored,
            "planner_failed": self._planner_failed,
            "drift": self._drifted,
            "certificate": self._checked,
            "stragglers": self._named,
            "eval": self._evaluated,
            "best": self._is_best,
            "early_stop": self._stopped_early,
        }
        for event in events:
            handler = handlers.get(event["event"])
            if handler is not None:
                handler(event)
        return self

    def _start(self, event: Event) -> None:
        self.steps, self.world_size = event["steps"], event["world_size"]
        self.parameters, self.resumed_from = event["parameters"], event.get("resumed_from")
        self.sequence, self.planner_error = event.get("sequence") or "static", None
        self.memory, self.certificate, self.stragglers = event.get("memory") or [], None, []
        self.bound = bound_text(event["certificate"]) if event.get("certificate") else ""
        kept, self.early_stop = self.resumed_from or 0, None
        self.evaluations = {name: event for name, event in self.evaluations.items() if event["step"] <= kept}
        for values in (self.losses, self.durations):
            for step in [step for step in values if step > kept]:
                del values[step]

    def _step(self, event: Event) -> None:
        step = event["step"]
        self.losses[step], self.durations[step], self.last = event["loss"], event["step_s"], event
        self.total_tokens = event.get("total_tokens") or self.total_tokens
        for rank in event.get("ranks") or ():
            number = rank["rank"]
            self.peak_bytes[number] = max(self.peak_bytes.get(number, 0), rank["peak_bytes"])

    def _saved(self, event: Event) -> None:
        self.checkpoint, self.checkpoint_error = event, None
        if event.get("stall_s") is not None and event.get("save_s") is not None:
            self.stalls.append(event["stall_s"])
            self.durable.append(event["save_s"])

    def _not_saved(self, event: Event) -> None:
        self.checkpoint_error = event["error"]

    def _mirrored(self, event: Event) -> None:
        self.mirror_error = None

    def _not_mirrored(self, event: Event) -> None:
        self.mirror_error = mirror_line(event)

    def _planner_failed(self, event: Event) -> None:
        self.planner_error = event["error"]

    def _drifted(self, event: Event) -> None:
        self.drift.update(event["measured_over_predicted"])

    def _named(self, event: Event) -> None:
        self.stragglers = event["ranks"]

    def _evaluated(self, event: Event) -> None:
        self.evaluations[event["corpus"]] = event

    def _is_best(self, event: Event) -> None:
        self.best = event

    def _stopped_early(self, event: Event) -> None:
        self.early_stop = event

    def _checked(self, event: Event) -> None:
        self.certificate = event

    @property
    def step(self) -> int:
        """Newest valid step; 0 before the first."""
        return max(self.losses, default=0)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean of the latest steps, without the first of the run, which also warms up."""
        recent = [self.durations[step] for step in sorted(self.durations)[1:][-_RECENT_STEPS:]]
        return sum(recent) / len(recent) if recent else None

    @property
    def time_left_s(self) -> float | None:
        """Seconds that the remaining steps take at the present pace."""
        pace = self.seconds_per_step
        return None if pace is None else pace * (self.steps - self.step)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of the newest step, over all ranks."""
        return self.last.get("tokens_per_s") if self.last else None


def number_text(value: float | None, form: str) -> str:
    """`value` in the format `form`; `unknown` where metrics.jsonl has none, as after somebody's edit."""
    return "unknown" if value is None else format(value, form)


def step_line(progress: RunProgress) -> str:
    """The newest step in one line of plain text."""
    event = progress.last
    assert event is not None, "no step yet"
    speed = number_text(progress.tokens_per_s, ",.0f")
    parts = [f"step {event['step']}/{progress.steps}", f"loss {number_text(event['loss'], '.4f')}", f"{speed} tokens/s"]
    if event.get("mfu") is not None:
        parts.append(f"mfu {event['mfu']:.1%}")
    if event.get("grad_norm") is not None:
        parts.append(f"grad {event['grad_norm']:.3f}")
    if event.get("expert_load") is not None:
        parts.append(f"experts {event['expert_load']:.1f}x")
    if event.get("dropped_share") is not None:
        parts.append(f"dropped {event['dropped_share']:.1%}")
    parts += [f"{row['name']} {number_text(row.get('loss'), '.4f')}" for row in event.get("sources") or () if "loss" in row]
    parts += [f"{name.partition('_')[2].replace('_', ' ')} {event[name]:.3f}" for name in SHOWN if event.get(name) is not None]
    parts += [f"lr {number_text(event.get('lr'), '.2e')}", format_seconds(event["step_s"])]
    if progress.time_left_s is not None:
        parts.append(f"{format_seconds(progress.time_left_s)} to go")
    return "  ".join([*parts, event.get("plan") or ""]).rstrip()


def start_line(event: Event) -> str:
    """Describe how the run starts, and from what."""
    where = "from the beginning" if event.get("resumed_from") is None else f"after step {event['resumed_from']}"
    if str(event.get("restored_from")).startswith("the memory of"):
        where += f", from {event['restored_from']}"
    lines = [f"{event['parameters'] / 1e6:,.1f} million weights on {event['world_size']} ranks, {event['steps']} steps, starting {where}"]
    lines += [f"passed over a damaged checkpoint: {text}" for text in event.get("skipped_checkpoints") or ()]
    lines += [f"NOT EXACT: {text}" for text in event.get("optimizer_inexact") or ()]
    if event.get("sequence") == "adaptive" and event.get("costs"):
        lines.append(f"step times are modelled: {event['costs']}")
    if event.get("data_changes"):
        lines.append(f"the data is not what the checkpoint was trained on, other documents follow: {'; '.join(event['data_changes'])}")
    if event.get("mix_change"):
        lines.append(str(event["mix_change"]))
    if (event.get("schedule") or {}).get("change"):
        lines.append(str(event["schedule"]["change"]))
    if event.get("memory"):
        lines.append(f"memory: {'; '.join(event['memory'])}")
    if event.get("certificate"):
        lines.append(f"certificate: {bound_text(event['certificate'])}; checked after the first step")
    return "\n".join(lines)


def score_line(event: Event) -> str:
    """Describe how far the scoring before the first step is."""
    done, total = event["done_tokens"], event["total_tokens"]
    return f"log-probabilities under the initial weights: {done:,} of {total:,} tokens, {format_seconds(event['elapsed_s'])}"


def evaluation_text(event: Event) -> str:
    """`web 2.4131 (8K 2.51, 128K 2.44), 0.071 from context beyond 4K`, of one corpus."""
    lengths = ", ".join(f"{format_tokens(int(row['length']))} {number_text(row.get('loss'), '.4f')}" for row in event.get("lengths") or ())
    text = f"{event['corpus']} {number_text(event.get('loss'), '.4f')}" + (f" ({lengths})" if lengths else "")
    if event.get("needles") and event.get("exact") is not None:
        text += f", {event['exact']:.1%} exact"
    context = event.get("context")
    if context and context.get("gain") is not None:
        text += f", {context['gain']:+.4f} from context beyond {format_tokens(int(context['tokens']))}"
    return text


def evaluation_line(event: Event) -> str:
    """Describe an evaluation of one corpus."""
    seconds = "" if event.get("eval_s") is None else f", {format_seconds(event['eval_s'])}"
    return f"evaluation after step {event['step']}: {evaluation_text(event)}, {int(event['targets']):,} targets{seconds}"


def evaluation_progress_line(event: Event) -> str:
    """Describe how far an evaluation by itself is."""
    return f"evaluating on {event['corpus']}: {event['done_tokens']:,} of {event['total_tokens']:,} tokens"


def best_line(event: Event) -> str:
    """Describe which checkpoint is the best."""
    what = "pinned" if event.get("pinned") else "not pinned: there is none on disk"
    return f"best {event['metric']} so far: {number_text(event.get('value'), '.4f')} at step {event['step']}; its checkpoint is {what}"


def early_stop_line(event: Event) -> str:
    """Describe why the run ends before its last step."""
    best = f"{number_text(event.get('best'), '.4f')} at step {event.get('best_step')}"
    return f"ending after step {event['step']}: {event['metric']} was no better in {event.get('evaluations')} evaluations than {best}"


def speed_text(event: Event) -> str:
    """Use of each device in a step; where no peak is known (on CPUs), what was reached instead of a share of it."""
    parts = []
    if event.get("device_tokens_per_s") is not None:
        parts.append(f"{event['device_tokens_per_s']:,.0f} tokens/s a rank")
    if event.get("mfu") is not None:
        parts.append(f"MFU {event['mfu']:.1%}, HFU {number_text(event.get('hfu'), '.1%')}")
    elif event.get("model_flops_per_s") is not None:
        parts.append(f"{event['model_flops_per_s'] / 1e9:,.1f} GFLOP/s a rank (model's own, no peak known)")
    return ", ".join(parts)


def source_texts(event: Event) -> list[str]:
    """`web: loss 2.4131, 70.0 % of the tokens, 0.31 epochs`, of each source of a step."""
    return [
        f"{row['name']}: "
        + (f"loss {number_text(row['loss'], '.4f')}, " if row.get("loss") is not None else "")
        + f"{row['share']:.1%} of the tokens, {row['epochs']:.2f} epochs"
        for row in event.get("sources") or ()
    ]


def bound_text(certificate: Event) -> str:
    """Describe what a rank and a node take at most, and where that is more than there is."""
    place, size, room = certificate["place"], certificate["device_bytes"], certificate["device_capacity_bytes"]
    short = (
        ""
        if certificate["fits"]
        else ": MORE THAN THERE IS, so this run may end in an out-of-memory error (efflaunch plan says what would fit)"
    )
    return (
        f"at most {format_bytes(size)} of {format_bytes(room)} on each {place} ({certificate['device_phase']}), "
        f"{format_bytes(certificate['host_bytes'])} of {format_bytes(certificate['host_capacity_bytes'])} on each node{short}"
    )


def certificate_line(event: Event) -> str:
    """Describe whether a measured step kept to the certificate."""
    return check_line(event["predicted_bytes"], event["measured_bytes"], event["compared"])


def summary_lines(progress: RunProgress) -> list[tuple[str, str]]:
    """(name, value) of what a finished or stopped run has come to."""
    if not progress.losses:
        return []
    first, last = min(progress.losses), progress.step
    losses = [number_text(progress.losses[step], ".4f") for step in (first, last)]
    trained = sum(progress.durations.values())
    rows = [
        ("steps", f"{last} of {progress.steps}"),
        ("loss", f"{losses[0]} at step {first}, {losses[1]} at step {last}"),
        ("tokens", f"{progress.total_tokens:,}" + (f", {format_seconds(trained)} of training" if trained else "")),
    ]
    speed = speed_text(progress.last or {})
    if speed:
        rows.append(("speed", f"{speed}, in the last step"))
    rows += [("" if index else "sources", text) for index, text in enumerate(source_texts(progress.last or {}))]
    for index, event in enumerate(progress.evaluations[name] for name in sorted(progress.evaluations)):
        rows.append(("" if index else "evaluation", f"{evaluation_text(event)}, after step {event['step']}"))
    if progress.best is not None:
        rows.append(("best", best_line(progress.best)))
    if progress.early_stop is not None:
        rows.append(("early end", early_stop_line(progress.early_stop)))
    plans = plans_text(progress)
    if plans:
        rows.append(("plans", plans))
    if progress.stalls:
        rows.append(("checkpoints", checkpoints_text(progress)))
    if progress.mirror_error:
        rows.append(("mirror", progress.mirror_error))
    if progress.memory:
        rows.append(("memory", "; ".join(progress.memory)))
    if progress.bound:
        checked = f"; {certificate_line(progress.certificate)}" if progress.certificate else ""
        rows.append(("certificate", f"{progress.bound}{checked}"))
    if progress.stragglers:
        rows.append(("stragglers", stragglers_text(progress.stragglers)))
    if progress.peak_bytes:
        shares = ", ".join(f"rank {rank} {format_bytes(size)}" for rank, size in sorted(progress.peak_bytes.items()))
        rows.append(("peak memory", shares))
    return rows


def mirror_line(event: Event) -> str:
    """Describe which checkpoint is not in the second place, and why."""
    return f"checkpoint of step {event['step']} is not in the second place: {event['error']}"


def checkpoints_text(progress: RunProgress) -> str:
    """Describe how long training waited for checkpoints, and when they were durable."""
    stall, durable = statistics.median(progress.stalls), statistics.median(progress.durable)
    waited = f"training waited {format_precise(stall)} for each (median, {format_precise(max(progress.stalls))} at most)"
    return f"{len(progress.stalls)} durable after {format_precise(durable)}; {waited}"


def plans_text(progress: RunProgress) -> str:
    """Describe what adaptive planning came to, and what went wrong; empty for static runs.

    No run takes static steps beside its own: what was saved is modelled, and the same sentence says how far the model is off.
    """
    totals = (progress.last or {}).get("plan_totals")
    if progress.sequence != "adaptive" or not totals:
        return ""
    late = f"{totals['late']} late" if totals["late"] else "none late"
    parts = ["adaptive", f"{late} of {progress.step}"]
    if totals["steps"] and totals["predicted_s"] > 0:
        ours, static = totals["predicted_s"] / totals["steps"], totals["static_s"] / totals["steps"]
        timed_s = totals.get("timed_predicted_s", 0.0)
        is_timed = timed_s > 0 and "timed_s" in totals
        off = f"; measured steps took {totals['timed_s'] / timed_s:.2f} x the modelled time" if is_timed else ""
        seconds = f"{format_seconds(ours)} a step, {format_seconds(static)} with static groups"
        parts.insert(1, f"{static / ours:.2f} x as fast as static groups in the model ({seconds}, both modelled{off})")
    if progress.planner_error:
        parts.append(f"{progress.planner_error}, greedy plans since")
    return "; ".join(parts)


def stragglers_text(ranks: list[dict[str, Any]]) -> str:
    """`rank 3 on node-b 1.43 x`, of the time the others take for what their plans predict."""
    named = ", ".join(f"rank {one['rank']} on {one['host']} {one['ratio']:.2f} x" for one in ranks[:_NAMED])
    more = f", {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"{named}{more} as long as the other ranks for what their plans predict"


def stragglers_line(event: Event) -> str:
    """Describe which ranks are steadily slow now."""
    if not event["ranks"]:
        return f"no rank is a straggler any more, as of step {event['step']}"
    return f"stragglers, as of step {event['step']}: {stragglers_text(event['ranks'])}"


def drift_line(event: Event) -> str:
    """Describe which groups do not take the time the cost model predicts, and what to do about it."""
    ratios = ", ".join(f"groups of {degree} take {ratio:.2f} x" for degree, ratio in event["measured_over_predicted"].items())
    advice = " (efflaunch profile measures this machine)" if event.get("can_profile", True) else ""
    return f"the cost model is off: {ratios} the modelled time{advice}"
