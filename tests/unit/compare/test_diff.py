"""`imgtool diff`: nothing that differs is missed, nothing made up, what is shared is not read."""

from __future__ import annotations

import base64
import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imgtool.cli.commands import diffing
from imgtool.compare import differences, points, text
from imgtool.compare.differences import Walk, changed_fields, merge_walks
from imgtool.engines.direct.worker.shared import Shared
from imgtool.engines.direct.worker.volumes import DiskRange
from imgtool.errors import UsageError
from imgtool.guest.model import Entry
from tests.support.commands import Result, run_here

SIZE = 16 << 20
CLUSTER = 64 << 10
ODD = b"odd\xff\x1b[31m\n name"
ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"}


def ran(*words: object, stdin: str | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        input=stdin,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@functools.cache  # the images stay as they are
@functools.cache  # the images stay as they are
def diff(*words: object) -> Result:
    return run_here("diff", "--engine", "direct", *words)


def shared_files(*words: object) -> int:
    """Of how many files a diff says that both sides have their content from the same place."""
    done = subprocess.run(
        [sys.executable, "-m", "imgtool", "diff", "--engine", "direct", "-v", *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stderr.split("content: ")[1].split()[0])


def rows(*words: object) -> dict[str, Any]:
    """The rows of a diff by their paths; nothing may have gone wrong."""
    done = diff("-o", "jsonl", *words)
    assert (done.status, done.err) == (0, "")
    found = [json.loads(line) for line in done.out.splitlines()]
    return {row["path"]: row for row in found}


def in_debugfs(image: Path, *commands: str) -> None:
    ran("debugfs", "-w", "-f", "-", image, stdin="\n".join(commands) + "\n")


def block_of(image: Path, path: str) -> int:
    """Where the first block of a file is, in bytes."""
    return int(ran("debugfs", "-R", f"blocks {path}", image).split()[0]) * 4096


def overlay_of(base: Path, changed: Path) -> Path:
    """An overlay on a raw base with only those clusters that are different in `changed`."""
    overlay = changed.with_suffix(".qcow2")
    ran("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay)
    old, new = base.read_bytes(), changed.read_bytes()
    commands = []
    for at in range(0, len(old), CLUSTER):
        piece = new[at : at + CLUSTER]
        if piece != old[at : at + CLUSTER]:
            source = changed.parent / f"{changed.stem}-{at}"
            source.write_bytes(piece)
            commands += ["-c", f"write -q -s {source} {at} {CLUSTER}"]
    ran("qemu-io", "-f", "qcow2", *commands, overlay)
    return overlay


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    root = folder / "root"
    (root / "etc").mkdir(parents=True)
    (root / "data").mkdir()
    (root / "etc/motd").write_text("one\ntwo\nthree\n")
    (root / "etc/same-size").write_bytes(b"before")
    (root / "etc/mode").write_bytes(b"")
    (root / "etc/gone").write_bytes(b"gone")
    (root / "etc/binary").write_bytes(b"\0old")
    (root / "etc/link").symlink_to("motd")
    (root / "etc/becomes-a-link").write_bytes(b"")
    (root / "long").write_bytes(b"a line\n" * 200_000)
    (root / os.fsdecode(ODD)).write_bytes(b"odd\n")
    for number in range(20):
        (root / f"data/{number:02}").write_bytes(os.urandom(CLUSTER))
    for path in (root, *root.rglob("*")):
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    image = folder / "base.raw"
    with image.open("wb") as file:
        file.truncate(SIZE)
    ran("mke2fs", "-q", "-t", "ext4", "-b", "4096", "-d", root, image)
    return image


@pytest.fixture(scope="module")
def changed(base: Path) -> Path:
    """The image after some changes, as an overlay on the base."""
    folder = base.parent
    image = folder / "changed.raw"
    image.write_bytes(base.read_bytes())
    for name, content in (
        ("motd", b"one\n2\nthree\n"),
        ("new", b"new\n"),
        ("binary", b"\0new!"),
        ("long", b"another line\n" * 200_000),
        ("odd", b"odd\x1b[31m\n"),
    ):
        (folder / name).write_bytes(content)
    in_debugfs(
        image,
        "cd /etc",
        "rm motd",
        f"write {folder}/motd motd",
        f"write {folder}/new new",
        "rm gone",
        "rm binary",
        f"write {folder}/binary binary",
        "rm link",
        "symlink link elsewhere",
        "rm becomes-a-link",
        "symlink becomes-a-link motd",
        "sif mode mode 0104750",
        "sif mode uid 7",
        "sif mode gid 8",
        "sif . mtime @1700000000",
        "cd /",
        "rm long",
        f"write {folder}/long long",
    )
    # The content alone, as nobody could see it from outside.
    with image.open("r+b") as file:
        file.seek(block_of(image, "/etc/same-size"))
        file.write(b"after!")
    return overlay_of(base, image)


def test_every_kind_of_difference_is_found_and_nothing_else(base: Path, changed: Path) -> None:
    found = rows(base, changed)
    assert {path: (row["change"], row["fields"]) for path, row in found.items()} == {
        "/etc/becomes-a-link": ("changed", ["type", "mode", "mtime"]),
        "/etc/binary": ("changed", ["size", "mtime"]),
        "/etc/gone": ("removed", []),
        "/etc/link": ("changed", ["mtime", "target"]),
        "/etc/mode": ("changed", ["mode", "uid", "gid"]),
        "/etc/motd": ("changed", ["size", "mtime"]),
        "/etc/new": ("added", []),
        "/long": ("changed", ["size", "mtime"]),
    }
    mode = found["/etc/mode"]
    assert (mode["mode_a"], mode["mode_b"]) == ("0644", "4750")
    assert (mode["uid_b"], mode["gid_b"]) == (7, 8)
    link = found["/etc/link"]
    assert (link["target_a"], link["target_b"]) == ("motd", "elsewhere")
    assert found["/etc/gone"]["size_a"] == 4
    assert found["/etc/gone"]["size_b"] is None


def test_the_other_direction_is_the_mirror_image(base: Path, changed: Path) -> None:
    found = rows(changed, base)
    assert found["/etc/new"]["change"] == "removed"
    assert found["/etc/gone"]["change"] == "added"


def test_an_image_is_the_same_as_itself(changed: Path) -> None:
    done = diff("--all", "--checksum", "md5", "--exit-code", changed, changed)
    assert (done.status, done.out, done.err) == (0, b"", "")


def test_checksum_compares_content_of_the_same_size_and_time(base: Path, changed: Path) -> None:
    found = rows(base, changed, "--checksum", "md5", "--path", "/etc")
    same = found["/etc/same-size"]
    assert (same["change"], same["fields"]) == ("changed", ["content"])
    sums = [hashlib.md5(content).hexdigest() for content in (b"before", b"after!")]
    assert [same["checksum_a"], same["checksum_b"]] == sums
    assert found["/etc/motd"]["fields"] == ["size", "mtime", "content"]
    assert len(found["/etc/new"]["checksum_b"]) == 32
    assert "/long" not in found


def test_blocks_that_the_chain_shares_are_not_read(base: Path, changed: Path) -> None:
    words = ("--checksum", "sha256", "--against-base", changed)
    # All files of data but those that lie beside something that changed, in one cluster with it.
    assert 16 <= shared_files(*words) <= 24
    done = diff(*words)
    assert b"  content\n" in done.out
    full = rows(base, changed.with_suffix(".raw"), "--checksum", "sha256")
    assert rows(changed, "--against-base", "--checksum", "sha256") == full


def test_xfs_tells_what_is_shared_too(tmp_path: Path) -> None:
    disk, overlay = tmp_path / "disk.raw", tmp_path / "overlay.qcow2"
    proto = ["/none", "0 0", "d--755 0 0"]
    for name in ("one", "two", "three"):
        (tmp_path / name).write_bytes(name.encode() * (CLUSTER // 2))
        proto.append(f"{name} ---644 0 0 {tmp_path / name}")
    (tmp_path / "proto").write_text("\n".join([*proto, "$", "$"]) + "\n")
    with disk.open("wb") as file:
        file.truncate(320 << 20)
    ran("mkfs.xfs", "-q", "-p", tmp_path / "proto", disk)
    with disk.open("rb") as file:
        at = file.read(64 << 20).index(b"two" * 1000) + CLUSTER
    ran("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk, overlay)
    ran("qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {at - at % 512} 512", overlay)
    words = (overlay, "--against-base", "--checksum", "sha256")
    assert diff(*words).out == b"changed  file       /two  content\n"
    assert shared_files(*words) >= 1


def test_two_overlays_of_one_base_share_it(base: Path, changed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(base.read_bytes())
    with other.open("r+b") as file:
        file.seek(block_of(base, "/data/07"))
        file.write(b"only the content")
    overlay = overlay_of(base, other)
    words = (changed, overlay, "--checksum", "md5", "--backing-dir", base.parent)
    found = rows(*words)
    assert found["/data/07"]["fields"] == ["content"]
    assert found["/etc/same-size"]["fields"] == ["content"]
    assert shared_files(*words) >= 15


def test_an_internal_snapshot_is_compared_with_the_present(base: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    ran("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, disk)
    ran("qemu-img", "snapshot", "-c", "before", disk)
    at = block_of(base, "/data/03")
    ran("qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 {at} 4096", disk)
    ran("qemu-img", "snapshot", "-c", "after", disk)
    assert rows(disk, "--snapshot", "before") == {}
    found = rows(disk, "--snapshot", "before", "--checksum", "sha1")
    assert {path: row["fields"] for path, row in found.items()} == {"/data/03": ["content"]}
    two = rows(disk, "--snapshot", "before", "--snapshot-b", "after", "--checksum", "sha1")
    assert two == found
    mirrored = rows(disk, "--snapshot-b", "before", "--checksum", "sha1")["/data/03"]
    assert mirrored["checksum_a"] == found["/data/03"]["checksum_b"]


def test_directories_are_listed_for_their_times_only_when_asked(base: Path, changed: Path) -> None:
    assert rows(base, changed, "--all")["/etc"]["fields"] == ["mtime"]
    assert "/etc" not in rows(base, changed)


def test_exit_code_says_whether_there_are_differences(base: Path, changed: Path) -> None:
    assert diff(base, changed).status == 0
    assert diff(base, changed, "--exit-code").status == 1
    assert diff(base, changed, "--exit-code", "--path", "/data").status == 0


def test_a_part_is_compared_alone(base: Path, changed: Path) -> None:
    assert list(rows(base, changed, "--path", "/etc/motd")) == ["/etc/motd"]
    assert rows(base, changed, "--path", "/etc/new")["/etc/new"]["change"] == "added"
    done = diff(base, changed, "--path", "/nowhere")
    assert done.status == 5
    assert "/nowhere" in done.err


def test_csv_has_the_same_rows(base: Path, changed: Path) -> None:
    table = list(csv.DictReader(io.StringIO(diff("-o", "csv", base, changed).out.decode())))
    assert list(table[0]) == list(diffing.FIELDS)
    assert [row["path"] for row in table] == list(rows(base, changed))
    assert next(row for row in table if row["path"] == "/etc/mode")["fields"] == "mode,uid,gid"


def test_text_is_a_patch_of_the_changed_text_files(base: Path, changed: Path) -> None:
    done = diff(base, changed, "--text")
    assert done.status == 0
    assert b"--- a/etc/motd\n+++ b/etc/motd\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n" in done.out
    assert b"Binary files a/etc/binary and b/etc/binary differ\n" in done.out
    assert b"File b/long is longer than 1048576 bytes: its text is not compared\n" in done.out
    assert done.out.count(b"@@ -") == 1


def test_text_is_bytes_in_a_file_and_escaped_on_a_terminal(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(base.read_bytes())
    (tmp_path / "motd").write_bytes(b"one\n\x1b[31m\xff\\\tred\nthree\n")
    in_debugfs(other, "rm /etc/motd", f"write {tmp_path}/motd /etc/motd")
    written = diff(base, other, "--text").out
    assert b"\n+\x1b[31m\xff\\\tred\n" in written

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    diffing._write_text(written[written.index(b"---") :])
    assert "\n+\\033[31m\\377\\\tred\n" in terminal.getvalue()


@pytest.mark.parametrize(
    ("name", "header"),
    [
        (b"/etc/motd", b"/etc/motd"),
        (b"/a b", b"/a b\t"),
        ("/ä".encode(), "/ä".encode()),
        (b'/a"b\\', b'"/a\\"b\\\\"'),
        (b"/a\n+++ b", b'"/a\\012+++ b"'),
        (b"/\xff", b'"/\\377"'),
    ],
)
def test_a_name_cannot_break_out_of_the_header_of_a_patch(name: bytes, header: bytes) -> None:
    assert text.quote_name(name) == header


def test_names_that_would_steer_a_terminal_are_escaped(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.raw"
    with empty.open("wb") as file:
        file.truncate(SIZE)
    ran("mke2fs", "-q", "-t", "ext4", "-b", "4096", empty)
    table = diff(empty, base).out
    assert b"/odd\\377\\033[31m\\n\\ name" in table
    assert b"\x1b" not in table
    found = [row for row in rows(empty, base).values() if "path_bytes" in row]
    assert [base64.b64decode(row["path_bytes"]) for row in found] == [b"/" + ODD]


def test_unreadable_directory_is_neither_equal_nor_gone(base: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.raw"
    damaged.write_bytes(base.read_bytes())
    with damaged.open("r+b") as file:
        file.seek(block_of(base, "/etc") + 100)
        file.write(b"damaged")
    for first, second in ((base, damaged), (damaged, base)):
        done = diff(first, second)
        assert done.status == 1
        assert done.out == b""
        assert done.err.count("\n") == 1
        assert "damaged.raw: a block of a directory is damaged (/etc)" in done.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["A"], "nothing to compare"),
        (["A", "--snapshot", "x", "--snapshot-b", "x"], "the same snapshot"),
        (["A", "B", "--against-base"], "--against-base"),
        (["A", "--against-base", "--snapshot", "x"], "--against-base"),
        (["A", "--against-base"], "no backing image"),
        (["A", "--format-b", "raw"], "--format-b"),
        (["A", "B", "--text", "-o", "json"], "--text"),
    ],
)
def test_options_that_make_no_sense_together_are_usage(
    words: list[str], said: str, base: Path
) -> None:
    done = diff(*(base if word in ("A", "B") else word for word in words))
    assert done.status == 2
    assert said in done.err
    assert done.err.count("error:") == 1


def test_a_base_in_a_folder_that_the_overlay_may_use_is_opened(base: Path, tmp_path: Path) -> None:
    """From the middle of a chain on, its images are where the whole chain was allowed to be."""
    (tmp_path / "middle").mkdir()
    middle, top = tmp_path / "middle/middle.qcow2", tmp_path / "top.qcow2"
    bottom = tmp_path / "bottom.raw"
    bottom.write_bytes(base.read_bytes())
    ran("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", bottom, middle)
    ran("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", middle, top)
    assert rows(top, "--against-base") == {}


# The merge


def entry(path: str, **values: Any) -> Entry:
    known = {"mode": 0o100644, "uid": 0, "gid": 0, "size": 0, "mtime_ns": 0, **values}
    return Entry(path.encode(), **known)


def walked(*paths: str) -> tuple[Walk, list[bytes]]:
    """A walk over these paths; one with an `!` at its end cannot be read."""
    said: list[bytes] = []
    walk = Walk(lambda path, line: said.append(path))

    def entries() -> Iterator[Entry]:
        for path in paths:
            if path.endswith("!"):
                walk.problem(path[:-1].encode(), "damaged")
            else:
                yield entry(path)

    walk.start(entries())
    return walk, said


def shown(one: Walk, other: Walk) -> list[str]:
    lines = []
    for a, b in merge_walks(one, other):
        either = a or b
        assert either is not None
        lines.append(("-" if b is None else "+" if a is None else "=") + either.path.decode())
    return lines


def test_siblings_are_merged_in_the_order_of_their_bytes() -> None:
    one, _ = walked("/", "/a", "/a/b", "/a!x", "/a-b", "/c")
    other, _ = walked("/", "/a", "/a/b", "/a/c", "/a-b", "/b", "/c")
    # `!` ends a path that cannot be read, so /a!x is one that can.
    assert shown(one, other) == ["=/", "=/a", "=/a/b", "+/a/c", "-/a!x", "=/a-b", "+/b", "=/c"]


def test_what_one_side_cannot_read_is_neither_added_nor_removed() -> None:
    one, said = walked("/", "/a", "/b", "/b!", "/d")
    other, _ = walked("/", "/a", "/b", "/b/c", "/b/d", "/c", "/d")
    assert shown(one, other) == ["=/", "=/a", "=/b", "+/c", "=/d"]
    assert said == [b"/b"]
    one, _ = walked("/", "/a", "/b!", "/c")
    other, _ = walked("/", "/a", "/b", "/c")
    assert shown(one, other) == ["=/", "=/a", "=/c"]


def test_unmounted_mount_point_is_not_compared_below() -> None:
    one, said = walked("/", "/home", "/root")
    one.hide(b"/home", "cannot be mounted")
    other, _ = walked("/", "/home", "/home/me", "/homes", "/root")
    assert shown(one, other) == ["=/", "+/homes", "=/root"]
    assert said == [b"/home"]


def test_a_side_with_endless_damage_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "MOST_UNREADABLE", 2)
    with pytest.raises(OSError, match="not compared"):
        walked("/a!", "/b!", "/c!")
    monkeypatch.setattr(differences, "MOST_UNREADABLE", 100)
    monkeypatch.setattr(differences, "MOST_BYTES", 10)
    with pytest.raises(OSError, match="not compared"):
        walked("/a-long-name!")


@pytest.mark.parametrize(
    ("before", "after", "fields"),
    [
        ({}, {}, ()),
        ({"size": 1}, {"size": 2}, ("size",)),
        ({"mtime_ns": 1}, {}, ("mtime",)),
        ({"mode": 0o40755, "size": 1}, {"mode": 0o40755, "mtime_ns": 1}, ()),
        ({"mode": 0o40755, "size": 1}, {"mode": 0o40700}, ("mode",)),
        ({"mode": 0o120777, "target": b"a"}, {"mode": 0o120777, "target": b"bb"}, ("target",)),
        ({"mode": 0o20600, "rdev": 1}, {"mode": 0o20600, "rdev": 2}, ("rdev",)),
        ({"mode": 0o20600, "rdev": 1}, {"mode": 0o60600, "rdev": 2}, ("type",)),
        ({"uid": 1, "gid": 2}, {"uid": 3, "gid": 4}, ("uid", "gid")),
    ],
)
def test_fields_that_changed(
    before: dict[str, Any], after: dict[str, Any], fields: tuple[str, ...]
) -> None:
    assert changed_fields(entry("/x", **before), entry("/x", **after)) == fields


# What is shared


class OneFile:
    """As much of a tree and its filesystem as a place needs."""

    place = type("At", (), {"mount": 0, "inode": 0})()

    def __init__(self, runs: list[tuple[int, int, int]] | None) -> None:
        self._runs = runs

    def filesystem(self, place: object) -> OneFile:
        return self

    def runs(self, inode: int) -> list[tuple[int, int, int]] | None:
        return self._runs

    def places(self, filesystem: object) -> tuple[DiskRange, ...]:
        return (DiskRange(0, 1000, 100), DiskRange(1, 0, 100))


Placed = Callable[..., "str | None"]


@pytest.fixture
def placed() -> Placed:
    def place(runs: Any, *written: Any) -> str | None:
        file: Any = OneFile(runs)
        return Shared(file, file, written).extent_digest(file)

    return place


def test_a_file_is_shared_only_if_no_byte_of_it_was_written(placed: Placed) -> None:
    runs = [(0, 90, 20)]  # the last ten bytes of the first disk's part, the first of the second's
    assert placed(runs, [], []) is not None
    assert placed(runs, [(0, 1090), (1100, 1200)], [(10, 20)]) == placed(runs, [], [])
    assert placed(runs, [(1099, 1100)], []) is None
    assert placed(runs, [(1000, 1091)], []) is None
    assert placed(runs, [], [(9, 10)]) is None
    assert placed(runs, [], None) is None
    assert placed(None, [], []) is None
    assert placed([(0, 190, 20)], [], []) is None


def test_another_place_or_another_order_is_another_file(placed: Placed) -> None:
    found = {
        placed(runs, [], [])
        for runs in ([], [(0, 0, 8)], [(0, 8, 8)], [(8, 0, 8)], [(0, 0, 8), (8, 8, 8)])
    }
    assert len(found) == 5


def test_links_apart_are_those_above_the_first_link_in_common(tmp_path: Path) -> None:
    base, left, right, top = (tmp_path / f"{name}.qcow2" for name in ("b", "l", "r", "t"))
    ran("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    for overlay, below in ((left, base), (right, base), (top, left)):
        ran("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", below, overlay)

    def apart(one: Path, other: Path, snapshot: str | None = None) -> object:
        return points.links_apart(points.Point(one), points.Point(other, snapshot=snapshot))

    assert apart(base, top) == ([0], [2])
    assert apart(top, right) == ([2], [1])
    assert apart(left, left) == ([0], [0])
    alone = tmp_path / "alone.qcow2"
    ran("qemu-img", "create", "-q", "-f", "qcow2", alone, "1M")
    assert apart(alone, left) == ([None], [None])


def test_one_point_is_not_two() -> None:
    with pytest.raises(UsageError):
        points.two_points(points.Point(Path("a")), None, snapshot_after=None)


def test_ctrl_c_ends_a_comparison_at_once(tmp_path):
    image, root = tmp_path / "disk.img", tmp_path / "root"
    root.mkdir()
    for number in range(800):
        with (root / str(number)).open("wb") as file:
            file.truncate(8 << 20)
    ran("mke2fs", "-q", "-t", "ext4", "-d", root, image, "64M")
    other = tmp_path / "other.img"
    other.write_bytes(image.read_bytes())
    process = subprocess.Popen(
        [sys.executable, "-m", "imgtool", "diff", "--checksum", "sha256", image, other],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"imgtool: error: interrupted\n")
    assert time.monotonic() - started < 3
