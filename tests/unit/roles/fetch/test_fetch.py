"""The fetch role on this machine: a hub on the loopback interface, the role's own shell, the storage a folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from inventory.errors import SchemaProblem
from roles import fetch, registry
from roles.core.role import Finding, Target
from roles.core.steps import Download, Here, Shell, Step, Upload
from roles.fetch.converge import converge, program, workshop
from roles.fetch.drift import remarks
from roles.fetch.hub import MANIFEST, STAMP, Asked, File, Refused, checked, chosen, manifest, safe
from roles.fetch.probe import FetchState, parse, probe
from roles.fetch.proof import deep, proof
from roles.fetch.spec import FetchSpec
from tests.local_hub import LocalHub, local_hub

WEIGHTS = os.urandom(9_000_000)
"""Large enough to travel by itself."""
FILES = {
    "config.json": b'{"model_type": "llama"}',
    ".gitattributes": b"*.safetensors lfs",
    "tokenizer.json": b"{}" * 900,
    "weights/model 1.safetensors": WEIGHTS,
    "说明.txt": b"text",
}
TOKEN = "hf_TheSecretOfThisTest"


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with local_hub() as found:
        yield found


class Failed(Exception):
    """A step ended with this sentence."""


class Site:
    """A cluster of two nodes; its shared storage is a folder, and the head is this machine."""

    def __init__(self, folder: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.hub = folder, hub
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.said: list[str] = []
        self.commands: list[str] = []
        self.options: dict[str, object] = {}
        monkeypatch.setenv("LOCKSTEP_STATE", str(folder / "state"))

    def declare(self, environments: Any = None, **entries: Any) -> Path:
        """Write the cluster file."""
        for one in entries.values():
            if "model" in one or "dataset" in one:
                one.setdefault("endpoint", self.hub.address)
        declared: dict[str, Any] = {
            "cluster": "lab",
            "nodes": {"node1": {"address": "10.0.0.1"}, "node2": {"address": "10.0.0.2"}},
            "storage": {"kind": "existing", "path": str(self.shared)},
            "fetch": entries,
        }
        if environments:
            declared["environments"] = environments
        path = self.folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(declared))
        return path

    def target(self, node: str = "node1") -> Target[FetchSpec]:
        cluster = registry.read(self.folder / "cluster.yaml")
        object.__setattr__(cluster, "options", self.options)
        spec = cluster.section("fetch", FetchSpec)
        assert spec is not None
        return Target(cluster, cluster.nodes[node], spec)

    def state(self, node: str = "node1") -> FetchState:
        return parse(self.shell(probe(self.target(node))).rstrip("\n"))

    def findings(self, node: str = "node1") -> list[Finding]:
        return fetch.role.drift(self.target(node), self.state(node), {})

    def ids(self) -> list[str]:
        return [finding.id for finding in self.findings()]

    def shell(self, script: str) -> str:
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
        if done.returncode:
            raise Failed(done.stderr.strip().splitlines()[-1])
        return done.stdout

    def carry_out(self, step: Step) -> None:
        match step:
            case Shell():
                self.said.append(self.shell(f"set -e\n{step.command}"))
                self.commands.append(step.command)
            case Download():
                step.destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(step.source, step.destination)
            case Upload():
                self.said.append(f"upload {Path(step.destination).name}")
                shutil.copyfile(step.source, step.destination)
                seen = self.shell(f"sha256sum < '{step.destination}'")
                assert seen.startswith(step.sha256)
            case Here():
                done = subprocess.run(step.command, capture_output=True, text=True)
                self.commands.append(" ".join(step.command))
                self.said += [done.stdout, done.stderr]
                if done.returncode:
                    raise Failed(done.stderr.strip())
            case _:
                raise AssertionError(step)

    def converge(self) -> None:
        """Until nothing is to be mended; raises Failed."""
        findings = self.findings()
        for step in converge(self.target(), self.state(), {}, findings):
            self.carry_out(step)
        assert self.findings() == []

    def cut_off(self) -> None:
        """A run that ends when the first large file has arrived."""
        for step in converge(self.target(), self.state(), {}, self.findings()):
            self.carry_out(step)
            if isinstance(step, Upload):
                return

    def refused(self) -> str:
        with pytest.raises(Failed) as caught:
            self.converge()
        sentence = str(caught.value)
        assert "\n" not in sentence and "Traceback" not in sentence
        return sentence


@pytest.fixture
def site(tmp_path: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, hub, monkeypatch)


def content(folder: Path) -> dict[str, bytes]:
    """The files below it, without Lockstep's own."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".lockstep-")
    }


