"""Cuts a node's power at random moments while an environment is distributed and unpacked.

Brings up a lab of its own with two nodes; each round declares another archive, starts a run, cuts one node
(in half of the rounds the control process is killed too), starts it again and runs once more. A round is
good when the old environment could be used until the cut, one run brings the new one to both nodes, and
nothing is left behind. One thing may be: where the control process was killed, the key that it made and
could not take back, on the nodes that were not cut since; its line must go when it expires.
Arguments: number of rounds (20), seed (1). Prints JSON at the end, and each round as it goes on
standard error; times are seconds of wall clock.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO

from roles.core.relay import MARK
from tests.lab.site import Site, bare, beside

STATE = beside("power")
KEY = re.compile(rf"(/run/)?{MARK}[0-9a-f]{{16}}")
PREFIX = "/opt/lockstep/envs/main"
SITE = "env/lib/python3.11/site-packages"
BYTES = 60_000_000
ROLES = """from roles import archives, environment
from roles.converge import converge

converge(archives.role)
converge(environment.role)
"""
LEFT = rf"""
ls -d {PREFIX}.lockstep-new-* /var/lib/lockstep/archives/.[!.]* 2>/dev/null
ls -d /run/{MARK}* 2>/dev/null
lately=$(date -d '-2 minutes' +%Y%m%d%H%M)
cat /root/.ssh/authorized_keys /home/*/.ssh/authorized_keys 2>/dev/null | grep {MARK} | while read -r line; do
  until=$(printf %s "$line" | sed -n 's/.*expiry-time="\([0-9]*\)".*/\1/p')
  if test "${{until:-0}}" -lt "$lately"; then echo "expired ${{line##* }}"; else echo "${{line##* }}"; fi
done
"""
"""Shell that prints what runs left on a node, a line each; a key's line is swept in the minute after its last."""
ASK = f"{PREFIX}/bin/python -c 'import greeting; print(greeting.WORD)' 2>&1 | tail -n 1"


@dataclass(frozen=True)
class Round:
    """One cut. word_after_cut: what the environment said when its node was up again.

    lost: what it said before the cut that was neither the old word nor the new one. left: what lies on the
    nodes and should not. kept: keys that only the killed control process could have taken back.
    """

    node: str
    cut_s: float
    control_killed: bool
    word_after_cut: str
    lost: list[str]
    again_s: float
    words: dict[str, str]
    left: list[str]
    kept: list[str]
    good: bool


def main() -> int:
    """Print the rounds; exit 1 when one was not good."""
    rounds, seed = (int(value) for value in [*sys.argv[1:], *("20", "1")[len(sys.argv) - 1 :]])
    with brought_up() as site:
        found = []
        for each in cuts(site, rounds, seed):
            found.append(each)
            word = "good" if each.good else "bad"
            print(f"{len(found)} of {rounds}: {word}, {each.node} cut", file=sys.stderr)
    good = sum(each.good for each in found)
    print(
        json.dumps(
            {"seed": seed, "good": good, "rounds": [asdict(each) for each in found]}, indent=1
        )
    )
    return 0 if good == rounds else 1


@contextmanager
def brought_up() -> Iterator[Site]:
    """Two nodes that nothing was done to."""
    with bare(STATE, systems="debian") as site:
        (site.directory / "deploy.py").write_text(ROLES)
        yield site


def cuts(site: Site, rounds: int, seed: int) -> Iterator[Round]:
    """Cut so often, at moments spread over the time that a whole run takes."""
    chance = random.Random(seed)
    kept: dict[str, set[str]] = {node: set() for node in site.nodes}
    declare(site, "word0")
    run(site)
    declare(site, "word1")
    whole = run(site)
    for number in range(rounds):
        old, new = f"word{number + 1}", f"word{number + 2}"
        declare(site, new)
        yield cut(
            site,
            node=chance.choice(list(site.nodes)),
            seconds=chance.uniform(0.1, whole),
            kill=chance.random() < 0.5,
            old=old,
            new=new,
            kept=kept,
        )


def declare(site: Site, word: str, size: int = BYTES) -> None:
    """An archive of a venv whose module says this word, of so many bytes; no two have the same content."""
    archive = site.directory / f"{word}.tar"
    for earlier in site.directory.glob("word*.tar"):
        earlier.unlink()
    with tarfile.open(archive, "w") as tar:
        link = tarfile.TarInfo("env/bin/python")
        link.type, link.linkname = tarfile.SYMTYPE, "/usr/bin/python3.11"
        tar.addfile(link)
        for name, data in (
            ("env/pyvenv.cfg", b"home = /usr/bin\nversion = 3.11.2\n"),
            (f"{SITE}/greeting.py", f"WORD = '{word}'\n".encode()),
            (f"{SITE}/weights.bin", os.urandom(size)),
        ):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), int(time.time())
            tar.addfile(member, BytesIO(data))
    entry = {
        "archive": str(archive),
        "imports": ["greeting"],
        "commands": [],
        "distribute": "nodes",
    }
    site.declare(environments={"main": entry})


def run(site: Site) -> float:
    """A whole run that must succeed; its seconds."""
    start = time.monotonic()
    done = site.pyinfra(str(site.directory / "deploy.py"), "-y")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return time.monotonic() - start


def cut(
    site: Site,
    node: str,
    seconds: float,
    kill: bool,
    old: str,
    new: str,
    kept: dict[str, set[str]],
) -> Round:
    """One round; raises AssertionError when the run after the cut fails.

    kept: node to what killed control processes left there so far, and may; this round's is added.
    """
    process = site.start(str(site.directory / "deploy.py"))
    end, said = time.monotonic() + seconds, []
    while time.monotonic() < end and process.poll() is None:
        said.append(site.shell(node, ASK, check=False).strip())
    if kill:
        process.send_signal(signal.SIGKILL)
    assert site.lockstep("lab", "cut", node).returncode == 0
    try:
        process.wait(300)
    finally:
        process.kill()
    assert site.lockstep("lab", "start", node).returncode == 0
    after = site.shell(node, ASK, check=False).strip()
    again = run(site)
    words = {each: site.shell(each, ASK, check=False).strip() for each in site.nodes}
    kept[node].clear()  # the power cut ended it
    left = []
    for each in site.nodes:
        there = site.shell(each, LEFT, check=False).splitlines()
        if kill and each != node:
            kept[each].update(line for line in there if KEY.fullmatch(line))
        left += [f"{each}: {line}" for line in there if line not in kept[each]]
    lost = [word for word in said if word not in (old, new)]
    return Round(
        node=node,
        cut_s=round(seconds, 2),
        control_killed=kill,
        word_after_cut=after,
        lost=lost,
        again_s=round(again, 1),
        words=words,
        left=left,
        kept=sorted(set().union(*kept.values())),
        good=set(words.values()) == {new} and not lost and not left,
    )


if __name__ == "__main__":
    sys.exit(main())
