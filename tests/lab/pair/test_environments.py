"""Pins and editable packages of an environment on real nodes: refused, accepted, shipped again."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import yaml

from tests.lab.site import JOB, PACKAGING, TOOL, Site

pytestmark = pytest.mark.slow


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A small wheel that requires these."""
    info = f"{name}-{version}.dist-info"
    lines = "".join(f"Requires-Dist: {one}\n" for one in requires)
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{lines}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as made:
        for path, text in files.items():
            made.writestr(path, text)
        record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
        made.writestr(f"{info}/RECORD", record)


def test_a_pin_that_breaks_another_package_is_refused_until_the_file_accepts_it(lab: Site) -> None:
    lab.converge()
    lab.finished(JOB["name"])
    declared = yaml.safe_load(lab.cluster.read_text())["environments"]
    wheels = Path(declared["main"]["wheels"])
    wheel(wheels, "shellingham", "1.4", "nowhere_near>=2")
    pins = {"packaging": PACKAGING, "shellingham": "1.4"}
    refused = {**declared["main"], "pins": pins}
    lab.declare(environments={**declared, "main": refused})
    done = lab.pyinfra("deploy/cluster.py", "-y")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "pin-conflict: want nowhere_near>=2" in done.stderr
    assert "environments.main.accept: {shellingham: [nowhere-near]}" in done.stderr
    site = "/opt/lockstep/envs/main/lib/python3.*/site-packages"
    assert "shellingham-1.4" not in lab.shell("node2", f"ls -d {site}/shellingham-*")
    report = lab.verify()
    assert {(found["role"], found["id"]) for found in report["findings"]} == {
        ("pins", "pin-conflict")
    }

    accepted = {**refused, "accept": {"shellingham": ["nowhere-near"]}}
    lab.declare(environments={**declared, "main": accepted})
    lab.converge()
    assert "shellingham-1.4" in lab.shell("node2", f"ls -d {site}/shellingham-*")
    report = lab.verify()
    assert report["verdict"] == "ok", report["findings"]
    rows = {row["fact"]: row["values"] for row in report["identity"]}
    assert "shellingham needs nowhere_near>=2" in rows["requirements not met"]["node1"]
    assert lab.converge()["totals"]["success"] == 0

    lab.declare(environments=declared)
    lab.converge()
    assert lab.verify()["verdict"] == "ok"


def test_a_source_that_was_edited_here_is_shipped_again(lab: Site) -> None:
    lab.converge()
    lab.finished(JOB["name"])
    (lab.directory / TOOL.name / "rehearsal_tool" / "__init__.py").write_text("ANSWER = 43\n")
    report = lab.verify()
    assert {found["id"] for found in report["findings"]} == {"editable-outdated"}
    lab.converge()
    code = "import rehearsal_tool; print(rehearsal_tool.ANSWER)"
    for node in ("node1", "node2"):
        assert lab.shell(node, f"/opt/lockstep/envs/main/bin/python -c '{code}'") == "43\n"
    assert lab.verify()["verdict"] == "ok"
    assert lab.converge()["totals"]["success"] == 0
