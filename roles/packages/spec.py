"""What a user may ask of the system packages of a node, and of the sources that they come from."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, model_validator

from inventory.base import AbsolutePath, ControlPath, Spec, Strict
from roles.packages.bundle import HOME, BadBundle, read
from roles.packages.keys import BadKey, armored
from roles.packages.names import translated

if TYPE_CHECKING:
    from inventory.cluster import Cluster
    from roles.packages.managers import Manager

PACKAGE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9+._-]*[A-Za-z0-9+.])?")
REPOSITORY_PATH = re.compile(r"/[A-Za-z0-9._/+@-]*")
SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
SOURCE_URL = re.compile(r"(https?://|file:/)[A-Za-z0-9._/+~%:$-]+")
SOURCE_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]*")


def _package(text: str) -> str:
    # apt reads a name with a hyphen at its end as "remove this one", so none may end in it.
    if not PACKAGE_NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} is no package name: use letters, digits, '+', '-', '_' and '.', "
            "begin with a letter or digit, do not end with '-' or '_', and give no version"
        )
    return text


def _repository(text: str) -> str:
    if not REPOSITORY_PATH.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot stand in a source list of apt: use letters, digits and ._+@- in the path"
        )
    return text


def _source_name(text: str) -> str:
    if not SOURCE_NAME.fullmatch(text) or text == "local":
        raise ValueError(
            f"{text!r} is no name for a source: use small letters, digits and '-', and not 'local'"
        )
    return text


def _url(text: str) -> str:
    if re.search(r"//[^/]*@", text):
        raise ValueError("the address must not hold a password: put it in the node's own settings")
    if re.match(r"file://[^/]", text):  # apt refuses it, dnf passes the host over
        raise ValueError(
            f"{text!r} names a host, but file: means the node's own disk: write it as file:///PATH"
        )
    if not SOURCE_URL.fullmatch(text):
        raise ValueError(
            f"{text!r} is no address of packages: begin with https://, http:// or file:/"
        )
    return text


def _word(text: str) -> str:
    if not SOURCE_WORD.fullmatch(text):
        raise ValueError(f"{text!r} is no suite or component of a source of apt")
    return text


PackageName = Annotated[str, AfterValidator(_package)]
SourceWord = Annotated[str, AfterValidator(_word)]


class PerFamily(Strict):
    """One package under the name that each family gives it; a family left out gets none.

    debian: Debian and Ubuntu. rpm: RHEL, Rocky, Alma, CentOS, Fedora, openEuler, Kylin, Anolis.
    """

    debian: PackageName | None = None
    rpm: PackageName | None = None

    @model_validator(mode="after")
    def _named(self) -> PerFamily:
        if self.debian is None and self.rpm is None:
            raise ValueError("names no package: give it for debian, for rpm, or for both")
        return self


class Source(Strict):
    """A repository that nodes of one family get, with its key.

    os: apt or rpm. url: address of the repository, as the nodes reach it.
    suites, components: of apt; without suites the repository is flat.
    key: the public key that signs it: a file on the control machine, or the armored text itself. A
    repository on the node's own disk (file:) may go without; any other may not.
    """

    name: Annotated[str, AfterValidator(_source_name)]
    os: Literal["apt", "rpm"]
    url: Annotated[str, AfterValidator(_url)]
    suites: list[SourceWord] = []
    components: list[SourceWord] = []
    key: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Source:
        if self.os == "rpm" and (self.suites or self.components):
            raise ValueError("suites and components are apt's: take them out, or say os: apt")
        if self.components and not self.suites:
            raise ValueError("components need suites, as in 'suites: [bookworm]'")
        for suite in self.suites:  # apt refuses such a line, and then does nothing at all
            if suite.endswith("/") == bool(self.components):
                raise ValueError(
                    f"the suite {suite!r} ends in '/', so it is a folder and has no components"
                    if self.components
                    else f"the suite {suite!r} needs components, as in 'components: [main]'"
                )
        if self.key == "":
            raise ValueError("an empty 'key' names no file: give the public key, or leave it out")
        if self.key is None and not self.url.startswith("file:"):
            raise ValueError("names no key: give the public key that signs it")
        return self

    def key_text(self, cluster: Cluster) -> str | None:
        """The armored key; None where there is none. Raises BadKey or OSError."""
        if self.key is None:
            return None
        if self.key.startswith("-----BEGIN"):
            return armored(self.key.encode())
        return _key_in(cluster.at_hand(self.key))


@functools.cache
def _key_in(path: Path) -> str:
    """Read once, when the cluster file is: a run goes on with that key whatever becomes of the file."""
    return armored(path.read_bytes())


class PackagesSpec(Spec):
    """Packages that every node has, and where they come from."""

    install: list[PackageName | PerFamily] = ["pdsh", "rsync", "zstd"]
    """Names, without versions. One that the other family calls otherwise (python3-dev and
    python3-devel) is translated where ``names.py`` knows it; else give both, as in
    ``{debian: libfoo-dev, rpm: foo-devel}``. Nothing that is missing here is ever removed."""

    local: Annotated[AbsolutePath, AfterValidator(_repository)] | None = None
    """A directory on the node that holds .deb files and their ``Packages`` index, or RPMs and their
    ``repodata``, for nodes without internet; it and ``sources`` then are the only sources. None: the
    sources that the node already has, and ``sources``."""

    bundle: ControlPath | None = None
    """What ``lockstep bundle`` gathered, a folder on the control machine: each node gets the packages for
    its own system from it, as its ``local``."""

    sources: list[Source] = []
    """Further repositories: a mirror, NVIDIA's, one on a shared disk."""

    only: bool = False
    """Install from the declared sources alone, as ``local`` does, on nodes of a family that has some: those
    that the node already has stay, and are not asked, so it does not matter whether they can be reached."""

    unattended: Literal["fence", "leave"] = "fence"
    """Where a node upgrades packages by itself, kernel, driver, CUDA and NCCL are kept out of that."""

    @model_validator(mode="before")
    @classmethod
    def _bundled(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("bundle") is None:
            return values
        if values.get("local") not in (None, HOME):
            raise ValueError("give 'local' or 'bundle', not both: a bundle is each node's 'local'")
        return {**values, "local": HOME}

    def names(self, manager: Manager) -> list[str]:
        """The packages to install where that manager installs, once each, in the order of the file."""
        return list(dict.fromkeys(self._names(manager)))

    def _names(self, manager: Manager) -> Iterator[str]:
        for each in self.install:
            if isinstance(each, str):
                yield from translated(manager, each)
            elif name := each.debian if manager == "apt" else each.rpm:
                yield name

    @model_validator(mode="after")
    def _some(self) -> PackagesSpec:
        if self.only and not (self.local or self.sources):
            raise ValueError("'only' leaves no source at all: declare some under 'sources'")
        return self

    def alone(self, manager: Manager) -> bool:
        """Whether that manager installs from what is declared here, and from nothing that the node has."""
        return bool(self.local or (self.only and self.sources_of(manager)))

    def origin(self, manager: Manager) -> str:
        """From where it installs, in words."""
        return (
            self.local
            or f"the {'declared sources' if self.alone(manager) else 'sources of the node'}"
        )

    def sources_of(self, manager: Manager) -> list[Source]:
        """The declared sources of that family."""
        return [source for source in self.sources if source.os == manager]

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """A bundle or keys that cannot be read, and names that are taken."""
        if self.bundle is not None:
            try:
                read(cluster.at_hand(self.bundle))
            except BadBundle as error:
                yield "bundle", str(error)
        for number, source in enumerate(self.sources):
            if any(
                (source.name, source.os) == (other.name, other.os)
                for other in self.sources[:number]
            ):
                yield f"sources[{number}].name", f"{source.name!r} names two sources of {source.os}"
            try:
                source.key_text(cluster)
            except (BadKey, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                shown = "the key" if (source.key or "").startswith("-----") else source.key
                yield f"sources[{number}].key", f"{shown}: {reason}; give a PGP public key"
