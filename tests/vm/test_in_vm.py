"""The tests in tests/vm/inside: run in one virtual machine, each reported as a test of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.vm.images import build

REPOSITORY = Path(__file__).parents[2]
INSIDE = "tests/vm/inside"
LIMIT = 1800  # seconds, for booting and all tests
LINES = 60  # of output, to explain a test that did not come to its end


@dataclass(frozen=True)
class Run:
    """What came out of the virtual machine: each test's problems, none if it passed."""

    status: int
    output: str
    problems: dict[str, list[str]]
    images_are_the_same: bool


def collected(marks: str) -> list[str]:
    """The ids of the tests in there with these marks, without starting the virtual machine."""
    environment = {**os.environ, "IMGTOOL_IN_VM": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--collect-only",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            marks,
            INSIDE,
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"{INSIDE} cannot be collected:\n{done.stdout}{done.stderr}", pytrace=False)
    return [line for line in done.stdout.splitlines() if "::" in line]


def key(test: str) -> str:
    """How JUnit's file names the test with this id: `package.module.Class.name`."""
    function, bracket, parameters = test.partition("[")
    path, *names = function.split("::")
    module = path.removesuffix(".py").replace("/", ".")
    return ".".join([module, *names]) + bracket + parameters


def problems_in(report: Path) -> dict[str, list[str]]:
    """The problems of each test that ran. Nothing may be skipped: all is there that is needed."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = found.setdefault(f"{case.get('classname')}.{case.get('name')}", [])
        outcomes = [part for part in case if part.tag in ("failure", "error", "skipped")]
        for part in outcomes:
            problems.append(f"{part.tag}: {part.get('message')}\n{part.text or ''}")
        if outcomes:
            problems += [part.text or "" for part in case if part.tag.startswith("system-")]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "test" not in metafunc.fixturenames:
        return
    long = "long" in metafunc.config.getoption("-m")
    tests = [
        pytest.param(
            test,
            id=test.removeprefix(f"{INSIDE}/"),
            marks=[pytest.mark.long] if long else [],
        )
        for test in collected("long" if long else "not long")
    ]
    metafunc.parametrize("test", tests)


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One virtual machine for all tests that were chosen."""
    share = tmp_path_factory.mktemp("vm")
    report = share / "report.xml"
    chosen = [
        str(item.callspec.params["test"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_in_vm
    ]
    images = share / "images"
    images.mkdir()
    build(images)
    before = sums(images)
    done = subprocess.run(
        [
            *("scripts/vm-run", "--memory", "2G", "--timeout", str(LIMIT)),
            *("--share", str(share)),
            *("env", f"IMGTOOL_VM_IMAGES={images}"),
            *(".venv/bin/python", "-m", "pytest", "-v", "-p", "no:cacheprovider"),
            *(f"--junitxml={report}", "-o", "junit_logging=out-err"),
            *("-o", "faulthandler_timeout=300"),  # tells where a test hangs
            # What passed leaves no images in /tmp, which is memory.
            *("-o", "tmp_path_retention_policy=failed"),
            *chosen,
        ],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    problems = problems_in(report) if report.exists() else {}
    return Run(done.returncode, done.stdout, problems, before == sums(images))


def sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in the folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def test_in_vm(test: str, run: Run) -> None:
    problems = run.problems.get(key(test))
    if problems is None:
        tail = "\n".join(run.output.splitlines()[-LINES:])
        pytest.fail(f"did not run; scripts/vm-run: status {run.status}\n{tail}", pytrace=False)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_no_byte_of_the_images_changed(run: Run) -> None:
    """Of those that the tests in there only read."""
    assert run.problems, "nothing ran"
    assert run.images_are_the_same
