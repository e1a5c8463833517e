"""Mends an interrupted dpkg and installs what is missing, from the declared source only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, write_file
from roles.packages.drift import missing, source_text
from roles.packages.probe import POLICY, POLICY_MARK, SOURCE, PackagesState
from roles.packages.spec import PackagesSpec

LOCK_SECONDS = 60
"""How long another process (an unattended upgrade) may hold the locks of apt and dpkg."""

INSTALL_SECONDS = 1800

# ``patiently`` runs a command again while the lock is taken: apt waits for dpkg's lock by itself, but
# not for that of its lists, and dpkg waits for none. A failure ends with the line that names its
# cause, not with apt's last word, which says only that something failed.
# The policy file lets no new service start by itself, and goes when this shell ends; a restart of
# what runs already is allowed. A policy that somebody else made stays in force.
_PREAMBLE = f"""
export LC_ALL=C DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 APT_LISTCHANGES_FRONTEND=none
patiently() {{
  end=$(($(date +%s) + {LOCK_SECONDS}))
  while ! said=$("$@" </dev/null 2>&1); do
    case $said in
      *'Could not get lock'*|*'locked by another process'*)
        test "$(date +%s)" -ge "$end" || {{ sleep 2; continue; }};;
    esac
    printf '%s\\n' "$said" >&2
    printf '%s\\n' "$said" | grep -m 1 -E '^(E|dpkg): ' >&2 || true
    return 1
  done
}}
if ! test -e {POLICY}; then
  trap 'rm -f {POLICY}' EXIT
  trap 'exit 1' HUP INT TERM
  (umask 022; cat > {POLICY}) <<'POLICY'
#!/bin/sh
{POLICY_MARK}
for word; do test "$word" != start || exit 101; done
exit 0
POLICY
  chmod 0755 {POLICY}
fi
""".lstrip()


def _apt(spec: PackagesSpec, action: str, *words: str) -> str:
    options = [
        f"DPkg::Lock::Timeout={LOCK_SECONDS}",
        "Dpkg::Use-Pty=0",
        "Dpkg::Options::=--force-confdef",
        "Dpkg::Options::=--force-confold",
    ]
    if spec.local:  # this source alone; the lists of the others stay as they are
        options += [
            f"Dir::Etc::sourcelist={SOURCE}",
            "Dir::Etc::sourceparts=-",
            "APT::Get::List-Cleanup=0",
            "APT::Sandbox::User=root",
        ]
    argv = ["patiently", "apt-get", "-y", "-q"]
    for option in options:
        argv += ["-o", option]
    return " ".join(quote(word) for word in [*argv, action, *words])


def installing(spec: PackagesSpec, names: Sequence[str], reinstall: bool = False) -> Shell:
    """The step that installs packages from the declared source; it removes none.

    reinstall: unpack them again although they are installed.
    """
    words = ["--no-install-recommends", "--no-remove", *(["--reinstall"] if reinstall else [])]
    return Shell(
        f"{_PREAMBLE}{_apt(spec, 'update')}\n{_apt(spec, 'install', *words, '--', *names)}",
        INSTALL_SECONDS,
    )


def mending(spec: PackagesSpec, unpacked_badly: Sequence[str]) -> Shell:
    """The step that goes on where dpkg was interrupted.

    unpacked_badly: packages whose files are not all there; they are unpacked again.
    """
    lines = [
        f"patiently dpkg --force-confdef --force-confold --configure -a || {{ {_apt(spec, 'update')}; "
        f"{_apt(spec, 'install', '-f', '--no-install-recommends', '--no-remove')}; }}"
    ]
    if unpacked_badly:
        again = ["--reinstall", "--no-install-recommends", "--no-remove", "--", *unpacked_badly]
        lines += [_apt(spec, "update"), _apt(spec, "install", *again)]
    return Shell(_PREAMBLE + "\n".join(lines), INSTALL_SECONDS)


def converge(
    target: Target[PackagesSpec],
    state: PackagesState,
    peers: Peers,
    findings: Sequence[Finding],
) -> Iterator[Step]:
    """The source first, then what is half-way, then what is missing."""
    spec = target.spec
    ids = {finding.id for finding in findings}
    if "package-policy" in ids:
        yield Shell(f"rm -f {POLICY}")
    if "package-source" in ids:
        if spec.local:
            yield Shell(write_file(SOURCE, source_text(spec.local), backup=False))
        else:
            yield Shell(f"rm -f {SOURCE}")
    if "package-interrupted" in ids:
        bad = [name for name, status in state.interrupted.items() if "H" in status or "R" in status]
        yield mending(spec, bad)
    if "package-missing" in ids:
        names = missing(spec, state)
        yield installing(spec, [n for n in names if state.offered is None or n in state.offered])
