"""Brings a folder's files to a node over SFTP, or one file of a node here, whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path, PurePosixPath

from paramiko import SSHException
from pyinfra.api.host import Host

from roles.core import session
from roles.core.steps import Download, UploadFolder, quote

# Lines of LIST: digest and path. A file arrives under its digest.
_PLACE = r"""
cd "$landing"
while read -r sum path; do
  if test -e "$sum"; then printf '%s  %s\n' "$sum" "$sum"; fi
done <list >sums
if test -s sums; then sha256sum -c --quiet sums >&2; fi
mkdir -p "$folder"
chmod 0755 "$folder"
while read -r sum path; do
  if test -e "$sum"; then
    case $path in */*) mkdir -p "$folder/${path%/*}";; esac
    chown 0:0 "$sum"; chmod "$mode" "$sum"
    mv -f "$sum" "$folder/$path"
  fi
done <list
cd "$folder"
find . -type f | awk 'NR == FNR { keep["./" $2]; next } !($0 in keep)' "$landing/list" - |
  while read -r path; do rm -f "$path"; done
rm -rf "$landing"
"""


def landing(node: Host, folder: PurePosixPath) -> str:
    """Shell that has a folder where files arrive; what lies in it stays.

    The login user may be unable to write where root can, so it is his (mode 0700), beside the destination
    and on the same file system. What is above it everyone may enter, whatever root's umask is.
    """
    user = str(node.data.get("ssh_user") or os.getuid())  # the control machine itself has no login
    there = quote(str(folder))
    return (
        f"umask 022\nmkdir -p {quote(str(folder.parent))}\ntest -d {there} || mkdir -m 0700 {there}\n"
        f"chown {quote(user)} {there}"
    )


def upload_folder(node: Host, step: UploadFolder) -> None:
    """Carry out an UploadFolder. Raises NodeFailed; the next run goes on from what arrived until then."""
    folder = PurePosixPath(step.destination)
    arriving = folder.parent / f".{folder.name}.arriving"
    sums = "find . -type f -exec sha256sum {} +"
    there = session.run(
        node,
        f"set -e\n{landing(node, arriving)}\n"
        f'for d in {quote(str(folder))} {quote(str(arriving))}; do if test -d "$d"; then cd "$d"; {sums}; fi; done',
        step.seconds,
    ).stdout
    digests = {
        path.removeprefix("./"): digest
        for digest, _, path in (line.partition("  ") for line in there.splitlines())
    }
    for path, (source, sha256) in step.files.items():
        if sha256 not in (digests.get(path), digests.get(sha256)):
            _put(node, source, arriving / sha256, step.seconds)
    lines = "".join(f"{sha256} {path}\n" for path, (_, sha256) in step.files.items())
    _put(node, io.StringIO(lines), arriving / "list", step.seconds)
    session.run(
        node,
        f"set -e\numask 022\nfolder={quote(str(folder))} landing={quote(str(arriving))} mode={step.mode}{_PLACE}",
        step.seconds,
    )


def download(node: Host, step: Download) -> None:
    """Carry a Download out. Raises NodeFailed; the destination then is what it was.

    Whoever brings the same file at the same time has a part of his own.
    """
    part = step.destination.with_name(f"{step.destination.name}.{node.name}.{os.getpid()}")
    told = session.run(node, f"sha256sum <{quote(step.source)}", step.seconds).stdout
    try:
        step.destination.parent.mkdir(parents=True, exist_ok=True)
        if not node.get_file(step.source, str(part), _sudo=False, _timeout=step.seconds):
            raise session.NodeFailed(f"{step.source} could not be copied to this machine")
        digest = hashlib.sha256()
        with part.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != told.partition(" ")[0]:
            raise session.NodeFailed(f"{step.source} arrived damaged: converge again")
        part.replace(step.destination)
    except (OSError, EOFError, SSHException) as error:
        raise session.NodeFailed(f"copying {step.source} broke off: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _put(node: Host, source: Path | io.StringIO, place: PurePosixPath, seconds: int) -> None:
    """Raises NodeFailed when it does not arrive."""
    name = source.name if isinstance(source, Path) else place.name
    file = str(source) if isinstance(source, Path) else source
    try:
        arrived = node.put_file(file, str(place), _sudo=False, _timeout=seconds)
    except (OSError, EOFError, SSHException) as error:
        raise session.NodeFailed(f"copying {name} broke off: {error}") from None
    if not arrived:
        raise session.NodeFailed(f"{name} could not be copied to {place.parent.parent}")
