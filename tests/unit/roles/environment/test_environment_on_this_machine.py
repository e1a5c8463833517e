"""The role's real shell on a real venv, below a temporary folder: from bare to right, and every kind of damage."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles import environment, pins, trainer
from roles.core.role import Finding, Role, Target, Unreadable
from roles.core.steps import Shell, Upload
from roles.environment import leftovers, manifest
from roles.environment.prove import found_commands, try_in_unit
from roles.environment.spec import Environments
from roles.environment.trial import problems_of, start
from roles.trainer.spec import TrainerSpec
from tests.unit.roles.environment.made import CONDA, pack

OLD = "/home/liu/anaconda3/envs/llm"


def shell(script: str, kill_at: Path | None = None) -> str:
    if kill_at:
        process = subprocess.Popen(["sh", "-c", script], start_new_session=True)
        while not kill_at.exists():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise AssertionError("cut off")
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120
    )
    if done.returncode:
        raise AssertionError(done.stderr.strip().splitlines()[-1])
    return done.stdout.rstrip("\n")


@dataclass
class Machine:
    """This machine as the only node of a cluster, with everything below ``root``."""

    root: Path
    entry: dict[str, Any]

    @property
    def prefix(self) -> Path:
        return self.root / "envs" / "llm"

    @property
    def site(self) -> Path:
        return next(self.prefix.glob("lib/python3*/site-packages"))

    def target(self, role: Role[Any, Any]) -> Target[Any]:
        section = Environments.model_validate({"llm": self.entry})
        sections: dict[str, Spec] = {"environments": section, "trainer": TrainerSpec()}
        nodes = {"node1": Node(name="node1", address="10.0.0.1")}
        cluster = Cluster("lab", self.root / "lab.yaml", nodes, sections=sections)
        return Target(cluster, nodes["node1"], sections[role.key])

    def findings(self, role: Role[Any, Any] = environment.role) -> list[Finding]:
        target = self.target(role)
        return role.drift(target, role.parse(shell(role.probe(target))), {})

    def ids(self, role: Role[Any, Any] = environment.role) -> list[str]:
        return [finding.id for finding in self.findings(role)]

    def converge(self, role: Role[Any, Any] = environment.role, kill_at: Path | None = None) -> str:
        """One convergence; what its proof says. kill_at: the file at whose sight all is killed."""
        target = self.target(role)
        state = role.parse(shell(role.probe(target)))
        now = [found for found in role.drift(target, state, {}) if found.repairable]
        for step in role.converge(target, state, {}, now):
            if isinstance(step, Upload):
                Path(step.destination).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(step.source, step.destination)
            else:
                assert isinstance(step, Shell)
                shell(f"set -e\n{step.command}", kill_at)
        assert role.proof is not None
        return shell(role.proof(target))

    def settle(self, role: Role[Any, Any] = environment.role) -> None:
        assert self.converge(role) == ""
        assert self.ids(role) == []


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small venv of this Python, made elsewhere: its files name a place that is not there."""
    folder = tmp_path_factory.mktemp("packed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "llm")], check=True)
    for name in ("bin/activate", "bin/activate.csh", "bin/activate.fish", "pyvenv.cfg"):
        text = (folder / "llm" / name).read_text().replace(str(folder / "llm"), OLD)
        (folder / "llm" / name).write_text(text)
    site = next((folder / "llm").glob("lib/python3*/site-packages"))
    (site / "greeting.py").write_text("WORD = 'hello'\n")
    (site / "greeting-1.0.dist-info").mkdir()
    (site / "greeting-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n"
    )
    record = "greeting.py,,\ngreeting-1.0.dist-info/RECORD,,\n"
    (site / "greeting-1.0.dist-info/RECORD").write_text(record)
    script = folder / "llm/bin/greet"
    script.write_text(f"#!{OLD}/bin/python\nimport greeting, sys\nprint(sys.prefix)\n")
    script.chmod(0o755)
    with tarfile.open(folder / "llm.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(folder / "llm", "envs/llm")
    return folder / "llm.tar.gz"


@pytest.fixture
def machine(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("LOCKSTEP_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(
        sys.modules["roles.environment.archive"], "state_directory", lambda: tmp_path / "state"
    )
    monkeypatch.setattr(
        sys.modules["roles.trainer.package"], "state_directory", lambda: tmp_path / "state"
    )
    monkeypatch.setattr(sys.modules["roles.environment.parcel"], "LOCAL", str(tmp_path / "var"))
    entry = {
        "archive": str(packed),
        "prefix": str(tmp_path / "envs" / "llm"),
        "imports": ["greeting"],
        "commands": ["greet"],
        "on_path": False,
    }
    return Machine(tmp_path, entry)


@pytest.fixture
def right(machine: Machine) -> Machine:
    machine.settle()
    return machine


def test_a_bare_machine_gets_the_environment_mended_stamped_and_proved(machine: Machine) -> None:
    assert machine.ids() == ["environment-missing"]
    machine.settle()
    assert shell(str(machine.prefix / "bin/greet")) == str(machine.prefix)
    assert OLD not in (machine.prefix / "bin/activate").read_text()
    assert [path.name for path in machine.prefix.parent.iterdir()] == ["llm"]
    facts = facts_of(machine)
    assert facts["Python of the environment"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["torch"] is None and facts["environment hash"]


def test_what_an_earlier_run_finished_after_the_look_is_not_unpacked_again(
    machine: Machine,
) -> None:
    target = machine.target(environment.role)
    seen = environment.role.parse(shell(environment.role.probe(target)))
    findings = environment.role.drift(target, seen, {})
    machine.settle()
    tree = machine.prefix.stat().st_ino
    for step in environment.role.converge(target, seen, {}, findings):
        if isinstance(step, Shell):
            shell(f"set -e\n{step.command}")
    assert machine.prefix.stat().st_ino == tree
    assert [path.name for path in machine.prefix.parent.iterdir()] == ["llm"]


def test_two_unpackings_have_the_same_hash_and_a_pin_changes_it(right: Machine) -> None:
    def read() -> str | None:
        return facts_of(right)["environment hash"]

    first = read()
    shutil.rmtree(right.prefix)
    right.settle()
    assert read() == first
    pinned(right).settle(pins.role)
    assert right.ids() == []
    assert read() != first
    right.entry["pins"] = {}
    assert right.ids() == ["environment-changed"]
    right.settle()
    assert read() == first


def test_the_probe_says_nothing_on_standard_error_and_changes_nothing(right: Machine) -> None:
    before = sorted((str(path), path.lstat().st_mtime_ns) for path in right.root.rglob("*"))
    script = environment.role.probe(right.target(environment.role))
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert before == sorted((str(path), path.lstat().st_mtime_ns) for path in right.root.rglob("*"))


def cut(right: Machine, stamped: bool) -> None:
    beside = right.prefix.with_name(f"llm.lockstep-new-{stamp_of(right)[:12]}")
    right.prefix.rename(beside)
    if not stamped:
        (beside / ".lockstep-environment.json").unlink()


def stamp_of(machine: Machine) -> str:
    return str(json.loads((machine.prefix / ".lockstep-environment.json").read_text())["archive"])


def rewrite(machine: Machine, old: str, new: str) -> None:
    stamp = machine.prefix / ".lockstep-environment.json"
    stamp.write_text(stamp.read_text().replace(old, new))


Damage = Callable[[Machine], object]


@pytest.mark.parametrize(
    ("damage", "id"),
    [
        (lambda m: shutil.rmtree(m.prefix), "environment-missing"),
        (lambda m: (m.prefix / ".lockstep-environment.json").unlink(), "environment-missing"),
        (lambda m: cut(m, stamped=True), "environment-interrupted"),
        (lambda m: cut(m, stamped=False), "environment-missing"),
        (lambda m: rewrite(m, stamp_of(m), "00"), "environment-version"),
        (lambda m: rewrite(m, str(m.prefix), "/elsewhere"), "environment-moved"),
        (lambda m: (m.prefix.parent / "llm.lockstep-new-0").mkdir(), "environment-leftover"),
        (
            lambda m: (m.prefix / "bin/greet").write_text(f"#!{OLD}/bin/python\n"),
            "env-moved-shebang",
        ),
        (lambda m: (m.prefix / "bin/greet").chmod(0o644), "env-moved-shebang"),
        (lambda m: (m.prefix / "bin/greet").unlink(), "environment-damaged"),
        (lambda m: (m.prefix / "bin/python").unlink(), "environment-damaged"),
        (lambda m: (m.prefix / ".lockstep-proof.json").unlink(), "environment-unproved"),
        (lambda m: (m.site / "x-1.dist-info").mkdir(), "environment-changed"),
    ],
)
def test_each_damage_is_named_and_mended(right: Machine, damage: Damage, id: str) -> None:
    damage(right)
    assert right.ids() == [id]
    right.settle()
    assert shell(str(right.prefix / "bin/greet")) in (str(right.prefix), "")


def prove(machine: Machine, deep: bool = False) -> str:
    role = environment.role
    script = role.deep if deep else role.proof
    assert script is not None
    return shell(script(machine.target(role)))


def alter(file: Path, old: str = "hello", new: str = "HELLO") -> None:
    """Other content of the same size, in the same file, with the same times."""
    status = file.stat()
    file.write_text(file.read_text().replace(old, new))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def alter_two(machine: Machine) -> None:
    for name in ("activate", "greet"):
        alter(machine.prefix / "bin" / name, "bin", "nib")


def relink(link: Path) -> None:
    leads = link.readlink()
    link.unlink()
    link.symlink_to(f"./{leads}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: alter(m.site / "greeting.py"), "greeting 1.0: {site}/greeting.py altered"),
        (lambda m: (m.site / "greeting.py").unlink(), "greeting 1.0: {site}/greeting.py missing"),
        (lambda m: (m.site / "more.pth").touch(), "no distribution: {site}/more.pth added"),
        (
            lambda m: (m.site / "sitecustomize.py").touch(),
            "no distribution: {site}/sitecustomize.py added",
        ),
        (lambda m: (m.site / "greeting.py").chmod(0o755), "greeting 1.0: {site}/greeting.py alt"),
        (lambda m: relink(m.prefix / "bin/python3"), "no distribution: bin/python3 altered"),
        (alter_two, "no distribution: bin/activate altered and 1 more"),
    ],
)
def test_a_file_that_somebody_changed_is_named_by_the_proof_and_comes_back(
    right: Machine, damage: Damage, words: str
) -> None:
    facts = facts_of(right)
    damage(right)
    site = right.site.relative_to(right.prefix)
    wrong = prove(right)
    assert wrong.startswith(f"environment-damaged\t{words.format(site=site)}") and "\n" not in wrong
    assert right.ids()[0] == "environment-damaged"
    right.settle()
    assert facts_of(right) == facts and (right.site / "greeting.py").stat().st_mode & 0o777 == 0o644


def facts_of(machine: Machine) -> dict[str, str | None]:
    role = environment.role
    state = role.parse(shell(role.probe(machine.target(role))))
    return {fact.name: fact.read(state) for fact in role.facts}


def test_what_is_no_part_of_an_environment_is_not_compared(right: Machine) -> None:
    (right.site / "greeting.py").touch()  # a time alone
    for name in ("__pycache__/x.pyc", "trainer/x.py", "greeting/__pycache__/x.pyc"):
        (right.site / name).parent.mkdir(parents=True, exist_ok=True)
        (right.site / name).write_text("x")
    (right.prefix / "var/cache").mkdir(parents=True)
    (right.prefix / "var/cache/fonts").write_text("x")
    assert prove(right) == "" and prove(right, deep=True) == ""


def test_what_programs_add_while_they_run_is_no_damage_and_no_difference(right: Machine) -> None:
    facts = facts_of(right)
    for name in ("greeting/cache.lock", "tables.pickle", "kernels/x.so"):
        (right.site / name).parent.mkdir(exist_ok=True)
        (right.site / name).write_text("x")
    os.mkfifo(right.site / "fifo")
    assert prove(right) == "" and prove(right, deep=True) == "" and right.ids() == []
    (
        right.prefix / ".lockstep-proof.json"
    ).unlink()  # what is proved anew counts no more than before
    right.settle()
    assert facts_of(right) == facts
    (right.site / "tables.pickle").write_text("y")
    assert prove(right) == ""
    alter(right.site / "greeting.py")
    assert "greeting.py altered, in" in prove(right)


def test_what_is_installed_by_right_counts_from_then_on_by_its_record(right: Machine) -> None:
    (right.site / "tables.pickle").write_text("x")
    (right.site / "greeting-1.0.dist-info/RECORD").write_text(
        "greeting.py,,\ngreeting-1.0.dist-info/RECORD,,\nextra.py,,\n"
    )
    (right.site / "extra.py").touch()
    now = manifest.read(right.prefix, {})
    known = manifest.load(right.prefix)
    site = right.site.relative_to(right.prefix)
    for installed, expected in ((True, {f"{site}/extra.py"}), (False, set())):
        counted = manifest.without_added(right.prefix, known, now, installed)
        assert counted.keys() - known.keys() == expected


def test_accelerate_is_proved_where_the_environment_has_it(right: Machine) -> None:
    wanted = {"commands": ["greet"], "linked": [], "optional": ["accelerate"], "python": []}
    assert found_commands(right.prefix, wanted) == ([f"{right.prefix}/bin/greet"], [])
    script = right.prefix / "bin/accelerate"
    script.write_text("#!/bin/sh\necho no torch >&2; exit 1\n")
    script.chmod(0o755)
    commands, found = found_commands(right.prefix, wanted)
    started, problems = start(commands)
    assert problems_of(started) == [f"{script} --help fails: no torch"]
    assert problems == [] and found == []


@pytest.fixture
def login(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the machine's logins find commands: here is no python but what comes there."""
    folder = machine.root / "bin"
    folder.mkdir()
    for name in ("sh", "cat"):
        (folder / name).symlink_to(str(shutil.which(name, path=os.defpath)))
    names = sys.modules["roles.environment.launchers"]
    monkeypatch.setattr(names, "BIN_ON_PATH", str(folder))
    monkeypatch.setattr(names, "SYSTEM_PYTHON", str(machine.root / "system/python"))
    way = f"env -i HOME=/root PATH={folder}:{machine.root}/system"
    monkeypatch.setattr(sys.modules["roles.environment.converge"], "LOGIN", way)
    del machine.entry["on_path"]
    return folder


PREFIX_OF = "-c 'import sys, greeting; print(sys.prefix)'"


def test_a_login_finds_the_environment_s_python_and_what_is_wrong_with_it(
    machine: Machine, login: Path
) -> None:
    machine.settle()
    python = login / "python"
    assert shell(f"{python} {PREFIX_OF}") == str(machine.prefix)
    right = python.read_text()
    linked = machine.prefix / "bin/python"
    for spoilt in (None, 0o644, right.replace("/llm/", "/of-before/"), linked):
        if isinstance(spoilt, int):
            python.chmod(spoilt)
        else:
            python.unlink()
        if isinstance(spoilt, Path):
            python.symlink_to(spoilt)
        elif isinstance(spoilt, str):
            python.write_text(spoilt)
            python.chmod(0o755)
        assert machine.ids() == ["launcher-not-found"]
        assert (spoilt == linked) or "launcher-not-found\ta login without" in prove(machine)
        machine.settle()
        assert python.read_text() == right
    python.write_text(right.replace(str(machine.prefix / "bin/python"), sys.executable))
    sentence = f"a login without activation finds {python} of {sys.prefix}, not {linked}"
    assert prove(machine) == f"launcher-not-found\t{sentence}"


def test_a_python_of_somebody_else_stays_unless_the_environment_s_is_asked_for(
    machine: Machine, login: Path
) -> None:
    system, python = machine.root / "system/python", login / "python"
    system.parent.mkdir()
    system.symlink_to(sys.executable)
    machine.settle()
    assert not python.exists() and (login / "greet").is_symlink()
    machine.entry["commands"] = ["greet", "python"]
    assert "launcher-not-found" in machine.ids()
    machine.settle()
    assert shell(f"{python} {PREFIX_OF}") == str(machine.prefix)
    python.unlink()
    python.symlink_to(system)
    assert "environment-foreign-command" in machine.ids()
    (login / "greet").unlink()
    machine.converge()
    assert (login / "greet").is_symlink() and python.readlink() == system
    machine.entry["commands"] = ["greet"]
    machine.settle()
    assert python.readlink() == system


def test_a_command_is_tried_in_a_job_s_unit_until_it_is_proved_there(right: Machine) -> None:
    proof, tries = right.prefix / ".lockstep-proof.json", right.root / "tries"
    script = right.prefix / "bin/greet"
    count = f'#!/bin/sh\necho "${{PYTHONUNBUFFERED-login}}" >> {tries}\n'
    script.write_text(f'{count}[ -z "$PYTHONUNBUFFERED" ] || {{ echo no room >&2; exit 1; }}\n')
    proof.unlink()
    sentence = f"in a job's unit {script} --help fails: no room"
    assert prove(right) == f"environment-command\t{sentence}"
    assert right.ids() == ["environment-unproved"]
    script.write_text(count)
    assert prove(right) == "" and right.ids() == []
    assert sorted(tries.read_text().split()) == ["1", "1", "login", "login"]
    assert prove(right) == ""  # it is proved there: a login's launchers alone are tried again
    assert sorted(tries.read_text().split()) == ["1", "1", "login", "login", "login"]


def test_a_command_that_fails_everywhere_is_named_once(right: Machine) -> None:
    (right.prefix / ".lockstep-proof.json").unlink()
    script = right.prefix / "bin/greet"
    script.write_text("no program")
    reason = os.strerror(errno.ENOEXEC)
    assert prove(right) == f"environment-command\t{script} does not start: {reason}"
    script.write_text("#!/bin/sh\nexit 3\n")
    assert prove(right) == f"environment-command\t{script} --help fails: exit status 3"


def test_only_the_deep_proof_sees_bytes_that_changed_by_themselves(right: Machine) -> None:
    file = right.site / "greeting.py"
    name = str(file.relative_to(right.prefix))
    alter(file)
    files = manifest.load(right.prefix)
    now = manifest.read(right.prefix, {})[name]
    files[name] = files[name]._replace(seen=now.seen)
    manifest.save(right.prefix, files)
    assert prove(right) == "" and right.ids() == []
    assert prove(right, deep=True).startswith(f"environment-damaged\tgreeting 1.0: {name} altered")
    assert right.ids() == ["environment-damaged"]
    right.settle()


@pytest.mark.parametrize("text", [None, "{half", "[1]", "{}"])
def test_without_its_list_of_files_an_environment_is_still_compared_as_a_whole(
    right: Machine, text: str | None
) -> None:
    (right.prefix / manifest.NAME).unlink()
    if text is not None:
        (right.prefix / manifest.NAME).write_text(text)
    assert prove(right) == "" and manifest.load(right.prefix)
    (right.prefix / manifest.NAME).unlink()
    alter(right.site / "greeting.py")
    assert "are not those that were proved" in prove(right)
    right.settle()


def test_damage_of_byte_code_is_mended_by_the_next_convergence(right: Machine) -> None:
    (code,) = (right.site / "__pycache__").glob("greeting.*.pyc")
    code.write_bytes(code.read_bytes()[:16] + b"broken")
    assert {line.split("\t")[0] for line in prove(right).splitlines()} == {
        "environment-import",
        "environment-command",
    }
    assert right.ids() == ["environment-damaged"]
    right.settle()


def test_names_of_one_file_are_read_once_and_both_listed(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("x")
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    (tmp_path / "\udcff").symlink_to("nowhere")
    files = manifest.read(tmp_path, {})
    assert files["one"] == files["two"] and files["one"].content.startswith("f2d711642b72")
    manifest.save(tmp_path, files)
    assert manifest.load(tmp_path) == files and len(manifest.digest(files)) == 64
    assert "\udcff" not in manifest.sentence(tmp_path, dict.fromkeys(files, "added"))


def test_an_archive_that_never_worked_is_not_unpacked_again_and_again(machine: Machine) -> None:
    machine.entry["imports"] = ["not_in_it"]
    wrong = machine.converge()
    assert wrong.startswith("environment-import\timport not_in_it in ")
    assert "ModuleNotFoundError: No module named 'not_in_it'" in wrong
    assert machine.ids() == ["environment-unproved"]


def test_what_someone_made_by_hand_is_kept_for_good(machine: Machine) -> None:
    machine.prefix.mkdir(parents=True)
    (machine.prefix / "by-hand").write_text("precious")
    machine.settle()
    rewrite(machine, stamp_of(machine), "00")
    machine.settle()
    beside = {path.name for path in machine.prefix.parent.iterdir()}
    assert beside == {"llm", "llm.before-lockstep", "llm.lockstep-old"}
    assert (machine.prefix.parent / "llm.before-lockstep/by-hand").read_text() == "precious"


def other_archive(machine: Machine, packed: Path, text: bytes = b"WORD = 'hi'\n") -> dict[str, Any]:
    """The entry of an environment that differs in one module."""
    again = machine.root / "again.tar"
    with tarfile.open(packed) as old, tarfile.open(again, "w") as new:
        for member in old.getmembers():
            data = old.extractfile(member) if member.isreg() else None
            if member.name.endswith("/greeting.py"):
                member.size, data = len(text), io.BytesIO(text)
            new.addfile(member, data)
    return {**machine.entry, "archive": str(again)}


def words(machine: Machine) -> list[str]:
    """What the environment says, and what the earlier tree beside it would say."""
    trees = (machine.prefix, machine.prefix.with_name("llm.lockstep-old"))
    files = [file for tree in trees for file in tree.glob("lib/python3*/site-packages/greeting.py")]
    return [file.read_text().split("'")[1] for file in files]


def test_declaring_the_earlier_archive_again_puts_its_tree_back_without_unpacking(
    right: Machine, packed: Path
) -> None:
    first, second = right.entry, other_archive(right, packed)
    right.entry = second
    right.settle()
    assert words(right) == ["hi", "hello"]
    for entry, now in ((first, ["hello", "hi"]), (second, ["hi", "hello"])):
        inode = right.prefix.with_name("llm.lockstep-old").stat().st_ino
        right.entry = entry
        assert right.ids() == ["environment-version"]
        right.settle()
        assert words(right) == now and right.prefix.stat().st_ino == inode
    right.entry = {**second, "keep": 0}
    assert right.ids() == ["environment-kept"]
    right.settle()
    assert words(right) == ["hi"]
    right.entry = {**first, "keep": 0}
    right.settle()
    assert words(right) == ["hello"]


def without_exchange(patch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot exchange two names."""
    patch.setattr(sys.modules["roles.environment.converge"], "EXCHANGE", "raise SystemExit(1)")


def before_each_mv(machine: Machine, patch: pytest.MonkeyPatch, text: str) -> Path:
    """From here on a shell runs this text at every ``mv`` first; the program that does so."""
    (machine.root / "cut").mkdir()
    mv = machine.root / "cut/mv"
    real = shutil.which("mv", path=os.defpath)
    mv.write_text(f'#!/bin/sh\ncd {machine.root}/cut\n{text}\nexec {real} "$@"\n')
    mv.chmod(0o755)
    patch.setenv("PATH", f"{machine.root}/cut:{os.environ['PATH']}")
    return mv


@pytest.mark.parametrize("renames", [False, True])
def test_whoever_looks_while_a_version_takes_the_place_of_another_finds_one_of_them(
    right: Machine, packed: Path, renames: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = right.entry, other_archive(right, packed)
    if renames:
        without_exchange(monkeypatch)
    looks = f"test -x {right.prefix}/bin/python && echo found >>looks || echo nothing >>looks"
    before_each_mv(right, monkeypatch, looks)
    for entry, now in ((second, ["hi", "hello"]), (first, ["hello", "hi"])):
        right.entry = entry
        right.settle()
        assert words(right) == now
    seen = (right.root / "cut/looks").read_text().split()
    assert ("nothing" in seen) == renames and "found" in seen


@pytest.mark.parametrize(
    ("back", "renames", "id"),
    [
        (False, 1, "environment-version"),
        (False, 2, "environment-missing"),
        (False, 3, "environment-leftover"),
        (True, 1, "environment-missing"),
        (True, 2, "environment-leftover"),
    ],
)
def test_a_power_cut_while_trees_change_their_names_is_finished_by_one_run(
    right: Machine,
    packed: Path,
    back: bool,
    renames: int,
    id: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """back: while an earlier tree is put back; else while a new one takes the place of the one before."""
    without_exchange(monkeypatch)
    entry, right.entry = right.entry, other_archive(right, packed)
    if back:
        right.settle()
        right.entry = entry
    text = (
        f'case "$*" in *.json*) ;; *) echo x >>count; '
        f'test "$(wc -l <count)" -le {renames} || {{ kill -9 $PPID; exit; }};; esac'
    )
    mv = before_each_mv(right, monkeypatch, text)
    with pytest.raises((AssertionError, IndexError)):
        right.converge()
    mv.unlink()
    assert right.ids() == [id]
    right.settle()
    assert words(right) == (["hello", "hi"] if back else ["hi", "hello"])


def test_a_second_tree_that_someone_made_by_hand_is_kept_until_the_next_change(
    machine: Machine, packed: Path
) -> None:
    for word in ("first", "second"):
        shutil.rmtree(machine.prefix, ignore_errors=True)
        machine.prefix.mkdir(parents=True)
        (machine.prefix / word).touch()
        machine.settle()
    assert (machine.prefix.parent / "llm.before-lockstep/first").exists()
    assert (machine.prefix.parent / "llm.lockstep-old/second").exists()


def test_what_importing_itself_writes_is_no_damage(machine: Machine, packed: Path) -> None:
    writes = b"from pathlib import Path\nPath(__file__).with_name('table').write_text('made')\n"
    machine.entry = other_archive(machine, packed, writes)
    machine.settle()
    assert (machine.site / "table").is_file()
    machine.settle()


def test_an_earlier_tree_that_was_removed_by_half_is_never_put_back(
    right: Machine, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = right.entry, other_archive(right, packed)
    right.entry = second
    right.settle()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{right.root}/cut:{os.environ['PATH']}")
        (right.root / "cut").mkdir()
        rm = right.root / "cut/rm"
        old, real = right.prefix.with_name("llm.lockstep-old"), shutil.which("rm", path=os.defpath)
        rm.write_text(
            f'#!/bin/sh\nif [ "$*" = "-rf {old}" ]; then {real} -rf {old}/lib; kill -9 $PPID; exit; fi\n'
            f'exec {real} "$@"\n'
        )
        rm.chmod(0o755)
        right.entry = {**second, "keep": 0}
        with pytest.raises((AssertionError, IndexError)):
            right.converge()
    assert (old / "bin").is_dir() and words(right) == ["hi"]
    right.entry = first
    right.settle()
    assert words(right) == ["hello", "hi"]


def test_what_arrived_in_part_of_an_archive_that_nobody_wants_any_more_goes(
    right: Machine, packed: Path
) -> None:
    part = right.root / "var/archives/.of-long-ago.tar.arriving"
    part.mkdir()
    (part / "sha256").write_text("begun")
    right.entry = other_archive(right, packed)
    right.settle()
    assert not part.exists()


def spoil(machine: Machine, change: Callable[[bytes], bytes]) -> None:
    """Change the archive where it lies; converging then fails, and the archive is gone."""
    (place,) = (machine.root / "var/archives").iterdir()
    place.write_bytes(change(place.read_bytes()))
    rewrite(machine, stamp_of(machine), "00")
    with pytest.raises(AssertionError, match="was damaged, and is removed: converge again"):
        machine.converge()
    assert not place.exists()


@pytest.mark.parametrize("end", [b"", b"\0" * 100])
def test_a_cut_or_spoilt_archive_is_removed_and_the_old_environment_stays(
    right: Machine, end: bytes
) -> None:
    spoil(right, lambda archive: archive[:-100] + end)
    assert right.ids() == ["environment-version"]
    assert shell(str(right.prefix / "bin/greet")) == str(right.prefix)
    right.settle()
    assert [path.name for path in right.prefix.parent.iterdir()].count("llm.lockstep-old") == 1


def test_an_archive_that_was_changed_on_its_way_is_never_unpacked(
    machine: Machine, packed: Path
) -> None:
    """One that is still a whole tar of the same size, with another text in it."""
    plain = machine.root / "llm.tar"
    plain.write_bytes(subprocess.run(["gzip", "-dc", packed], stdout=subprocess.PIPE).stdout)
    machine.entry["archive"] = str(plain)
    machine.settle()
    spoil(machine, lambda archive: archive.replace(b"'hello'", b"'harm!'"))
    assert (machine.site / "greeting.py").read_text() == "WORD = 'hello'\n"
    assert [path.name for path in machine.prefix.parent.iterdir()] == ["llm"]
    machine.settle()


def test_an_environment_that_cannot_be_mended_leaves_nothing(machine: Machine) -> None:
    """Its interpreter looks right, and does not start."""
    pack(machine.root / "llm.tar", CONDA)
    machine.entry["archive"] = str(machine.root / "llm.tar")
    with pytest.raises(AssertionError, match="python3.10"):
        machine.converge()
    assert list(machine.prefix.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "files", "sentence"),
    [
        (1000, 10**6, r"no room for llm and its archive: \S+ has 0 MiB free, \d+ are needed"),
        (10**9, 10, r"no room for llm and its archive: \S+ takes 10 more files, \d+ are needed"),
    ],
)
def test_a_disk_without_room_is_named_before_anything_travels(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, free: int, files: int, sentence: str
) -> None:
    programs = machine.root / "programs"
    programs.mkdir()
    (programs / "df").write_text(
        '#!/bin/sh\necho title\ncase "$*" in\n'
        f"*-i*) echo /dev/a {10**7} 1 {files} 1% / ;;\n*) echo /dev/a {10**10} 1 {free} 1% / ;;\nesac\n"
    )
    (programs / "df").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        with pytest.raises(AssertionError, match=sentence):
            machine.converge()
    assert not (machine.root / "var/archives").exists()
    assert not machine.prefix.parent.exists()
    machine.settle()


def test_a_file_system_that_counts_no_inodes_has_room(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As btrfs answers."""
    programs = machine.root / "programs"
    programs.mkdir()
    (programs / "df").write_text(
        '#!/bin/sh\necho title\ncase "$*" in\n'
        f"*-i*) echo /dev/a 0 0 0 - / ;;\n*) echo /dev/a {10**10} 1 {10**9} 1% / ;;\nesac\n"
    )
    (programs / "df").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    machine.settle()


def slowly(folder: Path, program: str, script: str) -> str:
    """A PATH on which one program does something else first."""
    folder.mkdir()
    (folder / program).write_text(f'#!/bin/sh\n{script}\nexec {shutil.which(program)} "$@"\n')
    (folder / program).chmod(0o755)
    return f"PATH={folder}:$PATH\n"


def test_a_run_that_was_killed_and_the_next_one_do_not_mix_their_trees(machine: Machine) -> None:
    """A killed control process does not end what it started on the node."""
    target, role = machine.target(environment.role), environment.role
    _, upload, unpack = role.converge(
        target, role.parse(shell(role.probe(target))), {}, machine.findings()
    )
    assert isinstance(upload, Upload) and isinstance(unpack, Shell)
    Path(upload.destination).parent.mkdir(parents=True)
    shutil.copy(upload.source, upload.destination)
    begun, cleared = machine.root / "begun", machine.root / "cleared"
    until = f"for i in $(seq 30); do [ -e {cleared} ] && break; sleep 0.05; done"
    # The first is about to stamp its tree when the second has made an empty one of the same name.
    first = slowly(machine.root / "first", "sync", f"touch {begun}; {until}")
    second = slowly(machine.root / "second", "tar", f"touch {cleared}; sleep 1")
    orphan = subprocess.Popen(
        ["sh", "-c", f"{first}set -e\n{unpack.command}"], stderr=subprocess.DEVNULL
    )
    while not begun.exists():
        assert orphan.poll() is None
    again = subprocess.Popen(
        ["sh", "-c", f"{second}set -e\n{unpack.command}"], stderr=subprocess.DEVNULL
    )
    assert orphan.wait(20) == 0
    assert (machine.prefix / "bin/greet").exists()
    assert again.wait(20) == 0
    assert machine.ids() == ["environment-unproved"]


def test_a_venv_of_a_python_that_is_not_here_is_refused(
    machine: Machine, packed: Path, tmp_path: Path
) -> None:
    subprocess.run(["tar", "-xzf", str(packed), "-C", str(tmp_path)], check=True)
    for link in ("python", "python3"):
        python = tmp_path / "envs/llm/bin" / link
        python.unlink()
        python.symlink_to("/nowhere/bin/python3")
    subprocess.run(
        ["tar", "-cf", str(tmp_path / "x.tar"), "-C", str(tmp_path / "envs"), "llm"], check=True
    )
    shutil.rmtree(tmp_path / "envs")
    machine.entry["archive"] = "x.tar"
    assert machine.ids() == ["environment-python"]
    machine.converge()
    assert not machine.prefix.exists()


@pytest.mark.parametrize("name", ["a b", "it's", "a" * 140])
def test_prefixes_that_no_shebang_can_hold_work(machine: Machine, name: str) -> None:
    machine.entry["prefix"] = str(machine.root / "envs" / name / "llm")
    assert machine.converge() == ""
    assert machine.ids() == []
    assert shell(f'"{machine.entry["prefix"]}/bin/greet"') == machine.entry["prefix"]


def test_a_moved_environment_is_mended_where_it_lies_now(right: Machine) -> None:
    elsewhere = right.root / "envs" / "moved"
    right.prefix.rename(elsewhere)
    right.entry["prefix"] = str(elsewhere)
    assert "environment-moved" in right.ids()
    assert right.converge() == ""
    assert right.ids() == []
    assert shell(str(elsewhere / "bin/greet")) == str(elsewhere)


SYSTEMD_RUN = f"""#!{sys.executable}
import os, sys
words = sys.argv[1:]
if words == ["--version"]:
    sys.exit(print("systemd VERSION (VERSION.2-1~deb12u1)"))
if os.path.exists(sys.argv[0] + ".broken"):
    sys.exit("Failed to start transient service unit: Access denied")
while words[0].startswith("--"):
    words.pop(0)
words = [word.replace("$$", "$") for word in words]
os.execve(words[0], words, {{"INVOCATION_ID": "1", "PATH": "/none"}})
"""


def test_modules_and_commands_are_tried_in_a_unit_of_systemd_as_a_job_is(
    right: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, sent = right.root / "programs", right.root / "sent/roles/environment"
    programs.mkdir()
    sent.mkdir(parents=True)
    (sent.parent / "__init__.py").touch()
    (sent / "__init__.py").touch()
    shutil.copy(Path(manifest.__file__).with_name("trial.py"), sent)
    monkeypatch.setattr(manifest, "__file__", str(sent / "manifest.py"))

    def systemd_of(version: int) -> None:
        (programs / "systemd-run").write_text(SYSTEMD_RUN.replace("VERSION", str(version)))
        (programs / "systemd-run").chmod(0o755)

    monkeypatch.setattr("roles.environment.prove.RUNNING", str(right.root))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    seen = (
        "import os\nassert (os.environ['INVOCATION_ID'], os.environ['WORD']) == ('1', 'a $HOME')\n"
    )
    (right.site / "greeting.py").write_text(seen)
    script = right.prefix / "bin/greet"
    script.write_text('#!/bin/sh\n[ "$INVOCATION_ID $WORD" = "1 a \\$HOME" ]\n')

    def said() -> list[tuple[str, str]]:
        tried = try_in_unit(right.prefix, ["greeting"], [str(script)], {"WORD": "a $HOME"})
        return tried.imports + [("environment-command", text) for text in tried.commands]

    systemd_of(232)
    assert said() == []
    (programs / "systemd-run.broken").touch()
    reason = "Failed to start transient service unit: Access denied"
    sentence = f"nothing in {right.prefix} runs under systemd: {reason}"
    assert said() == [("environment-unit", sentence)]
    systemd_of(231)  # no job runs under it: as in a login
    assert [id for id, _ in said()] == ["environment-import", "environment-command"]
    systemd_of(232)
    monkeypatch.setattr("roles.environment.prove.RUNNING", str(right.root / "nothing"))
    assert [id for id, _ in said()] == ["environment-import", "environment-command"]


def test_what_still_names_an_old_place_is_listed_with_its_reason(right: Machine) -> None:
    [one] = right.target(environment.role).spec.each()
    before = leftovers.read(shell(leftovers.question(one)))
    assert set(before.values()) <= {"notes of what was mended"}
    odd = right.site / os.fsdecode(b"\xff \t.txt")
    odd.write_text(f"made at {OLD}\n")
    now = leftovers.read(shell(leftovers.question(one)))
    (path,) = {*now} - {*before}
    assert right.prefix / path == odd and now[path].startswith("data: ")
    shutil.rmtree(right.prefix)
    assert shell(leftovers.question(one)) == ""
    with pytest.raises(Unreadable):
        leftovers.read("[1")


def wheel(
    folder: Path,
    name: str,
    version: str,
    files: dict[str, str],
    tags: str = "py3-none-any",
    metadata_first: bool = False,
) -> None:
    """A wheel made by hand."""
    metadata = f"{name}-{version}.dist-info"
    own = {
        f"{metadata}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{metadata}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n",
    }
    entries = {**own, **files} if metadata_first else {**files, **own}
    record = "".join(f"{path},,\n" for path in [*entries, f"{metadata}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-{tags}.whl", "w") as archive:
        for path, text in {**entries, f"{metadata}/RECORD": record}.items():
            archive.writestr(path, text)


def pinned(right: Machine) -> Machine:
    wheels = right.root / "wheels"
    wheels.mkdir()
    wheel(wheels, "greeting", "1.1", {"greeting.py": "WORD = 'good day'\n"})
    wheel(
        wheels,
        "greeting",
        "2.0",
        {"greeting.py": "WORD = 'hi'\n"},
        tags="cp39-cp39-manylinux_2_17_x86_64",
    )
    right.entry |= {"pins": {"Greeting": "1.1"}, "wheels": "wheels"}
    return right


def test_a_pin_is_installed_from_its_wheel_without_pip_in_the_environment(right: Machine) -> None:
    pinned(right)
    assert right.ids(pins.role) == ["pin-version"]
    right.settle(pins.role)
    assert (right.site / "greeting.py").read_text() == "WORD = 'good day'\n"
    assert right.ids() == []  # the environment was proved again by the pins role
    assert right.converge(pins.role) == ""


@pytest.mark.parametrize(("name", "version"), [("greeting", "1.1"), ("more_words", "1.0")])
def test_what_a_pin_brings_is_proved_when_it_is_there(
    machine: Machine, name: str, version: str
) -> None:
    """The archive alone does not import: its distribution is replaced, or the pin adds one."""
    (machine.root / "wheels").mkdir()
    files = {f"{module}.py": "" for module in ("greeting", "words")}
    wheel(machine.root / "wheels", name, version, files)
    machine.entry |= {"pins": {name: version}, "wheels": "wheels", "imports": ["words"]}
    machine.settle()
    assert not (machine.prefix / ".lockstep-proof.json").exists()
    assert machine.ids(pins.role) == ["pin-version"]
    machine.settle(pins.role)
    assert machine.ids() == [] and facts_of(machine)["environment hash"]
    (machine.prefix / ".lockstep-proof.json").unlink()
    assert machine.ids() == ["environment-unproved"]
    machine.entry["imports"] = ["no_such_module"]
    assert machine.converge().startswith("environment-import\t")


def test_what_an_editable_package_brings_is_proved_when_it_is_there(machine: Machine) -> None:
    machine.entry |= {"editable": {"More.Words": "source"}, "imports": ["words"]}
    machine.settle()
    (machine.prefix / ".lockstep-src").mkdir()
    (machine.prefix / ".lockstep-src/.more-words.json").touch()
    assert machine.ids() == ["environment-unproved"]
    assert machine.converge().startswith("environment-import\t")


def test_two_versions_at_once_are_made_one(right: Machine) -> None:
    pinned(right).settle(pins.role)
    (right.site / "greeting-0.9.dist-info").mkdir()
    assert right.ids(pins.role) == ["pin-duplicate"]
    right.settle(pins.role)
    assert [path.name for path in right.site.glob("greeting-*")] == ["greeting-1.1.dist-info"]


def test_a_pin_whose_installation_was_cut_off_never_counts(right: Machine) -> None:
    wheels = right.root / "wheels"
    wheels.mkdir()
    wheel(wheels, "many", "1.0", {f"many/m{n}.py": "" for n in range(4000)}, metadata_first=True)
    right.entry |= {"pins": {"many": "1.0"}, "wheels": "wheels"}
    with pytest.raises(AssertionError, match="cut off"):
        right.converge(pins.role, kill_at=right.site / "many-1.0.dist-info/WHEEL")
    assert (right.site / "many-1.0.dist-info").exists()
    assert right.ids() == ["environment-missing"]
    right.converge()
    right.settle(pins.role)
    assert right.ids() == []
    assert len(list((right.site / "many").glob("m*.py"))) == 4000
    beside = {path.name for path in right.prefix.parent.iterdir()}
    assert beside == {"llm"}  # nothing of it is taken for the user's own, or for an earlier version


def test_a_pip_that_gave_up_leaves_the_environment_as_it_was(right: Machine) -> None:
    (right.root / "wheels").mkdir()
    (right.root / "wheels/other-1.1-py3-none-any.whl").write_bytes(b"no zip")
    right.entry |= {"pins": {"other": "1.1"}, "wheels": "wheels"}
    with pytest.raises(AssertionError):
        right.converge(pins.role)
    assert right.ids() == []
    assert right.ids(pins.role) == ["pin-version"]


def test_a_pin_without_a_wheel_for_this_python_is_the_users_to_mend(right: Machine) -> None:
    pinned(right).entry["pins"] = {"greeting": "2.0"}
    (finding,) = right.findings(pins.role)
    assert (finding.id, finding.repairable) == ("pin-wheel", False)
    assert "is for Python" in finding.fix


@pytest.fixture
def trained(right: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A checkout with a small trainer; the right environment has it."""
    root = right.root / "checkout"
    (root / "trainer").mkdir(parents=True)
    (root / "trainer/__init__.py").write_text("")
    (root / "trainer/config.py").write_text("VALUE = 1\n")
    (root / "trainer/reader.py").write_text("import trainer.config\n")
    (root / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "3.4.5"\n')
    package = sys.modules["roles.trainer.package"].package
    for name in ("drift", "converge", "probe"):
        monkeypatch.setattr(
            sys.modules[f"roles.trainer.{name}"], "package", lambda: package.__wrapped__(root)
        )
    right.settle(trainer.role)
    return right


def test_the_trainer_is_installed_at_the_checkouts_version(trained: Machine) -> None:
    (metadata,) = trained.site.glob("lockstep_trainer-3.4.5+*.dist-info")
    assert "trainer/config.py" in (metadata / "RECORD").read_text()
    out = shell(
        f"cd / && {trained.prefix}/bin/python -c 'import trainer.config as c; print(c.VALUE)'"
    )
    assert out == "1"
    assert trained.ids() == []  # the environment's proof still stands


@pytest.mark.parametrize(
    ("damage", "id"),
    [
        (lambda m: shutil.rmtree(next(m.site.glob("lockstep_trainer-*"))), "trainer-missing"),
        (lambda m: (m.site / "trainer/config.py").write_text("VALUE = 2\n"), "trainer-edited"),
        (lambda m: (m.site / "trainer/config.py").unlink(), "trainer-edited"),
        (lambda m: (m.site / "trainer/more.py").write_text(""), "trainer-edited"),
        (lambda m: shutil.rmtree(m.site / "trainer"), "trainer-edited"),
        (lambda m: (m.root / "checkout/trainer/new.py").write_text(""), "trainer-version"),
        (lambda m: (m.site / "lockstep_trainer-0.0.1.dist-info").mkdir(), "trainer-version"),
    ],
)
def test_a_changed_trainer_is_named_and_replaced(trained: Machine, damage: Damage, id: str) -> None:
    damage(trained)
    assert trained.ids(trainer.role) == [id]
    trained.settle(trainer.role)
    assert len(list(trained.site.glob("lockstep_trainer-*"))) == 1
    assert not (trained.site / ".lockstep-trainer-new").exists()


def test_a_trainer_that_does_not_import_is_named(trained: Machine) -> None:
    (trained.root / "checkout/trainer/config.py").write_text("import not_there\n")
    assert "trainer-import\timport trainer.reader in" in trained.converge(trainer.role)


def test_another_package_called_trainer_is_not_overwritten(trained: Machine) -> None:
    (trained.site / "trainer-0.0.36.dist-info").mkdir()
    (finding,) = trained.findings(trainer.role)
    assert (finding.id, finding.repairable) == ("trainer-foreign", False)


def test_the_scripts_that_run_on_nodes_use_no_syntax_newer_than_they_promise() -> None:
    environments = ("mend", "prove", "manifest", "trial")
    for name in (*(f"environment/{each}.py" for each in environments), "trainer/install.py"):
        source = Path(environment.__file__).parents[1] / name
        ast.parse(source.read_text(), feature_version=(3, 8))
