"""What a node knows of a job: its own unit, its facts for a launch, and the run directory as it sees it.

The run directory is shared, and every node reports it all the same: after a reboot a node may not
see it, and network file systems show new files late.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.fabric import adapters
from roles.job import place
from roles.job.autostart import SHOW, Autostart
from roles.job.declared import run_directory
from roles.job.plan import Plan
from roles.job.spec import JobSpec
from roles.network import interfaces
from roles.storage.probe import StorageState
from roles.storage.probe import parse as parse_storage

DESCRIPTION = "Lockstep job "
ACTIVE = ("active", "activating", "reloading")


@dataclass(frozen=True)
class Unit:
    """One job's systemd unit on this node. active: systemd's ActiveState."""

    job: str
    attempt: int
    active: str
    result: str

    @property
    def runs(self) -> bool:
        """Whether it trains; a unit that is being stopped does not, but still holds its GPUs."""
        return self.active in ACTIVE


@dataclass(frozen=True)
class Exit:
    """How a node's unit ended: systemd's words for it. asked: somebody stopped it."""

    result: str
    code: str
    status: str
    asked: bool = False

    @property
    def failed(self) -> bool:
        """Whether it ended badly and by itself."""
        if self.result == "oom-kill":
            return True
        return not self.asked and (self.code, self.status) != ("exited", "0")

    def __str__(self) -> str:
        if self.result == "oom-kill":
            return "the kernel ran out of memory and killed it"
        if self.code == "exited":
            return f"it ended with status {self.status}"
        return f"it was ended by signal {self.status}"


@dataclass(frozen=True)
class ErrorRecord:
    """What a rank left behind; kind is own, peer or stopped. time: seconds since 1970."""

    kind: str
    rank: int
    host: str
    error: str
    time: float


@dataclass(frozen=True)
class Attempt:
    """The files of one attempt. Nodes are named as in the cluster file.

    stopped: by a user. drained: for a reboot of its nodes, which goes on.
    """

    plan: Plan
    exits: Mapping[str, Exit] = field(default_factory=dict)
    errors: tuple[ErrorRecord, ...] = ()
    stopped: bool = False
    drained: bool = False


@dataclass(frozen=True)
class JobState:
    """One node's look.

    now: its clock, seconds since 1970. cores: CPUs that a process may use. gpus: GPUs that the
    driver shows. interfaces: address to interface. listening: TCP ports taken. units: of all jobs.
    declared: job.json. attempts: the highest attempt number. attempt: the last one with a plan.
    complete: the trainer's marker. metrics: its last record. checkpoint: the newest complete one.
    adapters: of InfiniBand and RoCE, by name. autostart: the service that resumes jobs.
    place: of the runs, where the storage role does not judge it; the run is looked at where it can be entered.
    """

    boot_id: str
    now: int
    cores: int
    gpus: int
    interfaces: Mapping[str, str]
    listening: frozenset[int]
    units: tuple[Unit, ...] = ()
    declared: Mapping[str, Any] | None = None
    attempts: int = 0
    attempt: Attempt | None = None
    complete: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    checkpoint: str | None = None
    adapters: tuple[str, ...] = ()
    autostart: Autostart | None = None
    place: StorageState | None = None

    def unit(self, job: str) -> Unit | None:
        """That job's unit, if systemd knows it."""
        return next((unit for unit in self.units if unit.job == job), None)


NODE = (
    r"""
export LC_ALL=C
IFS= read -r boot </proc/sys/kernel/random/boot_id
echo "boot $boot"
echo "now $(date +%s)"
echo "cores $(nproc)"
gpus=0
for each in /proc/driver/nvidia/gpus/*/; do
    if test -d "$each"; then gpus=$((gpus + 1)); fi
done
echo "gpus $gpus"
"""
    + interfaces.SHOW.strip()
    + r"""
set --
for each in /proc/net/tcp /proc/net/tcp6; do
    if test -r "$each"; then set -- "$@" "$each"; fi
done
awk '$4 == "0A" { sub(/.*:/, "", $2); if (!seen[$2]++) print "port", $2 }' "$@" || exit 3
found=$(systemctl show -p Id,Description,ActiveState,Result 'lockstep-*.service') || exit 3
printf '%s\n' "$found"
"""
    + SHOW
)

ERRORS = r"""
function out() { if (kind != "") printf "error [%s, %s, %s, %s, %s]\n", kind, rank, host, error, time }
FNR == 1 { out(); kind = ""; rank = "-1"; host = error = "\"\""; time = 0 }
/^ "(kind|rank|host|error|time)": / {
    key = $0; sub(/^ "/, "", key); sub(/".*/, "", key)
    sub(/^ "[a-z]*": /, ""); sub(/,$/, "")
    if (key == "kind") kind = $0
    if (key == "rank") rank = $0
    if (key == "host") host = $0
    if (key == "time") time = $0
    if (key == "error") error = (++told <= 16) ? substr($0, 1, 2000) : "\"\""
}
END { out() }
"""
"""awk over rank-*.error.json (one key a line): ``error [kind, rank, host, error, time]``, in JSON."""

