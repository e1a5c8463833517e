"""A conda environment from a real tool, moved about; and a conda-pack archive of it, beside conda-unpack."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import conda_pack
import pytest

from roles.environment import mend
from tests.environment.conda import PLACEHOLDER, PYTHON, install, make_channel
from tests.environment.moves import contents, long_prefix, mend_here, move, naming, say

SITE = f"lib/{PYTHON}/site-packages"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that whoever moves it brings back."""
    folder = tmp_path_factory.mktemp("conda")
    return install(make_channel(folder / "channel"), folder / "home" / "envs" / "llm")


@pytest.fixture(scope="session")
def packed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive that conda-pack makes of it, with a file that pip would have left there."""
    notes = made / SITE / "mpi.cfg"
    notes.write_text(f"mpicc = {made}/bin/mpicc\nold = {made}-old/bin\n")
    archive = tmp_path_factory.mktemp("packed") / "llm.tar"
    conda_pack.pack(prefix=str(made), output=str(archive), verbose=False)
    notes.unlink()
    return archive


def works(prefix: Path) -> None:
    """Everything that the packages promise holds at this prefix."""
    assert say(prefix / "bin/hello") == say(prefix / "bin/hello-script") == f"hello {prefix}"
    assert say(prefix / "bin/z-config") == str(prefix)
    assert (prefix / SITE / "hello/where.cfg").read_text() == f"here={prefix}/share\n"
    end = (prefix / "bin" / PYTHON).read_bytes()[-len(PLACEHOLDER) - 20 :]
    assert f"{prefix}/lib/recorded\0".encode() in end and end.endswith(b"\0end")


def test_a_conda_environment_works_wherever_it_is_moved_and_comes_back_as_it_was(
    made: Path, tmp_path: Path
) -> None:
    works(made)
    cache = made.parent / "pkgs"
    before, cached = contents(made), contents(cache)
    assert len(naming(made, made)) >= 10
    places = [made.parents[3] / "e", long_prefix(tmp_path, len(PLACEHOLDER)), made]
    assert len(str(places[0])) < len(str(made)) < len(PLACEHOLDER) == len(str(places[1]))
    tree = made
    for prefix in places:
        tree = move(tree, prefix)
        works(tree)
        listed = dict(mend.leftovers(tree, os.fsencode(tree)))
        for old in {*places} - {tree}:
            assert naming(tree, old) <= {*listed}
        stays = {path.split("/")[0] for path in listed if not path.endswith(".pyc")}
        assert stays <= {mend.NOTES, "conda-meta"}
    assert contents(made) == before
    assert contents(cache) == cached, "files of the package cache are the environment's hard links"


def test_a_prefix_longer_than_the_records_allow_is_refused_and_the_tree_stays_usable(
    made: Path, tmp_path: Path
) -> None:
    before = contents(made)
    problems = mend.mend(made, os.fsencode(long_prefix(tmp_path, len(PLACEHOLDER) + 1)))
    assert [problem.split(" has ")[0].rsplit("/", 1)[1] for problem in problems] == [
        PYTHON,
        "libz.so.1",
    ]
    assert all("no room for a prefix longer than 255 bytes" in problem for problem in problems)
    assert contents(made) == before
    works(made)


def unpack(archive: Path, prefix: Path) -> Path:
    """What the archive holds, at a prefix, not yet mended."""
    with tarfile.open(archive) as tar:
        tar.extractall(prefix, filter="fully_trusted")
    return prefix


def test_a_conda_pack_archive_becomes_what_conda_unpack_makes_of_it_or_better(
    packed: Path, made: Path, tmp_path: Path
) -> None:
    theirs = unpack(packed, tmp_path / "llm")
    say(theirs / "bin/python", theirs / "bin/conda-unpack")
    theirs = theirs.rename(tmp_path / "theirs")
    ours = unpack(packed, tmp_path / "llm")
    mend_here(ours)
    one, other = contents(theirs), contents(ours)
    better = {path for path in one if one[path] != other[path]}
    assert {*other} - {*one} == {mend.NOTES}
    assert better == {
        f"bin/{PYTHON}",  # conda-unpack leaves the running interpreter as it was packed
        "bin/hello",  # found by a PATH that a login without activation does not have
        "bin/hello-script",
        "bin/conda-unpack",
        f"{SITE}/mpi.cfg",  # names another environment too, which conda-unpack moves with it
    }
    assert other[f"{SITE}/mpi.cfg"] == f"mpicc = {ours}/bin/mpicc\nold = {made}-old/bin\n".encode()
    works(ours)


def test_an_archive_of_an_unpacked_archive_is_mended_too(packed: Path, tmp_path: Path) -> None:
    """conda-unpack leaves no word of where it ran, but the files that it rewrote have it."""
    tree = unpack(packed, tmp_path / "second")
    say(tree / "bin/python", tree / "bin/conda-unpack")
    works(move(tree, tmp_path / "third" / "llm"))
    own, other = (tmp_path / f"third/llm/{SITE}/mpi.cfg").read_text().splitlines()
    assert own == f"mpicc = {tmp_path}/third/llm/bin/mpicc"
    assert other == f"old = {tmp_path}/second-old/bin", "conda-unpack had taken it for its own"
    assert naming(tmp_path / "third/llm", tmp_path / "second") == {mend.NOTES, f"{SITE}/mpi.cfg"}


def test_a_move_killed_at_any_time_is_finished_by_the_next(made: Path, tmp_path: Path) -> None:
    """The mender is killed after ever more of its time; whatever lies there then, the next one ends it."""
    tree, before = made, contents(made)
    try:
        for count in range(8):
            prefix = tmp_path / ("p" * (count + 1))
            tree = tree.rename(prefix)
            program = [sys.executable, "-I", "-S", mend.__file__, str(tree), str(tree)]
            with subprocess.Popen(program) as process:
                try:
                    process.wait(0.04 + 0.02 * count)
                except subprocess.TimeoutExpired:
                    process.kill()
            mend_here(tree)
            works(tree)
    finally:
        move(tree, made)
    assert contents(made) == before
