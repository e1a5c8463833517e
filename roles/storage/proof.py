"""Every node reads at once what the head writes to the shared path now."""

from __future__ import annotations

from roles.core.role import Target
from roles.core.steps import quote
from roles.storage.spec import StorageSpec

SCRIPT = r"""
cd "$path" || exit 1
test -s .lockstep/id || exit "$unmarked"
umask 022
nonce=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
file=.lockstep/proof.$nonce
trap 'rm -f "$path/$file"' EXIT
echo "$nonce" >"$file" || exit 1
for node in "$@"; do
  (
    seen=$(timeout 20 ssh -n -o BatchMode=yes -o ConnectTimeout=5 "$node" "$reading$file" 2>/dev/null)
    case $? in
      124) printf 'nfs-server-silent\t%s did not read at %s within 20 s what the head wrote there\t%s\n' "$node" "$path" "$hung"; exit ;;
      255) exit ;;
    esac
    test "$seen" = "$nonce" ||
      printf 'storage-different\t%s does not see at %s what the head wrote there a moment ago\t%s\n' "$node" "$path" "$other"
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
    path = target.spec.path
    settings = {
        "path": path,
        "unmarked": "0" if target.spec.manage == "check" else "1",
        "reading": f"cd -- {quote(path)} && cat ",
        "hung": "look whether the server answers that node (ls there, ping SERVER), then verify again",
        "other": f"mount at {path} on that node what the head has there: a copy of it carries the same mark",
    }
    lines = [f"{key}={quote(value)}\n" for key, value in settings.items()]
    return f"{''.join(lines)}set -- {' '.join(quote(name) for name in others)}\n{SCRIPT}"
