"""The base image of RPM nodes: a Debian system that answers as Rocky Linux 9.3 does.

Real: rpm, dnf, their database and plugins, systemd, sshd. Made here: names, paths and defaults that RHEL has
otherwise (os-release, unit names, sudoers, dnf.conf, shell start files, presets), and entries in rpm's
database for what the image holds. apt and dpkg are gone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from deploy.lab.commands import run_logged
from deploy.lab.files import make_directory, remove_tree, write_whole
from deploy.lab.rpm import DEFINES, packed, rpm_name, stanzas, version_release

RECIPE = 1
"""Counts changes of this module that change the image."""

PACKAGES = ("rpm", "dnf", "dnf-plugins-core", "createrepo-c", "file", "netbase")
"""Beyond those of a Debian node. rpmbuild and createrepo_c make the nodes' repository; netbase has
/etc/protocols, which every RHEL has."""

ENABLED = ("systemd-networkd.service", "sshd.service")

GONE = (
    *("usr/bin/apt*", "usr/bin/dpkg*", "usr/sbin/dpkg*", "usr/bin/deb-*", "usr/bin/debconf*"),
    *("usr/bin/update-alternatives", "usr/sbin/update-rc.d", "usr/sbin/invoke-rc.d"),
    *("usr/sbin/adduser", "usr/sbin/addgroup", "usr/sbin/deluser", "usr/sbin/delgroup"),
    *("etc/apt", "etc/dpkg", "etc/debian_version", "etc/debconf.conf", "etc/bash.bashrc"),
    *(f"usr/lib/python3/dist-packages/dnf-plugins/{name}.py" for name in ("show_leaves", "local")),
    *("etc/issue", "etc/issue.net", "etc/sudoers.d/README", "etc/dnf/dnf-strict.conf"),
    *("usr/lib/apt", "usr/lib/dpkg", "usr/share/dpkg", "usr/share/debconf", "root/.profile"),
    *("var/lib/apt", "var/lib/dpkg", "var/cache/apt", "var/cache/debconf"),
    *("usr/lib/systemd/system/apt-*", "usr/lib/systemd/system/dpkg-*"),
    *("etc/systemd/system/*/apt-*", "etc/systemd/system/*/dpkg-*"),
    *("etc/systemd/system/*/ssh.*", "etc/systemd/system/sshd.*"),
    *("etc/init.d", "etc/rc*.d", "usr/lib/systemd/systemd-sysv-install"),
    *("usr/lib/systemd/system/ssh.socket", "usr/lib/systemd/system/ssh@.service"),
)
"""What RHEL does not have, removed last."""

BASHRC = """\
# User specific aliases and functions
if [ -f /etc/bashrc ]; then
    . /etc/bashrc
