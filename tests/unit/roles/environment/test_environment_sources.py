"""Archives that are made here: of a directory, of pip's requirements, of an environment.yml."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from inventory.settings import Settings
from roles.environment import archive, sources
from roles.environment.archive import ArchiveProblem
from roles.environment.sources import archive_of, described
from roles.environment.spec import Environments, on_shared
from roles.storage.spec import StorageSpec
from tests.unit.roles.environment.made import CONDA

NODES = {"node1": Node(name="node1", address="10.0.0.1")}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cluster file lies; what is made lies below ``state``."""
    for module in (archive, sources):
        monkeypatch.setattr(module, "state_directory", lambda: tmp_path / "state")
    monkeypatch.setattr(sources, "_answers", {})
    return tmp_path


def asked(home: Path, **entry: Any) -> tuple[Cluster, Any]:
    """The cluster that declares this environment, and the environment, as a new run reads them."""
    sources._answers.clear()
    section = Environments.model_validate({"llm": entry})
    sections: dict[str, Spec] = {"environments": section}
    return Cluster("lab", home / "lab.yaml", NODES, sections=sections), section.each()[0]


def tree(home: Path) -> Path:
    """A conda environment as a directory."""
    root = home / "envs/llm"
    for name, content in CONDA:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str) and content.startswith("-> "):
            path.symlink_to(content[3:])
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def made(home: Path) -> list[str]:
    """What lies in the state directory for environments, beside the lock."""
    folder = home / "state/environments/lab/llm"
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_a_source_that_cannot_be_looked_at_is_one_sentence_or_the_nodes_to_see(home: Path) -> None:
    name = 300 * "x"  # as a folder that is closed to this user, which root never meets
    with pytest.raises(ArchiveProblem, match="x cannot be read: File name too long"):
        archive_of(*asked(home, directory=name))
    cluster, one = asked(home, directory=f"/shared/{name}")
    storage = StorageSpec.model_validate({"kind": "existing", "path": "/shared"})
    seen = replace(cluster, sections={**cluster.sections, "storage": storage})
    assert on_shared(seen, one) == f"/shared/{name}"


def test_a_directory_is_packed_once_and_again_only_when_it_changed(home: Path) -> None:
    root = tree(home)
    first = described(*asked(home, directory="envs/llm"))
    assert (first.root, first.python, first.interpreter) == ("", "3.10", "bin/python3.10")
    path = archive_of(*asked(home, directory="envs/llm"))
    time = path.stat().st_mtime_ns
    assert described(*asked(home, directory="envs/llm")) == first
    assert path.stat().st_mtime_ns == time
    (root / "lib/python3.10/site-packages/y.py").write_text("2")
    second = archive_of(*asked(home, directory="envs/llm"))
    assert second != path and made(home) == [second.name]
    assert described(*asked(home, directory="envs/llm")).sha256 != first.sha256


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "conda-meta/history").write_text("longer"),
        lambda root: os.utime(root / "conda-meta/history", (1, 1)),
        lambda root: (root / "bin/python3.10").chmod(0o700),
        lambda root: (
            (root / "bin/python").unlink() or (root / "bin/python").symlink_to("python3.1")
        ),
        lambda root: (root / "conda-meta/history").unlink(),
        lambda root: (root / "empty").mkdir(),
    ],
)
def test_every_change_of_a_directory_is_seen(home: Path, change: Callable[[Path], object]) -> None:
    root = tree(home)
    before = sources.state_of(root, sources.OF_CACHES)
    change(root)
    assert sources.state_of(root, sources.OF_CACHES) != before


