"""Declared sources and their keys, names of both families, and the fence around unattended upgrades."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target
from roles.core.steps import Shell
from roles.packages import PackagesSpec, PackagesState, role
from roles.packages.keys import BadKey, armored
from roles.packages.managers import Manager
from roles.packages.names import DEBIAN_OF_RPM, RPM_OF_DEBIAN, translated
from roles.packages.sources import digest, source_text
from roles.packages.unattended import APT_FENCE, APT_TEXT, PATTERNS, PROBE, fencing, lacking

NODE = Node(name="node1", address="10.77.0.11")
BINARY = bytes([0x98, 0x33, 0x04]) + b"a public key packet" * 4
KEY = armored(BINARY)
MIRROR = {"name": "mirror", "os": "apt", "url": "https://mirror.lan/debian", "key": KEY}
CUDA = {"name": "cuda", "os": "rpm", "url": "http://mirror.lan/cuda/$basearch", "key": KEY}


def target(folder: Path = Path("/nowhere"), **declared: Any) -> Target[PackagesSpec]:
    spec = PackagesSpec.model_validate({"install": [], **declared})
    return Target(Cluster("lab", folder / "lab.yaml", {"node1": NODE}), NODE, spec)


def found(state: PackagesState, **declared: Any) -> list[Finding]:
    return role.drift(target(**declared), state, {})


def steps(state: PackagesState, **declared: Any) -> list[str]:
    done = role.converge(target(**declared), state, {}, found(state, **declared))
    return [step.command for step in done if isinstance(step, Shell)]


def sources(**declared: Any) -> list[tuple[str, str]]:
    one = target(**declared)
    return list(one.spec.problems(one.cluster))


# --- names ---


def test_a_name_of_one_family_is_translated_for_the_other() -> None:
    spec = PackagesSpec(
        install=["pdsh", "python3-dev", "gcc-c++", "build-essential", "ninja-build"]
    )
    assert spec.names("apt") == ["pdsh", "python3-dev", "g++", "build-essential", "ninja-build"]
    assert spec.names("rpm") == [
        *("pdsh", "pdsh-rcmd-ssh", "python3-devel", "gcc-c++", "gcc", "make", "ninja-build")
    ]


def test_a_package_may_have_a_name_for_each_family_or_for_one() -> None:
    spec = PackagesSpec.model_validate(
        {"install": [{"debian": "libfoo-dev", "rpm": "foo-devel"}, {"rpm": "tar"}]}
    )
    assert spec.names("apt") == ["libfoo-dev"] and spec.names("rpm") == ["foo-devel", "tar"]
    with pytest.raises(ValidationError, match="names no package"):
        PackagesSpec.model_validate({"install": [{}]})


def test_translating_there_and_back_gives_the_same_name() -> None:
    for name in DEBIAN_OF_RPM.values():
        (other,) = RPM_OF_DEBIAN[name]
        assert translated("rpm", translated("apt", other)[0]) == (other,)


# --- keys ---

BY_GPG = """\
-----BEGIN PGP PUBLIC KEY BLOCK-----

