"""The trainer as real processes: exact resume, orderly stops, honest evidence, a usable export.

Every run is one or two ranks on this machine over gloo; nothing here needs a GPU or a compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer.trainer_runs import PATIENCE, ROOT, Job
from trainer import export
from trainer.errors import StoppedError
from trainer.reader import load
from trainer.setup import Progress
from trainer.stop import StopRequest
from trainer.train import fit

Make = Callable[..., Job]


def kill(job: Job, rank: int) -> None:
    os.kill(job.processes[rank].pid, signal.SIGKILL)


def open_export(directory: Path) -> Any:
    """The exported model as a user loads it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", local_files_only=True, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model, AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    job: Make, stage: int, precision: str
) -> None:
    steps = 40  # enough that the kill lands before the end on a busy machine
    whole = job(zero=stage, precision=precision, steps=steps)
    whole.finish()

    broken = job(zero=stage, precision=precision, steps=steps)
    broken.start()
    broken.until_step(12)
    kill(broken, rank=1)
    codes = broken.wait()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1
    # The survivor lost a peer and does not claim to be the cause; the dead one left no word.
    survivor = broken.error(0)
    assert survivor is not None and survivor["kind"] == "peer", survivor
    assert broken.error(1) is None
    assert broken.complete() is None

    resumed_from = int(broken.checkpoints()[-1].removeprefix("step-"))
    assert 10 <= resumed_from < steps
    half = broken.run / "checkpoints" / "step-00000035"
    half.mkdir()
    (half / "state.json").write_text("{}")
    broken.finish(attempt=2)

    assert broken.losses() == whole.losses()
    records = broken.metrics()
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert [record["attempt"] for record in records] == [1] * resumed_from + [2] * (
        steps - resumed_from
    )
    host = os.uname().nodename
    assert [record["step"] for record in records if record.get("hosts") == [host, host]] == [
        1,
        resumed_from + 1,
    ]
    assert not half.exists()
    assert broken.checkpoints() == ["step-00000030", "step-00000040"]

    marker, expected = broken.complete(), whole.complete()
    assert marker is not None and expected is not None
    for key in ("step", "first_loss", "last_loss", "tokens"):
        assert marker[key] == expected[key]
    assert marker["tokens"] == steps * 2 * 2 * 2 * 32
    assert marker["last_loss"] < marker["first_loss"] - 1

    model, tokenizer = open_export(broken.run / "export")
    assert all(parameter.numel() for parameter in model.parameters())
    assert str(model.dtype) == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[precision]
    sentence = "两台机器一起训练 one model."
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # Nothing was compiled, for which there was no compiler either.
    assert list(broken.extensions.iterdir()) == []


def test_stages_agree_and_accumulation_equals_a_larger_batch(job: Make) -> None:
    losses: list[dict[int, float]] = []
    for stage, batch, recompute in (
        (0, {"micro_batch": 4, "gradient_accumulation": 1}, False),
        (1, {"micro_batch": 1, "gradient_accumulation": 4}, False),
        (2, {"micro_batch": 2, "gradient_accumulation": 2}, True),
    ):
        one = job(
            zero=stage, precision="fp32", steps=4, batch=batch, gradient_checkpointing=recompute
        )
        one.finish("model.config.attention_dropout=0.0")
        assert all(record["grad_norm"] > 0 for record in one.metrics())
        losses.append(one.losses())
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-4)


def test_sigterm_to_one_rank_stops_all_at_one_step_with_a_checkpoint(job: Make) -> None:
    one = job(steps=2000, log_every=1)
    one.start()
    one.until_step(3)
    os.kill(one.processes[1].pid, signal.SIGTERM)
    os.kill(one.processes[1].pid, signal.SIGTERM)
    assert one.wait() == [143, 143], one.log()
    errors = [one.error(0), one.error(1)]
    assert [error and error["kind"] for error in errors] == ["stopped", "stopped"]
    last = one.metrics()[-1]["step"]
    assert one.checkpoints()[-1] == f"step-{last:08d}"
    assert one.complete() is None

    # Another number of ranks is refused with both numbers, by every rank, and nothing is lost.
    one.start(ranks=1, attempt=2)
    assert one.wait() == [1]
    refused = one.error(0, attempt=2)
    assert refused is not None and refused["kind"] == "own"
    assert "was written by 2 ranks and this job has 1" in refused["error"]
    assert "Traceback" not in one.log(attempt=2)
    assert one.metrics()[-1]["step"] == last

    one.finish(f"steps={last + 2}", attempt=3)
    assert [record["step"] for record in one.metrics()] == list(range(1, last + 3))


def test_a_model_directory_is_trained_on_under_stage_3(job: Make) -> None:
    first = job(zero=3, precision="fp32", steps=30)
    first.finish(ranks=1)
    marker = first.complete()
    assert marker is not None
    export = first.run / "export"
    data = {
        "files": [str(path) for path in sorted(text_of(first).glob("*.txt"))],
        "sequence_length": 32,
        "cache": str(first.run / "cache"),
        "validation": {"share": 0.1, "every": 2, "sequences": 8},
    }
    second = job(
        model={"directory": str(export)},
        data=data,
        zero=3,
        precision="fp32",
        steps=3,
        optimizer={"lr": 1e-6},
    )
    second.finish()
    records = second.metrics()
    # It begins where the other one ended, and not at the loss of random weights.
    assert records[0]["loss"] < (marker["first_loss"] + marker["last_loss"]) / 2
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 3]
    before, _ = open_export(export)
    after, _ = open_export(second.run / "export")
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert old.shape == new.shape, name
        assert float((old - new).detach().abs().max()) < 1e-4, name


