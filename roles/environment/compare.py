"""How the environment of one node differs from that of another: the question, and the pure difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from roles.core.role import Unreadable
from roles.core.steps import quote
from roles.environment.converge import LOGIN, arriving
from roles.environment.spec import Declared, normal_name

MODULES = ("manifest.py", "trial.py", "prove.py", "describe.py")
Contents = Mapping[str, Mapping[str, str]]
"""Distribution to its files: path to content."""


def question(one: Declared, names: Sequence[str] = ()) -> str:
    """Shell that describes an environment; with names, the files of these distributions.

    Prints nothing where there is none.
    """
    python = f"{quote(one.prefix)}/bin/python"
    words = " ".join(map(quote, [one.prefix, *names]))
    return (
        f"if [ -x {python} ]; then\n{arriving(*MODULES)}"
        f"{LOGIN} {python} -m roles.environment.describe {words}\nfi\n"
    )


@dataclass(frozen=True)
class Summary:
    """One node's environment. distributions: normal name to version; digests: to that of its files."""

    interpreter: str
    archive: str
    distributions: Mapping[str, str]
    digests: Mapping[str, str]


def read_summary(text: str) -> Summary:
    """What ``question`` printed. Raises Unreadable for anything else."""
    values = _values(text)
    try:
        return Summary(**values)
    except TypeError:
        raise Unreadable("the answer is no description of an environment") from None


def read_contents(text: str) -> Contents:
    """What ``question`` with names printed. Raises Unreadable for anything else."""
    return _values(text)


def _values(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError:
        raise Unreadable("the answer is cut off") from None
    if not isinstance(values, dict):
        raise Unreadable("the answer is no description of an environment")
    return values


def in_question(summaries: tuple[Summary, Summary]) -> list[str]:
    """Distributions that both nodes have at one version, with other files."""
    one, other = summaries
    names = {*one.digests, *other.digests}
    return sorted(
        name
        for name in names
        if one.digests.get(name) != other.digests.get(name)
        and one.distributions.get(name) == other.distributions.get(name)
    )


@dataclass(frozen=True)
class Changed:
    """A value that is not the same: of the first node and of the second; None where it has none."""

    what: str
    values: tuple[str | None, str | None]


@dataclass(frozen=True)
class Difference:
    """What is not the same on two nodes.

    general: the interpreter and the archive. distributions: by version, or only on one node. pins: of
    these, name to the declared version. files: of distributions that are the same by their version,
    each path with its content ("f" or "x" and a hash, "l" and where a link leads).
    """

    nodes: tuple[str, str]
    environment: str
    general: Sequence[Changed]
    distributions: Sequence[Changed]
    pins: Mapping[str, str]
    files: Mapping[str, Sequence[Changed]]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.general or self.distributions or self.files)

    def as_json(self) -> dict[str, Any]:
        """The stable form: values by node name; null where a node has none."""

        def values(changes: Sequence[Changed]) -> dict[str, Any]:
            return {each.what: dict(zip(self.nodes, each.values, strict=True)) for each in changes}

        return {
            "environment": self.environment,
            "nodes": list(self.nodes),
            "same": self.same,
            "general": values(self.general),
            "distributions": values(self.distributions),
            "pins": dict(self.pins),
            "files": {name: values(changes) for name, changes in self.files.items()},
        }


def difference(
    nodes: tuple[str, str],
    one: Declared,
    summaries: tuple[Summary, Summary],
    contents: tuple[Contents, Contents],
) -> Difference:
    """Compare. contents: the files of the distributions that are ``in_question``."""
    first, second = summaries
    general = {
        "interpreter": (first.interpreter, second.interpreter),
        "archive": (first.archive, second.archive),
    }
    distributions = _changed(first.distributions, second.distributions)
    wanted = {normal_name(name): version for name, version in one.spec.pins.items()}
    return Difference(
        nodes,
        one.name,
        [Changed(what, pair) for what, pair in general.items() if pair[0] != pair[1]],
        distributions,
        {each.what: wanted[each.what] for each in distributions if each.what in wanted},
        {
            name: _changed(contents[0].get(name, {}), contents[1].get(name, {}))
            for name in in_question(summaries)
        },
    )


def _changed(one: Mapping[str, str], other: Mapping[str, str]) -> list[Changed]:
    return [
        Changed(name, (one.get(name), other.get(name)))
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]
