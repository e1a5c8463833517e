"""The environment role's pure side: what each state of a node is called, and the steps that follow."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inventory.base import Spec
from inventory.cluster import Cluster, Node
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell, Upload
from roles.environment import mend, prove, role
from roles.environment.archive import Archive, ArchiveProblem
from roles.environment.converge import converge
from roles.environment.drift import Action, drift, pairs, wanted_proof, wanted_stamp
from roles.environment.fit import Needs, Offer
from roles.environment.probe import Command, EnvironmentState, Seen, parse, probe
from roles.environment.spec import Environments
from roles.storage.spec import StorageSpec

RECORDED = Path(__file__).with_name("recorded")
ARCHIVE = Archive(
    "ab" * 32,
    5000,
    "tar.zst",
    "llm",
    "3.11",
    "bin/python3",
    "/usr/bin/python3.11",
    ("torch-2.13.0+cpu.dist-info",),
)
OWN_PYTHON = replace(ARCHIVE, home=None)
PREFIX = "/opt/lockstep/envs/llm"
NODES = {
    f"node{number}": Node(name=f"node{number}", address=f"10.0.0.{number}") for number in (1, 2)
}
SECTION = Environments.model_validate({"llm": {"archive": "/archives/llm.tar.zst"}})
ONE = SECTION.each()[0]


def target(
    name: str = "node1", section: Environments = SECTION, shared: bool = True
) -> Target[Environments]:
    sections: dict[str, Spec] = {"environments": section}
    if shared:
        sections["storage"] = StorageSpec(kind="existing", path="/shared")
    return Target(
        Cluster("lab", Path("/x/lab.yaml"), NODES, sections=sections), NODES[name], section
    )


@pytest.fixture(autouse=True)
def known_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    describing(monkeypatch, ARCHIVE)


def describing(monkeypatch: pytest.MonkeyPatch, found: Archive | ArchiveProblem) -> None:
    def describe(path: Path, called: str) -> Archive:
        if isinstance(found, ArchiveProblem):
            raise found
        return found

    monkeypatch.setattr(sys.modules["roles.environment.sources"], "describe", describe)


def right() -> Seen:
    stamp = wanted_stamp(ONE, ARCHIVE)
    folders = frozenset({"torch-2.13.0+cpu.dist-info"})
    key = prove.key(stamp, sorted(folders), "100 200", wanted_proof(ONE, ARCHIVE))
    script = f"#!{PREFIX}/bin/python"
    return Seen(
        tree="directory",
        stamp=stamp,
        proof=f'{{"archive": "{ARCHIVE.sha256}", "ok": true, "key": "{key}", "facts": {{"torch": "2.13.0"}}}}',
        interpreter="100 200",
        home="/usr/bin/python3.11",
        site=f"{PREFIX}/lib/python3.11/site-packages",
        distributions=folders,
        commands={name: Command(script, True) for name in ("torchrun", "deepspeed")},
        links={"torchrun": "ok", "deepspeed": "ok"},
    )


NODE = Offer("x86_64", "2.36")


def state(seen: Seen, *parcels: str) -> EnvironmentState:
    return EnvironmentState({"llm": seen}, frozenset(parcels), NODE)


def findings(seen: Seen) -> list[Finding]:
    return drift(target(), state(seen), {})


def ids(seen: Seen) -> list[str]:
    return [finding.id for finding in findings(seen)]


def steps(
    seen: Seen, name: str = "node1", peers: Mapping[str, Any] | None = None, **more: Any
) -> list[Any]:
    where = target(name, **more)
    return list(converge(where, state(seen), peers or {}, drift(where, state(seen), {})))


def test_a_right_node_has_no_findings_and_no_steps() -> None:
    assert ids(right()) == []
    assert steps(right()) == []


def test_a_bare_node_gets_the_archive_unpacked_and_the_links_written() -> None:
    seen = Seen(home="/usr/bin/python3.11", links={"torchrun": "absent", "deepspeed": "absent"})
    assert ids(seen) == ["environment-missing", "launcher-not-found"]
    _, upload, unpack, link = steps(seen)
    assert upload == Upload(
        Path("/archives/llm.tar.zst"),
        f"/shared/.lockstep/archives/{ARCHIVE.file_name}",
        ARCHIVE.sha256,
    )
    assert "--strip-components=1" in unpack.command and "-- llm 2>&1" in unpack.command
    assert "/usr/local/bin/$c" in link.command


def test_stamp_is_written_after_the_data_is_on_the_disk_and_before_the_swap() -> None:
    command = steps(Seen(home="/usr/bin/python3.11", links=right().links))[2].command
    order = [
        "tar -x",
        "LOCKSTEP_SCRIPT",
        'sync -f "$N"',
        ".lockstep-environment.json.new",
        'mv -T "$N" "$P"',
    ]
    places = [command.index(word) for word in order]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("change", "id"),
    [
        ({"tree": "absent", "stamp": "", "proof": ""}, "environment-missing"),
        ({"tree": "file", "stamp": "", "proof": ""}, "environment-missing"),
        ({"stamp": ""}, "environment-missing"),
        ({"stamp": "{half"}, "environment-missing"),
        ({"stamp": '{"archive": "00"}'}, "environment-version"),
        ({"interpreter": ""}, "environment-damaged"),
        ({"site": ""}, "environment-damaged"),
        ({"commands": {}}, "environment-damaged"),
        (
            {"proof": f'{{"archive": "{ARCHIVE.sha256}", "ok": false, "damage": "no torch"}}'},
            "environment-damaged",
        ),
    ],
)
def test_a_tree_that_is_not_whole_is_unpacked_again(change: dict[str, Any], id: str) -> None:
    seen = replace(right(), **change)
    found = findings(seen)
    assert [finding.id for finding in found] == [id]
    assert found[0].disturbs and found[0].repairable
    assert [type(step) for step in steps(seen)] == [Shell, Upload, Shell]
    assert "tar -x" in steps(seen)[2].command


def test_a_change_that_was_cut_between_the_two_renames_is_finished_without_the_archive() -> None:
    seen = Seen(
        fresh={".lockstep-new-abababababab": wanted_stamp(ONE, ARCHIVE)}, home="/usr/bin/python3.11"
    )
    assert ids(seen)[0] == "environment-interrupted"
    first = steps(seen)[0]
    assert "mv -T" in first.command and "tar -x" not in first.command


def test_a_whole_tree_beside_an_old_environment_is_used_instead_of_unpacking() -> None:
    seen = replace(
        right(),
        stamp='{"archive": "00"}',
        fresh={".lockstep-new-abababababab": wanted_stamp(ONE, ARCHIVE)},
    )
    (step,) = steps(seen)
    assert "mv -T" in step.command and "tar -x" not in step.command


def test_a_half_tree_beside_is_never_taken_for_whole() -> None:
    seen = Seen(fresh={".lockstep-new-abababababab": ""}, home="/usr/bin/python3.11")
    assert ids(seen)[0] == "environment-missing"
    assert "tar -x" in steps(seen)[2].command


def test_leftovers_beside_a_right_environment_are_removed() -> None:
    seen = replace(right(), fresh={".lockstep-new-000000000000": ""})
    assert ids(seen) == ["environment-leftover"]
    (clean,) = steps(seen)
    assert 'rm -rf "$t"' in clean.command and "tar -x" not in clean.command


def test_the_earlier_tree_is_put_back_where_its_archive_is_declared_again() -> None:
    kept = wanted_stamp(ONE, ARCHIVE)
    for seen, id in (
        (replace(right(), stamp='{"archive": "00"}', kept=kept), "environment-version"),
        (Seen(home="/usr/bin/python3.11", kept=kept), "environment-missing"),
    ):
        assert ids(seen)[0] == id
        step = steps(seen)[0]
        assert 'mv -T "$P.lockstep-old" "$P"' in step.command and "tar -x" not in step.command


@pytest.mark.parametrize(
    "seen",
    [
        Seen(
            tree="directory", home="/usr/bin/python3.11"
        ),  # somebody else's directory is never moved
        Seen(tree="file", home="/usr/bin/python3.11"),
        replace(right(), proof=f'{{"archive": "{ARCHIVE.sha256}", "damage": "no torch"}}'),
    ],
)
def test_the_earlier_tree_is_not_put_in_the_place_of_what_is_no_other_version(seen: Seen) -> None:
    found = steps(replace(seen, kept=wanted_stamp(ONE, ARCHIVE)))
    assert any("tar -x" in step.command for step in found if isinstance(step, Shell))


def test_a_kept_tree_of_another_archive_is_left_alone_and_one_that_shall_not_be_kept_goes() -> None:
    assert ids(replace(right(), kept='{"archive": "00"}')) == []
    only = replace(ONE, spec=ONE.spec.model_copy(update={"keep": 0}))
    found = pairs(target(), state(replace(right(), kept="")), only)
    assert [(action, finding.id) for action, finding in found] == [
        (Action.CLEAN, "environment-kept")
    ]


@pytest.mark.parametrize(
    ("stamp", "id"),
    [
        ({"prefix": "/somewhere/else", "mender": 1}, "environment-moved"),
        ({"prefix": PREFIX, "mender": 0}, "environment-moved"),
    ],
)
def test_a_moved_tree_is_mended_where_it_lies(stamp: dict[str, Any], id: str) -> None:
    seen = replace(right(), stamp=json.dumps({"archive": ARCHIVE.sha256, **stamp}))
    assert ids(seen) == [id]
    (step,) = steps(seen)
    assert "tar -x" not in step.command and step.command.count("LOCKSTEP_SCRIPT") == 2


@pytest.mark.parametrize(
    ("start", "executable"),
    [
        ("#!/home/liu/envs/llm/bin/python3.11", True),
        ("#!/usr/bin/env python", True),
        (f"#!{PREFIX}/bin/python", False),
    ],
)
def test_a_command_that_somebody_gave_another_interpreter_is_unpacked_again(
    start: str, executable: bool
) -> None:
    commands = {**right().commands, "torchrun": Command(start, executable)}
    seen = replace(right(), commands=commands)
    assert ids(seen) == ["env-moved-shebang"]
    assert "tar -x" in steps(seen)[-1].command


def test_a_command_that_is_no_python_script_is_left_alone() -> None:
    commands = {"torchrun": Command("", True), "deepspeed": Command("#!/bin/bash", True)}
    assert ids(replace(right(), commands=commands)) == []


def test_a_command_that_the_archive_never_had_is_the_users_to_mend() -> None:
    seen = replace(right(), commands={"deepspeed": right().commands["deepspeed"]}, proof="")
    (finding,) = findings(seen)
    assert (finding.id, finding.repairable) == ("environment-command", False)
    assert steps(seen) == []


def test_accelerate_is_linked_where_the_environment_has_it_and_nobody_named_the_commands() -> None:
    script = Command(f"#!{PREFIX}/bin/python", True)
    seen = replace(
        right(),
        commands={**right().commands, "accelerate": script},
        links={**right().links, "accelerate": "absent"},
    )
    (finding,) = findings(seen)
    assert (finding.id, finding.seen) == ("launcher-not-found", "no accelerate")
    (step,) = steps(seen)
    assert '[ ! -f "$P/bin/accelerate" ] || echo accelerate' in step.command
    assert ids(replace(seen, links={**right().links, "accelerate": "ok"})) == []
    named = Environments.model_validate({"llm": {"archive": "/a.tar", "commands": ["torchrun"]}})
    assert "accelerate" not in probe(target(section=named)) and named.each()[0].optional == []


@pytest.mark.parametrize("leads", ["absent", "/opt/lockstep/envs/old/bin/torchrun"])
def test_a_missing_or_misled_link_is_written(leads: str) -> None:
    seen = replace(right(), links={"torchrun": leads, "deepspeed": "ok"})
    assert ids(seen) == ["launcher-not-found"]
    assert len(steps(seen)) == 1


def test_a_foreign_command_on_the_path_is_never_overwritten() -> None:
    seen = replace(right(), links={"torchrun": "foreign", "deepspeed": "ok"})
    (finding,) = findings(seen)
    assert (finding.id, finding.repairable) == ("environment-foreign-command", False)
    assert steps(seen) == []


@pytest.mark.parametrize(
    "change",
    [
        {"proof": ""},
        {"proof": "no json"},
        {"interpreter": "100 201"},
    ],
)
def test_what_changed_since_the_proof_is_proved_again_without_a_step(
    change: dict[str, Any],
) -> None:
    seen = replace(right(), **change)
    assert ids(seen) == ["environment-unproved"]
    assert steps(seen) == []


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({"torch-2.13.0+cpu.dist-info", "new-1.0.dist-info"}, "added new-1.0.dist-info"),
        (set(), "missing torch-2.13.0+cpu.dist-info"),
        (
            {"torch-2.5.0.dist-info"},
            "added torch-2.5.0.dist-info; missing torch-2.13.0+cpu.dist-info",
        ),
    ],
)
def test_packages_that_are_not_the_archives_have_it_unpacked_again(
    folders: set[str], words: str
) -> None:
    seen = replace(right(), distributions=frozenset(folders))
    (finding,) = findings(seen)
    assert (finding.id, finding.seen, finding.disturbs) == ("environment-changed", words, True)
    assert "tar -x" in steps(seen)[-1].command


def test_a_pinned_package_may_differ_from_the_archives() -> None:
    pins = {"protobuf": "3.20.3"}
    section = Environments.model_validate(
        {"llm": {"archive": "/a.tar", "pins": pins, "wheels": "/w"}}
    )
    folders = {*right().distributions, "protobuf-3.20.3.dist-info", "Protobuf-5.dist-info"}
    seen = replace(right(), distributions=frozenset(folders))
    assert drift(target(section=section), state(seen), {}) == []
    assert ids(seen) == ["environment-changed"]  # once the pin has left the file


def test_a_pin_that_is_not_met_any_more_is_no_matter_of_the_environments_proof() -> None:
    section = Environments.model_validate(
        {"llm": {"archive": "/a.tar", "pins": {"protobuf": "3.20.3"}, "wheels": "/w"}}
    )
    (one,) = section.each()
    seen, met = right(), "protobuf-3.20.3.dist-info"
    key = prove.key(
        seen.stamp, [*seen.distributions, met], seen.interpreter, wanted_proof(one, ARCHIVE)
    )
    proof = json.dumps({"archive": ARCHIVE.sha256, "ok": True, "key": key, "pinned": [met]})
    for there in ([met], ["protobuf-5.29.dist-info"], [met, "protobuf-5.29.dist-info"], []):
        folders = frozenset({*seen.distributions, *there})
        now = state(replace(seen, proof=proof, distributions=folders))
        assert drift(target(section=section), now, {}) == []
    more = frozenset({*seen.distributions, met, "lockstep_trainer-1.dist-info"})
    changed = replace(seen, proof=proof, distributions=more, interpreter="100 201")
    assert [f.id for f in drift(target(section=section), state(changed), {})] == [
        "environment-unproved"
    ]


def test_the_trainers_own_version_does_not_touch_the_proof() -> None:
    folders = {*right().distributions, "lockstep_trainer-0.1.0+abc.dist-info"}
    assert ids(replace(right(), distributions=frozenset(folders))) == []


def test_asking_for_one_more_import_asks_for_a_new_proof() -> None:
    section = Environments.model_validate(
        {"llm": {"archive": "/a.tar", "imports": ["torch", "peft"]}}
    )
    assert [f.id for f in drift(target(section=section), state(right()), {})] == [
        "environment-unproved"
    ]


@pytest.mark.parametrize(
    ("home", "words"), [("", "no such program"), ("/usr/bin/python3.12", "Python 3.12")]
)
def test_a_venv_without_its_python_is_refused_before_anything_is_unpacked(
    home: str, words: str
) -> None:
    seen = Seen(home=home, links=right().links)
    (finding,) = findings(seen)
    assert (finding.id, finding.repairable, finding.seen) == ("environment-python", False, words)
    assert "3.11" in finding.want
    assert steps(seen) == []


def test_an_environment_with_its_own_python_needs_none_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    describing(monkeypatch, OWN_PYTHON)
    assert ids(replace(right(), home="")) == []


def test_an_unusable_archive_is_one_sentence_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    describing(
        monkeypatch, ArchiveProblem("there is no archive /archives/llm.tar.zst on this machine")
    )
    (finding,) = findings(right())
    assert (finding.id, finding.repairable) == ("environment-archive", False)
    assert "environments.llm" in finding.fix
    assert steps(right()) == []
    probe(target())


def test_an_unusable_archive_does_not_keep_another_environment_from_being_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def describe(path: Path, called: str) -> Archive:
        if path.name == "gone.tar":
            raise ArchiveProblem(f"there is no archive {path} on this machine")
        return ARCHIVE

    monkeypatch.setattr(sys.modules["roles.environment.sources"], "describe", describe)
    section = Environments.model_validate(
        {"llm": {"archive": "/a.tar", "on_path": False}, "other": {"archive": "/gone.tar"}}
    )
    where = target(section=section)
    found = drift(where, state(MISSING), {})
    assert [each.id for each in found] == ["environment-missing", "environment-archive"]
    repairable = [each for each in found if each.repairable]
    *_, unpack = converge(where, state(MISSING), {}, repairable)
    assert isinstance(unpack, Shell) and "tar -x" in unpack.command


SHARED = f"/shared/.lockstep/archives/{ARCHIVE.file_name}"
MISSING = Seen(home="/usr/bin/python3.11", links={"torchrun": "ok", "deepspeed": "ok"})


def test_a_worker_unpacks_what_the_head_published_meanwhile() -> None:
    _, unpack = steps(MISSING, "node2", {"node1": state(MISSING, SHARED)})
    assert f"A={SHARED}" in unpack.command


def test_a_worker_whose_head_cannot_be_read_gets_its_own_copy_and_never_writes_the_depot() -> None:
    _, upload, unpack = steps(MISSING, "node2")
    assert upload.destination == f"/var/lib/lockstep/archives/{ARCHIVE.file_name}"
    assert f"A={upload.destination}" in unpack.command


def test_the_head_notes_what_it_brings_to_the_shared_storage_and_nobody_else_does() -> None:
    note = f"touch /shared/.lockstep/used/lab@10.0.0.1/{ARCHIVE.file_name}\n"
    cases: list[dict[str, Any]] = [{}, {"name": "node2"}, {"shared": False}]
    assert [note in steps(MISSING, **case)[0].command for case in cases] == [True, False, False]


def test_without_a_shared_storage_each_node_gets_a_copy() -> None:
    for name in NODES:
        _, upload, _ = steps(MISSING, name, shared=False)
        assert upload.destination.startswith("/var/lib/lockstep/archives/")


def test_strange_prefixes_reach_the_shell_quoted() -> None:
    section = Environments.model_validate(
        {"llm": {"archive": "/a.tar", "prefix": "/opt/it's mine/llm"}}
    )
    text = probe(target(section=section))
    assert "P='/opt/it'\"'\"'s mine/llm'" in text


def test_recorded_right_node_is_read() -> None:
    seen = parse((RECORDED / "debian-venv-right.txt").read_text().rstrip("\n")).environments["main"]
    assert seen.tree == "directory" and seen.home == "/usr/bin/python3.11"
    assert "torch-2.13.0+cpu.dist-info" in seen.distributions
    assert seen.commands["torchrun"] == Command("#!/opt/lockstep/envs/main/bin/python", True)
    assert seen.links == {"torchrun": "ok", "deepspeed": "ok"}
    assert seen.facts["torch"] == "2.13.0+cpu"


def test_recorded_conda_node_that_was_moved_is_read() -> None:
    found = parse((RECORDED / "rocky-conda-moved.txt").read_text().rstrip("\n"))
    seen = found.environments["llm"]
    assert seen.commands["deepspeed"] == Command("#!/usr/bin/env python", False)
    assert seen.commands["ninja"] == Command("", True)
    assert seen.links["deepspeed"] == "foreign"
    assert seen.fresh[".lockstep-new-333333333333"] == ""
    described = mend.interpreter_prefix(seen.commands["torchrun"].start.encode())
    assert described == b"/data/envs/llm"


def test_recorded_bare_node_has_the_wrong_python() -> None:
    bare = parse((RECORDED / "bare.txt").read_text().rstrip("\n"))
    assert [finding.id for finding in drift(target(), bare, {})] == ["environment-python"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "environment llm\nend",
        "machine x86_64\nenvironment llm\nend",
        "machine x86_64\nglibc new\nenvironment llm\nend",
        "machine x86_64\nglibc 2.36\nenvironment llm",
        "machine x86_64\nglibc 2.36\ntree directory\nend",
        "machine x86_64\nglibc 2.36\nenvironment llm\nnonsense 1\nend",
        "machine x86_64\nglibc 2.36\nenvironment llm\ncommand torchrun\nend",
    ],
)
def test_garbage_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        parse(text)


def test_facts_of_several_environments_carry_their_names() -> None:
    torch = next(fact for fact in role.facts if fact.name == "torch")
    assert torch.read(state(right())) == "2.13.0"
    assert (
        torch.read(EnvironmentState({"a": right(), "b": Seen(), "c": right()}, frozenset(), NODE))
        == "a 2.13.0, c 2.13.0"
    )
    assert torch.read(state(Seen())) is None


@pytest.mark.parametrize(
    ("needs", "node", "id", "words"),
    [
        (Needs("aarch64"), Offer("x86_64", "2.36"), "environment-machine", ("aarch64", "x86_64")),
        (
            Needs("x86_64", "2.34", "lib/libc10.so"),
            Offer("x86_64", "2.28"),
            "environment-glibc",
            ("glibc 2.34 or newer, which lib/libc10.so needs", "glibc 2.28"),
        ),
    ],
)
def test_an_environment_that_cannot_run_on_a_node_is_refused_before_it_is_shipped(
    monkeypatch: pytest.MonkeyPatch, needs: Needs, node: Offer, id: str, words: tuple[str, str]
) -> None:
    describing(monkeypatch, replace(ARCHIVE, needs=needs))
    for seen in (MISSING, replace(right(), stamp='{"archive": "00"}')):
        found = drift(target(), EnvironmentState({"llm": seen}, frozenset(), node), {})
        assert [(finding.id, finding.repairable) for finding in found] == [(id, False)]
        assert words[0] in found[0].want and "node1" in found[0].want and found[0].seen == words[1]


@pytest.mark.parametrize(
    ("needs", "node"),
    [
        (Needs(), Offer("x86_64", "2.17")),
        (Needs("x86_64", "2.9", "x.so"), Offer("x86_64", "2.17")),
        (Needs("x86_64", "2.17", "x.so"), Offer("x86_64", "2.17")),
    ],
)
def test_an_environment_that_a_node_can_run_is_unpacked(
    monkeypatch: pytest.MonkeyPatch, needs: Needs, node: Offer
) -> None:
    describing(monkeypatch, replace(ARCHIVE, needs=needs))
    found = drift(target(), EnvironmentState({"llm": MISSING}, frozenset(), node), {})
    assert [finding.id for finding in found] == ["environment-missing"]


def test_what_a_declared_import_needs_is_refused_where_it_is_declared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs = {"pyarrow": Needs("x86_64", "2.34", "pyarrow/a.so")}
    describing(monkeypatch, replace(ARCHIVE, needs=Needs("x86_64", "2.17"), imports=needs))
    bare = EnvironmentState({"llm": MISSING}, frozenset(), Offer("x86_64", "2.28"))
    assert [finding.id for finding in drift(target(), bare, {})] == ["environment-missing"]
    entry = {"archive": "/archives/llm.tar.zst", "imports": ["torch", "pyarrow.lib"]}
    section = Environments.model_validate({"llm": entry})
    (finding,) = drift(target(section=section), bare, {})
    assert finding.id == "environment-glibc" and "pyarrow/a.so" in finding.want


def test_an_environment_that_works_on_a_node_is_not_judged_by_what_it_seems_to_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    describing(monkeypatch, replace(ARCHIVE, needs=Needs("x86_64", "2.99", "x.so")))
    there = EnvironmentState({"llm": right()}, frozenset(), NODE)
    assert drift(target(), there, {}) == []
