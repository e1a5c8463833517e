"""How a login without activation finds an environment's commands: by their names in /usr/local/bin.

They are links, but for ``python``: a venv's, started through a link from elsewhere, would not find its
pyvenv.cfg and take itself for the system's. So that name is a script that starts it.
"""

from __future__ import annotations

from roles.core.steps import quote
from roles.environment.prove import MADE, STAMP
from roles.environment.spec import HOME_OF_ENVIRONMENTS, Declared

BIN_ON_PATH = "/usr/local/bin"
SYSTEM_PYTHON = "/usr/bin/python"
"""Where a system has a ``python``; Debian 12, Ubuntu 22.04 and RHEL 9 come with ``python3`` alone."""


def look(one: Declared) -> str:
    """Shell that prints ``link NAME STATE`` for each: ok, absent, foreign, or where one of ours leads instead.

    Nothing is printed of a ``python`` that need not be ours. The prefix is $P.
    """
    return _each(one, 'printf \'link %s %s\\n\' "$c" "$k"')


def write(one: Declared) -> str:
    """Shell that writes those that are missing or lead elsewhere; what others put there is left alone."""
    return f"P={quote(one.prefix)}\nmkdir -p {BIN_ON_PATH}\n" + _each(
        one,
        "case $c,$k in *,ok|*,foreign) continue;;\n"
        f"  python,*) printf '%s\\n' {quote(script(one))} >\"$l.lockstep-new\"\n"
        '    chmod 755 "$l.lockstep-new";;\n'
        '  *) ln -sfn "$P/bin/$c" "$l.lockstep-new";; esac\n'
        '  mv -fT "$l.lockstep-new" "$l"',
    )


def script(one: Declared) -> str:
    """What starts the environment's python."""
    return f'#!/bin/sh\n{MADE}\nexec {quote(f"{one.prefix}/bin/python")} "$@"'


def _each(one: Declared, action: str) -> str:
    """Shell that runs the action for each name $c, which lies at $l, with its state as $k."""
    words = " ".join(quote(name) for name in one.linked if name != "python")
    if one.on_path:
        words += "".join(f' $([ ! -f "$P/bin/{name}" ] || echo {name})' for name in one.optional)
    words += " python" if one.python else ""
    theirs = (
        "  case $c,$k in python,foreign) continue;;\n"
        f"    python,absent) if [ -e {SYSTEM_PYTHON} ]; then continue; fi;; esac\n"
        if one.python == "else"
        else ""
    )
    return (
        f"for c in {words}; do l={BIN_ON_PATH}/$c\n"
        '  if ! [ -e "$l" ] && ! [ -L "$l" ]; then k=absent\n'
        '  elif [ -L "$l" ]; then\n'
        '    if [ $c != python ] && [ "$l" -ef "$P/bin/$c" ]; then k=ok\n'
        '    else k=$(readlink "$l")\n'
        f'      case $k in "$P"/*|{HOME_OF_ENVIRONMENTS}/*) ;; *)\n'
        f'        [ -e "${{k%/bin/$c}}/{STAMP}" ] || k=foreign;; esac\n'
        "    fi\n"
        # By the shell's own means: a program that fails would make ours another's, which nobody mends.
        '  elif [ $c = python ] && [ -f "$l" ] && { read -r made && read -r made; } <"$l" \\\n'
        f'    && [ "$made" = {quote(MADE)} ]; then\n'
        f'    if ! [ -x "$l" ]; then k=nothing; elif [ "$(cat "$l")" = {quote(script(one))} ]; then k=ok\n'
        '    else k=$(sed -n \'s/^exec \\(.*\\) "$@"$/\\1/p\' "$l"); k=${k:-nothing}; fi\n'
        "  else k=foreign; fi\n"
        f"{theirs}  {action}\ndone\n"
    )
