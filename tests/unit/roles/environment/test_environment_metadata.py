"""What an archive's metadata tells: requirements, editable installs, and whose files are whose."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from roles.environment import archive, metadata
from roles.environment.archive import Archive, describe, read
from tests.unit.roles.environment.made import CONDA, VENV, below, pack

SITE = "lib/python3.11/site-packages"
LOST = "/home/liu/LLaMA-Factory"


def packed(tmp_path: Path, *files: tuple[str, str], top: str = "llm") -> Archive:
    """An archive of a venv that lived at /home/liu/envs/llm, with these files in site-packages."""
    entries = [*VENV, ("bin/pip", "#!/home/liu/envs/llm/bin/python3\n")]
    entries += [(f"{SITE}/{name}", text) for name, text in files]
    return read(pack(tmp_path / "a.tar", below(top, entries)))


def direct_url(path: str, editable: bool = True) -> str:
    return json.dumps({"url": f"file://{path}", "dir_info": {"editable": editable}})


def record(*files: tuple[str, str]) -> str:
    """A RECORD of files with these contents."""
    lines = [
        f"{name},sha256={metadata.spelt(hashlib.sha256(text.encode()).digest())},{len(text)}"
        for name, text in files
    ]
    return "\n".join([*lines, "../../../bin/x,sha256=abc,1", "x.pyc,,", ""])


def test_requirements_of_wheels_and_of_old_eggs_are_read(tmp_path: Path) -> None:
    found = packed(
        tmp_path,
        ("a-1.dist-info/METADATA", "Name: a\nRequires-Dist: b>=2\nRequires-Dist: c; extra == 'x'\n\nb"),
        ("old-1-py3.11.egg-info/requires.txt", "d<3\n\n[more]\ne\n"),
        ("none-1.dist-info/METADATA", "Name: none\n"),
        ("torch/vendored-1.dist-info/METADATA", "Requires-Dist: never\n"),
    )  # fmt: skip
    assert found.requires["a-1.dist-info"] == ["b>=2", "c; extra == 'x'"]
    assert found.requires["old-1-py3.11.egg-info"][0] == "d<3"
    assert set(found.requires) == {"a-1.dist-info", "old-1-py3.11.egg-info"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("llamafactory-0.9.dist-info/direct_url.json", direct_url(LOST)),
        ("LLaMAFactory.egg-link", f"{LOST}\n."),
        ("__editable__.llamafactory-0.9.pth", f"{LOST}\n"),
    ],
)
def test_an_editable_install_from_outside_is_found(tmp_path: Path, file: str, text: str) -> None:
    assert packed(tmp_path, (file, text)).editables == {"llamafactory": LOST}


@pytest.mark.parametrize(
    "text",
    [
        direct_url("/home/liu/envs/llm/src/llamafactory"),
        direct_url(LOST, editable=False),
        '{"url": "https://example.org/x.whl", "archive_info": {}}',
        '{"url": 3}',
        '{"url": "http://[", "dir_info": {"editable": true}}',
        pytest.param("[" * 200_000, id="deeper than can be read"),
        "{",
        "",
    ],
)
def test_what_travels_with_the_environment_or_is_no_editable_install_is_none(
    tmp_path: Path, text: str
) -> None:
    assert packed(tmp_path, ("x-1.dist-info/direct_url.json", text)).editables == {}


def test_a_conda_environment_is_known_by_its_scripts(tmp_path: Path) -> None:
    entries = [
        *CONDA,
        ("bin/pip", "#!/home/liu/anaconda3/envs/llm/bin/python3.10\n"),
        (
            "lib/python3.10/site-packages/in-1.dist-info/direct_url.json",
            direct_url("/home/liu/anaconda3/envs/llm/src/in"),
        ),
        ("lib/python3.10/site-packages/out-1.dist-info/direct_url.json", direct_url("/srv/out")),
    ]
    assert read(pack(tmp_path / "a.tar", entries)).editables == {"out": "/srv/out"}


def test_of_two_records_the_one_whose_files_are_there_owns_them(tmp_path: Path) -> None:
    found = packed(
        tmp_path,
        ("torch/version.py", "2.6"),
        ("torch-2.5.0.dist-info/RECORD", record(("torch/version.py", "2.5"))),
        ("torch-2.6.0.dist-info/RECORD", record(("torch/version.py", "2.6"))),
    )
    assert found.strays == ("torch-2.5.0.dist-info",)
    assert found.distributions == ("torch-2.6.0.dist-info",)
    assert found.unclear == ()


def test_what_a_program_writes_after_the_tar_is_read_too(tmp_path: Path) -> None:
    packed(
        tmp_path,
        ("torch-2.5.0.dist-info/RECORD", record(("torch/version.py", "2.5"))),
        ("torch-2.6.0.dist-info/RECORD", record(("torch/version.py", "2.6"))),
        ("torch/version.py", "2.6"),
    )
    padded = gzip.compress((tmp_path / "a.tar").read_bytes() + b"\0" * (4 << 20))
    (tmp_path / "padded.tar.gz").write_bytes(padded)
    assert read(tmp_path / "padded.tar.gz").strays == ("torch-2.5.0.dist-info",)


def test_a_broken_record_owns_nothing(tmp_path: Path) -> None:
    """Its quote never ends, and the field is longer than a reader takes."""
    found = packed(
        tmp_path,
        ("torch/version.py", "2.6"),
        ("torch-2.5.0.dist-info/RECORD", '"' + record(("torch/version.py", "2.6")) * 2000),
        ("torch-2.6.0.dist-info/RECORD", record(("torch/version.py", "2.6"))),
    )
    assert found.strays == ("torch-2.5.0.dist-info",)
    assert found.distributions == ("torch-2.6.0.dist-info",)


@pytest.mark.parametrize(
    "files",
    [
        (("torch/version.py", "2.6"), ("torch/extra.py", "of neither")),
        (("torch/version.py", "2.6"),),
        (),
    ],
)
def test_where_neither_record_holds_it_is_said(
    tmp_path: Path, files: tuple[tuple[str, str], ...]
) -> None:
    found = packed(
        tmp_path,
        *files,
        ("torch-2.5.0.dist-info/RECORD", record(("torch/version.py", "2.5"))),
        ("torch-2.6.0.dist-info/RECORD", record(("torch/version.py", "2.6"), ("torch/extra.py", "1"))),
    )  # fmt: skip
    assert found.strays == ()
    assert found.unclear == ("torch-2.5.0.dist-info and torch-2.6.0.dist-info",)
    assert len(found.distributions) == 2


NCCL = "nvidia/nccl/lib/libnccl.so.2"


def two_nccl(required: str, there: str) -> tuple[tuple[str, str], ...]:
    return (
        (NCCL, there),
        ("torch-2.6.0.dist-info/METADATA", f"Requires-Dist: {required}\n"),
        ("nvidia_nccl_cu11-2.14.3.dist-info/RECORD", record((NCCL, "2.14"))),
        ("nvidia_nccl_cu12-2.21.5.dist-info/RECORD", record((NCCL, "2.21"))),
    )


def test_a_second_nccl_whose_library_was_replaced_goes(tmp_path: Path) -> None:
    found = packed(tmp_path, *two_nccl("nvidia-nccl-cu12==2.21.5", "2.21"))
    assert found.strays == ("nvidia_nccl_cu11-2.14.3.dist-info",)
    assert found.unclear == ()


CU11, CU12 = "nvidia_nccl_cu11-2.14.3.dist-info", "nvidia_nccl_cu12-2.21.5.dist-info"


@pytest.mark.parametrize("there", ["2.14", "of neither"])
def test_a_required_nccl_whose_library_was_replaced_is_to_be_installed_again(
    tmp_path: Path, there: str
) -> None:
    found = packed(tmp_path, *two_nccl("nvidia-nccl-cu12==2.21.5", there))
    assert found.strays == (CU11, CU12)  # neither record is unpacked
    assert found.overwritten == (CU12,) and found.unclear == ()
    assert found.distributions == (CU12, "torch-2.6.0.dist-info")


@pytest.mark.parametrize(
    ("torch", "other", "overwritten", "unclear"),
    [
        ("nvidia-nccl-cu12", "nvidia-nccl-cu11", (CU12,), ()),  # torch decides
        ("sympy", "nvidia-nccl-cu12; python_version > '3'", (CU12,), ()),
        ("nvidia-nccl-cu11", "nvidia-nccl-cu12", (), ()),
        ("nvidia-nccl-cu11\nRequires-Dist: nvidia-nccl-cu12", "x", (), (f"{CU11} and {CU12}",)),
    ],
)
def test_whose_the_library_is_to_be_torch_says_or_else_the_others(
    tmp_path: Path, torch: str, other: str, overwritten: tuple[str, ...], unclear: tuple[str, ...]
) -> None:
    more = ("a-1.dist-info/METADATA", f"Name: a\nRequires-Dist: {other}\n")
    found = packed(tmp_path, *two_nccl(torch, "2.14"), more)
    assert (found.overwritten, found.unclear) == (overwritten, unclear)


def test_libraries_of_two_cuda_versions_with_files_of_their_own_stay(tmp_path: Path) -> None:
    files = [("nvidia/cublas/lib/libcublas.so.11", "11"), ("nvidia/cublas/lib/libcublas.so.12", "12")]  # fmt: skip
    found = packed(
        tmp_path,
        *files,
        ("nvidia_cublas_cu11-11.dist-info/RECORD", record(files[0])),
        ("nvidia_cublas_cu12-12.dist-info/RECORD", record(files[1])),
    )
    assert (found.strays, found.unclear) == ((), ())


def test_all_of_it_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "state_directory", lambda: tmp_path / "state")
    fresh = packed(tmp_path, *two_nccl("nvidia-nccl-cu12", "2.14"), ("a.egg-link", f"{LOST}\n"))
    assert fresh.editables and fresh.requires and fresh.strays and fresh.overwritten
    assert describe(tmp_path / "a.tar") == fresh
    archive._known.clear()  # as in the next run
    assert describe(tmp_path / "a.tar") == fresh