def test_a_model_lies_on_the_storage_once_and_a_second_run_asks_nobody(site: Site) -> None:
    commit = site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    assert site.ids() == ["fetch-missing"]
    site.converge()
    place = site.shared / "models" / "llama"
    assert content(place) == FILES
    stamp = json.loads((place / STAMP).read_text())
    assert (stamp["commit"], stamp["revision"], stamp["files"]) == (commit, "main", len(FILES))
    assert sorted(path.name for path in place.parent.iterdir()) == ["llama"]
    assert {oct(path.stat().st_mode & 0o777) for path in place.rglob("*") if path.is_file()} == {
        "0o644"
    }
    assert not workshop(
        site.target().cluster, site.target().spec.each(site.target().cluster)[0]
    ).exists()
    site.hub.forget()
    assert site.findings() == [] and site.hub.asked == []
    assert site.shell(proof(site.target())) == site.shell(deep(site.target())) == ""
    assert site.shell(proof(site.target("node2"))) == ""


def test_a_worker_sees_the_same_and_has_nothing_to_mend(site: Site) -> None:
    site.hub.model("org/llama", {"config.json": b"{}"})
    site.declare(llama={"model": "org/llama"})
    site.converge()
    (place,) = (site.shared / "models").iterdir()
    (place / "config.json").unlink()
    assert site.findings("node2") == []
    (fact,) = fetch.role.facts
    assert fact.read(site.state("node1")) == fact.read(site.state("node2")) is not None


def test_a_file_that_broke_off_is_continued(site: Site) -> None:
    files = {"model.safetensors": os.urandom(25_000_000)}
    site.hub.model("org/llama", files)
    site.hub.cut["model.safetensors"] = 15_000_000
    site.declare(llama={"model": "org/llama"})
    site.converge()
    assert content(site.shared / "models" / "llama") == files
    (continued,) = [line for line in site.hub.asked if "bytes=" in line]
    assert "bytes=0-" not in continued


def test_what_another_run_brought_is_not_fetched_or_sent_again(site: Site) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.cut_off()
    site.hub.forget()
    site.said.clear()
    site.converge()
    assert site.hub.fetched == []
    assert [line for line in site.said if line.startswith("upload")] == ["upload small.tar"]
    assert content(site.shared / "models" / "llama") == FILES


@pytest.mark.parametrize(
    "damage",
    [
        lambda place: (place / "config.json").unlink(),
        lambda place: (place / "weights/model 1.safetensors").write_bytes(b"cut"),
        lambda place: (place / "tokenizer.json").write_bytes(b""),
    ],
)
def test_a_missing_or_cut_file_is_named_and_it_alone_fetched_again(site: Site, damage: Any) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.converge()
    place = site.shared / "models" / "llama"
    damage(place)
    (finding,) = site.findings()
    assert finding.id == "fetch-damaged" and finding.disturbs and finding.shared
    (named,) = [path for path in FILES if path in finding.seen]
    assert site.shell(proof(site.target())).startswith("fetch-damaged\tllama at ")
    site.hub.forget()
    site.converge()
    assert site.hub.fetched == [named]
    assert content(place) == FILES


