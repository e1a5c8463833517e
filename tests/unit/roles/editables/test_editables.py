"""Editable packages: the source is packed by content, what differs is named, and a node's files are compared."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell, Upload
from roles.editables import prove, source
from roles.editables.converge import _forget, converge, proof
from roles.editables.drift import drift, sources_of
from roles.editables.probe import EditablesState, Seen, parse, probe
from roles.editables.source import SourceProblem, source_of
from roles.environment import sources
from roles.environment.archive import Archive
from roles.environment.spec import Environments
from roles.storage.spec import StorageSpec

PROJECT = Path(__file__).parents[1] / "looks" / "rehearsal-tool"
SITE = "/opt/lockstep/envs/llm/lib/python3.11/site-packages"
NODE = Node(name="node1", address="10.0.0.1")
METADATA = "rehearsal_tool-1.0.dist-info"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(source, "state_directory", lambda: tmp_path / "state")
    describing(monkeypatch)
    source._source.cache_clear()
    yield
    source._source.cache_clear()


def describing(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    archive = Archive("ab" * 32, 1, "tar", "", "3.11", "bin/python3", None)
    archive = replace(archive, distributions=("setuptools-80.0.dist-info",), **changes)
    monkeypatch.setattr(sources, "describe", lambda path, source: archive)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROJECT, tmp_path / "tool"))


def of(**folders: Path | str) -> Target[Environments]:
    entry = {
        "archive": "/a.tar",
        "editable": {n.replace("_", "-"): str(p) for n, p in folders.items()},
    }
    section = Environments.model_validate({"llm": entry})
    cluster = Cluster(
        "lab", Path("/x/lab.yaml"), {"node1": NODE}, sections={"environments": section}
    )
    return Target(cluster, NODE, section)


def state(stamp: str = "", *folders: str, **lost: bool) -> EditablesState:
    stamps = {"rehearsal-tool": stamp} if stamp else {}
    return EditablesState({"llm": Seen(SITE, frozenset(folders), stamps, lost)}, frozenset())


def stamp_of(where: Target[Environments], **more: str) -> str:
    parcel = source_of(where.cluster, where.spec.each()[0], "rehearsal-tool").parcel
    values = {"source": parcel.sha256, "metadata": METADATA, **more}
    return str(values).replace("'", '"')


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


def packed(project: Path) -> Path:
    source._source.cache_clear()
    where = of(rehearsal_tool=project)
    return source_of(where.cluster, where.spec.each()[0], "rehearsal-tool").parcel.source


def test_the_same_content_is_the_same_parcel_whoever_packs_it_and_when(project: Path) -> None:
    first = packed(project)
    os.utime(project / "pyproject.toml", (1, 1))
    (project / "pyproject.toml").chmod(0o600)
    (project / ".git").mkdir()
    (project / ".git" / "HEAD").write_text("x")
    (project / "rehearsal_tool" / "__pycache__").mkdir()
    (project / "rehearsal_tool" / "__pycache__" / "a.cpython-311.pyc").write_text("x")
    assert packed(project) == first
    with tarfile.open(first) as tar:
        assert tar.getnames() == ["pyproject.toml", "rehearsal_tool/__init__.py"]
        assert {(one.uid, one.gid, one.uname, one.mode) for one in tar} == {(0, 0, "", 0o644)}
    (project / "rehearsal_tool" / "__init__.py").write_text("ANSWER = 43\n")
    assert packed(project) != first


def test_what_did_not_change_is_not_packed_again(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = packed(project)
    packings: list[Path] = []
    pack = source._pack

    def counted(folder: Path, into: Path) -> Path:
        packings.append(folder)
        return pack(folder, into)

    monkeypatch.setattr(source, "_pack", counted)
    (project / "__pycache__").mkdir()
    assert packed(project) == before and packings == []
    (project / "notes.txt").write_text("a")
    changed = packed(project)
    assert changed != before and packings == [project]
    changed.unlink()  # forgotten since
    assert packed(project) == changed and changed.is_file() and len(packings) == 2
    assert packed(project) == changed and len(packings) == 2
    content = changed.read_bytes()
    changed.write_bytes(content[:-512])  # a power cut of this machine
    assert packed(project) == changed and changed.read_bytes() == content


def test_links_inside_travel_and_others_are_refused(project: Path) -> None:
    (project / "inside").symlink_to("rehearsal_tool/__init__.py")
    with tarfile.open(packed(project)) as tar:
        assert tar.getmember("inside").linkname == "rehearsal_tool/__init__.py"
    for target in ("/etc/passwd", "../outside"):
        (project / "inside").unlink()
        (project / "inside").symlink_to(target)
        with pytest.raises(SourceProblem, match=f"is a link to {target}, which does not travel"):
            packed(project)
    assert not list(project.parent.glob("state/sources/packing.*"))


def test_a_link_inside_travels_however_its_folder_is_spelt(project: Path) -> None:
    (project / "inside").symlink_to("rehearsal_tool/__init__.py")
    assert packed(project / "rehearsal_tool" / "..") == packed(project)


def test_what_was_packed_is_the_same_source_as_its_folder(project: Path, tmp_path: Path) -> None:
    of_folder = packed(project)
    (tmp_path / "tool.tar").write_bytes(of_folder.read_bytes())
    source._source.cache_clear()
    where = of(rehearsal_tool=tmp_path / "tool.tar")
    found = source_of(where.cluster, where.spec.each()[0], "rehearsal-tool")
    assert (found.parcel.sha256, found.parcel.place) == (
        of_folder.stem,
        f"sources/{of_folder.name}",
    )
    assert found.requires == ("setuptools>=61", "wheel")
    other = drift(of(other=tmp_path / "tool.tar"), state(), {})
    assert "tool.tar/pyproject.toml is that of rehearsal-tool" in only(other).seen
    (tmp_path / "odd.tar").write_text("no tar at all")
    odd = drift(of(rehearsal_tool=tmp_path / "odd.tar"), state(), {})
    assert "neither a folder nor a plain tar of one" in only(odd).seen


def test_a_source_that_cannot_be_used_is_one_sentence(project: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, words in (
        (tmp_path / "gone", "there is no folder"),
        (empty, "neither pyproject.toml"),
    ):
        finding = only(drift(of(rehearsal_tool=folder), state(), {}))
        assert (finding.id, finding.repairable) == ("editable-source", False)
        assert words in finding.seen
    finding = only(drift(of(other=project), state(), {}))
    assert "pyproject.toml is that of rehearsal-tool, not of other" in finding.seen
    os.mkfifo(project / "pipe")
    assert "is no file, folder or link" in only(drift(of(rehearsal_tool=project), state(), {})).seen
    (project / "pyproject.toml").write_text("[build-system\n")
    assert "cannot be read" in only(drift(of(rehearsal_tool=project), state(), {})).seen


def test_data_in_a_source_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_BYTES", 10)
    finding = only(drift(of(rehearsal_tool=project), state(), {}))
    assert "move data and checkpoints out of it" in finding.seen


def test_what_builds_it_must_be_in_the_archive(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = project / "pyproject.toml"
    text = settings.read_text()
    assert only(drift(of(rehearsal_tool=project), state(), {})).id == "editable-missing"
    source._source.cache_clear()
    settings.write_text(text.replace("setuptools>=61", "setuptools>=90"))
    finding = only(drift(of(rehearsal_tool=project), state(), {}))
    assert (finding.id, finding.repairable) == ("editable-backend", False)
    assert finding.seen == "the archive lacks setuptools>=90 (it has 80.0)"
    source._source.cache_clear()
    settings.write_text(text.replace("setuptools>=61", "hatchling"))
    assert "lacks hatchling" in only(drift(of(rehearsal_tool=project), state(), {})).seen


def test_what_is_installed_from_the_source_as_it_is_now_needs_nothing(project: Path) -> None:
    where = of(rehearsal_tool=project)
    right = state(stamp_of(where), METADATA, "torch-2.6.0.dist-info")
    assert drift(where, right, {}) == []
    assert (sources_of(right) or "").startswith("llm: rehearsal-tool ")
    assert sources_of(state()) is None


@pytest.mark.parametrize(
    ("changes", "folders", "id", "seen"),
    [
        ({"source": "00"}, (METADATA,), "editable-outdated", "from source 00"),
        ({"edited": "a.py is changed"}, (METADATA,), "editable-edited", "a.py is changed"),
        ({}, (), "editable-missing", "recorded as nothing"),
        (
            {},
            (METADATA, "rehearsal_tool-0.9.dist-info"),
            "editable-missing",
            "0.9.dist-info and reh",
        ),
    ],
)
def test_what_differs_is_put_right(
    project: Path, changes: dict[str, str], folders: tuple[str, ...], id: str, seen: str
) -> None:
    where = of(rehearsal_tool=project)
    wrong = state(stamp_of(where, **changes), *folders)
    finding = only(drift(where, wrong, {}))
    assert (finding.id, finding.repairable, finding.disturbs) == (id, True, True)
    assert seen in finding.seen
    pip, tar, install, note = converge(where, wrong, {}, [finding])
    assert isinstance(pip, Upload) and isinstance(tar, Upload) and "/sources/" in tar.destination
    assert isinstance(install, Shell) and isinstance(note, Shell)
    assert (
        "--no-deps --no-index --no-build-isolation -e /opt/lockstep/envs/llm/.lockstep-src/rehearsal-tool"
        in (install.command)
    )


def test_an_editable_install_whose_source_did_not_travel_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describing(monkeypatch, editables={"llamafactory": "/home/liu/LLaMA-Factory"})
    section = Environments.model_validate({"llm": {"archive": "/a.tar"}})
    where = replace(of(rehearsal_tool=project), spec=section)
    finding = only(drift(where, state(llamafactory=False), {}))
    assert (finding.id, finding.repairable) == ("env-editable-stale", False)
    assert finding.want == (
        "llamafactory in /opt/lockstep/envs/llm, an editable install of /home/liu/LLaMA-Factory"
    )
    assert "environments.llm.editable: {llamafactory: FOLDER}" in finding.fix
    assert "environments.llm.accept: {llamafactory: [env-editable-stale]}" in finding.fix
    for accepted, found in (("env-editable-stale", 0), ("bnb-cpu", 1)):
        entry = {"archive": "/a.tar", "accept": {"LLamaFactory": [accepted]}}
        accepting = replace(where, spec=Environments.model_validate({"llm": entry}))
        assert len(drift(accepting, state(llamafactory=False), {})) == found
    assert drift(where, state(llamafactory=True), {}) == []  # on this node it is there
    assert "source llamafactory" in probe(where)


def test_an_environment_without_editables_costs_nothing() -> None:
    assert probe(of()) == "echo end\n"
    assert proof(of()) == ":\n"
    assert drift(of(), parse("end"), {}) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "d x\nend",
        "environment llm",
        "environment llm\nwhat 1\nend",
        "environment llm\nsource a x\nend",
    ],
)
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def test_a_new_file_counts_where_python_could_import_it() -> None:
    before = {"a.py": "1", "b.py": "2", "data": "3"}
    now = {"a.py": "9", "data": "3", "c.py": "4", "log.txt": "5"}
    assert prove.edits(before, now) == ["a.py is changed", "b.py is gone", "c.py is new"]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A real environment."""
    made = tmp_path / "env"
    venv.create(made, symlinks=True)
    (made / ".lockstep-environment.json").write_text("{}\n")
    return made


