"""What a user may ask of the system packages of a node."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from inventory.base import AbsolutePath, Spec

PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*[a-z0-9+.]")
REPOSITORY_PATH = re.compile(r"/[A-Za-z0-9._/+@-]*")


def _package(text: str) -> str:
    # apt reads a name with a hyphen at its end as "remove this one", so none may end in it.
    if not PACKAGE_NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} is no package name: use lower-case letters, digits, '+', '-' and '.', "
            "without a version"
        )
    return text


def _repository(text: str) -> str:
    if not REPOSITORY_PATH.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot stand in a source list of apt: use letters, digits and ._+@- in the path"
        )
    return text


PackageName = Annotated[str, AfterValidator(_package)]


class PackagesSpec(Spec):
    """Packages that every node has, and where they come from."""

    install: list[PackageName] = Field(default_factory=lambda: ["pdsh", "rsync", "zstd"])
    """Names, without versions. Nothing that is missing here is ever removed."""

    local: Annotated[AbsolutePath, AfterValidator(_repository)] | None = None
    """A directory on the node that holds .deb files and their ``Packages`` index, for nodes without
    internet; it then is the only source. None: the sources that the node already has."""
