"""Tries an environment: imports modules, starts commands, and says what is wrong with them.

Sent to the nodes with the proof and run by the environment's interpreter under systemd, as a job is: the
standard library alone, from Python 3.8 on. Prints one line of JSON: "imports", pairs of a finding's id
and a sentence, "commands", sentences, and "nccl", the version that torch was built with, where it says one.

    python -m roles.environment.trial PREFIX IMPORTS COMMANDS
        IMPORTS, COMMANDS: JSON, names of modules and paths of commands
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

COMMAND_SECONDS = 200


def last_line(text: str) -> str:
    """What a program said last, in at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


class Started:
    """A command that runs with --help while this process goes on. Raises OSError where it cannot start."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.until = time.monotonic() + COMMAND_SECONDS
        self.complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [path, "--help"], stdin=quiet, stdout=quiet, stderr=self.complaints
        )

    def problem(self) -> str | None:
        """Wait for its end; what is wrong with it, if anything."""
        try:
            code = self.process.wait(max(0, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"{self.path} --help does not end within {COMMAND_SECONDS} s"
        self.complaints.seek(0)
        said = last_line(self.complaints.read().decode(errors="replace"))
        return f"{self.path} --help fails: {said or f'exit status {code}'}" if code else None


def start(paths: list[str]) -> tuple[list[Started], list[str]]:
    """Start the commands; and sentences about those that do not start."""
    started, problems = [], []
    for path in paths:
        try:
            started.append(Started(path))
        except OSError as error:
            problems.append(f"{path} does not start: {error.strerror}")
    return started, problems


def problems_of(started: list[Started]) -> list[str]:
    """What is wrong with the commands, once all have ended."""
    return [text for one in started if (text := one.problem())]


def import_problems(prefix: Path, names: list[str]) -> list[tuple[str, str]]:
    """Import each module; where it comes from must be the environment."""
    problems = []
    inside = [prefix.resolve(), Path(sys.base_prefix).resolve()]
    for name in names:
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # a module may even end the interpreter
            reason = f"{type(error).__name__}: {last_line(str(error))}"
            problems.append(("environment-import", f"import {name} in {prefix} fails: {reason}"))
            continue
        file = Path(getattr(module, "__file__", None) or prefix).resolve()
        if not any(one == file or one in file.parents for one in inside):
            sentence = f"{name} comes from {file} and not from {prefix}"
            problems.append(("environment-shadowed", sentence))
    return problems


def nccl_of_torch() -> str:
    """The version of NCCL inside an imported torch; empty where there is none."""
    # A build without NCCL lacks the function, or what it calls.
    with contextlib.suppress(Exception):
        return ".".join(map(str, sys.modules["torch"].cuda.nccl.version()))
    return ""


def main() -> None:
    """Start the commands, import meanwhile, answer, and end at once."""
    del sys.path[0]  # the folder of this module, which is no part of the environment
    os.chdir("/")
    # What a module prints when it is imported is no answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started, problems = start(json.loads(sys.argv[3]))
    found = {
        "imports": import_problems(Path(sys.argv[1]), json.loads(sys.argv[2])),
        "commands": problems + problems_of(started),
        "nccl": nccl_of_torch(),
    }
    answer.write(json.dumps(found) + "\n")
    answer.flush()
    os._exit(0)  # libraries that were imported may hang at a normal exit


if __name__ == "__main__":
    main()
