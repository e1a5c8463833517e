"""How apt, and dnf or yum, are called: with patience for locks, the declared source alone, one cause told.

Every role that installs builds its shell from these pieces. Nothing here decides what is installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from roles.core.steps import quote
from roles.packages.spec import PackagesSpec

Manager = Literal["apt", "rpm"]

APT_SOURCE = "/etc/apt/sources.list.d/lockstep-local.list"
RPM_SOURCE = "/etc/yum.repos.d/lockstep-local.repo"
SOURCES: dict[Manager, str] = {"apt": APT_SOURCE, "rpm": RPM_SOURCE}
REPOSITORY = "lockstep-local"
"""The declared local directory, under the name that dnf and yum know it by."""

OWN_REPOSITORIES = "lockstep-*"
"""That one, and those of the declared sources."""

KEYS: dict[Manager, str] = {"apt": "/etc/apt/keyrings", "rpm": "/etc/pki/rpm-gpg"}
"""Where the declared sources' keys lie, as lockstep-NAME.asc."""

CUT = "/var/lib/lockstep/installing"
"""There while dnf or yum installs for Lockstep; a power cut leaves it."""

LOCK_SECONDS = 60
"""How long another process (an unattended upgrade) may hold the locks of apt, dpkg, dnf or rpm."""

INSTALL_SECONDS = 1800

# apt waits for dpkg's lock by itself, but not for that of its lists, and dpkg waits for none; dnf and
# yum would wait without end, and say 200 when told not to. The last line told is the one that names
# the cause: the managers' own last word says only that something failed.
PATIENCE = rf"""
export LC_ALL=C DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 APT_LISTCHANGES_FRONTEND=none
PATH=$PATH:/usr/sbin:/sbin
dnf=yum; if command -v dnf >/dev/null; then dnf=dnf; fi
patiently() {{
  end=$(($(date +%s) + {LOCK_SECONDS}))
  until said=$("$@" </dev/null 2>&1); do
    code=$?
    case $code,$said in
      200,*|*'Could not get lock'*|*'locked by another process'*|*"can't create transaction lock"*)
        test "$(date +%s)" -ge "$end" || {{ sleep 2; continue; }};;
    esac
    printf '%s\n' "$said" >&2
    printf '%s\n' "$said" | awk '
      more {{ sub(/^ *(- )?/, ""); why = why " " $0; more = 0; if (/^Problem/) more = 1; else exit }}
      /^dpkg: error|^Error: *$|^Error: .*:$|^Error: Package: |^Failed to resolve the transaction:/ {{ why = $0; more = 1; next }}
      {{ sub(/^>>> /, "") }}
      /^(E|Error|error|dpkg): |^Error (in|opening) / && why == "" {{ why = $0 }}
      END {{ if (why != "") print why }}' >&2
    return 1
  done
}}
""".lstrip()


def apt_sources(spec: PackagesSpec) -> list[str]:
    """Options of apt's tools under which they know the declared sources alone, where that is declared."""
    if not spec.alone("apt"):
        return []
    return [
        f"Dir::Etc::sourcelist={APT_SOURCE}",
        "Dir::Etc::sourceparts=-",
        "APT::Get::List-Cleanup=0",  # the lists of the others stay as they are
        "APT::Sandbox::User=root",
    ]


def dnf_sources(spec: PackagesSpec) -> list[str]:
    """The same for dnf and yum."""
    return ["--disablerepo=*", f"--enablerepo={OWN_REPOSITORIES}"] if spec.alone("rpm") else []


def apt(spec: PackagesSpec, action: str, *words: str) -> str:
    """apt-get with this action, from the declared source; the shell needs ``PATIENCE`` before it."""
    options = [
        f"DPkg::Lock::Timeout={LOCK_SECONDS}",
        "Dpkg::Use-Pty=0",
        "Dpkg::Options::=--force-confdef",
        "Dpkg::Options::=--force-confold",
        *apt_sources(spec),
    ]
    argv = ["patiently", "apt-get", "-y", "-q"]
    for option in options:
        argv += ["-o", option]
    return " ".join(quote(word) for word in [*argv, action, *words])


def apt_ready(spec: PackagesSpec) -> list[str]:
    """Shell lines that come before any installation with apt.

    The last mends what lacks a dependency that somebody took away: of whatever package, it would
    stop every installation. Where it cannot (a held package is in the way), the installation may.
    """
    return [
        *_updating(spec),
        f"{apt(spec, 'install', '-f', '--no-install-recommends', '--no-remove')} || true",
    ]


def _updating(spec: PackagesSpec) -> list[str]:
    """Reads the lists, and refuses a declared source that another key signs.

    apt calls that source unsigned, or goes on with what it knew of it before.
    """
    update = apt(spec, "update")
    signed = [source.url.rstrip("/") for source in spec.sources_of("apt") if source.key]
    if not signed:
        return [update]
    cases = (
        rf"case $said in *{quote(f'GPG error: {url}')}[\ /]*) echo "
        f"{quote(f'E: {url} is not signed with the declared key: give packages.sources the one that signs it')}"
        " >&2; exit 1;; esac"
        for url in signed
    )
    return [f"code=0; {update} || code=$?", *cases, "test $code = 0"]


def dnf(spec: PackagesSpec, *words: str) -> str:
    """dnf, or yum where there is none, likewise; words: options, action and names."""
    argv = ["-y", "--setopt=exit_on_lock=1", *dnf_sources(spec), *words]
    return f"patiently $dnf {' '.join(map(quote, argv))}"


def dnf_trial(spec: PackagesSpec, *words: str) -> str:
    """Shell that prints the names of the packages that dnf or yum would remove or replace."""
    argv = ["--assumeno", *dnf_sources(spec), *words]
    return f"trial {' '.join(map(quote, argv))}"


# The answer "no" ends dnf with status 1 whatever it would have done; what is really wrong shows again
# when it is done in earnest. Its table has a heading a kind of change, then a line a package; dnf 5
# says below an upgraded one which it replaces, by the same name.
TRIAL = rf"""
trial() {{
  code=0; said=$(timeout {LOCK_SECONDS + 240} "$dnf" "$@" </dev/null 2>/dev/null) || code=$?
  test $code != 124 || {{ echo "$dnf did not say what it would remove: nothing was changed" >&2; exit 1; }}
  printf '%s\n' "$said" | awk '
    /^[A-Z].*:$/ {{ going = /^Removing/ }}
    /^$/ {{ going = 0 }}
    /^ [^ ]/ {{ if (going) print $1; new = $1 }}
    $1 == "replacing" && $2 != new {{ sub(/\.(noarch|x86_64|aarch64|i686)$/, "", $2); print $2 }}'
}}
""".lstrip()


def full_names(manager: Manager, versions: Mapping[str, str]) -> list[str]:
    """Packages at exact versions, as the manager wants them written."""
    mark = "=" if manager == "apt" else "-"
    return [f"{name}{mark}{version}" for name, version in versions.items()]


def removing_only(allowed: Sequence[str], trial: str) -> str:
    """Shell that ends the step when ``trial``, which prints the names that would go, names another."""
    known = quote(" ".join(["", *allowed, ""]))
    return (
        f"gone=$({trial})\n"
        "for name in $gone; do\n"
        f'  case {known} in *" ${{name%%:*}} "*) ;;\n'
        '  *) echo "the installation would remove $name: nothing was changed" >&2; exit 1;; esac\n'
        "done"
    )
