"""The memory benchmark in miniature: every contestant's gradients, orderings of bytes that must always hold, and what is written.

Nothing is timed. Peers that are not installed (the extra `bench`) are passed over.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from efflaunch.bench import gpu_memory, memory, report
from efflaunch.bench.contest import EXTRA_PEERS, GRADIENT_TOLERANCE, PEERS, PRESETS, contestants, gradient_error, peak, ratios
from efflaunch.bench.peers.shape import LLAMA_8B, Chunks, Shape, Task
from efflaunch.bench.slopes import at_llama_8b, fit_line, max_tokens, max_tokens_by_segments
from efflaunch.memory.config import AttentionTiling
from efflaunch.memory.policy import MOVED, MemoryPolicy
from efflaunch.tests.limits import ENDS_S

AUTO = {"auto": MemoryPolicy(layer_input=MOVED, attention=AttentionTiling.CHUNKS, chunk_tokens=1, segment_layers=2)}
"""As the solver has it where everything is full."""
NEEDS = {"deepspeed_alst": "deepspeed", "deepspeed_alst_as_shipped": "deepspeed", "streambp_released": "streambp"}
CHUNK = 16
TASK = Task(Shape(4, 8), 4, 0, Chunks(layer=CHUNK, loss=8, streambp_layer=CHUNK, streambp_loss=8))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def installed(name: str) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")


def slope(name: str, layers: int = 4) -> float:
    """Device bytes per token at a small width."""
    return slopes(name, layers)[0]


def slopes(name: str, layers: int = 4) -> tuple[float, float]:
    """Of device and host."""
    installed(name)
    build, lengths = contestants(CHUNK, AUTO)[name].build, (3 * CHUNK, 5 * CHUNK)
    low, high = (peak(build(replace(TASK, num_layers=layers, num_tokens=length))) for length in lengths)
    added = lengths[1] - lengths[0]
    return (high.device_bytes - low.device_bytes) / added, (high.host_bytes - low.host_bytes) / added


@pytest.mark.parametrize("name", [*PEERS, *PRESETS, *AUTO, *EXTRA_PEERS])
def test_gradients_are_those_of_plain_hugging_face(name: str) -> None:
    installed(name)
    assert gradient_error(contestants(32, AUTO)[name].build) < GRADIENT_TOLERANCE


@pytest.fixture(scope="module")
def bytes_per_token() -> dict[str, float]:
    torch.set_num_threads(1)
    return {name: slope(name) for name in ("keep", "recompute", "streambp", "auto", "hf_checkpointing", "plain")}


def test_orderings_of_bytes(bytes_per_token: dict[str, float]) -> None:
    assert bytes_per_token["auto"] < bytes_per_token["streambp"] < bytes_per_token["recompute"] < bytes_per_token["keep"]
    assert bytes_per_token["recompute"] < bytes_per_token["hf_checkpointing"] < bytes_per_token["plain"]


def test_streambp_holds_no_more_than_the_released_one(bytes_per_token: dict[str, float]) -> None:
    assert bytes_per_token["streambp"] <= slope("streambp_released")


def test_auto_holds_half_of_alst(bytes_per_token: dict[str, float]) -> None:
    """At this width, where the logits weigh little; a sixth at Llama 8B's (docs/benchmarks.md)."""
    assert 2 * bytes_per_token["auto"] <= slope("deepspeed_alst")


def test_layer_inputs_on_the_host_are_counted_there_alone() -> None:
    row = 2 * TASK.shape.hidden_size
    device, host = slopes("alst", layers=3)
    assert host == 3 * row and slopes("alst", layers=5) == (device, 5 * row)
    assert slopes("auto")[1] == (2 + 1) * row, "two segments of two layers, and the live one's second input"
    assert slope("streambp", layers=5) - slope("streambp", layers=3) == 2 * row


@pytest.mark.parametrize("name", ["memo", "auto", "deepspeed_alst"])
def test_peaks_are_the_same_again(name: str) -> None:
    installed(name)
    build = contestants(CHUNK, AUTO)[name].build
    first, second = (peak(build(replace(TASK, num_tokens=100))) for _ in range(2))
    assert first == second


def test_slopes_are_brought_to_llama_8b() -> None:
    def per_token(shape: Shape, layers: int) -> float:
        return layers * 2 * shape.hidden_size + 10 * shape.hidden_size + 4 * shape.num_heads + 4 * shape.head_dim + 24

    shapes = [Shape(4, 8), Shape(4, 16), Shape(8, 8), Shape(8, 6), Shape(12, 4)]
    fitted = at_llama_8b({layers: {shape: per_token(shape, layers) for shape in shapes} for layers in (4, 8)})
    assert fitted.per_layer == pytest.approx(8192)
    assert fitted.total == pytest.approx(per_token(LLAMA_8B, 32)) and fitted.residual < 1e-9
    with pytest.raises(ValueError, match="cannot be told apart"):
        at_llama_8b({layers: {shape: 1.0 for shape in shapes[:2]} for layers in (4, 8)})


def test_a_line_says_how_far_points_are_from_it() -> None:
    assert fit_line([(1, 3.0), (2, 5.0), (3, 7.0)]).slope == pytest.approx(2)
    assert fit_line([(1, 3.0), (2, 5.0), (3, 10.0)]).residual == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="two different"):
        fit_line([(1, 1.0), (1, 2.0)])


