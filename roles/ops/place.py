"""Where the operators of an environment lie on a node, and how a process finds them."""

from __future__ import annotations

from collections.abc import Mapping

from inventory.cluster import Cluster, Node
from roles.core.steps import quote
from roles.environment.parcel import LOCAL
from roles.environment.spec import Declared, Environments

HOME = f"{LOCAL}/ops"


def folder(environment: str) -> str:
    """The extensions directory of one environment."""
    return f"{HOME}/{environment}"


def path(prefix: str) -> str:
    """The PATH of whatever builds, proves or trains: another ninja would compile everything again."""
    return f"{prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def variables(cluster: Cluster, environment: str) -> Mapping[str, str]:
    """What lets torch find the operators; nothing where none are declared."""
    section = cluster.section("environments", Environments)
    if section is None or section.manage == "unmanaged":
        return {}
    declared = {one.name for one in section.each() if one.spec.ops}
    return {"TORCH_EXTENSIONS_DIR": folder(environment)} if environment in declared else {}


def python(one: Declared, node: Node) -> str:
    """The environment's interpreter as words of a shell, started as a job's unit starts it."""
    accelerator = "" if node.gpus else " DS_ACCELERATOR=cpu"
    return (
        f"env -i HOME=/root LANG=C.UTF-8 PATH={quote(path(one.prefix))}{accelerator} "
        f"{quote(one.prefix)}/bin/python"
    )
