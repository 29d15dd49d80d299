"""Decides which matrices of a model have adapters, and how many numbers are trained; refuses what cannot be. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import ConfigError
from ..families import facts_of
from ..spec import ModelSpec
from .config import AdapterConfig
from .names import ATTENTION, GATE_UP, GROUPS, MLP, QKV, SAVED, matching, quantized_names, target_names
from .nf4_layout import RowLayout


@dataclass(frozen=True, slots=True)
class Target:
    """One matrix (rows, columns) of every decoder layer: x W^T maps `columns` numbers to `rows`."""

    name: str
    rows: int
    columns: int
    parts: tuple[int, ...] = ()
    """Rows of each product through a fused matrix, which are made one after the other; (): one product."""

    @property
    def largest_rows(self) -> int:
        """Rows of the largest product."""
        return max(self.parts, default=self.rows)

    @property
    def products(self) -> int:
        """Products through the matrix, each with an x A^T of its own."""
        return max(1, len(self.parts))

    def numbers(self, config: AdapterConfig) -> int:
        """Numbers of A and B, and of the magnitude where there is one."""
        return config.rank * (self.rows + self.columns) + self.rows * config.dora

    @property
    def packed_bytes(self) -> int:
        """Bytes of the matrix in NF4."""
        return self.rows * RowLayout(self.columns).num_bytes


def matrices(spec: ModelSpec) -> tuple[Target, ...]:
    """The matrices of a decoder layer that may have adapters: attention's, and those of a dense feed-forward."""
    hidden, keys, inner = spec.hidden_size, spec.kv_size, spec.intermediate_size
    facts = facts_of(spec.family)
    matrices = [
        *_beside_each_other(ATTENTION[:3], (spec.query_size, keys, keys), hidden, QKV if facts.fused_qkv else None),
        Target(ATTENTION[3], hidden, spec.query_size),
    ]
    if spec.experts is None:
        matrices += _beside_each_other(MLP[:2], (inner, inner), hidden, GATE_UP if facts.fused_gate_up else None)
        matrices.append(Target(MLP[2], hidden, inner))
    return tuple(matrices)


def _beside_each_other(names: tuple[str, ...], rows: tuple[int, ...], columns: int, fused: str | None) -> list[Target]:
    """Matrices of the same input: each of them, or all in one of the name `fused`."""
    if fused is not None:
        return [Target(fused, sum(rows), columns, rows)]
    return [Target(name, each, columns) for name, each in zip(names, rows, strict=True)]


def _fused(spec: ModelSpec) -> dict[str, str]:
    """Names that are rows of one matrix in the model's family, each with that of the matrix."""
    facts = facts_of(spec.family)
    return dict.fromkeys(ATTENTION[:3] * facts.fused_qkv, QKV) | dict.fromkeys(MLP[:2] * facts.fused_gate_up, GATE_UP)


def targets(config: AdapterConfig, spec: ModelSpec) -> tuple[Target, ...]:
    """The matrices of a decoder layer that have adapters; none without adapters."""
    names = target_names(config) if config.is_trained else ()
    return tuple(matrix for matrix in matrices(spec) if matrix.name in names)


def quantized(config: AdapterConfig, spec: ModelSpec) -> tuple[Target, ...]:
    """The matrices of a decoder layer that are packed; none without adapter=qlora."""
    if not config.quantizes:
        return ()
    names = quantized_names(config)
    return tuple(matrix for matrix in matrices(spec) if matrix.name in names)


@dataclass(frozen=True, slots=True)
class TrainedNumbers:
    """How many numbers a run with adapters trains."""

    adapter: int
    """Numbers of the factors in one decoder layer."""
    norms: int
    """Numbers of the norms in one decoder layer, where they are trained."""
    embedding: int
    head: int
    last_norm: int

    @property
    def layer(self) -> int:
        """All of one decoder layer."""
        return self.adapter + self.norms


_NOTHING = TrainedNumbers(adapter=0, norms=0, embedding=0, head=0, last_norm=0)


def trained_numbers(config: AdapterConfig, spec: ModelSpec) -> TrainedNumbers:
    """Counts for a config that trains adapters; all 0 without."""
    if not config.is_trained:
        return _NOTHING
    matrix, saved = spec.vocab_size * spec.hidden_size, config.modules_to_save
    norms = spec.norms_per_layer * spec.norm_weights + spec.head_norm_weights
    return TrainedNumbers(
        adapter=sum(target.numbers(config) for target in targets(config, spec)),
        norms=norms * ("norms" in saved),
        embedding=matrix * ("embedding" in saved),
        head=matrix * ("head" in saved),
        last_norm=spec.norm_weights * ("norms" in saved),
    )


