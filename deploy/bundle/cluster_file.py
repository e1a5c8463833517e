"""The bundle's cluster file: the user's own, with what the bundle holds in place of sources and other paths."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.bundle.models import place
from roles.environment.spec import normal_name
from roles.storage.spec import ON_NODE

HEADER = (
    "# Written by 'lockstep bundle' from {name}; the next one writes it again. Paths of the bundle count from\n"
    "# this file's folder. Keys and passwords are not in the bundle: those paths are as they were.\n"
)


def rewritten(
    path: Path,
    values: Mapping[str, Any],
    files: Mapping[str, str],
    wheels: Collection[str],
    fetched: Mapping[str, str],
    job: bool,
) -> str:
    """The text. path, values: the user's file as it was read, and what it says.

    files: the archive in the bundle of each environment, but of those that lie on the shared storage.
    wheels: the environments for which it holds wheels.
    fetched: where each model and data set lies on the nodes. job: the job file lies beside as ``job.yaml``.
    """
    declared = copy.deepcopy(dict(values))
    folder = path.absolute().parent
    for ssh in (declared.get("ssh"), *((one or {}).get("ssh") for one in _nodes(declared))):
        _own_paths(ssh, folder)
    packages = {**(declared.get("packages") or {}), "bundle": "."}
    for key in ("local", "sources", "only"):
        packages.pop(key, None)
    declared["packages"] = packages
    for name, one in _environments(declared):
        for key in ("wheels", "index"):
            one.pop(key, None)
        if name in files:
            for key in ("directory", "requirements", "python", "conda"):
                one.pop(key, None)
            one["archive"] = files[name]
        if name in wheels:
            one["wheels"] = f"wheels/{name}"
        if one.get("editable"):
            one["editable"] = {each: packed_source(name, each) for each in one["editable"]}
    for one in ((declared.get("storage") or {}).get("sync") or {}).values():
        if not ON_NODE.fullmatch(one["from"]) and not one["from"].startswith(("/", "~")):
            one["from"] = str(folder / one["from"])
    for name, there in fetched.items():
        declared["fetch"][name] = {"directory": place(name), "path": there}
    if job:
        declared["job"] = "job.yaml"
    return HEADER.format(name=path.name) + yaml.safe_dump(
        declared, sort_keys=False, allow_unicode=True, width=100
    )


def packed_source(environment: str, distribution: str) -> str:
    """Where the bundle has the source of an editable distribution."""
    return f"sources/{environment}/{normal_name(distribution)}.tar"


def _nodes(declared: Mapping[str, Any]) -> list[Any]:
    return list(declared["nodes"].values())


def _environments(declared: Mapping[str, Any]) -> list[tuple[str, Any]]:
    section = declared.get("environments") or {}
    return [(name, one) for name, one in section.items() if name != "manage"]


def _own_paths(ssh: Any, folder: Path) -> None:
    """What counted from the user's file counts from nothing now."""
    if not isinstance(ssh, dict):
        return
    for where, key in ((ssh, "key"), (ssh, "known_hosts"), (ssh.get("sudo"), "password_file")):
        if not isinstance(where, dict):
            continue
        found = where.get(key)
        if isinstance(found, str) and not found.startswith(("/", "~")):
            where[key] = str(folder / found)
