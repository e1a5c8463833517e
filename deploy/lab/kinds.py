"""The kinds of nodes, and the nodes that a lab has."""

from __future__ import annotations

from deploy.lab.container import Container
from deploy.lab.files import read_json
from deploy.lab.machine import Machine
from deploy.lab.node import MOST_NODES, Node
from deploy.lab.state import Kind, Paths, Record

CLASSES: dict[Kind, type[Node]] = {"container": Container, "vm": Machine}


def existing(paths: Paths, record: Record) -> list[Node]:
    """The lab's nodes, in the order of their numbers."""
    found = []
    for number in range(1, MOST_NODES + 1):
        value = read_json(paths.nodes / f"node{number}" / "node.json")
        if isinstance(value, dict) and isinstance(value.get("base"), str):
            found.append(CLASSES[record.kind](paths, record, number, value["base"]))
    return found
