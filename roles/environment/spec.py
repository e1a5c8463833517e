"""What a user may ask of the Python environments: which archives, where they live, what they must offer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, model_validator

from inventory.base import NODE_NAME, AbsolutePath, ControlPath, Spec, Strict, Version
from inventory.cluster import Cluster
from roles.storage.spec import shared_path, synced_at

HOME_OF_ENVIRONMENTS = "/opt/lockstep/envs"
SYSTEM_DIRECTORIES = re.compile(
    r"/(bin|boot|dev|etc|lib\w*|proc|run|sbin|sys|usr)(/.*)?|/(home|media|mnt|opt|root|srv|tmp|var)"
    r"|/var/(cache|lib|log|opt|spool|tmp)|/home/[^/]+|/opt/lockstep(/envs)?"
)
"""Never an environment's prefix: the prefix is renamed away as a whole when the environment changes."""

IMPORT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
COMMAND = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
PYTHON = re.compile(r"3\.[0-9]{1,2}")
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]*")


def normal_name(distribution: str) -> str:
    """A distribution's name as the package index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def of_metadata(folder: str) -> tuple[str, str]:
    """(normal name, version) of a metadata folder such as ``protobuf-3.20.1.dist-info``.

    Old tools write ``PyYAML-6.0-py3.11.egg-info``. The version is empty where the name has none.
    """
    stem = re.sub(r"(-py[0-9.]+)?\.egg-info$|\.dist-info$", "", folder)
    name, dash, version = stem.rpartition("-")
    if not dash:
        return normal_name(stem), ""
    return normal_name(name), version


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"{text!r} is no {what}")
        return text

    return AfterValidator(check)


def _prefix(text: str) -> str:
    if SYSTEM_DIRECTORIES.fullmatch(text):
        raise ValueError(
            f"{text} holds other things too: give the environment a directory of its own"
        )
    return text


def _index(text: str) -> str:
    if re.search(r"//[^/]*@", text):
        raise ValueError(
            "the index must not hold a password: put it in the nodes' own pip configuration"
        )
    if not re.fullmatch(r"(https?|file)://\S+", text):
        raise ValueError(f"{text!r} is no address of a package index")
    return text


def unit_variables(prefix: str, gpus: int) -> dict[str, str]:
    """What a job's unit has of its environment and of its node, whatever the job.

    gpus: of the node; DeepSpeed would look for some where there are none.
    """
    variables = {
        "PATH": f"{prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
    }
    return variables if gpus else {**variables, "DS_ACCELERATOR": "cpu"}


Operator = Literal["cpu_adam", "fused_adam", "shm_comm"]
"""Operators of DeepSpeed: the optimizer of ZeRO with offload, the default optimizer, and the sums
between the ranks of one node without GPUs."""


DistributionName = Annotated[str, _matching(DISTRIBUTION, "name of a distribution")]


class Environment(Strict):
    """One environment, the same on every node.

    One of these says what it is unpacked from, each a path on the control machine; an archive or a directory
    may lie on the shared storage instead, where the control machine need not see it:
    archive: tar of a venv or conda environment (plain, gz, bz2, xz or zst).
    directory: such an environment itself; it is packed when its files change.
    requirements: pip's list of exact versions with hashes; a venv is built of it, of ``wheels`` or from ``index``.
    conda: an environment.yml, of which conda, mamba or micromamba builds an environment.

    python: the version that ``requirements`` is for, major.minor.
    prefix: where it lives on the nodes; None means /opt/lockstep/envs/NAME.
    imports: modules that must import there.
    commands: programs of its ``bin`` that must run there; where none are given, also accelerate if it
        is in the environment.
    on_path: these commands in /usr/local/bin, so that a shell without activation finds them (never pip or
        python3, and python where the system has none, or where it is among the commands); None means yes
        for the only environment, no beside others.
    pins: distribution name to the exact version that replaces the archive's own.
    wheels: directory on the control machine with the wheels of the pins and of ``requirements``.
    index: address of the package index where there is no such directory.
    accept: distribution to what is known to be wrong with it and may stay: what it requires and has not in the
        right version, or the id of a finding about it (env-editable-stale, bnb-cpu).
    ops: DeepSpeed's operators that are compiled before any training starts.
    distribute: the way of the archive: once to the shared storage, from which all nodes read it, or to the
        first node and from each node to the next; None means shared where there is a shared storage. What the
        control machine does not see there, each node reads itself.
    keep: how many earlier trees stay beside the prefix; declaring the archive of one again puts it back.
    editable: distribution to its source, a folder on the control machine or what ``lockstep bundle`` packed
        of one, that replaces the archive's own.
    """

    archive: ControlPath | None = None
    directory: ControlPath | None = None
    requirements: ControlPath | None = None
    conda: ControlPath | None = None
    python: Annotated[Version, _matching(PYTHON, "version of Python such as '3.11'")] | None = None
    prefix: Annotated[AbsolutePath, AfterValidator(_prefix)] | None = None
    imports: list[Annotated[str, _matching(IMPORT, "module name")]] = [
        "torch",
        "deepspeed",
        "transformers",
    ]
    commands: list[Annotated[str, _matching(COMMAND, "name of a command")]] = [
        "torchrun",
        "deepspeed",
    ]
    on_path: bool | None = None
    pins: dict[DistributionName, Annotated[Version, _matching(VERSION, "version")]] = {}
    wheels: ControlPath | None = None
    index: Annotated[str, AfterValidator(_index)] | None = None
    accept: dict[DistributionName, list[DistributionName]] = {}
    ops: list[Operator] = []
    distribute: Literal["shared", "nodes"] | None = None
    keep: Literal[0, 1] = 1
    editable: dict[DistributionName, ControlPath] = {}

    @property
    def source(self) -> Path:
        """What the environment is unpacked from, packed or built of."""
        return next(path for path in self._sources() if path is not None)

    def _sources(self) -> list[Path | None]:
        return [self.archive, self.directory, self.requirements, self.conda]

    @model_validator(mode="after")
    def _one_source(self) -> Environment:
        if sum(path is not None for path in self._sources()) != 1:
            raise ValueError("give one of 'archive', 'directory', 'requirements' and 'conda'")
        if (self.python is None) != (self.requirements is None):
            raise ValueError("'requirements' and 'python' go together: write python: \"3.11\"")
        return self

    @model_validator(mode="after")
    def _no_contradictions(self) -> Environment:
        names = [normal_name(name) for name in self.pins]
        sources = [normal_name(name) for name in self.editable]
        for name in sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{name} is pinned twice, under two spellings")
        for name in sorted({name for name in self.ops if self.ops.count(name) > 1}):
            raise ValueError(f"ops has {name} twice")
        for name in sorted({name for name in sources if sources.count(name) > 1}):
            raise ValueError(f"{name} is editable twice, under two spellings")
        for name in sorted({*names} & {*sources}):
            raise ValueError(f"{name} is both pinned and editable: its source decides its version")
        if "torch" in sources:
            raise ValueError("torch comes with the archive and cannot be editable")
        if "torch" in names:
            raise ValueError(
                "torch comes with the archive and is not pinned: build the archive with it"
            )
        if self.pins and self.wheels is None and self.index is None:
            raise ValueError("pins need 'wheels' (a directory of wheels) or 'index'")
        if self.wheels is not None and self.index is not None:
            raise ValueError("give 'wheels' or 'index', not both")
        return self


@dataclass(frozen=True)
class Declared:
    """One environment with its name and everything that follows from it.

    linked: the commands that /usr/local/bin must lead to this environment.
    optional: commands of which the same holds where the environment has them.
    python: whether a plain ``python`` leads to it: always, or where the system has none, or (empty) never.
    """

    name: str
    spec: Environment
    prefix: str
    on_path: bool
    python: Literal["always", "else", ""] = ""

    @property
    def accepted(self) -> set[tuple[str, str]]:
        """(distribution, what may stay wrong with it), by normal names."""
        return {
            (normal_name(name), normal_name(each))
            for name, several in self.spec.accept.items()
            for each in several
        }

    def acceptance(self, distribution: str, what: str) -> str:
        """The line of the cluster file that accepts it."""
        return f"environments.{self.name}.accept: {{{distribution}: [{what}]}}"

    @property
    def linked(self) -> list[str]:
        """Never pip or python3: those names in /usr/local/bin would hide the system's own."""
        names = self.spec.commands if self.on_path else []
        return [name for name in names if not re.match(r"(python[0-9.]+|pip[0-9.]*)$", name)]

    @property
    def optional(self) -> list[str]:
        """Launchers that many environments have, and many have not."""
        return [] if "commands" in self.spec.model_fields_set else ["accelerate"]


