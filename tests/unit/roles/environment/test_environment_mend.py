"""The mender: bytes in, bytes out; whole trees; and it may run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from roles.environment import mend

OLD = {b"/home/liu/anaconda3/envs/llm"}
NEW = b"/opt/lockstep/envs/llm"


@pytest.mark.parametrize(
    ("script", "mended"),
    [
        (
            b"#!/home/liu/anaconda3/envs/llm/bin/python3.11\nx\n",
            b"#!/opt/lockstep/envs/llm/bin/python3.11\nx\n",
        ),
        (
            b"#!/home/liu/anaconda3/envs/llm/bin/python -I\nx\n",
            b"#!/opt/lockstep/envs/llm/bin/python -I\nx\n",
        ),
        (b"#! /home/liu/anaconda3/envs/llm/bin/python\n", b"#!/opt/lockstep/envs/llm/bin/python\n"),
        (b"#!/usr/bin/env python\nx\n", b"#!/opt/lockstep/envs/llm/bin/python\nx\n"),
        (b"#!/usr/bin/env -S python3 -u\nx\n", b"#!/opt/lockstep/envs/llm/bin/python3 -u\nx\n"),
        (
            b"#!/bin/sh\n'''exec' /home/liu/anaconda3/envs/llm/bin/python \"$0\" \"$@\"\n' '''\nx\n",
            b"#!/opt/lockstep/envs/llm/bin/python\nx\n",
        ),
        (
            b"#!/bin/sh\n'''exec' \"/home/liu/anaconda3/envs/llm/bin/python\" \"$0\" \"$@\" #'''\nx\n",
            b"#!/opt/lockstep/envs/llm/bin/python\nx\n",
        ),
    ],
)
def test_a_script_of_the_old_prefix_is_run_by_the_new_one(script: bytes, mended: bytes) -> None:
    assert mend.mend_shebang(script, NEW, OLD) == mended
    assert mend.mend_shebang(mended, NEW, OLD) == mended


@pytest.mark.parametrize(
    "script",
    [
        b"#!/bin/bash\necho\n",
        b"#!/usr/bin/python3\n",
        b"#!/opt/other/bin/python\n",
        b"\x7fELF\0",
        b"",
        b"import os\n",
    ],
)
def test_other_files_keep_their_first_line(script: bytes) -> None:
    assert mend.mend_shebang(script, NEW, OLD) == script


@pytest.mark.parametrize("prefix", [b"/opt/" + b"long/" * 30 + b"llm", b"/opt/with blank/llm"])
def test_a_prefix_that_no_shebang_can_hold_goes_by_way_of_sh_and_back(prefix: bytes) -> None:
    script = b"#!/home/liu/anaconda3/envs/llm/bin/python3.11\nprint(1)\n"
    long = mend.mend_shebang(script, prefix, OLD)
    first, second, third, rest = long.split(b"\n", 3)
    assert (first, third, rest) == (b"#!/bin/sh", b"' '''", b"print(1)\n")
    assert second == b"'''exec' \"" + prefix + b'/bin/python3.11" "$0" "$@"'
    assert mend.interpreter_prefix(long) == prefix
    assert (
        mend.mend_shebang(long, NEW, {prefix})
        == b"#!/opt/lockstep/envs/llm/bin/python3.11\nprint(1)\n"
    )


def test_the_interpreter_is_known_by_the_first_two_lines() -> None:
    assert mend.interpreter_prefix(b"#!/opt/x/bin/python3.11") == b"/opt/x"
    assert (
        mend.interpreter_prefix(b'#!/bin/sh\n\'\'\'exec\' "/opt/x y/bin/python" "$0" "$@"')
        == b"/opt/x y"
    )
    assert mend.interpreter_prefix(b"#!/usr/bin/env python3") == b""
    assert mend.interpreter_prefix(b"#!/bin/bash") is None


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        (
            b"VIRTUAL_ENV='/home/liu/anaconda3/envs/llm'\n",
            b"VIRTUAL_ENV='/opt/lockstep/envs/llm'\n",
        ),
        (b"file:///home/liu/anaconda3/envs/llm/x", b"file:///opt/lockstep/envs/llm/x"),
        (b"-I/home/liu/anaconda3/envs/llm/include", b"-I/opt/lockstep/envs/llm/include"),
        (b"PATH=/a:/home/liu/anaconda3/envs/llm/bin:/b", b"PATH=/a:/opt/lockstep/envs/llm/bin:/b"),
        (b"see /home/liu/anaconda3/envs/llm.", b"see /opt/lockstep/envs/llm."),
        (b"/home/liu/anaconda3/envs/llm2/bin", b"/home/liu/anaconda3/envs/llm2/bin"),
        (b"/home/liu/anaconda3/envs/llm-old", b"/home/liu/anaconda3/envs/llm-old"),
        (b"/home/liu/anaconda3/envs/llm.bak", b"/home/liu/anaconda3/envs/llm.bak"),
        (b"/backup/home/liu/anaconda3/envs/llm/x", b"/backup/home/liu/anaconda3/envs/llm/x"),
    ],
)
def test_only_whole_paths_below_the_old_prefix_change(text: bytes, mended: bytes) -> None:
    assert mend.mend_text(text, NEW, OLD) == mended


def test_a_new_prefix_below_the_old_one_is_not_mended_twice() -> None:
    once = mend.mend_text(b"/opt/llm/bin", b"/opt/llm/here", {b"/opt/llm"})
    assert once == b"/opt/llm/here/bin"
    assert mend.mend_text(once, b"/opt/llm/here", {b"/opt/llm"}) == once


def test_a_binary_keeps_its_length() -> None:
    data = b"\x01\x02/old/prefix/share/x\0\xff/old/prefix\0tail"
    mended = mend.mend_binary(data, b"/new", b"/old/prefix", 0)
    assert mended == b"\x01\x02/new/share/x" + b"\0" * 8 + b"\xff/new" + b"\0" * 8 + b"tail"
    assert len(mended) == len(data)


def test_a_binary_takes_a_longer_prefix_only_from_its_own_padding() -> None:
    padded = b"/old/x\0\0\0\0\0\0next"
    assert mend.mend_binary(padded, b"/longer", b"/old", 5) == b"/longer/x\0\0\0next"
    with pytest.raises(ValueError, match="no room for a prefix longer than 4 bytes"):
        mend.mend_binary(padded, b"/longer", b"/old", 0)


def tree(root: Path) -> Path:
    """A venv that was moved once by hand, so that two old prefixes are in it."""
    (root / "bin").mkdir(parents=True)
    site = root / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    (root / "pyvenv.cfg").write_text(
        "home = /usr/bin\ncommand = /usr/bin/python3 -m venv --without-pip /srv/first\n"
    )
    (root / "bin" / "activate").write_text("VIRTUAL_ENV=/srv/first\nexport VIRTUAL_ENV\n")
    script = root / "bin" / "torchrun"
    script.write_text("#!/srv/second/bin/python3.11\nHERE = '/srv/first/lib'\n")
    script.chmod(0o755)
    (root / "bin" / "system-tool").write_text("#!/usr/bin/python3\n")
    (root / "bin" / "ninja").write_bytes(b"\x7fELF\0/srv/first/bin\0")
    (root / "bin" / "python").symlink_to("/srv/first/bin/python3.11")
    (root / "bin" / "python3").symlink_to("/usr/bin/python3")
    (site / "project.pth").write_text("/srv/first/src\n")
    return root


def test_a_tree_with_two_old_prefixes_is_mended_whole(tmp_path: Path) -> None:
    root = tree(tmp_path / "llm")
    assert mend.mend(root, b"/opt/llm") == []
    assert (
        root / "bin/torchrun"
    ).read_text() == "#!/opt/llm/bin/python3.11\nHERE = '/opt/llm/lib'\n"
    assert (root / "bin/torchrun").stat().st_mode & 0o777 == 0o755
    assert (root / "bin/activate").read_text().startswith("VIRTUAL_ENV=/opt/llm\n")
    assert "home = /usr/bin\n" in (root / "pyvenv.cfg").read_text()
    assert (root / "pyvenv.cfg").read_text().endswith("/opt/llm\n")
    assert (root / "bin/system-tool").read_text() == "#!/usr/bin/python3\n"
    assert b"/srv/first" in (root / "bin/ninja").read_bytes()
    assert str((root / "bin/python").readlink()) == "python3.11"
    assert str((root / "bin/python3").readlink()) == "/usr/bin/python3"
    assert (root / "lib/python3.11/site-packages/project.pth").read_text() == "/opt/llm/src\n"


def test_mending_again_writes_nothing_and_a_second_move_is_mended_too(tmp_path: Path) -> None:
    root = tree(tmp_path / "llm")
    mend.mend(root, b"/opt/llm")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    mend.mend(root, b"/opt/llm")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    mend.mend(root, b"/data/llm")
    assert (root / "bin/torchrun").read_text().startswith("#!/data/llm/bin/python3.11\n")


def test_condas_own_records_name_the_files_to_mend(tmp_path: Path) -> None:
    root = tmp_path / "llm"
    (root / "bin").mkdir(parents=True)
    (root / "conda-meta").mkdir()
    (root / "etc").mkdir()
    placeholder = "/opt/anaconda1" + "p" * 60
    (root / "bin/pip").write_text("#!/home/liu/envs/llm/bin/python3.11\n")
    (root / "etc/config").write_text(f"dir={placeholder}/etc\nalso=/home/liu/envs/llm/etc\n")
    text = b"/home/liu/envs/llm/share"
    padding = len(placeholder) - len("/home/liu/envs/llm")
    (root / "bin/tool").write_bytes(b"\x7fELF\0" + text + b"\0" * (padding + 1) + b"end")
    paths = [
        {"_path": "etc/config", "prefix_placeholder": placeholder, "file_mode": "text"},
        {"_path": "bin/tool", "prefix_placeholder": placeholder, "file_mode": "binary"},
        {"_path": "bin/gone", "prefix_placeholder": placeholder, "file_mode": "text"},
    ]
    (root / "conda-meta/x.json").write_text(json.dumps({"paths_data": {"paths": paths}}))
    (root / "conda-meta/broken.json").write_text("{")
    size = (root / "bin/tool").stat().st_size
    assert mend.mend(root, b"/opt/a/longer/prefix/llm") == []
    assert (
        root / "etc/config"
    ).read_text() == "dir=/opt/a/longer/prefix/llm/etc\nalso=/opt/a/longer/prefix/llm/etc\n"
    assert (root / "bin/tool").read_bytes().startswith(b"\x7fELF\0/opt/a/longer/prefix/llm/share\0")
    assert (root / "bin/tool").stat().st_size == size
    problems = mend.mend(root, b"/opt/" + b"x" * 200)
    assert len(problems) == 1 and "choose a shorter prefix" in problems[0]
