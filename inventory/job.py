"""The job file: which training runs, where, in which environment, and how it is launched.

What the training itself is told stands under ``trainer`` and is checked by the trainer's own config.
Nothing here launches anything or reaches a node.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, WithJsonSchema
from pydantic_core import PydanticCustomError

from inventory.base import NodeName, Spec, Strict
from inventory.cluster import Cluster
from inventory.errors import InventoryProblem, Problem, SchemaProblem
from inventory.loader import NAME, validated
from inventory.reader import Marked, Place, read_mapping
from inventory.sentences import nearest
from trainer.config import Config, ConfigError
from trainer.reader import check

VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
LAUNCHER_VARIABLES = {
    *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK", "CUDA_VISIBLE_DEVICES"),
}
PORTS = re.compile(r"([0-9]{1,5})-([0-9]{1,5})")


def _ports(value: Any) -> Any:
    found = PORTS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise PydanticCustomError("ports", "must be two ports such as 29500-29599")
    first, last = int(found[1]), int(found[2])
    if not 1024 <= first <= last <= 65535:
        raise ValueError(f"{value} is no range of ports: the first and the last are 1024 to 65535")
    return first, last


def _variable(name: str) -> str:
    if not VARIABLE.fullmatch(name):
        raise ValueError(f"{name!r} is no variable: use upper-case letters, digits and underscores")
    if name in LAUNCHER_VARIABLES or name.startswith("LOCKSTEP_"):
        raise ValueError(f"{name} is set by the launcher for each node: leave it out")
    return name


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"names {name} {names.count(name)} times")
    return names


PortRange = Annotated[
    tuple[int, int], BeforeValidator(_ports), WithJsonSchema({"type": "string"}, mode="validation")
]
"""First and last port, both included."""


class _JobFile(Strict):
    """What a job file says; see ``Job``."""

    name: NodeName | None = None
    nodes: Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_each_once)] | None = None
    environment: str | None = None
    launcher: Literal["torchrun"] = "torchrun"
    processes_per_node: Annotated[int, Field(ge=1)] | Literal["gpus"] = "gpus"
    port_range: PortRange = (29500, 29599)
    env: dict[
        Annotated[str, AfterValidator(_variable)], Annotated[str, BeforeValidator(_text)]
    ] = {}
    first_step_seconds: Annotated[int, Field(ge=1)] = 600
    autostart: bool = False
    trainer: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One training that is declared, checked as far as that needs no cluster.

    name: names the run directory and the units on the nodes; the file's stem when the file is silent.
    nodes: names, or None for all. environment: name, or None for the only one. See ``check_job``.
    processes_per_node: "gpus" means as many as the node has, and 1 on a node without.
    port_range: where the rendezvous port is chosen from, both ends included.
    env: variables on top of those that each node gets anyway.
    first_step_seconds: how long a launch waits for the first step.
    autostart: the head resumes it by itself once its nodes are back.
    trainer: the training itself, without ``output``, which the launcher sets.
    """

    path: Path
    name: str
    trainer: Config
    nodes: tuple[str, ...] | None = None
    environment: str | None = None
    launcher: Literal["torchrun"] = "torchrun"
    processes_per_node: int | Literal["gpus"] = "gpus"
    port_range: tuple[int, int] = (29500, 29599)
    env: Mapping[str, str] = field(default_factory=dict)
    first_step_seconds: int = 600
    autostart: bool = False
    source: Marked | None = field(default=None, repr=False, compare=False)

    def decisive(self) -> dict[str, Any]:
        """What decides the training, as JSON has it; how the launch goes (ports, patience) is left out.

        A trainer's setting that is spelt out with its default is the same as one that is left out.
        """
        return {
            "name": self.name,
            "nodes": None if self.nodes is None else list(self.nodes),
            "environment": self.environment,
            "processes_per_node": self.processes_per_node,
            "env": dict(self.env),
            "trainer": self.trainer.model_dump(
                mode="json", exclude={"output"}, exclude_defaults=True
            ),
        }

    def fingerprint(self) -> str:
        """sha256 of ``decisive()``, as 64 hexadecimal digits."""
        text = json.dumps(self.decisive(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def processes(self, gpus: int) -> int:
        """How many processes run on a node with that many GPUs."""
        return max(1, gpus) if self.processes_per_node == "gpus" else self.processes_per_node


ADAPTER = TypeAdapter(_JobFile)


def load_job(path: Path) -> Job:
    """The job that the file declares. Raises InventoryProblem with every problem found."""
    marked = read_mapping(path)
    problems: list[Problem] = []
    said: _JobFile | None = None
    config: Config | None = None
    try:
        said = validated(ADAPTER, marked, ())
    except InventoryProblem as problem:
        problems += problem.problems
    trainer = marked.values.get("trainer")
    if isinstance(trainer, dict):
        if "output" in trainer:
            sentence = "is set by the launcher: leave it out"
            problems.append(marked.problem(("trainer", "output"), sentence))
        values = {key: value for key, value in trainer.items() if key != "output"}
        try:
            config = check(values, source=str(path), prefix="trainer.")
        except ConfigError as error:
            problems += [
                marked.problem(marked.place(one.key), one.sentence) for one in error.problems
            ]
    name = said.name if said else None
    if said and name is None:
        name = path.stem
        problems += _stem_problems(name, marked)
    if problems or said is None or config is None or name is None:
        raise SchemaProblem(*problems)
    values = {key: getattr(said, key) for key in _JobFile.model_fields}
    return Job(
        **{**values, "path": path.absolute(), "name": name, "trainer": config, "source": marked}
    )


def _stem_problems(stem: str, marked: Marked) -> list[Problem]:
    try:
        NAME.validate_python(stem)
    except ValueError:
        sentence = f"is missing, and the file's own name {stem!r} cannot be a job's: give a name"
        return [marked.problem(("name",), sentence)]
    return []


def check_job(job: Job, cluster: Cluster) -> Job:
    """The job with its nodes (in rank order) and its environment filled in for this cluster.

    Raises SchemaProblem for nodes or an environment that the cluster file does not declare.
    """
    problems: list[Problem] = []

    def refuse(place: Place, sentence: str) -> None:
        if job.source is not None:
            problems.append(job.source.problem(place, sentence))
        else:
            problems.append(Problem(str(job.path), None, str(place[0]), sentence))

    for position, name in enumerate(job.nodes or ()):
        if name not in cluster.nodes:
            refuse(("nodes", position), _unknown("node", name, cluster.nodes))
    declared = _environments(cluster.sections.get("environments"))
    environment = job.environment
    if environment is None:
        if len(declared) == 1:
            environment = declared[0]
        elif declared:
            refuse(("environment",), f"is missing: name one of {', '.join(declared)}")
        else:
            refuse(
                ("environment",),
                "there is none to run in: declare one under environments in the cluster file",
            )
    elif environment not in declared:
        refuse(("environment",), _unknown("environment", environment, declared))
    if problems:
        raise SchemaProblem(*problems)
    chosen = tuple(name for name in cluster.nodes if job.nodes is None or name in job.nodes)
    return dataclasses.replace(job, nodes=chosen, environment=environment)


def _environments(section: Spec | None) -> list[str]:
    """A section that maps names to entries keeps them as pydantic's extra fields."""
    return list((section.model_extra or {}) if section else ())


def _unknown(what: str, name: str, valid: Iterable[str]) -> str:
    choices = list(valid)
    sentence = f"{name!r} is no {what} of the cluster file"
    if near := nearest(name, choices):
        return f"{sentence}; did you mean {near!r}?"
    return f"{sentence}, which declares {', '.join(choices) if choices else 'none'}"