def on_shared(cluster: Cluster, one: Declared) -> str | None:
    """Where the archive or the directory lies for the nodes, if it is on their shared storage and cannot be seen here."""
    shared = shared_path(cluster)
    if shared is None or (one.spec.archive is None and one.spec.directory is None):
        return None
    source = cluster.at_hand(one.spec.source)
    below = PurePosixPath(source).is_relative_to(shared)
    return str(source) if below and not os.access(source, os.F_OK) else None


class Environments(Spec):
    """The section ``environments``: a map from names to environments, beside the key ``manage``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Environment]

    @model_validator(mode="after")
    def _names(self) -> Environments:
        for name in self.__pydantic_extra__:
            if not NODE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no name of an environment: use lower-case letters, digits and hyphens"
                )
        return self

    def each(self) -> list[Declared]:
        """The environments in the order of the file."""
        only = len(self.__pydantic_extra__) == 1
        declared = [
            Declared(
                name,
                spec,
                spec.prefix or f"{HOME_OF_ENVIRONMENTS}/{name}",
                only if spec.on_path is None else spec.on_path,
            )
            for name, spec in self.__pydantic_extra__.items()
        ]
        named = [one for one in declared if "python" in one.linked]
        first = (named or [one for one in declared if one.on_path])[:1]
        way: Literal["always", "else"] = "always" if named else "else"
        return [replace(one, python=way) if one in first else one for one in declared]

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """Contradictions between environments, and with the shared storage."""
        shared = shared_path(cluster)
        before: list[Declared] = []
        for one in self.each():
            if shared and PurePosixPath(one.prefix).is_relative_to(shared):
                yield (
                    f"{one.name}.prefix",
                    f"{one.prefix} lies on the shared storage {shared}, where every node would unpack it: "
                    "choose a path on the nodes' own disks",
                )
            if synced := synced_at(cluster, one.prefix):
                yield (
                    f"{one.name}.prefix",
                    f"{one.prefix} overlaps {synced}, which storage.sync keeps the same: choose another path",
                )
            if one.spec.distribute == "shared" and not shared:
                yield (
                    f"{one.name}.distribute",
                    "there is no shared storage: declare storage, or say nodes, or leave it out",
                )
            if one.spec.distribute == "nodes" and (place := on_shared(cluster, one)):
                yield (
                    f"{one.name}.distribute",
                    f"this machine does not see {place}, which each node reads on the shared storage itself: "
                    "leave distribute out, or give what this machine has",
                )
            for other in before:
                paths = PurePosixPath(one.prefix), PurePosixPath(other.prefix)
                if paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0]):
                    yield (
                        f"{one.name}.prefix",
                        f"{one.prefix} overlaps the environment {other.name}",
                    )
                both = sorted(set(one.linked) & set(other.linked))
                if both:
                    yield (
                        f"{one.name}.on_path",
                        f"{', '.join(both)} on the PATH cannot lead to {other.name} and {one.name}: "
                        "set on_path: false for one of them",
                    )
            before.append(one)
