"""The clocks themselves, past chrony: the head asks every node for its time and corrects for the way."""

from __future__ import annotations

from roles.core.role import Target
from roles.core.steps import quote
from roles.time.probe import OWN_CLOCK
from roles.time.spec import TimeSpec

ROUNDS = 6
"""Questions over one connection; the one with the shortest way there and back counts."""

SEEN_SOON = (
    "wait two minutes, until chrony there has seen it, then run pyinfra inventory.py deploy/cluster.py; "
    "where it comes back, something else sets that clock, such as the hypervisor"
)

# A time is taken before the question and after the answer; the node's own lies in the middle between
# them, give or take half the way. Only what is too far off for certain is told.
_SCRIPT = r"""
export LC_ALL=C
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
for node in "$@"; do
  (
    mkfifo "$dir/$node.ask" "$dir/$node.answer" || exit 1
    timeout 20 ssh -o BatchMode=yes -o ConnectTimeout=5 "$node" \
      "exec sh -c 'while read -r x; do date +%s.%N; done'" <"$dir/$node.ask" >"$dir/$node.answer" 2>/dev/null &
    exec 3>"$dir/$node.ask" 4<"$dir/$node.answer"
    trap '' PIPE
    i=0
    while test $i -lt "$rounds"; do
      i=$((i + 1))
      before=$(date +%s.%N)
      echo x >&3 2>/dev/null || break
      read -r there <&4 || break
      echo "$before $there $(date +%s.%N)"
    done | awk -v bound="$bound" -v node="$node" -v head="$head" -v fix="$fix" '
      NF == 3 { way = $3 - $1; if (!n++ || way < least) { least = way; off = $2 - ($1 + $3) / 2 } }
      END {
        size = off < 0 ? -off : off
        if (n && size - least / 2 > bound)
          printf "rdzv-clock-skew\tthe clock of %s is %.3f s %s that of %s (measured to %.3f s), more than %g s\t%s\n",
            node, size, off < 0 ? "behind" : "ahead of", head, least / 2, bound, fix
      }'
  ) &
done
wait
"""


def proof(target: Target[TimeSpec]) -> str:
    """On the head: every other node's clock against its own, all at the same time.

    A node that ssh does not reach is left to the proof of the ssh role.
    """
    if not target.is_head:
        return "true"
    lines = []
    if target.spec.servers:
        sentence = f"none of {', '.join(target.spec.servers)} answers: the head keeps the time by its own clock"
        fix = "open UDP port 123 from the head to one of them, or declare others under time.servers"
        lines.append(
            f"case $(chronyc -n -c tracking) in {OWN_CLOCK},*) printf 'time-no-server\\t%s\\t%s\\n' {quote(sentence)} {quote(fix)};; esac"
        )
    if target.others:
        names = " ".join(quote(node.name) for node in target.others)
        lines += [
            f"bound={target.spec.max_offset} rounds={ROUNDS} head={quote(target.node.name)}",
            f"fix={quote(SEEN_SOON)}",
            f"set -- {names}",
            _SCRIPT.strip(),
        ]
    return "\n".join(lines) or "true"
