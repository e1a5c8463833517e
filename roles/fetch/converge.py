"""Fetches models and data, brings them to the storage beside their place, and puts them there whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from inventory.cluster import Cluster
from inventory.settings import state_directory
from roles.core.role import Finding, Peers, Target
from roles.core.steps import Download, Here, Shell, Step, Upload, quote, settled
from roles.environment.converge import here_script
from roles.fetch.drift import RUN, pairs, refreshed
from roles.fetch.hub import MANIFEST, Asked
from roles.fetch.probe import FILES, FetchState, Seen
from roles.fetch.spec import COMMIT, HUB, Declared, FetchSpec, environment_of

HERE = Path(__file__).parent
SECONDS = 48 * 3600
"""Time limit of what reads or moves a whole model or data set."""


def converge(
    target: Target[FetchSpec], state: FetchState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """For each one: what is right there is noted, the rest is fetched beside it, and both take its place."""
    for one, finding in list(pairs(target, state)):
        if finding not in findings or not finding.repairable:
            continue
        seen = state.fetched.get(one.name, Seen("absent"))
        commit = pinned(one, {} if refreshed(target, one, seen) else seen.values)
        yield Shell(survey(one), SECONDS)
        if one.spec.on == "head":
            yield from _by_head(target, one, commit)
        else:
            yield from _by_this_machine(target, one, commit)
        yield Shell(arrive(one), SECONDS)
        if one.spec.on == "control":
            yield Here(("rm", "-rf", str(workshop(target.cluster, one))))


def pinned(one: Declared, stamp: Mapping[str, Any]) -> str | None:
    """The commit that is declared, or that the stamp has of the same revision; None where the hub is to say it."""
    if COMMIT.fullmatch(one.spec.revision):
        return one.spec.revision
    same = stamp.get("source") == one.source and stamp.get("revision") == one.spec.revision
    commit = stamp.get("commit")
    return commit if same and one.spec.directory is None and isinstance(commit, str) else None


def workshop(cluster: Cluster, one: Declared) -> Path:
    """Where it grows on the control machine."""
    return state_directory() / "fetched" / cluster.name / one.name


def asked(cluster: Cluster, one: Declared, folder: str, commit: str | None) -> Asked:
    """What ``hub.py`` is asked for, wherever it runs."""
    spec = one.spec
    token = spec.token.model_dump(exclude_none=True) if spec.token else None
    if token and "file" in token and spec.on == "control":
        token["file"] = str(cluster.at_hand(token["file"]))
    return Asked(
        name=one.name,
        folder=folder,
        source=one.source,
        run=RUN,
        kind="model" if spec.model else "dataset",
        repository=spec.model or spec.dataset or "",
        directory=str(cluster.at_hand(spec.directory)) if spec.directory else "",
        revision="" if spec.directory else spec.revision,
        commit=commit,
        include=spec.include,
        exclude=spec.exclude,
        endpoint=spec.endpoint or HUB,
        proxy=spec.proxy,
        token=token,
    )


def program(one: Asked) -> tuple[str, ...]:
    """The command that fetches on this machine; a token is not in it."""
    return sys.executable, "-I", str(HERE / "hub.py"), json.dumps(asdict(one))


OTHERS = f"""
# others: paths here that no line of the manifest names.
others() {{
  {{ cut -f 4 {MANIFEST} | sed 's/^/=/'; find . ! -type d ! -path './.lockstep-*' ! -name '.nfs*' | cut -c 3-; }} |
  awk '/^=/ {{ keep[substr($0, 2)] = 1; next }} !($0 in keep)'
}}
"""

ALONE = f"""
if test -f "$t"/{MANIFEST}; then
  f=$(cd "$t" && others | head -n 1)
  if test -n "$f"; then
    echo "$t/$f was not fetched there and would be lost: move it away, and converge again" >&2; exit 1; fi
fi
"""
"""The whole takes the place of what is there, which must hold nobody else's files."""


