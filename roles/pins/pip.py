"""pip in an environment of a node: one installation of exactly what is named, nothing resolved."""

from __future__ import annotations

from collections.abc import Sequence

from roles.core.steps import quote, settled
from roles.environment.converge import ASIDE, LOGIN
from roles.environment.prove import PROOF, STAMP
from roles.pins.prove import CHECKED

INSTALL_SECONDS = 900


def install(
    prefix: str, pip: str, commands: Sequence[str], before: str = "", after: str = ""
) -> str:
    """Shell that runs ``pip install --no-deps`` offline, once or one after the other; the node's own settings of pip do not count.

    Meanwhile the environment has no stamp: names of metadata folders do not show that pip was cut
    off, so a whole one is then unpacked. A pip that gives up by itself has put back what was there, but
    not what the one before it brought.
    The proof and the check of requirements go with the versions on which they stood.

    pip: the wheel that it runs from. commands: arguments of each, words of the shell. before, after: shell around it, the
    latter where it succeeded.
    """
    on_disk = settled('"$P"')
    begin = (
        f"{LOGIN} PIP_CONFIG_FILE=/dev/null PIP_ROOT_USER_ACTION=ignore {quote(prefix)}/bin/python {quote(pip)}/pip "
        "--disable-pip-version-check --no-input --no-cache-dir install --quiet --no-deps"
    )
    all_of_them = " && ".join(f"{begin} {arguments}" for arguments in commands)
    stale = f'rm -f "$P"/{PROOF} "$P"/{CHECKED}\n'
    whenever, done = (stale, "") if len(commands) > 1 else ("", stale)
    return (
        f'umask 022\ncd /\nP={quote(prefix)}\nmv -f "$P"/{STAMP} "$P"/{ASIDE}\nsync "$P"\n'
        f"{before}c=0\n{all_of_them} || c=$?\n"
        f'{whenever}if [ "$c" = 0 ]; then :\n{done}{after}fi\n'
        f'if [ "$c" -lt 128 ]; then {on_disk}; mv -f "$P"/{ASIDE} "$P"/{STAMP}; fi\nexit "$c"\n'
    )
