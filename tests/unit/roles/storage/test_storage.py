"""storage: one directory for all nodes, never written where the mount is missing; a copy is found out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core import fstab
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.storage import depot, role, shared_path, shutdown
from roles.storage.converge import attempt, unmount
from roles.storage.mount import wanted
from roles.storage.probe import (
    SCRIPT,
    TOKEN_FILE,
    Line,
    Mark,
    Mount,
    StorageState,
    parse,
    probe,
    token_file,
    unescaped,
)
from roles.storage.proof import proof
from roles.storage.spec import StorageSpec, storage_path, synced_at

ROOT = Path(__file__).parents[4]
RECORDED = Path(__file__).parent / "recorded"
NAMES = ("node1", "node2", "node3")
NODES = {name: Node(name=name, address=f"10.77.164.1{n}") for n, name in enumerate(NAMES, 1)}
SPEC = StorageSpec(kind="existing", path="/shared")
CLUSTER = Cluster("lab164", Path("lab.yaml"), NODES, sections={"storage": SPEC})
TARGETS = {name: Target(CLUSTER, node, SPEC) for name, node in NODES.items()}
HEAD, WORKER = TARGETS["node1"], TARGETS["node2"]
MARK = Mark("5eed" * 8, "77", "1700000000")
TOKENS = {name: f"{number}" * 32 for number, name in enumerate(NAMES, 1)}
TOKENS_OF_TWO = {name: (TOKENS[name],) for name in NAMES[1:]}


def state(name: str, **changes: Any) -> StorageState:
    """A node that sees everybody's token on a storage mounted over NFS."""
    right = StorageState(
        access="yes",
        real="/shared",
        mount=Mount("/shared", "nfs4", "10.0.0.1:/srv", ("rw", "hard")),
        writable=True,
        free=50_000,
        inodes=1_000_000,
        mark=MARK,
        token=TOKENS[name],
        tokens={node: (token,) for node, token in TOKENS.items()},
    )
    return replace(right, **changes)


ALL = {name: state(name) for name in NAMES}


def findings(name: str, seen: StorageState, **peers: StorageState | None) -> list[Finding]:
    others = {**{node: other for node, other in ALL.items() if node != name}, **peers}
    return role.drift(TARGETS[name], seen, {node: one for node, one in others.items() if one})


def ids(name: str, seen: StorageState, **peers: StorageState | None) -> list[str]:
    return [found.id for found in findings(name, seen, **peers)]


def script(name: str, seen: StorageState, **peers: StorageState | None) -> str:
    found = [one for one in findings(name, seen, **peers) if one.repairable]
    others = {node: other for node, other in {**ALL, **peers}.items() if node != name and other}
    steps = role.converge(TARGETS[name], seen, others, found)
    return "\n".join(step.command for step in steps if isinstance(step, Shell))


@pytest.mark.parametrize("name", NAMES)
def test_nodes_that_share_one_directory_have_no_drift(name: str) -> None:
    assert ids(name, ALL[name]) == [] and script(name, ALL[name]) == ""


def test_the_recorded_lab_nodes_have_no_drift() -> None:
    seen = {
        name: parse((RECORDED / f"debian12-{name}.txt").read_text().rstrip("\n"))
        for name in NAMES[:2]
    }
    for name, other in (("node1", "node2"), ("node2", "node1")):
        assert role.drift(TARGETS[name], seen[name], {other: seen[other]}) == []
        assert role.drift(TARGETS[name], seen[name], {}) == []


@pytest.mark.parametrize(
    ("changes", "id"),
    [
        ({"access": "absent"}, "storage-missing"),
        ({"access": "stale"}, "nfs-stale-handle"),
        ({"access": "silent"}, "nfs-server-silent"),
        ({"access": "failed", "failure": "Permission denied"}, "nfs-refused"),
        ({"mount": Mount("/", "ext4", "/dev/sda1", ("rw",))}, "nfs-mount-wrong"),
        ({"mount": Mount("/data", "xfs", "/dev/sdb", ("rw",)), "real": "/data/shared"}, "nfs-mount-wrong"),
        ({"mount": Mount("/shared", "nfs4", "s:/x", ("ro", "hard"))}, "storage-read-only"),
        ({"mount": Mount("/shared", "ext4", "/dev/sdb", ("rw", "ro"))}, "storage-read-only"),
        ({"writable": False}, "nfs-root-squash"),
        ({"free": 1023}, "checkpoint-disk-full"),
        ({"inodes": 999}, "checkpoint-disk-full"),
    ],
)  # fmt: skip
def test_what_only_the_user_can_mend_is_told_and_nothing_is_written(
    changes: dict[str, Any], id: str
) -> None:
    seen = state("node2", **changes)
    found = findings("node2", seen)
    assert [one.id for one in found] == [id]
    assert not found[0].repairable and script("node2", seen) == ""


@pytest.mark.parametrize("name", ["node1", "node2"])
def test_an_empty_directory_in_place_of_the_mount_is_never_written(name: str) -> None:
    plain = state(
        name, mount=Mount("/", "ext4", "/dev/sda1", ("rw",)), mark=None, token=None, tokens={}
    )
    found = findings(name, plain, node1=None, node2=None, node3=None)
    assert [one.id for one in found] == ["nfs-mount-wrong"] and "mount it" in found[0].fix
    assert script(name, plain) == ""


@pytest.mark.parametrize(
    "mount",
    [
        Mount("/shared", "ext4", "/dev/vda", ("rw",)),
        Mount("/mnt", "nfs4", "s:/x", ("rw",)),
        Mount("/mnt", "lustre", "10@o2ib:/x", ("rw",)),
        Mount("/mnt", "fuse.juicefs", "JuiceFS:x", ("rw",)),
    ],
)
def test_a_mount_of_its_own_or_a_folder_in_a_shared_file_system_counts_as_mounted(
    mount: Mount,
) -> None:
    assert ids("node2", state("node2", mount=mount)) == []


def test_the_nfs_server_itself_may_use_the_plain_directory_that_it_exports() -> None:
    plain = Mount("/", "xfs", "/dev/sda1", ("rw",))
    assert ids("node1", state("node1", mount=plain, exported=True)) == []
    lost = state("node1", mount=plain, exported=True, mark=None, tokens={})
    assert ids("node1", lost, node2=None, node3=None) == ["storage-lost"]