def check_adapter(config: AdapterConfig, spec: ModelSpec) -> None:
    """Raise ConfigError where adapters are asked for that cannot be made or trained exactly."""
    if not config.is_trained:
        if config.init is not None:
            raise ConfigError("adapter.init", found=f"{config.init} without adapters", expected="adapter=lora", hint="adapter=lora")
        if config.dora:
            raise ConfigError("adapter.dora", found="true without adapters", expected="adapter=lora", hint="adapter=lora adapter.dora=true")
        return
    if config.dropout:
        raise ConfigError(
            "adapter.dropout",
            found=f"{config.dropout:g}",
            expected="0: layers are computed again in backward, by chunks, and would drop other numbers than in forward",
            hint="adapter.dropout=0",
        )
    _check_names("adapter.targets", config.targets, spec)
    _check_saved(config, spec)
    if config.quantizes:
        _check_ends(config, spec)
        _check_names("adapter.quantized", config.quantized, spec)
    smallest = min(targets(config, spec), key=lambda matrix: min(matrix.rows, matrix.columns))
    most = min(smallest.rows, smallest.columns)
    if config.rank > most:
        raise ConfigError(
            "adapter.rank",
            found=f"{config.rank} for {smallest.name}, a matrix of {smallest.rows} x {smallest.columns}",
            expected=f"at most {most}: more is not low-rank, the matrix itself has no more",
            hint=f"adapter.rank={most}, or adapter.targets without {smallest.name.rpartition('.')[2]}",
        )


def _check_names(key: str, words: list[str], spec: ModelSpec) -> None:
    there = [matrix.name for matrix in matrices(spec)]
    short, fused = ", ".join(name.rpartition(".")[2] for name in there), _fused(spec)
    for word in words:
        found = matching(word)
        if spec.experts is not None and set(found) & {*MLP, GATE_UP}:
            raise ConfigError(
                key,
                found=f"{word} for a model with experts",
                expected="matrices of its attention: experts' projections lie in one stacked tensor that grouped products read, "
                f"and {'have no adapters' if key == 'adapter.targets' else 'are not packed'} yet",
                hint=f"{key}=[attention]",
            )
        if len(found) == 1 and found[0] in fused:
            whole = fused[found[0]].rpartition(".")[2]
            raise ConfigError(
                key,
                found=f"{word} for a {spec.family.value} model",
                expected=f"some of {short}: this family has one matrix, {whole}, for it and others",
                hint=f"{key}=[{whole}]",
            )
        if not set(found) & set(there):
            raise ConfigError(
                key,
                found=f"{word!r}, which matches no matrix of a decoder layer",
                expected=f"{', '.join(GROUPS)} or some of {short}",
                hint=f"{key}=[all-linear]" if spec.experts is None else f"{key}=[attention]",
            )
    if not words:
        raise ConfigError(key, found="none", expected=f"{', '.join(GROUPS)} or some of {short}", hint=f"{key}=[attention]")


def _check_ends(config: AdapterConfig, spec: ModelSpec) -> None:
    """Refuse to pack embedding and head: rows of one are looked up, and the loss reads the other whole."""
    ends = [word for word in config.quantized if word in ("embedding", "head", "embed_tokens", "lm_head")]
    if ends:
        raise ConfigError(
            "adapter.quantized",
            found=f"{ends[0]}{', of a model whose head is its embedding' if spec.tie_embeddings else ''}",
            expected="matrices of decoder layers: the embedding is a table of rows and the loss reads the head whole, in chunks of "
            "tokens; in NF4 their error would be in every logit",
            hint="adapter.quantized=[all-linear]",
        )


def _check_saved(config: AdapterConfig, spec: ModelSpec) -> None:
    for part in config.modules_to_save:
        if part not in SAVED:
            raise ConfigError(
                "adapter.modules_to_save", found=repr(part), expected=f"some of {', '.join(SAVED)}", hint="adapter.modules_to_save=[]"
            )
    tied = [part for part in config.modules_to_save if part in ("embedding", "head")]
    if tied and spec.tie_embeddings:
        raise ConfigError(
            "adapter.modules_to_save",
            found=f"{tied[0]} of a model whose head is its embedding",
            expected="parts that are a matrix of their own: a trained copy of one would untie them, and files of adapters cannot say so",
            hint="adapter.modules_to_save=[], or without " + " and ".join(tied),
        )
