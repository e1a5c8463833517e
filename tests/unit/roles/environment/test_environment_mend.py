"""The mender: bytes in, bytes out; whole trees; and it may run again."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from roles.environment import mend
from tests.unit.roles.environment.made import contents

OLD = {b"/home/liu/anaconda3/envs/llm"}
NEW = b"/opt/lockstep/envs/llm"
PROGRAMS = [b"python", b"python3", b"python3.11", b"perl"]


def mend_shebang(script: bytes, prefix: bytes, old: Iterable[bytes]) -> bytes:
    return mend.apply(script, mend.shebang_edits(script, prefix, old, PROGRAMS))


def mend_text(text: bytes, prefix: bytes, old: Iterable[bytes], placeholder: bytes = b"") -> bytes:
    return mend.apply(text, mend.text_edits(text, prefix, old, placeholder))


def mend_binary(data: bytes, prefix: bytes, old: Iterable[bytes], placeholder: bytes) -> bytes:
    return mend.apply(data, mend.binary_edits(data, prefix, old, placeholder))


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
            b"#!/home/liu/anaconda3/envs/llm/bin/perl -w\n",
            b"#!/opt/lockstep/envs/llm/bin/perl -w\n",
        ),
        (
            b"#!/home/liu/anaconda3/envs/llm/bin/python -X pycache_prefix=/home/liu/anaconda3/envs/llm/c\r\nx",
            b"#!/opt/lockstep/envs/llm/bin/python -X pycache_prefix=/opt/lockstep/envs/llm/c\r\nx",
        ),
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
    assert mend_shebang(script, NEW, OLD) == mended
    assert mend_shebang(mended, NEW, OLD) == mended


@pytest.mark.parametrize(
    "script",
    [
        b"#!/bin/bash\necho\n",
        b"#!/usr/bin/python3\n",
        b"#!/opt/other/bin/python\n",
        b"#!/usr/bin/env python2\n",
        b"#!/usr/bin/env bash\n",
        b"#!/home/liu/anaconda3/envs/llm2/bin/python\n",
        b"\x7fELF\0",
        b"",
        b"import os\n",
    ],
)
def test_other_files_keep_their_first_line(script: bytes) -> None:
    assert mend_shebang(script, NEW, OLD) == script


@pytest.mark.parametrize(
    "prefix", [b"/opt/" + b"long/" * 30 + b"llm", b"/opt/with blank/llm", b"/opt/it's a/llm"]
)
def test_a_prefix_that_no_shebang_can_hold_goes_by_way_of_sh_and_back(prefix: bytes) -> None:
    script = b"#!/home/liu/anaconda3/envs/llm/bin/python3.11 -I\nprint(1)\n"
    long = mend_shebang(script, prefix, OLD)
    first, second, third, rest = long.split(b"\n", 3)
    assert (first, third, rest) == (b"#!/bin/sh", b"' '''", b"print(1)\n")
    assert second == b"'''exec' \"" + prefix + b'/bin/python3.11" -I "$0" "$@"'
    assert mend.interpreter_prefix(long) == prefix
    assert mend_shebang(long, NEW, {prefix}) == script.replace(next(iter(OLD)), NEW)


@pytest.mark.parametrize("folder", ["with blank", "$HOME `id` \\", "l" * 120])
def test_a_script_with_such_a_shebang_runs(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder / "bin").mkdir(parents=True)
    (tmp_path / folder / "bin/python3").symlink_to(sys.executable)
    text = b"#!/old/bin/python3 -I\nimport sys\nprint(sys.argv[1], sys.flags.isolated)\n"
    script = tmp_path / folder / "bin/say"
    script.write_bytes(mend_shebang(text, os.fsencode(tmp_path / folder), [b"/old"]))
    script.chmod(0o755)
    done = subprocess.run([script, "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == "a b 1\n"


def test_programs_that_are_no_python_are_found_by_the_path_where_no_shebang_can_hold_theirs() -> (
    None
):
    long = b"/opt/" + b"l" * 140
    assert mend_shebang(b"#!/old/bin/perl\n", long, [b"/old"]) == b"#!/usr/bin/env perl\n"
    assert mend_shebang(b"#!/old/bin/perl -w\n", long, [b"/old"]) == b"#!/usr/bin/env -S perl -w\n"


def test_the_interpreter_is_known_by_the_first_two_lines() -> None:
    assert mend.interpreter_prefix(b"#!/opt/x/bin/python3.11") == b"/opt/x"
    assert (
        mend.interpreter_prefix(b'#!/bin/sh\n\'\'\'exec\' "/opt/x y/bin/python" "$0" "$@"')
        == b"/opt/x y"
    )
    assert mend.interpreter_prefix(b"#!/usr/bin/env python3") == b""
    assert mend.interpreter_prefix(b"#!/bin/bash") is None
    assert mend.interpreter_prefix(b"#!/opt/x/bin/perl") is None


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
        (b"x=1 -I/home/liu/anaconda3/envs/llm/i", b"x=1 -I/opt/lockstep/envs/llm/i"),
        (b"-isystem/home/liu/anaconda3/envs/llm/i", b"-isystem/opt/lockstep/envs/llm/i"),
        (b"-Wl,-rpath,/home/liu/anaconda3/envs/llm/lib", b"-Wl,-rpath,/opt/lockstep/envs/llm/lib"),
        (b"'a\\n/home/liu/anaconda3/envs/llm'", b"'a\\n/opt/lockstep/envs/llm'"),
        (b"/home/liu/anaconda3/envs/llm+cu12/x", b"/home/liu/anaconda3/envs/llm+cu12/x"),
        (
            b"file:///home/liu/anaconda3/envs/llm%20old",
            b"file:///home/liu/anaconda3/envs/llm%20old",
        ),
        ("/home/liu/anaconda3/envs/llm备".encode(), "/home/liu/anaconda3/envs/llm备".encode()),
        (b"a-L/home/liu/anaconda3/envs/llm", b"a-L/home/liu/anaconda3/envs/llm"),
        (b"/home/liu/anaconda3/envs/llm2/bin", b"/home/liu/anaconda3/envs/llm2/bin"),
        (b"/home/liu/anaconda3/envs/llm-old", b"/home/liu/anaconda3/envs/llm-old"),
        (b"/home/liu/anaconda3/envs/llm.bak", b"/home/liu/anaconda3/envs/llm.bak"),
        (b"/backup/home/liu/anaconda3/envs/llm/x", b"/backup/home/liu/anaconda3/envs/llm/x"),
    ],
)
def test_only_whole_paths_below_the_old_prefix_change(text: bytes, mended: bytes) -> None:
    assert mend_text(text, NEW, OLD) == mended


def test_a_new_prefix_below_the_old_one_is_not_mended_twice() -> None:
    once = mend_text(b"/opt/llm/bin", b"/opt/llm/here", {b"/opt/llm"})
    assert once == b"/opt/llm/here/bin"
    assert mend_text(once, b"/opt/llm/here", {b"/opt/llm"}) == once


def test_a_move_to_a_parent_and_of_one_old_prefix_below_another() -> None:
    assert mend_text(b"/opt/llm/here/bin", b"/opt/llm", {b"/opt/llm/here"}) == b"/opt/llm/bin"
    assert mend_text(b"/a/x /a/b/x", b"/c", {b"/a", b"/a/b"}) == b"/c/x /c/x"


def test_an_address_spells_a_prefix_its_own_way() -> None:
    text = b'{"url": "file:///old%20place/src"} /old place/src'
    there = mend_text(text, b"/a new one", {b"/old place"})
    assert there == b'{"url": "file:///a%20new%20one/src"} /a new one/src'
    assert mend_text(there, b"/old place", {b"/a new one"}) == text


def test_a_placeholder_counts_wherever_it_stands() -> None:
    holder = b"/feedstock_root/_h_env_placehold_placehold"
    text = b"-x" + holder + b"/lib:" + holder + b"2"
    assert mend_text(text, b"/n", [], holder) == b"-x/n/lib:/n2"


def near_misses(old: bytes) -> list[bytes]:
    """Paths that only look like ones below ``old``."""
    ends = [old + end for end in (b"2", b"-old", b".bak", b"_x/bin", b"+cu1", b"~", b"%20b", b"@1")]
    begins = [begin + old + b"/x" for begin in (b"/backup", b"a", b".", b"~", b"/", b"-x-I")]
    return ends + begins


def test_of_random_texts_only_whole_paths_change() -> None:
    """The texts are put together of parts, so that what must come out is known without the mender."""
    source = random.Random(4)
    old, other = b"/srv/envs/llm", b"/home/u/llm"
    for _ in range(500):
        prefix = source.choice([b"/p", b"/srv/envs", b"/srv/envs/llm2", b"/opt/" + b"x" * 99])
        parts, wanted = [], []
        for _ in range(source.randrange(1, 20)):
            near = source.choice([*near_misses(old), *near_misses(other)])
            tail = source.choice([b"", b"/bin/x", b"/lib", b":/usr/bin", b".", b","])
            kind = source.randrange(5)
            if kind == 0:
                part = own = near
            elif kind == 1:
                part = own = bytes(source.choices(b'abc/ =\xe4\\"', k=source.randrange(9)))
            else:
                begin = source.choice([b"", b"-I", b"prefix=", b"file://", b"'", b"a:"])
                part = begin + source.choice([old, other]) + tail
                own = begin + prefix + tail
            gap = source.choice([b" ", b"\n", b'"', b";", b"\t"])
            parts += [part, gap]
            wanted += [own, gap]
        assert mend_text(b"".join(parts), prefix, [old, other]) == b"".join(wanted)


def test_a_binary_keeps_its_length() -> None:
    data = b"\x01\x02/old/prefix/share/x\0\xff\0/old/prefix\0tail"
    mended = mend_binary(data, b"/new", [], b"/old/prefix")
    assert mended == b"\x01\x02/new/share/x" + b"\0" * 8 + b"\xff\0/new" + b"\0" * 8 + b"tail"


def test_a_binary_takes_a_longer_prefix_only_from_its_own_padding() -> None:
    padded = b"/old/x:/old/y\0\0\0\0\0\0\0next"
    assert mend_binary(padded, b"/older", [b"/old"], b"/holder") == b"/older/x:/older/y\0\0\0next"
    assert mend_binary(padded, b"/olders", [b"/old"], b"/holder") == b"/olders/x:/olders/y\0next"
    with pytest.raises(mend.NoRoom, match="no room for a prefix longer than 4 bytes"):
        mend_binary(padded, b"/older", [b"/old"], b"/old")
    with pytest.raises(mend.NoRoom, match="no room for a prefix longer than 7 bytes"):
        mend_binary(padded, b"/olderone", [b"/old"], b"/holder")


def test_what_only_looks_like_the_prefix_stays_in_a_binary_too() -> None:
    data = b"\0/srv/llm2/x\0/backup/srv/llm\0x=/srv/llm:/srv/llm-old\0/srv/llm"
    mended = mend_binary(data, b"/new", [b"/srv/llm"], b"/holder/holder")
    assert mended == data.replace(b"x=/srv/llm:/srv/llm-old", b"x=/new:/srv/llm-old\0\0\0\0")


def test_random_binaries_keep_every_byte_that_is_not_in_a_path() -> None:
    source = random.Random(5)
    holder = b"/holder" * 9
    for _ in range(300):
        new = b"/n" * source.randrange(1, 31)
        parts, wanted = [], []
        for _ in range(source.randrange(1, 9)):
            noise = bytes(source.choices(range(256), k=source.randrange(30))) + b"\0"
            count = source.randrange(1, 4)
            string = b":".join([holder + b"/lib"] * count)
            fresh = string.replace(holder, new)
            parts += [noise, string, b"\0"]
            wanted += [noise, fresh, b"\0" * (len(string) - len(fresh)), b"\0"]
        first, there = b"".join(parts), mend_binary(b"".join(parts), new, [], holder)
        assert there == b"".join(wanted)
        longer = b"/l" * 20  # what conda has installed has room up to the placeholder's length
        assert mend_binary(there, longer, [new], holder) == mend_binary(first, longer, [], holder)


def line(path: str, data: bytes, algorithm: str = "sha256") -> str:
    digest = base64.urlsafe_b64encode(hashlib.new(algorithm, data).digest()).rstrip(b"=").decode()
    return f"{path},{algorithm}={digest},{len(data)}"


def test_a_record_has_hash_and_size_of_what_was_rewritten() -> None:
    quoted = '"with, ""comma"".pth"'
    lines = [line("../../../bin/x", b"old"), line("same.py", b"same"), "x-1.dist-info/RECORD,,"]
    record = "\r\n".join([*lines, line(quoted, b"old", "sha512"), "nothing.pth,,", ""])
    fresh = {b"../../../bin/x": b"fresh", b'with, "comma".pth': b"new", b"nothing.pth": b"new"}
    edits = mend.record_edits(record.encode(), fresh.get, NEW, OLD)
    lines[0] = line("../../../bin/x", b"fresh")
    wanted = "\r\n".join([*lines, line(quoted, b"new", "sha512"), "nothing.pth,,", ""])
    assert mend.apply(record.encode(), edits).decode() == wanted


@pytest.mark.parametrize(
    ("history", "prefix"),
    [
        (
            b"# cmd: /home/liu/conda/bin/conda create -n llm python=3.11\n",
            b"/home/liu/conda/envs/llm",
        ),
        (b"# cmd: /opt/m/bin/mamba env create --prefix=/srv/llm -f x.yml\n", b"/srv/llm"),
        (b"# cmd: /opt/m/condabin/conda create -y -p /srv/llm/ python\n", b"/srv/llm"),
        (b"# cmd: /opt/m/bin/conda install -n llm numpy\n", None),
        (b"+defaults::python-3.11 -p /x\n", None),
    ],
)
def test_condas_history_names_the_prefix(history: bytes, prefix: bytes | None) -> None:
    assert mend.declared_prefixes(b"", b"", history) == ({prefix} if prefix else set())


def test_build_data_names_the_prefix() -> None:
    assert mend.built_prefixes(b"x\nprefix=/srv/llm\nlib=${prefix}/lib\n") == {b"/srv/llm"}
    assert mend.built_prefixes(b"build_time_vars = {'prefix': '/srv/llm',\n") == {b"/srv/llm"}
    assert mend.built_prefixes(b"prefix=/usr\nexec_prefix=/x\nprefix=${pcfiledir}/..\n") == set()


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
    (root / "bin" / "python3.11").symlink_to("/usr/bin/python3")
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
    (root / "bin/python3.11").write_bytes(b"\x7fELF\0")
    size = (root / "bin/tool").stat().st_size
    assert mend.mend(root, b"/opt/a/longer/prefix/llm") == []
    assert (
        root / "etc/config"
    ).read_text() == "dir=/opt/a/longer/prefix/llm/etc\nalso=/opt/a/longer/prefix/llm/etc\n"
    assert (root / "bin/tool").read_bytes().startswith(b"\x7fELF\0/opt/a/longer/prefix/llm/share\0")
    assert (root / "bin/tool").stat().st_size == size
    before = contents(root)
    (problem,) = mend.mend(root, b"/opt/" + b"x" * 200)
    assert problem == (
        f"/opt/{'x' * 200}/bin/tool has no room for a prefix longer than {len(placeholder)} bytes: "
        "choose a shorter prefix"
    )
    assert contents(root) == before


def full_tree(root: Path, at: str) -> Path:
    """One file of every kind, made at the prefix ``at``."""
    site = "lib/python3.11/site-packages"
    files = {
        "bin/python3.11": b"\x7fELF\0",
        "bin/tool": f"#!{at}/bin/python3.11 -I\nHOME = '{at}/lib'\n".encode(),
        "bin/by-path": b"#!/usr/bin/env python3.11\n",
        "bin/long": f"#!/bin/sh\n'''exec' {at}/bin/python3.11 \"$0\" \"$@\"\n' '''\nx\n".encode(),
        "bin/activate": f'VIRTUAL_ENV="{at}"\nexport VIRTUAL_ENV\n'.encode(),
        "bin/activate.csh": f'setenv VIRTUAL_ENV "{at}"\n'.encode(),
        "bin/activate.fish": f'set -gx VIRTUAL_ENV "{at}"\n'.encode(),
        "bin/activate.nu": f"let virtual_env = r#'{at}'#\n".encode(),
        "pyvenv.cfg": f"home = /usr/bin\ncommand = /usr/bin/python3 -m venv {at}\n".encode(),
        f"{site}/project.pth": f"{at}/src/project\n".encode(),
        f"{site}/__editable___llm_finder.py": f"MAPPING = {{'llm': '{at}/src/llm'}}\n".encode(),
        f"{site}/llm-1.dist-info/direct_url.json": f'{{"url": "file://{at}/src"}}'.encode(),
        f"{site}/llm/notes.txt": f"built in {at}/tmp\n".encode(),
        f"{site}/llm/near.py": f"X = '{at}-old/x'\n".encode(),
        "lib/python3.11/_sysconfigdata__linux.py": f"v = {{'prefix': '{at}'}}\n".encode(),
        "lib/python3.11/config-3.11/Makefile": f"prefix={at}\n".encode(),
        "lib/pkgconfig/z.pc": f"prefix={at}\n".encode(),
        "lib/libz.la": f"libdir='{at}/lib'\n".encode(),
        f"{site}/__pycache__/__editable___llm_finder.cpython-311.pyc": b"\0" + at.encode(),
        f"{site}/llm/__pycache__/near.cpython-311.pyc": b"\0" + at.encode(),
    }
    record = [
        line(path, files[full])
        for path, full in (
            ("../../../bin/tool", "bin/tool"),
            ("__editable___llm_finder.py", f"{site}/__editable___llm_finder.py"),
            ("llm/near.py", f"{site}/llm/near.py"),
        )
    ]
    files[f"{site}/llm-1.dist-info/RECORD"] = "\n".join([*record, ""]).encode()
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    (root / "bin/tool").chmod(0o755)
    (root / "share").mkdir()
    (root / "share/data").symlink_to(f"{at}/lib/pkgconfig")
    (root / "share/near").symlink_to(f"{at}-old/lib")
    return root


UNTOUCHED = ("notes.txt", "near.py", "near.cpython-311.pyc")


def test_every_kind_of_file_is_mended_and_the_way_back_gives_the_first_bytes(
    tmp_path: Path,
) -> None:
    root = full_tree(tmp_path / "llm", "/srv/first")
    (root / "bin/by-path").unlink()  # not a script of that prefix: of each, it is made one
    first = contents(root)
    for prefix in (b"/new", b"/opt/" + b"long/" * 40 + b"llm", b"/srv/first2"):
        assert mend.mend(root, prefix) == []
        now = contents(root)
        for path, data in now.items():
            if not path.endswith(UNTOUCHED) and isinstance(data, bytes) and path != mend.NOTES:
                assert not re.search(rb"/srv/first(?!2)", data), path
        assert now["share/data"] == "../lib/pkgconfig"
        assert now["share/near"] == "/srv/first-old/lib"
        assert not any(path.endswith("llm_finder.cpython-311.pyc") for path in now)
        record = now["lib/python3.11/site-packages/llm-1.dist-info/RECORD"]
        tool = now["bin/tool"]
        assert isinstance(record, bytes) and isinstance(tool, bytes)
        assert line("../../../bin/tool", tool).encode() in record
        assert (root / "bin/tool").stat().st_mode & 0o777 == 0o755
        stays = {path for path, _ in mend.leftovers(root, prefix)}
        assert {path.rsplit("/", 1)[-1] for path in stays} - {"near"} == {*UNTOUCHED, mend.NOTES}
    assert mend.mend(root, b"/srv/first") == []
    now = contents(root)
    del first["lib/python3.11/site-packages/__pycache__/__editable___llm_finder.cpython-311.pyc"]
    assert now == first


def test_the_outcome_does_not_depend_on_the_way(tmp_path: Path) -> None:
    straight = full_tree(tmp_path / "straight", "/srv/first")
    mend.mend(straight, b"/z")
    around = full_tree(tmp_path / "around", "/srv/first")
    for prefix in (b"/opt/" + b"x" * 150, b"/z/below", b"/srv/first", b"/z"):
        mend.mend(around, prefix)
    notes = (contents(straight).pop(mend.NOTES), contents(around).pop(mend.NOTES))
    files = [json.loads(one)["files"] for one in notes]
    assert files[0] == files[1]
    assert {**contents(straight), mend.NOTES: b""} == {**contents(around), mend.NOTES: b""}


def test_what_was_installed_after_a_move_moves_too(tmp_path: Path) -> None:
    root = full_tree(tmp_path / "llm", "/srv/first")
    mend.mend(root, b"/second")
    (root / "bin/later").write_text("#!/second/bin/python3.11\n")
    (root / "bin/tool").write_text("#!/second/bin/python3.11\nreplaced\n")
    mend.mend(root, b"/third")
    mend.mend(root, b"/fourth")
    assert (root / "bin/later").read_text() == "#!/fourth/bin/python3.11\n"
    assert (root / "bin/tool").read_text() == "#!/fourth/bin/python3.11\nreplaced\n"


def test_a_move_that_was_cut_off_anywhere_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is made of renames: each is the last one once."""
    whole = full_tree(tmp_path / "whole", "/srv/first")
    mend.mend(whole, b"/n")
    mend.mend(whole, b"/third")
    wanted = contents(whole)
    replace, cuts = os.replace, 0
    while True:
        root = full_tree(tmp_path / str(cuts), "/srv/first")
        mend.mend(root, b"/n")
        left = cuts

        def until_cut(source: str, target: str) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            replace(source, target)

        monkeypatch.setattr(os, "replace", until_cut)
        try:
            mend.mend(root, b"/an/other/prefix")
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", replace)
        else:
            break
        mend.mend(root, b"/third")
        now = contents(root)
        assert {**now, mend.NOTES: b""} == {**wanted, mend.NOTES: b""}, cuts
        mend.mend(root, b"/srv/first")
        assert {path for path in now if path.endswith(mend.FRESH)} == set()
        cuts += 1
    assert cuts > 10


