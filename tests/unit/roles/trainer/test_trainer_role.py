"""The trainer role: the version says what is in the files, and so does the look."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles.core.role import Target, Unreadable
from roles.core.steps import Shell, Upload
from roles.environment.spec import Environments
from roles.trainer import role
from roles.trainer.converge import converge
from roles.trainer.drift import drift
from roles.trainer.package import Package, package, wheel
from roles.trainer.probe import Seen, TrainerState, parse, probe
from roles.trainer.spec import TrainerSpec

read = package.__wrapped__


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "checkout"
    (root / "trainer/sub").mkdir(parents=True)
    (root / "trainer/__pycache__").mkdir()
    (root / "trainer/__pycache__/config.pyc").write_text("x")
    (root / "trainer/.hidden").write_text("x")
    (root / "trainer/__init__.py").write_text("")
    (root / "trainer/sub/data.yaml").write_text("a: 1\n")
    (root / "pyproject.toml").write_text(
        '[tool]\nversion = "9"\n[project]\nname = "x"\nversion = "0.1.0"\n'
    )
    monkeypatch.setattr(
        sys.modules["roles.trainer.package"], "state_directory", lambda: tmp_path / "state"
    )
    for name in ("drift", "converge", "probe"):
        monkeypatch.setattr(sys.modules[f"roles.trainer.{name}"], "package", lambda: read(root))
    return root


def target(*names: str) -> Target[TrainerSpec]:
    nodes = {f"node{n}": Node(name=f"node{n}", address=f"10.0.0.{n}") for n in (1, 2)}
    sections: dict[str, Spec] = {"trainer": TrainerSpec()}
    if names:
        entries = {name: {"archive": f"/{name}.tar"} for name in names}
        sections["environments"] = Environments.model_validate(entries)
    cluster = Cluster("lab", Path("/x/lab.yaml"), nodes, sections=sections)
    return Target(cluster, nodes["node1"], TrainerSpec())


def right(own: Package) -> Seen:
    return Seen("/site", frozenset({own.version}), dict(own.files))


def state(**seen: Seen) -> TrainerState:
    return TrainerState(seen, frozenset())


def test_the_version_follows_names_and_contents_and_nothing_else(checkout: Path) -> None:
    first = read(checkout)
    assert first.version.startswith("0.1.0+") and len(first.version) == len("0.1.0+") + 12
    assert list(first.files) == ["trainer/__init__.py", "trainer/sub/data.yaml"]
    (checkout / "trainer/__pycache__/other.pyc").write_text("y")
    (checkout / "trainer/__init__.py").touch()
    assert read(checkout).version == first.version
    (checkout / "trainer/sub/data.yaml").rename(checkout / "trainer/sub/date.yaml")
    renamed = read(checkout).version
    (checkout / "trainer/sub/date.yaml").write_text("a: 2\n")
    assert len({first.version, renamed, read(checkout).version}) == 3


def test_the_wheel_holds_exactly_these_files_and_is_the_same_each_time(checkout: Path) -> None:
    own = read(checkout)
    file = wheel(own)
    first = file.read_bytes()
    names = zipfile.ZipFile(file).namelist()
    assert [name for name in names if ".dist-info" not in name] == list(own.files)
    assert f"{own.metadata}/RECORD" in names
    file.unlink()
    assert wheel(own).read_bytes() == first
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_right_environment_has_no_findings(checkout: Path) -> None:
    own = read(checkout)
    assert drift(target("a", "b"), state(a=right(own), b=right(own)), {}) == []


def test_only_the_environments_that_differ_get_the_wheel(checkout: Path) -> None:
    own = read(checkout)
    where, found = target("a", "b"), state(a=right(own), b=Seen("/site"))
    (finding,) = drift(where, found, {})
    assert finding.id == "trainer-missing"
    upload, install = list(converge(where, found, {}, [finding]))
    assert isinstance(upload, Upload) and upload.source.name.startswith("lockstep_trainer-0.1.0+")
    assert isinstance(install, Shell) and "P=/opt/lockstep/envs/b\n" in install.command
    assert upload.destination in install.command


def test_another_version_or_a_changed_file_or_one_too_many_is_named(checkout: Path) -> None:
    own = read(checkout)
    files = dict(own.files)
    cases = [
        (Seen("/s", frozenset({"0.0.1"}), files), "trainer-version"),
        (Seen("/s", frozenset({own.version, "0.0.1"}), files), "trainer-version"),
        (
            Seen("/s", frozenset({own.version}), {**files, "trainer/x.py": "0" * 64}),
            "trainer-edited",
        ),
        (Seen("/s", frozenset({own.version}), {}), "trainer-edited"),
        (
            Seen("/s", frozenset({own.version}), files, "trainer-0.0.36.dist-info"),
            "trainer-foreign",
        ),
    ]
    for seen, id in cases:
        assert [finding.id for finding in drift(target("a"), state(a=seen), {})] == [id]


def test_a_foreign_trainer_is_never_overwritten(checkout: Path) -> None:
    seen = state(a=Seen("/s", foreign="trainer-0.0.36.dist-info"))
    (finding,) = drift(target("a"), seen, {})
    assert not finding.repairable and "trainer-0.0.36" in finding.seen
    assert list(converge(target("a"), seen, {}, [])) == []


def test_without_environments_there_is_nothing_to_look_at(checkout: Path) -> None:
    assert probe(target()) == "echo end\n"
    assert drift(target(), parse("end"), {}) == []


def test_what_the_probe_prints_is_read(checkout: Path) -> None:
    digest = "a1" * 32
    text = (
        "environment a\nsite /s\nmetadata lockstep_trainer-0.1.0+abc.dist-info\n"
        f"metadata trainer-1.dist-info\n{digest}  trainer/a b.py\nenvironment b\nparcel /x\nend"
    )
    found = parse(text)
    assert found.environments["a"] == Seen(
        "/s", frozenset({"0.1.0+abc"}), {"trainer/a b.py": digest}, "trainer-1.dist-info"
    )
    assert found.environments["b"] == Seen() and found.parcels == {"/x"}
    assert role.facts[0].read(found) == "0.1.0+abc"


@pytest.mark.parametrize(
    "text", ["", "environment a", "site /s\nend", "environment a\nsha256sum: no\nend"]
)
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)
