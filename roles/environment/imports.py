"""Imports modules as a job of the environment does, and says what is wrong with them.

Sent to the nodes with the proof and run by the environment's interpreter under systemd: the standard
library alone, from Python 3.8 on. Prints one line of JSON: "problems", pairs of a finding's id and a
sentence, and "nccl", the version that torch was built with, where it says one.

    python -m roles.environment.imports PREFIX MODULE...
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path


def last_line(text: str) -> str:
    """What a program said last, in at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


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


if __name__ == "__main__":
    del sys.path[0]  # the folder of this module, which is no part of the environment
    os.chdir("/")
    # What a module prints when it is imported is no answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    problems = import_problems(Path(sys.argv[1]), sys.argv[2:])
    answer.write(json.dumps({"problems": problems, "nccl": nccl_of_torch()}) + "\n")
    answer.flush()
    os._exit(0)  # libraries that were imported may hang at a normal exit