RUN = r"""
one() {
    if test -e "$2"; then printf '%s ' "$1"; tr -d '\n' <"$2" || exit 3; echo; fi
}
if test -d "$run"; then
    cd "$run" || exit 3
    one job job.json
    one complete complete.json
    if test -e metrics.jsonl; then tail -n 2 metrics.jsonl | sed 's/^/metrics /'; echo; fi
    newest=
    for each in checkpoints/*/COMPLETE; do
        if test -e "$each"; then newest=${each%/COMPLETE}; fi
    done
    if test -n "$newest"; then echo "checkpoint ${newest##*/}"; fi
    last=0 planned=0
    for each in attempts/*/; do
        each=${each%/} each=${each##*/}
        case $each in *[!0-9]*) continue ;; esac
        if test "$each" -gt "$last"; then last=$each; fi
        if test -e "attempts/$each/plan.json" && test "$each" -gt "$planned"; then planned=$each; fi
    done
    echo "attempts $last"
    if test "$planned" -gt 0; then
        cd "attempts/$planned" || exit 3
        one plan plan.json
        if test -e stopped; then echo stopped; fi
        if test -e drained; then echo drained; fi
        for each in *.asked; do
            if test -e "$each"; then echo "asked ${each%.asked}"; fi
        done
        set -- *.exit
        if test -e "$1"; then awk 'FNR == 1 { node = FILENAME; sub(/\.exit$/, "", node); print "exit", node, $0 }' "$@" || exit 3; fi
        set -- rank-*.error.json
        if test -e "$1"; then awk "$errors" "$@" || exit 3; fi
    fi
elif test -e "$run"; then
    echo "$run is no directory" >&2; exit 3
fi
"""


def probe(target: Target[JobSpec]) -> str:
    """Lines ``WORD VALUE``, the units as systemd prints them, and JSON files on one line each."""
    run = place.show(target, _read(run_directory(target)))
    return f"{adapters.show(target.cluster)}\n{NODE}\n{run}\necho end"


def script(run: str | None) -> str:
    """The probe for one run directory; None: no job, the node's own facts and units only."""
    return f"{NODE}\n{_read(run)}\necho end"


def _read(run: str | None) -> str:
    return "" if run is None else f"run={quote(run)}\nerrors={quote(ERRORS)}\n{RUN}"


WORDS = {
    "boot", "now", "cores", "gpus", "address", "port", "adapter", "job", "complete", "metrics",
    "checkpoint", "attempts", "plan", "stopped", "drained", "asked", "exit", "error",
    "autostart", "note", "place",
}  # fmt: skip


@whole
def parse(text: str) -> JobState:
    """The state that ``probe`` printed."""
    words: dict[str, list[str]] = {}
    for line in text.split("\n"):
        word, _, value = line.partition(" ")
        if word in WORDS:
            words.setdefault(word, []).append(value)
        elif word and "=" not in word:
            raise Unreadable(f"{line[:60]!r} is not understood")
    boot_id = words["boot"][0]
    return JobState(
        boot_id=boot_id,
        now=int(words["now"][0]),
        cores=int(words["cores"][0]),
        gpus=int(words["gpus"][0]),
        interfaces=dict(interfaces.pair(value) for value in words.get("address", [])),
        listening=frozenset(int(value, 16) for value in words.get("port", [])),
        units=tuple(_units(text)),
        adapters=tuple(words.get("adapter", [])),
        autostart=_autostart(words),
        place=parse_storage("\n".join(words["place"])) if "place" in words else None,
        declared=_json(words, "job"),
        attempts=int(words.get("attempts", ["0"])[0]),
        attempt=_attempt(words),
        complete=_json(words, "complete"),
        metrics=_last_record(words.get("metrics", [])),
        checkpoint=words.get("checkpoint", [None])[0],
    )


def _units(text: str) -> Iterator[Unit]:
    for block in text.split("\n\n"):
        keys = dict(line.split("=", 1) for line in block.split("\n") if "=" in line.split(" ")[0])
        name, comma, attempt = keys.get("Description", "").partition(", attempt ")
        if comma and name.startswith(DESCRIPTION) and attempt.isdigit():
            yield Unit(
                name[len(DESCRIPTION) :], int(attempt), keys["ActiveState"], keys.get("Result", "")
            )


def _attempt(words: Mapping[str, list[str]]) -> Attempt | None:
    plan = _json(words, "plan")
    if plan is None:
        return None
    asked = set(words.get("asked", []))
    exits = {}
    for value in words.get("exit", []):
        node, result, code, status = value.split(" ")
        exits[node] = Exit(result, code, status, node in asked)
    errors = []
    for value in words.get("error", []):
        kind, rank, host, error, time = json.loads(value)
        errors.append(ErrorRecord(str(kind), int(rank), str(host), str(error), float(time)))
    return Attempt(
        Plan.from_json(plan),
        exits,
        tuple(sorted(errors, key=lambda found: (found.time, found.rank))),
        "stopped" in words,
        "drained" in words,
    )


def _autostart(words: Mapping[str, list[str]]) -> Autostart | None:
    if "autostart" not in words:
        return None
    digest, enabled, active = words["autostart"][0].split(" ")
    try:
        note = str((_json(words, "note") or {}).get("note", ""))
    except ValueError:  # the service takes it for none and writes it anew
        note = ""
    return Autostart(digest, enabled == "enabled", active == "active", note)


def _json(words: Mapping[str, list[str]], word: str) -> Mapping[str, Any] | None:
    if word not in words:
        return None
    value = json.loads(words[word][0])
    if not isinstance(value, dict):
        raise ValueError(f"{word} holds no JSON object")
    return value


def _last_record(lines: list[str]) -> Mapping[str, Any] | None:
    """The last whole record; rank 0 may be writing the next one just now."""
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return None