def test_a_single_node_may_use_a_plain_directory() -> None:
    cluster = replace(CLUSTER, nodes={"node1": NODES["node1"]})
    own = {"node1": (TOKENS["node1"],)}
    disk = Mount("/", "ext4", "/dev/sda1", ("rw",))
    plain = state("node1", mount=disk, tokens=own, known=True)
    assert role.drift(Target(cluster, NODES["node1"], SPEC), plain, {}) == []
    before = replace(plain, tokens={})  # the cluster had another name
    found = role.drift(Target(cluster, NODES["node1"], SPEC), before, {})
    assert [one.id for one in found] == ["storage-token"]
    found = role.drift(Target(cluster, NODES["node1"], SPEC), replace(before, known=False), {})
    assert [one.id for one in found] == ["storage-lost"]
    fresh = replace(plain, mark=None, token=None, tokens={})
    found = role.drift(Target(cluster, NODES["node1"], SPEC), fresh, {})
    assert [one.id for one in found] == ["storage-mark", "storage-token"]


def test_the_head_marks_a_fresh_storage_and_the_workers_wait_for_it() -> None:
    fresh = {name: state(name, mark=None, token=None, tokens={}) for name in NAMES}
    assert ids("node1", fresh["node1"], node2=fresh["node2"], node3=fresh["node3"]) == [
        "storage-mark",
        "storage-token",
    ]
    assert ids("node2", fresh["node2"], node1=fresh["node1"], node3=fresh["node3"]) == [
        "storage-token"
    ]
    assert ids("node2", fresh["node2"], node1=None, node3=None) == []


def test_a_worker_leaves_no_token_while_the_heads_storage_is_unusable() -> None:
    fresh = state("node2", mark=None, token=None, tokens={})
    absent = StorageState("absent")
    assert ids("node2", fresh, node1=absent, node3=None) == []


def test_a_worker_writes_only_after_it_sees_the_heads_mark() -> None:
    steps = script("node2", state("node2", mark=None, token=None, tokens={}))
    assert steps.index("is not the directory that node1 sees") < steps.index(".lockstep/nodes")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"token": None}, "storage-token"),
        ({"tokens": {}}, "storage-token"),
        ({"tokens": {**{n: (t,) for n, t in TOKENS.items()}, "node2": ("f" * 32,)}}, "storage-token"),
        ({"open": (".lockstep",)}, "storage-modes"),
    ],
)  # fmt: skip
def test_own_marks_that_are_missing_are_written(changes: dict[str, Any], names: str) -> None:
    seen = state("node2", **changes)
    assert ids("node2", seen) == [names] and script("node2", seen)


def test_another_id_than_on_the_head_is_another_storage() -> None:
    other = state("node2", mark=replace(MARK, id="0" * 32))
    found = findings("node2", other)
    assert [one.id for one in found] == ["storage-different"]
    assert not found[0].repairable and "node1" in found[0].seen and script("node2", other) == ""


def test_a_copy_with_the_same_content_is_found_out() -> None:
    copied = state("node2", mark=replace(MARK, inode="12", changed="1700009999"))
    assert ids("node2", copied) == ["storage-different"]


def test_other_inode_numbers_or_a_remembered_time_alone_prove_nothing() -> None:
    assert ids("node2", state("node2", mark=replace(MARK, inode="12"))) == []
    assert ids("node2", state("node2", mark=replace(MARK, changed="1700009999"))) == []


def test_two_nodes_that_do_not_see_each_others_tokens_are_apart() -> None:
    mine = state("node2", tokens={"node2": (TOKENS["node2"],)})
    head = state("node1", tokens={"node1": (TOKENS["node1"],)})
    assert ids("node2", mine, node1=head) == ["storage-different"]


def test_a_token_that_was_written_a_moment_ago_is_no_difference() -> None:
    older_look = state("node2", tokens={"node2": (TOKENS["node2"],)})
    assert ids("node2", older_look) == []
    assert ids("node3", ALL["node3"], node2=state("node2", token="a" * 32)) == []


def test_the_node_that_deviates_from_the_head_is_named_and_the_others_are_not() -> None:
    other = state("node3", mark=replace(MARK, id="0" * 32))
    assert ids("node1", ALL["node1"], node3=other) == []
    assert ids("node2", ALL["node2"], node3=other) == []
    assert ids("node3", other) == ["storage-different"]


def test_a_head_that_does_not_see_what_the_workers_see_is_not_marked_anew() -> None:
    blind = state("node1", mark=None, tokens={})
    found = findings("node1", blind)
    assert [one.id for one in found] == ["storage-different"] and not found[0].repairable
    assert script("node1", blind) == ""


def test_a_worker_that_lost_sight_of_the_mark_looks_again_before_it_fails() -> None:
    found = findings("node2", state("node2", mark=None, tokens={}))
    assert [one.id for one in found] == ["storage-different", "storage-token"]
    assert all(one.repairable for one in found)


@pytest.mark.parametrize("name", NAMES)
def test_dead_peers_change_nothing(name: str) -> None:
    assert ids(name, ALL[name], node1=None, node2=None, node3=None) == []


def test_the_head_removes_what_a_removed_node_left_and_nothing_else() -> None:
    seen = state("node1", tokens={**ALL["node1"].tokens, "old": ("a" * 32, "b" * 32)})
    assert ids("node1", seen) == ["storage-token-left"]
    done = script("node1", seen)
    assert (
        f"rm -f -- .lockstep/nodes/lab164/old.{'a' * 32} .lockstep/nodes/lab164/old.{'b' * 32}"
        in done
    )
    assert "node1." not in done
    assert ids("node2", state("node2", tokens=seen.tokens)) == []


def test_a_full_disk_does_not_hide_that_a_token_is_missing() -> None:
    assert ids("node2", state("node2", free=0, token=None)) == [
        "checkpoint-disk-full",
        "storage-token",
    ]


def test_an_nfs_client_with_a_space_in_its_mount_point_is_read() -> None:
    seen = parse((RECORDED / "nfs-client.txt").read_text().rstrip("\n"))
    assert seen.mount is not None and seen.mount.point == "/mnt/my data"
    assert (seen.mount.source, seen.mount.kind) == ("192.168.20.14:/srv/ai", "nfs4")
    assert seen.free == 902144 and seen.mark is None and "hard" in seen.mount.options


def test_a_file_system_without_inode_limit_and_a_server_are_read() -> None:
    seen = parse((RECORDED / "nfs-server.txt").read_text().rstrip("\n"))
    assert seen.inodes is None and seen.exported and seen.token is None


def test_octal_codes_of_mountinfo_are_decoded_once() -> None:
    assert unescaped(r"/a\040b\011c\134040d") == "/a b\tc\\040d"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "token\naccess maybe\nend",
        "token \naccess yes\nreal /x\nend",
        "token \naccess yes\nreal /x\nmount x\nexported no\nwritable yes\nspace 1 1 1 1\nend",
        "token \naccess yes\nreal /x\nmount / a b rw\nexported no\nwritable yes\nspace 1 1 1\nend",
        "token \naccess absent\nseen node1\nend",
    ],
)
def test_garbage_is_unreadable_and_never_a_state(text: str) -> None:
    with pytest.raises((Unreadable, KeyError, ValueError, IndexError)):
        parse(text)


