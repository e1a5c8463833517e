"""The texts that name the declared sources to apt, and to dnf or yum; and their keys."""

from __future__ import annotations

import hashlib

from inventory.cluster import Cluster
from roles.packages.managers import KEYS, REPOSITORY, Manager
from roles.packages.spec import PackagesSpec, Source

HEAD = "# Written by Lockstep; changes are lost.\n"


def source_text(spec: PackagesSpec, manager: Manager) -> str | None:
    """The one file that holds the local repository and the declared sources; None where there is none.

    The local repository is the user's own, hence trusted. Its metadata are read anew each time, and dnf
    is not to hide what a module of the distribution would (``module_hotfixes``; yum passes it over).
    """
    declared = spec.sources_of(manager)
    if not spec.local and not declared:
        return None
    if manager == "apt":
        lines = [f"deb [trusted=yes] file:{spec.local} ./"] if spec.local else []
        return HEAD + "".join(f"{line}\n" for line in [*lines, *map(apt_line, declared)])
    parts = []
    if spec.local:
        parts.append(
            f"[{REPOSITORY}]\nname=Lockstep: local packages\nbaseurl=file://{spec.local}\nenabled=1\n"
            "gpgcheck=0\nrepo_gpgcheck=0\nmetadata_expire=1\nmodule_hotfixes=1\n"
        )
    return HEAD + "\n".join([*parts, *map(rpm_section, declared)])


def apt_line(source: Source, keys: str = KEYS["apt"]) -> str:
    """A declared source for apt, without a newline at its end. keys: the folder with its key."""
    options = f"signed-by={keys}/{key_name(source)}" if source.key else "trusted=yes"
    where = " ".join([*source.suites, *source.components]) or "./"
    # One line for all suites would need deb822, which apt of release 18.04 reads with newer options only.
    if len(source.suites) < 2:
        return f"deb [{options}] {source.url} {where}"
    parts = " ".join(source.components)
    return "\n".join(f"deb [{options}] {source.url} {suite} {parts}" for suite in source.suites)


def rpm_section(source: Source, keys: str = KEYS["rpm"]) -> str:
    """A declared source for dnf and yum. keys: the folder with its key."""
    key = f"gpgcheck=1\ngpgkey=file://{keys}/{key_name(source)}" if source.key else "gpgcheck=0"
    return (
        f"[lockstep-{source.name}]\nname=Lockstep: {source.name}\nbaseurl={source.url}\nenabled=1\n"
        f"{key}\nrepo_gpgcheck=0\n"
    )


def key_name(source: Source) -> str:
    """The file name of a source's key."""
    return f"lockstep-{source.name}.asc"


def key_texts(spec: PackagesSpec, manager: Manager, cluster: Cluster) -> dict[str, str]:
    """File name to armored key, for the declared sources of that family."""
    found = ((key_name(each), each.key_text(cluster)) for each in spec.sources_of(manager))
    return {name: text for name, text in found if text is not None}


def digest(text: str) -> str:
    """SHA-256 of a file with this text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
