"""Where the operators of an environment lie on a node, and how a process finds them."""

from __future__ import annotations

from collections.abc import Mapping

from inventory.cluster import Cluster, Node
from roles.core.steps import quote
from roles.environment.parcel import LOCAL
from roles.environment.spec import Declared, Environments, unit_variables

HOME = f"{LOCAL}/ops"


def folder(environment: str) -> str:
    """The extensions directory of one environment."""
    return f"{HOME}/{environment}"


def variables(cluster: Cluster, environment: str) -> Mapping[str, str]:
    """What lets torch find the operators; nothing where none are declared."""
    section = cluster.section("environments", Environments)
    if section is None or section.manage == "unmanaged":
        return {}
    declared = {one.name for one in section.each() if one.spec.ops}
    return {"TORCH_EXTENSIONS_DIR": folder(environment)} if environment in declared else {}


def python(one: Declared, node: Node) -> str:
    """The environment's interpreter as words of a shell, with what a job's unit has.

    The same PATH counts most: with another ninja everything would be compiled again.
    """
    words = (
        f"{key}={quote(value)}" for key, value in unit_variables(one.prefix, node.gpus).items()
    )
    return f"env -i {' '.join(words)} {quote(one.prefix)}/bin/python"
