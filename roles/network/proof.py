"""Every node really reaches every node: on the port of the rendezvous, on a random one, with big packets."""

from __future__ import annotations

from inventory.errors import InventoryProblem
from inventory.job import Job, load_job
from roles.core.role import Target
from roles.core.steps import quote
from roles.network.spec import NetworkSpec

BYTES = 100_000
"""Many full packets: where one on the way is smaller, small ones pass and these are lost in silence."""

ANSWER_SECONDS = 20
"""Until a node that is asked to listen does; logging in to a busy one takes its time."""

LISTEN = rf"""
import errno, socket, sys, threading
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
        error = sys.exc_info()[1]
        if wanted and error.errno == errno.EADDRINUSE:
            continue  # a job runs there; it is not disturbed
        sys.exit(str(error))
    server.listen(64)
    ports.append(str(server.getsockname()[1]))
    thread = threading.Thread(target=serve, args=(server,))
    thread.daemon = True
    thread.start()
sys.stdout.write("\nlistens " + " ".join(ports) + "\n")
sys.stdout.flush()
sys.stdin.read()
"""
"""Python 2.7 and 3. It ends when its standard input does, so nothing outlives the proof."""

TRY = rf"""
export LC_ALL=C
echo
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
echo tried
"""

# What a node prints of its own accord at a login is passed over; what lacks is told, and never taken for right.
SCRIPT = r"""
tab=$(printf '\t')
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
enter() { seconds=$1; shift; exec timeout "$seconds" ssh -o BatchMode=yes -o ConnectTimeout=5 "$@"; }
last() { said=$(sed -n 's/[[:cntrl:]]//g; $p' "$1"); printf %s "${said:-it said nothing}"; }
for each in "$@"; do
  name=${each%%=*} address=${each#*=}
  mkfifo "$work/$name.in" || exit 1
  enter 120 "$name" "for p in python3 /usr/libexec/platform-python python; do if command -v \$p >/dev/null; then exec \$p -c $listen $address $port; fi; done; echo no Python there >&2" \
    <"$work/$name.in" >"$work/$name" 2>"$work/$name.why" &
  echo $! >"$work/$name.pid"
done
# Held open, or the listeners end at once.
for each in "$@"; do
  name=${each%%=*}
  exec 9>"$work/$name.in"
  sleep 120 >&9 9>&- 2>/dev/null &
  echo $! >>"$work/.held"
  exec 9>&-
done
answers() { grep -q '^listens ' "$work/$1" || ! kill -0 "$(cat "$work/$1.pid")" 2>/dev/null; }
left=${answer}0
while test $left -gt 0; do
  waiting=
  for each in "$@"; do answers "${each%%=*}" || { waiting=yes; break; }; done
  test -n "$waiting" || break
  left=$((left - 1)); sleep 0.1
done
list= there=
for each in "$@"; do
  name=${each%%=*}
  ports=$(sed -n 's/^listens //p' "$work/$name")
  if test -n "$ports"; then
    there="$there $name"
    for one in $ports; do list="$list $each=$one"; done
  else
    why="no answer within $answer s"
    ! answers "$name" || why=$(last "$work/$name.why")
    printf 'network-unproved\t%s is left out, because it does not listen at %s: %s\n' "$name" "${each#*=}" "$why"
  fi
done >"$work/.said"
for name in $there; do
  enter 40 -n "$name" "own=$name; set -- $list; $try" >"$work/$name.said" 2>"$work/$name.error" &
  echo $! >>"$work/.tried"
done
test ! -e "$work/.tried" || while read -r one; do wait "$one"; done <"$work/.tried"
for one in $(cat "$work/.held" "$work"/*.pid); do kill "$one" 2>/dev/null; done
for name in $there; do
  grep -qx tried "$work/$name.said" ||
    printf 'network-unproved\t%s ended half way when it called the others: %s\n' "$name" "$(last "$work/$name.error")"
  cat "$work/$name.said"
done | sort -u >>"$work/.said"
while IFS=$tab read -r id said; do
  case $id in
    firewall-between-nodes) fix=$firewall ;;
    mtu-mismatch) fix=$mtu ;;
    network-unproved) fix=$unproved ;;
    *) continue ;;
  esac
  printf '%s\t%s\t%s\n' "$id" "$said" "$fix"
done <"$work/.said"
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

    One that cannot listen or call is named, and the others are proved among themselves. What is wrong here is
    not what converging mends: that shows as drift, and a node with drift takes no part.
    """
    if not target.is_head or not target.others:
        return "true"
    nodes = [f"{node.name}={node.address}" for node in target.cluster.nodes.values()]
    firewall = (
        "declare network.firewall as open, or let the nodes' addresses in where that port is closed"
        if target.spec.firewall == "leave"
        else "the node that is called lets the caller in, unless rules of iptables there say otherwise "
        "(iptables -S INPUT): take those out, or open the firewall on the way between the two"
    )
    settings = {
        "listen": quote(LISTEN),
        "try": TRY,
        "port": str(rendezvous_port(target)),
        "answer": str(ANSWER_SECONDS),
        "firewall": firewall,
        "mtu": "let every switch and bridge on the way carry the nodes' packets (ping -M do -c 2 -s $((MTU - 28)) "
        "ADDRESS shows whether they do), or declare network.mtu as what the way carries",
        "unproved": "let the head enter that node by ssh and run python3 there, then verify again",
    }
    lines = [f"{key}={quote(value)}" for key, value in settings.items()]
    return "\n".join([*lines, f"set -- {' '.join(map(quote, nodes))}"]) + SCRIPT
