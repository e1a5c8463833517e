"""RPMs made of .deb files: RHEL's names, versions and paths, what they need, and what they run."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from deploy.lab import rpm, rpm_image
from deploy.lab.progress import Progress

QUIET = Progress(io.StringIO())


@pytest.mark.parametrize(
    ("package", "version", "made"),
    [
        ("libnccl2", "2.20.5-1+cuda12.4", ("libnccl", "2.20.5", "1+cuda12.4")),
        ("libnccl-dev", "2.20.5-1+cuda12.4", ("libnccl-devel", "2.20.5", "1+cuda12.4")),
        ("g++", "4:12.2.0-3", ("gcc-c++", "12.2.0", "3")),
        ("python3-dev", "3.11.2-1+b1", ("python3-devel", "3.11.2", "1+b1")),
        ("x", "1:2-3-4", ("x", "2.3", "4")),
        ("native", "1.0", ("native", "1.0", "1")),
        ("linux-headers-6.1.0-50-amd64", "6.1.176-1", ("kernel-devel", "6.1.0", "50.el9")),
    ],
)
def test_names_and_versions_are_rhel_s(
    package: str, version: str, made: tuple[str, str, str]
) -> None:
    assert rpm.identity({"Package": package, "Version": version}) == made


@pytest.mark.parametrize("package", ["dpkg-dev", "apt", "libapt-pkg6.0", "linux-headers-amd64"])
def test_debian_s_own_machinery_becomes_no_rpm(package: str) -> None:
    assert rpm.rpm_name(package) == ""


def test_a_package_that_only_begins_like_debian_s_machinery_stays() -> None:
    assert rpm.rpm_name("linux-headers-6.1.0-50-common") == "linux-headers-6.1.0-50-common"
    assert rpm.rpm_name("aptitude-like") == ""
    assert rpm.rpm_name("pdsh") == "pdsh"


def test_an_rpm_requires_what_the_repository_has_and_the_image_lacks() -> None:
    offered = rpm.offers(
        [
            {"Package": "gcc", "Provides": "c-compiler, gcc-x (= 1)"},
            {"Package": "libnccl2"},
            {"Package": "make"},
            {"Package": "dpkg-dev"},
        ]
    )
    fields = {
        "Pre-Depends": "libc6 (>= 2.3)",
        "Depends": "dpkg-dev, c-compiler | clang, libnccl2 (= 2.20.5-1+cuda12.4), make:any | gmake, x | y",
    }
    assert rpm.requires(fields, offered) == ["gcc", "libnccl = 2.20.5-1+cuda12.4", "make"]


def test_control_fields_are_read_without_continuation_lines() -> None:
    text = "Package: a\nDescription: short\n long: er\nVersion: 1:2-3\n\nPackage: b\n"
    assert list(rpm.stanzas(text)) == [
        {"Package": "a", "Description": "short", "Version": "1:2-3"},
        {"Package": "b"},
    ]


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def files_of(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def test_files_come_where_rhel_has_them_and_units_follow(tmp_path: Path) -> None:
    unit = "ExecStart=/usr/sbin/nft -f /etc/nftables.conf\nEnvironmentFile=-/etc/default/nft\n"
    root = tree(
        tmp_path,
        {
            "lib/systemd/system/nftables.service": unit,
            "usr/lib/keep": "",
            "sbin/nft": "",
            "etc/nftables.conf": "flush ruleset\n",
            "etc/default/nft": "",
            "usr/share/doc/nftables/copyright": "",
        },
    )
    rpm.arrange(root, "nftables")
    assert files_of(root) == {
        "usr/lib/systemd/system/nftables.service",
        "usr/lib/keep",
        "usr/sbin/nft",
        "etc/sysconfig/nftables.conf",
        "etc/sysconfig/nft",
    }
    assert (root / "usr/lib/systemd/system/nftables.service").read_text() == (
        "ExecStart=/usr/sbin/nft -f /etc/sysconfig/nftables.conf\n"
        "EnvironmentFile=-/etc/sysconfig/nft\n"
    )


def test_chrony_is_rhel_s_in_unit_configuration_and_user(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "usr/sbin/chronyd": "",
            "etc/chrony/chrony.conf": "pool debian\n",
            "lib/systemd/system/chrony.service": "[Service]\n",
        },
    )
    rpm.arrange(root, "chrony")
    assert files_of(root) == {
        "usr/sbin/chronyd",
        "etc/chrony.conf",
        "etc/chrony.keys",
        "etc/sysconfig/chronyd",
        "usr/lib/systemd/system/chronyd.service",
    }
    fields = {"Package": "chrony", "Version": "4.3-2", "Architecture": "amd64"}
    lines = rpm.spec(fields, [], root).splitlines()
    assert "%dir %attr(0750, chrony, chrony) /var/lib/chrony" in lines
    assert '%config(noreplace) "/etc/chrony.conf"' in lines
    assert [line for line in lines if "useradd" in line and line.endswith(" chrony")]
    assert "systemctl --no-reload preset chronyd.service" in "\n".join(lines)
    assert not [line for line in lines if "start" in line.split()]


def test_nccl_lies_in_lib64_and_refreshes_the_loader_s_cache(tmp_path: Path) -> None:
    root = tree(tmp_path, {"usr/lib/x86_64-linux-gnu/libnccl.so.2.20.5": "x"})
    (root / "usr/lib/x86_64-linux-gnu/libnccl.so.2").symlink_to("libnccl.so.2.20.5")
    rpm.arrange(root, "libnccl2")
    fields = {"Package": "libnccl2", "Version": "2.20.5-1+cuda12.4", "Architecture": "amd64"}
    lines = rpm.spec(fields, [], root).splitlines()
    owned = {line for line in lines if line.startswith('"/')}
    assert owned == {'"/usr/lib64/libnccl.so.2"', '"/usr/lib64/libnccl.so.2.20.5"'}
    assert lines[lines.index("%post") + 1] == "ldconfig"
    assert lines[lines.index("%postun") + 1] == "ldconfig"


def test_users_that_a_package_declares_are_there_before_the_bus_learns_of_its_service() -> None:
    paths = ["/usr/lib/sysusers.d/polkitd.conf", "/usr/share/dbus-1/system.d/x.conf"]
    assert rpm.scriptlets(rpm.Kind(), paths) == [
        "%post",
        "systemd-sysusers polkitd.conf || :",
        "systemctl reload dbus.service || :",
    ]


def test_pdsh_s_ssh_module_is_a_package_of_its_own(tmp_path: Path) -> None:
    root = tree(tmp_path, {"usr/bin/pdsh": "", "usr/lib/x86_64-linux-gnu/pdsh/sshcmd.so": ""})
    fields = {"Package": "pdsh", "Version": "2.34-0.2", "Architecture": "amd64"}
    lines = rpm.spec(fields, ["genders"], root).splitlines()
    part, main = lines.index("%files -n pdsh-rcmd-ssh"), lines.index("%files")
    assert lines[part + 1 : main] == ['"/usr/lib/x86_64-linux-gnu/pdsh/sshcmd.so"']
    assert lines[main + 1 :] == ['"/usr/bin/pdsh"']
    assert "Requires: pdsh = 2.34-0.2" in lines


def test_headers_are_those_of_a_kernel_with_rhel_s_release(tmp_path: Path) -> None:
    source = "usr/src/linux-headers-6.1.0-50-amd64"
    root = tree(
        tmp_path,
        {
            f"{source}/include/config/kernel.release": "6.1.0-50-amd64\n",
            f"{source}/include/generated/utsrelease.h": '#define UTS_RELEASE "6.1.0-50-amd64"\n',
        },
    )
    (root / source / "scripts").symlink_to("../../lib/linux-kbuild-6.1/scripts")
    (root / "lib/modules/6.1.0-50-amd64").mkdir(parents=True)
    (root / "lib/modules/6.1.0-50-amd64/build").symlink_to(f"/{source}")
    rpm.arrange(root, "linux-headers-6.1.0-50-amd64")
    kernel = "6.1.0-50.el9.x86_64"
    build = root / "usr/lib/modules" / kernel / "build"
    assert str(build.readlink()) == f"/usr/src/kernels/{kernel}"
    assert [path.name for path in (root / "usr/lib/modules").iterdir()] == [kernel]
    release = root / "usr/src/kernels" / kernel / "include/config/kernel.release"
    assert release.read_text() == f"{kernel}\n"
    scripts = root / "usr/src/kernels" / kernel / "scripts"
    assert str(scripts.readlink()) == "../../../lib/linux-kbuild-6.1/scripts"


def control(package: str, depends: str = "") -> str:
    return f"Package: {package}\nVersion: 1-1\nArchitecture: amd64\nDepends: {depends}\n"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages that were converted, by a build that only leaves a file in the cache."""
    names: list[str] = []
    (tmp_path / "cache/base-rpm").mkdir(parents=True)
    status = "Package: libc6\nStatus: install ok installed\nVersion: 2\n"
    (tmp_path / "cache/base-rpm/status").write_text(status)

    def convert(missing: list[rpm.Job], image: Path, work: Path, log: Path) -> None:
        for job in missing:
            names.append(job.fields["Package"])
            job.made.mkdir(parents=True)
            (job.made / f"{job.fields['Package']}.rpm").write_text(" ".join(job.needs))

    def run_logged(argv: list[str], log: Path, what: str) -> None:
        (Path(argv[-1]) / "repodata").mkdir(exist_ok=True)
        (Path(argv[-1]) / "repodata/repomd.xml").write_text("")

    monkeypatch.setattr(rpm, "convert", convert)
    monkeypatch.setattr(rpm, "run_logged", run_logged)
    monkeypatch.setattr(rpm, "run", lambda argv: Path(argv[-1]).read_text())
    return names


