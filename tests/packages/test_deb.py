"""The Debian package where nothing else is: a minimal Debian 12, without libguestfs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guests import guest
from tests.support.roots import entering, root_archive, unpacked

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the root folder"),
]

ROOT = Path(__file__).resolve().parents[2]
AS_USER = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
_TAB = """
. /usr/share/bash-completion/completions/imgtool
COMP_WORDS=(imgtool copy-) COMP_CWORD=1
$(complete -p imgtool | sed 's/.*-F \\([^ ]*\\) .*/\\1/') imgtool
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def deb() -> Path:
    done = subprocess.run([ROOT / "scripts/package-deb"], stdout=subprocess.PIPE, check=True)
    return Path(done.stdout.decode().split()[-1])


def run(root: Path, *words: str, user: bool = False) -> subprocess.CompletedProcess[str]:
    """What a program says in the root, in the folder of the user there."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/work/home",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        "MANPAGER": "cat",
    }
    start = [*entering(root, root / "work"), *(AS_USER if user else [])]
    return subprocess.run([*start, *words], env=environment, capture_output=True, text=True)


def files(root: Path) -> set[str]:
    """Every file of the root that a package could have left."""
    left_by_apt = ("var/lib/apt", "var/cache", "var/lib/dpkg", "var/log", "work", "tmp", "proc")
    names = {
        str(path.relative_to(root)) for path in root.rglob("*") if "__pycache__" not in str(path)
    }
    return {name for name in names if not name.startswith(left_by_apt)}


@pytest.fixture(scope="module")
def installed(deb: Path) -> Iterator[Path]:
    with unpacked(root_archive("bookworm", ["man-db", "bash-completion"])) as root:
        # Minimal roots leave manual pages out; a user's has them.
        (root / "etc/dpkg/dpkg.cfg.d/docker").unlink(missing_ok=True)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        work = root / "work"
        (work / "home").mkdir(parents=True)
        shutil.copy(deb, work)
        subprocess.run(["cp", "--sparse=always", guest("lvm"), work / "guest.qcow2"], check=True)
        (work / "motd").write_text("hello\n")
        subprocess.run(["chown", "-R", "1000:1000", work], check=True)
        assert run(root, "apt-get", "-q", "update").returncode == 0
        words = ("apt-get", "-q", "-y", "install", "--no-install-recommends")
        done = run(root, *words, f"{root}/work/{deb.name}")
        assert done.returncode == 0, done.stdout + done.stderr
        yield root


def test_an_ordinary_user_reads_a_guest_without_libguestfs(installed):
    assert not list((installed / "usr/lib").rglob("libguestfs.so*"))
    for words, expected in (
        (("--version",), "imgtool 0.2.0"),
        (("df", "guest.qcow2"), "/dev/debian-vg/root"),
        (("ls", "guest.qcow2", "/etc/apt"), "sources.list.d"),
        (("copy-out", "guest.qcow2", "/etc/hostname", "home"), ""),
    ):
        done = run(installed, "imgtool", *words, user=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert (installed / "work/home/hostname").read_text() == "dead-guest\n"


def test_a_write_says_which_package_it_needs(installed):
    done = run(installed, "imgtool", "copy-in", "guest.qcow2", "motd", "/etc", user=True)
    assert done.returncode == 6
    assert "sudo apt-get install python3-guestfs" in done.stderr


def test_the_manual_and_completion_are_there(installed):
    done = run(installed, "man", "imgtool-ls", user=True)
    assert "imgtool ls" in done.stdout, done.stderr
    done = run(installed, "bash", "-c", _TAB, user=True)
    assert {"copy-in", "copy-out"} <= set(done.stdout.split()), done.stderr


def test_purge_leaves_nothing(installed):
    before = files(installed)
    done = run(installed, "apt-get", "-q", "-y", "purge", "imgtool")
    assert done.returncode == 0, done.stderr
    gone = before - files(installed)
    assert "usr/bin/imgtool" in gone
    assert [name for name in files(installed) if "imgtool" in name] == []
    assert not [
        path for path in (installed / "usr/lib").rglob("__pycache__") if "imgtool" in str(path)
    ]
