"""Sets limits for logins and the size of shared memory.

A mistake in PAM's files can lock every login out; older versions of pam_limits even refuse a session
when a limit cannot be set. What cannot be granted never gets this far; and what is written undoes
itself after a minute unless a fresh login succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from roles.core import fstab
from roles.core.role import Finding, Peers, Target
from roles.core.steps import NewLogin, Shell, Step, quote, write_file
from roles.limits.drift import fstab_line, own_lines
from roles.limits.probe import OWN_FILE, LimitsState
from roles.limits.spec import LimitsSpec, size_bytes
from roles.limits.system import system_steps

UNDO_SECONDS = 60

PAM_LINE = "session required pam_limits.so"

_HEADER = (
    "# Written by Lockstep; changes are lost. '-' sets soft and hard; '*' does not reach root.\n"
)


def file_text(spec: LimitsSpec) -> str:
    """Lockstep's file in limits.d."""
    return _HEADER + "".join(
        f"{line.words[0]:<5}{line.words[1]:<2}{line.words[2]:<8}{line.words[3]}\n"
        for line in own_lines(spec)
    )


def guarded(changes: Mapping[str, str]) -> tuple[Shell, Shell]:
    """Two steps: one that makes the changes, and one that keeps them, after a login succeeded.

    changes: path to the shell that changes it. Without the second step the files are what they
    were, after UNDO_SECONDS; the process that sees to it outlives the connection.
    """
    lines = ["undo=$(mktemp -d /run/lockstep-limits.XXXXXX)"]
    for number, path in enumerate(map(quote, changes)):
        lines.append(
            f'if test -e {path}; then cp -p {path} "$undo/{number}"; '
            f'echo "cp -p $undo/{number}" {quote(path)} >> "$undo/run"; '
            f'else echo rm -f {quote(path)} >> "$undo/run"; fi'
        )
    lines.append(
        f'setsid sh -c \'sleep {UNDO_SECONDS}; if test -e "$1/run"; then sh "$1/run"; fi; rm -rf "$1"\' '
        'undo "$undo" </dev/null >/dev/null 2>&1 &'
    )
    return Shell("\n".join([*lines, *changes.values()])), Shell("rm -f /run/lockstep-limits.*/run")


def add_pam_line(service: str) -> str:
    """Shell that adds pam_limits to the sessions of one service, at the end of its file."""
    path = quote(f"/etc/pam.d/{service}")
    kept = quote(f"/etc/pam.d/{service}.before-lockstep")
    return f"test -e {kept} || cp -p {path} {kept}\nprintf '\\n# lockstep\\n%s\\n' {quote(PAM_LINE)} >> {path}"


def converge(
    target: Target[LimitsSpec], state: LimitsState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """Logins first, then shared memory: live, and for the next boot."""
    spec = target.spec
    ids = {finding.id for finding in findings}
    changes: dict[str, str] = {}
    if "limits-file" in ids:
        wanted = own_lines(spec)
        changes[OWN_FILE] = (
            write_file(OWN_FILE, file_text(spec), backup=False) if wanted else f"rm -f {OWN_FILE}"
        )
    if "pam-limits" in ids:
        for service in (name for name, present in state.pam.items() if not present):
            changes[f"/etc/pam.d/{service}"] = add_pam_line(service)
    make, keep = guarded(changes)
    if changes:
        yield make
    if changes or "limits-undo" in ids:
        yield NewLogin()  # before anything else: sudo would judge the new limits by the old login
        yield keep
    line = fstab_line(spec, state)
    if "shm-fstab" in ids and line is not None:
        yield Shell(fstab.put(line))
    if "shm-nccl" in ids and spec.shm is not None:
        size = f"size={size_bytes(spec.shm, state.memory) // 1024}k"
        if state.shm.mounted:
            yield Shell(f"mount -o remount,{size} /dev/shm")
        else:
            yield Shell(f"mount -t tmpfs -o nosuid,nodev,{size} tmpfs /dev/shm")
    yield from system_steps(spec, state.system, ids)
