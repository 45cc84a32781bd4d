"""`find` says what find(1) says of the same files."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool import open_guest
from imgtool.guest.guest import Guest
from imgtool.search import expression, finding
from imgtool.search.search import Search
from imgtool.search.visiting import Visited

_DAY = 86400
# Away from the edges of days and minutes: both are asked one after the other.
_NOW = int(time.time())
_AGES = {
    "etc/new.conf": 60 * 5 + 30,
    "etc/day.conf": _DAY + 3600,
    "etc/two.conf": 2 * _DAY + 3600,
    "old/old": 100 * _DAY,
}


def _make_tree(top: Path) -> None:
    for folder in ("etc", "old/deep/deeper", "empty", "var/log", "brackets [a]", ".hidden"):
        (top / folder).mkdir(parents=True)
    sizes = {"etc/new.conf": 0, "etc/day.conf": 511, "etc/two.conf": 512, "old/old": 513}
    sizes |= {"old/deep/big": (1 << 20) + 1, "var/log/a b\nc": 3, "etc/UPPER.CONF": 1025}
    sizes |= {"brackets [a]/[x]": 1, ".hidden/.dot": 2, "old/deep/deeper/\udcff": 4}
    for name, size in sizes.items():
        (top / name).write_bytes(b"x" * size)
    (top / "etc/link").symlink_to("new.conf")
    (top / "etc/to-old").symlink_to("../old")
    os.link(top / "old/old", top / "old/deep/hard")
    os.mkfifo(top / "var/fifo")
    (top / "etc/day.conf").chmod(0o4755)
    (top / "etc/two.conf").chmod(0o600)
    (top / "empty").chmod(0o1777)
    os.chown(top / "etc/two.conf", 1000, 70000)
    os.chown(top / "etc/link", 1000, 0, follow_symlinks=False)
    for path in [*top.rglob("*"), top]:
        age = _AGES.get(str(path.relative_to(top)), 10 * _DAY)
        os.utime(path, (_NOW - age, _NOW - age), follow_symlinks=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("find") / "tree"
    top.mkdir()
    _make_tree(top)
    return top


@pytest.fixture(scope="module")
def guest(tree: Path) -> Iterator[Guest]:
    image = tree.parent / "disk.img"
    words: list[str | Path] = [
        "mke2fs",
        "-q",
        "-t",
        "ext4",
        "-O",
        "^resize_inode",
        "-d",
        tree,
        image,
        "16M",
    ]
    subprocess.run(words, check=True)
    with open_guest(image, engine="direct") as opened:
        moment = opened.lstat("/").mtime_ns  # mke2fs has written to it
        os.utime(tree, ns=(moment, moment))
        yield opened


class _Recorded(Search):
    """A search whose actions are kept."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(guest, self._fail)
        self.written = b""

    @staticmethod
    def _fail(path: bytes, line: str) -> None:
        raise AssertionError(f"{path!r}: {line}")

    def write(self, content: bytes) -> None:
        self.written += content

    def print_name(self, visited: Visited) -> None:
        self.write(visited.entry.path + b"\n")

    def print_line(self, visited: Visited) -> None:
        raise NotImplementedError


def _ours(guest: Guest, start: str, words: list[str]) -> list[bytes]:
    parsed = expression.parse(words, time.time_ns())
    search = _Recorded(guest)
    start = "/" + start.strip("./")
    entry = finding.start_at(search, start, follow=parsed.options.follow_start)
    for visited in finding.find(search, entry, parsed):
        if not parsed.acts:
            search.write(visited.entry.path + b"\0")
    end = b"\0" if b"\0" in search.written else b"\n"
    return sorted(line for line in search.written.split(end) if b"lost+found" not in line)


def _theirs(tree: Path, start: str, words: list[str]) -> list[bytes]:
    acts = any(word in ("-print", "-print0", "-printf") for word in words)
    follow = ["-H"] if "-H" in words else []
    asked = [word for word in words if word != "-H"]
    if not acts:
        # What stands after an 'or' would belong to it alone.
        asked = ["(", *asked, ")", "-print0"] if asked else ["-print0"]
    done = subprocess.run(
        ["find", *follow, start, *asked],
        cwd=tree,
        check=True,
        capture_output=True,
        env={"LC_ALL": "C.UTF-8", "TZ": "UTC", "PATH": os.environ["PATH"]},
    )
    end = b"\0" if b"\0" in done.stdout else b"\n"
    lines = done.stdout.split(end)
    if not acts or "-print" in words or "-print0" in words:
        lines = [
            b"/" + line.removeprefix(b".").removeprefix(b"/") if line else line for line in lines
        ]
    return sorted(lines)