def text_of(job: Job) -> Path:
    import yaml

    return Path(yaml.safe_load(job.config.read_text(encoding="utf-8"))["data"]["files"][0])


def test_missing_data_is_rank_0_s_own_failure_and_a_peer_s_for_the_others(job: Make) -> None:
    one = job()
    one.start("data.files=[/nowhere/*.txt]")
    assert one.wait() == [1, 1]
    own, peer = one.error(0), one.error(1)
    assert own is not None and peer is not None
    assert own["kind"] == "own"
    assert own["error"].startswith("data.files: no file at /nowhere/*.txt on ")
    assert peer["kind"] == "peer"
    assert "Traceback" not in one.log()


def test_a_missing_gpu_fails_at_once_with_host_and_nvidia_smi(job: Make) -> None:
    import torch

    one = job()
    missing = str(torch.cuda.device_count() + 1)
    one.start(ranks=1, LOCKSTEP_GPUS=missing)
    assert one.wait() == [1]
    error = one.error(0)
    assert error is not None and error["kind"] == "own"
    assert error["error"].startswith(f"{os.uname().nodename} should have {missing} GPUs and torch ")
    assert error["error"].endswith("nvidia-smi says: it is not installed")
    assert not one.run.joinpath("metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (0, r"the loss is (nan|inf) at step \d+: nothing was saved since"),
        (2, r"the gradient is not finite in 3 steps in a row, the last is \d+: "),
    ],
)
def test_a_training_that_blew_up_ends_and_saves_nothing_of_it(
    job: Make, stage: int, words: str
) -> None:
    one = job(
        zero=stage,
        precision="fp32",
        optimizer={"lr": 1e30},
        clip=0,
        checkpoint={"every": 1, "keep": 1},
    )
    one.start(ranks=1)
    assert one.wait() == [1]
    error = one.error(0)
    assert error is not None and error["kind"] == "own"
    assert re.match(words, error["error"]), error["error"]
    last = one.metrics()[-1]["step"]
    assert one.checkpoints() == [f"step-{last:08d}"]
    assert all(record["loss"] is not None for record in one.metrics())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.config.model_type=lama", "model.config: transformers knows no model_type 'lama'"),
        ("model.config.hiden_size=64", "did you mean 'hidden_size'?"),
        ("model.config.num_attention_heads=5", "model.config: "),
    ],
)
def test_a_model_that_cannot_be_is_a_sentence(job: Make, override: str, words: str) -> None:
    one = job()
    one.start(override, ranks=1)
    assert one.wait()[0] in (1, 2)
    error = one.error(0)
    assert error is not None and words in error["error"], error
    assert "Traceback" not in one.log()


def test_torchrun_starts_it_and_a_complete_run_is_left_alone(job: Make) -> None:
    one = job(zero=3, steps=3)
    started = time.time()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2",
        "--master-addr", "127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0", "-m", "trainer", str(one.config),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=one.environ(1), timeout=PATIENCE)
    assert done.returncode == 0, one.log()
    marker = one.complete()
    assert marker is not None and marker["step"] == 3 and marker["time"] > started
    assert sorted(path.name for path in one.attempt(1).iterdir()) == [
        "rank-00000.log",
        "rank-00001.log",
    ]

    one.finish(attempt=2)
    assert one.complete() == marker
    assert "is complete already" in one.log(attempt=2)
    assert [record["attempt"] for record in one.metrics()] == [1, 1, 1]

    # The export is repeated from the last checkpoint alone, if only that was lost.
    shutil.rmtree(one.run / "export")
    (one.run / "complete.json").unlink()
    one.finish(attempt=3)
    again = one.complete()
    assert again is not None and again["last_loss"] == marker["last_loss"]
    open_export(one.run / "export")


@pytest.mark.parametrize(("stage", "precision"), [(2, "fp16"), (3, "bf16")])
def test_a_gpu_trains_resumes_and_exports_over_nccl(job: Make, stage: int, precision: str) -> None:
    import torch

    gpus = torch.cuda.device_count()
    if not gpus:
        pytest.skip("needs a GPU")
    one = job(zero=stage, precision=precision, steps=30)
    one.finish("steps=20", ranks=gpus, LOCKSTEP_GPUS=str(gpus))
    one.finish(ranks=gpus, attempt=2, LOCKSTEP_GPUS=str(gpus))
    losses = one.losses()
    assert len(losses) == 30
    assert losses[30] < losses[1] - 1
    open_export(one.run / "export")


def test_a_sigterm_after_the_last_step_still_stops_the_run(job: Make) -> None:
    stop = StopRequest()
    stop.requested = True
    run: Any = SimpleNamespace(
        config=load(job(steps=5).config),
        plan=SimpleNamespace(steps=5, global_batch=1),
        progress=Progress(step=5),
        stop=stop,
    )
    with pytest.raises(StoppedError, match="stopped by SIGTERM; step 5 is in a checkpoint"):
        fit(run)


def test_an_export_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.add(str(Path(f"/proc/self/fd/{handle}").readlink()))
    )
    monkeypatch.setattr(export, "verify", lambda *_: None)

    def save(directory: Path, state_dict: dict[str, Any]) -> None:
        directory.mkdir()
        for name in ("model.safetensors", "generation_config.json"):
            (directory / name).write_text("{}")

    (tmp_path / "cache/tokenizer").mkdir(parents=True)
    config: Any = SimpleNamespace(run_directory=tmp_path)
    corpus: Any = SimpleNamespace(tokenizer_directory=tmp_path / "cache/tokenizer")
    final = export.write(SimpleNamespace(save_pretrained=save), {}, corpus, config, None, 1.0)
    assert f"{tmp_path}/.export.building/model.safetensors" in synced
    assert (final / "model.safetensors").exists()
