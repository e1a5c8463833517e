"""Versions of NCCL's packages, and which of those on offer belongs to a torch. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from roles.nccl.spec import VERSION

Cuda = tuple[int, int | None]
"""Major and minor version of CUDA; the minor one may be unknown."""


@dataclass(frozen=True)
class Nccl:
    """upstream: NCCL's own version. revision and cuda: of the package; None where it names none."""

    upstream: str
    revision: int | None = None
    cuda: Cuda | None = None


def read(text: str) -> Nccl | None:
    """A package's version; None for what follows another scheme."""
    match = VERSION.fullmatch(text)
    if match is None:
        return None
    revision, cuda = match["revision"], match["cuda"]
    major, _, minor = (cuda or "").partition(".")
    return Nccl(
        match["upstream"],
        int(revision) if revision else None,
        (int(major), int(minor)) if cuda else None,
    )


def upstream_of_distribution(version: str) -> str | None:
    """NCCL's version in that of an nvidia-nccl-cu* distribution (``2.26.2.post1`` is a 2.26.2)."""
    match = re.match(r"[0-9]+\.[0-9]+\.[0-9]+", version)
    return match[0] if match else None


def nearest(upstream: str, cuda: Cuda | None, offered: Iterable[str]) -> str | None:
    """Of the offered versions with that upstream one, the nearest to the CUDA that torch uses.

    Another major CUDA does not do. Among minor ones, equal before older before newer: NCCL built with
    an older minor version runs with any newer one of the same major.
    """
    best: tuple[tuple[int, int, int, str], str] | None = None
    for text in offered:
        found = read(text)
        if found is None or found.upstream != upstream or found.revision is None:
            continue
        if cuda and found.cuda and found.cuda[0] != cuda[0]:
            continue
        rank = (*_closeness(found.cuda, cuda), found.revision, text)
        if best is None or rank > best[0]:
            best = rank, text
    return best[1] if best else None


def _closeness(found: Cuda | None, wanted: Cuda | None) -> tuple[int, int]:
    if found is None or found[1] is None:
        return 0, 0
    if wanted is None or wanted[1] is None:
        return 1, found[0] * 1000 + found[1]
    if found[1] == wanted[1]:
        return 3, 0
    return (2, found[1]) if found[1] < wanted[1] else (1, -found[1])


def cuda_of(torch: str, distributions: Iterable[str]) -> Cuda | None:
    """The CUDA of a torch: its local version (``2.5.1+cu124``), or the CUDA packages beside it.

    distributions: names of metadata folders such as ``nvidia_cuda_runtime_cu12-12.4.127.dist-info``.
    """
    if match := re.search(r"\+cu([0-9]{2})([0-9]+)$", torch):
        return int(match[1]), int(match[2])
    major: Cuda | None = None
    for name in distributions:
        if match := re.match(r"nvidia_cuda_runtime(?:_cu[0-9]+)?-([0-9]+)\.([0-9]+)\.", name):
            return int(match[1]), int(match[2])
        if match := re.match(r"nvidia_nccl_cu([0-9]+)-", name):
            major = int(match[1]), None
    return major
