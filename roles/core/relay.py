"""Lets one node take a file, or files, from another over SSH, with a key that is good for this once.

The taker makes the key; its private half never leaves it and lies in memory (``/run``). The giver lets it
in as the user as whom the control machine comes, from the taker's address alone, to read this and nothing else, and
takes its line out of authorized_keys when the key is first used. A key that is never used because the run
was killed expires within minutes; the next look finds its line when it has, and at once when the giver was
restarted. No port is opened, and no node trusts another longer than that.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import gevent
from pyinfra.api.host import Host

from inventory.cluster import Node
from roles.core import session
from roles.core.steps import UNATTENDED_SSH, Upload, quote

MARK = "lockstep-relay-"
"""Begins the comment of a one-time key's line."""
FOLDER = ".ssh/lockstep-relay"
"""In the giver's home: one script for each key that was not used yet."""
EXPIRY_MINUTES = 10
STALE_TENTHS = 600
"""Tenths of a second that a giver waits for its own file to grow."""
SECONDS = 30
"""Time limit of the commands around the transfer itself: a node that answers nothing for so long is dead."""
POLL_SECONDS = 5


class Refused(Exception):
    """A node cannot give the file; the message says why."""


def taken(node: Host, script: str, seconds: int, look: Callable[[], None]) -> None:
    """Run what takes something on the node. look: see how far it is, now and then, and that the node still answers.

    Raises Refused, or NodeFailed where the node is dead.
    """
    taking = gevent.spawn(_why_failed, node, script, seconds)
    try:
        while taking.ready() is False:
            taking.join(POLL_SECONDS)
            if not taking.ready():
                look()
    finally:
        taking.kill()
    if taking.value is not None:
        session.run(node, "true", SECONDS)  # one that died says nothing about the giver
        raise Refused(taking.value)


def _why_failed(node: Host, script: str, seconds: int) -> str | None:
    """Run the script; why it failed, or None. (gevent prints what a greenlet raises.)"""
    try:
        session.run(node, script, seconds)
    except session.NodeFailed as error:
        return str(error)
    return None


def say_refused(node: Host, giver: str, what: str, why: Refused) -> None:
    """Tell the user that a giver drops out."""
    sentence = f"{giver} gives no more of {what}, so it comes from elsewhere: {why}"
    session.say(node, sentence, "yellow")


LOGIN = r"""
PATH=$PATH:/usr/sbin:/sbin LC_ALL=C; export PATH LC_ALL
umask 077
cd || exit 1
boot="# $(cat /proc/sys/kernel/random/boot_id) $(sed 's/.*) \([^ ]* \)\{19\}\([^ ]*\).*/\2/' /proc/1/stat)" || :
settings=$(sshd -T -C "user=$USER,host=$taker,addr=$taker" 2>/dev/null) || :  # root alone may ask
authorized=$(printf '%s\n' "$settings" | sed -n 's/^authorizedkeysfile \([^ ]*\).*/\1/p')
authorized=$(printf %s "${authorized:-.ssh/authorized_keys}" | sed "s,%h,$HOME,g;s,%u,$USER,g;s,%%,%,g")
case $authorized in none) ;; *) authorized=$(readlink -m "$authorized") ;; esac
"""
"""Shell that sets $settings, sshd's for who comes from $taker, $authorized, the file with his keys, and $boot.

Containers of one machine share the boot's id, so $boot also has when the first process started; a user from
whom /proc hides that process lacks it.
"""


GIVE = r"""
case $SSH_ORIGINAL_COMMAND in ''|*[!0-9]*) echo 'it wants the place to begin' >&2; exit 1;; esac
waited=0
until { test -f "$whole" && command exec 3<"$whole"; } || { test -f "$part" && command exec 3<"$part"; }; do
  waited=$((waited + 1))
  if test "$waited" -gt "$stale"; then echo 'it has nothing of it' >&2; exit 1; fi
  sleep 0.1
done
tail -c "+$((SSH_ORIGINAL_COMMAND + 1))" <&3 || exit 1
waited=0 last=
while read -r _ at <"/proc/$$/fdinfo/3"; do
  if test "$at" -ge "$size"; then exit 0; fi
  if ! test -e "$part" && ! test -e "$whole"; then echo 'it has it no more' >&2; exit 1; fi
  if test "$at" = "$last"; then waited=$((waited + 1)); else waited=0 last=$at; fi
  if test "$waited" -gt "$stale"; then echo 'it gets no more of it' >&2; exit 1; fi
  sleep 0.1
  cat <&3 || exit 1
done
"""
"""What a giver runs for the taker: the file from the asked byte on, also while it still grows."""