def test_an_altered_file_of_the_same_size_is_found_by_the_deep_proof_and_mended(site: Site) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.converge()
    place = site.shared / "models" / "llama"
    altered = place / "weights" / "model 1.safetensors"
    altered.write_bytes(b"\0" + WEIGHTS[1:])
    assert site.findings() == [] and site.shell(proof(site.target())) == ""
    told = site.shell(deep(site.target()))
    assert told.startswith("fetch-damaged\tllama") and "weights/model 1.safetensors" in told
    assert site.ids() == ["fetch-damaged"]
    site.hub.forget()
    site.converge()
    assert site.hub.fetched == ["weights/model 1.safetensors"]
    assert content(place) == FILES and site.shell(deep(site.target())) == ""


def test_a_branch_is_resolved_once_and_again_only_when_it_is_asked_for(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.converge()
    second = site.hub.model("org/llama", {**FILES, "config.json": b"{}", "new.txt": b"new"})
    assert site.findings() == []
    place = site.shared / "models" / "llama"
    (place / "config.json").unlink()
    site.converge()
    assert content(place) == FILES  # mended from the commit that it is
    assert json.loads((place / STAMP).read_text())["commit"] == first
    site.options = {"refresh": "llama"}
    for module in ("drift", "converge"):  # another run
        monkeypatch.setattr(sys.modules[f"roles.fetch.{module}"], "RUN", "another")
    assert site.ids() == ["fetch-refresh"]
    site.hub.forget()
    site.converge()
    assert sorted(site.hub.fetched) == ["config.json", "new.txt"]
    assert json.loads((place / STAMP).read_text())["commit"] == second
    assert content(place)["new.txt"] == b"new"


def test_a_branch_is_followed_also_where_a_file_is_damaged(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.converge()
    second = site.hub.model("org/llama", {**FILES, "new.txt": b"new"})
    place = site.shared / "models" / "llama"
    (place / "config.json").unlink()
    site.options = {"refresh": "llama"}
    for module in ("drift", "converge"):  # another run
        monkeypatch.setattr(sys.modules[f"roles.fetch.{module}"], "RUN", "another")
    site.converge()
    assert json.loads((place / STAMP).read_text())["commit"] == second


def test_a_refresh_of_what_follows_no_branch_is_told(site: Site) -> None:
    site.declare(llama={"model": "org/llama"}, pinned={"model": "org/x", "revision": "0" * 40})

    def told(node: str = "node1", **options: object) -> list[str]:
        site.options = options
        return [line for line, _ in remarks(site.target(node), FetchState(), {}, False)]

    assert told() == told(refresh="llama") == told(refresh="all") == []
    for name in ("lama", "pinned"):
        assert told(refresh=name) == [
            f"--data refresh={name} follows nothing: give one of llama, all"
        ]
    assert told("node2", refresh="lama") == []


def test_a_commit_is_not_resolved_and_another_one_replaces_it(site: Site) -> None:
    first = site.hub.model("org/llama", FILES)
    second = site.hub.model("org/llama", {"config.json": b"other"})
    site.declare(llama={"model": "org/llama", "revision": first})
    site.converge()
    assert not any("/revision/" in line for line in site.hub.asked)
    site.options = {"refresh": "all"}
    assert site.findings() == []
    site.declare(llama={"model": "org/llama", "revision": second})
    (finding,) = site.findings()
    assert finding.id == "fetch-other" and finding.disturbs
    site.converge()
    assert content(site.shared / "models" / "llama") == {"config.json": b"other"}


def test_patterns_take_and_leave_files_and_a_change_of_them_keeps_the_commit(site: Site) -> None:
    first = site.hub.model("org/llama", FILES)
    site.declare(
        llama={"model": "org/llama", "include": ["*.json", "weights/"], "exclude": ["token*"]}
    )
    site.converge()
    place = site.shared / "models" / "llama"
    assert sorted(content(place)) == ["config.json", "weights/model 1.safetensors"]
    site.hub.model("org/llama", {"config.json": b"moved on"})
    site.hub.forget()
    site.declare(llama={"model": "org/llama", "include": ["*.json"]})
    assert site.ids() == ["fetch-other"]
    site.converge()
    assert sorted(content(place)) == ["config.json", "tokenizer.json"]
    assert site.hub.fetched == ["tokenizer.json"]
    assert json.loads((place / STAMP).read_text())["commit"] == first


def test_a_data_set_and_a_model_lie_side_by_side(site: Site) -> None:
    site.hub.model("org/llama", {"config.json": b"{}"})
    site.hub.dataset("org/corpus", {"data/part-0.txt": b"one", "data/part-1.txt": b"two"})
    site.declare(
        llama={"model": "org/llama"},
        corpus={"dataset": "org/corpus", "path": str(site.shared / "text/corpus")},
    )
    assert site.ids() == ["fetch-missing", "fetch-missing"]
    site.converge()
    assert content(site.shared / "text" / "corpus") == {
        "data/part-0.txt": b"one",
        "data/part-1.txt": b"two",
    }


def test_the_head_fetches_with_its_environment(site: Site, tmp_path: Path) -> None:
    site.hub.model("org/llama", FILES)
    prefix = tmp_path / "env"
    library = prefix / "lib/python3.11/site-packages/huggingface_hub"
    (prefix / "bin").mkdir(parents=True)
    python = prefix / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    archive = tmp_path / "env.tar"
    archive.write_bytes(b"")
    environments = {"main": {"archive": str(archive), "prefix": str(prefix)}}
    site.declare(environments, llama={"model": "org/llama", "on": "head"})
    (finding,) = site.findings()
    assert finding.id == "fetch-library" and not finding.repairable
    assert list(converge(site.target(), site.state(), {}, [finding])) == []
    library.mkdir(parents=True)
    (library / "__init__.py").touch()
    site.converge()
    place = site.shared / "models" / "llama"
    assert content(place) == FILES and len(list(place.parent.iterdir())) == 1
    (place / "config.json").write_bytes(b"x")
    site.hub.forget()
    site.converge()
    assert site.hub.fetched == ["config.json"] and content(place) == FILES


def test_a_directory_takes_the_place_of_a_hub(site: Site, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path, text in FILES.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(text)
    (source / ".git").mkdir()
    (source / ".git/config").write_text("no content")
    os.mkfifo(source / "pipe")
    site.declare(own={"directory": "source", "path": str(site.shared / "own")})
    site.converge()
    assert content(site.shared / "own") == FILES and site.hub.asked == []
    (source / "config.json").write_bytes(b"edited")
    assert site.ids() == ["fetch-other"]
    site.said.clear()
    site.converge()
    assert content(site.shared / "own")["config.json"] == b"edited"
    assert [line for line in site.said if line.startswith("upload")] == ["upload small.tar"]
    shutil.rmtree(source)
    assert site.findings() == []
    shutil.rmtree(site.shared / "own")
    (finding,) = site.findings()
    assert finding.id == "fetch-source" and not finding.repairable


def test_what_was_fetched_is_a_directory_that_is_checked(site: Site, tmp_path: Path) -> None:
    """As the bundle has it: its manifest has the hashes, and tells what was fetched with other patterns."""
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama", "include": ["*.json"]})
    site.converge()
    few = shutil.copytree(site.shared / "models" / "llama", tmp_path / "few")
    site.declare(llama={"model": "org/llama"})
    site.converge()
    shutil.copytree(site.shared / "models" / "llama", tmp_path / "copy")
    shutil.rmtree(site.shared / "models")
    site.hub.forget()
    place = site.shared / "models" / "llama"
    site.declare(llama={"directory": str(few), "path": str(place)})
    site.converge()
    assert sorted(content(place)) == ["config.json", "tokenizer.json"]
    site.declare(llama={"directory": "copy", "path": str(place)})
    assert site.ids() == ["fetch-other"]
    site.converge()
    assert content(place) == FILES and site.hub.asked == []
    shutil.rmtree(place)
    (tmp_path / "copy/config.json").write_bytes(b"x")
    assert "is damaged (config.json)" in site.refused()
    assert not place.exists()


def test_other_files_at_the_place_are_left_alone(site: Site) -> None:
    place = site.shared / "models" / "llama"
    place.mkdir(parents=True)
    site.hub.model("org/llama", {"config.json": b"{}"})
    site.declare(llama={"model": "org/llama"})
    (place / "mine.txt").write_text("mine")
    (finding,) = site.findings()
    assert finding.id == "fetch-foreign" and not finding.repairable
    assert list(converge(site.target(), site.state(), {}, [finding])) == []
    (place / "mine.txt").unlink()
    site.converge()
    assert content(place) == {"config.json": b"{}"}


def test_files_of_others_in_the_place_are_never_lost(site: Site) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.converge()
    place = site.shared / "models" / "llama"
    mine = place / "out" / "my weights.bin"
    mine.parent.mkdir()
    mine.write_text("mine")
    (place / ".nfs0001").touch()  # a file of a job that was removed while open
    assert site.findings() == []
    (place / "config.json").unlink()
    site.hub.forget()
    assert f"{mine} was not fetched there and would be lost: move it away" in site.refused()
    assert mine.read_text() == "mine" and site.hub.asked == []
    mine.unlink()
    site.converge()
    assert content(place) == FILES and not mine.parent.exists()


@pytest.mark.parametrize("bytes_left", [0, 30, 200])
def test_a_manifest_that_was_cut_is_not_taken_for_the_whole(site: Site, bytes_left: int) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.converge()
    place = site.shared / "models" / "llama"
    os.truncate(place / MANIFEST, bytes_left)
    assert site.ids() == ["fetch-missing"]
    assert "was not fetched there and would be lost: move it away" in site.refused()
    place.rename(site.folder / "away")
    site.converge()
    assert content(place) == FILES


def test_a_stamp_that_is_gone_is_made_again_once_no_job_runs(site: Site) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    assert not site.findings()[0].disturbs
    site.converge()
    (site.shared / "models" / "llama" / STAMP).unlink()
    (finding,) = site.findings()
    assert finding.id == "fetch-missing" and finding.disturbs
    site.hub.forget()
    site.converge()
    assert site.hub.fetched == []


def test_no_folder_of_an_attempt_at_another_revision_is_left(site: Site) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.cut_off()
    site.hub.model("org/llama", {"a/config.json": b"2"})
    site.converge()
    place = site.shared / "models" / "llama"
    assert [path.name for path in place.iterdir() if path.is_dir()] == ["a"]


def test_a_link_to_a_folder_is_followed_and_a_circle_told(site: Site, tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    source.mkdir()
    other.mkdir()
    (other / "part-0.bin").write_bytes(b"part")
    (source / "shards").symlink_to(other)
    site.declare(own={"directory": "source", "path": str(site.shared / "own")})
    site.converge()
    assert content(site.shared / "own") == {"shards/part-0.bin": b"part"}
    shutil.rmtree(site.shared / "own")
    (other / "circle").symlink_to(other)
    assert "Too many levels of symbolic links" in site.refused()


def test_names_that_are_unusual_are_kept_and_those_that_are_no_text_refused(
    site: Site, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "two\u2028lines\x85.txt").write_text("x")
    (source / "b.txt").write_text("y")
    site.declare(own={"directory": "source", "path": str(site.shared / "own")})
    site.converge()
    (source / "b.txt").write_text("yy")
    site.converge()
    assert sorted(content(site.shared / "own").values()) == [b"x", b"yy"]
    Path(os.fsdecode(bytes(source) + b"/caf\xe9.txt")).touch()
    assert "'caf\\udce9.txt': leave it out with 'exclude'" in site.refused()


def test_a_directory_whose_manifest_is_damaged_is_refused(site: Site, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "config.json").write_text("{}")
    (tmp_path / "copy" / MANIFEST).write_text("2\tcut")
    site.declare(own={"directory": "copy", "path": str(site.shared / "own")})
    assert f"{MANIFEST}, which says what was fetched there, is damaged" in site.refused()


def test_a_hub_that_never_answers_is_given_up(site: Site, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for commit in (None, "0" * 40):
            asked = Asked(
                *("x", str(tmp_path), "model a/b", "run"),
                repository="a/b",
                revision="main",
                commit=commit,
                endpoint=address,
                patience=1,
            )
            with pytest.raises(Failed, match=f"x: {address} took the question and does not answer"):
                site.carry_out(Here(program(asked)))


def test_settings_of_the_caller_do_not_count(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    site.hub.model("org/llama", {"config.json": b"{}"})
    site.declare(llama={"model": "org/llama"})
    site.converge()


@pytest.mark.parametrize("key", [None, "file", "variable"])
def test_a_token_where_its_place_belongs_is_refused_and_not_shown(
    site: Site, key: str | None
) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    path = site.declare(x={"model": "a/b", "token": {key: secret} if key else secret})
    with pytest.raises(
        SchemaProblem, match=r"fetch\.x\.token.*the token itself never stands"
    ) as caught:
        registry.read(path)
    assert secret not in str(caught.value)


def test_a_token_opens_what_is_private_and_reaches_no_command_and_no_word(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site.hub.model("org/llama", FILES)
    site.hub.repositories["models/org/llama"].token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    site.declare(llama={"model": "org/llama"})
    assert "it is private and needs a token" in site.refused()
    assert site.hub.tokens == set()  # one that is not declared is not sent
    site.declare(llama={"model": "org/llama", "token": {"variable": "HF_TOKEN"}})
    site.converge()
    shutil.rmtree(site.shared / "models")
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    secret.chmod(0o600)
    site.declare(llama={"model": "org/llama", "token": {"file": "token"}})
    site.converge()
    assert site.hub.tokens == {TOKEN}
    assert not any(TOKEN in text for text in [*site.said, *site.commands])
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path != secret]
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)


@pytest.mark.parametrize(
    ("mode", "text", "sentence"),
    [
        (0o644, TOKEN, "is open to others (mode 0644): chmod 600"),
        (0o600, "\n", "is empty: its first line must be the token"),
        (0o600, "two words", "characters that no token has"),
        (None, "", "cannot be read: No such file"),
    ],
)
def test_a_token_that_is_no_secret_or_none_is_refused(
    site: Site, tmp_path: Path, mode: int | None, text: str, sentence: str
) -> None:
    site.hub.model("org/llama", {"config.json": b"{}"})
    secret = tmp_path / "token"
    if mode is not None:
        secret.write_text(text)
        secret.chmod(mode)
    site.declare(llama={"model": "org/llama", "token": {"file": "token"}})
    told = site.refused()
    assert sentence in told and TOKEN not in told
    assert site.hub.asked == [] and not (site.shared / "models" / "llama").exists()


def test_what_a_hub_refuses_is_one_sentence_and_nothing_takes_the_place(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.hub.model("org/llama", FILES)
    repository = site.hub.repositories["models/org/llama"]
    place = site.shared / "models" / "llama"

    def told(**changes: Any) -> str:
        site.declare(llama={"model": "org/llama", **changes})
        sentence = site.refused()
        assert not place.exists()
        return sentence

    assert "model org/none at http://127.0.0.1" in told(model="org/none")
    assert "has no revision v9" in told(revision="v9")
    assert f"has no revision {'0' * 40}" in told(revision="0" * 40)
    assert "no file that include and exclude leave" in told(include=["*.bin"])
    assert "cannot be reached" in told(endpoint="http://127.0.0.1:1")
    assert "by the proxy http://127.0.0.1:1" in told(proxy="http://127.0.0.1:1")
    repository.token, repository.gated = TOKEN, True
    assert "is gated: accept its terms" in told()
    monkeypatch.setenv("WRONG", "hf_wrong")
    repository.gated = False
    wrong = told(token={"variable": "WRONG"})
    assert "the token is wrong" in wrong and "hf_wrong" not in wrong
    assert "UNSET_HERE, which is to hold the token, is not set" in told(
        token={"variable": "UNSET_HERE"}
    )
    repository.token = None
    site.hub.down = 503
    assert "answers with status 503" in told()


def test_wrong_bytes_are_refused_and_not_kept(site: Site) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    for path in ("weights/model 1.safetensors", "config.json"):
        site.hub.wrong = {path}
        assert f"{path} arrives with another content" in site.refused()
        assert not (site.shared / "models" / "llama").exists()
        shutil.rmtree(site.folder / "state")
    site.hub.wrong = set()
    site.converge()
    assert content(site.shared / "models" / "llama") == FILES


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    tools = tmp_path / "tools"
    tools.mkdir()
    disk = tools / "df"
    disk.write_text("#!/bin/sh\nprintf 'Filesystem 1024-blocks Used Available\\nx 0 0 8000\\n'\n")
    disk.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert "needs 9.0 MB and the shared storage has 8.2 MB free" in site.refused()
    assert site.hub.fetched == []
    (tools / "df").unlink()
    site.cut_off()
    disk.write_text("#!/bin/sh\nprintf 'Filesystem 1024-blocks Used Available\\nx 0 0 100\\n'\n")
    disk.chmod(0o755)
    site.converge()  # what arrived before needs no more room


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/passwd", "a\\b", ".cache/x", ".lockstep-files", "a\nb"],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="it holds a file named"):
        safe(name)


def test_a_hub_that_lists_such_a_name_is_refused(site: Site) -> None:
    site.hub.model("org/llama", {"../evil": b"x", "config.json": b"{}"})
    site.declare(llama={"model": "org/llama"})
    assert "it holds a file named '../evil'" in site.refused()
    assert site.hub.fetched == [] and not (site.shared / "models" / "llama").exists()


def test_two_runs_do_not_fetch_into_one_folder(site: Site, tmp_path: Path) -> None:
    site.hub.model("org/llama", {"config.json": b"{}"})
    site.declare(llama={"model": "org/llama"})
    folder = workshop(site.target().cluster, site.target().spec.each(site.target().cluster)[0])
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run fetches into" in site.refused()


def test_the_swap_that_was_cut_between_its_two_steps_is_undone_first(site: Site) -> None:
    site.hub.model("org/llama", FILES)
    site.declare(llama={"model": "org/llama"})
    site.converge()
    place = site.shared / "models" / "llama"
    arriving = place.parent / ".llama.fetching"
    arriving.mkdir()
    place.rename(arriving / "old")
    site.hub.forget()
    site.converge()
    assert content(place) == FILES and site.hub.fetched == []


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({}, "give one of 'model', 'dataset' and 'directory'"),
        ({"model": "a/b", "dataset": "a/b"}, "give one of 'model', 'dataset' and 'directory'"),
        ({"model": "https://huggingface.co/a/b"}, "is no name on a hub: write OWNER/NAME"),
        ({"model": "a/b", "revision": "a..b"}, "is no revision"),
        ({"model": "a/b", "revision": 3.1}, "must be quoted"),
        ({"model": "a/b", "endpoint": "hf-mirror.com"}, "is no address: write http:// or https://"),
        ({"model": "a/b", "proxy": "http://me:pass@proxy:3128"}, "must not hold a password"),
        ({"model": "a/b", "token": "hf_abc"}, "token"),
        ({"model": "a/b", "token": {}}, "give one of 'file' and 'variable'"),
        (
            {"model": "a/b", "token": {"variable": "hf abc"}},
            "is no name of an environment variable",
        ),
        ({"model": "a/b", "on": "worker"}, "on"),
        ({"model": "a/b", "on": "head"}, "the head fetches with an environment's huggingface_hub"),
        ({"model": "a/b", "on": "head", "environment": "x"}, "there is no environment x"),
        ({"model": "a/b", "on": "head", "token": {"variable": "T"}}, "a file there of mode 0600"),
        (
            {"model": "a/b", "on": "head", "token": {"file": "t"}},
            "absolute path of the token's file",
        ),
        ({"model": "a/b", "environment": "x"}, "counts for on: head alone"),
        ({"directory": "x"}, "a directory needs 'path'"),
        (
            {"directory": "x", "path": "/s", "revision": "v1"},
            "is asked of no hub: leave revision out",
        ),
        ({"model": "a/b", "path": "/elsewhere"}, "is no directory below the storage"),
        ({"model": "a/b", "include": ["a\nb"]}, "is no pattern of file names"),
    ],
)
def test_bad_input_is_one_sentence_with_its_place(
    site: Site, entry: dict[str, Any], sentence: str
) -> None:
    path = site.declare(x=entry)
    with pytest.raises(SchemaProblem) as caught:
        registry.read(path)
    told = str(caught.value)
    assert sentence in told and "fetch.x" in told and f"{path}:" in told or "cluster.yaml:" in told


def test_the_word_on_needs_no_quotes(site: Site) -> None:
    path = site.declare(x={"model": "a/b"})
    path.write_text(path.read_text().replace("model: a/b", "model: a/b\n    on: control"))
    (one,) = site.target().spec.each(site.target().cluster)
    assert "\n    on: control" in path.read_text() and one.spec.on == "control"


def test_places_on_the_storage_are_each_ones_own(site: Site) -> None:
    inside = {"model": "a/b", "path": str(site.shared / ".lockstep/x")}
    over = {"model": "a/b", "path": str(site.shared / "models")}
    path = site.declare(
        one={"model": "a/b"},
        two=over,
        three=inside,
        four={"model": "a/b", "path": str(site.shared)},
    )
    with pytest.raises(SchemaProblem) as caught:
        registry.read(path)
    told = str(caught.value).splitlines()
    assert any("fetch.two.path" in line and "overlaps one" in line for line in told)
    assert any("fetch.three.path" in line and "Lockstep's own" in line for line in told)
    assert any(
        "fetch.four.path" in line and "no directory below the storage" in line for line in told
    )


def test_on_each_nodes_own_disk_a_model_lies_apart_from_what_is_kept_the_same(
    site: Site,
) -> None:
    path = site.declare(x={"model": "a/b"})
    values = yaml.safe_load(path.read_text())
    sync = {"models": {"from": "/models"}}
    values["storage"] = {"kind": "local", "path": str(site.shared), "sync": sync}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SchemaProblem, match=r"models/x overlaps \S+/models, which storage.sync"):
        registry.read(path)
    values["storage"]["sync"] = {"corpus": {"from": "/models"}}
    path.write_text(yaml.safe_dump(values))
    (one,) = site.target().spec.each(registry.read(path))
    assert one.path == f"{site.shared}/models/x"


def test_without_storage_nothing_can_be_fetched(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("cluster: lab\nnodes: {node1: {address: 10.0.0.1}}\nfetch: {x: {model: a/b}}\n")
    with pytest.raises(SchemaProblem, match="declare storage"):
        registry.read(path)


def test_a_manifest_is_read_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "a b.txt"
    file.write_bytes(b"text")
    found = checked(file, File("a b.txt", 4, "-", ""))
    assert found is not None
    (tmp_path / MANIFEST).write_text(found.line())
    assert manifest(tmp_path / MANIFEST) == {"a b.txt": found}
    assert checked(file, File("a b.txt", 4, "0" * 40, "")) is None
    assert checked(file, File("a b.txt", 5, "-", "")) is None
    assert checked(tmp_path / "none", found) is None


def test_a_pattern_with_a_slash_at_its_end_takes_all_below(tmp_path: Path) -> None:
    asked = Asked("x", "", "", "", include=["data/"], exclude=["*.bin"])
    assert (
        chosen(asked, "data/a/b.txt")
        and not chosen(asked, "other")
        and not chosen(asked, "data/x.bin")
    )