def test_all_names_of_a_file_stay_one_file(tmp_path: Path) -> None:
    root = full_tree(tmp_path / "llm", "/srv/first")
    (root / "libexec").mkdir()
    (root / "libexec/tool").hardlink_to(root / "bin/tool")
    outside = tmp_path / "outside"
    outside.hardlink_to(root / "bin/tool")
    first = outside.read_bytes()
    mend.mend(root, b"/n")
    assert (root / "libexec/tool").read_text().startswith("#!/n/bin/python3.11")
    assert (root / "libexec/tool").samefile(root / "bin/tool")
    assert outside.read_bytes() == first
    mend.mend(root, b"/srv/first")
    assert (root / "libexec/tool").read_bytes() == first
    assert (root / "libexec/tool").samefile(root / "bin/tool")


def test_files_that_nobody_may_write_keep_mode_owner_and_time(tmp_path: Path) -> None:
    root = full_tree(tmp_path / "llm", "/srv/first")
    file = root / "lib/pkgconfig/z.pc"
    os.chown(file, 12, 34)
    os.utime(file, (1_000_000_000, 1_000_000_000))
    file.chmod(0o444)
    file.parent.chmod(0o555)
    mend.mend(root, b"/n")
    now = file.stat()
    assert file.read_text() == "prefix=/n\n"
    assert (now.st_mode & 0o7777, now.st_uid, now.st_gid) == (0o444, 12, 34)
    assert now.st_mtime == 1_000_000_000
    assert file.parent.stat().st_mode & 0o777 == 0o555


