"""The systemd unit that a launch becomes on its node, and the record of how it ended."""

from __future__ import annotations

from roles.core.steps import quote
from roles.job.plan import Launch, attempt_directory, unit_name
from roles.job.probe import DESCRIPTION

STOP_SECONDS = 180
"""Time for the checkpoint that SIGTERM asks for; what then still lives is killed."""

RUN = 'exec >>"$0" 2>&1; exec "$@"'
"""The log lies on shared storage; StandardOutput=append: would do, but needs systemd 240."""

STOP = (
    'test -n "$MAINPID" && test "${SERVICE_RESULT:-success}" = success || exit 0; : >"$0"; '
    'kill -TERM $(cat "/proc/$MAINPID/task/$MAINPID/children"); '
    'while kill -0 "$MAINPID" 2>/dev/null; do sleep 0.2; done'
)
"""SIGTERM for the ranks alone: torchrun kills its ranks 30 s after its own SIGTERM, which is
less than a checkpoint may take. ``asked`` is left so that the end does not look like a failure;
systemd runs this also when the unit ends by itself, but then without MAINPID, or with a result."""

ENDED = 'echo "$SERVICE_RESULT ${EXIT_CODE:--} ${EXIT_STATUS:--}" >"$0.new" && mv -f "$0.new" "$0"'


def describe(job: str, attempt: int) -> str:
    """The unit's description, by which the look tells which attempt a unit is."""
    return f"{DESCRIPTION}{job}, attempt {attempt}"


def path(launch: Launch) -> str:
    """Where the unit file lies. It has no [Install]: a reboot starts no job by itself."""
    return f"/etc/systemd/system/{launch.unit}"


def word(text: str, command: bool = True) -> str:
    """One word of a unit file, so that systemd takes it literally. command: of an Exec line."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("\n", "\\n")
    if command:
        escaped = escaped.replace("$", "$$")
    return f'"{escaped}"'


def unit_file(launch: Launch) -> str:
    """The unit's text."""
    files = f"{launch.attempt_directory}/{launch.node}"
    lines = [
        "[Unit]",
        f"Description={describe(launch.job, launch.attempt)}",
        # At shutdown the order turns round: the job ends before the network and the storage go.
        "After=network-online.target remote-fs.target",
        "",
        "[Service]",
        f"WorkingDirectory={launch.run.replace('%', '%%')}",
        *(
            f"Environment={word(f'{key}={value}', command=False)}"
            for key, value in launch.environment.items()
        ),
        _exec("ExecStart", RUN, launch.log, *launch.command),
        _exec("ExecStop", STOP, f"{files}.asked"),
        _exec("ExecStopPost", ENDED, f"{files}.exit"),
        "Restart=no",
        "KillMode=control-group",
        f"TimeoutStopSec={STOP_SECONDS}",
        "TasksMax=infinity",
        *launch.limits,
    ]
    return "\n".join(lines) + "\n"


def _exec(key: str, script: str, *arguments: str) -> str:
    return f"{key}=/bin/sh -c {' '.join(word(each) for each in (script, *arguments))}"


def end(job: str, run: str, attempt: int, node: str) -> str:
    """Shell that kills what is left of an attempt on a node; returns when nothing of it lives.

    For survivors only: a job that has lost a rank can make no checkpoint, and waits for ever. A
    unit of another attempt stays: somebody else has started that one meanwhile.
    """
    unit, directory = quote(unit_name(job)), attempt_directory(run, attempt)
    return (
        f'if test "$(systemctl show -p Description --value {unit})" = {quote(describe(job, attempt))}; then\n'
        # What has ended by itself keeps its record: it may be the failure that is looked for.
        f"if test -d {quote(directory)} && systemctl is-active -q {unit}; then\n"
        f": >{quote(f'{directory}/{node}.asked')}; fi\n"
        f"systemctl kill -s KILL {unit} 2>/dev/null || :\n"
        f"systemctl stop {unit} 2>/dev/null || :\n"
        f"systemctl reset-failed {unit} 2>/dev/null || :\n"
        "fi"
    )
