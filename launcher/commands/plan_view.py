"""The plan as tables for a person. Only `plan_command` imports this, so that rich is loaded when something is shown."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from ...estimate.certificate import RECORD, bound_line, certify
from ...estimate.ledger import Account, Ledger
from ...estimate.plan_inputs import GIB, PlanInputs
from ...estimate.solver.report import describe_report
from ...estimate.stage_plans import stage_plans
from ...estimate.suggestions import Suggestion
from ...estimate.timing.expert_order import expert_order
from ...estimate.timing.flops import matrix_parameters
from ...estimate.timing.step import Timing
from ...parallel.sharding.config import Backend
from ...training.data.train_stages import train_stages
from ...units import format_precise, format_seconds, format_tokens
from ..config.run_config import Config

NARROW = 0.01
"""Share of a device's memory: less to spare than this is worth a warning."""
MIB = 1 << 20


def show_plan(config: Config, ledger: Ledger, suggestions: Iterable[Suggestion], notes: Iterable[str]) -> None:
    """Layout, one table per memory, time, verdict."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=120)
    console.print(f"[bold]{config.experiment}[/bold]: {config.model.name}, {_parameters(ledger)}, {_batch(config)}")
    for line in _layout_lines(ledger):
        console.print(f"  {line}")
    console.print()
    console.print(_table(ledger.device, f"each {ledger.device.name}" + " of the stage that holds most" * bool(ledger.stages)))
    console.print(_table(ledger.host, f"each node ({ledger.layout.ranks_per_node} ranks)"))
    console.print(_time_table(ledger.timing))
    for line in (*_time_lines(ledger.timing), *_train_stage_lines(config, ledger)):
        console.print(line)
    for note in notes:
        console.print(f"note: {note}")
    console.print()
    for line in (*_policy_lines(config, ledger), *_certificate_lines(ledger), *_verdict(ledger, suggestions)):
        console.print(line)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"


def _parameters(ledger: Ledger) -> str:
    """All weights, and where they are fewer those one token is multiplied with, and those that are trained."""
    inputs = ledger.asked
    active = "" if inputs.spec.experts is None else f", {_count(matrix_parameters(inputs))} of them multiplied with a token"
    trained = "" if inputs.trains_all else f", {_count(inputs.trained_parameters)} of them trained"
    return f"{_count(inputs.parameters)} parameters{active}{trained}"


def _batch(config: Config) -> str:
    return f"sequences up to {format_tokens(config.data.max_seq_len)}, {format_tokens(config.data.global_batch_tokens)} tokens a step"


def _layout_lines(ledger: Ledger) -> list[str]:
    layout, reduced = ledger.layout, ledger.inputs.parallel.grad_reduce.value.replace("_", "-")
    tokens = format_tokens(layout.tokens_per_rank)
    spec, experts = ledger.inputs.spec, ledger.inputs.spec.experts
    some = f" in {spec.expert_layers} of {spec.num_layers}" if spec.dense_layers else ""
    where = _expert_ranks(ledger.inputs) if ledger.inputs.expert_parallel > 1 else "sharded as all weights are"
    return [
        f"ranks       {layout.world_size} = {layout.num_nodes} node(s) x {layout.ranks_per_node}",
        *([f"engine      DeepSpeed, ZeRO stage {ledger.inputs.engine.stage}"] if ledger.inputs.engine.backend is Backend.DEEPSPEED else []),
        f"weights     {layout.replicate} copies x {layout.shard} shards; gradients reduced per {reduced}",
        *([] if experts is None else [f"experts     {experts.num_experts} a layer{some}, {experts.per_token} of them a token; {where}"]),
        f"sequences   groups of {layout.sp_degree} ranks = Ulysses {layout.ulysses} x ring {layout.ring}; up to {tokens} tokens a rank",
        f"step        {layout.num_groups} group(s) a micro-batch, {layout.num_micro_batches} micro-batch(es)",
        *_stage_lines(ledger),
    ]


def _expert_ranks(inputs: PlanInputs) -> str:
    """How rows travel to shared experts, and how much of that the model of schedules has beside products."""
    chosen = expert_order(inputs)
    order, hidden = chosen.order, f"{chosen.hidden_share:.0%} of exchanges hidden (modelled)"
    return f"{inputs.expert_parallel} ranks share them; rows forward in {order.forward.words}, backward in {order.backward.words}; {hidden}"


def _stage_lines(ledger: Ledger) -> list[str]:
    """Each stage of a pipeline: its layers and what its ranks hold."""
    order, size = ledger.asked.parallel.pipeline.order.value, ledger.layout.stage_size
    return [
        f"stage {index}     layers {', '.join(f'{part.start} to {part.stop - 1}' for part in stage.layers)} on {size} ranks; "
        f"up to {stage.in_flight} micro-batch(es) in flight ({order}), {_gib(stage.peak_bytes)} GiB, "
        f"{format_precise(stage.seconds)} a micro-batch"
        for index, stage in enumerate(ledger.stages)
    ]


def _table(account: Account, title: str) -> Table:
    phase = account.peak_phase
    table = Table(title=f"{title}, GiB; peak in {phase.value}", title_justify="left", title_style="bold")
    table.add_column("term")
    table.add_column("at peak", justify="right")
    table.add_column("most", justify="right")
    table.add_column("what")
    for entry in sorted(account.terms, key=lambda entry: -entry.by_phase.get(phase, 0)):
        table.add_row(entry.name, _gib(entry.by_phase.get(phase, 0)), _gib(entry.num_bytes), entry.note)
    table.add_section()
    table.add_row("[bold]sum[/bold]", f"[bold]{_gib(account.peak_bytes)}[/bold]", "", f"of {_gib(account.capacity_bytes)} there are")
    if account.reserve_bytes:
        note = f"never planned into (cluster.reserve), of {_gib(account.capacity_bytes - account.peak_bytes)} left"
        table.add_row("reserve", _gib(account.reserve_bytes), "", note)
    return table


def _gib(num_bytes: int) -> str:
    # Small models live in thousandths.
    return f"{num_bytes / GIB:.2f}" if num_bytes >= GIB / 10 or num_bytes == 0 else f"{num_bytes / GIB:.4f}"


def _time_table(timing: Timing) -> Table:
    table = Table(title="time of a step (an estimate)", title_justify="left", title_style="bold")
    table.add_column("part")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    parts = {
        "compute, recomputation in": timing.compute_s,
        "sequence exchanges": timing.sequence_s,
        **({"rows to experts, waiting for the busiest": timing.experts_s} if timing.experts_s else {}),
        "weights and gradients, not hidden": timing.sharding_s,
        "copies of activations, not hidden": timing.host_s,
        "optimizer update, not hidden": timing.update_s,
        **({"waiting for other stages": timing.bubble_s} if timing.bubble_s else {}),
    }
    for name, seconds in parts.items():
        table.add_row(name, format_precise(seconds), f"{seconds / timing.step_s:.1%}")
    table.add_section()
    table.add_row("[bold]sum[/bold]", f"[bold]{format_precise(timing.step_s)}[/bold]", "")
    return table


def _time_lines(timing: Timing) -> list[str]:
    share = timing.attention_flops / timing.flops
    return [
        f"step: {format_seconds(timing.step_s)}, {timing.tokens_per_s:,.0f} tokens/s (an estimate)",
        f"  {timing.flops:.3g} FLOPs, causal, {share:.0%} of them attention; without recomputation {timing.model_flops:.3g}",
        *(f"  assumed: {text}" for text in timing.assumptions),
    ]


def _train_stage_lines(config: Config, ledger: Ledger) -> list[str]:
    """A line for each stage of train.stages: its steps, what they hold and how long they take."""
    stages = train_stages(config.train, config.data)
    plans = stage_plans(ledger, [stage.data for stage in stages])
    return [
        f"{stage.key}: {stage.steps:,} steps of {format_tokens(stage.data.global_batch_tokens)} tokens, sequences up to "
        f"{format_tokens(stage.data.max_seq_len)}: {_gib(own.ledger.device.peak_bytes)} GiB on each {own.ledger.device.name}, "
        f"{format_seconds(own.ledger.timing.step_s)} a step"
        for stage, own in zip(stages, plans, strict=True)
    ]


def _policy_lines(config: Config, ledger: Ledger) -> list[str]:
    """Describe the memory policy, and with memory.solve how it was solved."""
    certificate = certify(ledger)
    lines = [f"memory policy {config.memory.name}: {'; '.join(certificate.policy)}"]
    return lines + ([f"  {line}" for line in describe_report(ledger.report)] if ledger.report is not None else [])


def _certificate_lines(ledger: Ledger) -> list[str]:
    certificate = certify(ledger)
    return [
        f"certificate: {bound_line(certificate)}",
        *(f"  if {text}" for text in certificate.assumptions),
        f"  checked after the first step of a run; predicted against measured peaks: {RECORD}",
    ]


def _spare(device: Account) -> str:
    """A fit, and by how much beside the reserve; a narrow one is called so."""
    spare = device.usable_bytes - device.peak_bytes
    if spare < NARROW * device.capacity_bytes:
        return f"[bold yellow]fits[/bold yellow], only just: {spare / MIB:,.0f} MiB to spare on each {device.name}"
    return f"[bold green]fits[/bold green]: {_gib(spare)} GiB to spare on each {device.name}"


def _verdict(ledger: Ledger, suggestions: Iterable[Suggestion]) -> list[str]:
    if ledger.fits:
        return [_spare(ledger.device)]
    lines = []
    for account in (ledger.device, ledger.host):
        if not account.fits:
            missing = account.peak_bytes - account.usable_bytes
            lines.append(
                f"[bold red]does not fit[/bold red]: {_gib(missing)} GiB too much on each {account.name}; "
                f"largest: {account.largest.name}, {_gib(account.largest.by_phase[account.peak_phase])} GiB"
            )
    listed = list(suggestions)
    lines.append("any of these would make it fit:" if listed else "no single set of overrides this planner knows makes it fit")
    for entry in listed:
        peak, time = _gib(entry.ledger.device.peak_bytes), format_seconds(entry.ledger.timing.step_s)
        lines.append(f"  {' '.join(entry.overrides)}\n    {entry.reason}: {peak} GiB, step {time}")
    return lines
