"""Lists every key of a ds_config.json and what becomes of it here: it goes to DeepSpeed, agrees with a key of ours, or is refused. Pure.

Keys are those of DeepSpeed 0.19 (docs/_pages/config-json.md, deepspeed/runtime/config.py and what it reads) and those that earlier
versions had. A group that is refused as a whole stands as one row: its inner keys need no own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

ZERO = "zero_optimization."
STAGES = (1, 2, 3)
REMOVE = "remove it"
"""Nothing is to be typed in place of a key."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A key of zero_optimization that goes to DeepSpeed as it is: speed or memory changes, and no number."""

    name: str
    kind: type[int] | type[bool]
    """int takes numbers without a fraction, from `least` on; bool true and false."""
    stages: tuple[int, ...] = STAGES
    """Those that read it."""
    sent_as: str | None = None
    """The name it is sent under; None: its own."""
    least: int = 0
    multiple: int = 1
    """What an int must be divisible by."""


@dataclass(frozen=True, slots=True)
class Agrees:
    """A key that says what one of ours says: both must say the same."""

    name: str
    ours: str
    words: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Its values, in lower case, and what they are here; a number is a number in both."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A key that may say one thing alone, which is what happens anyhow."""

    name: str
    values: tuple[object, ...]
    reason: str
    """Why, as the end of "...: ours is fixed, for "."""
    instead: str
    """What to type, or to read, in its place."""


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A key or a group that is refused unless it is off: absent, "auto", null, false, empty, or with enabled=false."""

    name: str
    reason: str
    instead: str


Row = Passed | Agrees | Fixed | Unsupported
TOKENS = "a batch is a number of tokens here, in as many sequences and micro-batches as they make"
BATCH = "data.global_batch_tokens=..."
PASSED: tuple[Passed, ...] = (
    Passed(f"{ZERO}reduce_bucket_size", int),
    Passed(f"{ZERO}allgather_bucket_size", int, (1, 2), least=2, multiple=2),
    Passed(f"{ZERO}allgather_partitions", bool, (1, 2)),
    Passed(f"{ZERO}reduce_scatter", bool),
    Passed(f"{ZERO}contiguous_gradients", bool),
    Passed(f"{ZERO}overlap_comm", bool),
    Passed(f"{ZERO}use_multi_rank_bucket_allreduce", bool, (1, 2)),
    Passed(f"{ZERO}sub_group_size", int, (3,)),
    Passed(f"{ZERO}stage3_prefetch_bucket_size", int, (3,)),
    Passed(f"{ZERO}stage3_param_persistence_threshold", int, (3,)),
    Passed(f"{ZERO}stage3_model_persistence_threshold", int, (3,)),
    Passed(f"{ZERO}stage3_max_live_parameters", int, (3,)),
    Passed(f"{ZERO}stage3_max_reuse_distance", int, (3,)),
    Passed(f"{ZERO}stage3_use_all_reduce_for_fetch_params", bool, (3,)),
    Passed(f"{ZERO}stage3_allgather_sequential", bool, (3,)),
    Passed(f"{ZERO}log_trace_cache_warnings", bool, (3,)),
    *(
        Passed(f"{ZERO}{name}", kind, (3,), f"{ZERO}stage3_{name}")
        for name, kind in (
            ("prefetch_bucket_size", int),
            ("param_persistence_threshold", int),
            ("model_persistence_threshold", int),
            ("max_live_parameters", int),
            ("max_reuse_distance", int),
            ("use_all_reduce_for_fetch_params", bool),
            ("allgather_sequential", bool),
        )
    ),
)
AGREES: tuple[Agrees, ...] = (
    Agrees(f"{ZERO}stage", "engine.stage"),
    Agrees("gradient_clipping", "optim.grad_clip", {"0": "null", "0.0": "null"}),
    Agrees("bf16.enabled", "train.dtype", {"true": "bfloat16", "false": "float32"}),
    Agrees("bfloat16.enabled", "train.dtype", {"true": "bfloat16", "false": "float32"}),
    Agrees("optimizer.type", "optim.algorithm", {"adam": "adamw"}),
    Agrees("optimizer.params.lr", "optim.lr"),
    Agrees("optimizer.params.betas", "optim.betas"),
    Agrees("optimizer.params.eps", "optim.eps"),
    Agrees("optimizer.params.weight_decay", "optim.weight_decay"),
    Agrees("steps_per_print", "logging.every_steps"),
    Agrees("tensorboard.enabled", "logging.tensorboard"),
    Agrees("wandb.enabled", "logging.wandb", {"true": "online", "false": "off"}),
)
_ADAMW = "AdamW is torch's, with decay apart from the gradient and with bias corrections"
_SUMS = "gradients are those of one mean over the step's target tokens, summed in float32 over ranks"
_FLOAT32 = "weights, gradients and moments are float32 beside layers in train.dtype"
_SAVES = "checkpoints are written here, as torch.distributed.checkpoint"
FIXED: tuple[Fixed, ...] = (
    Fixed("optimizer.params.adam_w_mode", (True,), _ADAMW, REMOVE),
    Fixed("optimizer.params.bias_correction", (True,), _ADAMW, REMOVE),
    Fixed("optimizer.params.amsgrad", (False,), _ADAMW, "engine=torch optim=library"),
    Fixed("optimizer.params.torch_adam", (True, False), _ADAMW, REMOVE),
    Fixed("optimizer.legacy_fusion", (False,), _ADAMW, REMOVE),
    Fixed("zero_allow_untested_optimizer", (True, False), _ADAMW, REMOVE),
    Fixed("zero_force_ds_cpu_optimizer", (False,), f"{_ADAMW}; DeepSpeed's own for hosts would be compiled at the start", "false"),
    Fixed("communication_data_type", ("fp32", "float32", None), _SUMS, "fp32"),
    Fixed("seq_parallel_communication_data_type", ("fp32", "float32", None), _SUMS, "parallel.sp_degree=... for sequences over ranks"),
    Fixed("gradient_accumulation_dtype", ("fp32", "float32", None), _SUMS, "fp32"),
    Fixed("data_types.grad_accum_dtype", ("fp32", "float32", None), _SUMS, "fp32"),
    Fixed("fp32_allreduce", (True,), _SUMS, "true"),
    Fixed("prescale_gradients", (False,), _SUMS, "false"),
    Fixed("gradient_predivide_factor", (1, None), _SUMS, "1.0"),
    Fixed("disable_allgather", (False,), "updated weights are gathered before the next step", "false"),
    Fixed(f"{ZERO}elastic_checkpoint", (True, False), f"{_SAVES}, for any number of ranks", REMOVE),
    Fixed(f"{ZERO}load_from_fp32_weights", (True,), f"{_FLOAT32}, and so they are saved and loaded", "true"),
    Fixed(f"{ZERO}compute_grad_norm", (True,), "the norm of gradients is part of every step's metrics", "true"),
    Fixed(f"{ZERO}ignore_unused_parameters", (True,), "every weight of a trained model has a gradient", "true"),
    Fixed(f"{ZERO}override_module_apply", (True,), "weights are made here, module by module", "true"),
    Fixed(f"{ZERO}memory_efficient_linear", (True, False), "matrices are multiplied by our own layers either way", REMOVE),
    Fixed(f"{ZERO}zero_hpz_partition_size", (1,), "losses of two blocks of ranks were not finite", "1, or parallel.replicate=..."),
    Fixed("bf16.check_grad_overflow", (True,), "a norm that is not finite ends the run with nothing applied", "true"),
    Fixed("data_types.keep_in_fp32_modules", ((),), "buffers keep the precision that Hugging Face makes them in", REMOVE),
)
_PROFILE = "efflaunch profile, and metrics.jsonl of each run"
_POLICY = "layers run by one memory policy, which knows what is kept, moved and recomputed"
_DATA = "corpora, their order and their mixture are ours"
_LAYOUT = "ranks are laid out by one plan"
_ROUNDED = "quantised collectives are not exact, and their kernels are compiled for GPUs, where they have not been tried"
UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported("train_batch_size", TOKENS, BATCH),
    Unsupported("train_micro_batch_size_per_gpu", TOKENS, f"{BATCH} parallel.tokens_per_rank=..."),
    Unsupported("gradient_accumulation_steps", TOKENS, f"{BATCH} parallel.tokens_per_rank=..."),
    Unsupported("managed_gradient_accumulation", TOKENS, BATCH),
    Unsupported("gradient_allreduce_op", _SUMS, REMOVE),
    Unsupported("scheduler", "rates follow a schedule of ours, in steps", "optim.schedule=... optim.warmup_steps=..."),
    Unsupported("fp16", f"{_FLOAT32}; there is no loss scale", "train.dtype=bfloat16"),
    Unsupported("amp", f"{_FLOAT32}; DeepSpeed has given it up, too", "train.dtype=bfloat16"),
    Unsupported("torch_autocast", f"{_FLOAT32}", "train.dtype=bfloat16"),
    Unsupported("bf16.bf16_master_weights_and_grads", _FLOAT32, "train.dtype=bfloat16 alone"),
    Unsupported("bf16.bf16_optimizer_states", _FLOAT32, "engine=torch optim.state_dtype=bfloat16"),
    Unsupported("bf16.immediate_grad_update", "it has not been tried", REMOVE),
    Unsupported("data_types.param_dtype", _FLOAT32, "train.dtype=..."),
    Unsupported("data_types.buffer_dtype", "buffers keep the precision that Hugging Face makes them in", REMOVE),
    Unsupported(f"{ZERO}offload_optimizer", "states stay on the device under this engine", "engine=torch optim.state_device=host"),
    Unsupported(f"{ZERO}offload_param", "weights stay on the device under this engine", "engine=torch optim.state_device=host"),
    Unsupported(f"{ZERO}cpu_offload", "states stay on the device under this engine", "engine=torch optim.state_device=host"),
    Unsupported(f"{ZERO}cpu_offload_param", "weights stay on the device under this engine", "engine=torch optim.state_device=host"),
    Unsupported(f"{ZERO}cpu_offload_use_pin_memory", "nothing is offloaded under this engine", "engine=torch optim.state_device=host"),
    Unsupported(f"{ZERO}zenflow", "it updates by old gradients, which is not exact", REMOVE),
    Unsupported(f"{ZERO}legacy_stage1", "DeepSpeed has given it up", REMOVE),
    Unsupported(f"{ZERO}grad_hooks", "DeepSpeed has given it up", REMOVE),
    Unsupported(f"{ZERO}stage3_gather_16bit_weights_on_model_save", _SAVES, "efflaunch export RUN_DIR OUT"),
    Unsupported(f"{ZERO}gather_16bit_weights_on_model_save", _SAVES, "efflaunch export RUN_DIR OUT"),
    Unsupported(f"{ZERO}stage3_gather_fp16_weights_on_model_save", _SAVES, "efflaunch export RUN_DIR OUT"),
    Unsupported(f"{ZERO}stage3_module_granularity_threshold", "layers are gathered one by one, whole", REMOVE),
    Unsupported(f"{ZERO}module_granularity_threshold", "layers are gathered one by one, whole", REMOVE),
    Unsupported(f"{ZERO}leaf_module", "layers are gathered one by one, whole", REMOVE),
    Unsupported(f"{ZERO}round_robin_gradients", "weights would lie in another order than they are found in", REMOVE),
    Unsupported(f"{ZERO}parameter_alignment", "it has not been tried", REMOVE),
    Unsupported(f"{ZERO}pipeline_loading_checkpoint", f"{_SAVES}, and read by all ranks at once", REMOVE),
    Unsupported(f"{ZERO}enable_sanity_checks", "it has not been tried", REMOVE),
    Unsupported(f"{ZERO}save_muon_momentum_buffer_in_memory", "AdamW alone runs under this engine", "engine=torch optim=muon"),
    Unsupported(f"{ZERO}zero_quantized_weights", _ROUNDED, REMOVE),
    Unsupported(f"{ZERO}zero_quantized_nontrainable_weights", _ROUNDED, REMOVE),
    Unsupported(f"{ZERO}zero_quantized_gradients", _ROUNDED, REMOVE),
    Unsupported(f"{ZERO}mics_shard_size", "DeepSpeed has given it up", "engine=torch parallel.replicate=..."),
    Unsupported(f"{ZERO}mics_hierarchical_params_gather", "DeepSpeed has given it up", "engine=torch parallel.replicate=..."),
    Unsupported(f"{ZERO}zeropp_loco_param", "DeepSpeed has given it up", REMOVE),
    Unsupported("aio", "nothing goes to NVMe under this engine", "engine=torch memory.offload_dir=DIR for activations"),
    Unsupported("activation_checkpointing", _POLICY, "memory=recompute, memory=alst or memory=auto"),
    Unsupported("sparse_attention", "attention is exact", REMOVE),
    Unsupported("sparse_gradients", _SUMS, REMOVE),
    Unsupported("sequence_parallel_size", _LAYOUT, "parallel.sp_degree=..."),
    Unsupported("tensor_parallel", "ZeRO flattens the weights that it would cut", REMOVE),
    Unsupported("pipeline", _LAYOUT, "engine=torch parallel.pipeline.stages=..."),
    Unsupported("expert_parallel", _LAYOUT, "engine=torch parallel.experts.ep=..."),
    Unsupported("use_data_before_expert_parallelism", _LAYOUT, "engine=torch parallel.experts.ep=..."),
    Unsupported("mesh_param", _LAYOUT, "cluster.num_nodes=... cluster.ranks_per_node=..."),
    Unsupported("elasticity", "numbers of nodes are the launcher's", "launcher.nodes=2:4"),
    Unsupported("checkpoint", _SAVES, "checkpoint.every_steps=..., efflaunch import for DeepSpeed's own"),
    Unsupported("nebula", _SAVES, "checkpoint.every_steps=..."),
    Unsupported("datastates_ckpt", _SAVES, "checkpoint.every_steps=..., which is as asynchronous"),
    Unsupported("dataloader_drop_last", _DATA, REMOVE),
    Unsupported("data_efficiency", _DATA, "data.sources=..."),
    Unsupported("curriculum_learning", _DATA, "data.sources=..."),
    Unsupported("progressive_layer_drop", "every layer runs in every step", REMOVE),
    Unsupported("compression_training", "DeepSpeed has given it up", REMOVE),
    Unsupported("quantize_training", "DeepSpeed has given it up", "engine=torch adapter=qlora"),
    Unsupported("weight_quantization", "it is for inference", REMOVE),
    Unsupported("eigenvalue", "DeepSpeed has given it up", REMOVE),
    Unsupported("hybrid_engine", "nothing is generated in training here", REMOVE),
    Unsupported("compile", "compiled steps have not been tried under this engine", "engine=torch memory.compile=true"),
    Unsupported("graph_harvesting", "DeepSpeed has given it up", REMOVE),
    Unsupported("autotuning", "plans are solved before a run", "efflaunch plan"),
    Unsupported("flops_profiler", "work is counted by the plan", "efflaunch plan"),
    Unsupported("comms_logger", "it has not been tried", _PROFILE),
    Unsupported("timers", "times are in the metrics", _PROFILE),
    Unsupported("wall_clock_breakdown", "times are in the metrics", _PROFILE),
    Unsupported("memory_breakdown", "bytes are in the metrics", _PROFILE),
    Unsupported("dump_state", "run.yaml has the configuration", "efflaunch plan"),
    Unsupported("log_level", "ranks log as they do under each engine", REMOVE),
    Unsupported("disable_python_gc", "it has not been tried", REMOVE),
    Unsupported("vocabulary_size", "the model has it", REMOVE),
    Unsupported("csv_monitor", "metrics.jsonl is always written", "efflaunch report RUN_DIR"),
    Unsupported("comet", "there is no connection to it", "logging.wandb=online"),
    Unsupported("tensorboard.output_path", "they lie in the run directory", REMOVE),
    Unsupported("tensorboard.job_name", "run.id is the name of a run", "run.id=..."),
    Unsupported("wandb.project", "one project is set here", "logging.wandb_project=..."),
    Unsupported("wandb.group", "W&B is given a project alone", "logging.wandb_project=..."),
    Unsupported("wandb.team", "W&B is given a project alone", "logging.wandb_project=..."),
)
_ROWS: tuple[Row, ...] = (*PASSED, *AGREES, *FIXED, *UNSUPPORTED)
TABLE: Mapping[str, Row] = MappingProxyType({row.name: row for row in _ROWS})
"""Every key by its dotted name."""
