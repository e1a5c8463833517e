"""What in an environment of a node still names a place where it was: the question, and the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping

from roles.core.role import Unreadable
from roles.core.steps import quote
from roles.environment.converge import LOGIN, here_script
from roles.environment.spec import Declared


def question(one: Declared) -> str:
    """Shell that lists it; it prints nothing where there is no environment."""
    prefix = quote(one.prefix)
    return (
        f"if [ -x {prefix}/bin/python ]; then\n"
        f"{LOGIN} {prefix}/bin/python -I -S - {prefix} {prefix} leftovers {here_script('mend.py')}fi\n"
    )


def read(text: str) -> Mapping[str, str]:
    """Path below the prefix to why it stays. Raises Unreadable."""
    try:
        return {str(path): str(why) for path, why in json.loads(text)}
    except (ValueError, TypeError):
        raise Unreadable("the answer is no list of files") from None
