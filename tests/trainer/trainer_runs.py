"""Runs of the trainer as real processes on this machine: tiny model, tiny text, no GPU."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0
"""Seconds that any wait of a test may last."""

ENGLISH = """\
Two machines that train one model must agree on every step. Each of them reads its own part of the
text, each computes its own gradient, and before either may move on they exchange what they found.
If one is late the other waits; if one is gone the other must notice, say so, and end. A cluster is
therefore not faster than its slowest part, and not more reliable than its most careless one.

The engineer who looks after such machines learns to distrust silence. A cable that lost a pin, a
clock that drifts, a disk that fills while everybody sleeps: none of these writes a clear sentence
into a log. What is written there is the complaint of the innocent neighbour who waited in vain.
"""
CHINESE = """\
两台机器一起训练一个模型，每一步都必须保持一致。每台机器读取自己的那部分文本，计算自己的梯度，
然后交换结果，才能继续下一步。如果其中一台慢了，另一台就要等待；如果其中一台不在了，另一台必须
发现并且清楚地说明。集群的速度取决于最慢的部分，可靠性取决于最粗心的部分。
"""
WORDS = ["node", "rank", "step", "loss", "节点", "梯度", "训练", "checkpoint", "clock", "cable"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with about 40 kB of prose in two languages, and no line twice."""
    directory = tmp_path_factory.mktemp("text")
    for number in range(8):
        lines = [
            f"{number}.{line} {WORDS[(number * 7 + line) % 10]} {WORDS[(line * 3) % 10]} "
            f"{part[(line * 37) % 200 : (line * 37) % 200 + 60]}".replace("\n", " ")
            for line in range(40)
            for part in (ENGLISH, CHINESE)
        ]
        (directory / f"part-{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token cache for all runs."""
    return tmp_path_factory.mktemp("cache")


@dataclass
class Job:
    """One config, started as often as a test likes."""

    config: Path
    run: Path
    extensions: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *overrides: str, ranks: int = 2, attempt: int = 1, **environ: str) -> None:
        """Start the ranks of one attempt, as a launcher does on one node."""
        assert all(process.poll() is not None for process in self.processes)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.processes = []
        for rank in range(ranks):
            variables = self.environ(attempt) | {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "trainer", str(self.config), *overrides],
                    cwd=ROOT,
                    env=variables | environ,
                )
            )

    def environ(self, attempt: int) -> dict[str, str]:
        """The variables that every rank gets. PATH is empty: no compiler may be needed."""
        return {
            "HOME": str(self.extensions),
            "PATH": str(self.extensions),
            "TORCH_EXTENSIONS_DIR": str(self.extensions),
            "OMP_NUM_THREADS": "1",
            "LOCKSTEP_ATTEMPT": str(attempt),
            "LOCKSTEP_ATTEMPT_DIR": str(self.attempt(attempt)),
            "LOCKSTEP_GPUS": "0",
        }

    def wait(self) -> list[int]:
        """The exit codes of all ranks."""
        until = time.monotonic() + PATIENCE
        return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]

    def finish(self, *overrides: str, ranks: int = 2, attempt: int = 1, **environ: str) -> None:
        """Start an attempt and require that it completes."""
        self.start(*overrides, ranks=ranks, attempt=attempt, **environ)
        codes = self.wait()
        assert codes == [0] * ranks, self.log(attempt)

    def until_step(self, step: int) -> None:
        """Wait until a record of at least that step is there."""
        until = time.monotonic() + PATIENCE
        while not self.metrics() or self.metrics()[-1]["step"] < step:
            codes = [process.poll() for process in self.processes]
            assert codes.count(None) == len(codes), f"ended early with {codes}"
            assert time.monotonic() < until
            time.sleep(0.01)

    def attempt(self, number: int) -> Path:
        return self.run / "attempts" / str(number)

    def log(self, attempt: int = 1) -> str:
        return "\n".join(
            path.read_text(encoding="utf-8", errors="replace")
            for path in sorted(self.attempt(attempt).glob("*.log"))
        )

    def error(self, rank: int, attempt: int = 1) -> dict[str, Any] | None:
        path = self.attempt(attempt) / f"rank-{rank:05d}.error.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def metrics(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return []
        text = path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def losses(self) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in self.metrics()}

    def complete(self) -> dict[str, Any] | None:
        path = self.run / "complete.json"
        return json.loads(path.read_text()) if path.exists() else None

    def checkpoints(self) -> list[str]:
        return sorted(path.parent.name for path in self.run.glob("checkpoints/*/COMPLETE"))


@pytest.fixture
def job(tmp_path: Path, text: Path, cache: Path) -> Iterator[Callable[..., Job]]:
    """A function that makes jobs of a tiny Llama; what still runs at the end is killed."""
    made: list[Job] = []

    def make(**changes: Any) -> Job:
        number = len(made)
        run = tmp_path / f"run-{number}"
        extensions = tmp_path / "extensions"
        extensions.mkdir(exist_ok=True)
        values: dict[str, Any] = {
            "model": {
                "config": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "attention_dropout": 0.1,
                }
            },
            "data": {
                "files": [str(text)],
                "tokenizer": {"train": {"vocab_size": 400}},
                "sequence_length": 32,
                "cache": str(cache),
            },
            "optimizer": {"lr": 3e-3},
            "schedule": {"warmup_steps": 2},
            "batch": {"micro_batch": 2, "gradient_accumulation": 2},
            "steps": 20,
            "log_every": 1,
            "checkpoint": {"every": 10, "keep": 2},
            "output": str(run),
        }
        path = tmp_path / f"job-{number}.yaml"
        path.write_text(yaml.safe_dump(values | changes, allow_unicode=True), encoding="utf-8")
        made.append(Job(path, run, extensions))
        return made[-1]

    yield make
    for one in made:
        for process in one.processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait(10)
