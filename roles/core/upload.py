"""Brings a folder's files to a node over SFTP, or one file of a node here, whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

import gevent
from paramiko import SSHException
from pyinfra.api.host import Host

from roles.core import relay, session
from roles.core.progress import MB, Progress
from roles.core.steps import Download, UploadFolder, owned, quote

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
    @owned@
    chmod "$mode" "$sum"
    mv -f "$sum" "$folder/$path"
  fi
done <list
cd "$folder"
find . -type f | awk 'NR == FNR { keep["./" $2]; next } !($0 in keep)' "$landing/list" - |
  while read -r path; do rm -f "$path"; done
rm -rf "$landing"
""".replace("@owned@", owned('"$sum"'))


def landing(node: Host, folder: PurePosixPath) -> str:
    """Shell that has a folder where files arrive; what lies in it stays.

    The login user may be unable to write where root can, so it is his (mode 0700), beside the destination
    and on the same file system. What is above it everyone may enter, whatever root's umask is.
    """
    user = str(node.data.get("ssh_user") or os.getuid())  # the control machine itself has no login
    there = quote(str(folder))
    given = owned(there)
    if user not in ("root", "0"):
        sentence = (
            f"{folder} cannot be given to {user}, who sends files there: where the server of that storage takes root "
            "for another user, log in as root, or export it with no_root_squash"
        )
        given = f"chown {quote(user)} {there} || {{ echo {quote(sentence)} >&2; exit 1; }}"
    return (
        f"umask 022\nmkdir -p {quote(str(folder.parent))}\ntest -d {there} || mkdir -m 0700 {there}\n"
        f"{given}"
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

    The file grows beside it under the name of its content, and whoever brings the same waits meanwhile.
    """
    source = quote(step.source)
    told = session.run(node, f"stat -L -c %s {source}\nsha256sum <{source}", step.seconds).stdout
    size, sha256, *_ = told.split()
    place = step.destination
    part = place.with_name(f".{place.name}.{sha256}.arriving")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for other in place.parent.glob(f".{glob.escape(place.name)}.*.arriving"):
            if other != part:
                with suppress(BlockingIOError), _held(other, wait=False):
                    other.unlink(missing_ok=True)
        with _held(part, wait=True) as file:
            _bring(node, step, file, int(size))
            if _digest(file) != sha256:
                part.unlink()
                raise session.NodeFailed(f"{step.source} arrived damaged: converge again")
            part.replace(place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            part.unlink(missing_ok=True)  # it would keep the disk full
        raise session.NodeFailed(
            f"{step.source} cannot be copied to {place} on this machine: {error.strerror or error}"
        ) from None


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _bring(node: Host, step: Download, file: IO[bytes], size: int) -> None:
    """Have the rest of the file arrive."""
    at = file.seek(0, os.SEEK_END)
    free = shutil.disk_usage(step.destination.parent).free
    if free < size - at:
        raise session.NodeFailed(
            f"no room for {step.source} on this machine: {step.destination.parent} has {free // MB} MB free, "
            f"{(size - at) // MB} are needed"
        )
    told = Progress(step.destination.name, size)
    rest = session.stream(node, f"tail -c +{at + 1} <{quote(step.source)}", relay.SECONDS)
    try:
        for chunk in rest:
            file.write(chunk)
            at += len(chunk)
            told.note(node, at)
    except session.NodeFailed as error:
        raise session.NodeFailed(
            f"copying {step.source} broke off: {error}; converging again goes on from there"
        ) from None


@contextmanager
def _held(part: Path, wait: bool) -> Iterator[IO[bytes]]:
    """The file where it grows, while nobody else has it. Raises BlockingIOError where that is not to be awaited."""
    while True:
        with part.open("a+b") as file:
            try:
                # One that waits would stop all greenlets.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                gevent.sleep(0.2)
                continue
            if part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno())):
                yield file
                return


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
