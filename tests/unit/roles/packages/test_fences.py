"""Holds and lock lists: read in each format, judged, and written without a change to other packages' lines.

The text of dnf 5 is what its ``versionlock add`` wrote (5.4.6); those of dnf 4 (4.14) and yum likewise.
"""

from __future__ import annotations

import subprocess

import pytest

from roles.core.role import Unreadable
from roles.packages.fences import (
    DNF,
    DNF5,
    YUM,
    LockList,
    Package,
    closing,
    differing,
    exactly,
    lock_text,
    open_fence,
    parse_installed,
)
from roles.packages.spec import PackagesSpec

V18, V20 = "2.18.1-1+cuda12.1", "2.20.5-1+cuda12.4"
BOTH = {"libnccl": V18, "libnccl-devel": V18}
KMOD = {"kmod-nvidia-open-dkms": "3:575.51-1.el9"}
BY_DNF5 = """\
version = "1.0"

[[packages]]
name = "libnccl"
comment = "Added by 'versionlock add' command on 2026-11-21 14:36:40"

[[packages.conditions]]
key = "evr"
comparator = "="
value = "2.18.1-1+cuda12.1"

[[packages]]
name = "kmod-nvidia-open-dkms"

[[packages.conditions]]
key = "evr"
comparator = "="
value = "3:575.51-1.el9"
"""
RIGHT = {
    DNF: "\n# Added lock on Fri Nov 20 22:36:16 2026\nlibnccl-0:2.18.1-1+cuda12.1.*\nlibnccl-devel-0:2.18.1-1+cuda12.1.*\n",
    YUM: "0:libnccl-2.18.1-1+cuda12.1.*\n0:libnccl-devel-2.18.1-1+cuda12.1.*\n",
    DNF5: BY_DNF5.replace("kmod-nvidia-open-dkms", "libnccl-devel").replace(
        "3:575.51-1.el9", "0:2.18.1-1+cuda12.1"
    ),
}


def seen(path: str, text: str, versions: dict[str, str] = BOTH) -> str | None:
    return open_fence("rpm", versions, {}, LockList(path, text))


def test_one_version_for_two_architectures_counts_once() -> None:
    rows = [("hi ", "libnvidia-gl-535", "535.1-1"), ("hi ", "libnvidia-gl-535", "535.1-1")]
    there = parse_installed(rows)
    assert there == {"libnvidia-gl-535": (Package("535.1-1", True),)}
    assert differing({"libnvidia-gl-535": "535.1-1"}, there) == {}


@pytest.mark.parametrize("path", RIGHT)
def test_exact_locks_close_the_fence_in_every_format(path: str) -> None:
    assert seen(path, RIGHT[path]) is None
    assert seen(path, RIGHT[path].replace("2.18.1", "2.20.5")) is not None
    assert (
        seen(path, "") == "not locked: the next upgrade may replace them" != seen(path, RIGHT[path])
    )


@pytest.mark.parametrize("path", RIGHT)
def test_an_epoch_is_part_of_the_lock(path: str) -> None:
    text = lock_text(LockList(path), KMOD)
    assert "3" in text and seen(path, text, KMOD) is None
    assert seen(path, text, {"kmod-nvidia-open-dkms": "575.51-1.el9"}) is not None


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (DNF, f"{RIGHT[DNF]}libnccl-0:{V20}.*\n"),
        (DNF, f"{RIGHT[DNF]}!libnccl-0:{V18}.*\n"),
        (DNF, f"{RIGHT[DNF]}libnccl\n"),
        (DNF, f"{RIGHT[DNF]}libnccl-2.*\n"),
        (DNF, RIGHT[YUM]),  # dnf does not understand an epoch before the name
        (YUM, RIGHT[DNF]),  # nor yum one after it
        (DNF, RIGHT[DNF].split("libnccl-devel", maxsplit=1)[0]),
        (DNF5, RIGHT[DNF5].replace('"1.0"', '"2.0"')),  # dnf 5 applies nothing of such a file
        (DNF5, RIGHT[DNF5].replace('version = "1.0"', "")),
        (DNF5, RIGHT[DNF5].replace('"="', '">="')),
        (DNF5, BY_DNF5),
        (DNF5, "rubbish"),
    ],
)
def test_a_lock_that_is_not_exactly_the_declared_one_is_an_open_fence(path: str, text: str) -> None:
    assert seen(path, text) is not None


