"""What is trained: model, data, optimizer, logging and the run's own settings. One frozen dataclass per config group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from ..errors import ConfigError
from ..ranges import STEPS, TOKENS, Range, check_ranges
from ..units import Tokens


class Family(Enum):
    """Model families with a layer adapter (`training/families/`)."""

    LLAMA = "llama"
    MISTRAL = "mistral"
    QWEN2 = "qwen2"
    QWEN3 = "qwen3"
    GEMMA2 = "gemma2"
    GEMMA3 = "gemma3"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture and weights. With `path`, every size comes from its config.json and must not be given here."""

    name: str
    """Shown in logs and plans."""
    path: str | None = None
    """A local directory of safetensors, or a hub name where there is a network; None: random weights."""
    family: Family | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    """None: hidden_size / num_heads."""
    vocab_size: int | None = None
    max_positions: Tokens | None = None
    """Context length the rotary table is defined for (`max_position_embeddings`)."""
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    """As Hugging Face defines it: rope_type linear, dynamic, yarn or llama3, with its parameters."""
    sliding_window: Tokens | None = None
    tie_embeddings: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the Hugging Face config of this family, passed on as they are."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "num_layers": Range(1, 10_000),
        "hidden_size": Range(1, 1 << 20),
        "intermediate_size": Range(1, 1 << 24),
        "num_heads": Range(1, 65_536),
        "num_kv_heads": Range(1, 65_536),
        "head_dim": Range(1, 65_536),
        "vocab_size": Range(1, 1 << 28),
        "max_positions": Range(1, TOKENS),
        "rope_theta": Range(0, 1e15, above=True),
        "sliding_window": Range(1, TOKENS),
    }


class LongDocuments(Enum):
    """What happens to documents longer than `data.max_seq_len`."""

    SPLIT = "split"
    DROP = "drop"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which documents are trained on and how many per optimizer step."""

    name: str
    prefixes: list[str] = field(default_factory=list)
    """Megatron indexed corpora: PREFIX.bin + PREFIX.idx (+ PREFIX.mask.bin where a loss mask is kept)."""
    builtin: str | None = None
    """A corpus made on the spot instead of `prefixes`: `python_stdlib` (source files of this Python)."""
    tokenizer: str | None = None
    """Directory, tokenizer.json or hub name; its vocabulary must fit the model's. None: made with the built-in corpus."""
    vocab_size: int | None = None
    """Vocabulary of the tokenizer trained for a built-in corpus."""
    cache_dir: str | None = None
    """Where built-in corpora are kept; None: the user's cache directory."""
    max_seq_len: Tokens
    """Longest sequence; longer documents are split or dropped."""
    long_documents: LongDocuments = LongDocuments.SPLIT
    global_batch_tokens: Tokens
    """Tokens of one optimizer step, over all ranks; at least max_seq_len."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "vocab_size": Range(257, 1 << 28),
        "max_seq_len": Range(2, TOKENS),
        "global_batch_tokens": Range(2, 1 << 50),
    }


class States(Enum):
    """Where the optimizer's numbers live."""

    DEVICE = "device"
    """Float32 weights and both moments on the device, 1/shard of each a rank."""
    HOST = "host"
    """Float32 weights and both moments in host memory, updated there; the device has the weights in compute precision only."""


class Update(Enum):
    """When the optimizer updates."""

    STEP = "step"
    """After the whole backward pass: all gradients of a step exist, and a step with a bad number is not applied at all."""
    BACKWARD = "backward"
    """Each layer as soon as its gradients are reduced, which are then freed: exact, but what is applied cannot be taken back."""


class ClipMode(Enum):
    """Which norm gradients are clipped by; anything but `global` is for update=backward."""

    GLOBAL = "global"
    """That of this step's whole gradient: exact, needs all of it before the first update."""
    TWO_PASS = "two_pass"
    """The same norm from a backward pass of its own, which keeps no gradients: exact, twice the time."""
    PREVIOUS_NORM = "previous_norm"
    """That of the step before: not exact, a sudden large gradient is clipped a step too late."""


