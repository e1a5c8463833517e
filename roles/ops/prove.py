"""Proves that compiled operators load without being compiled again, and optimizers compute what torch's does.

Sent to the nodes as text and run by the environment's interpreter. It works on a copy: nothing that it
does, and no lock of a killed one, reaches the operators themselves. Prints one line ``ID<TAB>what is wrong``
for each failed proof, and leaves the proof stamp that the everyday look compares; it says also what is wrong
with operators that failed, for these are compiled again.

    python prove.py FOLDER OP...
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STAMP = ".lockstep-ops.json"
PROOF = ".lockstep-ops-proof.json"
STEPS = 3
SIZE = 1027
"""Of the tensors: more than one vector register, and no multiple of one."""


def adam(make: Callable[[list[Any]], Any], device: str) -> str | None:
    """What is wrong with an implementation of AdamW, held against torch's; None when nothing is."""
    import torch

    generator = torch.Generator().manual_seed(1)
    start = torch.randn(SIZE, generator=generator)
    gradients = [torch.randn(SIZE, generator=generator) for _ in range(STEPS)]
    results = []
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    for one, where in ((make, device), (torch.optim.AdamW, "cpu")):
        parameter = torch.nn.Parameter(start.clone().to(where))
        optimizer = one([parameter], **settings)
        for gradient in gradients:
            parameter.grad = gradient.clone().to(where)
            optimizer.step()
        results.append(parameter.detach().cpu())
    worst = float((results[0] - results[1]).abs().max())
    return None if worst < 1e-5 else f"its result is off torch's by {worst:.3g}"


def cpu_adam() -> str | None:
    """DeepSpeedCPUAdam, the optimizer of ZeRO with offload."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return adam(DeepSpeedCPUAdam, "cpu")


def fused_adam() -> str | None:
    """FusedAdam, DeepSpeed's default optimizer."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.adam import FusedAdam

    return adam(FusedAdam, get_accelerator().current_device_name())


def shm_comm() -> str | None:
    """It loads, and knows the processor. No sum is tried: each leaves 66 MiB a rank in /dev/shm for good,
    and ranks that start at one moment may find the other's buffer half made."""
    from deepspeed.accelerator import get_accelerator

    op = get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    return None if op.vector_kernel_level() in (0, 1, 2) else "it does not know this processor"


PROOFS: dict[str, Callable[[], str | None]] = {
    "cpu_adam": cpu_adam,
    "fused_adam": fused_adam,
    "shm_comm": shm_comm,
}


def try_gpu() -> None:
    """Raise torch's own error where the node's GPUs cannot be used now: that proves nothing of operators,
    and DeepSpeed would go on without them. On a node without GPUs jobs, and this, have DS_ACCELERATOR=cpu."""
    import torch

    if torch.version.cuda and os.environ.get("DS_ACCELERATOR") != "cpu":
        torch.zeros(1, device="cuda")


def digests(folder: Path) -> dict[str, str]:
    """Path below the folder to the SHA-256 of each library."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*/*.so")
    }


def problems(copy: Path, ops: list[str]) -> Iterator[str]:
    """A sentence for each operator that fails."""
    before = digests(copy)
    for name in ops:
        try:
            wrong = PROOFS[name]()
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # a job has the GPU: that proves nothing
                raise
            lines = str(error).strip().splitlines() or [""]
            wrong = f"it does not load: {type(error).__name__}: {lines[0][:300]}"
        if wrong:
            yield f"{name}: {wrong}"
    after = digests(copy)
    for file in sorted(before):
        if after.get(file) != before[file]:
            yield f"{file} is compiled again when it is loaded"


def prove(folder: Path, ops: list[str]) -> list[str]:
    """Run the proofs and leave the stamp. Returns what failed; raises what proves nothing, without a stamp."""
    proof = folder / PROOF
    proof.unlink(
        missing_ok=True
    )  # first: an operator may kill this process, and its caller says so
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "ops"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("lock"))
        os.environ["TORCH_EXTENSIONS_DIR"] = str(copy)
        try_gpu()
        found = list(problems(copy, ops))
    stamp = (folder / STAMP).read_text().rstrip("\n")
    shown = {"stamp": hashlib.sha256(stamp.encode()).hexdigest()}
    fresh = proof.with_name(f"{PROOF}.new")
    fresh.write_text(json.dumps({"wrong": found[0]} if found else shown) + "\n")
    fresh.replace(proof)
    return found


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        failed = prove(Path(sys.argv[1]), sys.argv[2:])
    except Exception as error:
        failed = [f"{type(error).__name__}: {error}"]
    for sentence in failed:
        answer.write(f"ops-load\t{sys.argv[1]}: {sentence}\n")
    answer.flush()
    os._exit(0)  # libraries that were imported may hang at a normal exit