def test_the_records_of_conda_pack_are_understood(tmp_path: Path) -> None:
    root = full_tree(tmp_path / "llm", "/home/liu/conda/envs/llm")
    (root / "bin/tool").write_text("#!/usr/bin/env python3.11\n")
    holder = "/holder/" * 20
    (root / "share/own.cfg").write_text("at=/home/liu/conda/envs/llm/share\n")
    (root / "share/lib.so").write_bytes(b"\x7fELF\0" + holder.encode() + b"/lib\0")
    records = [
        ("share/own.cfg", "/home/liu/conda/envs/llm", "text"),
        ("share/lib.so", holder, "binary"),
        ("share/it's gone", holder, "text"),
    ]
    lines = ",\n".join(map(repr, records))
    script = f"#!/usr/bin/env python3.11\nimport x\n_prefix_records = [\n{lines}\n]\nend\n"
    (root / "bin/conda-unpack").write_text(script)
    assert mend.mend(root, b"/n") == []
    assert (root / "bin/tool").read_text() == "#!/n/bin/python3.11\n"
    assert (root / "share/own.cfg").read_text() == "at=/n/share\n"
    assert (root / "share/lib.so").read_bytes() == b"\x7fELF\0/n/lib" + b"\0" * 159
    shebang, rest = (root / "bin/conda-unpack").read_text().split("\n", 1)
    assert (shebang, rest) == ("#!/n/bin/python3.11", script.split("\n", 1)[1])


