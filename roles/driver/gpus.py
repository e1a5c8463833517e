"""Which driver a GPU can use, by its PCI device id; and which driver a CUDA version needs.

Ids grow with the generations, but for a few late ones. Sources: NVIDIA's driver installation guide (open modules from Turing
on, Blackwell with open ones alone; Maxwell, Pascal and Volta end with branch 580, Kepler with 470),
and its table of minor version compatibility for CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass

from roles.driver.spec import Flavour, branch


@dataclass(frozen=True)
class Generation:
    """first, last: branches that drive it; last None means that no end is known."""

    name: str
    first: int
    last: int | None
    flavours: frozenset[Flavour]


_BOTH: frozenset[Flavour] = frozenset(("open", "proprietary"))
_CLOSED: frozenset[Flavour] = frozenset(("proprietary",))
_OPEN: frozenset[Flavour] = frozenset(("open",))

_FROM_ID: tuple[tuple[int, Generation], ...] = (
    (0x2900, Generation("Blackwell", 570, None, _OPEN)),
    (0x2600, Generation("Ada", 520, None, _BOTH)),
    (0x2400, Generation("Ampere", 450, None, _BOTH)),
    (0x2300, Generation("Hopper", 515, None, _BOTH)),
    (0x2200, Generation("Ampere", 450, None, _BOTH)),
    (0x2180, Generation("Turing", 410, None, _BOTH)),
    (0x2080, Generation("Ampere", 450, None, _BOTH)),
    (0x1E00, Generation("Turing", 410, None, _BOTH)),
    (0x1D81, Generation("Volta", 384, 580, _CLOSED)),
    (0x15F0, Generation("Pascal", 367, 580, _CLOSED)),
    (0x1340, Generation("Maxwell", 340, 580, _CLOSED)),
    (0x0FC0, Generation("Kepler", 304, 470, _CLOSED)),
)

_DRIVER_FOR_CUDA = ((13, "580.65.06"), (12, "525.60.13"), (11, "450.80.02"))


def generation(device: int) -> Generation | None:
    """The generation of a PCI device id; None where it is older than any that CUDA 11 knows."""
    return next((each for first, each in _FROM_ID if device >= first), None)


def unfit(device: int, version: str, flavour: Flavour | None) -> str | None:
    """Why that driver cannot drive the device, in words; None when it can or nothing is known."""
    found = generation(device)
    if found is None:
        return None
    if branch(version) < found.first:
        return f"a {found.name} GPU needs driver {found.first} or newer"
    if found.last is not None and branch(version) > found.last:
        return f"driver {found.last} is the last branch for a {found.name} GPU"
    if flavour is not None and flavour not in found.flavours:
        return f"a {found.name} GPU works with {' or '.join(sorted(found.flavours))} modules only"
    return None


def driver_for_cuda(cuda: str) -> str | None:
    """The oldest driver for programs built with that CUDA version; None when nothing is known.

    From CUDA 11 on, every minor version runs on the driver of its major version.
    """
    major = int(cuda.split(".")[0])
    return next((driver for known, driver in _DRIVER_FOR_CUDA if major == known), None)