class StateDtype(Enum):
    """Precision of both moments; anything but float32 is inexact and needs torchao (the extra `lowbit`)."""

    FLOAT32 = "float32"
    """As the master weights (float64 in a float64 run)."""
    BFLOAT16 = "bfloat16"
    INT8 = "8bit"
    """Blocks of 256 numbers share a scale; tensors that are small or not of whole blocks keep float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW on float32 master weights, and its schedule."""

    name: str
    lr: float
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only; norms, biases and embeddings are not decayed."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    schedule: str = "cosine"
    """cosine, linear (to zero), wsd (warm-up, stable, linear decay) or constant."""
    warmup_steps: int = 0
    decay_steps: int | None = None
    """wsd only: steps of the final decay."""
    min_lr_ratio: float = 0.0
    """cosine only: last learning rate as a share of the peak."""
    states: States = States.DEVICE
    """Where float32 weights and moments live; host frees 10 bytes a parameter of the device in bfloat16 runs, and updates on the CPU."""
    update: Update = Update.STEP
    """backward frees each layer's gradient as soon as it is applied, and overlaps a host update with the backward of the next layer."""
    clip_mode: ClipMode = ClipMode.GLOBAL
    """Which norm grad_clip means. previous_norm is not exact."""
    state_dtype: StateDtype = StateDtype.FLOAT32
    """Of the moments. bfloat16 and 8bit are not exact."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "lr": Range(0, 1000, above=True, example=3e-4),
        "betas": Range(0, 1, below=True),
        "eps": Range(0, 1, above=True),
        "weight_decay": Range(0, 1000),
        "grad_clip": Range(0, 1e30, above=True),
        "warmup_steps": Range(0, STEPS),
        "decay_steps": Range(1, STEPS),
        "min_lr_ratio": Range(0, 1),
    }


class Dtype(Enum):
    """Precision of computation; weights, gradients' reduction and optimizer states are float32 (float64 for float64)."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT64 = "float64"


class Objective(Enum):
    """What is trained for (docs/objectives.md). A loss mask in the corpus makes language modelling fine-tuning."""

    LANGUAGE_MODELLING = "language_modelling"
    DPO = "dpo"
    GRPO = "grpo"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Objective, length, seed and numerics of the run."""

    steps: int
    seed: int = 0
    dtype: Dtype = Dtype.BFLOAT16
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2), added to the loss per target token."""
    loss_chunk_tokens: Tokens = 2048
    """Tokens whose logits exist at one time: 10 bytes x vocabulary x this is the loss's peak."""
    objective: Objective = Objective.LANGUAGE_MODELLING
    """dpo needs corpora of pairs, grpo of completions with rewards (efflaunch data prepare)."""
    dpo_beta: float = 0.1
    """dpo only: how strongly the reference holds; the margin of log-probabilities is multiplied with it."""
    grpo_clip_low: float = 0.2
    """grpo only: how far below one the ratio to the old probability still counts."""
    grpo_clip_high: float = 0.2
    """grpo only: how far above one."""
    grpo_kl_weight: float = 0.0
    """grpo only: weight of the divergence from the reference, per token."""

    RANGES: ClassVar[Mapping[str, Range]] = {
        "steps": Range(1, STEPS, example=100),
        "seed": Range(0, 1 << 63),
        "z_loss": Range(0, 1000),
        "loss_chunk_tokens": Range(1, TOKENS),
        "dpo_beta": Range(0, 1e6, above=True),
        "grpo_clip_low": Range(0, 1, above=True),
        "grpo_clip_high": Range(0, 1e6, above=True),
        "grpo_kl_weight": Range(0, 1e6),
    }


def check_train(config: TrainConfig) -> None:
    """ConfigError where a length is none, or the settings of the objective make no sense."""
    check_ranges(config, "train")
    if config.objective is not Objective.LANGUAGE_MODELLING and config.z_loss:
        raise ConfigError(
            "train.z_loss",
            found=f"{config.z_loss} with train.objective={config.objective.value}",
            expected="it with language modelling only",
            hint="train.z_loss=0",
        )


class WandbMode(Enum):
    """Where W&B keeps its files; `online` is the only mode that opens a connection."""

    OFF = "off"
    OFFLINE = "offline"
    ONLINE = "online"


class Display(Enum):
    """How progress is shown; `auto` is a live table on a terminal and plain lines otherwise."""

    AUTO = "auto"
    LIVE = "live"
    PLAIN = "plain"
    QUIET = "quiet"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingConfig:
    """metrics.jsonl is always written; these are what else is shown or written, on rank 0."""

    name: str
    every_steps: int = 1
    display: Display = Display.AUTO
    tensorboard: bool = False
    wandb: WandbMode = WandbMode.OFF
    wandb_project: str = "efflaunch"

    RANGES: ClassVar[Mapping[str, Range]] = {
        "every_steps": Range(1, STEPS),
    }
