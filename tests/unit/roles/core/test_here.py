"""A program that runs on the control machine for a node."""

from __future__ import annotations

import pytest

from roles.core.here import run_here
from roles.core.session import NodeFailed


def test_what_it_prints_is_said_line_by_line_and_it_reads_nothing() -> None:
    said: list[str] = []
    run_here(("sh", "-c", "echo one; cat; echo two; echo aside >&2"), said.append)
    assert said == ["one", "two"]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("sh", "-c", "echo first >&2; echo last >&2; echo >&2; exit 3"), "last"),
        (("sh", "-c", "exit 3"), "sh ended with status 3 here"),
        (("no-such-program",), "no-such-program cannot be run here: No such file or directory"),
    ],
)
def test_its_end_with_an_error_is_one_sentence(command: tuple[str, ...], reason: str) -> None:
    with pytest.raises(NodeFailed) as failed:
        run_here(command, print)
    assert str(failed.value) == reason


def test_it_ends_with_what_waits_for_it() -> None:
    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # waits for the program, which was told to end
        run_here(("sh", "-c", "echo one; exec sleep 60"), interrupted)
