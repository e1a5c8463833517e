"""No parser takes a broken answer for a right node: cut, garbled, translated or drowned, it is Unreadable.

The answers are those of two converged nodes of the lab (``looks/``) and what each role has recorded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from roles import registry
from roles.core.look import AnyRole, Section, _parsed, split, target_of
from roles.core.role import Unreadable
from roles.core.session import NodeFailed

HERE = Path(__file__).parent
LOOKS = HERE / "looks"
CLUSTER = registry.read(LOOKS / "cluster.yaml")
ROLES = {role.name: role for role in registry.ROLES}


def look(node: str) -> str:
    return (LOOKS / f"{node}.txt").read_text().rstrip("\n")


SECTIONS: dict[str, dict[str, Section]] = {node: split(look(node), "") for node in CLUSTER.nodes}


@dataclass(frozen=True)
class Answer:
    """What a role's probe printed once, on a node or in a recording."""

    role: AnyRole
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.role.name}-{self.name}"


def answers() -> Iterator[Answer]:
    for node, sections in SECTIONS.items():
        for name, section in sections.items():
            yield Answer(ROLES[name], node, section.text)
    for path in sorted(HERE.glob("*/recorded/*.txt")):
        text = path.read_text().rstrip("\n")
        if text.endswith("\nend"):
            yield Answer(ROLES[path.parent.parent.name], path.stem, text)


ANSWERS = list(answers())
each_answer = pytest.mark.parametrize("answer", ANSWERS, ids=str)


UNREADABLE = object()


def parsed(answer: Answer, text: str) -> Any:
    """The state, or UNREADABLE; anything else that is raised fails the test."""
    try:
        return answer.role.parse(text)
    except Unreadable as error:
        assert str(error).strip() and "\n" not in str(error).strip()
        return UNREADABLE


def judged(answer: Answer, text: str) -> list[str] | None:
    """The ids of the findings on a node that answers this; None where it is Unreadable."""
    state = parsed(answer, text)
    if state is UNREADABLE:
        return None
    node = answer.name if answer.name in CLUSTER.nodes else "node1"
    target = target_of(answer.role, CLUSTER, node)
    if target is None:
        return []
    others = {
        name: answer.role.parse(sections[answer.role.name].text)
        for name, sections in SECTIONS.items()
        if name != node
    }
    return [finding.id for finding in answer.role.drift(target, state, others)]


def test_every_role_has_a_recorded_answer() -> None:
    assert {answer.role.name for answer in ANSWERS} == set(ROLES)


def test_the_recorded_nodes_are_right() -> None:
    """All but what this machine lacks: the archive, and this checkout's own wheel of the trainer."""
    wrong = {
        found
        for answer in ANSWERS
        if answer.name in CLUSTER.nodes
        for found in judged(answer, answer.text) or ()
    }
    assert wrong <= {"environment-archive", "trainer-version", "trainer-edited"}, wrong


@each_answer
def test_an_answer_that_is_cut_anywhere_is_unreadable(answer: Answer) -> None:
    for length in range(len(answer.text)):
        with pytest.raises(Unreadable):
            answer.role.parse(answer.text[:length])


def test_a_look_that_is_cut_anywhere_fails_as_a_whole() -> None:
    text = look("node1")
    for length in range(len(text)):
        with pytest.raises(NodeFailed):
            split(text[:length], "")


@pytest.mark.parametrize("status", [1, 3, 124, 137, 141])
def test_a_probe_that_ended_with_an_error_is_unreadable_whatever_it_printed(status: int) -> None:
    for answer in ANSWERS:
        seen = _parsed(answer.role, Section(answer.text, status))
        assert isinstance(seen, Unreadable), answer


@each_answer
def test_lost_doubled_and_swapped_lines_raise_nothing_else(answer: Answer) -> None:
    lines = answer.text.split("\n")
    for at, line in enumerate(lines):
        judged(answer, "\n".join(lines[:at] + lines[at + 1 :]))
        judged(answer, "\n".join([*lines[:at], line, *lines[at:]]))
        judged(answer, "\n".join([*lines[:at], *lines[at : at + 2][::-1], *lines[at + 2 :]]))


