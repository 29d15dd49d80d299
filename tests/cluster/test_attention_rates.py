"""Published speeds of attention kernels: what is known of each GPU, which kernel estimates take, and errors where nothing is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.cluster.attention_rates import (
    CAPABILITIES,
    IN_ORDER,
    RATES,
    AttentionRate,
    RatedKernel,
    attention_rate,
    check_gpu,
    in_order,
    multiprocessors,
)
from efflaunch.cluster.config import check_cluster
from efflaunch.errors import ConfigError
from efflaunch.launcher.config.compose import compose
from efflaunch.tests.memory.settings import cluster

CONF = Path(__file__).parents[2] / "conf" / "cluster"


def test_every_rate_has_a_source_and_is_below_the_peak() -> None:
    peaks = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12}
    assert set(RATES) == set(CAPABILITIES) == set(peaks)
    for gpu, rates in RATES.items():
        for rate in rates.values():
            assert 0.3 * peaks[gpu] < rate.backward < rate.forward < 0.8 * peaks[gpu] and rate.source


@pytest.mark.parametrize("preset", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_preset_knows_how_fast_attention_is(preset: str) -> None:
    machines = compose(["model=llama3_8b", "data=stdlib", f"cluster={preset}", "train.steps=1"]).cluster
    rate = attention_rate(machines, RatedKernel.FA2 if machines.gpu == "a100" else RatedKernel.CUDNN)
    assert rate == RATES[machines.gpu][RatedKernel.FA2 if machines.gpu == "a100" else RatedKernel.CUDNN] if machines.gpu else (
        rate.source == "cluster.attention_efficiency"
    )


def test_a_forward_and_its_backward_together() -> None:
    """Of 3.5 parts of work one is done at one rate and 2.5 at the other."""
    rate = AttentionRate(4.0, 2.0, "here")
    assert rate.both == pytest.approx(3.5 / (1 / 4 + 2.5 / 2))


def test_a_backward_in_order_is_slower() -> None:
    """Of every kernel that has one, and forward is as it was."""
    assert set(IN_ORDER) == set(RatedKernel) - {RatedKernel.CUDNN}
    fast = RATES["h100"][RatedKernel.FA3]
    slow = in_order(fast, RatedKernel.FA3)
    assert (slow.forward, slow.backward) == (fast.forward, pytest.approx(0.62 * fast.backward))
    assert slow.source.startswith(fast.source) and "2601.21824" in slow.source


def test_multiprocessors() -> None:
    assert [multiprocessors(gpu) for gpu in ("a100", "h100", None)] == [108, 132, 148]
    assert all(multiprocessors(gpu) > 100 for gpu in RATES)


def test_a_kernel_without_a_published_rate() -> None:
    h100, a100, plain = cluster(gpu="h100", attention_efficiency=None), cluster(gpu="a100", attention_efficiency=None), cluster()
    assert attention_rate(h100, RatedKernel.SDPA) == attention_rate(h100, RatedKernel.FA2) == RATES["h100"][RatedKernel.FA2]
    assert attention_rate(plain, RatedKernel.FA3).forward == plain.peak_flops * 0.33
    with pytest.raises(ConfigError, match=r"cluster\.gpu: found fa4 on a100; expected a kernel with published rates: fa2"):
        attention_rate(a100, RatedKernel.FA4)
    nearest = attention_rate(cluster(gpu="b200", attention_efficiency=None), RatedKernel.SDPA, or_nearest=True)
    assert nearest.forward == RATES["b200"][RatedKernel.CUDNN].forward
    assert nearest.source.startswith("cudnn's, nothing is published of sdpa on b200; ")


def test_a_cluster_must_say_how_fast_attention_is() -> None:
    check_cluster(cluster())
    with pytest.raises(ConfigError, match=r"cluster\.gpu: found nothing that tells how fast attention is; expected one of a100, b200"):
        check_cluster(cluster(attention_efficiency=None))
    with pytest.raises(ConfigError, match=r"cluster\.gpu: found 'v100'; expected one of a100, b200, h100, h200, whose rates are published"):
        check_gpu("v100", has_own_rate=False)
