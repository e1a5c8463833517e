"""A job file is checked whole, its trainer's config included; a job's fingerprint is what decides it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ConfigDict

from inventory.base import Spec, Strict
from inventory.cluster import Cluster, Node
from inventory.errors import InventoryProblem, SchemaProblem
from inventory.job import Job, check_job, load_job

TRAINER = """\
trainer:
  model: {directory: /shared/models/small}
  data:
    files: [/shared/text/a.txt]
    sequence_length: 128
  steps: 60
"""
GOOD = f"""\
name: first
nodes: [node2, node1]
environment: main
processes_per_node: 2
port_range: 30000-30010
env:
  NCCL_DEBUG: INFO
  OMP_NUM_THREADS: 4
first_step_seconds: 900
{TRAINER}"""


class Environment(Strict):
    archive: str = "a.tar"


class Environments(Spec):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Environment]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, name: str = "job.yaml") -> Job:
    Path(name).write_text(text)
    return load_job(Path(name))


def wrong(text: str, name: str = "job.yaml") -> list[str]:
    with pytest.raises(SchemaProblem) as caught:
        read(text, name)
    return str(caught.value).splitlines()


def cluster(*environments: str) -> Cluster:
    nodes = {
        name: Node(name=name, address=f"10.0.0.{number}")
        for number, name in enumerate(("node1", "node2", "node3"), 1)
    }
    section = Environments.model_validate({name: {} for name in environments})
    return Cluster("lab", Path("/lab.yaml"), nodes, sections={"environments": section})


def test_a_job_is_what_its_file_says(folder: Path) -> None:
    job = read(GOOD)
    assert job.path == folder / "job.yaml"
    assert (job.name, job.nodes, job.environment) == ("first", ("node2", "node1"), "main")
    assert (job.launcher, job.processes_per_node, job.port_range) == ("torchrun", 2, (30000, 30010))
    assert job.env == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}
    assert job.first_step_seconds == 900
    assert job.trainer.steps == 60
    assert job.trainer.output is None


def test_a_short_job_file_has_these_defaults() -> None:
    job = read(TRAINER, "my-job.yaml")
    assert (job.name, job.nodes, job.environment) == ("my-job", None, None)
    assert (job.processes_per_node, job.port_range) == ("gpus", (29500, 29599))
    assert (job.env, job.first_step_seconds) == ({}, 600)


@pytest.mark.parametrize(
    ("setting", "gpus", "processes"), [("gpus", 8, 8), ("gpus", 0, 1), ("3", 8, 3), ("3", 0, 3)]
)
def test_processes_follow_the_gpus_unless_the_file_gives_a_number(
    setting: str, gpus: int, processes: int
) -> None:
    assert read(f"processes_per_node: {setting}\n{TRAINER}").processes(gpus) == processes


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("nodse: [node1]", "nodse: unknown key; did you mean 'nodes'?"),
        ("launcher: slurm", "launcher: must be 'torchrun', not 'slurm'"),
        ("nodes: []", "nodes: must be a list that is not empty, not an empty list"),
        ("nodes: node1", "nodes: must be a list that is not empty, not 'node1'"),
        ("nodes: [node1, node2, node1]", "nodes: names node1 2 times"),
        ("nodes: [1]", "nodes[0]: must be text, not 1: put it in quotes"),
        (
            "processes_per_node: 0",
            "processes_per_node: must be a whole number of at least 1 or 'gpus', not 0",
        ),
        (
            "processes_per_node: gpu",
            "processes_per_node: must be a whole number of at least 1 or 'gpus', not 'gpu'; "
            "did you mean 'gpus'?",
        ),
        ("port_range: 29500", "port_range: must be two ports such as 29500-29599, not 29500"),
        (
            "port_range: 29599-29500",
            "port_range: 29599-29500 is no range of ports: "
            "the first and the last are 1024 to 65535",
        ),
        (
            "port_range: 80-90",
            "port_range: 80-90 is no range of ports: the first and the last are 1024 to 65535",
        ),
        (
            "port_range: 60000-70000",
            "port_range: 60000-70000 is no range of ports: "
            "the first and the last are 1024 to 65535",
        ),
        (
            "first_step_seconds: 0",
            "first_step_seconds: must be a whole number of at least 1, not 0",
        ),
        (
            "env: {nccl_debug: INFO}",
            "env.nccl_debug: 'nccl_debug' is no variable: "
            "use upper-case letters, digits and underscores",
        ),
        ("env: {A: 0.5}", "env.A: must be text, not 0.5: put it in quotes"),
        ("env: {A: true}", "env.A: must be text, not true: put it in quotes"),
        (
            "env: {MASTER_ADDR: 10.0.0.1}",
            "env.MASTER_ADDR: MASTER_ADDR is set by the launcher for each node: leave it out",
        ),
        (
            "env: {LOCKSTEP_ATTEMPT: 1}",
            "env.LOCKSTEP_ATTEMPT: "
            "LOCKSTEP_ATTEMPT is set by the launcher for each node: leave it out",
        ),
        ("name: 7", "name: must be text, not 7: put it in quotes"),
    ],
)
def test_a_wrong_setting_is_named_with_line_and_what_would_be_right(
    line: str, sentence: str
) -> None:
    assert wrong(f"# the job\n{line}\n{TRAINER}") == [f"job.yaml:2: {sentence}"]


def test_a_file_name_that_cannot_name_a_job_asks_for_a_name() -> None:
    assert wrong(TRAINER, "My Job.yaml") == [
        "My Job.yaml: name: is missing, and the file's own name 'My Job' cannot be a job's: "
        "give a name"
    ]


def test_a_job_without_a_training_is_none() -> None:
    assert wrong("name: a") == ["job.yaml: trainer: is missing"]
    assert wrong("name: a\ntrainer:") == ["job.yaml:2: trainer: must be a mapping, not nothing"]


def test_mistakes_in_the_training_have_the_line_of_the_job_file() -> None:
    text = (
        "name: a\ntrainer:\n  model: {directory: /m}\n  data:\n    files:\n      - /a\n      - 3\n"
        "    sequence_lenght: 128\n  steps: 1\n  output: /tmp/x\n"
    )
    lines = wrong(text)
    assert "job.yaml:10: trainer.output: is set by the launcher: leave it out" in lines
    assert (
        "job.yaml:8: trainer.data.sequence_lenght: unknown key; did you mean 'sequence_length'?"
        in (lines)
    )
    assert [line for line in lines if line.startswith("job.yaml:7: trainer.data.files[1]: ")]


def test_mistakes_of_the_launch_and_of_the_training_are_told_together() -> None:
    text = f"launcher: slurm\n{TRAINER.replace('60', '0')}\nname: A\n"
    assert [line.split(": ")[:2] for line in wrong(text)] == [
        ["job.yaml:1", "launcher"],
        ["job.yaml:7", "trainer.steps"],
        ["job.yaml:9", "name"],
    ]


# --- with a cluster ----------------------------------------------------------------------------


def test_a_checked_job_has_its_nodes_in_rank_order_and_its_environment() -> None:
    job = check_job(read(GOOD), cluster("main", "other"))
    assert (job.nodes, job.environment) == (("node1", "node2"), "main")


def test_a_job_that_names_nothing_gets_all_nodes_and_the_only_environment() -> None:
    job = check_job(read(TRAINER), cluster("main"))
    assert (job.nodes, job.environment) == (("node1", "node2", "node3"), "main")


@pytest.mark.parametrize(
    ("text", "environments", "sentences"),
    [
        (
            "nodes:\n  - node1\n  - nod2\nenvironment: mian\n",
            ("main", "other"),
            [
                "job.yaml:3: nodes[1]: 'nod2' is no node of the cluster file; "
                "did you mean 'node2'?",
                "job.yaml:4: environment: 'mian' is no environment of the cluster file; "
                "did you mean 'main'?",
            ],
        ),
        (
            "nodes: [zoe]\nenvironment: x\n",
            ("main",),
            [
                "job.yaml:1: nodes[0]: 'zoe' is no node of the cluster file, "
                "which declares node1, node2, node3",
                "job.yaml:2: environment: 'x' is no environment of the cluster file, "
                "which declares main",
            ],
        ),
        (
            "name: a\n",
            ("main", "other"),
            ["job.yaml: environment: is missing: name one of main, other"],
        ),
        (
            "name: a\n",
            (),
            [
                "job.yaml: environment: there is none to run in: "
                "declare one under environments in the cluster file"
            ],
        ),
    ],
)
def test_a_job_that_does_not_fit_the_cluster_is_told_with_its_lines(
    text: str, environments: tuple[str, ...], sentences: list[str]
) -> None:
    job = read(text + TRAINER)
    with pytest.raises(SchemaProblem) as caught:
        check_job(job, cluster(*environments))
    assert str(caught.value).splitlines() == sentences


# --- the fingerprint ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("name: first", "name: second"),
        ("[node2, node1]", "[node1]"),
        ("environment: main", "environment: other"),
        ("processes_per_node: 2", "processes_per_node: gpus"),
        ("NCCL_DEBUG: INFO", "NCCL_DEBUG: WARN"),
        ("steps: 60", "steps: 61"),
        ("a.txt", "b.txt"),
    ],
)
def test_what_decides_the_training_changes_the_fingerprint(old: str, new: str) -> None:
    assert read(GOOD).fingerprint() != read(GOOD.replace(old, new)).fingerprint()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("first_step_seconds: 900", "first_step_seconds: 30"),
        ("port_range: 30000-30010", "port_range: 40000-40010"),
        ("OMP_NUM_THREADS: 4", "OMP_NUM_THREADS: '4'"),
        ("  steps: 60", "  steps: 60\n  seed: 0\n  precision: bf16"),
        ("name: first", "# remark\nname:   first"),
    ],
)
def test_what_does_not_decide_the_training_leaves_the_fingerprint(old: str, new: str) -> None:
    text = GOOD.replace(old, new)
    assert text != GOOD
    assert read(GOOD).fingerprint() == read(text).fingerprint()


def test_settings_that_have_their_default_are_not_part_of_what_decides() -> None:
    """A later version may add a setting without taking every job for another one."""
    assert read(GOOD.replace("  steps: 60", "  steps: 60\n  seed: 0")).decisive()["trainer"] == {
        "model": {"directory": "/shared/models/small"},
        "data": {"files": ["/shared/text/a.txt"], "sequence_length": 128},
        "steps": 60,
    }


def test_the_fingerprint_is_64_hexadecimal_digits_of_plain_json() -> None:
    job = read(GOOD)
    assert len(job.fingerprint()) == 64
    assert int(job.fingerprint(), 16)
    assert yaml.safe_load(yaml.safe_dump(job.decisive())) == job.decisive()


# --- any file ----------------------------------------------------------------------------------

VALUES: list[Any] = [None, True, -1, 1e9, "", "x y", [], [1], {}, {"a": 1}, [[{}]]]


def mutated(value: Any, chance: random.Random) -> Any:
    """The same data with some values replaced, keys renamed or left out."""
    if chance.random() < 0.08:
        return chance.choice(VALUES)
    if isinstance(value, dict):
        return {
            ("x" if chance.random() < 0.05 else key): mutated(below, chance)
            for key, below in value.items()
            if chance.random() > 0.05
        }
    return value


@pytest.mark.parametrize("seed", range(3))
def test_no_job_file_however_broken_ends_in_anything_but_a_problem_with_a_sentence(
    seed: int,
) -> None:
    chance = random.Random(seed)
    wrongs = 0
    for _ in range(60):
        try:
            read(yaml.safe_dump(mutated(yaml.safe_load(GOOD), chance)))
        except InventoryProblem as problem:
            wrongs += 1
            for line in str(problem).splitlines():
                assert line.startswith(("job.yaml: ", "job.yaml:"))
    assert wrongs > 20
