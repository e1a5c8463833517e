"""What a node holds of the environments' editable distributions."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.editables.source import SourceProblem, source_of
from roles.environment import parcel
from roles.environment.parcel import Parcel
from roles.environment.probe import DISTRIBUTIONS, archive_of
from roles.environment.spec import Declared, Environments, normal_name
from roles.pins.wheels import pip_wheel


@dataclass(frozen=True)
class Seen:
    """One environment. site: its site-packages, empty where there is none. folders: metadata in it.

    stamps: editable distribution to the text of its stamp. sources: lost source to whether this node
    has it, by distribution.
    """

    site: str = ""
    folders: frozenset[str] = frozenset()
    stamps: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class EditablesState:
    """environments: by name. parcels: places that hold pip or a packed source."""

    environments: Mapping[str, Seen]
    parcels: frozenset[str]


def declared(one: Declared) -> list[str]:
    """Normal names of the editable distributions that have a source."""
    return sorted(map(normal_name, one.spec.editable))


def probe(target: Target[Environments]) -> str:
    """Lines ``environment NAME``, ``editable NAME STAMP``, ``source NAME yes|no``, ``site PATH``,
    ``d FOLDER``, ``parcel PATH``; ``end`` is the last. An environment without editables costs nothing."""
    parts: list[str] = []
    parcels: list[Parcel] = []
    for one in target.spec.each():
        archive = archive_of(target.cluster, one)
        lost = archive.editables if archive else {}
        lost = {name: path for name, path in lost.items() if name not in declared(one)}
        if not lost and not one.spec.editable:
            continue
        parts.append(f"P={quote(one.prefix)}\nprintf 'environment %s\\n' {one.name}\n")
        for name, path in lost.items():
            parts.append(
                f's=no; if [ -e {quote(path)} ]; then s=yes; fi; echo "source {name} $s"\n'
            )
        if not one.spec.editable:
            continue
        for name in declared(one):
            parts.append(
                f'if [ -d "$P"/.lockstep-src/{name} ] && [ -f "$P"/.lockstep-src/.{name}.json ]; then\n'
                f'  IFS= read -r l <"$P"/.lockstep-src/.{name}.json; printf \'editable {name} %s\\n\' "$l"; fi\n'
            )
        parts.append(DISTRIBUTIONS)
        if archive:
            parcels.append(pip_wheel(archive.python))
        for name in one.spec.editable:
            with suppress(SourceProblem):  # a finding says so
                parcels.append(source_of(target.cluster, one, name).parcel)
    return "".join([*parts, parcel.probe(parcels, target.cluster), "echo end\n"])


@whole
def parse(text: str) -> EditablesState:
    """The state that ``probe`` printed."""
    environments: dict[str, dict[str, Any]] = {}
    parcels: set[str] = set()
    now: dict[str, Any] = {}
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        name, _, rest = value.partition(" ")
        if word == "environment":
            now = environments[value] = {"folders": set(), "stamps": {}, "sources": {}}
        elif word == "parcel":
            parcels.add(value)
        elif word == "site" and environments:
            now["site"] = value
        elif word == "d" and environments:
            now["folders"].add(value)
        elif word == "editable" and environments:
            now["stamps"][name] = rest
        elif word == "source" and environments and rest in ("yes", "no"):
            now["sources"][name] = rest == "yes"
        elif line:
            raise Unreadable(f"unexpected line {line!r}")
    return EditablesState(
        {
            name: Seen(**{**values, "folders": frozenset(values["folders"])})
            for name, values in environments.items()
        },
        frozenset(parcels),
    )
