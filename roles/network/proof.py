"""Every node really reaches every node: on the port of the rendezvous, on a random one, with big packets."""

from __future__ import annotations

from inventory.errors import InventoryProblem
from inventory.job import Job, load_job
from roles.core.role import Target
from roles.core.steps import quote
from roles.network.spec import NetworkSpec

BYTES = 100_000
"""Many full packets: where one on the way is smaller, small ones pass and these are lost in silence."""

LISTEN = rf"""
import socket, sys, threading, time
address, port = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
def serve(server):
    while True:
        peer = server.accept()[0]
        threading.Thread(target=answer, args=(peer,)).start()
def answer(peer):
    left = {BYTES}
    while left > 0:
        got = peer.recv(65536)
        if not got:
            break
        left -= len(got)
    if left == 0:
        peer.sendall(b"ok\n")
    peer.close()
ports = []
for wanted in (port, 0):
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((address, wanted))
    except socket.error:
        continue  # a job runs there; it is not disturbed
    server.listen(64)
    ports.append(str(server.getsockname()[1]))
    thread = threading.Thread(target=serve, args=(server,))
    thread.daemon = True
    thread.start()
sys.stdout.write(" ".join(ports) + "\n")
sys.stdout.flush()
sys.stdin.read()
"""
"""Python 2.7 and 3. It ends when its standard input does, so nothing outlives the proof."""

TRY = rf"""
export LC_ALL=C
for each in "$@"; do
  (
    name=${{each%%=*}} rest=${{each#*=}} port=${{each##*=}}
    address=${{rest%=*}}
    said=$(timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$address" "$port" 2>&1)
    case $? in
      0) ;;
      124) printf 'firewall-between-nodes\t%s does not reach %s at %s, port %s: no answer\n' "$own" "$name" "$address" "$port"; exit ;;
      *) said=$(printf '%s' "$said" | sed -n '1s/.*: //p'); printf 'firewall-between-nodes\t%s does not reach %s at %s, port %s: %s\n' "$own" "$name" "$address" "$port" "$said"; exit ;;
    esac
    said=$(timeout 5 bash -c 'exec 3<>"/dev/tcp/$0/$1" && head -c {BYTES} /dev/zero >&3 && read -r -u 3 word && echo "$word"' "$address" "$port" 2>/dev/null)
    test "$said" = ok ||
      printf 'mtu-mismatch\t%s reaches %s at %s, but big packets are lost on the way\n' "$own" "$name" "$address"
  ) &
done
wait
"""

SCRIPT = r"""
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
enter() { timeout 25 ssh -o BatchMode=yes -o ConnectTimeout=5 "$@"; }
for each in "$@"; do
  name=${each%%=*} address=${each#*=}
  mkfifo "$work/$name.in" || exit 1
  { enter "$name" "for p in python3 /usr/libexec/platform-python python; do if command -v \$p >/dev/null; then exec \$p -c $listen $address $port; fi; done; echo none" \
      <"$work/$name.in" >"$work/$name" 2>/dev/null || :; } &
done
# Held open, or the listeners end at once.
for each in "$@"; do
  name=${each%%=*}
  exec 9>"$work/$name.in"
  sleep 20 >&9 9>&- & echo $! >>"$work/.held"
  exec 9>&-
done
left=80
while test $left -gt 0; do
  waiting=
  for each in "$@"; do test -s "$work/${each%%=*}" || waiting=yes; done
  test -n "$waiting" || break
  left=$((left - 1)); sleep 0.1
done
list=
for each in "$@"; do
  name=${each%%=*}
  if read -r ports <"$work/$name" 2>/dev/null && test "$ports" != none; then
    for one in $ports; do list="$list $each=$one"; done
  fi
done
for each in "$@"; do
  name=${each%%=*}
  test -z "$list" || enter -n "$name" "own=$name; set -- $list; $try" 2>/dev/null >"$work/$name.said" &
  echo $! >>"$work/.tried"
done
while read -r one; do wait "$one"; done <"$work/.tried"
while read -r one; do kill "$one" 2>/dev/null; done <"$work/.held"
for each in "$@"; do cat "$work/${each%%=*}.said" 2>/dev/null; done | sort -u
exit 0
"""


def rendezvous_port(target: Target[NetworkSpec]) -> int:
    """The first port that the declared job would take; without a job, that of any job."""
    if target.cluster.job is not None:
        try:
            return load_job(target.cluster.job).port_range[0]
        except InventoryProblem:
            pass
    return Job.port_range[0]


def proof(target: Target[NetworkSpec]) -> str:
    """On the head, over ssh: all nodes listen on their addresses, and each calls all, itself too.

    A node that ssh does not reach is left to the proof of the ssh role; one without Python only calls.
    """
    if not target.is_head or not target.others:
        return "true"
    nodes = [f"{node.name}={node.address}" for node in target.cluster.nodes.values()]
    settings = {"listen": quote(LISTEN), "try": TRY, "port": str(rendezvous_port(target))}
    lines = [f"{key}={quote(value)}" for key, value in settings.items()]
    return "\n".join([*lines, f"set -- {' '.join(map(quote, nodes))}"]) + SCRIPT
