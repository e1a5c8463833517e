"""The head really enters every node, itself included, without a question."""

from __future__ import annotations

from roles.core.role import Target
from roles.core.steps import quote
from roles.ssh.spec import SshSpec

SCRIPT = r"""
end='
'
for node in "$@"; do
  (
    said=$(timeout 20 ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$node" true 2>&1) && exit 0
    said=$(printf %s "$said" | tr -d '\r\t')
    case $said in
      *'Host key verification failed'*|*'IDENTIFICATION HAS CHANGED'*)
        id=ssh-hostkey fix="lockstep trust $node, where its keys are meant to be new; else ssh -v $node on the head names the file with another one" ;;
      *) id=ssh-unreachable fix="ssh -v $node on the head shows how far it comes: a firewall on the way, or rules of sshd there (AllowUsers, Match), keep it out" ;;
    esac
    said=${said##*"$end"}
    printf '%s\tssh %s from the head: %s\t%s\n' "$id" "$node" "${said:-no answer}" "$fix"
  ) &
done
wait
"""


def proof(target: Target[SshSpec]) -> str:
    """On the head: one login to each node, all at the same time. The other nodes hold no key to try."""
    if not target.is_head:
        return "true"
    return f"set -- {' '.join(quote(name) for name in target.cluster.nodes)}\n{SCRIPT}"
