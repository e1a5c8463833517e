"""One run to its marker: set up, fit, export.

It owns the loop; each piece's rules are in its module. A run directory
holds ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, ``export/`` and, when everything is
done and nothing else, ``complete.json``.
"""

from __future__ import annotations

import math
import time
from collections.abc import MutableMapping
from dataclasses import asdict
from typing import Any

from trainer import checkpoint, engine, export
from trainer.config import Config
from trainer.errors import StoppedError, TrainerError
from trainer.files import sync_files, write_json, writing
from trainer.metrics import Pace
from trainer.setup import Run, setup
from trainer.stop import StopRequest

SKIPS = 3
"""Steps in a row that DeepSpeed may leave out for a gradient that is not finite. fp16 does so while
it looks for its loss scale, and has an end of its own; with the others the training is dead."""


def main(config: Config, stop: StopRequest, environ: MutableMapping[str, str]) -> None:
    """Train until the run is complete; returns when it is. Raises StoppedError on request."""
    run = setup(config, stop, environ)
    if run is None:
        return
    fit(run)
    finish(run)
    run.store.leave(seconds=60)


# --- fit -------------------------------------------------------------------------------------


def fit(run: Run) -> None:
    """Train to the last step, with records and checkpoints on the way.

    Raises StoppedError after a checkpoint when any rank was told to stop, and TrainerError when
    the loss or the gradient stops being finite.
    """
    config, progress = run.config, run.progress
    run.stop.at_step_end = True
    first_step = progress.step + 1
    skipped = 0
    pace = Pace(run.plan.global_batch * config.data.sequence_length)
    while progress.step < run.plan.steps:
        rate = engine.learning_rate(
            config.schedule, config.optimizer.lr, progress.step, run.plan.steps
        )
        with pace:
            loss, norm, stop = _step(run, rate)
        skipped = 0 if run.engine.was_step_applied() else skipped + 1
        if skipped == SKIPS and config.precision != "fp16":
            raise TrainerError(
                f"the gradient is not finite in {SKIPS} steps in a row, the last is "
                f"{progress.step}: lower optimizer.lr or lengthen schedule.warmup_steps, then start "
                "again to resume"
            )
        validation = _validate(run) if _validates(run) else None
        if validation is not None or _records(run, first_step):
            record: dict[str, Any] = {
                "step": progress.step,
                "loss": loss,
                "lr": rate,
                "tokens_per_s": pace.tokens_per_s(),
                "eta_s": pace.left(run.plan.steps - progress.step),
                "grad_norm": norm,
                "skipped_steps": run.engine.skipped_steps,
                "consumed_samples": progress.consumed,
                "attempt": run.here.attempt,
                "world_size": run.here.world_size,
                "time": time.time(),
            }
            if validation is not None:
                record["validation_loss"] = validation
            if progress.step == first_step:
                record["hosts"] = run.hosts
            _report(run, record)
        if stop or progress.step == run.plan.steps or progress.step % config.checkpoint.every == 0:
            save(run)
        if stop:
            raise StoppedError(f"stopped by SIGTERM; step {progress.step} is in a checkpoint")
    run.stop.at_step_end = False
    if run.stop.requested:  # since the last step asked all ranks
        raise StoppedError(f"stopped by SIGTERM; step {progress.step} is in a checkpoint")


def _step(run: Run, rate: float) -> tuple[float, float | None, bool]:
    """One optimizer step: its loss, its gradient norm, and whether any rank was told to stop.

    The loss is the mean over all ranks and micro-batches, taken before the update.
    """
    import torch
    import torch.distributed as dist

    config, progress = run.config, run.progress
    micro, passes = config.batch.micro_batch, config.batch.gradient_accumulation
    engine.set_learning_rate(run.engine, rate)
    # float64: the mean of equal losses must be that loss, in any order of the ranks.
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    norm = None
    for turn in range(passes):
        before = progress.consumed + (turn * run.here.world_size + run.here.rank) * micro
        ids = torch.from_numpy(run.plan.sequences.batch(before, micro)).to(run.device)
        loss = run.engine(input_ids=ids, labels=ids, use_cache=False).loss
        run.engine.backward(loss)
        total += loss.detach()
        if turn == passes - 1:
            norm = engine.accumulated_norm(run.engine, config)
        run.engine.step()
    if norm is None:
        norm = engine.gradient_norm(run.engine)
    agreed = torch.stack([total, torch.full_like(total, float(run.stop.requested))])
    dist.all_reduce(agreed)
    summed, stops = agreed.tolist()
    mean = summed / (passes * run.here.world_size)
    progress.step += 1
    progress.consumed += run.plan.global_batch
    if not math.isfinite(mean):
        raise TrainerError(
            f"the loss is {mean} at step {progress.step}: nothing was saved since; resume with a "
            "lower optimizer.lr or a longer schedule.warmup_steps, and with bf16 if the GPUs can"
        )
    if progress.first_loss is None:
        progress.first_loss = mean
    progress.last_loss = mean
    return mean, norm, stops > 0