@pytest.mark.parametrize("times", [1, 400])
def test_the_files_that_hold_a_name_are_found_by_one_process_or_by_several(
    tmp_path: Path, times: int
) -> None:
    names = [f"f{number}" for number in range(10)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"x" * 65530 * number + b"/name"[: number + 1])
    search = mend.Search(str(tmp_path), names * times, [b"/other", b"/name"])
    assert search.found() == set(names[4:])


def test_a_name_is_found_wherever_in_a_large_file_it_lies(tmp_path: Path) -> None:
    """The files are read in parts of 128 KiB; the name lies in one, in the next, and across."""
    for at in [*range((1 << 17) - 8, (1 << 17) + 8), (1 << 18) - 2, 300_000]:
        (tmp_path / f"at{at}").write_bytes(b"x" * at + b"/name" + b"y" * at)
        (tmp_path / f"not{at}").write_bytes(b"x" * at + b"/nam" + b"y" * at)
    names = sorted(path.name for path in tmp_path.iterdir())
    search = mend.Search(str(tmp_path), names, [b"/name", b"/a/longer/name"])
    assert search.found() == {name for name in names if name.startswith("at")}


def test_what_is_recorded_but_not_there_or_no_file_holds_nobody_up(tmp_path: Path) -> None:
    root = full_tree(tmp_path / "llm", "/srv/first")
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("pipe")
    paths = ["gone", "pipe", "link", "share", "share/data/z.pc", "lib/libz.la"]
    lines = ",\n".join(repr((path, "/srv/first", "text")) for path in paths)
    (root / "bin/conda-unpack").write_text(f"import x\n_prefix_records = [\n{lines}\n]\nend\n")
    assert mend.mend(root, b"/n") == []
    assert (root / "lib/libz.la").read_text() == "libdir='/n/lib'\n"
    assert str((root / "link").readlink()) == "pipe"


