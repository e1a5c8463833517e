"""Faults to rehearse: what breaks on a real cluster, injected into a lab's node with ordinary tools.

``ROLE.yaml`` beside this file maps slugs to faults; a fault's name is ``ROLE/SLUG``. Nothing that looks
at a node knows the lab: verify finds a fault as it would on any machine, and one run repairs it, once the
user has done what only he can.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from deploy.lab import kinds, lab
from deploy.lab.commands import last_line
from deploy.lab.errors import LabError
from deploy.lab.node import Node
from deploy.lab.state import FAMILIES, KINDS, Family, Kind, Paths
from inventory.base import Strict
from inventory.sentences import nearest

FOLDER = Path(__file__).parent
SECONDS = 550
"""Time limit of one fault's script; a machine unpacks a kernel for minutes."""

Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$")]
Script = Annotated[str, StringConstraints(min_length=1)]


def _families(of: Sequence[Kind]) -> tuple[Family, ...]:
    """Those that nodes of these kinds can be of."""
    has = {family for kind in of for family in kinds.CLASSES[kind].families}
    return tuple(family for family in FAMILIES if family in has)


class Fault(Strict):
    """One way to break a node.

    id: the finding that verify must show for it, of this role and of no other role.
    kind: the kinds of nodes on which it can be injected; a clock, a module or a limit of its own needs a machine.
    os: the families of nodes on which it can be; left out, all that those kinds have.
    node: any node, the head (the lab's node1) or a worker alone, or "all": it lies on all at once.
    shows: where verify names it: on the node itself, or on the others, which have what it serves.
    beside: slugs of faults of the same role that it does not hide on one node, nor they it.
    script: shell, run as root with ``sh -e`` on the node; one text, or one for each family.
    mend: shell for the same node: what its finding tells the user to do, where no run repairs it.
    """

    id: Id
    kind: tuple[Kind, ...] = KINDS
    os: tuple[Family, ...] = Field(
        default_factory=lambda values: _families(values.get("kind", KINDS))
    )
    node: Literal["any", "head", "worker", "all"] = "any"
    shows: Literal["itself", "others"] = "itself"
    beside: tuple[Slug, ...] = ()
    script: Script | dict[Family, Script] = Field(alias="break")
    mend: Script | None = None

    @model_validator(mode="after")
    def _scripts_of_its_families(self) -> Fault:
        if isinstance(self.script, dict) and set(self.script) != set(self.os):
            raise ValueError("break needs one script for each family under os, and no other")
        if not self.os or len(set(self.os)) != len(self.os):
            raise ValueError("os needs each of its families once")
        if lacking := set(self.os).difference(_families(self.kind)):
            raise ValueError(f"no node of its kinds is of the family {', '.join(sorted(lacking))}")
        if not self.kind or len(set(self.kind)) != len(self.kind):
            raise ValueError("kind needs each of its kinds once")
        return self

    def on(self, family: Family) -> str:
        """The script for a node of that family, one of ``os``."""
        return self.script if isinstance(self.script, str) else self.script[family]

    @property
    def least(self) -> Kind:
        """The kind of nodes that costs least of those on which it can be injected."""
        return next(kind for kind in KINDS if kind in self.kind)

    def fits(self, number: int) -> bool:
        """Whether it can be injected on the node of that number; 1 is the head."""
        return self.node in ("any", "all") or (self.node == "head") == (number == 1)


_FILE: TypeAdapter[dict[str, Fault]] = TypeAdapter(dict[Slug, Fault])


def read(folder: Path = FOLDER) -> dict[str, Fault]:
    """All faults by name, in the order of the files. Raises LabError for a file that is wrong."""
    found: dict[str, Fault] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            faults = _FILE.validate_python(yaml.safe_load(path.read_text()) or {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise LabError(f"{path}: no YAML: {' '.join(str(error).split())}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise LabError(f"{path}: {where}: {first['msg']}") from None
        found |= {f"{path.stem}/{slug}": fault for slug, fault in faults.items()}
    return found


def as_json(faults: Mapping[str, Fault]) -> list[dict[str, Any]]:
    """The stable form: name, families, kinds, id, and where it can be injected."""
    return [
        {
            "name": name,
            "os": list(fault.os),
            "kind": list(fault.kind),
            "id": fault.id,
            "node": fault.node,
        }
        for name, fault in faults.items()
    ]


def table(faults: Mapping[str, Fault]) -> str:
    """The faults for a person."""
    head = ("FAULT", "OS", "KIND", "NODE", "FINDING")
    rows = [
        head,
        *(
            (name, ", ".join(each.os), ", ".join(each.kind), each.node, each.id)
            for name, each in faults.items()
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        + "\n"
        for row in rows
    )


def inject(paths: Paths, node: str, name: str) -> Sequence[str]:
    """Break a running node of the lab; returns the names of the nodes that were broken.

    Raises LabError for an unknown fault or node, a node that is off or of another kind, and a script
    that failed.
    """
    fault = _known(read(), name)
    chosen = lab.find(paths, node)
    if not fault.fits(chosen.number):
        right = "node1, the head" if fault.node == "head" else "a node other than the head, node1"
        raise LabError(f"{name} cannot be injected on {node}: choose {right}")
    if chosen.kind not in fault.kind:
        raise LabError(
            f"{name} needs nodes of another kind, and {node} is a {chosen.kind}: bring a lab up with "
            f"`lab up --kind {fault.kind[0]}`"
        )
    there = [chosen]
    if fault.node == "all":
        there = kinds.existing(chosen.paths, chosen.record)
    for each in there:
        if each.boot_id() is None:
            raise LabError(f"{each.name} is off: run `lab start {each.name}`")
        if each.family not in fault.os:
            raise LabError(
                f"{name} is for nodes of the family {', '.join(fault.os)}, and {each.name} is {each.family}"
            )
    broken: list[str] = []
    for each in there:
        try:
            _script(name, each, fault.on(each.family))
        except LabError as error:
            if not broken:
                raise
            raise LabError(
                f"{error}; it lies on {', '.join(broken)} already, which `pyinfra inventory.py "
                "deploy/cluster.py` repairs"
            ) from None
        broken.append(each.name)
    return broken


def _known(faults: Mapping[str, Fault], name: str) -> Fault:
    if name in faults:
        return faults[name]
    near = nearest(name, faults)
    advice = f"did you mean {near!r}?" if near else "`lockstep lab faults` lists them"
    raise LabError(f"there is no fault {name!r}: {advice}")


def _script(name: str, node: Node, script: str) -> None:
    try:
        done = node.execute(["sh", "-ec", script], SECONDS)
    except subprocess.TimeoutExpired:
        raise LabError(
            f"{name} on {node.name}: its script did not end within {SECONDS} s"
        ) from None
    if done.returncode:
        reason = last_line(done.stderr or done.stdout, done.returncode)
        raise LabError(f"{name} could not be injected on {node.name}: {reason}")
