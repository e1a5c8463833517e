"""Brings one file of the control machine to a node over SFTP, or one of a node here, whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePosixPath

from paramiko import SSHException
from pyinfra.api.host import Host

from roles.core import session
from roles.core.steps import Download, Upload, quote


def upload(node: Host, step: Upload) -> None:
    """Carry out an Upload. Raises NodeFailed; the destination then is what it was.

    The login user may be unable to write where root can, so the file arrives in a folder of the
    login user (mode 0700) beside the destination, on the same file system.
    """
    destination = PurePosixPath(step.destination)
    landing = destination.parent / f".{destination.name}.arriving"
    part = landing / "part"
    user = str(node.data.get("ssh_user") or os.getuid())  # the control machine itself has no login
    session.run(
        node,
        f"set -e\nmkdir -p {quote(str(destination.parent))}\nrm -rf {quote(str(landing))}\n"
        f"mkdir -m 0700 {quote(str(landing))}\nchown {quote(user)} {quote(str(landing))}",
        60,
    )
    try:
        arrived = node.put_file(str(step.source), str(part), _sudo=False, _timeout=step.seconds)
    except (OSError, EOFError, SSHException) as error:
        raise session.NodeFailed(f"copying {step.source.name} broke off: {error}") from None
    if not arrived:
        raise session.NodeFailed(f"{step.source.name} could not be copied to {destination}")
    session.run(
        node,
        f"set -e\necho {quote(f'{step.sha256}  {part}')} | sha256sum -c --quiet - >&2\n"
        f"chown 0:0 {quote(str(part))}; chmod {step.mode} {quote(str(part))}\n"
        f"mv -f {quote(str(part))} {quote(str(destination))}; rm -rf {quote(str(landing))}",
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
        if hashlib.sha256(part.read_bytes()).hexdigest() != told.partition(" ")[0]:
            raise session.NodeFailed(f"{step.source} arrived damaged: converge again")
        part.replace(step.destination)
    except (OSError, EOFError, SSHException) as error:
        raise session.NodeFailed(f"copying {step.source} broke off: {error}") from None
    finally:
        part.unlink(missing_ok=True)
