"""Mends an interrupted dpkg and installs what is missing, from the declared source only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, write_file
from roles.packages.drift import missing, source_text
from roles.packages.managers import (
    APT_SOURCE,
    INSTALL_SECONDS,
    PATIENCE,
    TRIAL,
    Manager,
    apt,
    apt_ready,
    dnf,
    dnf_trial,
    full_names,
    removing_only,
)
from roles.packages.probe import POLICY, POLICY_MARK, PackagesState
from roles.packages.spec import PackagesSpec

# The policy file lets no new service start by itself, and goes when this shell ends; a restart of
# what runs already is allowed. A policy that somebody else made stays in force.
_APT_PREAMBLE = f"""
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


def installing(
    spec: PackagesSpec,
    manager: Manager,
    names: Sequence[str],
    *,
    versions: Mapping[str, str] | None = None,
    reinstall: bool = False,
    instead_of: Sequence[str] = (),
    past_locks: bool = False,
) -> Shell:
    """The step that installs packages from the declared source, with apt, dnf or yum, in one transaction.

    names: packages at any version. versions: packages at exactly that one, also when it is an older.
    reinstall: unpack them again although they are installed.
    instead_of: installed packages that may go for it; a transaction that would remove anything
    else is refused before it begins.
    past_locks: holds, and the lock list of dnf 4 and yum, do not count; the caller makes them anew.
    """
    exact = full_names(manager, versions or {})
    if manager == "apt":
        options = ["--allow-downgrades"] if versions else []
        options += ["--allow-change-held-packages"] if past_locks else []
        options += ["--reinstall"] if reinstall else []
        lines = _with_apt(spec, options, [*names, *exact], instead_of)
        return Shell("\n".join([PATIENCE + _APT_PREAMBLE.rstrip(), *lines]), INSTALL_SECONDS)
    options = ["--disableplugin=versionlock"] if past_locks else []
    lines = _with_dnf(spec, options, [*names, *exact], exact, reinstall, instead_of)
    return Shell("\n".join([PATIENCE + TRIAL.rstrip(), *lines]), INSTALL_SECONDS)


def _with_apt(
    spec: PackagesSpec, options: Sequence[str], names: Sequence[str], instead_of: Sequence[str]
) -> list[str]:
    words = ["--no-install-recommends", *options]
    if not instead_of:
        return [*apt_ready(spec), apt(spec, "install", *words, "--no-remove", "--", *names)]
    words += ["--", *names, *(f"{name}-" for name in instead_of)]  # apt's way to say "remove it"
    dry = apt(spec, "install", "--simulate", *words).removeprefix("patiently ")
    check = removing_only(instead_of, f"{dry} | awk '/^Remv / {{ print $2 }}'")
    return [*apt_ready(spec), check, apt(spec, "install", *words)]


def _with_dnf(
    spec: PackagesSpec,
    options: Sequence[str],
    words: Sequence[str],
    exact: Sequence[str],
    reinstall: bool,
    instead_of: Sequence[str],
) -> list[str]:
    if reinstall:
        return [dnf(spec, *options, "reinstall", *words)]
    # yum has no such option: it removes only what a new package replaces by its own word.
    erasing = ' $(test "$dnf" = yum || echo --allowerasing)' if instead_of else ""
    lines = [
        removing_only(instead_of, dnf_trial(spec, *options, "install", *words) + erasing),
        dnf(spec, *options, "install", *words) + erasing,
    ]
    if exact:  # yum installs no older version where a newer one is; it must be told "downgrade"
        lines.append(
            f'test "$dnf" != yum || rpm -q {" ".join(map(quote, exact))} >/dev/null || '
            + dnf(spec, *options, "downgrade", *exact)
        )
    # yum says 0 as long as it could install one of them.
    source = spec.local or "the sources of the node"
    lines.append(
        f"for name in {' '.join(map(quote, words))}; do\n"
        '  rpm -q "$name" >/dev/null || rpm -q --whatprovides "$name" >/dev/null || {\n'
        f'    echo "Error: not installed: $name (from {source})" >&2; exit 1; }}\n'
        "done"
    )
    return lines


def mending(spec: PackagesSpec, unpacked_badly: Sequence[str]) -> Shell:
    """The step that goes on where dpkg was interrupted.

    unpacked_badly: packages whose files are not all there; they are unpacked again.
    """
    lines = [
        f"patiently dpkg --force-confdef --force-confold --configure -a || {{ {apt(spec, 'update')}; "
        f"{apt(spec, 'install', '-f', '--no-install-recommends', '--no-remove')}; }}"
    ]
    if unpacked_badly:
        again = ["--reinstall", "--no-install-recommends", "--no-remove", "--", *unpacked_badly]
        lines += [apt(spec, "update"), apt(spec, "install", *again)]
    return Shell(PATIENCE + _APT_PREAMBLE + "\n".join(lines), INSTALL_SECONDS)


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
            yield Shell(write_file(APT_SOURCE, source_text(spec.local), backup=False))
        else:
            yield Shell(f"rm -f {APT_SOURCE}")
    if "package-interrupted" in ids:
        bad = [name for name, status in state.interrupted.items() if "H" in status or "R" in status]
        yield mending(spec, bad)
    if "package-missing" in ids:
        names = missing(spec, state)
        yield installing(
            spec, state.manager, [n for n in names if state.offered is None or n in state.offered]
        )
