"""Which distributions of an environment are not as its archive has them, and whether they are in place yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from packaging.version import InvalidVersion, Version

from roles.core.steps import quote
from roles.environment.archive import Archive
from roles.environment.metadata import family, required_of
from roles.environment.spec import Declared, normal_name, of_metadata


def meets(version: str, pin: str) -> bool:
    """Whether an installed version is the pinned one: 3.20 is 3.20.0, and 2.6.0+cpu meets 2.6.0.

    A pin with a local part is met by that one alone.
    """
    version, pin = version.replace("_", "+", 1), pin.strip()
    try:
        have, want = Version(version), Version(pin)
    except InvalidVersion:
        return version == pin
    return have == want or (want.local is None and Version(have.public) == want)


def pinned(one: Declared, archive: Archive | None) -> dict[str, str]:
    """Distribution to its version: the declared pins, and what the archive has lost and still requires."""
    declared = {normal_name(name) for name in one.spec.pins}
    lost = map(of_metadata, archive.overwritten if archive else ())
    again = {name: version.replace("_", "+", 1) for name, version in lost if name not in declared}
    return {**one.spec.pins, **again}


def installable(one: Declared, archive: Archive | None) -> dict[str, str]:
    """Distribution to its version: the pinned ones, and what an installation of them makes necessary again."""
    versions = pinned(one, archive)
    own = dict(map(of_metadata, archive.distributions if archive else ()))
    present = [normal_name(name) for name in versions]
    after = [follower(name, {*own, *present}, archive) for name in present]
    again = {name: own[name].replace("_", "+", 1) for name in after if name and name not in present}
    return {**versions, **again}


def follower(name: str, names: Iterable[str], archive: Archive | None) -> str | None:
    """Of these, the one that must be installed after that one, which writes files of the same names. All are
    normal names."""
    members = {each for each in names if family(each) == family(name)}
    needed = required_of(members, archive.requires) if archive and len(members) > 1 else set()
    return needed.pop() if len(needed) == 1 and name not in needed else None


def replaced(one: Declared, archive: Archive | None) -> list[str]:
    """Normal names of the distributions that are not the archive's: pinned or editable."""
    return sorted(map(normal_name, [*pinned(one, archive), *one.spec.editable]))


def incomplete(one: Declared, archive: Archive | None) -> str:
    """Shell's condition: what replaces some of the archive's distributions is still to be installed at $P.

    Empty where nothing does. Until then it need not work: an import may fail on the very version that a pin replaces.
    """
    return " || ".join(_signs(one, archive)) if archive else ""


def _signs(one: Declared, archive: Archive) -> Iterator[str]:
    site = f'"$P"/lib/python{archive.python}/site-packages'
    for name, version in pinned(one, archive).items():
        own = list(_own(archive, normal_name(name)))
        for folder in own:
            if not meets(of_metadata(folder)[1], version):
                yield f"[ -e {site}/{quote(folder)} ]"
        if not own:
            pattern = quote(f"{spellings(normal_name(name))}-[0-9]*-info")
            yield f'[ -z "$(find {site} -maxdepth 1 -iname {pattern} 2>/dev/null)" ]'
    for name in one.spec.editable:
        yield f'! [ -e "$P"/.lockstep-src/.{normal_name(name)}.json ]'


def _own(archive: Archive, name: str) -> Iterable[str]:
    """The metadata folders of that name that are unpacked."""
    return (
        folder
        for folder in archive.distributions
        if of_metadata(folder)[0] == name and folder not in archive.strays
    )


def spellings(name: str) -> str:
    """For ``find``: a normal name however it is spelt."""
    return name.replace("-", "[-_.]")