def test_a_real_project_is_installed_compared_and_installed_again(
    project: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The steps themselves, run by this machine's shell on an environment of its own; nothing is fetched."""
    in_tree_backend(project)
    entry = {
        "archive": "/a.tar",
        "prefix": str(prefix),
        "editable": {"rehearsal-tool": str(project)},
    }
    section = Environments.model_validate({"llm": entry})
    where = replace(of(rehearsal_tool=project), spec=section)
    lock = str(tmp_path / "node")
    [site] = prefix.glob("lib/python3*/site-packages")

    def run(command: str) -> str:
        command = command.replace("/var/lib/lockstep", lock)
        done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def look() -> EditablesState:
        return parse(run(probe(where)).rstrip("\n"))

    def bring_right() -> None:
        before = look()
        for step in converge(where, before, {}, drift(where, before, {})):
            if isinstance(step, Upload):
                destination = Path(step.destination.replace("/var/lib/lockstep", lock))
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(step.source, destination)
            elif isinstance(step, Shell):
                run(step.command)
        assert drift(where, look(), {}) == []

    assert only(drift(where, look(), {})).id == "editable-missing"
    bring_right()
    code = "import rehearsal_tool as r; print(r.ANSWER, r.__file__)"
    told = subprocess.run([prefix / "bin/python", "-c", code], capture_output=True, text=True)
    assert told.stdout.split() == [
        "42",
        f"{prefix}/.lockstep-src/rehearsal-tool/rehearsal_tool/__init__.py",
    ]
    check = proof(where).partition("compare() {")
    compare = f"compare() {{{check[2]}"
    assert run(compare) == ""

    edited = prefix / ".lockstep-src/rehearsal-tool/rehearsal_tool/__init__.py"
    edited.write_text("ANSWER = 0\n")
    (edited.parent / "output.log").write_text("of a run")
    words = "rehearsal_tool/__init__.py is changed"
    assert (
        run(compare)
        == f"editable-edited\trehearsal-tool at {prefix}/.lockstep-src/rehearsal-tool: {words}\n"
    )
    assert only(drift(where, look(), {})).id == "editable-edited"

    (project / "rehearsal_tool" / "__init__.py").write_text("ANSWER = 43\n")
    source._source.cache_clear()
    assert only(drift(where, look(), {})).id == "editable-outdated"
    bring_right()
    assert run(compare) == ""
    kept = prefix / ".lockstep-src/.rehearsal-tool.before/rehearsal_tool"
    assert (kept / "output.log").read_text() == "of a run"
    told = subprocess.run([prefix / "bin/python", "-c", code], capture_output=True, text=True)
    assert told.stdout.split()[0] == "43"
    assert len(list(site.glob("rehearsal_tool-*.dist-info"))) == 1
    assert (prefix / ".lockstep-environment.json").exists()


def test_a_packed_source_that_was_damaged_is_removed_and_told(
    project: Path, tmp_path: Path
) -> None:
    entry = {
        "archive": "/a.tar",
        "prefix": str(tmp_path / "env"),
        "editable": {"rehearsal-tool": str(project)},
    }
    where = replace(of(), spec=Environments.model_validate({"llm": entry}))
    pip, tar, install, _ = converge(where, state(), {}, drift(where, state(), {}))
    assert isinstance(pip, Upload) and isinstance(tar, Upload) and isinstance(install, Shell)
    node = str(tmp_path / "node")
    for upload in (pip, tar):
        damaged = Path(upload.destination.replace("/var/lib/lockstep", node))
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(upload.source.read_bytes())
    damaged.write_bytes(tar.source.read_bytes()[:-1])
    command = install.command.replace("/var/lib/lockstep", node)
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True)
    assert done.returncode == 1 and not damaged.exists()
    assert done.stderr == f"{damaged} was damaged, and is removed: converge again\n"