def test_a_token_that_is_no_token_counts_as_none() -> None:
    assert parse("token ../../etc\nmanager apt\nclient no\naccess absent\nend").token is None


@pytest.mark.parametrize("path", ["/", "/etc", "/proc/1", "/tmp"])
def test_a_directory_of_the_system_is_refused_in_the_cluster_file(path: str) -> None:
    spec = StorageSpec(kind="existing", path=path)
    assert [key for key, _ in spec.problems(CLUSTER)] == ["path"]


def test_the_spec_is_strict() -> None:
    assert list(SPEC.problems(CLUSTER)) == []
    for wrong in ({"kind": "nsf"}, {"path": "shared"}, {"free": -1}, {"free": "1"}):
        with pytest.raises(ValidationError):
            StorageSpec.model_validate({"kind": "existing", "path": "/shared", **wrong})


def test_colleagues_learn_where_the_shared_storage_and_the_depot_are() -> None:
    assert (shared_path(CLUSTER), depot(CLUSTER)) == ("/shared", "/shared/.lockstep")
    without = replace(CLUSTER, sections={})
    assert (shared_path(without), depot(without)) == (None, None)


# Each node's own disk.

OWN = StorageSpec(kind="local", path="/data")
OWN_TOKEN = f"{TOKEN_FILE}-data"


def own_ids(seen: StorageState) -> list[tuple[str, bool]]:
    cluster = replace(CLUSTER, sections={"storage": OWN})
    found = role.drift(Target(cluster, NODES["node2"], OWN), seen, ALL)
    return [(one.id, one.repairable) for one in found]


def own(**changes: Any) -> StorageState:
    """node2 with a directory on its own disk, where it left its token."""
    disk = Mount("/", "ext4", "/dev/sda1", ("rw",))
    values = {"mark": None, "mount": disk, "real": "/data", "tokens": {"node2": (TOKENS["node2"],)}}
    return state("node2", **{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"mount": Mount("/data", "xfs", "/dev/sdb", ("rw",))}, []),
        ({"access": "absent", "token": None}, [("storage-missing", True)]),
        ({"token": None, "tokens": {}}, [("storage-token", True)]),
        ({"access": "absent"}, [("storage-lost", False)]),
        ({"tokens": {}}, [("storage-lost", False)]),
        ({"tokens": {}, "known": True}, [("storage-token", True)]),
        ({"mount": Mount("/data", "nfs4", "s:/x", ("rw",))}, [("storage-not-own", False)]),
        ({"mount": Mount("/", "lustre", "mds:/x", ("rw",))}, [("storage-not-own", False)]),
        ({"tokens": TOKENS_OF_TWO}, [("storage-not-own", False)]),
        ({"tokens": {"node9": ("9" * 32,), "node2": ("2" * 32,)}}, []),
        ({"access": "silent"}, [("nfs-server-silent", False)]),
        ({"mount": Mount("/", "ext4", "/dev/sda1", ("ro",))}, [("storage-read-only", False)]),
        ({"free": 1}, [("checkpoint-disk-full", False)]),
        ({"open": (".lockstep",)}, [("storage-modes", True)]),
    ],
)  # fmt: skip
def test_a_directory_on_the_nodes_own_disk_is_made_and_known_again(
    changes: dict[str, Any], found: list[tuple[str, bool]]
) -> None:
    assert own_ids(own(**changes)) == found


def test_a_directory_on_the_nodes_own_disk_carries_its_token_and_no_mark(tmp_path: Path) -> None:
    spec = StorageSpec(kind="local", path=str(tmp_path / "data"))
    target = Target(replace(CLUSTER, sections={"storage": spec}), NODES["node2"], spec)
    kept = tmp_path / "own" / "token"

    def seen() -> StorageState:
        text = probe(target).replace(str(Path(TOKEN_FILE).parent), str(kept.parent))
        return parse(sh(text).stdout.rstrip("\n"))

    assert [one.id for one in role.drift(target, seen(), {})] == ["storage-missing"]
    steps = role.converge(target, seen(), {}, role.drift(target, seen(), {}))
    for step in steps:
        assert isinstance(step, Shell)
        text = step.command.replace(str(Path(TOKEN_FILE).parent), str(kept.parent))
        done = sh(f"set -e\n{text}")
        assert done.returncode == 0, done.stderr
    assert role.drift(target, seen(), {}) == []
    target = replace(target, cluster=replace(target.cluster, name="renamed"))
    assert [one.id for one in role.drift(target, seen(), {})] == ["storage-token"]
    shutil.rmtree(tmp_path / "data")
    assert [one.id for one in role.drift(target, seen(), {})] == ["storage-lost"]


def test_nothing_is_shared_where_several_nodes_have_each_its_own() -> None:
    cluster = replace(CLUSTER, sections={"storage": OWN})
    assert (shared_path(cluster), depot(cluster)) == (None, None)
    assert storage_path(cluster) == "/data"
    alone = replace(cluster, nodes={"node1": NODES["node1"]})
    assert (shared_path(alone), depot(alone)) == ("/data", "/data/.lockstep")
    assert proof(Target(cluster, NODES["node1"], OWN)) == "true"
    assert wanted(Target(cluster, NODES["node1"], OWN)) is None


def test_what_is_kept_the_same_overlaps_nothing_else() -> None:
    spec = StorageSpec.model_validate(
        {"kind": "local", "path": "/data", "sync": {"x": {"from": "/x"}}}
    )
    cluster = replace(CLUSTER, sections={"storage": spec})
    assert synced_at(cluster, "/data/x/y") == synced_at(cluster, "/data") == "/data/x"
    assert synced_at(cluster, "/data/xy") is None
    assert synced_at(replace(CLUSTER, sections={}), "/data") is None


# What Lockstep mounts itself.

SERVED = {"kind": "nfs", "path": "/shared", "server": "node1"}


def served(name: str = "node2", **declared: Any) -> Target[StorageSpec]:
    spec = StorageSpec.model_validate({**SERVED, **declared})
    return Target(replace(CLUSTER, sections={"storage": spec}), NODES[name], spec)


def refusals(**declared: Any) -> dict[str, str]:
    spec = StorageSpec.model_validate({**SERVED, **declared})
    return dict(spec.problems(CLUSTER))