def survey(one: Declared) -> str:
    """Shell: the folder where it grows, with the lines of the manifest whose files are right (``before``).

    For what is sent there, also the hashes of files that an earlier run brought (``arrived``), and the KiB that
    it may take (``room``).
    """
    sent = (
        'cd "$a"/files\n'
        "free=$(df -Pk . | awk 'NR == 2 { print $4 }') there=$(du -sk . | cut -f 1)\n"
        "echo $((free + there)) >../room\n"
        "find . -path ./.cache -prune -o -type f ! -name '.lockstep-*' ! -path '*.arriving/*' "
        "-exec sha256sum {} + >../arrived\n"
    )
    return (
        f"umask 022\n{FILES}{OTHERS}\nt={quote(one.path)} a={quote(one.arriving)}\n"
        'mkdir -p "$a"/files\n: >"$a"/before\n'
        'if ! test -e "$t" && test -d "$a"/old; then mv -T "$a"/old "$t"; fi\n'
        f"{ALONE}"
        f'if test -f "$t"/{MANIFEST}; then (cd "$t" && files 100000000 right) >"$a"/before; fi\n'
        f"{sent if one.spec.on == 'control' else ''}"
    )


def _by_head(target: Target[FetchSpec], one: Declared, commit: str | None) -> Iterator[Step]:
    environment = environment_of(target.cluster, one)
    assert environment is not None  # the spec's check
    request = asked(target.cluster, one, one.arriving, commit)
    request = replace(request, before=f"{one.arriving}/before")
    python = quote(f"{environment.prefix}/bin/python")
    yield Shell(
        f"cd /\n{python} -I - {quote(json.dumps(asdict(request)))} {here_script('hub.py', HERE)}",
        SECONDS,
        show=True,
    )


def _by_this_machine(
    target: Target[FetchSpec], one: Declared, commit: str | None
) -> Iterator[Step]:
    """Fetched here; large files travel one by one, so that each is continued, and the others together."""
    folder = workshop(target.cluster, one)
    for name in ("before", "arrived", "room"):
        yield Download(f"{one.arriving}/{name}", folder / name)
    request = asked(target.cluster, one, str(folder), commit)
    room = int((folder / "room").read_text()) * 1024
    yield Here(program(replace(request, before=str(folder / "before"), room=room, pack=True)))
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    arrived = set((folder / "arrived").read_text(encoding="utf-8").splitlines())
    for path, source, sha256 in plan["large"]:
        if f"{sha256}  ./{path}" not in arrived:
            place = f"{one.arriving}/files/{path}"
            yield Shell(f"umask 022; mkdir -p {quote(str(Path(place).parent))}")
            yield Upload(Path(source), place, sha256, seconds=SECONDS)
    small = f"{one.arriving}/small.tar"
    yield Upload(folder / "small.tar", small, plan["small"], seconds=SECONDS)
    yield Shell(
        f"umask 022; cd {quote(one.arriving)}/files; tar -xf ../small.tar --no-same-owner", SECONDS
    )


def arrive(one: Declared) -> str:
    """Shell: what was right before joins what came, all is there by its size, and the whole takes its place."""
    return (
        f"umask 022\n{FILES}{OTHERS}\nt={quote(one.path)} a={quote(one.arriving)}\n"
        f'{ALONE}cd "$a"/files\n'
        "chmod -R u=rwX,go=rX .\n"
        # What an earlier attempt at another revision left.
        'others | while IFS= read -r f; do rm -f "./$f"; done\n'
        "find . -depth -type d -exec rmdir {} + 2>/dev/null || :\n"
        f"cut -f 4 {MANIFEST} | while IFS= read -r f; do\n"
        '  if ! test -f "./$f" && test -f "$t/$f"; then\n'
        '    case $f in */*) mkdir -p "./${f%/*}";; esac\n'
        '    ln "$t/$f" "./$f" 2>/dev/null || cp -p "$t/$f" "./$f"; fi\ndone\n'
        "lacking=$(files 100000000 wrong | head -n 1)\n"
        'if test -n "$lacking"; then echo "$lacking did not arrive whole: converge again" >&2; exit 1; fi\n'
        "cd ..\n"
        f'{settled(".")}\nrm -rf old; mkdir -p "${{t%/*}}"\n'
        'if test -e "$t"; then mv -T "$t" old; fi\nmv -T files "$t"\ncd /; rm -rf "$a"\n'
    )
