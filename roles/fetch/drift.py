"""How what lies on the storage differs from the models and data that are declared; the head's alone to mend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

from roles.core.role import Finding, Peers, Target
from roles.fetch.hub import identity
from roles.fetch.probe import FetchState, Seen
from roles.fetch.spec import COMMIT, Declared, FetchSpec, environment_of
from roles.storage.spec import shared_path

RUN = token_hex(8)
"""This run. Its stamp on what was resolved anew tells that it was done."""


def drift(target: Target[FetchSpec], state: FetchState, peers: Peers) -> list[Finding]:
    """Findings of the head; what the others see there is compared as a fact."""
    return [finding for _, finding in pairs(target, state)]


def pairs(target: Target[FetchSpec], state: FetchState) -> Iterator[tuple[Declared, Finding]]:
    """Each thing that is not as declared, with what is wrong."""
    if not target.is_head:
        return
    shared = shared_path(target.cluster) is not None
    for one in target.spec.each(target.cluster):
        seen = state.fetched.get(one.name, Seen("absent"))
        finding = _finding(target, one, seen)
        if finding is None:
            continue
        obstacle = _obstacle(target, one, seen) if finding.repairable else None
        yield one, obstacle or replace(finding, shared=shared)


def _finding(target: Target[FetchSpec], one: Declared, seen: Seen) -> Finding | None:
    stamp = seen.values
    fix = f"it is fetched by {'the head' if one.spec.on == 'head' else 'this machine'}"
    if seen.place == "foreign":
        return Finding(
            "fetch-foreign",
            f"{_said(one)} at {one.path}",
            "other files, which Lockstep did not fetch",
            f"move {one.path} away, or give fetch.{one.name}.path another directory",
            repairable=False,
        )
    if seen.place != "ours" or not stamp:
        ours = seen.place == "ours"  # files lie there, and a job may read them
        there = "files without a stamp that fits them" if ours else "not there"
        return Finding("fetch-missing", f"{_said(one)} at {one.path}", there, fix, disturbs=ours)
    if different := _difference(target, one, seen):
        want, there = different
        return Finding("fetch-other", f"{want} at {one.path}", there, fix, disturbs=True)
    if seen.wrong:
        rest = f" and {len(seen.wrong) - 3} more" if len(seen.wrong) > 3 else ""
        return Finding(
            "fetch-damaged",
            f"the files of {one.name} at {one.path} as they were fetched",
            f"{', '.join(seen.wrong[:3])}{rest} missing, cut or altered",
            "these are fetched again",
            disturbs=True,
        )
    if refreshed(target, one, seen):
        return Finding(
            "fetch-refresh",
            f"{one.spec.revision} of {one.source} as it is now",
            f"as it was at commit {str(stamp.get('commit'))[:12]}",
            "the hub is asked again, and what changed is fetched",
            disturbs=True,
        )
    return None


def _said(one: Declared) -> str:
    if one.spec.directory is not None:
        return f"{one.name}, from a directory of the control machine,"
    return f"{one.source} ({one.spec.revision})"


def _difference(target: Target[FetchSpec], one: Declared, seen: Seen) -> tuple[str, str] | None:
    """(what is declared, what is there), or None where they are the same."""
    stamp = seen.values
    there = f"{stamp.get('source')} ({stamp.get('revision') or stamp.get('commit')})"
    if stamp.get("source") != one.source:
        return _said(one), there
    if one.spec.directory is not None:
        here = directory(target, one)
        if here is not None and here != stamp.get("commit"):
            return f"{one.name} as its directory is now", "as it was earlier"
    elif COMMIT.fullmatch(one.spec.revision):
        if stamp.get("commit") != one.spec.revision:
            return _said(one), there
    elif stamp.get("revision") != one.spec.revision:
        return _said(one), there
    for key, declared in (("include", one.spec.include), ("exclude", one.spec.exclude)):
        if stamp.get(key) != declared:
            return f"{one.source} with {key} {declared}", f"with {key} {stamp.get(key)}"
    return None


def directory(target: Target[FetchSpec], one: Declared) -> str | None:
    """What the declared directory holds, by names, sizes and times; None where it is not to be read.

    What was fetched from it once stays right where the directory is gone.
    """
    try:
        place = target.cluster.at_hand(one.spec.directory or Path())
        return identity(place) if place.is_dir() else None
    except OSError:
        return None


def refreshed(target: Target[FetchSpec], one: Declared, seen: Seen) -> bool:
    """Whether this run was asked to follow the branch (``--data refresh=NAME``, or ``all``) and did not yet."""
    asked = target.cluster.options.get("refresh") in (one.name, "all")
    return asked and _moves(one) and seen.values.get("run") != RUN


def _moves(one: Declared) -> bool:
    return one.spec.directory is None and not COMMIT.fullmatch(one.spec.revision)


def remarks(
    target: Target[FetchSpec], state: FetchState, peers: Peers, dry: bool
) -> Iterator[tuple[str, str | None]]:
    """A name in ``--data refresh=NAME`` that follows no branch."""
    name = target.cluster.options.get("refresh", "all")
    branches = [one.name for one in target.spec.each(target.cluster) if _moves(one)]
    if target.is_head and name != "all" and name not in branches:
        known = ", ".join([*branches, "all"])
        yield f"--data refresh={name} follows nothing: give one of {known}", "yellow"


def _obstacle(target: Target[FetchSpec], one: Declared, seen: Seen) -> Finding | None:
    """What must be mended by the user before it can be fetched."""
    if one.spec.directory is not None:
        place = target.cluster.at_hand(one.spec.directory)
        if not place.is_dir() or not os.access(place, os.R_OK | os.X_OK):
            return Finding(
                "fetch-source",
                f"the directory {place} on the control machine",
                "no such directory, or not to be read",
                f"put the files there, or correct fetch.{one.name}.directory",
                repairable=False,
            )
    environment = environment_of(target.cluster, one) if one.spec.on == "head" else None
    if environment and not seen.library:
        return Finding(
            "fetch-library",
            f"huggingface_hub in the environment {environment.name}, with which the head fetches",
            "not there",
            f"install it before packing {environment.name}, or set fetch.{one.name}.on: control",
            repairable=False,
        )
    return None


def fetched(state: FetchState) -> str | None:
    """What lies on the storage, with commits; None where there is nothing."""
    words = [
        f"{name} {str(stamp.get('commit'))[:12]} {str(stamp.get('manifest'))[:12]}"
        for name, seen in sorted(state.fetched.items())
        if (stamp := seen.values)
    ]
    return ", ".join(words) or None
