"""What the lab writes is whole or absent, as narrow as asked, and removed without reaching outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.lab import files


def test_a_secret_is_never_wider_than_asked_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        files.write_whole(tmp_path / "secret", "x", 0o600)
        made = files.make_directory(tmp_path / "d", 0o700)
    finally:
        os.umask(before)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert made.stat().st_mode & 0o777 == 0o700


def test_a_file_is_replaced_at_once_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"x": 1})
    files.write_json(tmp_path / "a.json", {"x": 2})
    assert files.read_json(tmp_path / "a.json") == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", [None, "", '{"x": '])
def test_a_missing_or_torn_json_file_reads_as_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    assert files.read_json(tmp_path / "a.json") is None


def test_a_build_that_fails_leaves_neither_result_nor_remains(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.building(tmp_path / "base") as directory:
        (directory / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_of_two_builds_of_the_same_at_once_the_first_stays(tmp_path: Path) -> None:
    def both(keep_first: bool) -> None:
        with files.building(tmp_path / "made", keep_first=keep_first) as later:
            (later / "by").write_text("the later")
            with files.building(tmp_path / "made") as first:
                (first / "by").write_text("the first")

    both(keep_first=True)
    assert (tmp_path / "made/by").read_text() == "the first"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    files.remove_tree(tmp_path / "made")
    with pytest.raises(OSError, match="not empty"):
        both(keep_first=False)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_remains_of_killed_builds_are_removed_and_others_kept(tmp_path: Path) -> None:
    base = files.partial_beside(tmp_path / "base-x")
    other = files.partial_beside(tmp_path / "environment")
    for path in (base, other, tmp_path / "base-whole"):
        path.mkdir()
    files.remove_partials(tmp_path, "base-")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "base-whole"}
    files.remove_partials(tmp_path)
    files.remove_partials(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["base-whole"]


def test_a_removal_that_is_killed_leaves_no_half_under_the_old_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "node1").mkdir()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "remove_tree", killed)
    with pytest.raises(KeyboardInterrupt):
        files.retire(tmp_path / "node1")
    assert not (tmp_path / "node1").exists()
    monkeypatch.undo()
    files.remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_removing_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "link").symlink_to(kept)
    files.remove_tree(tmp_path / "link")
    files.remove_tree(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_mounts_below_a_path_come_deepest_first_and_without_its_neighbours() -> None:
    mountinfo = "\n".join(
        f"{number} 1 8:1 / {point} rw - ext4 /dev/x rw"
        for number, point in enumerate(["/", "/lab", "/lab/a", "/lab/a/b\\040c", "/lab-two/x"])
    )
    assert files.mounts_below(Path("/lab"), mountinfo) == ["/lab/a/b c", "/lab/a", "/lab"]
