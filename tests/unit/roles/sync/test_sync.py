"""The sync role on this machine: nodes are folders, the shell and rsync are real, ssh is a stand-in."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
import yaml

from inventory.cluster import Cluster
from inventory.errors import SchemaProblem
from roles import registry, sync
from roles.core import mirror as core
from roles.core import relay, session
from roles.core.mirror import Spread, mirror
from roles.core.relay import Refused, Way
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Mirror, Upload
from roles.storage.spec import StorageSpec
from roles.sync import declared
from roles.sync.converge import converge, deep
from roles.sync.probe import SyncState, given_here, parse, probe

NODES = ("node1", "node2", "node3")
FILES = {
    "a.txt": b"one\n" * 1000,
    "part/b c.bin": os.urandom(300_000),
    "part/deep/说明.txt": b"text",
    "#odd; name": b"odd",
    "-dash": b"dash",
}


class Site:
    """Three nodes. What a node has at ``/at/…`` lies in a folder of its name; the control machine's is ``here``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.at = folder, folder / "at"
        self.data = str(self.at / "data")
        self.said: list[str] = []
        self.gone: set[str] = set()
        self.refusing: set[str] = set()
        self.given: list[tuple[str, str]] = []
        self.before_settle: Callable[[str], None] = lambda node: None
        monkeypatch.setenv("LOCKSTEP_STATE", str(folder / "state"))
        monkeypatch.setattr(declared, "NOTES", str(self.at / "notes"))
        monkeypatch.setattr(core, "upload", self._upload)
        monkeypatch.setattr(core, "run_here", self._run_here)
        monkeypatch.setattr(core, "download", self._download)
        monkeypatch.setattr(relay, "entered", self._entered)
        monkeypatch.setattr(session, "run", self._run)
        monkeypatch.setattr(session, "say", lambda node, line, colour=None: self.said.append(line))
        for name in NODES:
            (folder / name / "data").mkdir(parents=True)

    # ---- the stand-ins --------------------------------------------------------------------------

    def on(self, node: str, text: str) -> str:
        """A command or path as that node has it."""
        return text.replace(str(self.at), str(self.folder / node))

    def host(self, name: str) -> Any:
        inventory = SimpleNamespace(get_host=self.host)
        return SimpleNamespace(
            name=name,
            data={},
            connector=SimpleNamespace(),
            state=SimpleNamespace(inventory=inventory),
        )

    def _run(
        self, node: Any, script: str, seconds: int, show: bool = False, root: bool = True
    ) -> session.Output:
        if node.name in self.gone:
            raise session.NodeFailed("no answer")
        if "# What arrived" in script:
            self.before_settle(node.name)
        done = subprocess.run(
            ["sh", "-c", self.on(node.name, script)],
            capture_output=True,
            text=True,
            timeout=60,
            errors="ignore" if script.startswith("echo directories") else "strict",  # as a look
        )
        if done.returncode:
            raise session.NodeFailed((done.stderr.strip() or "without a word").splitlines()[-1])
        return session.Output(done.stdout.rstrip("\n"), done.stderr.rstrip("\n"))

    def _upload(self, node: Any, step: Upload, chain: Any) -> None:
        place = Path(self.on(node.name, step.destination))
        place.parent.mkdir(parents=True, exist_ok=True)
        assert hashlib.sha256(step.source.read_bytes()).hexdigest() == step.sha256
        shutil.copyfile(step.source, place)

    def _download(self, node: Any, step: Any) -> None:
        step.destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.on(node.name, step.source), step.destination)

    def _run_here(self, command: tuple[str, ...], say: Callable[[str], None]) -> None:
        node = self.taking
        done = subprocess.run(
            [self.on(node, word) if word.startswith(str(self.at)) or "=" in word else word for word in command],
            capture_output=True, text=True,
        )  # fmt: skip
        for line in done.stdout.splitlines():
            say(line)
        if done.returncode:
            raise session.NodeFailed(done.stderr.strip().splitlines()[-1])
        if "rsync" in command:
            self.given.append(("", node))

    taking = ""

    @contextmanager
    def _entered(
        self, gift: str, giver: Any, taker: Any, places: Any, before: str
    ) -> Iterator[Way]:
        if giver.name in self.refusing:
            raise Refused(f"{giver.name} does not answer")
        self.given.append((giver.name, taker.name))
        script = self.folder / f"gift-{giver.name}-{taker.name}"
        script.write_text(self.on(giver.name, gift))
        # ssh … -l USER HOST COMMAND…: sshd hands the command over as one line.
        ssh = self.folder / "ssh"
        ssh.write_text(f'#!/bin/sh\nshift 3\nSSH_ORIGINAL_COMMAND="$*" exec sh {script}\n')
        ssh.chmod(0o755)
        yield Way("", str(ssh), "root@10.0.0.9")

    # ---- what the tests do ----------------------------------------------------------------------

    def declare(self, fetch: Any = None, **entries: str) -> Cluster:
        values: dict[str, Any] = {
            "cluster": "lab",
            "nodes": {name: {"address": f"10.0.0.{n}"} for n, name in enumerate(NODES, 1)},
            "storage": {
                "kind": "local",
                "path": self.data,
                "free": 0,
                "sync": {name: {"from": source} for name, source in entries.items()},
            },
        }
        if fetch:
            values["fetch"] = fetch
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(values))
        self.cluster = registry.read(self.folder / "cluster.yaml")
        return self.cluster

    def write(self, folder: Path | str, files: Mapping[str, bytes] = FILES) -> Path:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, (1_700_000_000, 1_700_000_000.25))
        return Path(folder)

    def target(self, node: str) -> Target[StorageSpec]:
        spec = self.cluster.section("storage", StorageSpec)
        assert spec is not None
        return Target(self.cluster, self.cluster.nodes[node], spec)

    def state(self, node: str) -> SyncState:
        return parse(self._run(self.host(node), probe(self.target(node)), 60).stdout)

    def peers(self, node: str) -> dict[str, SyncState]:
        return {name: self.state(name) for name in NODES if name != node and name not in self.gone}

    def findings(self, node: str) -> list[Finding]:
        given_here.cache_clear()
        return sync.role.drift(self.target(node), self.state(node), self.peers(node))

    def ids(self, *nodes: str) -> list[list[str]]:
        return [[found.id for found in self.findings(node)] for node in nodes or NODES]

    def converge(self, *nodes: str) -> None:
        """One run, node after node."""
        spreads: dict[Mirror, Spread] = {}
        for node in nodes or NODES:
            self.taking = node
            state, peers = self.state(node), self.peers(node)
            found = self.findings(node)
            for step in converge(self.target(node), state, peers, found):
                assert isinstance(step, Mirror)
                if step.giver is None:
                    self.taking = node
                spread = spreads.setdefault(
                    step, Spread(step, self.cluster.nodes, lambda name: name not in self.gone)
                )
                mirror(self.host(node), step, spread)

    def place(self, node: str, name: str = "corpus") -> Path:
        return self.folder / node / "data" / name

    def files(self, node: str, name: str = "corpus") -> dict[str, bytes]:
        place = self.place(node, name)
        return {
            str(path.relative_to(place)): path.read_bytes()
            for path in place.rglob("*")
            if path.is_file() and not path.is_symlink()
        }


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