def _records(run: Run, first_step: int) -> bool:
    step = run.progress.step
    return step in (first_step, run.plan.steps) or step % run.config.log_every == 0


def _validates(run: Run) -> bool:
    validation = run.config.data.validation
    if validation is None:
        return False
    return run.progress.step % validation.every == 0 or run.progress.step == run.plan.steps


def _validate(run: Run) -> float:
    """The mean loss over held-out sequences; all ranks must call it."""
    import torch
    import torch.distributed as dist

    micro = run.config.batch.micro_batch
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    run.engine.eval()
    with torch.no_grad():
        for turn in range(run.plan.validation_batches):
            first = (turn * run.here.world_size + run.here.rank) * micro
            ids = torch.from_numpy(run.plan.sequences.held_out(first, micro)).to(run.device)
            total += run.engine(input_ids=ids, labels=ids, use_cache=False).loss
    run.engine.train()
    dist.all_reduce(total)
    return float(total) / (run.plan.validation_batches * run.here.world_size)


def _report(run: Run, record: dict[str, Any]) -> None:
    if run.metrics is None:
        return
    run.metrics.append(record)
    words = [
        f"step {record['step']}/{run.plan.steps}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"{record['tokens_per_s']:.0f} tokens/s",
        f"{record['eta_s']:.0f} s left",
    ]
    if "validation_loss" in record:
        words.append(f"validation loss {record['validation_loss']:.4f}")
    print(" · ".join(words), flush=True)


def save(run: Run) -> None:
    """Write a checkpoint of the current step; all ranks must call it."""
    import torch.distributed as dist

    directory = checkpoint.root(run.config.run_directory) / checkpoint.name(run.progress.step)
    state = {
        "progress": asdict(run.progress) | {"wall_s": _wall(run)},
        "config": run.config.decisive(),
        "corpus": run.plan.sequences.corpus.digest,
    }
    with writing(directory):
        if run.first:
            checkpoint.clear_half(run.config.run_directory)
            directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        engine.save(run.engine, directory)
        checkpoint.save_random_state(directory, run.here.rank)
        if run.first:
            write_json(directory / checkpoint.STATE, state)
        dist.barrier()
        if run.here.local_rank == 0:
            sync_files(directory)
        dist.barrier()
        if run.first:
            checkpoint.mark(directory, run.progress.step, run.here.world_size, run.config)
            checkpoint.prune(run.config.run_directory, run.config.checkpoint.keep)
        dist.barrier()


def _wall(run: Run) -> float:
    return run.progress.wall_s + time.monotonic() - run.started


# --- export ----------------------------------------------------------------------------------


def finish(run: Run) -> None:
    """Export the model and write ``complete.json``; all ranks must call it."""
    import torch

    probe = run.plan.sequences.at(0)[: export.PROBE_TOKENS]
    ids = torch.from_numpy(probe).unsqueeze(0).to(run.device)
    expected = export.probe_loss(run.engine, ids)
    weights = export.gather(run.engine, run.config.zero, run.here.rank)
    if not run.first:
        # Not in a collective: reading back a large model may take longer than one may last.
        run.store.wait("complete", 4 * 3600, "rank 0 to write and check the exported model")
        return
    config, progress = run.config, run.progress
    corpus = run.plan.sequences.corpus
    export.write(run.engine.module, weights, corpus, config, ids, expected)
    with writing(config.run_directory / "complete.json"):
        write_json(
            config.run_directory / "complete.json",
            {
                "step": progress.step,
                "first_loss": progress.first_loss,
                "last_loss": progress.last_loss,
                "tokens": progress.consumed * config.data.sequence_length,
                "wall_s": _wall(run),
                "world_size": run.here.world_size,
                "attempt": run.here.attempt,
                "config_fingerprint": config.fingerprint(),
                "time": time.time(),
            },
        )
    print(f"complete: {config.run_directory / 'export'}", flush=True)
    run.store.tell("complete", True)
