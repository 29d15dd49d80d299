"""What `efflaunch profile` shows of measured rates, and what `efflaunch plan` makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from efflaunch.cluster.rates import Copies, MachineRates
from efflaunch.estimate.measured.profile import Profile, ProfileKey, save_profile
from efflaunch.estimate.timing.bandwidth import gb_per_s, host_link, offload_link
from efflaunch.launcher.commands.plan import print_plan
from efflaunch.launcher.commands.profile import show
from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.ledger import hardware_of, plan

WORDS = ["+experiment=quickstart", "cluster.ranks_per_node=2", "parallel.tokens_per_rank=8K"]


def measured(directory: str | None = None) -> Profile:
    link = (Copies(out=3e9, back=4e9, both_out=2e9, both_back=2e9), Copies(out=2.5e9, back=4e9, both_out=2e9, both_back=2e9))
    disk = () if directory is None else (Copies(out=1.5e9, back=2e9, both_out=1e9, both_back=1e9),) * 2
    rates = MachineRates(device="cpu", ranks_per_node=2, link=link, disk=disk, directory=directory, device_update=5e9, host_update=5e9)
    key = ProfileKey(hardware=hardware_of(compose(WORDS)), ranks="1 node x 2 ranks", model="another", versions="v")
    return Profile(key=key, degrees=(), overhead_s=0.0, gather_s=0.0, empty_s=0.0, step_s=0.0, rates=rates, taken="2026-01-01 00:00 UTC")


@pytest.mark.parametrize(("bytes_per_s", "words"), [(2.5e9, "2.5 GB/s"), (50e9, "50 GB/s"), (2.7e12, "2,700 GB/s"), (0.3e9, "0.3 GB/s")])
def test_speeds_in_words(bytes_per_s: float, words: str) -> None:
    assert gb_per_s(bytes_per_s) == words


def test_every_rank_and_way_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(measured("/local"), Path("profile.yaml"))
    shown = capsys.readouterr().out
    for part in (
        "copies, all 2 ranks of a node at once",
        "host memory",
        "files in /local",
        "2.5 GB/s",
        "1.5 GB/s",
        "AdamW reads and writes 5 GB/s",
    ):
        assert part in shown
    assert shown.count("host memory") == 2 and shown.count("files in /local") == 2


def test_a_plan_goes_by_the_profile_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*WORDS, "memory=alst", "memory.chunk_tokens=1K"]
    before = plan(compose(words)).inputs
    assert host_link(before).source == "cluster.host_link_bandwidth" and before.measured is None
    save_profile(tmp_path / "profile.yaml", measured("/local"))
    s = plan(compose(words)).inputs
    assert (host_link(s).out, host_link(s).back) == (2.5e9, 4e9)
    assert print_plan(compose(words), False) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "copies to the host run at 2.5 GB/s, back at 4 GB/s a rank, both ways at once 2 GB/s each" in shown
    assert "measured of 2026-01-01 00:00 UTC on" in shown and "a rank (measured" in shown and "profile.yaml" in shown
    filed = plan(compose([*words, "memory.offload_dir=/local"])).inputs
    assert offload_link(filed).out == 1.5e9
    other = plan(compose([*words, "memory.offload_dir=/other", "cluster.disk_write_bandwidth=2e9"])).inputs
    assert offload_link(other).out == 1e9 and offload_link(other).source == "cluster.disk_write_bandwidth over 2 ranks"
    assert plan(compose(["+experiment=quickstart"])).inputs.measured is None, "four ranks a node were not measured"
