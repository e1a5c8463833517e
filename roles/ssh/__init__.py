"""ssh: the head enters every node as root by a key of the cluster, and every host key is known beforehand."""

from roles.core.role import Role
from roles.ssh.converge import converge
from roles.ssh.drift import drift
from roles.ssh.probe import SshState, parse, probe
from roles.ssh.proof import proof
from roles.ssh.spec import SshSpec

role: Role[SshSpec, SshState] = Role(
    name="ssh",
    spec=SshSpec,
    default=SshSpec(),
    probe=probe,
    parse=parse,
    drift=drift,
    converge=converge,
    head_first=True,
    proof=proof,
    crossing=True,
    proof_needs=("hosts",),
)
