"""Does the work of one process of bench/gpu_memory.py: check attention, sinks or the executor, or time one training step.

Every function returns plain data. On the CPU the same code runs with exact live bytes in place of the CUDA allocator's figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ..memory.activation_classes import LAYER_INPUT, activation_classes
from ..memory.arena.tracer import StorageTracer
from ..memory.config import AttentionTiling
from ..memory.offload.checks import check_host_memory
from ..memory.offload.host_store import HostStore
from ..memory.offload.open import open_store
from ..memory.policy import KEEP_ALL, KEPT, MOVED, MemoryPolicy, Split
from ..model.build import install
from ..parallel.sequence.attention import AttentionSpec
from .peers.document import alone, mean_loss
from .peers.shape import Shape

QKV = tuple[Tensor, Tensor, Tensor]
Results = tuple[Tensor, ...]
"""Output and gradients."""


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """The result of one job, by its kind."""
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]
    kinds = {"attention": attention, "sinks": sinks, "executor": executor, "step": step}
    torch.manual_seed(0)
    return kinds[job["kind"]](job) | device_facts(torch.device(job["device"]))


def device_facts(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device_name": "cpu", "device_bytes": None, "kernel": "CpuKernel"}
    from ..parallel.sequence.kernels import block_kernel

    properties = torch.cuda.get_device_properties(device)
    return {"device_name": properties.name, "device_bytes": properties.total_memory, "kernel": type(block_kernel(device)).__name__}


def attention(job: dict[str, Any]) -> dict[str, Any]:
    """Errors of bfloat16 attention against SDPA in float32: our blocks' and, beside them, those of SDPA itself in bfloat16."""
    spec, qkv, do = _attention_inputs(job)
    exact = _sdpa(qkv, do, spec)
    half, d_half = _rounded(qkv), do.bfloat16()
    runtime = alone(len(do), do.device)
    o, lse = runtime.core_forward(half, spec, None)
    ours = (o, *runtime.core_backward(d_half, half, o, lse, spec))
    return _compared(("o", "dq", "dk", "dv"), ours, _sdpa(half, d_half, spec), exact, "sdpa")


def sinks(job: dict[str, Any]) -> dict[str, Any]:
    """Errors as `attention` has them, with a sink in every head and a window: beside ours, those of one softmax in bfloat16."""
    plain, qkv, do = _attention_inputs(job)
    spec, heights = replace(plain, window=job["tokens"] // 8), torch.randn(plain.num_heads, device=do.device)
    exact = _softmax_with_sinks(qkv, do, heights, spec)
    half, d_half, low = _rounded(qkv), do.bfloat16(), heights.bfloat16()
    runtime = alone(len(do), do.device)
    o, lse = runtime.core_forward(half, spec, low)
    ours = (o, *runtime.core_backward(d_half, half, o, lse, spec), runtime.sinks_backward(d_half, o, lse, low))
    return _compared(("o", "dq", "dk", "dv", "dsinks"), ours, _softmax_with_sinks(half, d_half, low, spec), exact, "softmax")


def _attention_inputs(job: dict[str, Any]) -> tuple[AttentionSpec, QKV, Tensor]:
    """A spec, float32 q (T, H, D), k and v (T, H / 4, D), and the gradient of the output."""
    device, shape = torch.device(job["device"]), Shape(*job["shape"])
    spec = AttentionSpec(shape.num_heads, shape.num_heads // 4, shape.head_dim, shape.head_dim**-0.5)
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads, spec.num_heads)
    q, k, v, do = (torch.randn((job["tokens"], count, shape.head_dim), device=device) for count in heads)
    return spec, (q, k, v), do


def _rounded(qkv: QKV) -> QKV:
    q, k, v = (t.bfloat16() for t in qkv)
    return q, k, v


def _compared(names: Sequence[str], ours: Results, theirs: Results, exact: Results, other: str) -> dict[str, Any]:
    rows = zip(names, ours, theirs, exact, strict=True)
    errors = {name: {"ours": _error(a, e), other: _error(b, e)} for name, a, b, e in rows}
    return {"errors": errors, "worst_ratio": max(row["ours"] / row[other] for row in errors.values())}


def _softmax_with_sinks(qkv: QKV, do: Tensor, heights: Tensor, spec: AttentionSpec) -> Results:
    """o and all gradients, by one softmax over the keys and a column of sinks, in the dtype of its inputs."""
    leaves = [t.detach().requires_grad_() for t in (*qkv, heights)]
    q, k, v = (t.transpose(0, 1) for t in leaves[:3])
    share, size = spec.num_heads // spec.num_kv_heads, len(do)
    scores = q @ k.repeat_interleave(share, 0).transpose(1, 2) * spec.scale
    seen = torch.ones(size, size, dtype=torch.bool, device=do.device).tril().triu(1 - (spec.window or size))
    column = leaves[3].view(-1, 1, 1).expand(-1, size, 1)
    weights = torch.cat((scores.masked_fill(~seen, float("-inf")), column), -1).softmax(-1)[..., :-1]
    o = (weights @ v.repeat_interleave(share, 0)).transpose(0, 1)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def _sdpa(qkv: QKV, do: Tensor, spec: AttentionSpec) -> Results:
    leaves = [t.detach().requires_grad_() for t in qkv]
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in leaves)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True).squeeze(0).transpose(0, 1)
    return o.detach(), *torch.autograd.grad(o, leaves, do)


