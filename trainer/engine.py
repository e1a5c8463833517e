"""DeepSpeed for this config: every setting resolved to a number, nothing left to ``auto``.

The learning rate is a function of the step here and not a DeepSpeed scheduler, so that a step
that fp16 skips does not shift the schedule and a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import Config, Schedule
from trainer.errors import TrainerError

BUCKET = 50_000_000
"""Elements that are reduced at a time in stages 1 and 2: 100 MB in 16 bit."""
SMALLEST_BUCKET = 2**20


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int) -> float:
    """The learning rate of the 0-based ``step`` of ``steps``.

    Rises linearly to ``peak`` in ``warmup_steps`` steps; the last step has exactly
    ``peak * final_ratio``.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    done = min(1.0, done)
    if schedule.decay == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    elif schedule.decay == "linear":
        left = 1.0 - done
    else:
        left = 1.0
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * left)


def settings(config: Config, world_size: int, hidden_size: int, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration as plain numbers.

    hidden_size: width of the model; stage 3 buckets follow it, as a weight matrix is its square.
    """
    square = hidden_size * hidden_size
    zero: dict[str, Any] = {"stage": config.zero}
    if config.zero in (1, 2):
        zero |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if config.zero == 3:
        zero |= {
            "overlap_comm": on_gpu,
            "reduce_bucket_size": max(square, SMALLEST_BUCKET),
            "stage3_prefetch_bucket_size": max(square * 9 // 10, SMALLEST_BUCKET),
            "stage3_param_persistence_threshold": 10 * hidden_size,
            "stage3_max_live_parameters": 10**9,
            "stage3_max_reuse_distance": 10**9,
        }
    found: dict[str, Any] = {
        "train_batch_size": (
            config.batch.micro_batch * config.batch.gradient_accumulation * world_size
        ),
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": config.batch.gradient_accumulation,
        "gradient_clipping": config.clip,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.optimizer.lr,
                "betas": list(config.optimizer.betas),
                "eps": config.optimizer.eps,
                "weight_decay": config.optimizer.weight_decay,
                # DeepSpeed's own Adam is compiled at the first start: a minute, a compiler on
                # every node, and a lock that a killed process leaves for ever.
                "torch_adam": True,
            },
        },
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        found["bf16"] = {"enabled": True}
    if config.precision == "fp16":
        found["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        }
    return found


def check_precision(config: Config) -> None:
    """Raise TrainerError if DeepSpeed cannot train in this precision on this device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    if config.precision == "fp16" and not device.is_fp16_supported():
        raise TrainerError(
            f"precision: fp16 is not supported by this {device.device_name()}: use bf16 or fp32"
        )
    if config.precision == "bf16" and not device.is_bf16_supported():
        raise TrainerError(
            f"precision: bf16 is not supported by this {device.device_name()}: use fp16 or fp32"
        )


def forbid_compiling() -> None:
    """Keep DeepSpeed from compiling its CPU collectives in every process group.

    They serve ranks on one node only, cost a minute on each, and hang for ever on the lock that a
    killed build left. With an empty table of usable operators it neither probes nor builds any.
    Must be called before the process group is handed to DeepSpeed.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def start(config: Config, model: Any, deepspeed_config: Mapping[str, Any]) -> Any:
    """The DeepSpeed engine around the model. All ranks must call it."""
    import deepspeed

    matrices = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [
        {"params": matrices, "weight_decay": config.optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[group for group in groups if group["params"]],
        config=dict(deepspeed_config),
        dist_init_required=False,
    )
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    """The learning rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def accumulated_norm(engine: Any, config: Config) -> float | None:
    """Norm of the gradient before an fp32 step without ZeRO, where DeepSpeed does not tell it.

    Must be called after the last backward pass of a step and before that step.
    """
    import torch

    if config.zero != 0 or config.precision != "fp32":
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None


def gradient_norm(engine: Any) -> float | None:
    """Norm of the last step's gradient over all parameters, before clipping; None if unknown."""
    value = engine.get_global_grad_norm()
    if value is None:
        return None
    norm = float(value)
    return norm if math.isfinite(norm) and norm >= 0 else None


def load(engine: Any, directory: Path) -> None:
    """Load weights and optimizer from a whole checkpoint. All ranks must call it.

    Raises TrainerError if this node does not see the files: DeepSpeed itself would go on from
    random weights without a word.
    """
    path, _ = engine.load_checkpoint(
        str(directory.parent), tag=directory.name, load_lr_scheduler_states=False
    )
    if path is None:
        raise TrainerError(f"{directory} could not be loaded: DeepSpeed found no checkpoint in it")


def save(engine: Any, directory: Path) -> None:
    """Write weights and optimizer into a checkpoint directory. All ranks must call it."""
    engine.save_checkpoint(
        str(directory.parent), tag=directory.name, client_state={}, save_latest=False
    )
