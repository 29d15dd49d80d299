"""Section of docs/benchmarks.md about fuzzing."""

from __future__ import annotations

from typing import Any


def fuzz(result: dict[str, Any]) -> list[str]:
    """A row per kind of input."""
    endings = ("accepted", "refused", "accepted_wrong", "tracebacks", "hangs")
    lines = [
        "## Fuzzing",
        "",
        f"{result['inputs']:,} generated inputs (hypothesis, seed {result['seed']}) in {result['seconds']:.0f} s. An input is accepted,",
        "or refused with exit code 93 and a message; `accepted_wrong` counts inputs that are wrong by construction and were accepted.",
        "",
        f"**{result['tracebacks']} tracebacks, {result['hangs']} hangs, {result['accepted_wrong']} accepted_wrong** (aim: none).",
        "",
        f"| input | {' | '.join(endings)} |",
        f"|---|{'---|' * len(endings)}",
    ]
    lines += [f"| {kind} | {' | '.join(str(counts.get(name, 0)) for name in endings)} |" for kind, counts in result["kinds"].items()]
    return lines