def test_sources_of_earlier_runs_go_and_shared_ones_when_they_are_a_day_old(
    project: Path, tmp_path: Path
) -> None:
    where = of(rehearsal_tool=project)
    shared = tmp_path / "shared"
    storage = StorageSpec.model_validate({"kind": "existing", "path": str(shared)})
    cluster = replace(where.cluster, sections={**where.cluster.sections, "storage": storage})
    where = replace(where, cluster=cluster)
    now = packed(project).name
    local, depot = tmp_path / "node/sources", shared / ".lockstep/sources"
    for folder in (local, depot):
        folder.mkdir(parents=True)
        for name in (now, "earlier.tar", "yesterday.tar"):
            (folder / name).touch()
        for name in (now, "yesterday.tar"):
            os.utime(folder / name, (1, 1))

    def run(of: Target[Environments]) -> None:
        command = _forget(of).replace("/var/lib/lockstep", str(tmp_path / "node"))
        subprocess.run(["sh", "-ec", command], check=True)

    worker = Node(name="node2", address="10.0.0.2")
    nodes = {"node1": NODE, "node2": worker}
    run(replace(where, cluster=replace(cluster, nodes=nodes), node=worker))
    assert sorted(path.name for path in local.iterdir()) == [now]
    assert len(list(depot.iterdir())) == 3
    run(where)
    assert sorted(path.name for path in depot.iterdir()) == sorted([now, "earlier.tar"])


def in_tree_backend(project: Path) -> None:
    """The project builds itself, with the standard library alone."""
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "rehearsal-tool"\nversion = "1.0"\n'
    )
    (project / "backend.py").write_text(
        "import os, zipfile\n"
        "def build_editable(folder, config_settings=None, metadata_directory=None):\n"
        "    name, info = 'rehearsal_tool-1.0-py3-none-any.whl', 'rehearsal_tool-1.0.dist-info'\n"
        "    files = {\n"
        "        '_rehearsal_tool.pth': os.getcwd() + '\\n',\n"
        "        f'{info}/METADATA': 'Metadata-Version: 2.1\\nName: rehearsal-tool\\nVersion: 1.0\\n',\n"
        "        f'{info}/WHEEL': 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n',\n"
        "    }\n"
        "    with zipfile.ZipFile(os.path.join(folder, name), 'w') as wheel:\n"
        "        for path, text in files.items():\n"
        "            wheel.writestr(path, text)\n"
        "        wheel.writestr(f'{info}/RECORD', ''.join(f'{p},,\\n' for p in [*files, f'{info}/RECORD']))\n"
        "    return name\n"
    )
