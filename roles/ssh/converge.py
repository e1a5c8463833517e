"""Makes the cluster key on the head, and writes who may enter and whom root trusts on every node.

Files that people edit too are changed on the node in one go, never from an earlier copy of them: a key
that was added meanwhile stays.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence

from roles.core.role import Finding, Peers, Target
from roles.core.steps import Shell, Step, quote, relabel, write_file
from roles.ssh.drift import (
    BLOCK,
    authorized_line,
    cluster_key,
    includes,
    loose_paths,
    stale_lines,
    unchecked,
    wanted_client,
    wanted_known_hosts,
    wanted_server,
    whole,
)
from roles.ssh.probe import (
    CLIENT_CONFIG,
    CLIENT_FILE,
    KNOWN_HOSTS,
    SERVER_CONFIG,
    SERVER_FILE,
    SshState,
)
from roles.ssh.spec import SshSpec

WITHOUT_BLOCK = r"""
{ line[NR] = $0; sub(/[ \t\r]+$/, ""); mark[NR] = $0 }
END {
  for (i = 1; i <= NR; i++) {
    if (mark[i] == b) start = i
    else if (mark[i] == e && start) { for (j = start; j <= i; j++) drop[j] = 1; start = 0 }
  }
  for (i = 1; i <= NR; i++) if (!drop[i] && mark[i] != b && mark[i] != e) print line[i]
}
"""
"""awk: a file without the block between the lines ``b`` and ``e``; a mark without its partner goes."""


def literal(lines: Sequence[str]) -> str:
    """Shell that prints these lines."""
    encoded = base64.b64encode("".join(f"{line}\n" for line in lines).encode()).decode()
    return f"printf %s {encoded} | base64 -d"


def put_block(path: str, printing: str, mode: str) -> str:
    """Shell that puts what other shell prints into Lockstep's block at the end of a file.

    Everything outside the block stays, and so do owner and mode of a file that is there. The file
    before the first time is kept beside it.
    """
    begin, end = f"# lockstep {BLOCK}: begin", f"# lockstep {BLOCK}: end"
    target, fresh, kept = (
        quote(path),
        quote(f"{path}.lockstep-new"),
        quote(f"{path}.before-lockstep"),
    )
    return (
        f"if test -e {target} && ! test -e {kept} && ! grep -qF {quote(begin)} {target}; then\n"
        f"  cp -p {target} {kept}; fi\n"
        f"lines=$({printing})\n"
        f"rm -f {fresh}; (umask 077; : > {fresh}); chown 0:0 {fresh}; chmod {mode} {fresh}\n"
        f"if test -e {target}; then cp -p {target} {fresh}; "
        f"LC_ALL=C awk -v b={quote(begin)} -v e={quote(end)} {quote(WITHOUT_BLOCK)} {target} > {fresh}; fi\n"
        f"printf '%s\\n' {quote(begin)} \"$lines\" {quote(end)} >> {fresh}\n"
        f"mv -f {fresh} {target}\n"
        f"{relabel(path)}"
    )


def make_key(path: str, comment: str) -> str:
    """Shell that leaves a key pair at the path: a key that can be read stays, any other steps aside."""
    key, fresh, public = quote(path), quote(f"{path}.lockstep-new"), quote(f"{path}.pub")
    return (
        f"umask 077; test -d {quote(path.rpartition('/')[0])} || mkdir -m 0700 {quote(path.rpartition('/')[0])}\n"
        f"if test -e {key}; then chown 0:0 {key}; chmod 0600 {key}; fi\n"
        f"if ! ssh-keygen -y -P '' -f {key} >/dev/null 2>&1 </dev/null; then\n"
        f"  if test -e {key}; then mv -f {key} {quote(f'{path}.before-lockstep')}; fi\n"
        f"  rm -f {fresh} {fresh}.pub\n"
        f"  ssh-keygen -q -t ed25519 -N '' -C {quote(comment)} -f {fresh} </dev/null\n"
        f"  rm -f {fresh}.pub; mv -f {fresh} {key}\n"
        f"fi\n"
        f"ssh-keygen -y -P '' -f {key} </dev/null > {fresh}; chmod 0644 {fresh}; mv -f {fresh} {public}"
    )


CONTROL_LOGIN = r"""
from=${SSH_CONNECTION%% *}
if test -n "$from"; then  # sudo leaves it out: root's login then does not matter
  case $(sshd -T -C "user=root,host=$from,addr=$from" | grep '^permitrootlogin ') in *' no'|*forced-commands-only)
    take_back "left alone, because sshd's files hold a PermitRootLogin that would shut out $from, from where this node is managed" ;;
  esac
