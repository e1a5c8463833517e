"""What this machine's own distribution is and where its packages come from.

The nodes are of the same distribution and suite, from the same mirrors, through the same proxy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deploy.lab.commands import run
from deploy.lab.errors import LabError

DISTRIBUTIONS = ("debian", "ubuntu")
ROLLING = ("stable", "testing", "unstable", "sid")
POCKETS = ("", "-updates", "-security", "/updates")
PASSED_OPTIONS = re.compile(
    r"Acquire::(?:https?|ftp)::\S+|Acquire::(?:Check-Valid-Until|Check-Date|Max-FutureTime|Retries"
    r"|ForceIPv4|ForceIPv6|AllowInsecureRepositories|AllowWeakRepositories)"
)
"""Settings of the host's apt that decide whether a mirror can be read at all."""


@dataclass(frozen=True)
class Source:
    """One line of apt sources. options: what stands in brackets, for example ``signed-by``."""

    uri: str
    suite: str
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def line(self) -> str:
        """The one-line form that apt and mmdebstrap read."""
        bracket = " ".join(f"{name}={value}" for name, value in self.options)
        return " ".join(
            ["deb", *([f"[{bracket}]"] if bracket else []), self.uri, self.suite, *self.components]
        )

    @property
    def signed_by(self) -> str:
        return dict(self.options).get("signed-by", "")


@dataclass(frozen=True)
class Host:
    """The distribution of this machine. sources: only the distribution's own, no third party's."""

    distribution: str
    suite: str
    architecture: str
    sources: tuple[Source, ...]
    apt_options: tuple[str, ...] = ()


def parse_os_release(text: str) -> dict[str, str]:
    """The assignments of /etc/os-release; quoting as in a shell, broken lines skipped."""
    values: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            try:
                values[name] = "".join(shlex.split(value))
            except ValueError:
                continue
    return values


def parse_one_line(text: str) -> list[Source]:
    """Sources of a ``sources.list``; comments, deb-src, cdrom and flat repositories are left out."""
    found = []
    for raw in text.splitlines():
        match = re.fullmatch(
            r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(\S[^#]*?)\s*(?:#.*)?", raw
        )
        if match is None or match[2].startswith("cdrom:"):
            continue
        options = tuple(
            (name.lower(), value)
            for name, equals, value in (word.partition("=") for word in (match[1] or "").split())
            if equals
        )
        found.append(Source(match[2], match[3], tuple(match[4].split()), options))
    return found


def parse_deb822(text: str) -> list[Source]:
    """Sources of a ``.sources`` file; disabled stanzas, deb-src and flat repositories are left out.

    A key that stands in the stanza itself is left out too: apt then uses the host's own keyring.
    """
    found = []
    for stanza in re.split(r"\n\s*\n", "\n".join(_without_comments(text))):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() in ("no", "false", "0", "off"):
            continue
        if "deb" not in fields.get("types", "").split():
            continue
        options = []
        signed_by = fields.get("signed-by", "").strip()
        if signed_by.startswith("/"):
            options.append(("signed-by", ",".join(signed_by.replace(",", " ").split())))
        if fields.get("trusted", "").lower() == "yes":
            options.append(("trusted", "yes"))
        components = tuple(fields.get("components", "").split())
        if not components:
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                if not uri.startswith("cdrom:"):
                    found.append(Source(uri, suite, components, tuple(options)))
    return found


def _without_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def distribution_sources(
    sources: Iterable[Source], distribution: str, codename: str
) -> list[Source]:
    """Those of the distribution itself: its suites, component ``main``, its own archive key (or none named).

    The suite under which the host has them is kept, so that a host on ``testing`` works as well.
    """
    bases = (codename, *ROLLING) if codename else ROLLING
    wanted = {f"{base}{pocket}" for base in bases for pocket in POCKETS}
    chosen = []
    for source in sources:
        key = Path(source.signed_by.split(",")[0]).name
        foreign = bool(key) and not key.startswith(f"{distribution}-archive")
        if source.suite in wanted and "main" in source.components and not foreign:
            options = tuple(item for item in source.options if item[0] in ("signed-by", "trusted"))
            chosen.append(Source(source.uri, source.suite, source.components, options))
    return list(dict.fromkeys(chosen))


def read_host(root: Path = Path("/")) -> Host:
    """This machine's distribution, suite and package sources.

    Raises LabError when it is neither Debian nor Ubuntu, or names no usable source.
    """
    try:
        release = parse_os_release((root / "etc/os-release").read_text())
    except OSError:
        release = {}
    distribution = release.get("ID", "unknown")
    codename = release.get("VERSION_CODENAME", "")
    if distribution not in DISTRIBUTIONS:
        raise LabError(
            f"the lab's nodes copy this machine's distribution, which must be Debian or Ubuntu and is "
            f"{release.get('PRETTY_NAME', distribution)}: run the lab on one of these"
        )
    apt = root / "etc/apt"
    found: list[Source] = []
    if (apt / "sources.list").is_file():
        found += parse_one_line((apt / "sources.list").read_text(errors="replace"))
    parts = apt / "sources.list.d"
    for path in sorted(parts.iterdir()) if parts.is_dir() else []:
        if path.suffix == ".list":
            found += parse_one_line(path.read_text(errors="replace"))
        elif path.suffix == ".sources":
            found += parse_deb822(path.read_text(errors="replace"))
    sources = distribution_sources(found, distribution, codename)
    main = [source for source in sources if not source.suite.endswith(POCKETS[1:])]
    if not main:
        raise LabError(
            f"no package source of {distribution} {codename} in /etc/apt/sources.list or "
            "/etc/apt/sources.list.d: add one, for example 'deb http://MIRROR/debian bookworm main'"
        )
    return Host(
        distribution=distribution,
        suite=main[0].suite,
        architecture=run(["dpkg", "--print-architecture"]).strip(),
        sources=tuple(sources),
        apt_options=tuple(parse_apt_options(run(["apt-config", "dump"]))),
    )


def parse_apt_options(dump: str) -> list[str]:
    """The lines of ``apt-config dump`` that a mirror or proxy of the host may need, as apt.conf lines."""
    lines = []
    for line in dump.splitlines():
        name, _, rest = line.partition(" ")
        if PASSED_OPTIONS.fullmatch(name) and rest not in ('"";', ""):
            lines.append(f"{name} {rest}")
    return lines
