"""The run's record in ``metrics.jsonl``: one JSON object a line, written by rank 0 alone.

What a record means is decided by the loop; here is only how the file stays true when an attempt
is lost (steps that the next attempt repeats are cut off before it writes its first record), and
how the pace of the steps is measured.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.files import write_text, writing


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a file; a torn or foreign line is skipped, a missing file is empty."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


class Metrics:
    """Append-only access to one run's records.

    path: ``RUN/metrics.jsonl``.
    resumed_step: the step of the checkpoint that this attempt begins from, 0 for none.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        kept = [record for record in records(path) if record["step"] <= resumed_step]
        text = "".join(_line(record) for record in kept)
        with writing(path):
            if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
                write_text(path, text)
            self._stream = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record, as one write, and flush it to where other nodes can read it."""
        with writing(self.path):
            self._stream.write(_line(record))
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class Pace:
    """How fast the steps of this attempt go; a context around each of them.

    tokens: of one step, over all ranks.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._steps, self._seconds = 0, 0.0
        self._begun = self._settled = time.monotonic()
        self._after_first = -1

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._steps, self._seconds = self._steps + 1, self._seconds + now - self._begun
        self._after_first += 1
        if self._after_first == 0:
            self._settled = now

    def tokens_per_s(self) -> float:
        """Tokens a second within the steps since the last call, saves and validations aside."""
        found = self._steps * self._tokens / max(self._seconds, 1e-9)
        self._steps, self._seconds = 0, 0.0
        return found

    def left(self, steps: int) -> float:
        """Seconds that so many further steps take, saves and validations included.

        The mean of this attempt without its first step, which is slow and no measure.
        """
        now = time.monotonic()
        if self._after_first < 1:
            return steps * (now - self._begun)
        return steps * (now - self._settled) / self._after_first


def _line(record: Mapping[str, Any]) -> str:
    # NaN and infinity are no JSON: a reader in another language would refuse the line.
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(clean, ensure_ascii=False, allow_nan=False) + "\n"
