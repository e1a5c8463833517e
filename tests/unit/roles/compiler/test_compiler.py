"""Compilers: every login finds one that will do, and whatever else it finds is named."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inventory.cluster import Cluster, Node
from roles.compiler import CompilerSpec, CompilerState, role
from roles.compiler.choose import Choice, choose, headers_package
from roles.compiler.converge import proof, wrapper
from roles.compiler.probe import MARK, NAMES, STAMP, Tool, parse, probe
from roles.core.role import Finding, Target, Unreadable
from roles.core.steps import Shell
from roles.packages import PackagesSpec

RECORDED = Path(__file__).parent / "recorded"
NODE = Node(name="node1", address="10.77.0.11")


def target(**declared: Any) -> Target[CompilerSpec]:
    sections = {"packages": PackagesSpec(local="/srv/lockstep/packages")}
    cluster = Cluster("lab", Path("lab.yaml"), {"node1": NODE}, sections=sections)
    return Target(cluster, NODE, CompilerSpec(**declared))


def recorded(name: str) -> CompilerState:
    return parse((RECORDED / f"{name}.txt").read_text().rstrip("\n"))


RIGHT = recorded("bookworm-converged")


def found(state: CompilerState, **declared: Any) -> list[Finding]:
    return role.drift(target(**declared), state, {})


def ids(state: CompilerState, **declared: Any) -> list[str]:
    return [finding.id for finding in found(state, **declared)]


def steps(state: CompilerState, **declared: Any) -> list[str]:
    todo = [finding for finding in found(state, **declared) if finding.repairable]
    done = list(role.converge(target(**declared), state, {}, todo))
    assert all(isinstance(step, Shell) for step in done)
    return [step.command for step in done if isinstance(step, Shell)]


def with_tool(state: CompilerState, name: str, tool: Tool) -> CompilerState:
    return replace(state, tools={**state.tools, name: tool})


def test_a_right_node_has_no_findings_and_no_steps() -> None:
    assert ids(RIGHT) == [] and steps(RIGHT) == []
    assert role.facts[0].read(RIGHT) == "12.2.0"


def test_a_bare_node_gets_all_packages_in_one_transaction() -> None:
    state = recorded("bookworm-bare")
    assert ids(state) == ["gcc-too-old", "ninja-missing", "python-headers"]
    install, wrappers, _ = steps(state)
    assert install.splitlines()[-1].endswith("-- gcc g++ ninja-build python3.11-dev")
    assert wrappers == ":"


def test_what_is_not_wanted_is_not_missed() -> None:
    state = recorded("bookworm-bare")
    assert ids(state, ninja=False, python_headers=False) == ["gcc-too-old"]


def test_a_c_compiler_without_a_cplusplus_one_will_not_do() -> None:
    state = replace(RIGHT, tools={name: RIGHT.tools[name] for name in ("gcc", "cc")})
    (finding,) = found(state)
    assert finding.seen == "g++: none, c++: none"


def test_enterprise_linux_8_gets_the_nearest_toolset_for_every_login() -> None:
    state = recorded("el8")
    assert ids(state) == ["gcc-too-old", "ninja-missing", "python-headers"]
    install, wrappers, ninja = steps(state)
    assert (
        "install gcc-toolset-9-gcc gcc-toolset-9-gcc-c++ ninja-build /usr/include/python3.6m/Python.h"
        in install
    )
    assert "apt-get" not in install
    assert all(f"/usr/local/bin/{name} " in wrappers for name in NAMES)
    assert "/usr/local/bin/ninja" in ninja


def test_enterprise_linux_7_takes_a_devtoolset_that_is_installed() -> None:
    state = recorded("el7")
    assert ids(state) == ["gcc-too-old"]
    (wrappers,) = steps(state)
    assert "/usr/local/bin/c++" in wrappers
    choice = choose(CompilerSpec(), state)
    assert choice == Choice(
        (),
        "/opt/rh/devtoolset-11/root/usr/bin/gcc",
        "/opt/rh/devtoolset-11/root/usr/bin/g++",
        "/opt/rh/devtoolset-11/root/usr/bin",
    )
    bare = choose(CompilerSpec(), replace(state, candidates=()))
    assert bare is not None and bare.packages == ("devtoolset-9-gcc", "devtoolset-9-gcc-c++")


@pytest.mark.parametrize(
    ("os_name", "least", "most", "packages"),
    [
        ("ubuntu 18.04", 8, None, ("gcc-8", "g++-8")),
        ("ubuntu 20.04", 9, None, ("gcc", "g++")),
        ("ubuntu 24.04", 9, 12, ("gcc-12", "g++-12")),
        ("debian 12", 9, 11, ("gcc-11", "g++-11")),
        ("debian 10", 9, None, None),
        ("linuxmint 21", 9, None, ("gcc", "g++")),
    ],
)
def test_debian_and_ubuntu_offer_other_versions_beside_their_own(
    os_name: str, least: int, most: int | None, packages: tuple[str, ...] | None
) -> None:
    state = replace(recorded("bookworm-bare"), os=os_name)
    choice = choose(CompilerSpec(gcc=least, most=most), state)
    assert (choice.packages if choice else None) == packages
    if packages is None:
        finding = found(state)[0]
        assert not finding.repairable and os_name in finding.fix


def test_a_compiler_too_young_for_nvcc_is_replaced_and_stays_installed() -> None:
    state = replace(RIGHT, candidates=("11", "12"))
    (finding,) = found(state, most=11)
    assert finding.id == "gcc-too-old" and "gcc 9 to 11" in finding.want
    (wrappers,) = steps(state, most=11)
    assert wrappers.count("/usr/local/bin/") >= 4


def test_a_system_whose_gcc_was_turned_to_an_older_version_gets_its_own_by_wrappers() -> None:
    old = {name: Tool(f"/usr/bin/{name}", "9.5.0", False) for name in NAMES}
    state = replace(RIGHT, os="ubuntu 22.04", tools=old, candidates=("9",))
    choice = choose(CompilerSpec(gcc=10), state)
    assert choice == Choice(("gcc-11", "g++-11"), "/usr/bin/gcc-11", "/usr/bin/g++-11")
    there = choose(CompilerSpec(gcc=10), replace(state, candidates=("9", "11")))
    assert there == Choice((), "/usr/bin/gcc-11", "/usr/bin/g++-11")


def test_an_rpm_system_takes_a_versioned_compiler_that_somebody_installed() -> None:
    old = {name: Tool(f"/usr/bin/{name}", "7.3.0", False) for name in NAMES}
    state = replace(recorded("el8"), os="kylin V10", tools=old, candidates=("11",))
    assert choose(CompilerSpec(), state) == Choice((), "/usr/bin/gcc-11", "/usr/bin/g++-11")


@pytest.mark.parametrize("os_name", ["kylin V10", "openEuler 20.03"])
def test_a_system_of_no_table_whose_own_gcc_is_too_old_is_said_to_offer_none(os_name: str) -> None:
    old = {name: Tool(f"/usr/bin/{name}", "7.3.0", False) for name in NAMES}
    state = replace(recorded("el8"), os=os_name, tools=old, candidates=(), headers=True)
    (finding,) = found(state, ninja=False)
    assert finding.fix.startswith(f"{os_name} offers no such compiler") and not finding.repairable
    empty = replace(state, tools={})  # what its package brings is known when it is there
    assert choose(CompilerSpec(), empty) == Choice(packages=("gcc", "gcc-c++"))
    half = replace(state, tools={"gcc": Tool("/usr/bin/gcc", "12.3.1", False)})
    assert choose(CompilerSpec(), half) == Choice(packages=("gcc", "gcc-c++"))
    broken = {name: replace(tool, version="") for name, tool in old.items()}
    assert choose(CompilerSpec(), replace(state, tools=broken)) == Choice(
        packages=("gcc", "gcc-c++")
    )


def test_lockstep_takes_its_wrapper_away_when_the_systems_own_will_do() -> None:
    state = with_tool(RIGHT, "c++", Tool("/usr/local/bin/c++", "11.3.0", True))
    assert ids(state, gcc=11) == []
    assert ids(state, gcc=12) == ["gcc-too-old"]
    assert steps(state, gcc=12)[-1] == "rm -f /usr/local/bin/c++"


@pytest.mark.parametrize("path", ["/usr/local/bin/gcc", "/opt/conda/bin/gcc"])
def test_a_strange_compiler_is_named_and_never_overwritten(path: str) -> None:
    state = with_tool(RIGHT, "gcc", Tool(path, "7.3.0", False))
    (finding,) = found(state)
    assert finding.id == "compiler-shadowed" and path in finding.fix and not finding.repairable
    assert steps(state) == []
    assert ids(with_tool(RIGHT, "gcc", Tool(path, "13.1.0", False))) == []


def test_a_compiler_that_does_not_run_will_not_do() -> None:
    (finding,) = found(with_tool(RIGHT, "cc", Tool("/usr/bin/cc", "", False)))
    assert finding.seen == "cc: does not run"


@pytest.mark.parametrize(
    ("os_name", "manager", "python", "package"),
    [
        ("debian 12", "apt", "3.11", "python3.11-dev"),
        ("debian 12", "apt", None, "python3-dev"),
        ("rocky 8.9", "rpm", "3.6", "/usr/include/python3.6m/Python.h"),
        ("rocky 8.9", "rpm", "3.11", "/usr/include/python3.11/Python.h"),
        ("almalinux 9.3", "rpm", "3.9", "/usr/include/python3.9/Python.h"),
        ("rocky 8.9", "rpm", None, "python3-devel"),
    ],
)
def test_the_headers_belong_to_the_systems_python(
    os_name: str, manager: Any, python: str | None, package: str
) -> None:
    assert headers_package(replace(RIGHT, os=os_name, manager=manager, python=python)) == package


def test_a_node_without_python3_gets_it_with_its_headers() -> None:
    state = replace(RIGHT, python=None, headers=False)
    (finding,) = found(state)
    assert finding.id == "python-headers" and "no /usr/bin/python3" in finding.seen
    assert steps(state)[0].splitlines()[-1].endswith("-- python3-dev")


def test_a_wrapper_runs_the_toolset_with_its_own_assembler_first(tmp_path: Path) -> None:
    folder = tmp_path / "opt"
    folder.mkdir()
    for name in ("g++", "as"):
        (folder / name).write_text("#!/bin/sh\necho toolset\n")
        (folder / name).chmod(0o755)
    (folder / "g++").write_text('#!/bin/sh\nas; printf "<%s>" "$@"\n')
    text = wrapper(Choice((), f"{folder}/gcc", f"{folder}/g++", str(folder)), "c++")
    (tmp_path / "c++").write_text(text)
    done = subprocess.run(
        ["sh", str(tmp_path / "c++"), "a b", "$x"], capture_output=True, text=True
    )
    assert done.stdout == "toolset\n<a b><$x>"
    assert text.splitlines()[1] == MARK


def run_probe(tmp_path: Path, path: str, **environ: str) -> CompilerState:
    done = subprocess.run(
        ["/bin/sh", "-c", probe(target())],
        env={"PATH": path, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return parse(done.stdout.strip("\n"))


def test_the_probe_asks_what_the_path_of_the_login_leads_to(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, version in ((first, "7.5.0"), (second, "11.4.0")):
        folder.mkdir()
        for name in ("gcc", "c++"):
            (folder / name).write_text(f"#!/bin/sh\necho {version}\n")
            (folder / name).chmod(0o755)
    (first / "gcc").chmod(0o644)  # not to be run: the next folder counts
    state = run_probe(tmp_path, f"{first}:{second}:/usr/bin:/bin")
    assert state.tools["gcc"] == Tool(f"{second}/gcc", "11.4.0", False)
    assert state.tools["c++"] == Tool(f"{first}/c++", "7.5.0", False)


def test_under_sudo_the_path_that_sudo_was_started_with_counts(tmp_path: Path) -> None:
    sudo = tmp_path / "sudo"
    sudo.symlink_to("/bin/dash" if Path("/bin/dash").exists() else "/bin/bash")
    script = tmp_path / "probe"
    script.write_text(probe(target()))
    done = subprocess.run(  # a process called sudo, which gives its command another PATH
        [str(sudo), "-c", f"env PATH=/usr/bin:/bin SUDO_COMMAND=x sh {script}; true"],
        env={"PATH": "/opt/login/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert parse(done.stdout.strip("\n")).path == "/opt/login/bin:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("manager\tapt", "manager\tzypper"),
        ("12.2.0", "zwölf"),
        ("headers\tyes", "headers\t是"),
        ("candidate\t12", "candidate\tneu"),
        ("python\t3.11", "python\t3"),
        ("ninja\t/usr/bin/ninja", "ninja\t未找到"),
        ("tool\tgcc", "outil\tgcc"),
    ],
)
def test_what_is_not_understood_is_unreadable(old: str, new: str) -> None:
    text = (RECORDED / "bookworm-converged.txt").read_text().rstrip("\n")
    assert old in text
    with pytest.raises(Unreadable):
        parse(text.replace(old, new, 1))


DAMAGE = """missing     /usr/share/doc/gcc-12/NEWS.gz
??5?????? c /etc/ld.so.conf
missing     /usr/include/c++/12/vector"""


def proved(tmp_path: Path, body: str) -> str:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\ncat >{tmp_path}/source\n{body}\n")
    compiler.chmod(0o755)
    for name, text in (
        ("dpkg-query", ":"),
        (
            "dpkg",
            f"case $1 in --verify) echo '{DAMAGE}';; -S) echo libstdc++-12-dev:amd64: $2;; esac",
        ),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = proof(target()).replace("PATH=/usr/local/bin", f"PATH={tmp_path}:/usr/local/bin")
    script = script.replace(str(Path(STAMP).parent), str(tmp_path))
    return subprocess.run(
        ["sh", "-c", script], env=dict(os.environ), capture_output=True, text=True, check=True
    ).stdout


def test_the_proof_tells_the_line_that_names_the_cause(tmp_path: Path) -> None:
    said = proved(
        tmp_path, "echo In file; echo 'x.c:1: fatal error: vector: No such file' >&2; exit 1"
    )
    assert said.startswith("compiler-broken\t") and "fatal error: vector" in said
    stamp = tmp_path / Path(STAMP).name
    assert stamp.read_text() == "libstdc++-12-dev\n"
    assert proved(tmp_path, "exit 0") == "" and not stamp.exists()
    assert "#include <Python.h>\nint main()" in (tmp_path / "source").read_text()


def test_damaged_packages_are_unpacked_again() -> None:
    text = (RECORDED / "bookworm-converged.txt").read_text().rstrip("\n").removesuffix("end")
    state = parse(f"{text}damaged\tg++-12\ndamaged\tlibstdc++-12-dev\nend")
    (finding,) = found(state)
    assert finding.id == "compiler-broken" and "g++-12, libstdc++-12-dev" in finding.seen
    (again,) = steps(state)
    last = again.splitlines()[-1]
    assert "--reinstall" in last and last.endswith("-- g++-12 libstdc++-12-dev")


def test_a_toolset_behind_wrappers_is_right_on_enterprise_linux_9() -> None:
    state = recorded("el9-toolset")
    assert ids(state, gcc=13) == [] and role.facts[0].read(state) == "13.2.1"


def test_a_range_without_a_version_is_refused() -> None:
    assert [path for path, _ in CompilerSpec(gcc=12, most=11).problems(target().cluster)] == [
        "most"
    ]
    with pytest.raises(ValidationError):
        CompilerSpec(gcc=4)