def test_names_that_begin_alike_are_other_packages() -> None:
    versions = {"nvidia-fabricmanager": "580.65-1", "nvidia-driver": "3:580.65-1"}
    text = lock_text(LockList(DNF), versions)
    more = "nvidia-fabricmanager-535-0:535.154.05-1.*\nnvidia-driver-cuda-3:575.51-1.*\n"
    assert seen(DNF, text + more, versions) is None
    assert lock_text(LockList(DNF, text + more), versions) == more + text


@pytest.mark.parametrize("path", RIGHT)
def test_writing_changes_no_other_packages_lock_and_ends_in_a_closed_fence(path: str) -> None:
    other = lock_text(LockList(path, "# kept\n"), {"kernel": "5.14.0-1.el9"})
    for before in ("", other, RIGHT[path], RIGHT[path].replace("2.18.1", "2.9.9")):
        text = lock_text(LockList(path, before), BOTH)
        assert seen(path, text) is None
        assert lock_text(LockList(path, text), BOTH) == text
    text = lock_text(LockList(path, other), BOTH)
    assert "# kept" in text and seen(path, text, {"kernel": "5.14.0-1.el9"}) is None
    lifted = lock_text(LockList(path, text), BOTH, lifted=True)
    assert "libnccl" not in lifted and seen(path, lifted, {"kernel": "5.14.0-1.el9"}) is None


def test_dnf5s_own_words_are_kept_for_the_packages_that_are_not_ours() -> None:
    text = lock_text(LockList(DNF5, BY_DNF5), {"libnccl": V20})
    assert seen(DNF5, text, {"libnccl": V20, **KMOD}) is None
    assert text.count("version = ") == 1 and "Added by" not in text


def test_a_hold_closes_the_fence_of_apt() -> None:
    held = {"libnccl2": (Package(V18, True),), "libnccl-dev": (Package(V18),)}
    assert open_fence("apt", {"libnccl2": V18}, held, None) is None
    assert "libnccl-dev not held" in (open_fence("apt", dict.fromkeys(held, V18), held, None) or "")
    assert closing("apt", dict.fromkeys(held, V18), None) == (
        "apt-mark hold libnccl2 libnccl-dev >/dev/null"
    )


def test_without_a_list_nothing_is_written_and_the_fence_is_open() -> None:
    assert closing("rpm", BOTH, None) == ":"
    assert "versionlock" in (open_fence("rpm", BOTH, {}, None) or "")


def test_versions_are_compared_with_every_installed_one() -> None:
    packages = {"libnccl": (Package(V18), Package(V20))}
    assert differing(BOTH, packages) == {
        "libnccl": f"{V18} and {V20}",
        "libnccl-devel": "not installed",
    }
    rows = [
        ("ii", "libnccl", f"0:{V18}"),
        ("hi ", "libnccl2", V18),
        ("rc ", "old", "1"),
        ("ii", "kmod", "3:575.51-1.el9"),
    ]
    assert parse_installed(rows) == {
        "libnccl": (Package(V18),),
        "libnccl2": (Package(V18, True),),
        "kmod": (Package("3:575.51-1.el9"),),
    }


@pytest.mark.parametrize(
    "row", [("", "a", "1"), ("xx", "a", "1"), ("ii", "a", ""), ("ii", "a", "(none)")]
)
def test_what_is_no_package_is_unreadable(row: tuple[str, str, str]) -> None:
    with pytest.raises(Unreadable):
        parse_installed([row])


@pytest.mark.parametrize("path", [*RIGHT, None])
def test_the_transaction_is_valid_shell_and_its_fence_comes_last(path: str | None) -> None:
    locks = LockList(path, RIGHT[path]) if path else None
    for manager in ("apt", "rpm"):
        there = {"libnccl": (Package(V20, True),)}
        step = exactly(PackagesSpec(local="/srv/repo"), manager, BOTH, there, locks)
        subprocess.run(["sh", "-n", "-c", step.command], check=True)
        assert step.command.endswith(closing(manager, BOTH, locks))
