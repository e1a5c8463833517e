"""Makes a node the NFS server of the cluster: package, file of exports, service; it is never restarted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, write_file
from roles.exports.probe import ExportsState
from roles.exports.spec import DROP_IN, FILE, UNIT, drop_in_text, exports_text, serves
from roles.packages.converge import installing
from roles.packages.names import translated
from roles.packages.spec import PackagesSpec
from roles.storage.spec import StorageSpec, exported

PATH = "PATH=$PATH:/usr/sbin:/sbin\n"
START_SECONDS = 120


def server_packages(state: ExportsState) -> list[str]:
    """The NFS server, by the names of the node's family."""
    return list(translated(state.manager, "nfs-kernel-server"))


def converge(
    target: Target[StorageSpec], state: ExportsState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """Nothing is exported before its options are right; the number of threads comes last."""
    ids = {found.id for found in findings}
    if "nfs-exports-left" in ids:
        yield Shell(
            f"{PATH}rm -f {FILE} {DROP_IN}\nsystemctl daemon-reload\n"
            "if command -v exportfs >/dev/null; then exportfs -ra; fi"
        )
    if not serves(target):
        return
    if "nfs-server-missing" in ids:
        packages = target.cluster.section("packages", PackagesSpec) or PackagesSpec()
        yield installing(packages, state.manager, server_packages(state))
    if "export-missing" in ids:
        yield Shell(f"mkdir -p {quote(exported(target.spec))}")
    if ids:
        yield Shell(_served(target, "nfs-exports" in ids), seconds=START_SECONDS)


def _served(target: Target[StorageSpec], write: bool) -> str:
    """write: the file of exports too, which while a job runs may have to stay as it is."""
    sentence = f"the NFS server does not run: see journalctl -u {UNIT}; the kernel of a container may have none"
    return (
        f"{PATH}{write_file(FILE, exports_text(target), backup=False) if write else ':'}\n"
        f"{write_file(DROP_IN, drop_in_text(target.spec), backup=False)}\n"
        "systemctl daemon-reload\n"
        f"systemctl unmask {UNIT}\n"
        f"systemctl enable {UNIT}\n"
        f"systemctl start {UNIT} || {{ echo {quote(sentence)} >&2; exit 1; }}\n"
        "exportfs -ra\n"
        f"echo {target.spec.threads} > /proc/fs/nfsd/threads || {{ echo {quote(sentence)} >&2; exit 1; }}"
    )