@each_answer
def test_garbled_bytes_raise_nothing_else(answer: Answer) -> None:
    chance = random.Random(str(answer))
    for _ in range(60):
        letters = list(answer.text)
        for _ in range(chance.choice((1, 1, 5, 50))):
            at = chance.randrange(len(letters))
            letters[at] = chance.choice(
                ("", "\0", "\n", "\t", " ", "=", "%", "-1", "9" * 30, "你", "�", letters[at] * 2)
            )
        judged(answer, "".join(letters))


@each_answer
def test_an_empty_answer_noise_and_another_roles_answer_are_unreadable(answer: Answer) -> None:
    chance = random.Random(7)
    noise = "".join(chance.choice("ab \t=:/-\0你\n") for _ in range(2000)).strip()
    family = answer.role.name in ABOUT_ENVIRONMENTS
    others = [
        other.text
        for other in ANSWERS
        if other.role is not answer.role and not (family and other.role.name in ABOUT_ENVIRONMENTS)
    ]
    for text in ("", "\n", "end", noise, f"{noise}\nend", "\0" * 100, *others):
        if text == "end" and family:
            continue
        assert parsed(answer, text) is UNREADABLE, text[:60]


ABOUT_ENVIRONMENTS = {"archives", "editables", "environment", "ops", "pins", "trainer"}
"""They share their words, and where no environment is declared they print the end alone."""


@each_answer
def test_lines_that_end_as_on_windows_are_unreadable(answer: Answer) -> None:
    with pytest.raises(Unreadable):
        answer.role.parse(answer.text.replace("\n", "\r\n") + "\r")


FOREIGN = (
    "ls: 无法访问 '/data': 没有那个文件或目录",
    "dpkg-query: 没有找到与 libnccl2 相匹配的软件包",
    "未安装软件包 libnccl",
    "错误:无法打开软件包数据库",
    "Error! 找不到 dkms.conf 文件。",
    "nvidia/535.154.05, 6.1.0-56-amd64, x86_64: 已安装",
    "506 无法与守护进程通信",
    "单元 chronyd.service 没有找到。",
    "RTNETLINK 回答：网络不可达",
    "sh: 1: awk: 未找到命令",
    "没有可用软件包 gcc-toolset-12。",
    "E: 无法定位软件包 pdsh",
)
"""Messages as systems speak that are set to zh_CN."""


@each_answer
def test_a_message_in_place_of_any_line_never_makes_a_node_right(answer: Answer) -> None:
    lines = answer.text.split("\n")
    for at, line in enumerate(lines[:-1]):
        if quoted(answer, lines, at) or not line:
            continue
        message = FOREIGN[at % len(FOREIGN)]
        text = "\n".join([*lines[:at], message, *lines[at + 1 :]])
        found = judged(answer, text)
        assert found is None or found, (line, message)


def quoted(answer: Answer, lines: list[str], at: int) -> bool:
    """Whether the line is text of a file, which may say anything."""
    before = lines[:at]
    match answer.role.name:
        case "hosts":
            return at >= 2
        case "time":
            return "config\tpresent" in before
        case "packages":
            return "source" in before
        case "nccl":
            return "pin" in before
        case "pdsh":
            return "version" in before
        case _:
            return lines[at].startswith("|")


@pytest.mark.parametrize("answer", [a for a in ANSWERS if a.name == "node1"], ids=str)
def test_much_noise_and_very_long_lines_end_in_time(answer: Answer) -> None:
    """Ten megabytes: the suite's own limit of time ends a parser that is not linear."""
    flood = "x 1\t=你\n" * 1_000_000
    whole = answer.text.removesuffix("end")
    assert parsed(answer, flood) is parsed(answer, f"{flood}end") is UNREADABLE
    parsed(answer, f"{whole}{flood}end")
    parsed(answer, f"{whole}{'x' * 10_000_000}\nend")
