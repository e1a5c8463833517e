"""YAML files are read strictly: one meaning for each scalar, and every refusal names its line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from inventory.errors import FileProblem, SyntaxProblem
from inventory.reader import MOST_BYTES, Marked, read_mapping


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(folder: Path, text: str | bytes) -> Marked:
    path = folder / "file.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_mapping(path)


def refused(folder: Path, text: str | bytes) -> list[str]:
    with pytest.raises(SyntaxProblem) as caught:
        read(folder, text)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("22", 22),
        ("-3", -3),
        ("0", 0),
        ("3.20", 3.2),
        ("1e-4", 0.0001),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # What older YAML takes for a truth, a time, a date or digit groups is text.
        ("no", "no"),
        ("on", "on"),
        ("22:00", "22:00"),
        ("2024-01-31", "2024-01-31"),
        ("1_000", "1_000"),
        ("10.0.0.1", "10.0.0.1"),
        ("29500-29599", "29500-29599"),
        ("'22'", "22"),
        ('"no"', "no"),
        ("'010'", "010"),
        ("|\n  two\n  lines\n", "two\nlines\n"),
    ],
)
def test_a_scalar_has_one_meaning(folder: Path, scalar: str, value: Any) -> None:
    found = read(folder, f"key: {scalar}").values["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "a: 1\nport: 010",
            [
                "file.yaml:2: port: 010 is octal to some readers: "
                "drop the leading zero, or quote it"
            ],
        ),
        ("a: 0x10", ["file.yaml:1: a: 0x10: write the number in decimal, or quote it"]),
        ("a: 0o17", ["file.yaml:1: a: 0o17: write the number in decimal, or quote it"]),
        ("a: .inf", ["file.yaml:1: a: .inf is no finite number: quote it if it is text"]),
        ("a: .NaN", ["file.yaml:1: a: .NaN is no finite number: quote it if it is text"]),
        ("a: 1e999", ["file.yaml:1: a: 1e999 is too large for a number"]),
        (
            f"a: {'9' * 5000}",
            ["file.yaml:1: a: a number of 5000 digits: quote it if it is text"],
        ),
        (
            "a: {x: 1}\nb:\n  x: 1\n  y: 2\n  x: 3\n",
            ["file.yaml:5: b.x: stands twice, in line 3 and in line 5"],
        ),
        (
            "a:\n  1: x",
            [
                "file.yaml:2: a: the key 1 is a whole number to YAML: "
                "quote it, or choose a name"
            ],
        ),
        (
            "a:\n  1e3: x",
            ["file.yaml:2: a: the key 1e3 is a number to YAML: quote it, or choose a name"],
        ),
        (
            "null: x",
            ["file.yaml:1: the key null is nothing to YAML: quote it, or choose a name"],
        ),
        (
            "a:\n  010: x",
            [
                "file.yaml:2: a: 010 is octal to some readers: "
                "drop the leading zero, or quote it"
            ],
        ),
        ("?\n: x", ["file.yaml:1: a value without a key before it"]),
        ("'': x", ["file.yaml:1: a value without a key before it"]),
        (
            "? [a, b]\n: x",
            ["file.yaml:1: a key must be a plain word, not a list, mapping or alias"],
        ),
        (
            "a: {{ b }}",
            ["file.yaml:1: a: a key must be a plain word, not a list, mapping or alias"],
        ),
        (
            "a: &x [1]\nb: *x",
            [
                "file.yaml:1: a: &x is an anchor: write the value out",
                "file.yaml:2: b: *x is an alias: write the value out",
            ],
        ),
        (
            "a: 1\nb:\n  <<: {c: 1}",
            ["file.yaml:3: b: merging with << is refused: write the keys out"],
        ),
        (
            "a: !!python/object/apply:os.system ['true']",
            [
                "file.yaml:1: a: the tag !!python/object/apply:os.system is refused: "
                "write a plain value"
            ],
        ),
        ("a: !x 1", ["file.yaml:1: a: the tag !x is refused: write a plain value"]),
        ("a: !!str 1", ["file.yaml:1: a: the tag !!str is refused: write a plain value"]),
        ("a: !e!x 1", ["file.yaml:1: tags (! and !!) are refused: write plain values"]),
        (
            "a: 1\n---\nb: 2",
            ["file.yaml:2: a second document begins here: one file holds one"],
        ),
        ("", ["file.yaml: is empty"]),
        ("# only a remark\n", ["file.yaml: is empty"]),
        ("---\n", ["file.yaml:2: is empty: it must be a mapping of keys to values"]),
        ("\n- a\n- b", ["file.yaml:2: holds a list: it must be a mapping of keys to values"]),
        ("word", ["file.yaml:1: holds text: it must be a mapping of keys to values"]),
        ("a:\n\tb: 1", ["file.yaml:2: a tab: only spaces may stand here"]),
        ("a:\n  b: 1\n\tc: 2", ["file.yaml:3: a tab: only spaces may stand here"]),
        ("a: b\n\tc", ["file.yaml:2: a tab: only spaces may stand here"]),
        ("a: b\t", ["file.yaml:1: a tab: only spaces may stand here"]),
        ("a: x\n b: y", ["file.yaml:2: a second ': ' where a value should be: quote the value, or mend the indentation"]),
        ("a:\n    b: 1\n  c: 2", ["file.yaml:3: the indentation fits none of the lines above"]),
        ("a: [1, 2\nb: 3", ["file.yaml:2: the bracket that opens before this is not closed"]),
        ("x: 1\na: 'b\nc: d", ["file.yaml:2: the quote that opens here is never closed"]),
        ("a: 1\nb\n", ["file.yaml:2: a key without ': ' behind it"]),
        ("a: @b", ["file.yaml:1: a value that begins with this character must be quoted"]),
        ("a: ok\nb: \"\\0\"", ["file.yaml:2: b: holds the control character U+0000: delete it"]),
        ("a: \"\\ud800\"", ["file.yaml:1: a: holds the control character U+D800: delete it"]),
        (
            '"a\\nb": 1\n"a\\nb": 2',
            ["file.yaml:2: 'a\\nb': stands twice, in line 1 and in line 2"],
        ),
        ("a: 1\nb: \x07", ["file.yaml:2: the character U+0007 must not stand in YAML: delete it"]),
        (
            'a: "\\Uffffffff"',
            ["file.yaml: an escape such as \\U0010FFFF in double quotes names no character"],
        ),
        (
            b"a: 1\nb: caf\xe9\n",
            ["file.yaml:2: byte 11 (0xe9) is not UTF-8: save the file as UTF-8"],
        ),
        (
            b"\xef\xbb\xbfa: \xff",
            ["file.yaml:1: byte 6 (0xff) is not UTF-8: save the file as UTF-8"],
        ),
        (
            "a: 1".encode("utf-16"),
            ["file.yaml:1: byte 0 (0xff) is not UTF-8: save the file as UTF-8"],
        ),
        (
            "a: " + "[" * 5000,
            ["file.yaml:1: nested deeper than 32 levels"],
        ),
    ],
)  # fmt: skip
def test_what_readers_could_take_differently_is_refused_with_its_line(
    folder: Path, text: str | bytes, sentences: list[str]
) -> None:
    assert refused(folder, text) == sentences


def test_an_alias_bomb_is_refused_without_unfolding_it(folder: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
    )
    lines = refused(folder, bomb)
    assert lines[0] == "file.yaml:1: a0: &a0 is an anchor: write the value out"
    assert len(lines) == 30 + 29 * 9


def test_every_refusal_of_a_file_is_told_in_the_order_of_lines(folder: Path) -> None:
    assert refused(folder, "a: 010\nb: !x 1\na: 2\nc: *d") == [
        "file.yaml:1: a: 010 is octal to some readers: drop the leading zero, or quote it",
        "file.yaml:2: b: the tag !x is refused: write a plain value",
        "file.yaml:3: a: stands twice, in line 1 and in line 3",
        "file.yaml:4: c: *d is an alias: write the value out",
    ]


def test_every_key_and_list_item_has_its_line(folder: Path) -> None:
    marked = read(folder, "a:\n  b:\n    - x\n    - c: 1\n\n\nd: {e: 1,\n    f: [2,\n 3]}\n")
    places: dict[tuple[str | int, ...], int] = {
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "b", 0): 3,
        ("a", "b", 1): 4,
        ("a", "b", 1, "c"): 4,
        ("d",): 7,
        ("d", "e"): 7,
        ("d", "f"): 8,
        ("d", "f", 1): 9,
    }
    assert {place: marked.line(place) for place in places} == places


def test_a_key_that_the_file_leaves_out_gets_the_line_of_what_is_around_it(folder: Path) -> None:
    marked = read(folder, "x: 1\na:\n  b: {}\n")
    assert marked.line(("a", "b", "missing", "too")) == 3
    assert marked.line(("a", "missing")) == 2
    assert marked.line(("missing",)) is None
    assert str(marked.problem(("a", "l", 0, "k"), "is wrong")) == "file.yaml:2: a.l[0].k: is wrong"


@pytest.mark.parametrize("key", ["a.b[1].c", "a.b.1.c"])
def test_a_key_path_finds_its_place_through_lists(folder: Path, key: str) -> None:
    marked = read(folder, "a:\n  b:\n    - x\n    - c: 1\n")
    assert marked.place(key) == ("a", "b", 1, "c")


def test_a_number_is_kept_as_the_file_has_it(folder: Path) -> None:
    marked = read(folder, "a: 3.20\nb: 1e3\nc: 22\n")
    assert marked.written == {("a",): "3.20", ("b",): "1e3"}


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(folder: Path) -> None:
    marked = read(folder, b"\xef\xbb\xbfa: 1\r\nb: x\r\n")
    assert marked.values == {"a": 1, "b": "x"}
    assert marked.line(("b",)) == 2


def no_file(path: Path) -> None:
    pass


def a_directory(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_broken_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_large_file(path: Path) -> None:
    path.write_bytes(b"#" * (MOST_BYTES + 1))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (no_file, "file.yaml: no such file"),
        (a_directory, "file.yaml: is a directory, not a file"),
        (a_pipe, "file.yaml: is no regular file"),
        (a_broken_link, "file.yaml: no such file"),
        (a_link_to_itself, "file.yaml: cannot be read: too many levels of symbolic links"),
        (
            a_large_file,
            "file.yaml: is larger than 1 MiB: this is no file that Lockstep reads settings from",
        ),
    ],
)
def test_what_cannot_be_had_as_a_file_is_named(folder: Path, make: Any, sentence: str) -> None:
    make(folder / "file.yaml")
    with pytest.raises(FileProblem) as caught:
        read_mapping(folder / "file.yaml")
    assert str(caught.value) == sentence


def test_a_file_without_permission_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "file.yaml"
    path.write_text("a: 1")

    def denied(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # root may read a file of mode 0
    with pytest.raises(FileProblem) as caught:
        read_mapping(path)
    assert str(caught.value) == "file.yaml: cannot be read: permission denied"


def test_a_file_outside_the_current_directory_is_named_in_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "deeper").mkdir()
    monkeypatch.chdir(folder / "deeper")
    with pytest.raises(FileProblem) as caught:
        read_mapping(folder / "none.yaml")
    assert str(caught.value) == f"{folder}/none.yaml: no such file"
