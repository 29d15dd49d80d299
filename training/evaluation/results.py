"""What an evaluation of one corpus came to, as metrics.jsonl, displays and sinks have it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import GAIN, length_name
from .tally import Sums, Tally


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusResult:
    """The tallies of every pass over one corpus, complete over all ranks."""

    corpus: str
    whole: Tally
    short: Tally | None
    """None: no target has more context than eval.context_tokens."""
    lengths: dict[int, Tally]
    context_tokens: int
    tokens: int
    """Tokens read, over all passes."""

    @property
    def gain(self) -> float | None:
        """How much lower the loss is with the whole context than with `context_tokens` of it, over the same targets."""
        if self.short is None or (less := self.short.total.mean) is None or (more := self.whole.beyond.mean) is None:
            return None
        return less - more

    def metrics(self) -> dict[str, float | None]:
        """Numbers by the names that sinks and train.keep_best know them by."""
        prefix = f"eval/{self.corpus}"
        numbers = {f"{prefix}/loss": self.whole.total.mean}
        numbers |= {f"{prefix}/loss_{length_name(length)}": tally.total.mean for length, tally in sorted(self.lengths.items())}
        if self.short is not None:
            numbers[f"{prefix}/{GAIN}"] = self.gain
        return numbers | {f"{prefix}/position_{length_name(most)}": sums.mean for most, sums in self.whole.by_context()}

    def fields(self) -> dict[str, Any]:
        """Fields of the `eval` event."""
        short = None
        if self.short is not None:
            beyond = self.whole.beyond
            short = {"tokens": self.context_tokens, "targets": beyond.targets, "loss": beyond.mean, "short_loss": self.short.total.mean}
        return {
            "corpus": self.corpus,
            "loss": self.whole.total.mean,
            "targets": self.whole.total.targets,
            "tokens": self.tokens,
            "lengths": [{"length": length, **_sums(tally.total)} for length, tally in sorted(self.lengths.items())],
            "positions": [{"up_to": most, **_sums(sums)} for most, sums in self.whole.by_context()],
            "context": None if short is None else {**short, "gain": self.gain},
            "metrics": self.metrics(),
        }


def _sums(sums: Sums) -> dict[str, Any]:
    return {"loss": sums.mean, "targets": sums.targets}
