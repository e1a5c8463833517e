"""The finished model as a Hugging Face directory, opened again before it counts.

Under ZeRO stage 3 no rank holds a whole weight, so all ranks gather them together; rank 0 writes
beside the final name, loads what it wrote as a user would, compares its loss with that of the
trained model, and only then renames.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trainer import tokens
from trainer.config import Config
from trainer.corpus import Corpus
from trainer.errors import TrainerError
from trainer.files import sync_directory, sync_files, writing

PROBE_TOKENS = 256
"""Length of the text on which the trained and the reopened model must agree."""


def probe_loss(model: Any, ids: Any) -> float:
    """The loss of a model on a 1 × n batch of ids. Under stage 3 all ranks must call it."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    model.train(training)
    return loss


def gather(engine: Any, stage: int, rank: int) -> dict[str, Any]:
    """All weights whole, in CPU memory, on rank 0; empty on the others. All ranks must call it.

    After it, the engine must not be trained on: its parameters are partitioned anew.
    """
    import deepspeed

    module = engine.module
    if stage != 3:
        if rank != 0:
            return {}
        return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()
    parameters = dict(module.named_parameters())
    found: dict[str, Any] = {}
    if rank == 0:
        for name, tensor in module.state_dict().items():
            if name not in parameters and tensor.numel():
                found[name] = tensor.detach().cpu()
    for name, parameter in parameters.items():
        # A modifier rank makes DeepSpeed give the gathered memory back.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def write(
    model: Any, weights: dict[str, Any], corpus: Corpus, config: Config, ids: Any, expected: float
) -> Path:
    """Write, reopen, compare and rename; for rank 0. Returns the directory.

    model: the trained module, for its config only. ids, expected: the probe and its loss before.
    Raises TrainerError if what was written is not what was trained.
    """
    run = config.run_directory
    beside, final = run / ".export.building", run / "export"
    shutil.rmtree(beside, ignore_errors=True)
    with writing(f"{beside}: the model"):
        model.save_pretrained(beside, state_dict=weights)
        if not (beside / "generation_config.json").exists():
            from transformers import GenerationConfig

            GenerationConfig.from_model_config(model.config).save_pretrained(beside)
        tokens.copy(corpus.tokenizer_directory, beside)
        # The run is complete from here on: a power cut must not take the weights back.
        sync_files(beside)
    verify(beside, ids, expected, config)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    sync_directory(run)
    return final


def verify(directory: Path, ids: Any, expected: float, config: Config) -> None:
    """Open an exported directory as a user would and compare its loss. Raises TrainerError."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", local_files_only=True, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            first = sorted(str(key) for key in report[what])[0]
            raise TrainerError(
                f"{directory}: the exported model does not open whole: {len(report[what])} "
                f"{what.replace('_', ' ')}, first {first}"
            )
    found = probe_loss(model, ids.cpu())
    # 16-bit kernels of a GPU and of a CPU differ in the last bits; wrong weights differ in whole
    # units.
    allowed = (1e-3 if config.precision == "fp32" else 3e-2) * max(1.0, abs(expected))
    if not abs(found - expected) <= allowed:
        raise TrainerError(
            f"{directory}: the exported model's loss is {found:.4f} where the trained one's is "
            f"{expected:.4f}: the export is wrong and is not used"
        )