fi
"""

FILES = {
    "usr/lib/os-release": (
        'NAME="Rocky Linux"\nVERSION="9.3 (Blue Onyx)"\nID="rocky"\nID_LIKE="rhel centos fedora"\n'
        'VERSION_ID="9.3"\nPLATFORM_ID="platform:el9"\nPRETTY_NAME="Rocky Linux 9.3 (Blue Onyx)"\n'
        'CPE_NAME="cpe:/o:rocky:rocky:9::baseos"\n'
    ),
    "etc/rocky-release": "Rocky Linux release 9.3 (Blue Onyx)\n",
    "etc/redhat-release": "Rocky Linux release 9.3 (Blue Onyx)\n",
    # Debian's rpm would keep its database in the home of whoever calls it.
    "etc/rpm/macros": "%_dbpath /var/lib/rpm\n",
    "etc/dnf/vars/releasever": "9\n",
    # Debian's dnf has a repository of its own there, which demands a signature that it lacks.
    "etc/dnf/plugins/local.conf": "[main]\nenabled=false\n",
    "etc/dnf/dnf.conf": (
        "[main]\ngpgcheck=1\ninstallonly_limit=3\nclean_requirements_on_remove=True\nbest=True\n"
        "skip_if_unavailable=False\n"
    ),
    # Non-interactive logins read /etc/profile.d on RHEL, through ~/.bashrc.
    "root/.bashrc": BASHRC,
    "etc/skel/.bashrc": BASHRC,
    "root/.bash_profile": "[ ! -f ~/.bashrc ] || . ~/.bashrc\n",
    "etc/bashrc": (
        "if ! shopt -q login_shell; then\n    for i in /etc/profile.d/*.sh; do\n"
        '        if [ -r "$i" ]; then\n            . "$i" >/dev/null\n        fi\n    done\n'
        "    unset i\nfi\n"
    ),
    "etc/ld.so.conf.d/lib64.conf": "/usr/local/lib64\n/usr/lib64\n",
    "etc/sudoers": (
        "Defaults   !visiblepw\nDefaults    always_set_home\nDefaults    env_reset\n"
        "Defaults    secure_path = /sbin:/bin:/usr/sbin:/usr/bin\n"
        "root    ALL=(ALL)       ALL\n%wheel  ALL=(ALL)       ALL\n#includedir /etc/sudoers.d\n"
    ),
    "usr/lib/systemd/system-preset/90-default.preset": (
        "enable sshd.service\nenable chronyd.service\nenable firewalld.service\n"
    ),
    "usr/lib/systemd/system-preset/99-default-disable.preset": "disable *\n",
    # All nodes share the clock of this machine, which they must not set: chronyd runs with -x there.
    "usr/lib/systemd/system/chronyd.service.d/lab.conf": (
        "[Unit]\nConditionCapability=\n\n[Service]\nEnvironmentFile=/usr/lib/lockstep-lab/chrony.env\n"
    ),
    "usr/lib/lockstep-lab/chrony.env": 'OPTIONS="-x -F 1"\n',
}


PLUGINS = {"python3-dnf-plugin-versionlock": "dnf-plugins-core"}
"""RHEL's package → Debian's, which has it inside."""


def content() -> list[object]:
    """All of this module that decides the image."""
    return [RECIPE, list(PACKAGES), list(ENABLED), list(GONE), FILES, PLUGINS]


def turn(root: Path, status: Path, log: Path) -> None:
    """Turn a fresh Debian system into an RPM node's. status: a copy of dpkg's list of its packages.

    Raises LabError when rpm fails.
    """
    units = root / "usr/lib/systemd/system"
    sshd = (units / "ssh.service").read_text()
    sshd = sshd.replace("/etc/default/ssh", "/etc/sysconfig/sshd").replace(
        "Alias=sshd.service\n", ""
    )
    (units / "ssh.service").rename(units / "sshd.service")
    write_whole(units / "sshd.service", sshd)
    for pattern in GONE:
        for path in root.glob(pattern):
            remove_tree(path)
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text, 0o440 if name == "etc/sudoers" else 0o644)
    for name, target in (("bin/yum", "dnf"), ("sbin/adduser", "useradd")):
        link = root / "usr" / name
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    for name in ("etc/sysconfig", "etc/yum.repos.d", "usr/local/lib64"):
        make_directory(root / name)
    for name, line in (("etc/group", "wheel:x:990:\n"), ("etc/gshadow", "wheel:*::\n")):
        path = root / name
        write_whole(path, path.read_text() + line, path.stat().st_mode & 0o777)
    shutil.chown(root / "etc/gshadow", group=42)
    enter_packages(root, status, log)


def enter_packages(root: Path, status: Path, log: Path) -> None:
    """Enter what the image holds into rpm's database, under RHEL's names and without files."""
    work = make_directory(root / "mnt/lab")
    write_whole(work / "base.spec", base_spec(status.read_text()))
    script = (
        "ldconfig; cd /mnt/lab; rpmbuild --quiet -bb "
        + " ".join(DEFINES)
        + " base.spec; rpm -i --justdb --nodeps --noscripts rpms/*.rpm"
    )
    run_logged(packed(root, script), log, "entering the packages of the RPM base image")
    remove_tree(work)


def base_spec(status: str) -> str:
    """One spec for all packages of dpkg's status file, each a package of its own."""
    versions: dict[str, tuple[str, str]] = {}
    for fields in stanzas(status):
        name = rpm_name(fields["Package"])
        if name and fields.get("Status", "").endswith(" installed"):
            versions.setdefault(name, version_release(fields["Version"]))
    for name, holder in PLUGINS.items():
        if holder in versions:
            versions[name] = versions[holder]
    text = "Name: base\nVersion: 1\nRelease: 1\nSummary: base\nLicense: various\nAutoReqProv: no\n"
    text += "%description\nbase\n"
    for name, (version, release) in sorted(versions.items()):
        text += f"%package -n {name}\nVersion: {version}\nRelease: {release}\nSummary: {name}\n"
        if name == "bash":
            text += "Provides: /bin/sh\nProvides: /bin/bash\n"
        text += f"%description -n {name}\n{name}\n%files -n {name}\n"
    return text
