"""The base image is cached by what decides its content; half-built ones never count, used ones stay."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.lab import image, rpm_image
from deploy.lab.errors import LabError
from deploy.lab.files import partial_beside
from deploy.lab.host import Host, Source
from deploy.lab.progress import Progress
from deploy.lab.state import FAMILIES, Family, Kind, Paths, Record, save_record

HOST = Host("debian", "bookworm", "amd64", (Source("http://a", "bookworm", ("main",)),))
QUIET = Progress(io.StringIO())


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    (tmp_path / "cache").mkdir()
    return Paths(tmp_path / "lab", tmp_path / "cache")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []

    def build(directory: Path, host: Host, family: Family, kind: Kind, log: Path) -> None:
        made.append(directory)
        (directory / "root").mkdir()

    monkeypatch.setattr(image, "build", build)
    return made


def ensure_base(paths: Paths, existing: str | None = None) -> str:
    return image.ensure_bases(paths, HOST, "container", {"debian": existing}, QUIET)["debian"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "other",
    [
        replace(HOST, suite="trixie"),
        replace(HOST, architecture="arm64"),
        replace(HOST, sources=(Source("http://b", "bookworm", ("main",)),)),
    ],
)
def test_what_decides_the_content_decides_the_name(other: Host, family: Family) -> None:
    assert image.key_of(HOST, family) == image.key_of(replace(HOST), family)
    assert image.key_of(HOST, family) != image.key_of(other, family)


def test_another_package_list_is_another_image(monkeypatch: pytest.MonkeyPatch) -> None:
    before = image.key_of(HOST, "debian")
    monkeypatch.setattr(image, "PACKAGES", (*image.PACKAGES, "less"))
    assert image.key_of(HOST, "debian") != before


def test_what_only_rpm_nodes_have_changes_only_their_image(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {family: image.key_of(HOST, family) for family in FAMILIES}
    monkeypatch.setattr(rpm_image, "FILES", {**rpm_image.FILES, "etc/x": ""})
    assert image.key_of(HOST, "debian") == before["debian"] != before["rpm"]
    assert image.key_of(HOST, "rpm") != before["rpm"]


def test_a_proxy_setting_of_the_host_does_not_change_the_image() -> None:
    other = replace(HOST, apt_options=('Acquire::http::Proxy "x";',))
    assert image.key_of(other, "debian") == image.key_of(HOST, "debian")


def test_a_mixed_lab_has_both_images_and_keeps_both(paths: Paths, builds: list[Path]) -> None:
    paths.state.mkdir()
    save_record(paths, Record(1))
    keys = image.ensure_bases(paths, HOST, "container", {"debian": None, "rpm": None}, QUIET)
    assert len(builds) == 2
    assert len(set(keys.values())) == 2
    ensure_base(Paths(paths.state.with_name("other"), paths.cache))
    assert len(builds) == 2
    for key in keys.values():
        assert paths.state in image.users(paths.cache, key)


def test_a_whole_image_is_built_once(paths: Paths, builds: list[Path]) -> None:
    first = ensure_base(paths)
    assert ensure_base(paths) == first
    assert len(builds) == 1
    assert image.base_root(paths, first).is_dir()


def test_a_half_built_image_is_removed_and_built_again(paths: Paths, builds: list[Path]) -> None:
    half = partial_beside(paths.cache / image.key_of(HOST, "debian"))
    (half / "root").mkdir(parents=True)
    key = ensure_base(paths)
    assert len(builds) == 1
    assert not half.exists()
    assert image.base_root(paths, key).is_dir()


def test_a_build_that_fails_leaves_no_image(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(directory: Path, host: Host, family: Family, kind: Kind, log: Path) -> None:
        (directory / "root").mkdir()
        raise LabError("no mirror")

    monkeypatch.setattr(image, "build", build)
    with pytest.raises(LabError, match="no mirror"):
        ensure_base(paths)
    assert [path.name for path in paths.cache.iterdir() if path.is_dir()] == []


def test_nodes_keep_the_image_that_they_lie_on(paths: Paths, builds: list[Path]) -> None:
    old = "base-bookworm-000000000000"
    (paths.cache / old / "root").mkdir(parents=True)
    assert ensure_base(paths, old) == old
    assert builds == []


def test_a_vanished_image_of_existing_nodes_is_named(paths: Paths, builds: list[Path]) -> None:
    with pytest.raises(LabError, match="base-x is not in .*: run `lab down`, then `lab up`"):
        ensure_base(paths, "base-x")
    assert builds == []


def test_an_old_image_stays_while_a_lab_lies_on_it_and_goes_afterwards(
    paths: Paths, builds: list[Path]
) -> None:
    old = "base-bookworm-000000000000"
    (paths.cache / old / "root").mkdir(parents=True)
    other = Paths(paths.state.with_name("other"), paths.cache)
    for lab in (paths, other):
        lab.state.mkdir()
        save_record(lab, Record(1))
    ensure_base(other, old)
    ensure_base(paths)
    assert image.users(paths.cache, old) == [other.state]
    assert (paths.cache / old).is_dir()
    image.register(other, [])
    ensure_base(paths)
    assert not (paths.cache / old).exists()
    assert (paths.cache / image.key_of(HOST, "debian")).is_dir()


def test_a_lab_whose_directory_is_gone_holds_no_image(paths: Paths, builds: list[Path]) -> None:
    old = "base-bookworm-000000000000"
    (paths.cache / old / "root").mkdir(parents=True)
    image.register(Paths(paths.state.with_name("gone"), paths.cache), old)
    ensure_base(paths)
    assert not (paths.cache / old).exists()


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "root"
    for name, text in {
        "etc/ssh/ssh_host_rsa_key": "shared identity",
        "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
        "etc/apt/sources.list": "deb http://a bookworm main\n",
        "etc/apt/sources.list.d/x.sources": "Types: deb\n",
        "etc/apt/apt.conf.d/99mmdebstrap": 'Acquire::http::Proxy "http://user:secret@p";\n',
        "etc/update-motd.d/10-uname": "uname\n",
        "etc/resolv.conf": "nameserver 192.0.2.1\n",
        "etc/hosts": "127.0.0.1 builder\n",
        "usr/bin/true": "",
        "etc/systemd/system/x": "",
        "var/lib/x": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    ran: list[list[str]] = []

    def keep(argv: list[str]) -> str:
        ran.append(argv)
        return ""

    monkeypatch.setattr(image, "run", keep)
    image.settle(root, {**image.FILES, **image.DEBIAN_FILES}, image.ENABLED)
    assert ran == [["systemctl", f"--root={root}", "--quiet", "enable", *image.ENABLED]]
    return root


def test_the_image_has_no_identity_no_source_and_no_secret(settled: Path) -> None:
    assert not list(settled.glob("etc/ssh/ssh_host_*"))
    assert (settled / "etc/machine-id").read_text() == ""
    assert (settled / "etc/apt/sources.list").read_text() == ""
    assert not list(settled.glob("etc/apt/sources.list.d/*"))
    assert not list(settled.glob("etc/apt/apt.conf.d/*"))
    assert (settled / "etc/resolv.conf").read_text() == ""
    assert not (settled / "etc/hosts").exists()


def test_units_that_wait_for_the_internet_are_masked(settled: Path) -> None:
    for unit in image.MASKED:
        assert (settled / "etc/systemd/system" / unit).readlink() == Path("/dev/null")


def test_chrony_in_a_node_does_not_steer_the_host_s_clock(settled: Path) -> None:
    dropin = settled / "usr/lib/systemd/system/chrony.service.d/lab.conf"
    variables = dropin.read_text().split("EnvironmentFile=")[1].strip()
    assert "-x" in (settled / variables.removeprefix("/")).read_text().split('"')[1].split()


def test_nothing_that_a_role_installs_is_in_the_image() -> None:
    assert not {"pdsh", "rsync", "zstd", "chrony"} & set(image.PACKAGES)


def test_available_memory_is_read_in_bytes() -> None:
    assert image.available_memory("MemTotal: 9 kB\nMemAvailable:    2048 kB\n") == 2048 * 1024
    assert image.available_memory("MemTotal: 9 kB\n") == 0


@pytest.mark.parametrize(("memory", "wrapped"), [(1 << 40, True), (0, False)])
def test_the_image_is_built_in_memory_where_there_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, wrapped: bool
) -> None:
    ran: list[list[str]] = []

    def run_logged(argv: list[str], log: Path, what: str, changes: dict[str, str]) -> None:
        ran.append(argv)

    monkeypatch.setattr(image, "available_memory", lambda meminfo: memory)
    monkeypatch.setattr(image, "run_logged", run_logged)
    monkeypatch.setattr(image, "settle", lambda root, files, enabled: None)
    status = tmp_path / "root/var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text("Package: x\n")
    image.build(tmp_path, HOST, "debian", "container", tmp_path / "log")
    assert (tmp_path / "status").read_text() == "Package: x\n"
    [argv] = ran
    assert (argv[0] == "sh") is wrapped
    target = tmp_path / "memory/root" if wrapped else tmp_path / "root"
    assert argv[-3:] == ["bookworm", str(target), str(tmp_path / "sources.list")]
    assert (tmp_path / "sources.list").read_text() == "deb http://a bookworm main\n"
    assert not (tmp_path / "memory").exists()