@pytest.fixture
def corpus(site: Site) -> Path:
    """Content of the control machine, on all three nodes."""
    here = site.write(site.folder / "here/corpus")
    (here / "part/link").symlink_to("deep/说明.txt")
    (here / "empty").mkdir()
    site.declare(corpus=str(here))
    return here


def test_content_of_the_control_machine_comes_to_every_node_once(site: Site, corpus: Path) -> None:
    assert site.ids() == [["sync-missing"]] * 3
    site.converge()
    for node in NODES:
        assert site.files(node) == FILES
        assert (site.place(node) / "part/link").readlink() == Path("deep/说明.txt")
        assert (site.place(node) / "empty").is_dir()
        assert int((site.place(node) / "a.txt").stat().st_mtime) == 1_700_000_000
    assert site.ids() == [[]] * 3
    # The control machine gave to one, and each of the others took it from a node.
    assert site.given == [("", "node1"), ("node1", "node2"), ("node1", "node3")]
    assert len({sync.role.facts[0].read(site.state(node)) for node in NODES}) == 1
    assert not list((site.folder / "node2/data").glob(".*"))


def test_content_of_a_node_stays_there_and_comes_to_the_others(site: Site) -> None:
    site.write(site.place("node2", "models"))
    site.declare(models=f"node2:{site.data}/models")
    assert site.ids() == [["sync-missing"], ["sync-unread"], ["sync-missing"]]
    site.converge()
    assert site.ids() == [[]] * 3
    assert [site.files(node, "models") for node in NODES] == [FILES] * 3
    assert site.given[0] == ("node2", "node1") and len(site.given) == 2


def test_a_node_that_gives_from_elsewhere_has_it_in_place_too(site: Site) -> None:
    site.write(site.folder / "node1/srv/models")
    site.declare(models=f"node1:{site.at}/srv/models")
    site.converge()
    assert site.ids() == [[]] * 3
    assert [site.files(node, "models") for node in NODES] == [FILES] * 3
    assert ("node1", "node1") not in site.given


