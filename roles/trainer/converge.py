"""Installs the trainer's wheel into the environments that lack exactly it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, settled
from roles.environment.converge import LOGIN, alone
from roles.environment.parcel import deliver, intact, place_of
from roles.environment.spec import Declared
from roles.trainer.drift import difference
from roles.trainer.package import package
from roles.trainer.probe import Seen, TrainerState, declared, wheel_parcel
from roles.trainer.spec import TrainerSpec

INSTALL_SECONDS = 300


@cache
def _script() -> str:
    return Path(__file__).with_name("install.py").read_text()


def converge(
    target: Target[TrainerSpec], state: TrainerState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The wheel once, then one step an environment."""
    own = package()
    wrong = [
        one
        for one in declared(target)
        if difference(one, state.environments.get(one.name, Seen()), own) in findings
    ]
    if not wrong:
        return
    parcel = wheel_parcel()
    yield from deliver(parcel, target, state.parcels, peers)
    path = place_of(parcel, target, state.parcels, peers)
    check = intact(parcel.sha256, quote(path))
    for one in wrong:
        yield Shell(alone(check + install(one, path), INSTALL_SECONDS // 2), INSTALL_SECONDS)


def install(one: Declared, wheel: str) -> str:
    """Shell: unpack the wheel into the environment's site-packages."""
    on_disk = settled('"$s"')
    return (
        f"umask 022\nP={quote(one.prefix)}\n"
        'for s in "$P"/lib/python3*/site-packages; do\n'
        '  if [ -d "$s" ] && ! [ -L "${s%/site-packages}" ]; then\n'
        f'    "$P/bin/python" -I - {quote(wheel)} "$s" <<\'LOCKSTEP_SCRIPT\'\n{_script()}LOCKSTEP_SCRIPT\n'
        f"    {on_disk}\n"
        "  fi\ndone\n"
    )


def proof(target: Target[TrainerSpec]) -> str:
    """Shell: its configuration imports in every environment, which needs no torch."""
    calls = "".join(f"prove {quote(one.prefix)}\n" for one in declared(target))
    return (
        "cd /\nprove() {\n"
        f'  said=$({LOGIN} "$1/bin/python" -c "import trainer.reader" 2>&1 >/dev/null) || printf '
        "'trainer-import\\timport trainer.reader in %s fails: %s\\n' \"$1\" "
        '"$(printf \'%s\' "$said" | tail -n 1)"\n'
        f"}}\n{calls}:\n"
    )