def test_what_use_of_a_directory_leaves_is_no_change_and_does_not_travel(home: Path) -> None:
    root = tree(home)
    first = archive_of(*asked(home, directory="envs/llm"))
    cache = root / "lib/python3.10/site-packages/__pycache__"
    cache.mkdir()
    (cache / "x.cpython-310.pyc").write_text("1")
    (root / ".lockstep-environment.json").write_text("{}")
    assert archive_of(*asked(home, directory="envs/llm")) == first
    (root / "new").write_text("")
    listing = subprocess.run(
        ["tar", "-tf", archive_of(*asked(home, directory="envs/llm"))],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "new" in listing and "pyc" not in listing and "lockstep" not in listing


def test_two_like_directories_make_the_same_archive(home: Path, tmp_path: Path) -> None:
    root = tree(home)
    for path in root.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    shutil.copytree(root, home / "envs/copy", symlinks=True)
    one, other = tmp_path / "one", tmp_path / "other"
    sources.pack(root, one)
    sources.pack(home / "envs/copy", other)
    assert one.read_bytes() == other.read_bytes()


def test_without_zstd_a_directory_is_packed_with_gzip(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(home)
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "zstd" else real(name))
    assert described(*asked(home, directory="envs/llm")).ending == "tar.gz"


def refused(home: Path, **entry: Any) -> str:
    """The sentence, and nothing is left of what was begun."""
    with pytest.raises(ArchiveProblem) as problem:
        described(*asked(home, **entry))
    if (home / "state/environments/lab/llm").exists():
        assert made(home) == []
    said = str(problem.value)
    assert said.isprintable()
    return said


def test_a_directory_that_is_missing_or_no_environment_is_named(home: Path) -> None:
    assert refused(home, directory="gone") == f"there is no directory {home}/gone on this machine"
    (home / "empty").mkdir()
    assert refused(home, directory="empty").startswith(f"{home}/empty holds no Python environment")
    (tree(home) / "bin/torchrun").symlink_to("/etc/shadow")
    assert f"{home}/envs/llm holds bin/torchrun, a link to /etc/shadow" in refused(
        home, directory="envs/llm"
    )


def test_a_directory_that_changes_while_it_is_packed_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, pack = tree(home), sources.pack

    def slow(*arguments: Any) -> None:
        pack(*arguments)
        (root / "late").write_text("")

    monkeypatch.setattr(sources, "pack", slow)
    assert "changed while it was packed: run again" in refused(home, directory="envs/llm")
    assert made(home) == []


def test_a_file_that_goes_while_a_directory_is_looked_at_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tree(home) / "gone"
    monkeypatch.setattr(sources, "entries", lambda *arguments: iter([gone]))
    assert (
        refused(home, directory="envs/llm") == f"{gone} cannot be read: No such file or directory"
    )


def test_a_file_that_cannot_be_read_and_a_full_disk_are_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(home)

    def denied(*arguments: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied", str(root / "lib/secret"))

    with monkeypatch.context() as patch:
        patch.setattr("tarfile.TarFile.add", denied)
        said = refused(home, directory="envs/llm")
    assert said == f"{root} cannot be packed: {root}/lib/secret: Permission denied"
    full = home / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(ArchiveProblem, match=r"envs/llm cannot be packed: "):
        sources.pack(root, full)


def test_what_a_killed_run_left_goes_with_the_next_one(home: Path) -> None:
    tree(home)
    left = home / "state/environments/lab/llm/making-abc/venv"
    left.mkdir(parents=True)
    archive_of(*asked(home, directory="envs/llm"))
    assert [name for name in made(home) if "making" in name] == []


# ---- requirements ---------------------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str, requires: str = "") -> str:
    """A wheel made by hand; its line in a list of requirements."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{name}-{version}.dist-info/RECORD"])
    with zipfile.ZipFile(path, "w") as out:
        for file, text in {**files, f"{name}-{version}.dist-info/RECORD": record}.items():
            out.writestr(zipfile.ZipInfo(file), text)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name}=={version} --hash=sha256:{digest}\n"


@pytest.fixture
def this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python that runs the tests builds, whatever else the machine has."""
    monkeypatch.setattr(sources, "_interpreter", lambda version, file: sys.executable)


RUNNING = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.mark.usefixtures("this_python")
def test_a_list_of_requirements_becomes_a_venv_built_once(home: Path) -> None:
    (home / "main.txt").write_text(wheel(home / "wheels", "greeting", "1.1"))
    entry = {"requirements": "main.txt", "python": RUNNING, "wheels": "wheels"}
    found = described(*asked(home, **entry))
    assert found.python == RUNNING and found.home is not None
    assert found.distributions == ("greeting-1.1.dist-info",)
    path = archive_of(*asked(home, **entry))
    assert made(home) == [path.name]
    (home / "wheels").rename(home / "away")
    (home / "wheels").mkdir()  # nothing is looked for there again
    assert archive_of(*asked(home, **entry)) == path


@pytest.mark.usefixtures("this_python")
def test_a_list_that_cannot_be_built_is_named_with_the_reason_of_pip(home: Path) -> None:
    good = wheel(home / "wheels", "greeting", "1.1", requires="other>=1")
    wheel(home / "wheels", "other", "1.0")
    entry = {"requirements": "main.txt", "python": RUNNING, "wheels": "wheels"}
    assert refused(home, **entry).startswith(f"{home}/main.txt cannot be read: No such file")
    (home / "main.txt").write_text("greeting==1.1\n")
    assert "main.txt cannot be built: ERROR: Hashes are required" in refused(home, **entry)
    (home / "main.txt").write_text(good.replace("sha256:", "sha256:0")[:-2] + "\n")
    assert "DO NOT MATCH THE HASHES" in refused(home, **entry)
    (home / "main.txt").write_text(good)  # what it requires has no hash
    assert "cannot be built: ERROR: In --require-hashes mode" in refused(home, **entry)
    (home / "main.txt").write_bytes(b"\xff\xfe\0")
    assert "main.txt is no text" in refused(home, **entry)
    entry["wheels"] = "nowhere"
    (home / "main.txt").write_text(good)
    assert f"there is no directory of wheels {home}/nowhere" in refused(home, **entry)
    assert made(home) == []


@pytest.mark.usefixtures("this_python")
def test_a_change_of_a_file_that_a_list_takes_in_is_seen(home: Path) -> None:
    (home / "lists").mkdir()
    lines = [wheel(home / "wheels", "greeting", version) for version in ("1.1", "1.2")]
    (home / "main.txt").write_text("# all of it\n  -r lists/base.txt # ours\n")
    (home / "lists/base.txt").write_text(f"{lines[0]}--constraint='the limits.txt'\n")
    (home / "lists/the limits.txt").write_text("greeting<2\n")
    entry = {"requirements": "main.txt", "python": RUNNING, "wheels": "wheels"}
    first = archive_of(*asked(home, **entry))
    assert described(*asked(home, **entry)).distributions == ("greeting-1.1.dist-info",)
    (home / "lists/base.txt").write_text(lines[1])
    assert described(*asked(home, **entry)).distributions == ("greeting-1.2.dist-info",)
    assert not first.exists()


def test_everything_that_a_list_takes_in_is_part_of_it(home: Path) -> None:
    (home / "b.txt").write_text("b")
    (home / "c d.txt").write_text("c")
    for line in ("-r b.txt", "-rb.txt", "--requirement=b.txt", "-c b.txt # x", "- '-r b.txt'"):
        (home / "a.txt").write_text(f"x==1\n  {line}\n")
        assert sources._texts(home / "a.txt")[1:] == ["b"], line
    (home / "a.txt").write_text("-c 'c d.txt'\n--constraint b.txt\n-r lists/../a.txt\n")
    assert sorted(sources._texts(home / "a.txt")[1:]) == ["b", "c"]
    (home / "a.txt").write_text("# -r gone.txt\nx==1 -r gone.txt\n- r-base\n--hash=-rx\n")
    assert len(sources._texts(home / "a.txt")) == 1
    (home / "a.txt").write_text("-r gone.txt\n")
    with pytest.raises(ArchiveProblem, match=f"^{home}/gone.txt cannot be read: No such file"):
        sources._texts(home / "a.txt")
    (home / "a.txt").write_text("-c https://a.lan/limits.txt\n")
    with pytest.raises(ArchiveProblem, match=r"a.txt takes in https://a.lan/limits.txt, where"):
        sources._texts(home / "a.txt")


def test_a_python_that_is_not_here_is_named(home: Path) -> None:
    (home / "main.txt").write_text("")
    said = refused(home, requirements="main.txt", python="3.99", wheels=".")
    assert "is to be built for Python 3.99, which this machine lacks: install python3.99" in said


def test_packages_come_from_the_declared_index_or_from_that_of_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sources._indexes("https://mirror.lan/simple") == [
        "--index-url",
        "https://mirror.lan/simple",
    ]
    settings = Settings(torch="2.6.0", torch_index="https://torch.lan/cu124", index="https://a.lan")
    monkeypatch.setattr(sources, "load_settings", lambda: settings)
    assert sources._indexes(None) == [
        *("--index-url", "https://a.lan"),
        *("--extra-index-url", "https://torch.lan/cu124"),
    ]


def test_a_problem_is_asked_for_once_a_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = asked(home, directory="gone")
    calls: list[Path] = []
    real = sources._of_directory

    def counted(directory: Path, folder: Path) -> Path:
        calls.append(directory)
        return real(directory, folder)

    monkeypatch.setattr(sources, "_of_directory", counted)
    for _ in range(3):
        with pytest.raises(ArchiveProblem):
            archive_of(*asking)
    assert len(calls) == 1


# ---- conda ----------------------------------------------------------------------------------------


def test_an_environment_yml_is_built_by_the_tool_that_is_here(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool is a stand-in that copies an environment to where it is told."""
    tree(home)
    (home / "main.yml").write_text("dependencies: [python=3.10]\n")
    entry = {"conda": "main.yml"}
    real = shutil.which
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "which", lambda name: None if name in sources.CONDA_TOOLS else real(name)
        )
        said = refused(home, **entry)
    assert "main.yml needs micromamba, mamba or conda on this machine, and there is none" in said
    programs = home / "programs"
    programs.mkdir()
    (programs / "micromamba").write_text(
        f'#!/bin/sh\n[ "$1 $2 $3" = "create --yes --prefix" ] || exit 9\ncp -a {home}/envs/llm "$4"\n'
    )
    (programs / "micromamba").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert described(*asked(home, **entry)).python == "3.10"