def test_a_copy_on_the_node_itself_that_fails_is_one_sentence(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.write(site.folder / "node1/srv/models")
    site.declare(models=f"node1:{site.at}/srv/models")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "rsync").write_text(
        "#!/bin/sh\necho 'rsync: write failed: No space left' >&2\necho 'rsync error: code 11' >&2\nexit 11\n"
    )
    (tools / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with pytest.raises(session.NodeFailed) as caught:
        site.converge("node1")
    assert str(caught.value) == "models could not be copied: rsync: write failed: No space left"


def test_what_the_origin_changed_or_lost_follows_and_only_that_travels(
    site: Site, corpus: Path
) -> None:
    site.converge()
    (corpus / "a.txt").write_bytes(b"changed")
    (corpus / "part/deep/说明.txt").unlink()
    (corpus / "part/deep").rmdir()
    (corpus / "part/link").unlink()
    (corpus / "new").mkdir()
    (corpus / "new/file").write_bytes(b"new")
    before = (site.place("node2") / "part/b c.bin").stat().st_ino
    assert site.ids() == [["sync-other"]] * 3
    assert all(found.disturbs for found in site.findings("node2"))
    site.converge()
    assert site.ids() == [[]] * 3
    want = {**FILES, "a.txt": b"changed", "new/file": b"new"}
    del want["part/deep/说明.txt"]
    assert [site.files(node) for node in NODES] == [want] * 3
    assert not (site.place("node1") / "part/deep").exists()
    assert (site.place("node2") / "part/b c.bin").stat().st_ino == before


def test_a_missing_file_is_named_and_brought_again(site: Site, corpus: Path) -> None:
    site.converge()
    (site.place("node3") / "a.txt").unlink()
    (site.place("node3") / "part/link").unlink()
    (site.place("node3") / "part/b c.bin").write_bytes(b"cut")
    (found,) = site.findings("node3")
    assert found.id == "sync-damaged"
    assert found.seen == "a.txt, part/b c.bin, part/link missing, cut or altered"
    site.given.clear()
    site.converge()
    assert site.ids() == [[]] * 3 and site.files("node3") == FILES
    assert site.given in ([("node1", "node3")], [("node2", "node3")])


def test_a_file_altered_with_the_same_size_and_time_is_found_by_the_deep_proof_alone(
    site: Site, corpus: Path
) -> None:
    site.converge()
    altered = site.place("node2") / "a.txt"
    time = altered.stat().st_mtime_ns
    altered.write_bytes(b"two\n" * 1000)
    os.utime(altered, ns=(time, time))
    assert site.ids() == [[]] * 3
    prove = {node: site._run(site.host(node), deep(site.target(node)), 60).stdout for node in NODES}
    assert prove["node1"] == prove["node3"] == ""
    assert prove["node2"].startswith("sync-damaged\tcorpus at ")
    assert prove["node2"].endswith("1 of its files missing, cut or altered, the first is a.txt")
    assert site.ids() == [[], ["sync-damaged"], []]
    site.converge()
    assert site.ids() == [[]] * 3 and site.files("node2") == FILES
    assert site._run(site.host("node2"), deep(site.target("node2")), 60).stdout == ""


def test_what_the_giver_itself_altered_is_for_the_user_to_judge(site: Site) -> None:
    site.write(site.place("node1", "models"))
    site.declare(models=f"node1:{site.data}/models")
    site.converge()
    altered = site.place("node1", "models") / "a.txt"
    time = altered.stat().st_mtime_ns
    altered.write_bytes(bytes(altered.stat().st_size))
    os.utime(altered, ns=(time, time))
    said = site._run(site.host("node1"), deep(site.target("node1")), 60).stdout
    assert said.startswith("sync-source-damaged\tmodels at ")
    assert "the first is a.txt\tcopy the right file back" in said


def test_a_file_whose_time_alone_changed_does_not_travel(site: Site, corpus: Path) -> None:
    site.converge()
    os.utime(site.place("node2") / "a.txt", (5, 5))
    assert site.ids("node2") == [["sync-damaged"]]
    site.given.clear()
    site.converge()
    assert site.ids() == [[]] * 3 and site.given == []


def test_what_others_put_there_is_moved_beside_and_never_lost(site: Site, corpus: Path) -> None:
    site.converge()
    place = site.place("node2")
    (place / "part/mine.txt").write_bytes(b"mine")
    (place / "notes").mkdir()
    (place / "notes/x y").write_bytes(b"x")
    (found,) = site.findings("node2")
    assert found.id == "sync-stray" and "notes/x y, part/mine.txt too" in found.seen
    site.converge()
    assert site.ids() == [[]] * 3 and site.files("node2") == FILES
    moved = {
        path.name: path.read_bytes()
        for path in place.parent.glob(".corpus.strays/*/**/*")
        if path.is_file()
    }
    assert moved == {"mine.txt": b"mine", "x y": b"x"}
    assert any("2 files that were not brought there" in line for line in site.said)


def test_files_of_others_in_the_place_are_never_overwritten(site: Site, corpus: Path) -> None:
    site.write(site.place("node2"), {"a.txt": b"of somebody else"})
    assert site.ids() == [["sync-missing"], ["sync-foreign"], ["sync-missing"]]
    with pytest.raises(
        session.NodeFailed, match=r"a\.txt was not brought there, and would be lost"
    ):
        site.converge("node2")
    assert site.files("node2") == {"a.txt": b"of somebody else"}
    assert [path.name for path in site.place("node2").parent.iterdir()] == ["corpus"]


def test_the_same_files_copied_there_by_hand_are_taken_over(site: Site, corpus: Path) -> None:
    site.write(site.place("node1"), {"a.txt": FILES["a.txt"], "-dash": FILES["-dash"]})
    inode = (site.place("node1") / "a.txt").stat().st_ino
    site.converge("node1")
    assert site.files("node1") == FILES
    assert (site.place("node1") / "a.txt").stat().st_ino == inode


def test_a_transfer_that_broke_off_goes_on_from_what_arrived(
    site: Site, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*arguments: Any) -> None:
        files = site.folder / "node1/data/.corpus.arriving/files"
        shutil.copy2(corpus / "a.txt", files / "a.txt")
        (files / "part").mkdir()
        (files / "part/b c.bin").write_bytes(FILES["part/b c.bin"][:200_000])
        raise session.NodeFailed("the connection broke")

    with monkeypatch.context() as patch:
        patch.setattr(core, "_bring", cut)
        with pytest.raises(session.NodeFailed, match="the connection broke"):
            site.converge("node1")
    assert not site.place("node1").exists()
    arrived = site.folder / "node1/data/.corpus.arriving/files"
    inodes = [(arrived / name).stat().st_ino for name in ("a.txt", "part/b c.bin")]
    site.converge("node1")
    assert site.files("node1") == FILES
    place = site.place("node1")
    assert [(place / name).stat().st_ino for name in ("a.txt", "part/b c.bin")] == inodes


def test_files_that_a_killed_run_still_brings_are_waited_for(site: Site, corpus: Path) -> None:
    arriving = site.folder / "node1/data/.corpus.arriving"
    arriving.mkdir()
    with (arriving / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(session.NodeFailed, match="still arrive, by a run that was ended: wait"):
            site.converge("node1")
    site.converge("node1")
    assert site.files("node1") == FILES


def test_a_power_cut_while_files_take_their_place_costs_none_of_them(
    site: Site, corpus: Path
) -> None:
    site.converge()
    (corpus / "a.txt").write_bytes(b"changed")
    (corpus / "extra").write_bytes(b"extra")
    place = site.place("node1")
    # As a cut leaves it: one new file is there, another old one is gone, and the old manifest stays.
    shutil.copy2(corpus / "extra", place / "extra")
    (place / "a.txt").unlink()
    site.converge()
    assert site.files("node1") == {**FILES, "a.txt": b"changed", "extra": b"extra"}
    assert site.ids() == [[]] * 3 and not list(place.parent.glob(".corpus.strays"))


def test_a_file_that_arrives_with_another_content_is_asked_for_once_more(
    site: Site, corpus: Path
) -> None:
    seen: list[str] = []

    def spoil(node: str) -> None:
        if node == "node1" and not seen:
            seen.append(node)
            path = site.folder / "node1/data/.corpus.arriving/files/a.txt"
            path.write_bytes(b"two\n" * 1000)

    site.before_settle = spoil
    site.converge("node1")
    assert site.files("node1") == FILES
    assert "corpus: 1 files arrived damaged, such as a.txt" in site.said


def test_content_that_is_wrong_again_and_again_is_never_put_in_place(
    site: Site, corpus: Path
) -> None:
    def spoil(node: str) -> None:
        (site.folder / node / "data/.corpus.arriving/files/a.txt").write_bytes(b"wrong")

    site.before_settle = spoil
    with pytest.raises(session.NodeFailed, match="another content"):
        site.converge("node1")
    assert not (site.place("node1") / "a.txt").exists()


def test_a_node_whose_files_went_bad_unseen_does_not_spread_them(site: Site, corpus: Path) -> None:
    site.converge("node1")
    altered = site.place("node1") / "a.txt"
    altered.write_bytes(b"two\n" * 1000)
    os.utime(altered, (1_700_000_000, 1_700_000_000.25))
    site.converge("node2")
    assert site.files("node2") == FILES
    assert site.given == [("", "node1"), ("node1", "node2"), ("", "node2")]


def test_a_node_that_cannot_give_is_passed_over(site: Site, corpus: Path) -> None:
    site.refusing = {"node1"}
    site.converge()
    assert [site.files(node) for node in NODES] == [FILES] * 3
    assert site.given == [("", "node1"), ("", "node2"), ("node2", "node3")]
    assert any(line.startswith("node1 gives no more of corpus") for line in site.said)


def test_an_origin_that_is_gone_leaves_what_was_brought_and_is_named_where_it_lacks(
    site: Site, corpus: Path
) -> None:
    site.converge("node1", "node2")
    shutil.rmtree(corpus)
    assert site.ids() == [[], [], ["sync-source"]]
    (found,) = site.findings("node3")
    assert not found.repairable and str(corpus) in found.want


def test_an_origin_node_that_is_dead_leaves_what_was_brought(site: Site) -> None:
    site.write(site.place("node1", "models"))
    site.declare(models=f"node1:{site.data}/models")
    site.converge("node1", "node2")
    site.gone = {"node1"}
    assert site.ids("node2", "node3") == [[], ["sync-source"]]
    assert site.findings("node3")[0].seen == "node1 cannot be read"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda d: (d / "out").symlink_to("/etc/passwd"), "the link out, which leads out of it, to /etc/passwd"),
        (lambda d: (d / "part/w").symlink_to("link/../.."), "the link part/w, which leads out of it, to link/../.."),
        (lambda d: (d / "w").symlink_to("part/.."), "the link w, which leads out of it, to part/.."),
        (lambda d: (d / "part/up").symlink_to("../../x"), "the link part/up, which leads out of it"),
        (lambda d: os.mkfifo(d / "pipe"), "pipe, which is no file, directory or link"),
        (lambda d: (d / "a\nb").write_text(""), "a name with a line break, a tab or a backslash"),
        (lambda d: (d / "a\tb").write_text(""), "a name with a line break, a tab or a backslash"),
        (lambda d: (d / "a\\b").write_text(""), "a name with a line break, a tab or a backslash: a\\b"),
        (lambda d: Path(os.fsdecode(os.fsencode(d) + b"/\xff")).touch(), "a name that is no UTF-8"),
    ],
)  # fmt: skip
def test_what_nodes_could_not_have_alike_is_named_before_anything_travels(
    site: Site, corpus: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(corpus)
    (found,) = site.findings("node1")
    assert found.id == "sync-source" and found.seen.startswith(f"it holds {reason}")


def test_an_origin_without_a_file_takes_nothing_from_the_nodes(site: Site, corpus: Path) -> None:
    site.converge()
    for path in corpus.rglob("*"):
        if not path.is_dir():
            path.unlink()
    assert site.ids() == [[]] * 3
    site.converge()
    assert site.files("node1") == FILES


def test_links_inside_are_given_as_they_are(site: Site, corpus: Path) -> None:
    (corpus / "up").mkdir()
    (corpus / "up/back").symlink_to("../part/./deep")
    assert site.ids("node1") == [["sync-missing"]]
    site.converge("node1")
    (corpus / "up/back").unlink()
    (corpus / "up/back").symlink_to("../part")
    site.converge("node1")
    assert (site.place("node1") / "up/back").readlink() == Path("../part")


def test_too_little_room_is_told_before_the_first_byte(site: Site, corpus: Path) -> None:
    values = yaml.safe_load((site.folder / "cluster.yaml").read_text())
    values["storage"]["free"] = 10**9
    (site.folder / "cluster.yaml").write_text(yaml.safe_dump(values))
    site.cluster = registry.read(site.folder / "cluster.yaml")
    with pytest.raises(
        session.NodeFailed, match=r"corpus needs 0\.3 MB more, and 0\.0 MB may be used .* make room"
    ):
        site.converge("node1")
    assert site.given == [] and not site.place("node1").exists()


def test_a_file_in_place_of_a_directory_and_the_other_way_round(site: Site, corpus: Path) -> None:
    site.converge("node1")
    shutil.rmtree(corpus / "part")
    (corpus / "part").write_bytes(b"now a file")
    (corpus / "a.txt").unlink()
    site.write(corpus / "a.txt", {"inside": b"x"})
    site.converge("node1")
    assert site.ids("node1") == [[]]
    assert site.files("node1")["part"] == b"now a file"
    assert site.files("node1")["a.txt/inside"] == b"x"


def test_a_file_that_others_put_where_a_new_one_comes_is_kept_beside(
    site: Site, corpus: Path
) -> None:
    site.converge("node1")
    (site.place("node1") / "new").write_bytes(b"theirs")
    (corpus / "new").write_bytes(b"ours")
    site.converge("node1")
    assert site.files("node1")["new"] == b"ours"
    (kept,) = site.place("node1").parent.glob(".corpus.strays/*/new")
    assert kept.read_bytes() == b"theirs"


def test_the_origin_is_read_again_only_where_size_or_time_changed(
    site: Site, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.converge("node1")
    log, tools = tmp_path / "log", tmp_path / "tools"
    tools.mkdir()
    (tools / "sha256sum").write_text(
        f'#!/bin/sh\nif test "$1" = --; then printf "%s\\n" "$@" >>{log}; fi\nexec /usr/bin/sha256sum "$@"\n'
    )
    (tools / "sha256sum").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    (corpus / "a.txt").write_bytes(b"changed")
    site.taking = "node1"
    step = next(
        iter(converge(site.target("node1"), site.state("node1"), {}, site.findings("node1")))
    )
    assert isinstance(step, Mirror)
    log.unlink(missing_ok=True)
    Spread(step, site.cluster.nodes, lambda name: True).manifest(site.host("node1"))
    assert log.read_text().split() == ["--", "./a.txt"]


@pytest.mark.parametrize(
    "asked",
    [
        "rsync --server --sender -tpRe.iLsfxCIvu --files-from=- --from0 --remove-source-files . .",
        "rsync --server --sender -tpLRe.iLsfxCIvu --files-from=- --from0 . .",
        "rsync --server --sender -tpRe.iLsfxCIvu --files-from=/etc/shadow --from0 . .",
        "rsync --server --sender -tpRe.iLsfxCIvu . /etc",
        "rsync --server -tpRe.iLsfxCIvu . .",
        "rsync --server --sender -e.;id . .",
        "cat /etc/shadow",
        "",
    ],
)
def test_a_giver_gives_nothing_but_files_of_its_directory(tmp_path: Path, asked: str) -> None:
    gift = f"root= tree={shlex.quote(str(tmp_path))}{core.GIVE}"
    done = subprocess.run(
        ["sh", "-c", gift],
        env={**os.environ, "SSH_ORIGINAL_COMMAND": asked},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "it wants something else than these files\n"


def test_nodes_take_from_those_that_have_it_and_none_is_asked_by_two_at_once(site: Site) -> None:
    step = Mirror("x", None, "/x", "/p", "/l", Path("m"), "s", "w", "f", "", "", "", "")
    spread = Spread(step, {}, lambda name: True)
    assert spread.claim("node1", set()) is None
    waiting = gevent.spawn(spread.claim, "node2", set())
    gevent.sleep(0.3)
    assert not waiting.ready()  # the control machine gives once
    spread.release(None)
    gevent.sleep(0.3)
    assert not waiting.ready()  # node1 checks what arrived
    spread.over("node1", True)
    assert waiting.get(timeout=5) == "node1"
    third = gevent.spawn(spread.claim, "node3", set())
    gevent.sleep(0.3)
    assert not third.ready()
    spread.release("node1")
    assert third.get(timeout=5) == "node1"
    spread.over("node2", True)
    assert spread.claim("node4", set()) == "node2"
    with pytest.raises(session.NodeFailed, match="nobody can give x"):
        spread.claim("node5", {None, "node1", "node2"})


@pytest.mark.parametrize("number", [4, 8])
def test_where_no_node_can_take_from_another_all_get_it_from_the_control_machine(
    number: int,
) -> None:
    step = Mirror("x", None, "/x", "/p", "/l", Path("m"), "s", "w", "f", "", "", "", "")
    spread = Spread(step, {}, lambda name: True)

    def take(name: str) -> bool:
        refused = set[str | None]()
        while (giver := spread.claim(name, refused)) is not None:
            gevent.sleep(0.01)
            refused.add(giver)
            spread.release(giver)
        gevent.sleep(0.01)
        spread.release(giver)
        spread.over(name, True)
        return True

    taking = [gevent.spawn(take, f"node{n}") for n in range(number)]
    gevent.joinall(taking, timeout=20)
    try:
        assert [each.value for each in taking] == [True] * number
    finally:
        gevent.killall(taking)


def test_a_node_that_gives_its_own_is_waited_for_though_three_others_refused() -> None:
    step = Mirror("x", "node1", "/x", "/p", "/l", Path("m"), "s", "w", "f", "", "", "", "")
    spread = Spread(step, {}, lambda name: True)
    for name in ("node2", "node3", "node4"):
        spread.over(name, True)
    assert spread.claim("node5", set()) == "node1"
    waiting = gevent.spawn(spread.claim, "node6", {"node2", "node3", "node4"})
    gevent.sleep(0.3)
    assert not waiting.ready()
    spread.release("node1")
    assert waiting.get(timeout=5) == "node1"


def test_where_the_first_taker_fails_the_control_machine_gives_again(site: Site) -> None:
    step = Mirror("x", None, "/x", "/p", "/l", Path("m"), "s", "w", "f", "", "", "", "")
    spread = Spread(step, {}, lambda name: True)
    assert spread.claim("node1", set()) is None
    waiting = gevent.spawn(spread.claim, "node2", set())
    spread.release(None)
    spread.over("node1", False)
    assert waiting.get(timeout=5) is None


def test_a_model_that_the_head_has_fetched_is_given_on(site: Site) -> None:
    site.write(site.place("node1", "models/llama"))
    site.declare(fetch={"llama": {"directory": "../llama", "path": f"{site.data}/models/llama"}})
    assert site.ids() == [["sync-unread"], ["sync-missing"], ["sync-missing"]]
    site.converge()
    assert site.ids() == [[]] * 3 and site.files("node3", "models/llama") == FILES


@pytest.mark.parametrize(
    ("storage", "key", "sentence"),
    [
        ({"sync": {"x": {"from": "node9:/x"}}}, "sync.x.from", "'node9' is no node of this cluster"),
        ({"sync": {"x": {"from": "node1:x"}}}, "sync.x.from", "'node1:x' is no directory of a node: write NODE:/PATH"),
        ({"sync": {"x": {"from": "node1:/a/../b"}}}, "sync.x.from", "leads upwards"),
        ({"sync": {"x": {"from": ""}}}, "sync.x.from", "is no directory"),
        ({"sync": {"x": {"from": "node1:/etc"}}}, "sync.x.from", "/etc belongs to the system"),
        ({"sync": {"x": {"from": "node1:/data"}}}, "sync.x.from", "/data and /data/x, which is kept the same on node1, overlap"),
        ({"sync": {"x": {"from": "node1:/data/x/y"}}}, "sync.x.from", "/data/x/y and /data/x"),
        ({"sync": {"x": {"from": "/x"}, "y": {"from": "node1:/data/x"}}}, "sync.y.from", "/data/x and /data/x"),
        ({"sync": {"a/b": {"from": "/x"}}}, "sync", "is no name of a directory here"),
        ({"sync": {"runs": {"from": "/x"}}}, "sync", "'runs' is where jobs keep their run directories"),
        ({"sync": {"x": {"source": "/x"}}}, "sync.x", "from"),
        ({"path": "data"}, "path", "'data' is no absolute path"),
        ({"path": "/var"}, "path", "/var belongs to the system"),
        ({"server": "node1"}, "server", "belongs to kind: nfs; leave it out, or say kind: nfs"),
        ({"kind": "existing", "sync": {"x": {"from": "/x"}}}, "sync", "belongs to kind: local"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_told_with_its_place(
    tmp_path: Path, storage: dict[str, Any], key: str, sentence: str
) -> None:
    nodes = {"node1": {"address": "10.0.0.1"}, "node2": {"address": "10.0.0.2"}}
    values = {
        "cluster": "lab",
        "nodes": nodes,
        "storage": {"kind": "local", "path": "/data", **storage},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SchemaProblem) as caught:
        registry.read(tmp_path / "cluster.yaml")
    assert any(
        f"storage.{key}" in str(problem) and sentence in str(problem)
        for problem in caught.value.problems
    ), str(caught.value)


def test_a_node_may_give_what_lies_in_its_place(tmp_path: Path) -> None:
    nodes = {"node1": {"address": "10.0.0.1", "local": True}, "node2": {"address": "10.0.0.2"}}

    def read(source: str) -> Cluster:
        storage = {"kind": "local", "path": "/data", "sync": {"x": {"from": source}}}
        values = {"cluster": "lab", "nodes": nodes, "storage": storage}
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(values))
        return registry.read(tmp_path / "cluster.yaml")

    assert declared.entries(read("node1:/data/x"))[0].is_given_by("node1")
    with pytest.raises(SchemaProblem, match="say from: node1:/data/x"):
        read("/data/x")


def modes(place: Path) -> dict[str, int]:
    return {
        str(path.relative_to(place)): path.stat().st_mode & 0o7777
        for path in [place, *place.rglob("*")]
        if path.is_dir() and not path.is_symlink()
    }


def test_directories_have_the_modes_of_the_origin(site: Site, corpus: Path) -> None:
    corpus.chmod(0o700)
    (corpus / "part").chmod(0o2750)
    (corpus / "empty").chmod(0o1777)
    site.converge()
    want = {".": 0o700, "part": 0o2750, "part/deep": 0o755, "empty": 0o1777}
    assert [modes(site.place(node)) for node in NODES] == [want] * 3
    (corpus / "part").chmod(0o700)
    site.place("node2").chmod(0o755)
    assert site.ids() == [["sync-other"]] * 3
    site.converge()
    assert [modes(site.place(node)) for node in NODES] == [{**want, "part": 0o700}] * 3
    assert site.ids() == [[]] * 3
    (site.place("node3") / "part").chmod(0o755)
    (found,) = site.findings("node3")
    assert (found.id, found.seen) == ("sync-damaged", "part/ missing, cut or altered")


def strays(site: Site, node: str) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in site.place(node).parent.glob(".corpus.strays/*/**/*")
        if path.is_file() and not path.is_symlink()
    }


def test_what_somebody_edited_is_moved_beside_when_the_origin_has_another_or_none(
    site: Site, corpus: Path
) -> None:
    site.converge()
    (site.place("node1") / "a.txt").write_bytes(b"edited a")
    (site.place("node1") / "-dash").write_bytes(b"edited dash")
    (corpus / "a.txt").unlink()
    site.converge()
    assert strays(site, "node1") == {"a.txt": b"edited a", "-dash": b"edited dash"}
    assert strays(site, "node2") == {}
    assert "a.txt" not in site.files("node2") and site.files("node1")["-dash"] == b"dash"


def test_a_run_says_how_many_files_it_will_remove(site: Site, corpus: Path) -> None:
    site.converge()
    (corpus / "new").write_bytes(b"new")
    (found,) = site.findings("node1")
    assert found.fix.endswith("; no file is removed")
    (corpus / "a.txt").unlink()
    (corpus / "part/link").unlink()
    (found,) = site.findings("node1")
    assert (
        f"; 2 files that {corpus} on this machine no longer has: removed, or moved to " in found.fix
    )
    site.converge("node2")
    (found,) = site.findings("node1")
    assert "; what " in found.fix  # the origin was read since
    site.converge()
    assert strays(site, "node1") == {} and "a.txt" not in site.files("node1")


def test_where_more_than_half_would_go_it_is_moved_beside(site: Site, corpus: Path) -> None:
    site.converge("node1")
    shutil.rmtree(corpus / "part")
    (corpus / "a.txt").unlink()
    site.converge("node1")
    assert set(site.files("node1")) == {"#odd; name", "-dash"}
    assert strays(site, "node1") == {
        Path(name).name: content
        for name, content in FILES.items()
        if name == "a.txt" or name.startswith("part/")
    }


@pytest.mark.parametrize("long", [False, True])
def test_files_of_an_earlier_connection_are_waited_for(
    site: Site, corpus: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    site.converge("node1")
    if long:
        monkeypatch.setattr(core, "LOCK_SECONDS", 1)
    holding: list[Any] = []

    @contextmanager
    def entered(gift: str, giver: Any, taker: Any, places: Any, before: str) -> Iterator[Way]:
        lock = site.folder / "node2/data/.corpus.arriving/lock"
        holder = subprocess.Popen(["flock", str(lock), "sleep", "6" if long else "2"])
        holding.append(holder)
        gevent.sleep(0.5)
        with site._entered(gift, giver, taker, places, before) as way:
            yield way

    monkeypatch.setattr(relay, "entered", entered)
    site.converge("node2")
    assert site.files("node2") == FILES
    assert site.given[1:] == [("node1", "node2"), *([("", "node2")] if long else [])]
    assert long == any(
        "files of it still arrive by an earlier connection" in each for each in site.said
    )
    for holder in holding:
        holder.kill()
        holder.wait()


def test_a_hash_that_went_wrong_at_the_origin_is_read_again_by_the_next_run(
    site: Site, corpus: Path
) -> None:
    site.converge("node1")
    (corpus / "-dash").write_bytes(b"hsad")
    os.utime(corpus / "-dash", (1_700_000_000, 1_700_000_000.25))
    site.refusing = {"node1"}
    with pytest.raises(session.NodeFailed, match="corpus, such as -dash, arrived with another"):
        site.converge("node2")
    site.converge("node2")
    assert site.files("node2")["-dash"] == b"hsad"


def test_the_hash_of_a_file_that_changed_just_before_is_not_kept(site: Site, corpus: Path) -> None:
    fresh = corpus / "a.txt"
    fresh.write_bytes(b"one")
    time = fresh.stat().st_mtime
    site.converge("node1")
    fresh.write_bytes(b"two")
    os.utime(fresh, (time, time))
    site.converge("node2")
    assert site.files("node2")["a.txt"] == b"two"


def test_names_that_are_no_utf8_are_told_without_their_odd_bytes(site: Site, corpus: Path) -> None:
    site.converge("node1")
    place = os.fsencode(site.place("node1"))
    Path(os.fsdecode(place + b"/mine-\xff")).write_bytes(b"mine")
    site.converge("node1")
    assert any("such as mine-, lie in" in line for line in site.said)
    assert strays(site, "node1") == {os.fsdecode(b"mine-\xff"): b"mine"}
    foreign = site.place("node2")
    foreign.mkdir()
    Path(os.fsdecode(os.fsencode(foreign) + b"/x\xff")).write_bytes(b"")
    with pytest.raises(session.NodeFailed, match="corpus/x was not brought there"):
        site.converge("node2")


def test_a_first_bring_that_is_cut_while_files_take_their_place_is_not_foreign(
    site: Site, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    with monkeypatch.context() as patch:
        # The files are there; the power goes before they are on the disk.
        (tools / "sync").write_text("#!/bin/sh\nexit 9\n")
        (tools / "sync").chmod(0o755)
        patch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        with pytest.raises(session.NodeFailed):
            site.converge("node1")
    (corpus / "a.txt").write_bytes(b"changed")
    assert site.ids("node1") == [["sync-other"]]
    site.converge("node1")
    assert site.files("node1") == {**FILES, "a.txt": b"changed"}


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a script before a program of this machine, which it finds as $real."""
    folder = tmp_path / "tools"
    folder.mkdir()
    usual = os.environ["PATH"]

    def put(name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\nreal={shutil.which(name, path=usual)}\n{script}\n")
        (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{usual}")

    return put


def test_the_room_of_a_disk_that_is_mounted_at_the_place_counts(
    site: Site, corpus: Path, tool: Callable[[str, str], None]
) -> None:
    site.place("node1").mkdir()
    tool(
        "df",
        'shift; echo Filesystem; for each; do case $each in .) free=9000000 ;; *) free=100 ;; esac; echo "x 1 1 $free 1% /"; done',
    )
    with pytest.raises(session.NodeFailed, match=r"0\.3 MB more, and 0\.1 MB may be used"):
        site.converge("node1")
    assert site.given == [] and site.files("node1") == {}


@pytest.mark.parametrize("calls", range(8))
def test_a_power_cut_at_any_rename_loses_no_file_of_anybody(
    site: Site, corpus: Path, tool: Callable[[str, str], None], tmp_path: Path, calls: int
) -> None:
    site.converge()
    (corpus / "a.txt").write_bytes(b"changed")
    (corpus / "part/extra").write_bytes(b"extra")
    place = site.place("node1")
    mine = {"a.txt": b"edited", "mine": b"mine", "part/own": b"mine too"}
    for name, content in mine.items():
        (place / name).write_bytes(content)
    count = tmp_path / "count"
    count.write_text("0")
    counted = f"read n <{count}; echo $((n + 1)) >{count}; test $n != {calls} || exit 9"
    tool("mv", f'case $PWD$* in *node1*) {counted} ;; esac; exec $real "$@"')
    try:
        site.converge("node1")
        whole = True
    except session.NodeFailed:
        whole = False
    assert whole == (int(count.read_text()) <= calls)
    site.converge()
    assert site.files("node1") == {**FILES, "a.txt": b"changed", "part/extra": b"extra"}
    assert strays(site, "node1") == {Path(name).name: each for name, each in mine.items()}
    assert (place.parent / ".corpus.strays").stat().st_mode & 0o777 == 0o700
    assert site.ids() == [[]] * 3


def test_what_changes_while_it_is_listed_is_told_and_nothing_is_lost(
    site: Site, corpus: Path, tool: Callable[[str, str], None], tmp_path: Path
) -> None:
    site.converge()
    (corpus / "a.txt").write_bytes(b"changed")
    gone = tmp_path / "gone"
    gone.touch()
    tool(
        "find",
        f'$real "$@"; code=$?; case $PWD in */data/corpus) test ! -e {gone} || exit 1 ;; esac; exit $code',
    )
    with pytest.raises(session.NodeFailed, match="corpus changed while it was looked at: converge"):
        site.converge("node1")
    assert site.files("node1") == FILES
    gone.unlink()
    site.converge("node1")
    assert site.files("node1") == {**FILES, "a.txt": b"changed"}


def test_a_name_with_the_words_of_a_failed_proof_is_told_as_it_is(site: Site, corpus: Path) -> None:
    name = "x: FAILED open or read.txt"
    (corpus / name).write_bytes(b"x")
    (corpus / "y: FAILED").write_bytes(b"y")
    site.converge("node1")
    (site.place("node1") / name).write_bytes(b"z")
    (site.place("node1") / "y: FAILED").unlink()
    said = site._run(site.host("node1"), deep(site.target("node1")), 60).stdout
    assert "2 of its files" in said
    notes = site.folder / "node1/notes/declared/corpus/damaged"
    assert notes.read_text().splitlines() == [name, "y: FAILED"]
    site.converge("node1")
    assert site.files("node1")[name] == b"x" and site.ids("node1") == [[]]


def test_a_directory_of_the_control_machine_that_hangs_is_named(
    site: Site, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "find").write_text("#!/bin/sh\nexec sleep 30\n")
    (tools / "find").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(sys.modules[given_here.__module__], "SECONDS", 1)
    given_here.cache_clear()
    given = given_here(str(corpus), tmp_path / "none")
    assert given.refused.startswith("it was not looked at within 1 seconds")


def test_too_little_room_leaves_no_folder(site: Site, corpus: Path) -> None:
    test_too_little_room_is_told_before_the_first_byte(site, corpus)
    assert not list((site.folder / "node1/data").glob(".*"))


def test_a_cut_answer_is_no_state(site: Site, corpus: Path) -> None:
    site.converge()
    text = site._run(site.host("node2"), probe(site.target("node2")), 60).stdout
    parse(text)
    for cut in range(1, len(text)):
        with pytest.raises(Unreadable):
            parse(text[:-cut])


def test_nothing_is_asked_where_nothing_is_kept_the_same(site: Site) -> None:
    site.declare()
    assert probe(site.target("node1")) == "echo directories 0\necho end\n"
    assert site.ids() == [[]] * 3
