"""Recognises the lines of metrics.jsonl that a run writes: a line that somebody or a crash damaged is passed over. Pure."""

from __future__ import annotations

import math
from typing import Any

Event = dict[str, Any]
_NUMBER, _COUNT, _TEXT, _LIST, _GROUP, _TRUTH = "number", "count", "text", "list", "group", "truth"
_TEXTS, _COUNTS = "texts", "counts"
"""Lists of texts; lists of counts, one at least."""
_NEEDLES = {"needles": _LIST, "exact": _NUMBER}
_NEEDED: dict[str, dict[str, str]] = {
    "start": {"steps": _COUNT, "world_size": _COUNT, "parameters": _COUNT},
    "step": {"step": _COUNT, "step_s": _NUMBER},
    "checkpoint": {"step": _COUNT},
    "checkpoint_failed": {"step": _COUNT, "error": _TEXT},
    "mirror_failed": {"step": _COUNT, "error": _TEXT},
    "planner_failed": {"error": _TEXT},
    "drift": {"measured_over_predicted": _GROUP},
    "certificate": {"predicted_bytes": _NUMBER, "measured_bytes": _COUNTS, "compared": _TEXT},
    "stragglers": {"step": _COUNT, "ranks": _LIST},
    "eval": {"step": _COUNT, "corpus": _TEXT, "targets": _COUNT, "metrics": _GROUP},
    "eval_progress": {"corpus": _TEXT, "done_tokens": _COUNT, "total_tokens": _COUNT},
    "early_stop": {"step": _COUNT, "metric": _TEXT},
    "best": {"step": _COUNT, "metric": _TEXT},
    "score": {"done_tokens": _COUNT, "total_tokens": _COUNT, "elapsed_s": _NUMBER},
}
_OPTIONAL: dict[str, dict[str, str]] = {
    "start": {
        "resumed_from": _COUNT,
        "certificate": _GROUP,
        "sequence": _TEXT,
        "costs": _TEXT,
        "cost_model": _GROUP,
        "schedule": _GROUP,
        "restored_from": _TEXT,
        "mix_change": _TEXT,
        **dict.fromkeys(("memory", "data_changes", "optimizer_inexact", "skipped_checkpoints"), _TEXTS),
    },
    "step": {
        "loss": _NUMBER,
        "total_tokens": _COUNT,
        "tokens_per_s": _NUMBER,
        "lr": _NUMBER,
        "plan": _TEXT,
        "ranks": _LIST,
        "sources": _LIST,
        "grad_norm": _NUMBER,
        "plan_totals": _GROUP,
        "groups": _LIST,
        "lower_bound_s": _NUMBER,
        "bound": _TEXT,
        "planned_by": _TEXT,
        **dict.fromkeys(("dpo_margin", "dpo_accuracy", "grpo_clip_fraction", "grpo_kl"), _NUMBER),
        **dict.fromkeys(("mfu", "hfu", "device_tokens_per_s", "model_flops_per_s"), _NUMBER),
        **dict.fromkeys(("expert_load", "expert_load_mean", "router_balance", "router_z", "router_bias", "dropped_share"), _NUMBER),
        **dict.fromkeys(("expert_load_layer", "idle_experts", "dropped_rows", "train_stage"), _COUNT),
    },
    "certificate": {"ok": _TRUTH},
    "eval": {"loss": _NUMBER, "tokens": _COUNT, "eval_s": _NUMBER, "lengths": _LIST, "positions": _LIST, "context": _GROUP, **_NEEDLES},
    "early_stop": {"best": _NUMBER, "best_step": _COUNT, "evaluations": _COUNT},
    "best": {"value": _NUMBER, "pinned": _TRUTH},
    "planner_failed": {"step": _COUNT},
    "checkpoint": {"path": _TEXT, "stall_s": _NUMBER, "save_s": _NUMBER, "snapshot_s": _NUMBER, "num_bytes": _COUNT},
}
_MEMBERS: dict[tuple[str, str], dict[str, str]] = {
    ("step", "ranks"): {"rank": _COUNT, "peak_bytes": _COUNT},
    ("step", "sources"): {"name": _TEXT, "tokens": _COUNT, "share": _NUMBER, "epochs": _NUMBER},
    ("eval", "lengths"): {"length": _COUNT, "targets": _COUNT},
    ("eval", "positions"): {"up_to": _COUNT, "targets": _COUNT},
    ("eval", "needles"): {"task": _TEXT, "length": _COUNT, "depth": _NUMBER, "exact": _NUMBER},
    ("stragglers", "ranks"): {"rank": _COUNT, "host": _TEXT, "ratio": _NUMBER},
}
_PARTS: dict[tuple[str, str], dict[str, str]] = {
    ("start", "certificate"): {
        "place": _TEXT,
        "device_phase": _TEXT,
        "fits": _TRUTH,
        **dict.fromkeys(("device_bytes", "device_capacity_bytes", "host_bytes", "host_capacity_bytes"), _NUMBER),
    },
    ("eval", "context"): {"tokens": _COUNT, "targets": _COUNT},
    ("step", "plan_totals"): dict.fromkeys(("late", "steps", "predicted_s", "static_s"), _NUMBER),
}


def is_sound(event: Any) -> bool:
    """Return whether this is an event whose known fields have their types; kinds and fields of other versions are taken as they are."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    kind = event["event"]
    if not _has(event, _NEEDED.get(kind, {})) or (kind == "step" and "loss" not in event):
        return False
    optional = _OPTIONAL.get(kind, {})
    if not all(event.get(name) is None or _is(event[name], wanted) for name, wanted in optional.items()):
        return False
    if not all(_has(member, wanted) for (of, name), wanted in _MEMBERS.items() if of == kind for member in event.get(name) or ()):
        return False
    if not all(_has(event[name], wanted) for (of, name), wanted in _PARTS.items() if of == kind and event.get(name)):
        return False
    if kind == "eval" and not _are_losses(event):
        return False
    if kind == "step" and not all(row.get("loss") is None or _is(row["loss"], _NUMBER) for row in event.get("sources") or ()):
        return False
    return all(_is(number, _NUMBER) for name in ("measured_over_predicted", "plan_totals") for number in (event.get(name) or {}).values())


def _are_losses(event: Event) -> bool:
    """Whether every loss of an evaluation is a number, or null where it was not finite."""
    context = event.get("context") or {}
    rows = [*(event.get("lengths") or ()), *(event.get("positions") or ())]
    losses = [*event["metrics"].values(), *(row.get("loss") for row in rows), *(context.get(key) for key in ("loss", "short_loss", "gain"))]
    return all(loss is None or _is(loss, _NUMBER) for loss in losses)


def _has(group: Any, wanted: dict[str, str]) -> bool:
    return isinstance(group, dict) and all(name in group and _is(group[name], kind) for name, kind in wanted.items())


def _is(value: Any, kind: str) -> bool:
    if kind in (_NUMBER, _COUNT):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and abs(value) < 1e300 and math.isfinite(value) and (kind == _NUMBER or (value >= 0 and value == int(value)))
    if kind in (_TEXTS, _COUNTS):
        inner = _TEXT if kind == _TEXTS else _COUNT
        return isinstance(value, list) and all(_is(item, inner) for item in value) and (kind == _TEXTS or bool(value))
    return isinstance(value, {_TEXT: str, _LIST: list, _GROUP: dict, _TRUTH: bool}[kind])