fi
"""


def add_server_rule(path: str, writing: str) -> str:
    """Shell that changes a file of sshd's configuration, takes the change back if sshd rejects it, and reloads.

    A reload leaves every session alone. It also puts in force what others wrote into those files and
    never loaded, so nothing is reloaded that would turn the control machine's own login away.
    """
    target, before = quote(path), quote(f"{path}.lockstep-old")
    return (
        "PATH=$PATH:/usr/sbin:/sbin; export PATH\n"
        f"rm -f {before}; if test -e {target}; then cp -p {target} {before}; fi\n"
        f"{writing}\n"
        f"take_back() {{ if test -e {before}; then mv -f {before} {target}; else rm -f {target}; fi\n"
        '  echo "$1" >&2; exit 1; }\n'
        "if ! said=$(sshd -t 2>&1); then\n"
        '  take_back "sshd rejects its configuration, so it is left as it was: $said"\n'
        "fi\n"
        f"{CONTROL_LOGIN}"
        f"rm -f {before}\n"
        "if systemctl is-active -q ssh.service 2>/dev/null; then systemctl reload ssh.service\n"
        "elif systemctl is-active -q sshd.service 2>/dev/null; then systemctl reload sshd.service\n"
        'elif test -s /run/sshd.pid && read -r pid < /run/sshd.pid && grep -qx sshd "/proc/$pid/comm"; then\n'
        '  kill -HUP "$pid"\n'
        "fi"
    )


def rewritten(path: str, awk: str) -> str:
    """Shell that passes a file through awk; its owner and mode stay, and its first version beside it."""
    target, fresh, kept = (
        quote(path),
        quote(f"{path}.lockstep-new"),
        quote(f"{path}.before-lockstep"),
    )
    return (
        f"if ! test -e {kept}; then cp -p {target} {kept}; fi\n"
        f"cp -p {target} {fresh}\n"
        f"{awk} {target} > {fresh}; mv -f {fresh} {target}\n"
        f"{relabel(path)}"
    )


def comment_out(path: str, numbers: Sequence[int]) -> str:
    """Shell that comments those lines out, if they still switch host key checking off."""
    chosen = " || ".join(f"NR == {number}" for number in numbers)
    return rewritten(
        path,
        "LC_ALL=C awk '"
        f"({chosen}) && tolower($0) ~ /stricthostkeychecking/ "
        '{ print "# lockstep: host keys are checked: " $0; next } { print }\'',
    )


def forget_keys(path: str, lines: Mapping[str, str]) -> str:
    """Shell that replaces every line that the look showed so; by an empty one means that it goes."""
    pairs = [word for pair in lines.items() for word in pair]
    return rewritten(
        path,
        f"{literal(pairs)} | LC_ALL=C awk '"
        "FNR == NR { if (FNR % 2) line = $0; else instead[line] = $0; next } "
        r'{ line = $0; gsub(/[\200-\377]/, "?", line) } '
        'line in instead { if (instead[line] != "") print instead[line]; next } { print }\' -',
    )


def converge(
    target: Target[SshSpec], state: SshState, peers: Peers, findings: Sequence[Finding]
) -> Iterator[Step]:
    """The key first, then who may enter, then whom root trusts."""
    ids = {found.id for found in findings}
    cluster = target.cluster.name
    if "ssh-key-stray" in ids:
        yield Shell(f"rm -f {quote(state.key_path)} {quote(state.key_path + '.pub')}")
    made = ids & {"ssh-cluster-key", "ssh-key-modes"}
    if made:
        yield Shell(make_key(state.key_path, f"lockstep-{cluster}"))
    if (made and state.authorized != "none") or "ssh-authorized" in ids:
        yield Shell(_authorize(target, state, peers))
    if "ssh-modes" in ids:
        for path, mode in loose_paths(state).items():
            yield Shell(f"chown 0:0 {quote(path)}; chmod {mode} {quote(path)}")
    if "ssh-selinux" in ids:
        yield Shell("\n".join(relabel(path) for path in state.mislabelled))
    if "ssh-root-login" in ids:
        yield Shell(_server_rule(target, state))
    if "ssh-known-hosts" in ids:
        lines = wanted_known_hosts(target, state, peers)
        yield Shell(put_block(KNOWN_HOSTS, literal(lines), "0644"))
    if "ssh-hostkey" in ids:
        for path, stale in stale_lines(target, state, peers).items():
            yield Shell(forget_keys(path, stale))
    if "ssh-config" in ids:
        client = wanted_client(target, state, peers)
        if includes(state.text(CLIENT_CONFIG), "ssh_config.d"):
            yield Shell(write_file(CLIENT_FILE, whole(client), backup=False))
        else:
            yield Shell(put_block(CLIENT_CONFIG, literal(client), "0644"))
    if "ssh-host-check-off" in ids:
        for path, numbers in unchecked(target, state).items():
            if path != CLIENT_FILE:
                yield Shell(comment_out(path, numbers))


def _authorize(target: Target[SshSpec], state: SshState, peers: Peers) -> str:
    """On the head the key may be a moment old, so its public half is read there."""
    folder = quote(state.authorized.rpartition("/")[0])
    key = cluster_key(target, state, peers)
    if target.is_head:
        public = quote(f"{state.key_path}.pub")
        printing = (
            f"read -r type blob rest < {public}; "
            f'printf "restrict,pty %s %s %s" "$type" "$blob" {quote(f"lockstep-{target.cluster.name}")}'
        )
    elif key is not None:
        printing = literal([authorized_line(target.cluster.name, key)])
    else:
        head = target.cluster.head.name
        return (
            f"echo {quote(f'{head} has no cluster key yet: bring {head} right first')} >&2; exit 1"
        )
    return (
        f"test -d {folder} || mkdir -m 0700 {folder}\n{relabel(state.authorized.rpartition('/')[0])}\n"
        + put_block(state.authorized, printing, "0600")
    )


def _server_rule(target: Target[SshSpec], state: SshState) -> str:
    rule = wanted_server(target)
    if includes(state.text(SERVER_CONFIG), "sshd_config.d"):
        return add_server_rule(SERVER_FILE, write_file(SERVER_FILE, whole(rule), backup=False))
    return add_server_rule(SERVER_CONFIG, put_block(SERVER_CONFIG, literal(rule), "0644"))
