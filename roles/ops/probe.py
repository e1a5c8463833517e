"""Which operators a node has, what they would be compiled with, and the locks of builds that nobody runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.environment.probe import DISTRIBUTIONS
from roles.environment.spec import Declared, Environments, of_metadata, unit_variables
from roles.ops.place import HOME, folder
from roles.ops.prove import PROOF, STAMP


@dataclass(frozen=True)
class Lock:
    """A lock that no process holds. user: whose home it lies in, or root."""

    user: str
    path: str


@dataclass(frozen=True)
class Seen:
    """One environment on one node.

    versions: of torch, deepspeed and others in its site-packages. site: empty where there is none.
    cuda: of torch, empty for a build without. headers: torch's are there. libraries: of bitsandbytes.
    compiler, ninja, nvcc: versions as a job's PATH finds them, empty where it does not.
    target: hash of what ``-march=native`` stands for there.
    stamp, proof: text of the stamps. built: path below the folder to SHA-256, of every operator.
    """

    site: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    cuda: str = ""
    headers: bool = False
    libraries: frozenset[str] = frozenset()
    compiler: str = ""
    ninja: str = ""
    nvcc: str = ""
    target: str = ""
    stamp: str = ""
    proof: str = ""
    built: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OpsState:
    """os: id and version as in os-release. machine: as in uname. environments: by name."""

    os: str
    machine: str
    environments: Mapping[str, Seen]
    locks: tuple[Lock, ...] = ()


HELD = r"""
held() {
  for f in /proc/[0-9]*/fd/*; do if [ "$f" -ef "$1" ]; then return 0; fi; done
  for f in /proc/[0-9]*/cwd; do if [ "$f" -ef "${1%/*}" ]; then return 0; fi; done
  case $(stat -f -c %T "${1%/*}") in
    ext*|xfs|btrfs|zfs|f2fs|jfs|reiserfs|tmpfs|ramfs|overlay*) return 1;;
  esac
  [ -n "$(find "${1%/*}" -mmin -60 2>/dev/null)" ]
}
"""
"""Shell: whether somebody builds under this lock. torch keeps the file open while it has the lock, and
the compiler runs in its folder. Where other nodes see the folder too, an hour of silence is asked for."""

LOCKS = f"""
{HELD.strip()}
idle() {{
  for l in "$2"/lock "$2"/*/lock; do
    if [ -f "$l" ] && ! [ -L "$l" ] && ! held "$l"; then printf 'lock %s %s\\n' "$1" "$l"; fi
  done
}}
while IFS=: read -r user _ uid _ _ home _; do
  case $uid in ''|*[!0-9]*) continue;; esac
  if [ "$uid" = 0 ] || {{ [ "$uid" -ge 1000 ] && [ "$uid" -lt 65534 ]; }}; then
    for d in "$home"/.cache/torch_extensions/*/; do
      if [ -d "$d" ]; then idle "$user" "${{d%/}}"; fi
    done
  fi
done </etc/passwd
for d in {HOME}/*/; do if [ -d "$d" ]; then idle root "${{d%/}}"; fi; done
"""

TORCH = r"""
sed -n "s/^cuda[ :].*= *'\([0-9.]*\)'.*/cuda \1/p" "$s/torch/version.py" 2>/dev/null
if [ -f "$s/torch/include/torch/extension.h" ]; then echo headers; fi
for l in "$s"/bitsandbytes/libbitsandbytes_*.so; do
  if [ -f "$l" ]; then printf 'library %s\n' "${l##*/}"; fi
done
"""

TOOLS = r"""
if command -v c++ >/dev/null; then
  v=$(c++ -dumpfullversion 2>/dev/null) || v=$(c++ -dumpversion 2>/dev/null)
  printf 'compiler %s\n' "$v"
  v=$(c++ -march=native -Q --help=target 2>/dev/null | sha256sum); printf 'target %s\n' "${v%% *}"
fi
if command -v ninja >/dev/null; then v=$(ninja --version 2>/dev/null); printf 'ninja %s\n' "$v"; fi
n=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
if [ -x "$n" ]; then "$n" --version 2>/dev/null | sed -n 's/.* release \([0-9.]*\).*/nvcc \1/p'; fi
"""


def probe(target: Target[Environments]) -> str:
    """Lines ``word value``; ``environment NAME`` begins each environment, ``end`` is the last."""
    parts = [
        "( . /etc/os-release && printf 'os %s\\n' \"$ID ${VERSION_ID:-}\" ) || exit 3\n"
        "printf 'machine %s\\n' \"$(uname -m)\"\n",
        LOCKS.lstrip(),
        *map(_probe_one, target.spec.each()),
        "echo end\n",
    ]
    return "".join(parts)


def _probe_one(one: Declared) -> str:
    own = (
        f"P={quote(one.prefix)}\nprintf 'environment %s\\n' {one.name}\n{DISTRIBUTIONS}"
        'for s in "$P"/lib/python3*/site-packages; do if [ -d "$s/torch" ] && ! [ -L "${s%/site-packages}" ]; then'
        f"{TORCH}fi; done\n"
    )
    if not one.spec.ops:
        return own
    return (
        f"{own}(\nPATH={quote(unit_variables(one.prefix, 0)['PATH'])}{TOOLS})\nD={quote(folder(one.name))}\n"
        f"for f in {STAMP} {PROOF}; do\n"
        '  if [ -f "$D/$f" ]; then IFS= read -r l <"$D/$f"; printf \'%s %s\\n\' "$f" "$l"; fi\ndone\n'
        'for f in "$D"/*/*.so; do if [ -f "$f" ]; then\n'
        '  h=$(sha256sum <"$f") || exit 1; printf \'op %s %s\\n\' "${h%% *}" "${f#"$D"/}"\nfi; done\n'
    )


WORDS = {
    "site": "site", "cuda": "cuda", "compiler": "compiler", "ninja": "ninja", "nvcc": "nvcc",
    "target": "target", STAMP: "stamp", PROOF: "proof",
}  # fmt: skip
"""Words with one value, and the field of it."""

INTERESTING = ("torch", "deepspeed", "bitsandbytes")


@whole
def parse(text: str) -> OpsState:
    """The state that ``probe`` printed."""
    single: dict[str, str] = {}
    locks: list[Lock] = []
    environments: dict[str, dict[str, Any]] = {}
    now: dict[str, Any] = {}
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        if word in ("os", "machine"):
            single[word] = value
        elif word == "lock":
            user, _, file = value.partition(" ")
            locks.append(Lock(user, file))
        elif word == "environment":
            now = {"versions": {}, "libraries": set(), "built": {}}
            environments[value] = now
        elif not environments:
            raise Unreadable(f"unexpected line {line!r}")
        else:
            _note(now, word, value)
    return OpsState(
        single["os"],
        single["machine"],
        {
            name: Seen(**{**values, "libraries": frozenset(values["libraries"])})
            for name, values in environments.items()
        },
        tuple(locks),
    )


def _note(now: dict[str, Any], word: str, value: str) -> None:
    if word in WORDS:
        now[WORDS[word]] = value
    elif word == "headers":
        now["headers"] = True
    elif word == "library":
        now["libraries"].add(value)
    elif word == "d":
        name, version = of_metadata(value)
        if name in INTERESTING:
            now["versions"][name] = version
    elif word == "op":
        digest, name = value.split(" ", 1)
        if len(digest) != 64:
            raise Unreadable(f"{digest!r} is no SHA-256")
        now["built"][name] = digest
    else:
        raise Unreadable(f"unexpected line {word!r}")
