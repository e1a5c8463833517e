"""Names the sources, mends an interrupted installation, installs what is missing, fences other upgrades."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, UploadFolder, quote, write_file
from roles.packages.bundle import HOME
from roles.packages.drift import bundled, offered, unfenced
from roles.packages.managers import (
    CUT,
    INSTALL_SECONDS,
    KEYS,
    PATIENCE,
    SOURCES,
    TRIAL,
    Manager,
    apt,
    apt_ready,
    dnf,
    dnf_trial,
    full_names,
    removing_only,
)
from roles.packages.probe import INSTALLED_BESIDE, POLICY, POLICY_MARK, PackagesState
from roles.packages.sources import key_texts, source_text
from roles.packages.spec import PackagesSpec
from roles.packages.unattended import APT_FENCE, APT_TEXT, fencing

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


_REMOVED = "printf '%s\\n' \"$said\" | awk '/^Remv / { print $2 }'"
"""Shell: what apt's last answer says that would go; patience leaves it in $said."""


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
    instead_of: installed packages that go where they exclude it, held or not; a transaction that would
    remove anything else is refused before it begins.
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
    mark = f"mkdir -p /var/lib/lockstep; : > {CUT}; trap 'rm -f {CUT}' EXIT"
    return Shell("\n".join([PATIENCE + TRIAL.rstrip(), mark, *lines]), INSTALL_SECONDS)


def _with_apt(
    spec: PackagesSpec, options: Sequence[str], names: Sequence[str], instead_of: Sequence[str]
) -> list[str]:
    words = ["--no-install-recommends", *options]
    if not instead_of:
        return [*apt_ready(spec), apt(spec, "install", *words, "--no-remove", "--", *names)]
    words += ["--", *names]
    # Holds would be in the way of what must go, so it is asked without them; then exactly that is named.
    trial, named = apt(spec, "install", "--simulate", *words), ' "$@"'
    return [
        *apt_ready(spec),
        apt(spec, "install", "--simulate", "--ignore-hold", *words),
        removing_only(instead_of, _REMOVED),
        'set --\nfor name in $gone; do set -- "$@" "$name-"; done',
        trial + named,
        removing_only(instead_of, _REMOVED),
        apt(spec, "install", *words) + named,
    ]


def taking_back(spec: PackagesSpec) -> str:
    """Shell that has apt do its arguments, NAME=VERSION or NAME-, whatever is held."""
    words = ["--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages", "--"]
    lines = [*apt_ready(spec), apt(spec, "install", *words) + ' "$@"']
    return "\n".join([PATIENCE + _APT_PREAMBLE.rstrip(), *lines])


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
    source = spec.origin("rpm")
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


# Of two versions of one package the higher stays: a cut upgrade was for it. rpm -V names files that
# are missing or altered; configuration (c), documents (d) and ghosts (g) may be. Looked at are the
# declared packages, and those of the last transaction, whichever role's it was.
_MEND_RPM = rf"""
database=$(rpm --eval '%_dbpath')
if ! timeout 10 rpm -q rpm >/dev/null 2>&1; then
  test -e "$database.before-lockstep" || cp -a "$database" "$database.before-lockstep"
  rm -f "$database"/__db.*
  timeout 10 rpm -q rpm >/dev/null 2>&1 || rpm --rebuilddb
fi
rm -f /var/lib/yum/transaction-all.* /var/lib/yum/transaction-done.*
twice=$(rpm -qa --qf '%{{NAME}}.%{{ARCH}} %{{EPOCHNUM}}:%{{VERSION}}-%{{RELEASE}} %{{NAME}}-%{{VERSION}}-%{{RELEASE}}.%{{ARCH}} %{{NAME}}
' |
  sort -k 1,1 -k 2,2V | awk '/^({"|".join(INSTALLED_BESIDE)})/ {{ next }} $1 == last {{ print old, name }} {{ last = $1; old = $3; name = $4 }}')
printf '%s
' "$twice" | while read -r old name; do test -z "$old" || rpm -e --nodeps --noscripts "$old"; done
latest=$(rpm -qa --qf '%{{INSTALLTID}} %{{NAME}}\n' | sort -n |
  awk '$1 != last {{ last = $1; names = "" }} {{ names = names " " $2 }} END {{ print names }}')
bad=
for name in $wanted $latest $(printf '%s
' "$twice" | awk '{{ print $2 }}' | sort -u); do
  rpm -q "$name" >/dev/null || continue
  lost=$(rpm -V --nodeps --noscripts --nomtime --nomode --nouser --nogroup --nocaps "$name" |
    awk '$2 !~ /^[cdg]$/' || true)
  test -z "$lost" || bad="$bad $name"
done
""".strip()


def mending_rpm(spec: PackagesSpec) -> Shell:
    """The step that goes on where rpm, dnf or yum was interrupted."""
    wanted = quote(" ".join(spec.names("rpm")))
    again = dnf(spec, "reinstall")
    lines = [f"wanted={wanted}", _MEND_RPM, f'test -z "$bad" || {again} $bad', f"rm -f {CUT}"]
    return Shell(PATIENCE + "\n".join(lines), INSTALL_SECONDS)


def _sources(target: Target[PackagesSpec], state: PackagesState, ids: set[str]) -> Iterator[Step]:
    """Keys before the file that names them."""
    if "package-source-key" in ids:
        keys = key_texts(target.spec, state.manager, target.cluster)
        folder = KEYS[state.manager]
        lines = [write_file(f"{folder}/{name}", text, backup=False) for name, text in keys.items()]
        lines += [f"rm -f {quote(f'{folder}/{name}')}" for name in state.keys if name not in keys]
        yield Shell("\n".join([f"mkdir -p -m 0755 {folder}", *lines]))
    if "package-source" in ids:
        text, file = source_text(target.spec, state.manager), SOURCES[state.manager]
        yield Shell(write_file(file, text, backup=False) if text else f"rm -f {file}")


def _bundle(target: Target[PackagesSpec], state: PackagesState) -> UploadFolder:
    assert target.spec.bundle is not None  # the finding says so
    folder = target.cluster.at_hand(target.spec.bundle) / "packages" / state.system
    files = {name: (folder / name, one.sha256) for name, one in bundled(target, state).items()}
    return UploadFolder(files, HOME)


def converge(
    target: Target[PackagesSpec],
    state: PackagesState,
    peers: Peers,
    findings: Sequence[Finding],
) -> Iterator[Step]:
    """The sources first, then what is half-way, then what is missing, then what upgrades by itself."""
    spec = target.spec
    ids = {finding.id for finding in findings}
    if "package-policy" in ids:
        yield Shell(f"rm -f {POLICY}")
    if "package-bundle" in ids:
        yield _bundle(target, state)
    yield from _sources(target, state, ids)
    if "package-interrupted" in ids:
        bad = [name for name, status in state.interrupted.items() if "H" in status or "R" in status]
        yield mending(spec, bad) if state.manager == "apt" else mending_rpm(spec)
    if "package-missing" in ids:
        yield installing(spec, state.manager, offered(spec, state))
    if "package-unattended" in ids:
        files = unfenced(state)
        yield Shell(
            write_file(APT_FENCE, APT_TEXT, backup=False)
            if state.manager == "apt"
            else fencing(files.items())
        )
