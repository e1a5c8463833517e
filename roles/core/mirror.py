"""Brings the files of a directory to nodes that lack some of them: checked by their hashes, continued where it broke off.

rsync carries them. The control machine gives to one node at a time, over its own ssh, and only where no node can
give; each node that has them all gives to one other after the other (``relay``), so that they spread as a tree.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import PurePosixPath

import gevent
from gevent.lock import RLock
from pyinfra.api.host import Host

from inventory.cluster import Node
from roles.core import relay, session
from roles.core.chain import MOST_GIVERS, Chain, upload
from roles.core.here import run_here
from roles.core.progress import Progress
from roles.core.steps import UNATTENDED_SSH, Download, Mirror, Upload, quote
from roles.core.upload import download, landing

ATTEMPTS = 2
"""Files that arrive with another content are asked for once more."""
SECONDS = 48 * 3600
"""Time limit of what reads or moves a whole directory."""
LOCK = "lock"
"""In the folder where files arrive: held while a node takes them."""
LOCK_SECONDS = 90
"""How long a node waits for files that still arrive by a connection that broke: rsync ends itself after 60."""
OPTIONS = (
    *("rsync", "-tp", "--chmod=Du+rwx,Fu+rw", "--from0", "--inplace", "--timeout=60"),
    *("--info=progress2", "--no-human-readable", "--outbuf=N"),
)
"""In place, as only what arrives lies there: what a power cut leaves of a file is continued."""

COMPLAIN = """{ grep -v '^rsync error' "$1"; cat "$1"; } | grep . | head -n 1 >&2
"""
"""Shell that says in one line why rsync failed, whose complaints lie in the file $1."""

SEND = rf"""
said=$(mktemp) || exit 1
trap 'kill "$pid" 2>/dev/null; rm -f "$said"' EXIT
trap 'exit 1' HUP INT TERM
"$@" 2>"$said" & pid=$!
wait "$pid" && exit 0
set -- "$said"
{COMPLAIN}exit 1
"""
"""Runs rsync on the control machine; ends it where this is ended, and says in one line why it failed."""

GIVE = r"""
set -f
set -- $SSH_ORIGINAL_COMMAND
no() { echo 'it wants something else than these files' >&2; exit 1; }
test "$1 $2 $3" = 'rsync --server --sender' || no
shift 3; options=
while test $# -gt 2; do
  case $1 in
    --files-from=-|--from0|--timeout=60|--inplace) ;;
    --*) no ;;
    -*) case ${1%%e.*} in -|*[!tpRvn-]*) no ;; esac
      case $1 in *[!A-Za-z.-]*) no ;; esac ;;
    *) no ;;
  esac
  options="$options $1"; shift
done
test "$*" = '. .' || no
exec $root sh -c '
  if ! cd "$0" 2>/dev/null; then echo "its user $(id -un) may not enter $0" >&2; exit 1; fi
  exec rsync --server --sender "$@" . .' "$tree" $options
