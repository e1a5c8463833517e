"""Every symptom has its keys, and the sentences that the trainer really says lead to one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import trainer

SYMPTOMS: list[dict[str, Any]] = yaml.safe_load(
    (Path(trainer.__file__).parent / "symptoms.yaml").read_text(encoding="utf-8")
)


def found(line: str) -> list[str]:
    return [
        symptom["id"]
        for symptom in SYMPTOMS
        if any(re.search(pattern, line) for pattern in symptom["log"])
    ]


def test_every_symptom_is_whole_and_named_once() -> None:
    for symptom in SYMPTOMS:
        assert {"id", "title", "log", "confirm", "fix"} <= set(symptom), symptom["id"]
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", symptom["id"])
        assert all(
            isinstance(symptom[key], str) and symptom[key] for key in ("title", "confirm", "fix")
        )
    ids = [symptom["id"] for symptom in SYMPTOMS]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("line", "symptom"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "cuda-oom"),
        (
            "Current loss scale already at minimum - cannot decrease scale anymore.",
            "fp16-loss-scale-min",
        ),
        ("error: the loss is nan at step 12: nothing was saved since", "loss-not-finite"),
        ("data.files: no file at /shared/text/*.txt on n1; is the storage mounted", "data-missing"),
        ("/shared/a.txt cannot be read on n1: permission denied", "data-missing"),
        ("/shared/a.txt is not UTF-8 at byte 12: convert it", "data-damaged"),
        (
            "step-00000010 was written by 2 ranks and this job has 1: start it",
            "zero-resume-world-size",
        ),
        (
            "The checkpoint being loaded used a DP world size of 2 but the current world size is 1.",
            "zero-resume-world-size",
        ),
        ("waited 600 s without progress for rank 0 to prepare the data", "preprocess-timeout"),
        ("RuntimeError: PytorchStreamReader failed reading zip archive", "checkpoint-partial"),
        ("OSError: [Errno 28] No space left on device", "checkpoint-disk-full"),
        (
            "/shared/cache: the token cache cannot be written on node1: no space left on device",
            "checkpoint-disk-full",
        ),
        ("n1 should have 8 GPUs and torch 2.13.0 sees 0; nvidia-smi says: nothing", "gpu-not-seen"),
        ("torch.distributed.elastic: failed (exitcode: -9) local_rank: 0 (pid: 12)", "host-oom"),
        ("precision: fp16 is not supported by this cpu: use bf16 or fp32", "precision-unsupported"),
        ("stopped by SIGTERM; step 12 is in a checkpoint", "sigterm-preempt"),
    ],
)
def test_a_line_of_a_failure_leads_to_its_symptom_alone(line: str, symptom: str) -> None:
    assert found(line) == [symptom]


@pytest.mark.parametrize(
    "line",
    [
        "step 10/60 · loss 5.1234 · lr 3.00e-04 · 9000 tokens/s · 5 s left",
        "RuntimeError: CUDA out of memory. Tried to allocate more than 1EB memory",
        "[W socket.cpp:207] [c10d] The hostname of the client socket cannot be retrieved. err=-3",
        "Sending process 12 closing signal SIGTERM",
        "OSError: [Errno 28] No space left on device: '/dev/shm/nccl-abc'",
    ],
)
def test_normal_noise_and_after_effects_lead_to_none(line: str) -> None:
    assert found(line) == []
