"""The control machine's settings: pins that keep their form, overrides, and where state lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from inventory import settings
from inventory.errors import FileProblem, InventoryProblem, SchemaProblem
from inventory.settings import Settings, load_settings, state_directory

GOOD = "torch: '2.6.0'\ntorch_index: null\nindex: null\npackages:\n  numpy: '2.4.6'\n"
PLAIN_PIP = "global.timeout='60'\n"
OWN_INDEX = "global.index-url='https://mirror.example/simple'\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, **environ: str) -> Settings:
    Path("settings.yaml").write_text(text)
    return load_settings(Path("settings.yaml"), environ)


def test_the_file_gives_the_settings_and_the_environment_overrides_them() -> None:
    assert read(GOOD) == Settings(torch="2.6.0", packages={"numpy": "2.4.6"})
    overridden = read(
        GOOD,
        LOCKSTEP_TORCH="2.13.0+cpu",
        LOCKSTEP_TORCH_INDEX="https://a.example/whl",
        LOCKSTEP_INDEX="/srv/wheels",
    )
    assert overridden == Settings(
        torch="2.13.0+cpu",
        torch_index="https://a.example/whl",
        index="/srv/wheels",
        packages={"numpy": "2.4.6"},
    )
    assert read(GOOD, LOCKSTEP_TORCH="") == read(GOOD)


@pytest.mark.parametrize(
    ("text", "environ", "sentences"),
    [
        (
            "torch: 2.6",
            {},
            ["settings.yaml:1: torch: 2.6 must be quoted, so that YAML keeps it as written: '2.6'"],
        ),
        ("packages: {}", {}, ["settings.yaml: torch: is missing"]),
        (
            "torch: newest",
            {},
            [
                "settings.yaml:1: torch: 'newest' is no version: "
                "write one such as '2.6.0' or '2.6.0+cu124'"
            ],
        ),
        (
            "torch: '2.6.0'\ntorch_idx: a",
            {},
            ["settings.yaml:2: torch_idx: unknown key; did you mean 'torch_index'?"],
        ),
        (
            "torch: '2.6.0'\npackages:\n  --pre: '1.0'",
            {},
            ["settings.yaml:3: packages.--pre: '--pre' is no name of a Python distribution"],
        ),
        (
            "torch: '2.6.0'\nindex: -r /etc/passwd",
            {},
            [
                "settings.yaml:2: index: is no package index: "
                "give an address with https:// or an absolute path"
            ],
        ),
        (
            GOOD,
            {"LOCKSTEP_TORCH": "2.6 --pre", "LOCKSTEP_INDEX": "nowhere"},
            [
                "LOCKSTEP_TORCH: '2.6 --pre' is no version: "
                "write one such as '2.6.0' or '2.6.0+cu124'",
                "LOCKSTEP_INDEX: is no package index: "
                "give an address with https:// or an absolute path",
            ],
        ),
    ],
)
def test_a_wrong_setting_is_named_where_it_was_given(
    text: str, environ: dict[str, str], sentences: list[str]
) -> None:
    with pytest.raises(SchemaProblem) as caught:
        read(text, **environ)
    assert str(caught.value).splitlines() == sentences


@pytest.mark.parametrize(
    ("environ", "configuration", "index"),
    [
        ({}, PLAIN_PIP, ["--index-url", "https://download.pytorch.org/whl/cpu"]),
        ({}, OWN_INDEX, []),
        ({}, ":env:.find-links='/srv/wheels'\n", []),
        ({"LOCKSTEP_INDEX": "/srv/a"}, PLAIN_PIP, ["--index-url", "/srv/a"]),
        (
            {"LOCKSTEP_INDEX": "/srv/a", "LOCKSTEP_TORCH_INDEX": "/srv/t"},
            OWN_INDEX,
            ["--index-url", "/srv/t"],
        ),
    ],
)
def test_torch_never_comes_from_the_plain_index(
    environ: dict[str, str], configuration: str, index: list[str]
) -> None:
    found = read(GOOD, **environ).pip_arguments("torch", configuration)
    assert found == [*index, "torch==2.6.0"]


def test_the_packages_repeat_torchs_pin_and_ignore_its_index() -> None:
    given = read(GOOD, LOCKSTEP_TORCH_INDEX="/srv/t", LOCKSTEP_INDEX="/srv/a")
    assert given.pip_arguments("packages", PLAIN_PIP) == [
        "--index-url",
        "/srv/a",
        "torch==2.6.0",
        "numpy==2.4.6",
    ]


def test_scripts_get_the_arguments_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "load_settings", lambda: read(GOOD))
    assert settings.main(["packages"]) == 0
    assert capsys.readouterr().out == "torch==2.6.0 numpy==2.4.6\n"


def test_scripts_get_a_sentence_and_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "load_settings", lambda: read("torch: 1"))
    assert settings.main(["torch"]) == 2
    assert capsys.readouterr().err.startswith("settings.yaml:1: torch: 1 must be quoted")
    assert settings.main([]) == 2
    assert capsys.readouterr().err == "usage: python -m inventory.settings torch|packages\n"


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"LOCKSTEP_STATE": "/srv/state", "XDG_STATE_HOME": "/x"}, "/srv/state"),
        ({"LOCKSTEP_STATE": "~/state"}, "/home/me/state"),
        ({"XDG_STATE_HOME": "/x"}, "/x/lockstep"),
        ({"XDG_STATE_HOME": "relative"}, "/home/me/.local/state/lockstep"),
        ({}, "/home/me/.local/state/lockstep"),
    ],
)
def test_state_lies_where_the_environment_says_or_in_the_home_directory(
    environ: dict[str, str], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert state_directory(environ) == Path(path)


def test_a_relative_state_directory_counts_from_the_current_one(folder: Path) -> None:
    assert state_directory({"LOCKSTEP_STATE": "state"}) == folder / "state"


def test_a_home_directory_that_does_not_exist_is_a_problem_not_a_crash() -> None:
    with pytest.raises(FileProblem) as caught:
        state_directory({"LOCKSTEP_STATE": "~nobody-of-that-name/x"})
    assert isinstance(caught.value, InventoryProblem)
    assert str(caught.value) == "~nobody-of-that-name/x: there is no such home directory"