@pytest.mark.parametrize(
    ("declared", "key", "sentence"),
    [
        ({"server": "node9"}, "server", "no node of this cluster: name a node (node1, node2, node3)"),
        ({"server": "nas one"}, "server", "is no server"),
        ({"server": "10.9.0.300"}, "server", "is no server"),
        ({"server": "10.9.0"}, "server", "is no server"),
        ({"server": "127.0.0.1"}, "server", "is no server"),
        ({"server": "::"}, "server", "is no server"),
        ({"server": None}, "server", "is missing: name a node"),
        ({"server": "10.77.164.12"}, "server", "say server: node2"),
        ({"server": "10.9.0.1", "threads": 8}, "threads", "is a matter of the server 10.9.0.1"),
        ({"server": "nas.lan", "root_squash": True}, "root_squash", "is no node"),
        ({"export": "/shared/data"}, "export", "overlap"),
        ({"path": "/srv/a/b", "export": "/srv/a"}, "export", "overlap"),
        ({"export": "/etc"}, "export", "belongs to the system"),
        ({"path": "/var/lib"}, "path", "belongs to the system"),
        ({"path": "/my data"}, "path", "cannot be mounted by NFS here"),
        ({"path": "/data//x"}, "path", "between single slashes"),
        ({"export": "/data/./x"}, "export", "cannot be mounted by NFS here"),
        ({"options": ["rsize=8192", "rsize=65536"]}, "options[1]", "said another time by 'rsize=8192'"),
        ({"options": ["nolock", "noatime", "lock"]}, "options[2]", "keep one of them"),
        ({"options": ["noatime", "sec=krb5p"]}, "options[1]", "refused by node1, which exports with sec=sys"),
        ({"options": ["xprtsec=tls"]}, "options[0]", "refused by node1, which exports with xprtsec=none"),
        ({"kind": "existing"}, "server", "belongs to kind: nfs"),
    ],
)  # fmt: skip
def test_a_declaration_that_cannot_be_is_refused_before_any_node_is_reached(
    declared: dict[str, Any], key: str, sentence: str
) -> None:
    assert sentence in refusals(**declared)[key]


@pytest.mark.parametrize("server", ["node1", "10.9.0.1", "nas.example.com", "fd00::5"])
def test_a_node_or_an_outside_server_is_taken(server: str) -> None:
    assert refusals(server=server) == {}
    secure = ["sec=krb5p", "xprtsec=tls"] if server != "node1" else ["sec=sys", "xprtsec=none"]
    assert refusals(server=server, options=secure) == {}


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        ({"export": "srv/data"}, "is no absolute path"),
        ({"options": ["nconect=8"]}, "did you mean 'nconnect'?"),
        ({"options": ["noatime,nodiratime"]}, "write each as an item"),
        ({"options": ["nconnect=many"]}, "needs a number"),
        ({"options": ["sec=krb6"]}, "sec=sys|none|krb5"),
        ({"options": ["noatime=1"]}, "takes no value"),
        ({"options": ["soft"]}, "loses writes"),
        ({"options": ["vers=3"]}, "declare storage.version"),
        ({"options": ["hard"]}, "is always set"),
        ({"version": "5"}, "say one of 3, 4.0, 4.1, 4.2"),
        ({"version": 4.2}, "must be quoted"),
        ({"timeout": 0}, "greater than or equal to 5"),
    ],
)
def test_a_value_that_is_none_is_refused(declared: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        StorageSpec.model_validate({**SERVED, **declared})


def test_a_client_is_not_judged_while_its_server_serves_otherwise() -> None:
    assert role.elsewhere and role.elsewhere(served("node2")) == ("node1", "exports")
    assert role.elsewhere(served("node1")) is None
    assert role.elsewhere(served(server="10.9.0.1")) is None


LINE = (
    "10.77.164.11:/shared /shared nfs vers=4.2,hard,_netdev,nofail,x-systemd.automount,"
    "x-systemd.mount-timeout=30,x-lockstep 0 0"
)
NFS = Mount("/shared", "nfs4", "10.77.164.11:/shared", ("rw", "vers=4.2", "hard"))
AUTOFS = Mount("/shared", "autofs", "systemd-1", ("rw",))


def line(text: str) -> Line:
    source, point, kind, *_ = text.split(" ")
    return Line(source, point, kind, text)


def client(**changes: Any) -> StorageState:
    unit = shutdown.unit(served())
    assert unit is not None
    right = state(
        "node2",
        client=True,
        fstab=(line(LINE),),
        live=(AUTOFS, NFS),
        mount=NFS,
        entry=".lockstep",
        shutdown=shutdown.digest(unit),
        ready=True,
    )
    return replace(right, **changes)


def client_findings(seen: StorageState, **declared: Any) -> list[Finding]:
    others = {"node1": state("node1", exported=True), "node3": ALL["node3"]}
    return role.drift(served(**declared), seen, others)


def client_script(seen: StorageState, **declared: Any) -> str:
    found = [one for one in client_findings(seen, **declared) if one.repairable]
    steps = role.converge(served(**declared), seen, {}, found)
    return "\n".join(step.command for step in steps if isinstance(step, Shell))


def test_the_line_of_fstab_survives_any_order_of_booting() -> None:
    mount = wanted(served())
    assert mount is not None and mount.line == LINE
    six = wanted(
        served(server="fd00::5", export="/vol", version="3", options=["nolock"], timeout=9)
    )
    assert six is not None and six.line == (
        "[fd00::5]:/vol /shared nfs vers=3,hard,_netdev,nofail,x-systemd.automount,"
        "x-systemd.mount-timeout=9,nolock,x-lockstep 0 0"
    )


def test_the_server_mounts_nothing_or_binds_its_own_directory() -> None:
    assert wanted(served("node1")) is None
    bound = wanted(served("node1", export="/srv/x"))
    assert bound is not None and bound.line == "/srv/x /shared none bind,nofail,x-lockstep 0 0"
    assert "bound=/srv/x mounted=yes" in probe(served("node1", export="/srv/x"))
    assert "bound='' mounted=yes" in probe(served()) and "mounted=\n" in probe(HEAD)


def test_a_client_with_its_mount_has_no_drift() -> None:
    assert client_findings(client()) == [] and client_script(client()) == ""
    assert client_findings(client(live=(NFS,))) == [], "mounted by hand before the line was written"


EXT4 = Mount("/shared", "ext4", "/dev/sdb1", ("rw",))
ROOT_DISK = Mount("/", "ext4", "/dev/sda1", ("rw",))
OTHER_SERVER = replace(NFS, source="10.9.9.9:/x")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fstab": ()}, ["nfs-fstab"]),
        ({"fstab": (line(LINE.replace("hard", "soft")),)}, ["nfs-fstab"]),
        ({"live": (), "mount": ROOT_DISK, "entry": ""}, ["nfs-mount-wrong"]),
        ({"live": (AUTOFS,), "access": "failed", "failure": "No such device"}, ["nfs-mount-wrong"]),
        ({"live": (AUTOFS,), "access": "silent"}, ["nfs-server-silent"]),
        ({"access": "silent"}, ["nfs-server-silent"]),
        ({"access": "failed", "failure": "Permission denied"}, ["nfs-refused"]),
        ({"access": "stale"}, ["nfs-stale-handle"]),
        ({"live": (OTHER_SERVER,), "mount": OTHER_SERVER}, ["nfs-mount-wrong"]),
        ({"live": (replace(NFS, options=("rw", "vers=3", "hard")),)}, ["nfs-mount-options"]),
        ({"live": (replace(NFS, options=("rw", "vers=4.2", "soft")),)}, ["nfs-mount-options"]),
        (
            {"client": False, "fstab": (), "live": (), "access": "absent", "entry": ""},
            ["nfs-client-missing", "nfs-fstab", "nfs-mount-wrong"],
        ),
    ],
)  # fmt: skip
def test_what_keeps_the_mount_away_is_repaired(
    changes: dict[str, Any], expected: list[str]
) -> None:
    found = client_findings(client(**changes))
    assert [one.id for one in found] == expected and all(one.repairable for one in found)
    assert 'ls "$point/."' in client_script(client(**changes)), (
        "the mount is tried, in bounded time"
    )


