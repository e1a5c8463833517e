"""The section ``environments``: a map of names, checked against itself and the rest of the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory import loader
from inventory.cluster import Cluster, Node
from roles.environment.spec import Environment, Environments
from roles.storage.spec import StorageSpec


def environments(**entries: Any) -> Environments:
    return Environments.model_validate(entries)


def test_names_become_prefixes_and_the_only_environment_is_on_the_path() -> None:
    one = environments(llm={"archive": "llm.tar.zst"}, manage="check").each()[0]
    assert (one.name, one.prefix, one.on_path) == ("llm", "/opt/lockstep/envs/llm", True)
    assert one.linked == ["torchrun", "deepspeed"]


def test_the_example_shows_every_key() -> None:
    text = (Path(loader.__file__).parent / "example.yaml").read_text()
    section = text.partition("\nenvironments:\n")[2].partition("\n\n")[0]
    assert [key for key in Environment.model_fields if f" {key}: " not in section] == []


def test_beside_others_an_environment_is_on_the_path_only_when_asked() -> None:
    found = environments(a={"archive": "a.tar"}, b={"archive": "b.tar", "on_path": True}).each()
    assert [one.on_path for one in found] == [False, True]


def test_pip_and_python3_are_never_linked_over_the_systems() -> None:
    commands = ["python", "python3", "python3.11", "pip", "pip3", "torchrun", "pipx"]
    (one,) = environments(a={"archive": "a.tar", "commands": commands}).each()
    assert one.linked == ["python", "torchrun", "pipx"] and one.python == "always"


def test_a_plain_python_leads_to_one_environment_on_the_path() -> None:
    def ways(**entries: Any) -> list[str]:
        found = {name: {"archive": f"{name}.tar", **entry} for name, entry in entries.items()}
        return [one.python for one in environments(**found).each()]

    on, off = {"on_path": True, "commands": ["x"]}, {"on_path": False}
    other = {"on_path": True, "commands": ["python"]}
    assert ways(a={}) == ["else"] and ways(a=off) == [""] and ways(a={}, b={}) == ["", ""]
    assert ways(a=off, b=on, c={**on, "commands": ["y"]}) == ["", "else", ""]
    assert ways(a=on, b=other) == ["", "always"]


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({}, "give one of 'archive', 'directory', 'requirements' and 'conda'"),
        ({"archive": "a", "directory": "b"}, "give one of"),
        ({"archive": "a", "python": "3.11"}, "go together"),
        ({"requirements": "a.txt"}, "go together"),
        ({"requirements": "a.txt", "python": 3.1}, "must be quoted"),
        ({"requirements": "a.txt", "python": "3.11.2"}, "no version of Python"),
        ({"archive": "a", "prefix": "/opt"}, "directory of its own"),
        ({"archive": "a", "prefix": "/usr/local/env"}, "directory of its own"),
        ({"archive": "a", "prefix": "/home/liu"}, "directory of its own"),
        ({"archive": "a", "prefix": "relative"}, "no absolute path"),
        ({"archive": "a", "imports": ["os; rm"]}, "no module name"),
        ({"archive": "a", "commands": ["../x"]}, "no name of a command"),
        ({"archive": "a", "commands": ["-rf"]}, "no name of a command"),
        ({"archive": "a", "pins": {"protobuf": 3.2}, "wheels": "w"}, "must be quoted"),
        ({"archive": "a", "pins": {"protobuf": "3.20.1"}}, "need 'wheels'"),
        (
            {"archive": "a", "pins": {"Torch": "2.6.0"}, "wheels": "w"},
            "torch comes with the archive",
        ),
        ({"archive": "a", "pins": {"a_b": "1", "A-b": "1"}, "wheels": "w"}, "pinned twice"),
        ({"archive": "a", "wheels": "w", "index": "https://x/simple"}, "not both"),
        ({"archive": "a", "index": "https://me:secret@x/simple"}, "must not hold a password"),
        ({"archive": "a", "index": "x"}, "no address of a package index"),
        ({"archive": "a", "archiv": "b"}, "archiv"),
        (None, "valid dictionary"),
    ],
)
def test_what_cannot_be_meant_is_refused(entry: Any, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        environments(llm=entry)


@pytest.mark.parametrize("name", ["Llm", "a b", "-x", "a/b", "x_1"])
def test_a_name_that_a_path_or_shell_may_take_otherwise_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="no name of an environment"):
        environments(**{name: {"archive": "a.tar"}})


def cluster(section: Environments) -> Cluster:
    nodes = {"node1": Node(name="node1", address="10.0.0.1")}
    sections = {"environments": section, "storage": StorageSpec(kind="existing", path="/shared")}
    return Cluster("lab", Path("/etc/cluster/lab.yaml"), nodes, sections=sections)


def problems(**entries: Any) -> list[tuple[str, str]]:
    section = environments(**entries)
    return list(section.problems(cluster(section)))


@pytest.mark.parametrize("kind", ["archive", "directory"])
def test_what_only_the_nodes_see_cannot_go_from_node_to_node(kind: str) -> None:
    ((key, sentence),) = problems(a={kind: "/shared/nowhere/a", "distribute": "nodes"})
    assert key == "a.distribute"
    assert sentence.startswith("this machine does not see /shared/nowhere/a, which each node reads")
    assert not problems(
        a={kind: "/shared/nowhere/a"}, b={kind: "/b", "distribute": "nodes", "on_path": False}
    )


def test_environments_may_not_overlap_or_lie_on_the_shared_storage_or_share_a_command() -> None:
    assert problems(a={"archive": "a"}, b={"archive": "b"}) == []
    assert problems(a={"archive": "a", "prefix": "/shared/env"})[0][0] == "a.prefix"
    found = problems(
        a={"archive": "a", "prefix": "/data/e", "on_path": True},
        b={"archive": "b", "prefix": "/data/e/b", "on_path": True},
    )
    assert [key for key, _ in found] == ["b.prefix", "b.on_path"]


def test_an_environment_lies_apart_from_what_is_kept_the_same() -> None:
    section = environments(a={"archive": "a", "prefix": "/data/x/env"}, b={"archive": "b"})
    values = {"kind": "local", "path": "/data", "sync": {"x": {"from": "/x"}}}
    sections = {"environments": section, "storage": StorageSpec.model_validate(values)}
    declared = replace(cluster(section), sections=sections)
    two = {**declared.nodes, "node9": next(iter(declared.nodes.values()))}
    told = list(section.problems(replace(declared, nodes=two)))
    assert [key for key, _ in told] == ["a.prefix"] and "overlaps /data/x" in told[0][1]


def test_relative_paths_count_from_the_cluster_files_folder() -> None:
    section = environments(a={"archive": "a.tar"})
    for written, meant in (
        ("a.tar", "/etc/cluster/a.tar"),
        ("/x/a.tar", "/x/a.tar"),
        ("~/a.tar", str(Path.home() / "a.tar")),
        ("~no-such-user/a.tar", "/etc/cluster/~no-such-user/a.tar"),
    ):
        assert cluster(section).at_hand(Path(written)) == Path(meant)