def test_longest_sequences_say_what_binds() -> None:
    small_host, large_host = max_tokens(28 * 1024, 256 * 1024).values()
    assert small_host == {"tokens": 120 * (1 << 30) // (256 * 1024), "binds": "host"}
    assert large_host["binds"] == "device" and large_host["tokens"] == pytest.approx(55.5 * (1 << 30) / (28 * 1024), abs=1)


def test_segments_trade_host_memory_for_length() -> None:
    small_host, large_host = max_tokens_by_segments(28 * 1024).values()
    assert small_host["segment_layers"] > 1 and small_host["tokens"] > max_tokens(28 * 1024, 256 * 1024)["128 GiB, LoRA"]["tokens"]
    assert large_host == {"tokens": int(55.5 * (1 << 30) / (28 * 1024)), "binds": "device", "segment_layers": 1}


def test_the_shape_keeps_llama_8bs_ratios() -> None:
    fields = LLAMA_8B.fields(32)
    assert (fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"], fields["num_key_value_heads"]) == (
        4096,
        14336,
        128256,
        8,
    )
    with pytest.raises(ValueError, match="ratios"):
        Shape(6, 16).fields(1)


def test_ratios_are_medians_within_rounds() -> None:
    seconds = {"hf_checkpointing": [1.0, 10.0, 2.0], "streambp": [0.5, 10.0, 1.0]}
    assert ratios(seconds) == {"hf_checkpointing": 1.0, "streambp": 0.5}


def test_the_program_writes_its_keys_and_the_report_shows_them(tmp_path: Path) -> None:
    arguments = ["--json", str(tmp_path / "memory.json"), "--only", "plain", "streambp", "--lengths", "40", "80", "--chunk", "20"]
    arguments += ["--layers", "1", "2"]
    arguments += ["--rounds", "1", "--time-tokens", "40", "--time-chunk", "10", "--time-shape", "4x8", "--time-layers", "1"]
    assert memory.main(arguments) == 0
    results = json.loads((tmp_path / "memory.json").read_text())
    assert set(results["bytes_per_token"]) == {"plain", "streambp"}
    assert set(results["time_ratio"]) == {"plain", "streambp", "hf_checkpointing"} and results["time_ratio"]["hf_checkpointing"] == 1.0
    assert results["details"]["plain"]["gradient_error"] == 0.0
    assert len(results["details"]["streambp"]["measured"]) == 2 * 4
    assert results["details"]["streambp"]["device"]["per_layer"] == pytest.approx(8192)
    assert report.main([str(tmp_path), str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "## Memory schemes" in page and "| ours: streambp |" in page and "Hugging Face, nothing recomputed" in page


GPU = ["--device", "cpu", "--shape", "4", "8", "--check-shape", "4", "8", "--check-tokens", "70", "--check-chunk", "32"]
GPU += ["--tokens", "48", "96", "--chunk", "16", "--loss-chunk", "16", "--most-layers", "2", "--seconds", "1e6"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Jobs run here instead of in processes of their own; which."""
    from efflaunch.bench.gpu_jobs import run_job

    ran: list[Any] = []

    def run(job: dict[str, Any], left_s: float) -> dict[str, Any]:
        ran.append(job)
        return run_job(job)

    monkeypatch.setattr(gpu_memory, "_run_apart", run)
    return ran


def test_the_gpu_program_on_the_cpu(tmp_path: Path, in_process: list[Any]) -> None:
    arguments = ["--json", str(tmp_path / "gpu.json"), *GPU, "--peak-flops", "1e12"]
    assert gpu_memory.main(arguments) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())
    kinds = [(job["kind"], job["tokens"], job.get("layers")) for job in in_process]
    checks = [("attention", 70, None), ("sinks", 70, None), ("executor", 70, 3)]
    assert kinds[:5] == [*checks, ("step", 48, 1), ("step", 48, 2)] and len(kinds) == 9
    assert all(results["summary"][kind] < 1.5 for kind, _, _ in checks)
    lengths = results["summary"]["lengths"]
    assert [row["tokens"] for row in lengths] == [48, 96] and all(row["mfu"] > 0 for row in lengths)
    assert lengths[1]["peak_bytes_32_layers"] > lengths[1]["peak_bytes"] > lengths[0]["peak_bytes"]
    in_process.clear()
    assert gpu_memory.main(arguments) == 0 and in_process == [], "what is in the file is not run again"
    report.main([str(tmp_path), str(tmp_path / "page.md")])
    assert "## The memory executor on a GPU" in (tmp_path / "page.md").read_text()


def test_a_job_that_cannot_end_in_time_is_not_begun() -> None:
    options = gpu_memory._parser().parse_args([*GPU, "--host-gib", "1"])
    first = gpu_memory.next_job(options, [], 1e6)
    assert first is not None and first["kind"] == "attention"
    assert gpu_memory.next_job(options, [], 1.0) is None
    rows = [{"job": job, "worst_ratio": 1.0} for job, _ in list(gpu_memory.wanted(options, []))[:3]]
    one = gpu_memory.next_job(options, rows, 1e6)
    assert one is not None and (one["tokens"], one["layers"]) == (48, 1)
    rows.append({"job": one, "seconds": 100.0, "peak_bytes": 1, "device_bytes": None})
    many = gpu_memory.next_job(options, rows, 1e6)
    assert many is not None and (many["tokens"], many["layers"]) == (48, 2)
    assert gpu_memory.next_job(options, rows, 240.0) is None, "twice the layers take twice the time"


def test_a_failed_job_is_recorded() -> None:
    job = {"kind": "nothing", "device": "cpu", "allocator": "default"}
    assert "no such job" in gpu_memory._run_apart(job, ENDS_S)["error"]


def test_flops_of_llama_8b() -> None:
    assert gpu_memory.layer_parameters(LLAMA_8B) == pytest.approx(218.1e6, rel=1e-3)
    tokens = 1 << 20
    attention = 32 * 7 * tokens**2 * 4096
    linear = 6 * (32 * 218.1e6 + 525.3e6) * tokens
    assert gpu_memory.model_flops(LLAMA_8B, tokens, 32) == pytest.approx(attention + linear, rel=1e-3)
