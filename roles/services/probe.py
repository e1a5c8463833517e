"""What systemd says of the declared services."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.services.spec import ServicesSpec

FILE = "UnitFileState"
"""Of an init script it is "bad" or "generated", whether it is enabled or not; ``systemctl is-enabled`` knows."""
PROPERTIES = ("LoadState", FILE, "ActiveState", "SubState", "Result", "Type")


@dataclass(frozen=True)
class Unit:
    """One unit, in systemd's words; see org.freedesktop.systemd1(5).

    load: loaded, not-found, masked, bad-setting, error. file: whether a boot starts it, as ``systemctl
    is-enabled`` says: enabled, disabled, static, …; empty where there is none. active, sub: such as active,
    running. result: success, or how it ended. kind: simple, oneshot, …; empty of what is no service.
    """

    load: str
    file: str
    active: str
    sub: str
    result: str
    kind: str


@dataclass(frozen=True)
class ServicesState:
    """The declared units by name."""

    units: Mapping[str, Unit]

    def unit(self, name: str) -> Unit:
        """Raises Unreadable."""
        if name not in self.units:
            raise Unreadable(f"systemd does not say what {name} does")
        return self.units[name]


def probe(target: Target[ServicesSpec]) -> str:
    """For each unit its name, and lines of a property and its value; ``end`` is the last."""
    shown = " ".join(f"-p {name}" for name in PROPERTIES if name != FILE)
    names = " ".join(map(quote, target.spec.running))
    return (
        f"for unit in {names}; do\n  echo unit=$unit\n  systemctl show {shown} $unit || exit 3\n"
        f"  printf '{FILE}=%s\\n' \"$(systemctl is-enabled $unit 2>/dev/null | tail -n 1)\"\ndone\necho end"
    )


@whole
def parse(text: str) -> ServicesState:
    """The state that ``probe`` printed."""
    units: dict[str, dict[str, str]] = {}
    block: dict[str, str] = {}
    for line in text.split("\n"):
        name, equal, value = line.partition("=")
        if name == "unit" and value not in units:
            block = units[value] = {}
        elif equal and name in PROPERTIES and units and name not in block:
            block[name] = value
        elif line:
            raise Unreadable(f"unexpected line {line!r}")
    if not units:
        raise Unreadable("systemd says nothing of the services")
    for unit, each in units.items():
        if not each.get("LoadState") or not each.get("ActiveState"):
            raise Unreadable(f"systemd does not say what {unit} does")
    return ServicesState(
        {unit: Unit(*(each.get(name, "") for name in PROPERTIES)) for unit, each in units.items()}
    )