mDMEawG9OxYJKwYBBAHaRw8BAQdABK+AsouIZPwlymu7rxKIa01Ti439RcqtaDdS
VxhEfG60H01pcnJvciA8bWlycm9yQGV4YW1wbGUuaW52YWxpZD6IkAQTFggAOBYh
BJ4QVRSqVKjA5DN7qyZgnEzaqr64BQJrAb07AhsDBQsJCAcCBhUKCQgLAgQWAgMB
Ah4BAheAAAoJECZgnEzaqr64sSUBAL80QBRKOW1rbk0gXF9RfHzP2vxEp21TMjge
t4u64y4CAQDPOuhLcXSIqfSQXDZCxRzkkt0zDVtWWZgLULo8kQzbCA==
=qj31
-----END PGP PUBLIC KEY BLOCK-----
"""
"""What gpg 2.2.40 exported, of a key made for this test."""


def test_a_binary_key_is_armored_as_gpg_armors_it() -> None:
    body = BY_GPG.split("\n\n")[1].split("\n=")[0]
    assert armored(base64.b64decode(body)) == BY_GPG


def test_a_key_file_that_goes_during_a_run_is_not_missed(tmp_path: Path) -> None:
    file = tmp_path / "mirror.gpg"
    file.write_bytes(BINARY)
    one = target(tmp_path, sources=[{**MIRROR, "key": str(file)}])
    assert list(one.spec.problems(one.cluster)) == []
    file.unlink()
    assert one.spec.sources[0].key_text(one.cluster) == KEY


def test_an_armored_key_is_taken_with_what_stands_around_it() -> None:
    assert armored(f"Our mirror\n\n{KEY}\nmore".replace("\n", "\r\n").encode()) == KEY
    with pytest.raises(BadKey, match="no end"):
        armored(KEY[:80].encode())


def test_of_several_keys_in_one_file_none_is_lost() -> None:
    both = f"the old one\n{BY_GPG}\nthe new one\n{KEY}"
    assert armored(both.encode()) == BY_GPG + KEY
    for cut in (both[: both.rindex("-----END")], both.replace("-----END", "", 1)):
        with pytest.raises(BadKey, match="no end"):
            armored(cut.encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>404</html>",
        b"-----BEGIN PGP SIGNATURE-----\n\nx\n-----END PGP SIGNATURE-----\n",
        b"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nx\n-----END PGP PRIVATE KEY BLOCK-----\n",
        bytes([0x95, 0x01]) + b"secret",
        bytes([0xC5, 0x01]) + b"secret",
    ],
)
def test_what_is_no_public_key_is_refused(data: bytes) -> None:
    with pytest.raises(BadKey):
        armored(data)


def test_a_key_that_is_missing_or_wrong_is_told_when_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<html>")
    (tmp_path / "good.gpg").write_bytes(BINARY)
    for name, says in (
        ("page.html", "neither"),
        ("gone.asc", "No such file"),
        ("~no-such-user/key.asc", "No such file"),
        ("good.gpg", ""),
    ):
        problems = sources(folder=tmp_path, sources=[{**MIRROR, "key": name}])
        assert [key for key, _ in problems] == (["sources[0].key"] if says else [])
        assert all(name in sentence and says in sentence for _, sentence in problems)


def test_two_sources_of_one_name_are_refused() -> None:
    assert [key for key, _ in sources(sources=[MIRROR, MIRROR])] == ["sources[1].name"]
    assert sources(sources=[MIRROR, {**CUDA, "name": "mirror"}]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "local"},
        {"name": "A b"},
        {"os": "zypper"},
        {"url": "ftp://x/y"},
        {"url": "https://user:secret@mirror.lan/debian"},
        {"url": "https://mirror.lan/debian x"},
        {"url": "file://mirror.lan/debian"},
        {"key": None},
        {"key": ""},
        {"components": ["main"]},
        {"suites": ["bookworm"]},
        {"suites": ["stable/"], "components": ["main"]},
        {"suites": ["book worm"]},
        {"os": "rpm", "suites": ["bookworm"]},
    ],
)
def test_a_source_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        target(sources=[{**MIRROR, **wrong}])


# --- the files ---


@pytest.mark.parametrize(
    ("declared", "line"),
    [
        ({}, "deb [signed-by=/etc/apt/keyrings/lockstep-mirror.asc] https://mirror.lan/debian ./"),
        (
            {"suites": ["bookworm"], "components": ["main", "contrib"]},
            "deb [signed-by=/etc/apt/keyrings/lockstep-mirror.asc] https://mirror.lan/debian bookworm main contrib",
        ),
        (
            {"suites": ["stable/"]},
            "deb [signed-by=/etc/apt/keyrings/lockstep-mirror.asc] https://mirror.lan/debian stable/",
        ),
        ({"url": "file:/srv/mirror", "key": None}, "deb [trusted=yes] file:/srv/mirror ./"),
    ],
)
def test_a_source_is_one_line_of_apts(declared: dict[str, Any], line: str) -> None:
    spec = target(sources=[{**MIRROR, **declared}, CUDA], local="/srv/p").spec
    text = source_text(spec, "apt")
    assert text is not None and text.splitlines()[1:] == ["deb [trusted=yes] file:/srv/p ./", line]


def test_two_suites_are_two_lines() -> None:
    spec = target(sources=[{**MIRROR, "suites": ["a", "a-security"], "components": ["main"]}]).spec
    text = source_text(spec, "apt")
    assert text is not None and [line.split()[-2:] for line in text.splitlines()[1:]] == [
        ["a", "main"],
        ["a-security", "main"],
    ]


def test_a_source_is_a_section_of_dnfs_with_its_key() -> None:
    text = source_text(target(sources=[MIRROR, CUDA]).spec, "rpm")
    assert text is not None and "[lockstep-cuda]\n" in text and "mirror.lan/debian" not in text
    assert "gpgcheck=1\ngpgkey=file:///etc/pki/rpm-gpg/lockstep-cuda.asc\n" in text


@pytest.mark.parametrize("manager", ["apt", "rpm"])
def test_keys_are_written_before_the_file_that_names_them_and_left_ones_go(
    manager: Manager,
) -> None:
    declared: dict[str, Any] = {"sources": [MIRROR, CUDA]}
    name = {"apt": "lockstep-mirror.asc", "rpm": "lockstep-cuda.asc"}[manager]
    state = PackagesState(manager, keys={"lockstep-old.asc": "x"})
    findings = found(state, **declared)
    assert [finding.id for finding in findings] == ["package-source", "package-source-key"]
    assert f"{name}: missing" in findings[1].seen and "lockstep-old.asc: left" in findings[1].seen
    keys, source = steps(state, **declared)
    assert name in keys and "rm -f" in keys and "lockstep-old.asc" in keys
    assert "lockstep-local" in source
    right = replace(
        state,
        keys={name: digest(KEY)},
        source=source_text(target(**declared).spec, manager),
    )
    assert found(right, **declared) == []
    assert "another key" in found(replace(right, keys={name: "x"}), **declared)[0].seen


def test_what_the_local_index_lacks_may_come_from_a_declared_source() -> None:
    state = PackagesState("rpm", offered=frozenset(), repository="present")
    declared = {"install": ["libnccl"], "local": "/srv/p"}
    assert "package-not-offered" in [f.id for f in found(state, **declared)]
    assert "package-missing" in [f.id for f in found(state, **declared, sources=[CUDA])]


def test_only_the_declared_sources_are_asked_where_that_is_declared() -> None:
    declared: dict[str, Any] = {"install": ["zstd"], "sources": [MIRROR, CUDA]}
    own = {
        "apt": "-o Dir::Etc::sourceparts=-",
        "rpm": "'--disablerepo=*' '--enablerepo=lockstep-*'",
    }
    for manager, options in own.items():
        state = PackagesState(manager)  # type: ignore[arg-type]
        assert options not in steps(state, **declared)[-1]
        lines = steps(state, **declared, only=True)[-1].splitlines()
        asking = [line for line in lines if re.search("patiently (apt-get|.dnf) |.trial ", line)]
        assert all(options in line for line in asking) and len(asking) > 1
        absent = found(state, **declared, only=True)[-1]
        assert (absent.id, absent.fix) == ("package-missing", "installed from the declared sources")


def test_a_family_without_declared_sources_keeps_those_of_its_nodes() -> None:
    declared: dict[str, Any] = {"install": ["zstd"], "sources": [MIRROR], "only": True}
    assert "disablerepo" not in steps(PackagesState("rpm"), **declared)[-1]
    assert (
        found(PackagesState("rpm"), **declared)[-1].fix == "installed from the sources of the node"
    )
    with pytest.raises(ValidationError, match="leaves no source at all"):
        target(only=True)


# --- unattended upgrades ---


def test_apts_own_upgrades_leave_out_kernel_driver_and_nccl() -> None:
    for text in ("", "another text"):
        state = PackagesState("apt", unattended={APT_FENCE: text})
        assert [finding.id for finding in found(state)] == ["package-unattended"]
        assert APT_FENCE in steps(state)[0]
        assert found(state, unattended="leave") == []
    right = PackagesState("apt", unattended={APT_FENCE: APT_TEXT.replace("\n", " ").strip()})
    assert found(right) == [] and found(PackagesState("apt")) == []


AUTOMATIC = "[commands]\napply_updates = yes\nexclude = no list\n\n[base]\ndebuglevel = 1\n"


def fence_probe(file: Path) -> str:
    """What the probe says of that file, as if its tool were there."""
    head = PROBE.partition("\nfence /")[0]
    done = subprocess.run(
        ["sh", "-ec", f"{head}\nfence {file} {file}"], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    "before",
    [
        AUTOMATIC,
        f"{AUTOMATIC}excludepkgs = mysql*, kernel*\n",
        f"{AUTOMATIC}excludepkgs=mysql*\n[email]\nemail_to = root\n",
        "[commands]\napply_updates = yes\n",
        "",
    ],
)
def test_dnfs_own_upgrades_get_the_patterns_beside_the_users_and_nothing_else_changes(
    tmp_path: Path, before: str
) -> None:
    file = tmp_path / "automatic.conf"
    file.write_text(before)
    row = fence_probe(file).rstrip("\n").split("\t")
    assert row[:2] == ["fence", str(file)]
    listed = row[2].strip()
    assert bool(listed) is ("mysql" in before)
    script = fencing([("/etc/dnf/automatic.conf", listed)])
    subprocess.run(["sh", "-ec", script.replace("/etc/dnf/automatic.conf", str(file))], check=True)
    after = fence_probe(file).rstrip("\n").split("\t")[2].strip()
    assert lacking(after) == [] and ("mysql*" in after) is ("mysql" in before)
    assert len(after.split()) == len(set(after.split()))
    kept = [line for line in before.splitlines() if not line.startswith("excludepkgs")]
    assert [
        line for line in file.read_text().splitlines() if not line.startswith("excludepkgs")
    ] == (kept if "[base]" in before else [*kept, "[base]"])
    state = PackagesState("rpm", unattended={"/etc/dnf/automatic.conf": listed})
    assert [finding.id for finding in found(state)] == ["package-unattended"]
    assert found(replace(state, unattended={"/etc/dnf/automatic.conf": after})) == []


def test_every_pattern_is_needed() -> None:
    for pattern in PATTERNS:
        others = ", ".join(each for each in PATTERNS if each != pattern)
        assert lacking(others) == [pattern]


def test_a_node_without_such_a_tool_says_nothing_of_it() -> None:
    done = subprocess.run(
        ["sh", "-c", PROBE.replace("/usr/", "/nowhere/")],
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
