"""What can be wrong with a file that a user wrote, each finding as one sentence with its place.

Three failures are told apart: the file cannot be had, it is no plain YAML mapping, or its values are
wrong. Nothing here reads a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One finding.

    file: as a user would type it. line: counted from 1; None when no line is to blame.
    key: the dotted path of the setting, such as ``nodes.node2.address``; empty for the whole file.
    sentence: what is wrong and what to do; it goes on after the key.
    """

    file: str
    line: int | None
    key: str
    sentence: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.sentence) if part)


class InventoryProblem(Exception):
    """All that is wrong with one file; ``str()`` gives a line for each problem, in file order."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line or 0))

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class FileProblem(InventoryProblem):
    """There is no such file, or it cannot be read."""


class SyntaxProblem(InventoryProblem):
    """The file is no YAML, or uses what is refused because YAML readers disagree about it."""


class SchemaProblem(InventoryProblem):
    """The file is a mapping, but keys or values in it are wrong or contradict each other."""


def shown(path: Path) -> str:
    """The path as a user in the current directory would type it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