def ensure(tmp_path: Path, lab: str, **debs: str) -> set[str]:
    """Have a lab's repository with those .deb files; the RPMs in it."""
    repository = tmp_path / lab / "repo"
    repository.mkdir(parents=True, exist_ok=True)
    for path in repository.glob("*.deb"):
        path.unlink()
    for name, text in debs.items():
        (repository / f"{name}.deb").write_text(text)
    image = tmp_path / "cache/base-rpm"
    rpm.ensure_rpms(repository, tmp_path / lab / "rpms.json", image, QUIET)
    return {path.name for path in repository.glob("*.rpm*")}


def test_an_rpm_is_made_once_for_all_labs_of_a_cache(tmp_path: Path, made: list[str]) -> None:
    one = {"a": control("a"), "libc6": control("libc6"), "dpkg": control("dpkg")}
    assert ensure(tmp_path, "one", **one) == {"a.rpm"}
    assert ensure(tmp_path, "one", **one) == {"a.rpm"}
    assert ensure(tmp_path, "two", a=control("a"), b=control("b")) == {"a.rpm", "b.rpm"}
    assert made == ["a", "b"]


def test_an_rpm_is_made_anew_when_the_repository_gets_what_it_depends_on(
    tmp_path: Path, made: list[str]
) -> None:
    ensure(tmp_path, "one", pdsh=control("pdsh", "genders"))
    ensure(tmp_path, "one", pdsh=control("pdsh", "genders"), genders=control("genders"))
    assert made == ["pdsh", "genders", "pdsh"]
    assert (tmp_path / "one/repo/pdsh.rpm").read_text() == "genders"


