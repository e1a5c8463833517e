"""What a user may ask of services that no other role sees to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from inventory.base import Spec
from inventory.cluster import Cluster
from roles.time.probe import OTHER_UNITS
from roles.time.spec import TimeSpec

UNIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.@-]{0,200}")
KINDS = (".service", ".socket", ".timer")
OTHER_KINDS = (
    *(".mount", ".automount", ".target", ".path", ".slice"),
    *(".scope", ".swap", ".device"),
)
OWN = re.compile(r"lockstep-.*|autostart-lockstep")


def _unit(text: str) -> str:
    """The unit's name in full."""
    if not UNIT.fullmatch(text):
        raise ValueError(f"{text!r} is no name of a service: write it as systemctl shows it")
    if text.endswith(OTHER_KINDS):
        raise ValueError(f"{text} cannot be named here: only services, sockets and timers")
    name = text if text.endswith(KINDS) else f"{text}.service"
    if name.rpartition(".")[0].endswith("@"):
        raise ValueError(f"{text} is a template: say which instance, as getty@tty1")
    if OWN.fullmatch(name.removesuffix(".service")):
        raise ValueError(
            f"{text} is Lockstep's own, and started by what it belongs to: leave it out"
        )
    return name


class ServicesSpec(Spec):
    """Services that run now and after each boot, such as docker; their packages are named under ``packages``."""

    running: Annotated[tuple[Annotated[str, AfterValidator(_unit)], ...], Field(min_length=1)]

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """A service that is named twice, or that the time role ends."""
        time = cluster.section("time", TimeSpec)
        for number, name in enumerate(self.running):
            if name in self.running[:number]:
                yield f"running[{number}]", f"{name} is named twice: leave one out"
            if name in OTHER_UNITS and time is not None and time.manage == "managed":
                sentence = "keeps the clock beside chrony, so the time role ends it: leave it out"
                yield f"running[{number}]", f"{name} {sentence}"