"""
"""What a giver runs for the taker: rsync, to read files of this one directory. Variables: root, tree."""


class Spread:
    """The nodes that get one directory now, and who can give it.

    places: every node of the cluster, by name, as its peers reach it. present: whether a node takes part.
    """

    def __init__(
        self, step: Mirror, places: Mapping[str, Node], present: Callable[[str], bool]
    ) -> None:
        self.step, self.places, self._present = step, places, present
        self._reading, self._sha256 = RLock(), ""
        self._busy: set[str | None] = set()
        self._coming: set[str] = set()

    @cached_property
    def _whole(self) -> list[str]:
        giver = [self.step.giver] if self.step.giver else []
        return [*giver, *(name for name in self.step.whole() if self._present(name))]

    def place(self, name: str) -> str:
        """Where that node has the files."""
        return self.step.directory if name == self.step.giver else self.step.place

    def manifest(self, node: Host) -> str:
        """The SHA-256 of the manifest, which is made once. Raises NodeFailed."""
        step = self.step
        with self._reading:
            if self._sha256:
                return self._sha256
            if step.giver is None:
                run_here(("sh", "-ec", step.read), lambda line: session.say(node, line))
            else:
                if not self._present(step.giver):
                    raise session.NodeFailed(
                        f"{step.name} comes from {step.giver}, which takes no part in this run, or failed"
                    )
                giver = node.state.inventory.get_host(step.giver)
                session.run(giver, f"set -e\n{step.read}", SECONDS, show=True)
                download(giver, Download(step.source, step.manifest))
            self._sha256 = hashlib.sha256(step.manifest.read_bytes()).hexdigest()
            return self._sha256

    def doubt(self, node: Host, path: str) -> None:
        """A file came from the origin with another content than its manifest says: it is read again next time."""
        script = f"path={quote(path)}\n{self.step.doubt}"
        if self.step.giver is None:
            run_here(("sh", "-ec", script), lambda line: session.say(node, line))
        else:
            giver = node.state.inventory.get_host(self.step.giver)
            session.run(giver, f"set -e\n{script}", relay.SECONDS)

    def claim(self, name: str, refused: set[str | None]) -> str | None:
        """The node that gives now, or None for the control machine; waits for one that is busy, or gets it all.

        A node nearest to the origin comes first. Raises NodeFailed where nobody is left.
        """
        self._coming.discard(name)  # one that was refused, and waits here again, brings nothing
        while True:
            ready = [each for each in self._whole if each not in refused and each != name]
            if len(refused - {None}) >= MOST_GIVERS:
                ready = [each for each in ready if each == self.step.giver]
            free = next((each for each in ready if each not in self._busy), None)
            here = self.step.giver is None and None not in refused
            if free is not None or (here and not ready and not self._coming - {name}):
                self._busy.add(free)
                self._coming.add(name)
                return free
            if not ready and not here:
                raise session.NodeFailed(
                    f"nobody can give {self.step.name} to this node: see above"
                )
            gevent.sleep(0.1)

    def release(self, giver: str | None) -> None:
        """It gives to nobody now."""
        self._busy.discard(giver)

    def over(self, name: str, whole: bool) -> None:
        """That node waits for nothing more; whole: it has it all, and can give it."""
        self._coming.discard(name)
        if whole and name not in self._whole:
            self._whole.append(name)


def mirror(node: Host, step: Mirror, spread: Spread) -> None:
    """Carry a Mirror out. Raises NodeFailed; the next run goes on from what arrived until then."""
    sha256 = spread.manifest(node)
    if node.name == step.giver and step.directory == step.place:
        return
    manifest = Upload(step.manifest, step.wanted, sha256)
    upload(node, manifest, Chain(manifest, spread.places))
    damaged: str | None = "?"
    refused = set[str | None]()
    try:
        for _ in range(ATTEMPTS):
            damaged = _tried(node, step, spread, refused)
            if damaged is None:
                break
    finally:
        spread.over(node.name, damaged is None)
    if damaged is not None:
        raise session.NodeFailed(
            f"files of {step.name}, such as {damaged}, arrived with another content than they had when they "
            "were read: converge again when nothing changes them"
        )


def _tried(node: Host, step: Mirror, spread: Spread, refused: set[str | None]) -> str | None:
    """Bring what the node lacks, and put it in place; a file whose content was wrong, or None where all is right.

    refused: who is not asked any more; gets who gave wrong content, but the origin.
    """
    survey = f"set -e\n{landing(node, PurePosixPath(step.landing))}\n{step.survey}"
    size, files = session.run(node, survey, SECONDS).stdout.split()
    giver = _bring(node, step, spread, refused, int(size)) if int(files) else step.giver
    said = session.run(node, f"set -e\n{step.settle}", SECONDS).stdout.split(" ", 2)
    match said:
        case ["damaged", number, path]:
            session.say(
                node, f"{step.name}: {number} files arrived damaged, such as {path}", "yellow"
            )
            if giver != step.giver:
                refused.add(giver)
            else:
                spread.doubt(node, path)
            return path
        case ["aside", number, where]:
            folder, _, path = where.partition(" ")
            sentence = f"{number} files that were not brought there, were edited, or are not at the origin any more, such as {path}, lie in {folder} now"
            session.say(node, f"{step.name}: {sentence}", "yellow")
    return None


def _bring(
    node: Host, step: Mirror, spread: Spread, refused: set[str | None], size: int
) -> str | None:
    """Have the lacking files arrive, from whoever can give them; who it was."""
    told = Progress(step.name, size)
    if node.name == step.giver:
        command = [*OPTIONS, f"--files-from={step.paths}", f"{step.directory}/"]
        try:
            _taken(node, step, told, shlex.join([*command, f"{step.landing}/files/"]))
        except relay.Refused as error:
            raise session.NodeFailed(f"{step.name} could not be copied: {error}") from None
        return step.giver
    while True:
        giver = spread.claim(node.name, refused)
        try:
            if giver is None:
                _from_here(node, step, told)
            else:
                _from_node(node, step, spread, giver, told)
            return giver
        except relay.Refused as error:
            refused.add(giver)
            relay.say_refused(node, giver or "this machine", step.name, error)
        finally:
            spread.release(giver)


def _from_here(node: Host, step: Mirror, told: Progress) -> None:
    """Send it from the control machine. Raises Refused, or NodeFailed where the node is dead."""
    remote = getattr(node.connector, "client", None) is not None
    there = f"{step.landing}/files/"
    command = [*OPTIONS, f"--files-from={':' if remote else ''}{step.paths}"]
    if remote:
        command += ["-s", "-e", _ssh(node)]
        there = f"{node.data.ssh_user}@{bracketed(str(node.data.ssh_hostname))}:{there}"
    try:
        run_here(
            ("sh", "-c", SEND, "sh", *command, f"{step.directory}/", there),
            partial(_note, node, told),
        )
    except session.NodeFailed as error:
        session.run(node, "true", relay.SECONDS)
        raise relay.Refused(str(error)) from None


def _ssh(node: Host) -> str:
    """The command by which the control machine enters a node, as rsync parts it: as pyinfra enters it."""
    data = node.data
    options = [
        *UNATTENDED_SSH,
        f'UserKnownHostsFile="{data.ssh_known_hosts_file}"',
        "StrictHostKeyChecking=yes",
    ]
    words = ["ssh", "-T", "-p", str(data.ssh_port)]
    words += [word for option in options for word in ("-o", option)]
    if key := data.get("ssh_key"):
        words += ["-i", str(key)]
    return shlex.join(words)


def bracketed(address: str) -> str:
    """An address as rsync takes it before a colon."""
    return f"[{address}]" if ":" in address else address


def _from_node(node: Host, step: Mirror, spread: Spread, giver: str, told: Progress) -> None:
    """Have the node take it from another one. Raises Refused, or NodeFailed where the taker is dead."""
    # Where sudo asks for a password, it reads what the login user may read.
    root = "sudo -n" if spread.places[giver].ssh.sudo is True else ""
    gift = f"root={quote(root)} tree={quote(spread.place(giver))}{GIVE}"
    host = node.state.inventory.get_host(giver)
    with relay.entered(gift, host, node, spread.places, "true") as way:
        user, _, address = way.login.partition("@")
        command = shlex.join([*OPTIONS, f"--files-from={step.paths}"])
        remote = f"{user}@{bracketed(address)}:."
        _taken(
            node,
            step,
            told,
            f'{command} -e "{way.ssh}" {quote(remote)} {quote(f"{step.landing}/files/")}',
            way.opening,
        )


def _taken(node: Host, step: Mirror, told: Progress, command: str, opening: str = "") -> None:
    """Run rsync on the node, and see now and then how far it is and that the node still answers.

    Raises Refused, or NodeFailed where the node is dead.
    """
    said = quote(f"{step.landing}/said")
    script = (
        # Of a run that was killed, rsync goes on here: a lock tells the next one.
        f"{opening}cd /\nexec 7>{quote(f'{step.landing}/{LOCK}')}\n"
        f"flock -w {LOCK_SECONDS} 7 || {{ echo 'files of it still arrive by an earlier connection' >&2; exit 1; }}\n"
        f"{command} >{said} 2>{said}.err && exit 0\nset -- {said}.err\n{COMPLAIN}exit 1"
    )

    def look() -> None:
        last = f"tail -c 200 {said} 2>/dev/null | tr '\\r' '\\n' | tail -n 1"
        _note(node, told, session.run(node, last, relay.SECONDS).stdout)

    relay.taken(node, script, SECONDS, look)


def _note(node: Host, told: Progress, text: str) -> None:
    """Note one line that rsync writes about all files (progress2); its first word is the number of bytes so far."""
    words = text.split()
    if len(words) >= 2 and words[0].isdigit() and words[1].endswith("%"):
        told.note(node, int(words[0]))
