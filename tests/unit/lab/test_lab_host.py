"""The nodes are made from the host's own distribution: its release and sources are read as apt reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.lab import host
from deploy.lab.errors import LabError
from deploy.lab.host import Source

DEBIAN = """\
# a comment
Types: deb deb-src
URIs: http://deb.example/debian
Suites: bookworm bookworm-updates
# between fields
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 /usr/share/keyrings/debian-archive-keyring.gpg
 /usr/share/keyrings/more.gpg

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://inline.example/debian
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEY865UxYJKwYBBAHaRw8BAQdAd7Z0srwuhlB6JKFkcf4HU4SSS
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: http://flat.example/
Suites: ./
"""


def test_os_release_is_unquoted_and_broken_lines_are_skipped() -> None:
    text = '# c\nID=debian\nPRETTY_NAME="Debian GNU/Linux 12"\nVERSION_CODENAME=\'bookworm\'\nBAD="x\nx\n'
    assert host.parse_os_release(text) == {
        "ID": "debian",
        "PRETTY_NAME": "Debian GNU/Linux 12",
        "VERSION_CODENAME": "bookworm",
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "deb http://a/debian bookworm main contrib",
            [Source("http://a/debian", "bookworm", ("main", "contrib"))],
        ),
        (
            "  deb [ arch=amd64 signed-by=/k.gpg ]  http://a/ubuntu  jammy  main universe # why",
            [
                Source(
                    "http://a/ubuntu",
                    "jammy",
                    ("main", "universe"),
                    (("arch", "amd64"), ("signed-by", "/k.gpg")),
                )
            ],
        ),
        ("# deb http://a/debian bookworm main", []),
        ("deb-src http://a/debian bookworm main", []),
        ("deb cdrom:[Debian]/ bookworm main", []),
        ("deb http://a/flat ./", []),
        ("", []),
    ],
)
def test_one_line_sources_keep_what_is_a_binary_archive(line: str, expected: list[Source]) -> None:
    assert host.parse_one_line(line) == expected


def test_deb822_sources_are_multiplied_and_disabled_or_flat_ones_dropped() -> None:
    found = host.parse_deb822(DEBIAN)
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert [(source.uri, source.suite) for source in found] == [
        ("http://deb.example/debian", "bookworm"),
        ("http://deb.example/debian", "bookworm-updates"),
        ("http://deb.example/debian-security", "bookworm-security"),
        ("http://inline.example/debian", "bookworm"),
    ]
    assert found[0].components == ("main", "contrib")
    assert [source.signed_by for source in found] == [
        key,
        key,
        f"{key},/usr/share/keyrings/more.gpg",
        "",
    ]


def test_a_source_becomes_one_line_with_its_options() -> None:
    source = Source("http://a", "jammy", ("main", "universe"), (("signed-by", "/k.gpg"),))
    assert source.line() == "deb [signed-by=/k.gpg] http://a jammy main universe"
    assert host.parse_one_line(source.line()) == [source]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("deb http://a/debian bookworm main", True),
        ("deb http://a/debian bookworm-updates main", True),
        ("deb http://a/security bookworm-security main", True),
        (
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://a bookworm main",
            True,
        ),
        ("deb http://a/debian stable main", True),
        ("deb http://a/debian bookworm-backports main", False),
        ("deb http://a/debian trixie main", False),
        ("deb https://docker.example/debian bookworm stable", False),
        ("deb [signed-by=/etc/apt/keyrings/vendor.gpg] https://v.example bookworm main", False),
    ],
)
def test_only_the_distribution_s_own_sources_are_used(line: str, kept: bool) -> None:
    found = host.distribution_sources(host.parse_one_line(line), "debian", "bookworm")
    assert bool(found) is kept


def write_host(root: Path, release: str, sources: dict[str, str]) -> None:
    (root / "etc/apt/sources.list.d").mkdir(parents=True)
    (root / "etc/os-release").write_text(release)
    for name, text in sources.items():
        (root / "etc/apt" / name).write_text(text)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"dpkg": "amd64\n", "apt-config": 'Acquire::http::Proxy "http://p:3128";\nApt "";\n'}
    monkeypatch.setattr(host, "run", lambda argv: answers[argv[0]])


@pytest.mark.usefixtures("quiet")
def test_both_kinds_of_sources_are_read_and_duplicates_merged(tmp_path: Path) -> None:
    write_host(
        tmp_path,
        "ID=debian\nVERSION_CODENAME=bookworm\n",
        {
            "sources.list": "deb http://deb.example/debian-old bookworm main\n",
            "sources.list.d/debian.sources": DEBIAN,
            "sources.list.d/again.list": "deb http://deb.example/debian-old bookworm main\n",
            "sources.list.d/ignored.txt": "deb http://never.example bookworm main\n",
        },
    )
    found = host.read_host(tmp_path)
    assert (found.distribution, found.suite, found.architecture) == ("debian", "bookworm", "amd64")
    assert [source.uri for source in found.sources].count("http://deb.example/debian-old") == 1
    assert "http://never.example" not in [source.uri for source in found.sources]
    assert found.apt_options == ('Acquire::http::Proxy "http://p:3128";',)


@pytest.mark.usefixtures("quiet")
def test_a_host_on_testing_keeps_the_suite_s_name(tmp_path: Path) -> None:
    release = "ID=debian\nVERSION_CODENAME=forky\n"
    write_host(tmp_path, release, {"sources.list": "deb http://a testing main\n"})
    assert host.read_host(tmp_path).suite == "testing"


@pytest.mark.usefixtures("quiet")
def test_ubuntu_s_sources_are_recognised(tmp_path: Path) -> None:
    text = (
        "Types: deb\nURIs: http://u/ubuntu/\nSuites: noble noble-updates noble-backports\n"
        "Components: main universe\nSigned-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg\n"
    )
    release = "ID=ubuntu\nVERSION_CODENAME=noble\n"
    write_host(tmp_path, release, {"sources.list.d/ubuntu.sources": text})
    found = host.read_host(tmp_path)
    assert [source.suite for source in found.sources] == ["noble", "noble-updates"]


@pytest.mark.usefixtures("quiet")
def test_another_distribution_is_named_in_one_sentence(tmp_path: Path) -> None:
    write_host(tmp_path, 'ID=fedora\nPRETTY_NAME="Fedora Linux 41"\n', {})
    with pytest.raises(LabError, match=r"must be Debian or Ubuntu and is Fedora Linux 41"):
        host.read_host(tmp_path)


@pytest.mark.usefixtures("quiet")
def test_a_host_with_only_its_security_source_has_no_usable_one(tmp_path: Path) -> None:
    release = "ID=debian\nVERSION_CODENAME=bookworm\n"
    write_host(tmp_path, release, {"sources.list": "deb http://s bookworm-security main\n"})
    with pytest.raises(LabError, match=r"no package source of debian bookworm in /etc/apt"):
        host.read_host(tmp_path)


def test_apt_options_that_reach_the_mirror_are_passed_and_hooks_are_not() -> None:
    dump = (
        'Acquire::https::Verify-Peer "1";\nAcquire::Check-Valid-Until "false";\nAcquire::Languages:: "none";\n'
        'Acquire::http "";\nDPkg::Post-Invoke:: "rm -rf x";\nAcquire::http::Proxy::h.example "DIRECT";\n'
    )
    assert host.parse_apt_options(dump) == [
        'Acquire::https::Verify-Peer "1";',
        'Acquire::Check-Valid-Until "false";',
        'Acquire::http::Proxy::h.example "DIRECT";',
    ]