def _error(computed: Tensor, exact: Tensor) -> float:
    return float((computed.float() - exact).norm() / exact.norm())


def executor(job: dict[str, Any]) -> dict[str, Any]:
    """Worst relative error of a parameter's bfloat16 gradient against Hugging Face in float32: ours by policy, and its own."""
    device, num_tokens = torch.device(job["device"]), job["tokens"]
    ids = torch.randint(0, Shape(*job["shape"]).vocab_size, (num_tokens,), device=device)
    exact = _plain_gradients(job, ids, torch.float32)
    theirs = _worst(_plain_gradients(job, ids, torch.bfloat16), exact)
    ours = {}
    for name, policy in policies(job["chunk"]).items():
        model = random_model(job, torch.bfloat16)
        with opened_store(policy, model, num_tokens, device) as store:
            install(model, policy, loss_chunk_tokens=job["loss_chunk"], store=store)
            mean_loss(model, ids, alone(num_tokens, device)).backward()
        ours[name] = _worst({key: p.grad for key, p in model.named_parameters()}, exact)
    return {"errors": ours, "hugging_face_bfloat16": theirs, "worst_ratio": max(ours.values()) / theirs}


def policies(chunk: int) -> dict[str, MemoryPolicy]:
    """Return one policy for each way through the executor, by name."""
    whole = MemoryPolicy(chunk_tokens=chunk)
    streamed = replace(whole, attention=AttentionTiling.CHUNKS)
    half = Split(host=0.5)
    return {
        "keep": KEEP_ALL,
        "recompute": MemoryPolicy(),
        "streambp": streamed,
        "auto": replace(streamed, layer_input=MOVED),
        "memo": MemoryPolicy(layer_input=MOVED, attention_output=MOVED, query=half, key_value=half, residual=half, mlp=half),
        "upipe": replace(whole, layer_input=MOVED, head_groups=2),
        "segments": replace(streamed, layer_input=MOVED, segment_layers=2),
    }


