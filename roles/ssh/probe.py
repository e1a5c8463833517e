"""What a node's sshd, its ssh client and root's ssh files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from roles.core.role import Target, Unreadable, whole
from roles.core.steps import quote
from roles.ssh.spec import SshSpec

KEY = "id_lockstep"
"""The cluster key's file name in root's ``.ssh``."""
KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"
CLIENT_CONFIG = "/etc/ssh/ssh_config"
CLIENT_FILE = "/etc/ssh/ssh_config.d/lockstep.conf"
SERVER_CONFIG = "/etc/ssh/sshd_config"
SERVER_FILE = "/etc/ssh/sshd_config.d/00-lockstep.conf"
"""Among Match blocks the first value wins, so ours is read first."""
ALWAYS = {"permitrootlogin", "pubkeyauthentication", "strictmodes"}
"""Settings that every ``sshd -T`` shows."""


@dataclass(frozen=True, order=True)
class PublicKey:
    """One public key. type: as in ``ssh-ed25519``. blob: base64."""

    type: str
    blob: str


@dataclass(frozen=True)
class Mode:
    """Permission bits and owner of a file or directory."""

    bits: int
    owner: int

    def open_to(self, mask: int) -> bool:
        """Others may do what the mask says, or the owner is not root."""
        return bool(self.bits & mask) or self.owner != 0


@dataclass(frozen=True)
class SshState:
    """hostname: the kernel's name of the node. home: root's home directory.

    client: ssh and ssh-keygen are there.
    server: sshd's effective settings for root coming from the head; None where there is no sshd.
    refusal: why sshd rejects its configuration; the settings are then empty.
    host_keys: sshd's public keys. authorized: the file where sshd looks for root's keys, or "none".
    key: the public half of the private key on the head; None without one, or when it cannot be read.
    modes, files: by path; a path that does not exist is absent. Bytes above 127 read as "?".
    mislabelled: paths whose SELinux context is not the policy's; empty where SELinux is off.
    """

    hostname: str
    home: str
    client: bool
    server: Mapping[str, str] | None
    refusal: str
    host_keys: tuple[PublicKey, ...]
    authorized: str
    key: PublicKey | None
    modes: Mapping[str, Mode] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    mislabelled: tuple[str, ...] = ()

    @property
    def own_known_hosts(self) -> str:
        """Root's own list of known host keys."""
        return f"{self.home}/.ssh/known_hosts"

    @property
    def key_path(self) -> str:
        """Where the private half of the cluster key lies on the head."""
        return f"{self.home}/.ssh/{KEY}"

    def text(self, path: str) -> str:
        """A file's text; empty where there is none."""
        return self.files.get(path, "")


SCRIPT = r"""
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin LC_ALL=C; export PATH LC_ALL
home=~root
IFS= read -r name </proc/sys/kernel/hostname; echo "hostname $name"; echo "home $home"
if test -e "$home/.ssh"; then cd "$home/.ssh" || exit 1; fi
cd "$home" && cd / || exit 1
if command -v ssh >/dev/null && command -v ssh-keygen >/dev/null; then echo 'client yes'; else echo 'client no'; fi
authorized=.ssh/authorized_keys keys=
if ! command -v sshd >/dev/null; then
  echo 'server no'
elif seen=$(sshd -T -C "user=root,host=$head,addr=$address" 2>&1); then
  echo 'server yes'
  while read -r word rest; do
    case $word in
      authorizedkeysfile) authorized=${rest%% *} ;;
      hostkey) keys="$keys $rest" ;;
      permitrootlogin|pubkeyauthentication|strictmodes|authenticationmethods|allowusers|denyusers|allowgroups|denygroups)
        echo "set $word $rest" ;;
    esac
  done <<EOF
$seen
EOF
else
  echo 'server refuses'
  while read -r rest; do echo "refusal $rest"; done <<EOF
$seen
EOF
fi
test -n "$keys" || keys='/etc/ssh/ssh_host_ecdsa_key /etc/ssh/ssh_host_ed25519_key /etc/ssh/ssh_host_rsa_key'
for path in $keys; do
  if test -e "$path.pub"; then
    read -r word rest <"$path.pub" || test -n "$word" || continue
    echo "hostkey $word ${rest%% *}"
  elif test -e "$path"; then
    rest=$(ssh-keygen -y -P '' -f "$path" </dev/null) || exit 1
    echo "hostkey $rest"
  fi
done
case $authorized in *%*)
  authorized=$(printf %s "$authorized" | sed "s,%h,$home,g;s,%u,root,g;s,%U,0,g;s,%%,%,g") || exit 1 ;;
esac
case $authorized in none|/*) ;; *) authorized=$home/$authorized ;; esac
echo "authorized $authorized"
key=$home/.ssh/id_lockstep
set --
for path in "$home" "$home/.ssh" "${authorized%/*}" "$authorized" "$key"; do
  if test -e "$path"; then set -- "$@" "$path"; fi
done
stat -L -c 'mode %a %u %n' -- "$@" || exit 1
if test -e /sys/fs/selinux/enforce && command -v restorecon >/dev/null; then
  restorecon -n -v "$@" 2>/dev/null | while read -r _ _ path _; do echo "label $path"; done
fi
if test "$is_head" = yes && test -e "$key"; then
  if seen=$(ssh-keygen -y -P '' -f "$key" 2>/dev/null </dev/null); then echo "key $seen"; else echo key; fi
fi
set --
for path in "$authorized" "$home/.ssh/config" "$home/.ssh/known_hosts" "$key.pub" /etc/ssh/ssh_known_hosts /etc/ssh/ssh_config \
  /etc/ssh/ssh_config.d/*.conf /etc/ssh/sshd_config /etc/ssh/sshd_config.d/00-lockstep.conf; do
  if test -s "$path"; then set -- "$@" "$path"; fi
done
test $# = 0 || awk 'FNR == 1 { print "file " FILENAME } { gsub(/[\200-\377]/, "?"); print "|" $0 }' "$@" || exit 1
echo end
"""