def test_what_is_no_longer_in_the_repository_goes_from_its_rpms(
    tmp_path: Path, made: list[str]
) -> None:
    assert ensure(tmp_path, "one", a=control("a"), b=control("b")) == {"a.rpm", "b.rpm"}
    assert ensure(tmp_path, "one", b=control("b")) == {"b.rpm"}


def test_the_system_s_python_headers_answer_to_the_versioned_name_too(tmp_path: Path) -> None:
    fields = {"Package": "python3-dev", "Version": "3.11.2-1+b1", "Architecture": "amd64"}
    lines = rpm.spec(fields, [], tmp_path).splitlines()
    assert "Provides: python3.11-devel" in lines


def test_the_image_s_own_packages_are_entered_under_rhel_s_names() -> None:
    text = rpm_image.base_spec(
        "Package: bash\nStatus: install ok installed\nVersion: 5.2.15-2\n\n"
        "Package: procps\nStatus: install ok installed\nVersion: 2:4.0.2-3\n\n"
        "Package: dnf-plugins-core\nStatus: install ok installed\nVersion: 4.3.1-1\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n"
        "Package: apt\nStatus: install ok installed\nVersion: 2.6\n"
    )
    assert "%package -n procps-ng\nVersion: 4.0.2\nRelease: 3\n" in text
    assert (
        "%package -n bash\nVersion: 5.2.15\nRelease: 2\nSummary: bash\nProvides: /bin/sh\n" in text
    )
    assert "%package -n python3-dnf-plugin-versionlock\nVersion: 4.3.1\n" in text
    assert "gone" not in text
    assert "-n apt" not in text


def test_an_rpm_node_s_chronyd_does_not_steer_the_host_s_clock() -> None:
    dropin = rpm_image.FILES["usr/lib/systemd/system/chronyd.service.d/lab.conf"]
    variables = dropin.split("EnvironmentFile=/")[1].strip()
    assert "-x" in rpm_image.FILES[variables].split('"')[1].split()
    assert rpm.CHRONYD_UNIT.count("$OPTIONS") == 1


def test_nothing_of_apt_or_dpkg_is_left_in_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {
        "usr/bin/apt-get": "",
        "usr/bin/dpkg-query": "",
        "var/lib/dpkg/status": "",
        "etc/apt/sources.list": "",
        "etc/debian_version": "12\n",
        "etc/init.d/ssh": "",
    }
    unit = "EnvironmentFile=-/etc/default/ssh\n[Install]\nAlias=sshd.service\n"
    kept = {
        "usr/lib/systemd/system/ssh.service": unit,
        "etc/group": "root:x:0:\n",
        "etc/gshadow": "root:*::\n",
        "usr/sbin/useradd": "",
        "etc/dnf/plugins/local.conf": "[main]\nenabled=true\n",
    }
    root = tree(tmp_path, {**gone, **kept})
    link = root / "etc/systemd/system/sshd.service"
    link.parent.mkdir(parents=True)
    link.symlink_to("/lib/systemd/system/absent.service")
    monkeypatch.setattr(rpm_image, "enter_packages", lambda root, status, log: None)
    monkeypatch.setattr(shutil, "chown", lambda path, group: None)
    rpm_image.turn(root, tmp_path / "status", tmp_path / "log")
    assert not files_of(root) & gone.keys()
    assert not link.is_symlink()
    assert (root / "usr/lib/systemd/system/sshd.service").read_text() == (
        "EnvironmentFile=-/etc/sysconfig/sshd\n[Install]\n"
    )
    assert (root / "etc/sudoers").stat().st_mode & 0o777 == 0o440
    assert (root / "etc/group").read_text().endswith("\nwheel:x:990:\n")
    assert "enabled=false" in (root / "etc/dnf/plugins/local.conf").read_text()