@pytest.mark.parametrize(
    ("changes", "expected", "word"),
    [
        ({"live": (EXT4,)}, "storage-two-volumes", "/dev/sdb1"),
        ({"fstab": (line("/dev/sdb1 /shared ext4 defaults 0 2"),)}, "storage-two-volumes", "/dev/sdb1"),
        ({"live": (NFS, OTHER_SERVER)}, "storage-two-volumes", "2 mounts over one another"),
        (
            {"fstab": (line("a:/x /shared nfs hard 0 0"), line("b:/x /shared nfs hard 0 0"))},
            "storage-two-volumes",
            "a:/x and b:/x",
        ),
        ({"live": (), "entry": "models"}, "storage-hides", "models"),
        ({"live": (), "real": "/mnt/disk/shared"}, "storage-link", "/mnt/disk/shared"),
    ],
)  # fmt: skip
def test_what_the_mount_would_hide_is_told_and_nothing_is_changed(
    changes: dict[str, Any], expected: str, word: str
) -> None:
    (found,) = client_findings(client(**changes))
    assert (found.id, found.repairable) == (expected, False) and word in found.seen
    assert client_script(client(**changes)) == ""


def test_options_that_changed_are_mounted_again_once_no_job_runs_there() -> None:
    seen = client()
    (found,) = client_findings(seen, options=["nconnect=8"])
    assert (found.id, found.disturbs) == ("nfs-fstab", True)
    text = client_script(seen, options=["nconnect=8"])
    assert (
        -1
        < text.index("umount $lazily")
        < text.index("LOCKSTEP_LINE=")
        < text.index("systemctl start")
    )
    for unmounted in (client(fstab=()), client(fstab=(line("nas:/old /shared nfs defaults 0 0"),))):
        (found,) = client_findings(unmounted)
        assert not found.disturbs and "umount" not in client_script(unmounted)


def test_taking_a_line_out_of_fstab_touches_no_other_one(tmp_path: Path) -> None:
    file = tmp_path / "fstab"
    others = "# a /old nfs\n/dev/a / ext4 defaults 0 1\nnas:/x\t/old/er nfs hard"
    file.write_text(f"nas:/y /old nfs hard 0 0\n{others}")
    for _ in range(2):
        done = sh("set -e\n" + fstab.drop("/old").replace("/etc/fstab", str(file)))
        assert (done.returncode, file.read_text()) == (0, f"{others}\n")


@pytest.mark.parametrize("point", ["/data/", "//data", "/data"])
def test_a_line_is_known_by_its_point_however_many_slashes_it_has(
    tmp_path: Path, point: str
) -> None:
    file = tmp_path / "fstab"
    file.write_text(f"nas:/x {point} nfs hard 0 0\nnas:/y /data/x nfs hard 0 0\n")
    text = probe(replace(HEAD, spec=StorageSpec(kind="existing", path="/data")))
    seen = parse(sh(text.replace("/etc/fstab", str(file))).stdout.rstrip("\n"))
    assert [line.text for line in seen.fstab] == ["nas:/x /data nfs hard 0 0"]
    done = sh("set -e\n" + fstab.put("nas:/x /data/ nfs soft").replace("/etc/fstab", str(file)))
    assert done.returncode == 0, done.stderr
    assert file.read_text() == "nas:/x /data/ nfs soft\nnas:/y /data/x nfs hard 0 0\n"


def test_a_line_for_another_nfs_server_gives_way_to_the_declared_one() -> None:
    seen = client(fstab=(line("nas:/old /shared nfs defaults 0 0"),))
    assert [found.id for found in client_findings(seen)] == ["nfs-fstab"]


CHECKED = SPEC.model_copy(update={"manage": "check"})


@pytest.mark.parametrize("name", NAMES)
def test_storage_that_is_only_checked_needs_no_marks_of_lockstep(name: str) -> None:
    """Adopted as it is: nothing is ever written there, and nothing of that may hold a job back."""
    bare = {node: state(node, mark=None, token=None, tokens={}) for node in NAMES}
    target = replace(TARGETS[name], spec=CHECKED)
    assert (
        role.drift(target, bare[name], {node: bare[node] for node in NAMES if node != name}) == []
    )
    left = state(name, tokens={**state(name).tokens, "node9": ("9" * 32,)})
    assert role.drift(target, left, {node: ALL[node] for node in NAMES if node != name}) == []
    own = replace(target, spec=OWN.model_copy(update={"manage": "check"}))
    assert role.drift(own, replace(bare[name], mount=EXT4), {}) == []


def test_storage_that_is_only_checked_is_still_judged() -> None:
    target = replace(WORKER, spec=CHECKED)
    heads = {"node1": ALL["node1"]}
    for changes, id in (
        ({"free": 1}, "checkpoint-disk-full"),
        ({"mark": None, "token": None, "tokens": {}}, "storage-different"),
        ({"open": (".lockstep",)}, "storage-modes"),
    ):
        assert [one.id for one in role.drift(target, state("node2", **changes), heads)] == [id]


def test_the_proof_leaves_storage_alone_that_is_only_checked_and_has_no_mark(
    tmp_path: Path,
) -> None:
    for manage, code in (("check", 0), ("managed", 1)):
        spec = StorageSpec.model_validate(
            {"kind": "existing", "path": str(tmp_path), "manage": manage}
        )
        assert sh(proof(replace(HEAD, spec=spec))).returncode == code
    assert list(tmp_path.iterdir()) == []


def test_what_unmounts_waits_for_a_running_job() -> None:
    for changes in ({"live": (OTHER_SERVER,)}, {"access": "stale"}):
        assert all(found.disturbs for found in client_findings(client(**changes)))