def probe(target: Target[SshSpec]) -> str:
    """One fork each for sshd, stat and awk; on the head one more for ssh-keygen."""
    head = target.cluster.head
    return (
        f"head={quote(head.name)} address={quote(head.address)} is_head={'yes' if target.is_head else 'no'}"
        f"{SCRIPT}"
    )


def public_key(text: str) -> PublicKey:
    """The key in ``type blob [comment]``. Raises Unreadable."""
    words = text.split()
    if len(words) < 2 or not words[1].startswith("AAAA"):
        raise Unreadable(f"{text[:60]!r} is no public key")
    return PublicKey(words[0], words[1])


@whole
def parse(text: str) -> SshState:
    """The state that ``probe`` printed."""
    single: dict[str, str] = {}
    settings: dict[str, str] = {}
    refusal: list[str] = []
    host_keys: set[PublicKey] = set()
    modes: dict[str, Mode] = {}
    files: dict[str, list[str]] = {}
    mislabelled: list[str] = []
    current: list[str] | None = None
    for line in text.split("\n"):
        kind, _, rest = line.partition(" ")
        if line.startswith("|"):
            if current is None:
                raise Unreadable("a line belongs to no file")
            current.append(line[1:])
        elif kind in ("hostname", "home", "client", "server", "authorized", "key"):
            single[kind] = rest
        elif kind == "set":
            word, _, value = rest.partition(" ")
            settings[word] = f"{settings[word]} {value}" if word in settings else value
        elif kind == "refusal":
            refusal.append(rest)
        elif kind == "hostkey":
            host_keys.add(public_key(rest))
        elif kind == "label":
            mislabelled.append(rest)
        elif kind == "mode":
            bits, owner, path = rest.split(" ", 2)
            modes[path] = Mode(int(bits, 8), int(owner))
        elif kind == "file":
            current = files.setdefault(rest, [])
        else:
            raise Unreadable(f"{line[:60]!r} is not understood")
    if single["server"] not in ("yes", "no", "refuses") or single["client"] not in ("yes", "no"):
        raise Unreadable("neither yes nor no")
    if single["server"] == "yes" and not settings.keys() >= ALWAYS:
        raise Unreadable("sshd does not show all its settings")
    key = single.get("key")
    return SshState(
        hostname=single["hostname"],
        home=single["home"],
        client=single["client"] == "yes",
        server=None if single["server"] == "no" else settings,
        refusal="; ".join(refusal) or ("no reason given" if single["server"] == "refuses" else ""),
        host_keys=tuple(sorted(host_keys)),
        authorized=single["authorized"],
        key=public_key(key) if key else None,
        modes=modes,
        files={path: "".join(f"{line}\n" for line in content) for path, content in files.items()},
        mislabelled=tuple(dict.fromkeys(mislabelled)),
    )
