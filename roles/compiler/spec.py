"""What a user may ask of the compiler that builds extensions of torch and DeepSpeed on the nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from inventory.base import Spec
from inventory.cluster import Cluster

Major = Annotated[int, Field(ge=5, le=99)]


class CompilerSpec(Spec):
    """A C++ compiler, ninja and Python's headers, for every login, also a non-interactive one."""

    gcc: Major = 9
    """Least major version of gcc: what the headers of torch ask for."""

    most: Major | None = None
    """Greatest major version; nvcc refuses a gcc that is younger than itself."""

    ninja: bool = True
    """Whether ninja must be there, without which torch builds no extension."""

    python_headers: bool = True
    """Whether the headers of the system's python3 must be there; an environment made by conda has
    its own, a venv has none."""

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """The range holds at least one version."""
        if self.most is not None and self.most < self.gcc:
            yield "most", f"no gcc is at least {self.gcc} and at most {self.most}"

    def accepts(self, major: int) -> bool:
        """Whether a gcc of that major version will do."""
        return self.gcc <= major and (self.most is None or major <= self.most)

    @property
    def wanted(self) -> str:
        """The range in words."""
        if self.most is None:
            return f"gcc {self.gcc} or later"
        return f"gcc {self.gcc}" if self.most == self.gcc else f"gcc {self.gcc} to {self.most}"
