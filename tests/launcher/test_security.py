"""Nobody but its owner reads a run, no secret is in it or beside it, and nobody outside reaches its ranks."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import signal
import socket
import stat
import string
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from efflaunch.errors import ConfigError
from efflaunch.launcher.agent import worker
from efflaunch.launcher.config.compose import changed, compose
from efflaunch.launcher.config.overrides import parse_overrides
from efflaunch.launcher.config.secrets import find_secret, is_secret_name, looks_random, redact, secrets_of
from efflaunch.launcher.rundir.metrics_index import newest_step
from efflaunch.launcher.rundir.metrics_reader import checkpoint_steps
from efflaunch.launcher.start import show_launch
from efflaunch.tests.launcher.runs import environment
from efflaunch.tests.limits import ENDS_S, wait_until
from efflaunch.tests.test_real_runs import BASE, make_corpus

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "SITE_PASSWORD": "correct horse battery",
    "S3_SECRET_ACCESS": "s3-secret-value/with+signs",
}


@pytest.mark.parametrize("name", [*SECRETS, "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "GITHUB_TOKEN", "db_password"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["PATH", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "AWS_SECRET_FILE", "GPG_KEY", "SLURM_JOB_ID"])
def test_names_of_others(name: str) -> None:
    assert not is_secret_name(name)


def test_values_that_are_secrets() -> None:
    entries = secrets_of({**SECRETS, "KEYMAP": "us", "API_KEY": "~/.key-file", "HOME": "/root"})
    assert entries == SECRETS
    assert redact(f"GET https://x/?t={SECRETS['HF_TOKEN']} 401", SECRETS) == "GET https://x/?t=<HF_TOKEN> 401"


@pytest.mark.parametrize(
    "override",
    [
        "run.root=/data/hf_abcdefghijklmnopqrstuvwxyz9876",
        'cluster.slurm.prologue=["export WANDB_API_KEY=0123456789abcdef"]',
        "cluster.slurm.prologue=[\"export DB_PASSWORD='correct-horse'\"]",
        'cluster.slurm.sbatch=["--export=ALL,HF_TOKEN=abcdefghijkl"]',
        "model.path=https://user:opensesame@models.example/llama",
        "logging.wandb_project=sk-abcdefghijklmnopqrstuvwxyz",
        "run.id=wandb_v1_abcdefghijklmnopqrstuvwxyz",
    ],
)
def test_a_secret_in_the_configuration_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="run.yaml and batch scripts would show it") as caught:
        compose(["+experiment=quickstart", override])
    key, _, value = override.partition("=")
    assert str(caught.value).startswith(key)
    for word in ("opensesame", "0123456789abcdef", "correct-horse", "abcdefghijkl"):
        assert word not in str(caught.value), value


def test_the_environments_secrets_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_PASSWORD", "mellon-mellon")
    with pytest.raises(ConfigError, match="run.id: found what looks like the value of SITE_PASSWORD in the environment"):
        compose(["+experiment=quickstart", "run.id=mellon-mellon"])
    config = compose(["+experiment=quickstart", "run.id=one"])
    with pytest.raises(ConfigError, match="value of SITE_PASSWORD"):
        changed(config, parse_overrides(["logging.wandb_project=mellon-mellon"]), None)


def test_there_is_no_key_for_a_secret() -> None:
    with pytest.raises(ConfigError, match="logging.wandb_key: found an unknown key") as caught:
        compose(["+experiment=quickstart", "+logging.wandb_key=opensesame"])
    assert "opensesame" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "source /shared/venv/bin/activate",
        "export HF_TOKEN=$(cat ~/.token)",
        'export WANDB_API_KEY="$KEY"',
        "module load cuda tokenizers=0.21.0",
        "pad_token=<|endoftext|>",
        "eos_token=</s></s></s>",
        "--container-image=registry.example:5000/torch@sha256-0123",
        "tokens_per_rank=1048576000",
        "/cache/hub/models--x/snapshots/0123456789abcdef0123456789abcdef01234567",
        "registry.example/torch@sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "Qwen3ForCausalLMMoE30BA3BInstruct2507 Wav2Vec2BertEncoderLayer MetaLlama31Instruct8BLongContext128k",
        "quickstart-20260131-142501-3f9c node[001-128,200-256] GPU-8a56a4bc-d184-a047-2620-be19fdf913d5",
        "dc1n0001gpu8h100sxm5highmemory 20261130T224501Z20261130T224501Z s3://bucket-123/some/key2024/run",
    ],
)
def test_what_is_no_secret(text: str) -> None:
    assert find_secret(text, {}) is None


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("xoxb-123456789012-abcdefABCDEF", "a Slack token"),
        ("glpat-abcdefghijklmnopqrst", "a GitLab token"),
        ("AIza" + "Sy" * 17 + "A", "a Google key"),
        ("npm_" + "a1B2" * 9, "an npm or PyPI token"),
        ("dckr_pat_" + "aB3" * 9, "a Docker token"),
        ("ASIA" + "ABCD1234" * 2, "an AWS key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc", "a JSON web token"),
        ("curl -H 'Authorization: Bearer abcdefghij0123456789'", "a bearer token"),
        ("0123456789abcdef0123456789abcdef01234567", "a random token"),
        ("wandb login 0123456789abcdef0123456789abcdef01234567", "a random token"),
        ("7fKq2ZrX9vB4tLmW8sYc3NhJ6dPaQ1eG5uRw0TkV", "a random token"),
        ("q7d1k8z3m5x0c2v9b4n6a8s1d3f5g7h9", "a random token"),
    ],
)
def test_values_that_look_like_tokens_whatever_their_name(text: str, kind: str) -> None:
    assert find_secret(text, {}) == kind
    for key in ("run.id", "model.name", "logging.wandb_project"):
        with pytest.raises(ConfigError, match=f"^{key}: found what looks like {kind}") as caught:
            compose(["+experiment=quickstart", f"{key}='{text}'" if "'" not in text else f'{key}="{text}"'])
        assert text not in str(caught.value)


def test_random_words_are_found_and_few_others() -> None:
    draw = random.Random(0)
    for alphabet, length in (
        (string.ascii_letters + string.digits, 40),
        (string.ascii_lowercase + string.digits, 40),
        ("0123456789abcdef", 40),
    ):
        words = ["".join(draw.choice(alphabet) for _ in range(length)) for _ in range(500)]
        assert sum(looks_random(word) for word in words) > 400


def test_variables_that_go_along_are_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from efflaunch.launcher.ray.launcher import RayLauncher

    monkeypatch.setenv("MY_SETTING", "hf_abcdefghijklmnopqrstuvwxyz0123")
    config = compose(["+experiment=quickstart", "launcher=ray", "launcher.ray.address=http://head:8265", "launcher.ray.env=[MY_SETTING]"])
    with pytest.raises(ConfigError, match="launcher.ray.env: found MY_SETTING; expected no secrets"):
        RayLauncher().check(config)


def test_dry_runs_show_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for launcher in ("local", "slurm"):
        show_launch(compose(["+experiment=quickstart", f"launcher={launcher}", "run.id=dry"]))
    text = capsys.readouterr().out
    assert "#SBATCH" in text and not [name for name, value in SECRETS.items() if value in text]


def test_an_error_with_a_secret_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    worker._record(tmp_path, 0, OSError(f"401 for https://hub/?token={SECRETS['HF_TOKEN']}"), 1)
    output = (tmp_path / "rank-0.error.json").read_text() + "".join(capsys.readouterr())
    assert "token=<HF_TOKEN>" in json.loads((tmp_path / "rank-0.error.json").read_text())["message"]
    assert SECRETS["HF_TOKEN"] not in output


def open_to_others(run_dir: Path) -> list[str]:
    """What below a run directory, itself included, others may read or enter."""
    entries = ((path, path.lstat().st_mode) for path in (run_dir, *run_dir.rglob("*")))
    return [
        f"{path.relative_to(run_dir.parent)} {stat.filemode(mode)}" for path, mode in entries if mode & 0o077 and not stat.S_ISLNK(mode)
    ]


def files_with(run_dir: Path, words: Iterable[str]) -> list[str]:
    """Files below a run directory that hold one of the words."""
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [f"{path}: {word}" for path in files for word in words if word.encode() in path.read_bytes()]


def arguments_with(pids: Iterable[int], words: Iterable[str]) -> list[str]:
    """Processes whose command line, which every user of the machine can read, holds one of the words."""
    lines = [line for line in map(command_line, pids) if line]
    assert lines
    return [f"{line!r}: {word}" for line in lines for word in words if word.encode() in line]


def command_line(pid: int) -> bytes:
    """As everybody may read it; nothing for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def open_sockets(pids: Iterable[int]) -> Iterator[str]:
    """Addresses at which these processes take connections or packets from anybody who reaches them."""
    for pid in pids:
        try:
            sockets = psutil.Process(pid).net_connections("inet")
        except psutil.NoSuchProcess:
            continue
        waiting = (item for item in sockets if item.status == psutil.CONN_LISTEN or (item.type == socket.SOCK_DGRAM and not item.raddr))
        yield from (item.laddr.ip for item in waiting)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_real_run(tmp_path: Path) -> None:
    """With every process it has: launcher, agent, ranks, planner, flushers, W&B's where that is installed."""
    make_corpus(tmp_path)
    sinks = ["logging.tensorboard=true", "logging.wandb=offline"] if has_sinks() else []
    os.umask(0o022)
    log = tmp_path / "output"
    command = [sys.executable, "-m", "efflaunch", "train", *BASE, "train.steps=100000", *sinks]
    with log.open("wb") as out:
        run = subprocess.Popen(command, cwd=tmp_path, env=environment() | SECRETS, stdout=out, stderr=out)
    run_dir = tmp_path / "runs" / "run"
    try:
        seen: set[int] = set()
        words, addresses, arguments = SECRETS.values(), set[str](), set[str]()

        def trained() -> bool:
            assert run.poll() is None, log.read_text()
            pids = {run.pid, *(child.pid for child in psutil.Process(run.pid).children(recursive=True))}
            seen.update(pids)
            addresses.update(open_sockets(pids))
            arguments.update(arguments_with(pids, words))
            return newest_step(run_dir) >= 12 and len(checkpoint_steps(run_dir)) > 1

        wait_until(trained)
        assert len(seen) >= 4, "launcher, agent and two ranks"
        assert addresses and all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses
        assert not arguments
        run.send_signal(signal.SIGTERM)
        assert run.wait(ENDS_S) == 75, log.read_text()
    finally:
        run.kill()
        run.wait()
    assert not open_to_others(run_dir)
    assert not files_with(run_dir, words) and not [word for word in words if word in log.read_text()]


def has_sinks() -> bool:
    """Whether the packages of both sinks are there."""
    import importlib.util

    return all(importlib.util.find_spec(name) is not None for name in ("wandb", "tensorboard"))
