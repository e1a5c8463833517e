"""Into a machine past its network: QEMU's guest agent for commands, and the serial console for people.

Both are sockets of QEMU beside the node's disk, and work while sshd, firewall or network of the node are broken.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

LOOK_SECONDS = 3.0
"""How long the agent may take for one answer when somebody only looks."""
COMMAND_SECONDS = 20.0
"""The same where a command waits: on a busy machine, starting a process takes seconds."""
MOST_BYTES = 1 << 16
LEAVE = b"\x1d"
"""Ctrl-] leaves the console, as with telnet."""


class NoAnswer(Exception):
    """The machine is off, boots, or its agent is not there."""


Ask = Callable[[str, dict[str, Any]], Any]
"""The agent's answer to a request and its arguments (QEMU Guest Agent Protocol Reference)."""


@contextlib.contextmanager
def joined(path: Path, seconds: float = LOOK_SECONDS) -> Iterator[Ask]:
    """A short talk with the agent; others wait until it ends. Raises NoAnswer."""
    mark = secrets.randbelow(1 << 31)
    try:
        with socket.socket(socket.AF_UNIX) as agent, agent.makefile("rb") as stream:
            agent.settimeout(seconds)
            agent.connect(str(path))

            def ask(request: str, arguments: dict[str, Any]) -> Any:
                agent.sendall(json.dumps({"execute": request, "arguments": arguments}).encode())
                answer = json.loads(stream.readline())
                if "return" not in answer:
                    raise NoAnswer(str(answer.get("error", {}).get("desc", answer)))
                return answer["return"]

            # 0xFF clears what an earlier question left in the agent's parser, and marks its own answer.
            sync = {"execute": "guest-sync-delimited", "arguments": {"id": mark}}
            agent.sendall(b"\xff" + json.dumps(sync).encode())
            _after_mark(stream, mark)
            yield ask
    except (OSError, ValueError) as error:
        raise NoAnswer(str(error)) from None


def read(path: Path, *names: str) -> str:
    """Files of the machine, one after the other; costs it no process. Raises NoAnswer."""
    found = b""
    with joined(path) as ask:
        for name in names:
            handle = ask("guest-file-open", {"path": name})
            found += base64.b64decode(
                ask("guest-file-read", {"handle": handle, "count": MOST_BYTES})["buf-b64"]
            )
            ask("guest-file-close", {"handle": handle})
    return found.decode(errors="replace")


def _after_mark(stream: Any, mark: int) -> None:
    """Read on to this question's own mark: answers to questions that nobody waited for come first."""
    while line := stream.readline():
        with contextlib.suppress(ValueError):
            if json.loads(line.rpartition(b"\xff")[2]) == {"return": mark}:
                return
    raise ValueError("the agent's line ended")


def begin(path: Path, command: Sequence[str]) -> Any:
    """Start a command as root and return what its state is asked for with. Raises NoAnswer."""
    asked = {"path": command[0], "arg": list(command[1:]), "capture-output": True}
    with joined(path, COMMAND_SECONDS) as ask:
        return ask("guest-exec", asked)


def execute(path: Path, command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command as root. Raises NoAnswer, and TimeoutExpired once it was killed there.

    The return code of one that another signal ended is the signal's number below zero, as subprocess has it.
    """
    bounded = ["timeout", "--signal=KILL", str(seconds), *command]
    started = begin(path, bounded)
    until = time.monotonic() + seconds + 2 * COMMAND_SECONDS
    pause = 0.05
    while time.monotonic() < until:
        with joined(path, COMMAND_SECONDS) as ask:
            state = ask("guest-exec-status", started)
        if state["exited"]:
            out, err = (_text(state.get(name)) for name in ("out-data", "err-data"))
            ended = state.get("signal", 0)
            if ended == signal.SIGKILL:  # so timeout ends itself too
                break
            code = -ended or state.get("exitcode", 1)
            return subprocess.CompletedProcess(list(command), code, out, err)
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    raise subprocess.TimeoutExpired(list(command), seconds)


def _text(encoded: str | None) -> str:
    return base64.b64decode(encoded or "").decode(errors="replace")


def console(path: Path) -> int:
    """Join this terminal to the machine's serial console, until Ctrl-]. Raises NoAnswer."""
    terminal = sys.stdin.fileno()
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(str(path))
        except OSError as error:
            raise NoAnswer(str(error)) from None
        print("serial console; Ctrl-] leaves it", flush=True)
        before = termios.tcgetattr(terminal)
        try:
            tty.setraw(terminal)
            line.sendall(b"\n")
            while True:
                ready = select.select([terminal, line], [], [])[0]
                if terminal in ready:
                    typed = os.read(terminal, 1024)
                    if LEAVE in typed or not typed:
                        return 0
                    line.sendall(typed)
                if line in ready:
                    said = line.recv(4096)
                    if not said:
                        return 0
                    os.write(sys.stdout.fileno(), said)
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