STALE = f"""
sed -n 's/.* \\({MARK}[0-9a-f]*\\)$/\\1/p' "$authorized" 2>/dev/null | while read -r mark; do
  born=
  if test -f "{FOLDER}/$mark"; then read -r born <"{FOLDER}/$mark" || :; fi
  case "$boot " in
    "$born "*) test -n "$(find "{FOLDER}/$mark" -mmin -{EXPIRY_MINUTES} 2>/dev/null)" || echo "$mark" ;;
    *) echo "$mark" ;;
  esac
done
"""
"""Shell that prints the comments of the lines in $authorized that no run will use any more.

Their script is gone, of an earlier boot, or older than the key may get.
"""


def drop(marks: str) -> str:
    """Shell that takes lines out of $authorized, and their scripts away.

    marks: shell that prints the lines' comments. At a power cut, and on a full disk, there is the old file or
    the new one; lines of other keys stay byte for byte, also where they are no text (``grep -a``).
    """
    kept = f'grep -a -v -F -f {FOLDER}/drop "$authorized" >"$authorized.lockstep-new"'
    return (
        f"mkdir -p -m 0700 {FOLDER}\nexec 9>>{FOLDER}/lock\nflock -w 20 9\n"
        f"{{ {marks.strip()}\n}} >{FOLDER}/drop\n"
        f'if test -s {FOLDER}/drop && test -f "$authorized"; then\n'
        '  if cp -p "$authorized" "$authorized.lockstep-new" &&\n'
        f"    {{ {kept} || test $? = 1; }} &&\n"  # 1: no line stays
        '    sync "$authorized.lockstep-new"; then\n'
        '    mv -f "$authorized.lockstep-new" "$authorized"\n'
        '    if test -e /sys/fs/selinux/enforce; then restorecon "$authorized" || :; fi\n'
        '  else rm -f "$authorized.lockstep-new"; fi\n'
        "fi\n"
        f"(cd {FOLDER}; xargs rm -f <drop)\n"
        f"find {FOLDER} -name '{MARK}*' -mmin +{EXPIRY_MINUTES} -exec rm -f {{}} +\n"  # the power went before its line
        "exec 9>&-\n"
    )


def stale(user: str, taker: str) -> str:
    """Shell for root that prints the names of what killed runs left in this user's authorized_keys.

    taker: where keys are used from: sshd may read another file for him who comes from there.
    """
    return f"(\nHOME=~{user} USER={user} taker={quote(taker)}{LOGIN}{STALE.strip()}\n)\n"


def sweep(user: str, taker: str) -> str:
    """Shell for root that takes out what ``stale`` prints."""
    return (
        f"HOME=~{user} USER={user} taker={quote(taker)}{LOGIN}{drop(STALE)}"
        f"chown {user} {FOLDER} {FOLDER}/*\n"
    )


def file_gift(step: Upload) -> str:
    """Shell for the giver: this one file, from the byte on that is asked for."""
    return f"whole={quote(step.destination)} part={quote(str(step.part))} size={step.size} stale={STALE_TENTHS}{GIVE}"


def _grant(gift: str, mark: str, taker: str, key: str) -> str:
    """Shell for the giver: the key may have this gift once, from that address; prints the host's keys."""
    script = f"cd\n(\n{drop(f'echo {mark}')}) </dev/null >/dev/null 2>&1 &\n{gift}"
    encoded = base64.b64encode(script.encode()).decode()
    line = f'restrict,from=\\"$taker\\"$expiry,command=\\"exec sh {FOLDER}/{mark}\\" {key} {mark}'
    return (
        f"set -e\ntaker={quote(taker)}{LOGIN}"
        'if test "$authorized" = none; then echo "its sshd reads no authorized_keys" >&2; exit 1; fi\n'
        f'{drop(STALE)}{{ printf "%s\\nauthorized=\'%s\'\\n" "$boot" "$authorized"; printf %s {encoded} | base64 -d; }} >{FOLDER}/{mark}\n'
        "version=$(ssh -V 2>&1 | sed -n 's/[^0-9]*\\([0-9]*\\)\\.\\([0-9]*\\).*/\\1 \\2/p')\n"
        "set -- ${version:-0 0}\nexpiry=\n"
        'if test "$(($1 * 100 + $2))" -ge 707; then  # earlier ones refuse a line that has it\n'
        f'  expiry=",expiry-time=\\"$(date -d \'+{EXPIRY_MINUTES} minutes\' +%Y%m%d%H%M)\\""\nfi\n'
        f"exec 9>>{FOLDER}/lock\nflock -w 20 9\n"
        'test -d "${authorized%/*}" || mkdir -m 0700 "${authorized%/*}"\n'
        'if test -s "$authorized" && test -n "$(tail -c 1 "$authorized")"; then echo >>"$authorized"; fi\n'
        f'printf "%s\\n" "{line}" >>"$authorized"\nexec 9>&-\n'
        "keys=$(printf '%s\\n' \"$settings\" | sed -n 's/^hostkey //p')\n"
        'for key in ${keys:-/etc/ssh/ssh_host_*_key}; do cat "${key%.pub}.pub" || :; done\n'
    )


