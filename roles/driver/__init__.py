"""driver: the declared NVIDIA driver, built by dkms for this boot and the next, and loaded."""

from roles.core.role import Fact, Role
from roles.driver.converge import converge, installs, proof
from roles.driver.drift import drift
from roles.driver.probe import DriverState, parse, probe
from roles.driver.spec import DriverSpec

__all__ = ["DriverSpec", "DriverState", "role"]


def _version(state: DriverState | None) -> str | None:
    """What is loaded; on a node that loads nothing, what its kernels have."""
    if state is None:
        return None
    on_disk = ", ".join(sorted({module.version for module in state.modules.values()}))
    return state.loaded or on_disk or None


role: Role[DriverSpec, DriverState | None] = Role(
    name="driver",
    spec=DriverSpec,
    default=None,
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    installs=installs,
    proof=proof,
    needs=("packages",),
    seconds=30,
    facts=(
        Fact("NVIDIA driver", "equal per class", _version),
        Fact(
            "driver modules",
            "equal per class",
            lambda state: state.loaded_flavour if state else None,
        ),
        Fact("driver libraries", "equal per class", lambda state: state.library if state else None),
    ),
)
