"""One rank of bare torch elastic: `python -m torch.distributed.run ... -m efflaunch.bench.bare_rank RUN_DIR`.

Plain Hugging Face model, FSDP2 and AdamW on random tokens, of the sizes in RUN_DIR/run.yaml; rank 0 writes the events that
bench/launch.py waits for. No checkpoints, no stops: what a launcher adds is measured against this.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(run_dir: Path) -> None:
    """Step until it is killed."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    from ..launcher.agent.signals import die_with_parent
    from ..launcher.rundir.run_dir import read_run
    from ..model.build import build_config
    from ..model.hf_fields import hf_config_dict

    die_with_parent(os.getppid())
    rank = int(os.environ["RANK"])
    (run_dir / f"rank-{rank}.pid").write_text(str(os.getpid()))
    config = read_run(run_dir).config
    dist.init_process_group("gloo")
    torch.manual_seed(config.train.seed)
    model = AutoModelForCausalLM.from_config(build_config(hf_config_dict(config.model)), dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    tokens = torch.randint(0, config.model.vocab_size or 2, (1, config.data.global_batch_tokens // dist.get_world_size()))
    _note(run_dir, rank, "start", 0)
    step = 0
    while True:
        step += 1
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _note(run_dir, rank, "step", step)


def _note(run_dir: Path, rank: int, event: str, step: int) -> None:
    if rank == 0:
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "step": step, "time": time.time()}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
