"""Brings a file of the control machine to nodes: whole or not at all, continued where it broke off.

The file grows beside its destination under the name of its content. Nodes that want the same file at the
same time form a chain: the first gets it from the control machine, each other one takes it from the node
before it while that still receives (``relay``). Where no node can give it, the control machine does.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

from paramiko import SSHException
from pyinfra.api.host import Host

from inventory.cluster import Node
from roles.core import relay, session
from roles.core.progress import MB, Progress
from roles.core.steps import Upload, owned, quote
from roles.core.upload import landing

ATTEMPTS = 2
"""A file that arrived with another content begins anew once."""
MOST_GIVERS = 3
"""Nodes that one asks before the control machine sends it: where none may reach another, all would ask all."""


@dataclass
class Member:
    """A node that gets the file. at: bytes that it has, as far as is known; lost: it gives nothing on."""

    node: Host
    at: int = 0
    lost: bool = False


@dataclass
class Chain:
    """The nodes that get one file now, in the order in which they asked for it, and how far they are.

    places: every node of the cluster, by name, as its peers reach it.
    """

    step: Upload
    places: Mapping[str, Node]
    members: list[Member] = field(default_factory=list)

    @cached_property
    def _progress(self) -> Progress:
        return Progress(self.step.source.name, self.step.size)

    def join(self, node: Host) -> Member:
        """The node comes last; what it asked for earlier no longer counts."""
        for earlier in self.members:
            earlier.lost = earlier.lost or earlier.node is node
        member = Member(node)
        self.members.append(member)
        return member

    def before(self, member: Member) -> list[Member]:
        """Who may give it, best first: no node waits for one that waits for it."""
        return self.members[: self.members.index(member)][::-1]

    def note(self, member: Member, at: int) -> None:
        """The node has so many bytes; says how far the last one is, now and then."""
        member.at = at
        last = min((each for each in self.members if not each.lost), key=lambda each: each.at)
        self._progress.note(last.node, last.at)


def upload(node: Host, step: Upload, chain: Chain) -> None:
    """Carry out an Upload. Raises NodeFailed; the destination then is what it was."""
    if not step.source.is_file():
        raise session.NodeFailed(f"{step.source} is not on this machine")
    member = chain.join(node)
    try:
        for attempt in range(ATTEMPTS):  # after damage it comes from where it is right
            if attempt or not _from_nodes(step, chain, member):
                _from_here(step, chain, member)
            if _settle(node, step):
                return
            session.say(node, f"{step.source.name} arrived damaged", "yellow")
        raise session.NodeFailed(
            f"{step.source.name} arrived with another content than it had when it was read: "
            "converge again when nothing changes it"
        )
    except BaseException:
        member.lost = True
        raise


def _begin(node: Host, step: Upload) -> str:
    """Shell that makes the place where the file grows; prints how many bytes an earlier transfer left there.

    It is the login user's, who sends it on.
    """
    folder, part = quote(str(step.part.parent)), quote(str(step.part))
    return (
        f"set -e\n{landing(node, step.part.parent)}\n"
        f'for f in {folder}/*; do test "$f" = {part} || rm -rf "$f"; done\n'
        f'if test -f {part} && test "$(stat -c %s {part})" -gt {step.size}; then rm -f {part}; fi\n'
        f": >>{part}\n"
        f'test "$(stat -c %u {part})" = "$(stat -c %u {folder})" || chown --reference={folder} {part}\n'
        f"stat -c %s {part}"
    )


def _from_here(step: Upload, chain: Chain, member: Member) -> None:
    """Send what the node lacks from the control machine, over SFTP."""
    node, part = member.node, str(step.part)
    at = int(session.run(node, _begin(node, step), relay.SECONDS).stdout)
    client = getattr(node.connector, "client", None)
    try:
        if client is None:  # the control machine itself
            if not node.put_file(str(step.source), part, _sudo=False):
                raise session.NodeFailed(f"{step.source.name} could not be copied to {part}")
            return
        with (
            step.source.open("rb") as file,
            client.open_sftp() as sftp,
            sftp.open(part, "r+") as grows,
        ):
            sftp.get_channel().settimeout(relay.SECONDS)
            grows.set_pipelined(True)
            file.seek(at)
            grows.seek(at)
            while chunk := file.read(session.CHUNK):
                grows.write(chunk)
                at += len(chunk)
                chain.note(member, at)
            grows.close()  # which tells nothing of writes that failed last
            if sftp.stat(part).st_size != step.size:
                raise OSError("the node did not take it all")
    except (OSError, EOFError, SSHException) as error:
        silent = isinstance(error, socket.timeout)
        if not silent and (full := _full(node, step, root=False)):
            raise session.NodeFailed(full) from None
        reason = "the node is silent" if silent else str(error)
        raise session.NodeFailed(
            f"copying {step.source.name} broke off: {reason}; converging again goes on from there"
        ) from None


def _from_nodes(step: Upload, chain: Chain, member: Member) -> bool:
    """Take it from the nodes that asked before this one; False when the nearest of them cannot give it all.

    Raises NodeFailed when this node itself is dead, or its disk is full.
    """
    givers = (each for each in chain.before(member) if not each.lost)
    for giver in islice(givers, MOST_GIVERS):
        try:
            _take(step, chain, member, giver)
            return True
        except relay.Refused as error:
            if full := _full(member.node, step, root=True):
                raise session.NodeFailed(full) from None
            relay.say_refused(member.node, giver.node.name, step.source.name, error)
    return False


def _take(step: Upload, chain: Chain, member: Member, giver: Member) -> None:
    """Take the rest from one node, and see now and then that this one still answers."""
    node = member.node

    def look() -> None:
        size = f"stat -c %s {quote(str(step.part))} 2>/dev/null || echo 0"
        chain.note(member, int(session.run(node, size, relay.SECONDS).stdout))

    with relay.opened(step, giver.node, node, chain.places, _begin(node, step)) as script:
        relay.taken(node, script, step.seconds, look)


def _full(node: Host, step: Upload, root: bool) -> str | None:
    """The sentence for a node whose disk is full, without what arrived there, which would keep it full; else None.

    root: who wrote there; some of a disk is kept for root. What is too much may also be a quota's.
    """
    folder = quote(str(step.part.parent))
    attempt = (
        f"cd {folder}\nE=$(LC_ALL=C dd if=/dev/zero of=room bs=64k count=16 conv=fsync 2>&1) && E=\n"
        f"rm -f room\ncase $E in *'No space left'*|*'quota exceeded'*) stat -c %s {quote(step.part.name)};; esac"
    )
    try:
        came = session.run(node, attempt, relay.SECONDS, root=root).stdout.strip()
        if not came:
            return None
        session.run(node, f"rm -rf {folder}", relay.SECONDS)
    except session.NodeFailed:
        return None
    return (
        f"no room for {step.source.name}: the disk of {step.part.parent.parent} was full when {int(came) // MB} of "
        f"{step.size // MB} MB had arrived, which are removed; make room there and converge again"
    )


def _settle(node: Host, step: Upload) -> bool:
    """Check the whole file and put it in place; False when its content is wrong, and then it is gone."""
    folder, part = quote(str(step.part.parent)), quote(str(step.part))
    found = session.run(
        node,
        f"set -e\n{owned(part)}\nchmod {step.mode} {part}\n"
        f"if ! echo {quote(f'{step.sha256}  {step.part}')} | sha256sum -c --status -; then\n"
        f"  rm -f {part}; echo wrong; exit 0; fi\n"
        f"sync {part}\nmv -f {part} {quote(step.destination)}; rm -rf {folder}",
        step.seconds,
    )
    return found.stdout.strip() != "wrong"