def _plain_gradients(job: dict[str, Any], ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    model = random_model(job, dtype)
    row = ids.unsqueeze(0)
    model(input_ids=row, labels=row, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _worst(computed: dict[str, Any], exact: dict[str, Tensor]) -> float:
    return max(_error(computed[name], gradient) for name, gradient in exact.items())


def random_model(job: dict[str, Any], dtype: torch.dtype) -> Any:
    """Random weights, the same for every dtype but for rounding, made on the device itself."""
    fields = Shape(*job["shape"]).fields(job["layers"])
    torch.manual_seed(1)
    with torch.device(job["device"]):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).to(dtype).train()


@contextmanager
def opened_store(policy: MemoryPolicy, model: Any, num_tokens: int, device: torch.device) -> Iterator[HostStore | None]:
    if not policy.uses_host:
        yield None
        return
    capacity = host_bytes(policy, model.config, num_tokens)
    check_host_memory(capacity, 1)
    store = open_store(device=device, capacity_bytes=capacity)
    try:
        yield store
    finally:
        store.close()


@dataclass(frozen=True)
class _Sizes:
    """memory/activation_classes.py's, of a Hugging Face config without a head dim of its own."""

    hidden_size: int
    query_size: int
    kv_size: int
    intermediate_size: int
    num_heads: int
    experts: None = None

    @property
    def residual_size(self) -> int:
        return self.hidden_size

    @classmethod
    def of(cls, config: Any) -> _Sizes:
        width, heads = config.hidden_size, config.num_attention_heads
        return cls(width, width, width // heads * config.num_key_value_heads, config.intermediate_size, heads)


def host_bytes(policy: MemoryPolicy, config: Any, num_tokens: int) -> int:
    """Enough for what the policy moves: 2 bytes a number, and the ends of blocks."""
    layers, sizes = config.num_hidden_layers, _Sizes.of(config)
    inputs = -(-layers // policy.segment_layers) + policy.segment_layers - 1
    numbers = 0.0
    for kind in activation_classes(sizes):
        width = kind.numbers_per_token(sizes) + 2 * kind.wide_numbers_per_token(sizes)
        numbers += policy.split(kind).host * width * (inputs if kind is LAYER_INPUT else layers)
    chunks = -(-num_tokens // (policy.chunk_tokens or num_tokens)) + 6
    return int(2 * numbers * num_tokens) + layers * chunks * 12 * (64 << 10)


def step(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one forward and backward of a sequence, after a short one that warms up: seconds, peaks, bytes over the link.

    job: policy (a name of `policies`), keep_inputs (layer inputs stay on the device), segment_layers.
    """
    device, num_tokens = torch.device(job["device"]), job["tokens"]
    policy = replace(policies(job["chunk"])[job["policy"]], segment_layers=job["segment_layers"])
    policy = replace(policy, layer_input=KEPT) if job["keep_inputs"] else policy
    model = _model_in_bfloat16(job)
    with opened_store(policy, model, num_tokens, device) as store:
        install(model, policy, loss_chunk_tokens=job["loss_chunk"], store=store)
        ids = torch.randint(0, model.config.vocab_size, (num_tokens,), device=device)
        short = ids[: min(num_tokens, 2 * job["chunk"])]
        _one_step(model, short, alone(len(short), device))
        figures = _measured(model, ids, device, store)
        stats = None if store is None else store.stats
    moved = {} if stats is None else {"waits": stats.waits, "wait_s": stats.wait_s, "host_bytes": stats.high_water_bytes}
    return figures | moved | {"parameter_bytes": sum(p.nbytes for p in model.parameters())}


def _model_in_bfloat16(job: dict[str, Any]) -> Any:
    """Made in bfloat16 from the start: float32 weights of 32 layers would not leave room."""
    fields = Shape(*job["shape"]).fields(job["layers"])
    with torch.device(job["device"]):
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()


def _one_step(model: Any, ids: Tensor, runtime: Any) -> float:
    loss = mean_loss(model, ids, runtime)
    loss.backward()
    return float(loss.detach())


def _measured(model: Any, ids: Tensor, device: torch.device, store: HostStore | None) -> dict[str, Any]:
    runtime = alone(len(ids), device)
    if device.type != "cuda":
        tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        with StorageTracer(tensors, host=None if store is None else store.owns) as tracer:
            started = time.perf_counter()
            loss = _one_step(model, ids, runtime)
        return {"seconds": time.perf_counter() - started, "loss": loss, "peak_bytes": tracer.peak_bytes, "reserved_bytes": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    loss = _one_step(model, ids, runtime)
    torch.cuda.synchronize()
    peaks = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return {"seconds": time.perf_counter() - started, "loss": loss, **peaks}
