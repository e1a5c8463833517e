"""The control machine's own settings: what is built for nodes (``deploy/settings.yaml``), and where state lies.

``python -m inventory.settings torch`` (or ``packages``) prints what ``pip install`` gets, for scripts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, TypeAdapter, ValidationError

from inventory.base import Strict, Version
from inventory.errors import FileProblem, InventoryProblem, Problem, SchemaProblem
from inventory.reader import read_mapping
from inventory.sentences import problems_of

SETTINGS = Path(__file__).resolve().parent.parent / "deploy" / "settings.yaml"

PIN = re.compile(r"[0-9]+!?[0-9A-Za-z.]*(?:\+[0-9A-Za-z.]+)?")
DISTRIBUTION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONFIGURED = re.compile(r"^\S*\.(?:index-url|extra-index-url|find-links)=", re.MULTILINE)
INDEX = re.compile(r"(?:https?|file)://[^\s]+|/[^\s]*")


def _pin(text: str) -> str:
    if not PIN.fullmatch(text):
        raise ValueError(f"{text!r} is no version: write one such as '2.6.0' or '2.6.0+cu124'")
    return text


def _distribution(text: str) -> str:
    if not DISTRIBUTION.fullmatch(text):
        raise ValueError(f"{text!r} is no name of a Python distribution")
    return text


def _index(text: str) -> str:
    if not INDEX.fullmatch(text):
        raise ValueError("is no package index: give an address with https:// or an absolute path")
    return text


What = Literal["torch", "packages"]
Pin = Annotated[Version, AfterValidator(_pin)]
Index = Annotated[str, AfterValidator(_index)]


class Settings(Strict):
    """Which Python packages the nodes' environments are built of, and from where.

    torch: exact version. torch_index: index that has it; None: it is in ``index``.
    index: package index for all; None leaves pip to its own configuration.
    packages: distribution to exact version, all but torch.
    """

    torch: Pin
    torch_index: Index | None = None
    index: Index | None = None
    packages: dict[Annotated[str, AfterValidator(_distribution)], Pin] = {}

    def pip_arguments(self, what: What, pip_configuration: str = "") -> list[str]:
        """What ``pip install`` gets: torch alone first, then the packages, which must leave it alone.

        pip_configuration: the output of ``pip config list``. Where neither it nor this file names an
        index, torch comes from PyTorch's CPU index: PyPI's build brings gigabytes of CUDA.
        """
        torch = f"torch=={self.torch}"
        if what == "packages":
            pins = [f"{name}=={version}" for name, version in self.packages.items()]
            return [*_from(self.index), torch, *pins]
        index = self.torch_index or self.index
        if index is None and not CONFIGURED.search(pip_configuration):
            index = CPU_INDEX
        return [*_from(index), torch]


def _from(index: str | None) -> list[str]:
    return ["--index-url", index] if index else []


ADAPTER = TypeAdapter(Settings)

OVERRIDES = {
    "LOCKSTEP_TORCH": "torch",
    "LOCKSTEP_TORCH_INDEX": "torch_index",
    "LOCKSTEP_INDEX": "index",
}


def load_settings(path: Path = SETTINGS, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings file, with what the environment overrides. Raises InventoryProblem."""
    marked = read_mapping(path)
    try:
        settings = ADAPTER.validate_python(marked.values)
    except ValidationError as error:
        raise SchemaProblem(*problems_of(error, ADAPTER, marked, ())) from None
    problems: list[Problem] = []
    for variable, key in OVERRIDES.items():
        if not (given := environ.get(variable)):
            continue
        try:
            settings = ADAPTER.validate_python({**settings.model_dump(), key: given})
        except ValidationError as error:
            sentence = str(error.errors()[0].get("ctx", {}).get("error", "is wrong"))
            problems.append(Problem(variable, None, "", sentence))
    if problems:
        raise SchemaProblem(*problems)
    return settings


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the control machine keeps pinned host keys, caches and logs, absolute; it may not exist.

    LOCKSTEP_STATE, else XDG_STATE_HOME/lockstep, else ~/.local/state/lockstep.
    """
    if own := environ.get("LOCKSTEP_STATE"):
        return expanded(own).absolute()
    home = environ.get("XDG_STATE_HOME", "")
    # A relative XDG_STATE_HOME is to be ignored, says the XDG base directory specification.
    if home.startswith("/"):
        return Path(home) / "lockstep"
    return expanded("~/.local/state/lockstep")


def expanded(text: str) -> Path:
    """The path with ``~`` replaced. Raises FileProblem when there is no such home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise FileProblem(Problem(text, None, "", "there is no such home directory")) from None


def main(arguments: Sequence[str]) -> int:
    """Print pip's arguments, separated by spaces; none of them has a space of its own."""
    if len(arguments) != 1 or arguments[0] not in get_args(What):
        print("usage: python -m inventory.settings torch|packages", file=sys.stderr)
        return 2
    pip = [sys.executable, "-m", "pip", "config", "list"]
    configured = subprocess.run(pip, capture_output=True, text=True, check=False).stdout
    what: What = "torch" if arguments[0] == "torch" else "packages"
    try:
        print(*load_settings().pip_arguments(what, configured))
    except InventoryProblem as problem:
        print(problem, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
