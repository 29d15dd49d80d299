"""Sections of bench/first_gpu.py that run other programs: the executor's benchmark, and training by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .gpu_section import Row, Scale

CONFIGURATIONS = {
    "default": (),
    "update in backward": ("optim.update=backward", "optim.grad_clip=null"),
    "states on the host": ("optim.state_device=host",),
    "planned arena": ("memory.arena=planned",),
    "compiled": ("memory.compile=true",),
}
"""Settings of each run of the trainer beside BASE."""
TINY = ("default",)
"""The one that is run in small: a command takes seconds to start."""
BASE = (
    "+experiment=quickstart", "cluster.num_nodes=1", "cluster.ranks_per_node=1", "parallel.sequence=static", "checkpoint.every_steps=2",
    "run.id=run", "logging.display=quiet", "optim.schedule=constant",
)  # fmt: skip
SMALL = ("data.max_seq_len=128", "data.global_batch_tokens=256", "parallel.tokens_per_rank=128", "model.num_layers=1")
ON_GPU = (
    "cluster.device=cuda", "cluster.device_memory_bytes=64GiB", "cluster.host_memory_bytes=64GiB", "cluster.peak_flops=989e12",
    "cluster.host_link_bandwidth=50e9", "train.dtype=bfloat16", "data.max_seq_len=16K", "data.global_batch_tokens=32K",
    "parallel.tokens_per_rank=16K",
)  # fmt: skip
STEPS = 4


def memory(scale: Scale) -> Row:
    """bench.gpu_memory at 128K and 256K tokens; its own file lies beside ours, and what it held is not run again."""
    file = scale.out / "gpu_memory.json"
    command = [sys.executable, "-m", "efflaunch.bench.gpu_memory", "--json", str(file), "--device", scale.device]
    if scale.tiny:
        command += ["--tokens", "48", "--shape", "4", "8", "--check-shape", "4", "8", "--check-tokens", "40", "--check-chunk", "16"]
        command += ["--chunk", "16", "--loss-chunk", "16", "--most-layers", "1", "--peak-flops", "1e12"]
    else:
        command += ["--tokens", str(1 << 17), str(1 << 18)]
    subprocess.run([*command, "--seconds", str(scale.seconds - 10.0)], check=True, stdout=sys.stderr)
    found = json.loads(file.read_text())
    return {"summary": found["summary"], "errors": [row["error"] for row in found["rows"] if "error" in row]}


def trainer(scale: Scale) -> Row:
    """Losses of four steps by configuration: two, a checkpoint, the end of the process, then two more; how far each is from the default."""
    losses: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name in TINY if scale.tiny else CONFIGURATIONS:
        folder = scale.out / "trainer" / name.replace(" ", "-")
        try:
            losses[name] = trained(folder, scale, CONFIGURATIONS[name])
        except subprocess.CalledProcessError as error:
            failed[name] = (error.stdout + error.stderr)[-1500:]
    first = losses.get("default", [])
    apart = {name: max((abs(a - b) for a, b in zip(found, first, strict=False)), default=None) for name, found in losses.items()}
    complete = all(len(found) == STEPS for found in losses.values())
    return {"losses": losses, "from_default": apart, "failed": failed, "ok": complete and not failed}


def trained(folder: Path, scale: Scale, settings: tuple[str, ...]) -> list[float]:
    """Losses of STEPS steps, half of them after a resume. CalledProcessError where a command fails."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = (*BASE, *(ON_GPU if scale.device == "cuda" else ()), *(SMALL if scale.tiny else ()), *settings)
    _command(folder, "train", *chosen, f"train.steps={STEPS // 2}")
    _command(folder, "resume", str(folder / "runs" / "run"), f"train.steps={STEPS}")
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    steps = {event["step"]: event["loss"] for event in map(json.loads, lines) if event["event"] == "step"}
    return [steps[step] for step in sorted(steps)]


def _command(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "efflaunch", *words]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=os.environ.copy())
