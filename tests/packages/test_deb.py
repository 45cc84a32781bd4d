"""The Debian package where nothing else is: a minimal Debian 12, without libguestfs."""

from __future__ import annotations

import os
import re
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


def documentation(root: Path) -> dict[Path, str]:
    """The pages of the package."""
    every = (root / "usr/share/doc/imgtool").rglob("*.txt")
    return {page: page.read_text() for page in every}


def test_no_page_leads_to_what_is_not_there(installed):
    pages = documentation(installed)
    links = 0
    for page, text in pages.items():
        for file in re.findall(r"\((?!/)([\w./-]+\.txt)\)", text):
            links += 1
            assert (page.parent / file).is_file(), f"{page}: {file}"
        assert "](" not in text, page
        assert not re.search(r"[\w/]+\.md\b(?!`)", text), page
    assert links > 100


def test_pages_have_what_is_generated(installed):
    pages = documentation(installed)
    assert [page for page, text in pages.items() if "generated:" in text] == []
    commands = installed / "usr/share/doc/imgtool/reference/commands"
    assert "--preserve-owner" in pages[commands / "copy-in.txt"]
    assert "use_percent" in pages[commands / "df.txt"]
    assert "`append-line`" in pages[commands.parent / "spec.txt"]
    assert "`imgtool chain tree`" in pages[commands.parent / "json.txt"]
    assert not (installed / "usr/share/doc/imgtool/development").exists()


def test_the_readme_is_for_who_has_the_package(installed):
    readme = (installed / "usr/share/doc/imgtool/README.txt").read_text()
    for words in ("Ten tasks", "--password root:prompt", "man imgtool", "howto/index.txt"):
        assert words in readme
    assert "scripts/" not in readme


def test_each_command_of_a_group_has_its_page(installed):
    done = run(installed, "man", "imgtool-overlay-commit", user=True)
    assert "imgtool overlay commit" in done.stdout, done.stderr
    page = installed / "usr/share/man/man1/imgtool-overlay-commit.1.gz"
    assert os.readlink(page) == "imgtool-overlay.1.gz"


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