def test_lines_of_ours_that_are_no_longer_declared_go() -> None:
    old = line(LINE.replace(" /shared ", " /old "))
    seen = client(fstab=(line(LINE), old))
    assert [found.id for found in client_findings(seen)] == ["storage-left"]
    assert "point=/old" in client_script(seen) and "LOCKSTEP_LINE=''" in client_script(seen)
    existing = state("node2", fstab=(line(LINE),))
    assert ids("node2", existing) == ["storage-left"]


def test_a_server_whose_disk_is_missing_is_not_marked_anew() -> None:
    empty = state("node1", mount=EXT4, mark=None, tokens={}, same=True)
    target = served("node1", export="/srv/x")
    bind = wanted(target)
    assert bind is not None
    seen = replace(empty, fstab=(line(bind.line),), live=(EXT4,))
    assert [found.id for found in role.drift(target, seen, {})] == ["storage-lost"]


@pytest.mark.parametrize(
    ("name", "logged", "sentence"),
    [
        ("node1", "mount: /x: special device /srv/x does not exist.", "/srv/x cannot be had at {}: special device /srv/x does not exist."),
        ("node1", "", "/srv/x is not mounted at {}: see systemctl status {} on this node"),
        ("node2", "mount.nfs: access denied by server", "10.77.164.11:/srv/x cannot be had at {}: access denied by server"),
        ("node2", "", "10.77.164.11:/srv/x is not mounted at {}: no answer within 5 s; see that the server is up"),
    ],
)  # fmt: skip
def test_a_mount_that_fails_is_told_by_its_own_reason(
    tmp_path: Path, name: str, logged: str, sentence: str
) -> None:
    fakes = {
        "systemctl": 'test "$1" != start || { echo "Job failed. See systemctl status." >&2; exit 1; }',
        "systemd-escape": "echo unit",
        "journalctl": f"echo '{logged}'",
    }
    for program, text in fakes.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    target = served(name, export="/srv/x", path=f"{tmp_path}/data", timeout=5)
    mount = wanted(target)
    assert mount is not None
    done = sh(f"set -e\n{attempt(target, mount)}", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(sentence.replace("{}", f"{tmp_path}/data"))


@pytest.mark.parametrize("code", [0, 1])
def test_a_mount_in_use_stays_and_who_uses_it_is_told_how_to_find(
    tmp_path: Path, code: int
) -> None:
    (tmp_path / "umount").write_text(f"#!/bin/sh\necho umount: target is busy. >&2; exit {code}\n")
    (tmp_path / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "systemd-escape").write_text("#!/bin/sh\necho unit\n")
    for fake in tmp_path.iterdir():
        fake.chmod(0o755)
    done = sh(f"set -e\n{unmount('/proc')}", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("/proc could not be unmounted" if code else "/proc is still mounted")


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({"shutdown": "", "ready": False}, "none"),
        ({"shutdown": "5eed"}, "another version of it"),
        ({"ready": False}, "it is not enabled, or does not wait for it"),
    ],
)
def test_what_lets_a_shutdown_go_on_without_the_server_is_put_there(
    changes: dict[str, Any], seen: str
) -> None:
    (found,) = client_findings(client(**changes))
    assert (found.id, found.seen, found.repairable) == ("nfs-shutdown", seen, True)
    text = client_script(client(**changes))
    assert f"systemctl enable -q {shutdown.UNIT}" in text and "umount" not in text
    changed = client_findings(client(), timeout=60)
    assert "nfs-shutdown" in [one.id for one in changed], "its seconds follow the timeout"


def test_a_node_that_mounts_nothing_by_nfs_keeps_no_unit_for_its_shutdown() -> None:
    assert shutdown.unit(served("node1")) is None and shutdown.unit(HEAD) is None
    seen = state("node2", shutdown="5eed", ready=True)
    assert ids("node2", seen) == ["storage-left"]
    assert f"rm -f {shutdown.LINK} {shutdown.UNIT_FILE}" in script("node2", seen)


def test_packages_of_the_client_have_each_familys_names() -> None:
    assert role.installs is not None
    assert list(role.installs(served(), client())) == ["nfs-common"]
    assert list(role.installs(served(), client(manager="rpm"))) == ["nfs-utils"]
    assert list(role.installs(HEAD, client())) == []


# What follows runs the shell text itself, on directories of this machine.

SHELLS = [shell for shell in ("dash", "bash", "busybox") if shutil.which(shell)]