def test_a_search_whose_helper_died_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"at /name")
    me, look = os.getpid(), mend.Search._look

    def fails(self: mend.Search, paths: list[str]) -> list[str]:
        if os.getpid() != me:
            os._exit(9)
        return look(self, paths)

    monkeypatch.setattr(mend.Search, "_look", fails)
    search = mend.Search(str(tmp_path), ["file"] * 4000, [b"/name"])
    assert len(search.helpers) == 3
    for child, _ in search.helpers:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert search.found() == {"file"}


def test_a_search_leaves_the_time_of_access(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"at /name")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    assert mend.Search(str(tmp_path), ["file"], [b"/name"]).found() == {"file"}
    assert file.stat().st_atime == 1_000_000_000


@pytest.mark.parametrize(("words", "done_to_it"), [([], "mended"), (["leftovers"], "read")])
def test_a_tree_that_cannot_be_mended_or_listed_is_refused_in_one_sentence(
    tmp_path: Path, words: list[str], done_to_it: str
) -> None:
    program = [sys.executable, "-I", "-S", mend.__file__, str(tmp_path / "gone"), "/n", *words]
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{tmp_path}/gone cannot be {done_to_it}: No such file or directory\n"


def test_what_stays_is_listed_with_its_reason(tmp_path: Path) -> None:
    root = full_tree(tmp_path / "llm", "/srv/first")
    mend.mend(root, b"/n")
    program = [sys.executable, "-I", "-S", mend.__file__, str(root), "/n", "leftovers"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    listed = dict(json.loads(done.stdout))
    site = "lib/python3.11/site-packages/llm"
    assert listed[f"{site}/notes.txt"].startswith("data: ")
    assert listed[f"{site}/near.py"] == "part of a longer path or name"
    assert listed[f"{site}/__pycache__/near.cpython-311.pyc"].startswith("byte code: ")
