"""Debian 13 (QEMU 10, Python 3.13, libguestfs 1.54): the unit tests and the direct engine's in it.

A root of it is made, with the packages that scripts/setup.sh installs, and becomes the root of a
mount namespace. The kernel is the host's. What needs the appliance does not run there: the root has
no kernel for it, and that of the host is another system's. So of tests/differential what has the
appliance as its reference is left out: test_other (FAT, NTFS, ISO 9660, exFAT, for which test_tools
asks other programs), test_guests, test_tables and test_appliance_xattrs. The hostile images run in
their short form.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.roots import entering, root_archive, unpacked

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the root folder"),
]

ROOT = Path(__file__).resolve().parents[2]
SITE = "usr/local/lib/python3.13/dist-packages"


def packages() -> list[str]:
    """What scripts/setup.sh installs, but for kernels and what makes containers."""
    text = (ROOT / "scripts/setup.sh").read_text()
    lists = re.findall(r"^ *packages\+?=\(([^)]*)\)", text, re.MULTILINE)
    names = [name for found in lists for name in found.split()]
    other = ["qemu-system-arm", "qemu-efi-aarch64"]
    if os.uname().machine == "aarch64":
        other = ["qemu-system-x86"]
    other += ["runc", "golang-github-containers-common"]
    return [name for name in dict.fromkeys(names) if name not in other]


def modules() -> list[str]:
    """What imgtool and its tests take from PyPI, but for what Debian has of its own."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], "pytest>=8", "pytest-xdist>=3.5"]
    return [name for name in wanted if not name.startswith("pyparted")]


@pytest.fixture(scope="module")
def debian() -> Iterator[Path]:
    with unpacked(root_archive("trixie", [*packages(), "apparmor"])) as root:
        pip: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-compile",
            "--target",
            root / SITE,
        ]
        pip += ["--python-version", "3.13", "--only-binary=:all:", *modules()]
        subprocess.run(pip, check=True)
        yield root


def within(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What a program says in the other root, in this tree."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [*entering(root, ROOT), "/usr/bin/python3", "-m", *words],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_doctor_finds_all_but_the_appliance(debian):
    done = within(debian, "imgtool", "doctor", "-o", "csv")
    rows = dict(line.split(",", 2)[:2] for line in done.stdout.splitlines()[1:])
    for name in ("Python binding nbd", "qemu-img", "qemu-nbd", "sandbox (bubblewrap)"):
        assert rows[name] in ("ok", "true", "True"), done.stdout
    assert "appliance kernel" in rows


def test_the_profile_for_apparmor_is_taken(debian):
    """By its parser of version 4, which Debian 12 has not."""
    words = ("--skip-kernel-load", "--skip-cache", ROOT / "debian/apparmor/imgtool")
    command: list[str | Path] = [*entering(debian, ROOT), "/usr/sbin/apparmor_parser", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def passed(done: subprocess.CompletedProcess[str]) -> int:
    """How many tests passed, where none failed."""
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    found = re.search(r"(\d+) passed", done.stdout)
    return int(found[1]) if found else 0


# Guests are made through the appliance, which does not run there; nor are the pages built there.
LEFT_OUT = "not what_is_read_of_a_guest and not page_of_this_installation"


def test_the_unit_tests_pass(debian):
    words = ("pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal")
    assert passed(within(debian, *words, "-k", LEFT_OUT, "tests/unit")) > 1000


# With how many tests each has at least; one of the first has the whole matrix in it.
@pytest.mark.parametrize(
    ("suite", "least"),
    [
        ("differential/test_ext.py", 2),
        ("differential/test_xfs.py", 3),
        ("differential/test_crashed.py", 6),
        ("differential/test_streams.py", 2),
        ("differential/test_tools.py", 4),
        ("hostile", 20),
    ],
)
def test_the_direct_engine_reads_what_the_kernel_reads(debian, suite, least):
    words = ("pytest", "-q", "-p", "no:cacheprovider", f"tests/{suite}")
    assert passed(within(debian, *words)) >= least