def sh(text: str, shell: str = "sh", **env: str) -> subprocess.CompletedProcess[str]:
    argv = ["busybox", "sh"] if shell == "busybox" else [shell]
    return subprocess.run(
        [*argv, "-c", text], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def look(
    path: Path, own: Path, shell: str = "sh", fstab: Path = Path("/none"), mounted: str = ""
) -> StorageState:
    text = (
        f"path='{path}' own='{own}' cluster=lab164 fstab={fstab} bound= mounted={mounted}\n{SCRIPT}"
    )
    done = sh(text, shell)
    assert (done.returncode, done.stderr) == (0, "")
    return parse(done.stdout.rstrip("\n"))


def carry_out(
    target: Target[StorageSpec], seen: StorageState, peers: dict[str, StorageState], own: Path
) -> subprocess.CompletedProcess[str]:
    found = [one for one in role.drift(target, seen, peers) if one.repairable]
    steps = [
        step.command
        for step in role.converge(target, seen, peers, found)
        if isinstance(step, Shell)
    ]
    text = (
        "\n".join(f"({step})" for step in steps)
        .replace(TOKEN_FILE, str(own))
        .replace(str(Path(TOKEN_FILE).parent), str(own.parent))
    )
    return sh(f"set -e\n{text}")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_probe_tells_an_absent_path_from_an_empty_one(tmp_path: Path, shell: str) -> None:
    assert look(tmp_path / "none", tmp_path / "token", shell).access == "absent"
    (tmp_path / "file").touch()
    assert look(tmp_path / "file", tmp_path / "token", shell).access == "absent"
    (tmp_path / "a b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a b")
    seen = look(tmp_path / "link", tmp_path / "token", shell)
    assert seen.real == str(tmp_path / "a b") and seen.mark is None and seen.tokens == {}
    assert seen.mount is not None and str(tmp_path).startswith(seen.mount.point.rstrip("/"))


@pytest.mark.parametrize("shell", SHELLS)
def test_two_nodes_on_one_directory_agree_and_a_plain_copy_does_not(
    tmp_path: Path, shell: str
) -> None:
    shared, copy = tmp_path / "shared", tmp_path / "copy"
    shared.mkdir()
    spec = StorageSpec(kind="existing", path=str(shared))
    heads = {
        name: Target(
            replace(CLUSTER, nodes={name: NODES[name], **NODES}, sections={"storage": spec}),
            NODES[name],
            spec,
        )
        for name in NAMES
    }
    own = {name: tmp_path / name / "token" for name in NAMES}
    for name in ("node1", "node2"):
        here = replace(look(shared, own[name]), exported=True)
        done = carry_out(heads[name], here, {}, own[name])
        assert done.returncode == 0, done.stderr
    seen = {name: look(shared, own[name], shell) for name in ("node1", "node2")}
    assert seen["node1"].mark == seen["node2"].mark and seen["node1"].open == ()
    assert set(seen["node1"].tokens) == {"node1", "node2"}
    assert own["node1"].stat().st_mode & 0o777 == 0o600
    pair = Target(CLUSTER, NODES["node2"], spec)
    mounted = {
        name: replace(one, mount=Mount(str(shared), "nfs4", "s:/x", ("rw",)))
        for name, one in seen.items()
    }
    assert role.drift(pair, mounted["node2"], {"node1": mounted["node1"]}) == []
    shutil.copytree(shared, copy)
    assert mounted["node1"].mark is not None
    copied = look(copy, own["node2"], shell)
    assert copied.mark is not None and copied.mark.id == mounted["node1"].mark.id
    assert copied.mark.inode != mounted["node1"].mark.inode
    assert copied.tokens == seen["node2"].tokens


def test_writing_the_marks_again_changes_nothing(tmp_path: Path) -> None:
    spec = StorageSpec(kind="existing", path=str(tmp_path))
    cluster = replace(CLUSTER, nodes={"node1": NODES["node1"]}, sections={"storage": spec})
    target = Target(cluster, NODES["node1"], spec)
    own = tmp_path.parent / f"{tmp_path.name}-own" / "token"
    first = look(tmp_path, own)
    assert carry_out(target, first, {}, own).returncode == 0
    after = look(tmp_path, own)
    assert role.drift(target, after, {}) == []
    assert carry_out(target, first, {}, own).returncode == 0
    again = look(tmp_path, own)  # others use the disk meanwhile
    assert replace(again, free=0, inodes=0) == replace(after, free=0, inodes=0)


def test_a_step_writes_nothing_where_the_mount_of_the_look_is_gone(tmp_path: Path) -> None:
    spec = StorageSpec(kind="existing", path=str(tmp_path))
    target = Target(CLUSTER, NODES["node1"], spec)
    seen = state(
        "node1",
        real=str(tmp_path),
        mount=Mount(str(tmp_path), "nfs4", "s:/x", ("rw",)),
        mark=None,
        token=None,
        tokens={},
    )
    done = carry_out(target, seen, {}, tmp_path.parent / f"{tmp_path.name}-own" / "token")
    assert done.returncode == 1 and "is no longer mounted" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ssh", "printed"),
    [
        ('shift 5; node=$1; shift; exec sh -c "$*"', ""),
        ("exit 255", ""),
        ("echo other", "storage-different\tnode2 does not see at {path} what the head wrote there a moment ago\tmount at {path} on"),
        ("exit 1", "storage-different\tnode2 does not see at {path} what the head wrote there a moment ago\tmount at {path} on"),
        ("exit 124", "nfs-server-silent\tnode2 did not read at {path} within 20 s what the head wrote there\tlook whether"),
    ],
)  # fmt: skip
def test_the_proof_finds_a_node_that_does_not_see_what_the_head_writes_now(
    tmp_path: Path, ssh: str, printed: str
) -> None:
    path = tmp_path / "it's shared"
    (path / ".lockstep").mkdir(parents=True)
    (path / ".lockstep/id").write_text("x\n")
    fake = tmp_path / "ssh"
    fake.write_text(f"#!/bin/sh\n{ssh}\n")
    fake.chmod(0o755)
    nodes = {name: NODES[name] for name in NAMES[:2]}
    target = Target(
        replace(CLUSTER, nodes=nodes), NODES["node1"], StorageSpec(kind="existing", path=str(path))
    )
    done = sh(proof(target), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.stdout.startswith(printed.format(path=path)) and done.returncode == 0
    assert bool(done.stdout) == bool(printed)
    assert [file.name for file in (path / ".lockstep").iterdir()] == ["id"]


def test_the_proof_is_the_heads_and_writes_nothing_without_the_mark(tmp_path: Path) -> None:
    assert proof(WORKER) == "true" and role.crossing
    target = Target(CLUSTER, NODES["node1"], StorageSpec(kind="existing", path=str(tmp_path)))
    assert sh(proof(target)).returncode == 1 and list(tmp_path.iterdir()) == []


def test_paths_reach_the_shell_quoted() -> None:
    spec = StorageSpec(kind="existing", path="/mnt/a b$(touch /x)")
    assert "path='/mnt/a b$(touch /x)'" in probe(Target(CLUSTER, NODES["node1"], spec))


def test_a_path_that_hangs_is_told_in_bounded_time(tmp_path: Path) -> None:
    fake = tmp_path / "ls"
    fake.write_text("#!/bin/sh\nsleep 60\n")
    fake.chmod(0o755)
    text = (
        f"path='{tmp_path}' own=/none cluster=lab164 fstab=/none bound= mounted=yes\n{SCRIPT}"
    ).replace("KILL 8", "KILL 0.5")
    done = sh(text, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0
    assert parse(done.stdout.rstrip("\n")).access == "silent"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_probe_shows_the_lines_of_the_path_and_lockstep_s_own(
    tmp_path: Path, shell: str
) -> None:
    (tmp_path / "models").touch()
    fstab = tmp_path / "fstab"
    fstab.write_text(
        f"# x {tmp_path} nfs y\n/dev/a / ext4 defaults 0 1\nnas:/x\t{tmp_path}  nfs hard\n{LINE}\n"
    )
    seen = look(tmp_path, tmp_path / "none", shell, fstab, "yes")
    assert [each.text for each in seen.fstab] == [f"nas:/x {tmp_path} nfs hard 0 0", LINE]
    assert seen.live == () and seen.entry == "fstab" and seen.same is None


TABLE = (
    "22 1 0:20 / {0} rw shared:1 - autofs systemd-1 rw\n23 22 0:21 / {0} rw - {1} nas:/x rw,hard\n"
)
STATS = (
    "device nas:/y mounted on /other with fstype nfs4 statvers=1.1\n"
    "\txprt:\ttcp 700 1 1 0 28 231 9999 0 231 0 2 0 0\n"
    "device nas:/x mounted on {0} with fstype nfs4 statvers=1.1\n"
    "\txprt:\ttcp 788 1 1 0 28 231 {1} 0 231 0 2 0 0\n"
)


def shut_down(
    work: Path,
    shell: str,
    stat: str,
    umount: str,
    silence: str = "1",
    manager: str = "stopping",
    kind: str = "nfs4",
) -> tuple[str, list[str]]:
    """What the unit's script says, and with which options it unmounted. stat, umount: their stand-ins."""
    point, table, stats, log = (str(work / name) for name in ("data", "table", "stats", "log"))
    Path(table).write_text(TABLE.format(point, kind))
    Path(stats).write_text(STATS.format(point, 1))
    Path(log).touch()
    fakes = {
        "stat": stat,
        "umount": f'echo "$*" >>{log}\n{umount}',
        "systemctl": f"echo {manager}",
    }
    for program, text in fakes.items():
        (work / program).write_text(
            f"#!/bin/sh\ntable={table} stats={stats} point={point}\n{text}\n"
        )
        (work / program).chmod(0o755)
    text = shutdown.SCRIPT.replace("PATH=/usr/sbin", f"PATH={work}:/usr/sbin")
    text = re.sub("sleep [0-9]", "sleep 0", text)
    text = text.replace(shutdown.MOUNTS, table).replace(shutdown.COUNTS, stats)
    (work / "script").write_text(text)
    argv = ["busybox", "sh"] if shell == "busybox" else [shell]
    done = subprocess.run(
        [*argv, str(work / "script"), point, silence], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, Path(log).read_text().splitlines()


HANGS = "exec sleep 30"
GONE = ': >"$table"'


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shutdown_leaves_a_mount_alone_as_long_as_its_server_answers(
    tmp_path: Path, shell: str
) -> None:
    assert shut_down(tmp_path, shell, "exit 0", "") == ("", [])


def test_a_mount_in_use_is_not_left_to_be_unmounted_before_its_users_have_ended(
    tmp_path: Path,
) -> None:
    """Whoever looks at a mount twice has found somebody there; the stand-in of stat counts the looks."""
    (tmp_path / "data").mkdir()
    with subprocess.Popen(["sleep", "1"], cwd=tmp_path / "data") as user:
        assert shut_down(tmp_path, "sh", 'echo >>"$stats.seen"', "") == ("", [])
        assert user.poll() == 0
    assert len((tmp_path / "stats.seen").read_text()) > 1


def test_nothing_happens_when_the_unit_is_stopped_and_the_node_runs_on(tmp_path: Path) -> None:
    assert shut_down(tmp_path, "sh", HANGS, "", manager="running") == ("", [])


def test_a_busy_server_that_answers_others_is_not_given_up(tmp_path: Path) -> None:
    others = (
        f'if test -e "$stats.seen"; then {GONE}; else sed -i "s/ 231 1 0/ 231 2 0/" "$stats"; fi\n'
    )
    assert shut_down(tmp_path, "sh", f'{others}: >"$stats.seen"; {HANGS}', "") == ("", [])


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shutdown_lets_go_of_a_mount_whose_server_is_silent(tmp_path: Path, shell: str) -> None:
    said, calls = shut_down(tmp_path, shell, HANGS, GONE)
    assert "gave no answer within 1 s" in said
    assert calls == [f"-c -i -f {tmp_path}/data"]


def test_a_mount_that_stays_in_use_is_taken_out_of_the_tree_at_last(tmp_path: Path) -> None:
    lazily = f"case $* in *-l*) {GONE} ;; *) exit 32 ;; esac"
    _, calls = shut_down(tmp_path, "sh", HANGS, lazily)
    assert calls == [f"-c -i -f {tmp_path}/data", f"-c -i -f -l {tmp_path}/data"]


def test_what_errors_do_not_end_is_killed_and_nobody_else(tmp_path: Path) -> None:
    for name in ("data", "data-two"):
        (tmp_path / name).mkdir()
    with (tmp_path / "data/log").open("w") as log:
        user, writer, other = (
            subprocess.Popen(["sleep", "30"], cwd=tmp_path / place, stdout=out)
            for place, out in (("data", None), ("", log), ("data-two", None))
        )
    try:
        tries = shutdown.ERRORS + 1
        _, calls = shut_down(
            tmp_path,
            "sh",
            HANGS,
            f"test $(wc -l <{tmp_path}/log) -lt {tries} || {GONE}",
            str(tries),
        )
        assert len(calls) == tries
        assert (user.wait(5), writer.wait(5), other.poll()) == (-9, -9, None)
    finally:
        other.kill()
        other.wait()


def test_a_mount_that_is_not_of_nfs_is_not_touched(tmp_path: Path) -> None:
    assert shut_down(tmp_path, "sh", HANGS, "", kind="ext4") == ("", [])


def test_units_of_a_mount_are_named_as_systemd_does() -> None:
    assert shutdown.escaped("/data") == "data"
    assert shutdown.escaped("/mnt/my-disk/.a+b") == r"mnt-my\x2ddisk-.a\x2bb"
    assert shutdown.escaped("/.x") == r"\x2ex"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_probe_tells_what_lets_a_shutdown_go_on(tmp_path: Path, shell: str) -> None:
    places = {
        path: f"{tmp_path}/{name}"
        for name, path in (
            ("s", shutdown.SCRIPT_FILE),
            ("u", shutdown.UNIT_FILE),
            ("l", shutdown.LINK),
        )
    }
    (tmp_path / "systemctl").write_text('#!/bin/sh\nexec test -e "${0%/*}/active"\n')
    (tmp_path / "systemctl").chmod(0o755)
    text = f"PATH={tmp_path}:$PATH\n{shutdown.SHOW}"
    for path, here in places.items():
        text = text.replace(path, here)
    assert sh(text, shell).stdout == ""
    (tmp_path / "s").write_text(shutdown.SCRIPT)
    (tmp_path / "u").write_text("unit\n")
    assert sh(text, shell).stdout == f"shutdown {shutdown.digest('unit' + chr(10))} no\n"
    (tmp_path / "l").symlink_to("u")
    assert sh(text, shell).stdout.endswith(" no\n"), "this shutdown would not run it"
    (tmp_path / "active").touch()
    assert sh(text, shell).stdout == f"shutdown {shutdown.digest('unit' + chr(10))} yes\n"
    seen = parse("token \nmanager apt\nclient yes\naccess absent\nshutdown abc yes\nend")
    assert (seen.shutdown, seen.ready) == ("abc", True)


def test_storage_of_each_nodes_own_has_a_token_file_of_its_own_for_each_path() -> None:
    paths = ("/data/a-b", "/data/a/b", "/data/a%2Db", "/data/a")
    files = {token_file(replace(HEAD, spec=StorageSpec(kind="local", path=path))) for path in paths}
    assert len(files) == len(paths)
    assert f"{TOKEN_FILE}-data-a" in files