@dataclass(frozen=True)
class Way:
    """How the taker comes to the giver's gift. opening: shell that must come first. ssh: the command, as words of
    the shell; login: whom it is to enter."""

    opening: str
    ssh: str
    login: str


def _way(mark: str, giver: Node, host_keys: list[str]) -> Way:
    known = "".join(f"{giver.name} {key}\n" for key in host_keys)
    options = " ".join(
        f"-o {option}"
        for option in (
            *UNATTENDED_SSH,
            "IdentitiesOnly=yes",
            "UserKnownHostsFile=$folder/known",
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=yes",
            f"HostKeyAlias={giver.name}",
        )
    )
    opening = (
        f"folder=/run/{mark}\ntrap 'rm -rf \"$folder\"' EXIT\ntrap 'exit 1' HUP INT TERM\n"
        'exec 8<"$folder"\nflock -n 8 || exit 1\n'  # as long as it is used, nobody sweeps it
        f'printf %s {base64.b64encode(known.encode()).decode()} | base64 -d >"$folder/known" || exit 1\n'
    )
    ssh = f"ssh -F /dev/null -T -i $folder/key {options} -p {giver.ssh.port}"
    return Way(opening, ssh, f"{giver.ssh.user}@{quote(giver.address)}")


def _take(step: Upload, way: Way) -> str:
    """Shell for the taker: what its part lacks, written behind what is there."""
    part = quote(str(step.part))
    return (
        f"{way.opening}at=$(stat -c %s {part} 2>/dev/null) || at=0\n"
        # What has reached the disk on the way need not be waited for at the end.
        f"while sleep 2 && kill -0 $$; do sync {part}; done </dev/null >/dev/null 2>&1 &\n"
        # Two that write the same bytes to the same places, as after a killed run, do no harm.
        f'{way.ssh} {way.login} "$at" 2>"$folder/said" </dev/null | '
        f'dd of={part} bs=64k oflag=seek_bytes seek="$at" conv=notrunc status=none || exit 1\n'
        f'if test "$(stat -c %s {part})" != {step.size}; then\n'
        '  tail -n 1 "$folder/said" | grep . >&2 || echo "the connection was lost" >&2; exit 1\nfi\n'
    )


def _make(mark: str, before: str) -> str:
    """Shell for the taker that prints the key that it made; what killed runs left, whose keys expired, goes.

    before: shell that it runs first.
    """
    return (
        f"set -e\n{before} >/dev/null\n"
        f"for old in /run/{MARK}*; do\n"
        f'  if test -n "$(find "$old" -maxdepth 0 -mmin +{EXPIRY_MINUTES} 2>/dev/null)"; then\n'
        '    flock -n "$old" rm -rf "$old" || :\n  fi\ndone\n'
        f"umask 077\nmkdir /run/{mark}\n"
        f"if command -v ssh >/dev/null && ssh-keygen -q -t ed25519 -N '' -C {mark} -f /run/{mark}/key </dev/null\n"
        f"then cut -d ' ' -f 1,2 /run/{mark}/key.pub; fi"
    )


@contextmanager
def opened(
    step: Upload, giver: Host, taker: Host, places: Mapping[str, Node], before: str
) -> Iterator[str]:
    """Shell for the taker that takes the rest of the file; nothing of the key stays after it.

    before: shell that the taker runs first.
    Raises Refused when the giver cannot be asked or the taker makes no key, NodeFailed when the taker is dead.
    """
    with entered(file_gift(step), giver, taker, places, before) as way:
        yield _take(step, way)


@contextmanager
def entered(
    gift: str, giver: Host, taker: Host, places: Mapping[str, Node], before: str
) -> Iterator[Way]:
    """The taker's way to a gift, which is shell that the giver runs as the user as whom the control machine comes.

    Else as ``opened``.
    """
    mark = f"{MARK}{secrets.token_hex(8)}"
    made, address = session.run(taker, _make(mark, before), SECONDS), places[taker.name].address
    try:
        if not made.stdout.strip():
            raise Refused(f"no ssh on {taker.name} that makes a key")
        try:
            answer = session.run(
                giver, _grant(gift, mark, address, made.stdout.strip()), SECONDS, root=False
            ).stdout
        except session.NodeFailed as error:
            raise Refused(str(error)) from None
        host_keys = [" ".join(line.split()[:2]) for line in answer.splitlines() if line.strip()]
        yield _way(mark, places[giver.name], host_keys)
    except BaseException:
        with suppress(session.NodeFailed):
            session.run(
                giver, f"taker={quote(address)}{LOGIN}{drop(f'echo {mark}')}", SECONDS, root=False
            )
        with suppress(session.NodeFailed):
            session.run(taker, f"rm -rf /run/{mark}", SECONDS)
        raise