_EXPRESSIONS = [
    "",
    "-name '*.conf'",
    "-iname '*.conf'",
    "-name '[[]x]'",
    r"-name '\[x\]'",
    "-mindepth 1 -name '.*'",
    "-name '*'",
    "-name '?'",
    "-name '*[!a-z]'",
    "-name '*[^a-z]'",
    "-type f -name '*o*' -o -type d -name '*o*'",
    "-type f,l",
    "-type l",
    "-type p",
    "! -type f",
    "-not ( -type f -o -type d )",
    "-size 1",
    "-size -1",
    "-size +1",
    "-size 0",
    "-size 511c",
    "-size +1k -size -3k",
    "-size -2M -type f",
    "-size +1M",
    "-size 256w",
    "-mtime 0",
    "-mtime 1",
    "-mtime -1",
    "-mtime +1",
    "-mtime 2 -o -mtime +99",
    "-mmin -60",
    "-mmin +60 -mmin -2000",
    "-newermt '3 days ago'",
    "-newermt yesterday",
    "-perm 600",
    "-perm -4000",
    "-perm /6000",
    "-perm /u+s,o+t",
    "-perm -a+x",
    "-perm u=rw",
    "-perm /000",
    "-uid 1000",
    "-uid -1000 -type l",
    "-gid +65535",
    "-links 2 -type f",
    "-links +2",
    "-empty",
    "-empty -type d",
    "-path './old/*' -type d",
    "-maxdepth 0",
    "-maxdepth 1",
    "-maxdepth 2 -type f",
    "-mindepth 2 -maxdepth 3",
    "-mindepth 1 -type d",
    "-path ./old -prune -o -print0",
    "-name deep -prune -o -type f -print0",
    "-maxdepth 3 -name deep -prune -o -print0",
    "-xdev -type d",
    "-lname '*conf'",
    "-ilname '*CONF'",
    "-false -o -true",
    "-type f -a -name o*",
    "-type d ! -empty ( -name e* -o -name v* )",
    "-type f -printf '%P|%s|%m|%M|%y|%n|%d|%U|%G|%f\\n'",
    "-type l -printf '%P -> %l\\n'",
    "-type f -printf '%T@ %T+ %TY-%Tm-%Td %TH:%TM:%TS %t\\n'",
    "-type f -printf '%8s|%-8s|%08s|%04m|%03d|%%|\\101|\\t|\\\\\\n'",
]


@pytest.mark.parametrize("words", _EXPRESSIONS)
def test_expressions_mean_what_they_mean_to_find(words: str, guest: Guest, tree: Path) -> None:
    split = shlex.split(words)
    expected = _theirs(tree, ".", split)
    # A path begins with `/` in a guest, as it begins with `.` here.
    ours = [word.removeprefix(".") if word.startswith("./") else word for word in split]
    assert _ours(guest, ".", ours) == expected
    assert expected != [b""] or words.startswith("-false")


@pytest.mark.parametrize("start", ["./etc", "./etc/new.conf", "./etc/link", "./etc/to-old"])
@pytest.mark.parametrize("words", ["", "-maxdepth 1", "-H -maxdepth 1", "-H -type f"])
def test_searches_begin_where_those_of_find_begin(
    start: str, words: str, guest: Guest, tree: Path
) -> None:
    split = shlex.split(words)
    expected = _theirs(tree, start, split)
    real = (
        str(Path(start)) if "-H" not in words else os.path.relpath((tree / start).resolve(), tree)
    )
    # A link that is followed has the name of what it leads to.
    expected = sorted(
        b"/" + os.fsencode(real) + line.removeprefix(b"/" + os.fsencode(Path(start)))
        if line
        else line
        for line in expected
    )
    assert _ours(guest, start, split) == expected
