"""Every node reads at once what the head writes to the shared path now."""

from __future__ import annotations

from roles.core.role import Target
from roles.core.steps import quote
from roles.storage.spec import StorageSpec

SCRIPT = r"""
cd "$path" && test -s .lockstep/id || exit 1
umask 022
nonce=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
file=.lockstep/proof.$nonce
trap 'rm -f "$path/$file"' EXIT
echo "$nonce" >"$file" || exit 1
for node in "$@"; do
  (
    seen=$(timeout 20 ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$node" "$reading$file" 2>/dev/null)
    case $? in 124|255) exit 0 ;; esac
    test "$seen" = "$nonce" ||
      printf 'storage-different\t%s does not see at %s what the head wrote there a moment ago\n' "$node" "$path"
  ) &
done
wait
"""


def proof(target: Target[StorageSpec]) -> str:
    """On the head, where storage is shared: a file of a new name and content, read over ssh on every other node at the same time.

    A node that ssh does not reach is left to the proof of the ssh role.
    """
    others = [node.name for node in target.others]
    if target.spec.kind == "local" or not target.is_head or not others:
        return "true"
    reading = f"cd -- {quote(target.spec.path)} && cat "
    return (
        f"path={quote(target.spec.path)} reading={quote(reading)}\n"
        f"set -- {' '.join(quote(name) for name in others)}\n{SCRIPT}"
    )
