"""SP degrees and Ulysses degrees that heads, nodes and lengths allow. Pure."""

from __future__ import annotations

from ...errors import ConfigError
from ...units import format_tokens
from ...utils.divisors import common_powers_of_two
from ..config import Scheme


def choose_degree(*, max_seq_len: int, tokens_per_rank: int, world_size: int, requested: int | None) -> int:
    """Ranks per group: `requested`, or the smallest power of two that holds the longest sequence. ConfigError where none does."""
    largest = 1 << (world_size.bit_length() - 1)
    degree = requested if requested is not None else 1
    if degree < 1 or degree & (degree - 1) or degree > largest:
        raise ConfigError(
            "parallel.sp_degree",
            found=str(degree),
            expected=f"a power of two up to {largest} ({world_size} ranks)",
            hint=f"parallel.sp_degree={min(largest, 1 << max(0, degree.bit_length() - 1))}, or leave it out",
        )
    while requested is None and degree * tokens_per_rank < max_seq_len and degree < largest:
        degree *= 2
    if degree * tokens_per_rank < max_seq_len:
        raise ConfigError(
            "parallel.tokens_per_rank",
            found=f"{format_tokens(tokens_per_rank)} x {degree} ranks = {format_tokens(degree * tokens_per_rank)} tokens",
            expected=f"room for one sequence of data.max_seq_len={format_tokens(max_seq_len)}",
            hint=f"parallel.tokens_per_rank={format_tokens(-(-max_seq_len // degree))}, more ranks, or a smaller data.max_seq_len",
        )
    return degree


def choose_ulysses(*, degree: int, num_heads: int, ranks_per_node: int, scheme: Scheme, requested: int | None) -> int:
    """Ranks of the inner Ulysses exchange; `degree // it` rings run across. ConfigError where the scheme cannot be had."""
    allowed = common_powers_of_two(degree, num_heads)
    if requested is not None and scheme is not Scheme.HYBRID:
        raise ConfigError(
            "parallel.ulysses_degree",
            found=f"{requested} with parallel.scheme={scheme.value}",
            expected="it only with the hybrid scheme",
            hint="parallel.scheme=hybrid, or leave parallel.ulysses_degree out",
        )
    if scheme is Scheme.RING or degree == 1:
        return 1
    if scheme is Scheme.AUTO:
        return max(u for u in allowed if u <= ranks_per_node)
    wanted = degree if scheme is Scheme.ULYSSES else requested
    if wanted is None or wanted not in allowed:
        key = "parallel.sp_degree" if scheme is Scheme.ULYSSES else "parallel.ulysses_degree"
        raise ConfigError(
            key,
            found=f"{wanted} Ulysses ranks in groups of {degree} for {num_heads} attention heads",
            expected=f"a divisor of the heads and of the group: {', '.join(map(str, allowed))}",
            hint=f"{key}={allowed[-1]}, or parallel.scheme=auto (Ulysses as far as the heads allow, ring across the rest)",
        )
    return wanted
