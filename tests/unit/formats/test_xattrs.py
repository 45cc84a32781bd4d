"""Extended attributes and ACLs: read, shown, compared, copied, and in tar streams."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgtool import open_guest
from imgtool.engines.direct.wire.frames import BadMessage
from imgtool.engines.direct.wire.messages import xattrs as received
from imgtool.engines.direct.worker import tar_headers
from imgtool.errors import EngineError
from imgtool.formats.xattrs import ACL_ACCESS, ACL_DEFAULT, acl, acl_text, order_xattrs
from imgtool.guest.model import Entry
from imgtool.host.process import environment
from imgtool.transfer.copy_out import Report, copy_out, tar_out
from imgtool.transfer.keeping import Keeping
from imgtool.transfer.staging import Attributes, Staging
from tests.support.commands import run_here

CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
SELINUX = b"system_u:object_r:etc_t:s0\0"
# Read and write for the owner, r-x for user 1000, r-- for group 5.
ENTRIES = [(1, 6, 0xFFFFFFFF), (2, 5, 1000), (4, 4, 0xFFFFFFFF), (8, 4, 5), (16, 7, 0xFFFFFFFF)]
ACL = acl([*ENTRIES, (32, 4, 0xFFFFFFFF)])
TEXT = "user::rw-\nuser:1000:r-x\ngroup::r--\ngroup:5:r--\nmask::rwx\nother::r--\n"
LONG = os.urandom(600)  # does not fit into an inode

FILE = {
    b"user.comment": b"a text",
    b"user.bytes": b"\0\1\xff",
    b"user.a=b%c": b"odd name",
    b"user.empty": b"",
    b"user.long": LONG,
    b"security.capability": CAPABILITY,
    b"security.selinux": SELINUX,
    b"trusted.key": b"secret",
    ACL_ACCESS: ACL,
}
FOLDER = {ACL_DEFAULT: ACL, b"user.folder": b"yes"}
LINK = {b"security.selinux": b"link_t\0"}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 with attributes in inodes and in a block, set with debugfs."""
    folder = tmp_path_factory.mktemp("xattrs")
    root = folder / "root"
    (root / "d").mkdir(parents=True)
    (root / "d/file").write_text("content")
    (root / "d/plain").write_text("plain")
    (root / "d/link").symlink_to("file")
    os.link(root / "d/file", root / "d/second")
    path = folder / "disk.img"
    words: list[str | Path] = ["mke2fs", "-q", "-t", "ext4", "-b", "1024", "-d", root, path, "8M"]
    subprocess.run(words, check=True, env=environment(), capture_output=True)
    for name, values in (("/d/file", FILE), ("/d", FOLDER), ("/d/link", LINK)):
        for key, value in values.items():
            source = folder / "value"
            source.write_bytes(value)
            argument = f'-f {source} {name} "{os.fsdecode(key)}"'
            words = ["debugfs", "-w", "-R", f"ea_set {argument}", path]
            done = subprocess.run(words, check=True, env=environment(), capture_output=True)
            assert b"ea_set:" not in done.stderr, done.stderr
    # As the kernel keeps it: the group's bits are the mask of the ACL.
    words = ["debugfs", "-w", "-R", "set_inode_field /d/file mode 0100674", path]
    subprocess.run(words, check=True, env=environment(), capture_output=True)
    return path


@pytest.fixture
def guest(image: Path) -> Iterator[Any]:
    with open_guest(image, engine="direct") as opened:
        yield opened


def _sorted(values: dict[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(sorted(values.items()))


EXPECTED = {
    b"/d/file": _sorted(FILE),
    b"/d/second": _sorted(FILE),
    b"/d/link": _sorted(LINK),
    b"/d/plain": (),
}


# Read


def test_every_way_to_ask_gives_the_same_attributes(guest) -> None:
    assert {e.path: e.xattrs for e in guest.entries("/d", xattrs=True)} == EXPECTED
    walked = {entry.path: entry.xattrs for entry in guest.walk("/", xattrs=True)}
    assert {path: walked[path] for path in EXPECTED} == EXPECTED
    assert walked[b"/d"] == guest.xattrs("/d") == _sorted(FOLDER)
    assert guest.xattrs("/d/link") == _sorted(LINK)
    for path, values in EXPECTED.items():
        assert guest.with_xattrs(guest.lstat(path), None).xattrs == values


def test_without_being_asked_for_there_are_none(guest) -> None:
    assert {entry.xattrs for entry in guest.walk("/")} == {None}
    assert guest.lstat("/d/file").xattrs is None


def test_damaged_attributes_are_a_problem_of_their_file_alone(image, tmp_path) -> None:
    raw = bytearray(image.read_bytes())
    at = raw.index(LONG) + 1
    raw[at] ^= 1  # the block has a checksum
    broken = tmp_path / "broken.img"
    broken.write_bytes(raw)
    said: list[tuple[bytes, str]] = []
    with open_guest(broken, engine="direct") as guest:
        found = list(
            guest.walk("/d", xattrs=True, on_problem=lambda path, line: said.append((path, line)))
        )
    assert {entry.path for entry in found} == set(EXPECTED)
    assert {entry.path for entry in found if entry.xattrs is None} == {b"/d/file", b"/d/second"}
    reason = "a block of extended attributes has a wrong checksum"
    assert said == [(b"/d/file", reason), (b"/d/second", reason)]


@pytest.mark.parametrize(
    "rows",
    [
        [["user.b", ""], ["user.a", ""]],
        [["user.a", ""], ["user.a", ""]],
        [["", ""]],
        [["user.\0", ""]],
        [["user." + "x" * 300, ""]],
        [["user.a", "no base64"]],
        [["user.a"]],
        [[5, ""]],
        "no rows",
    ],
)
def test_a_liar_has_no_odd_attributes(rows: Any) -> None:
    with pytest.raises((BadMessage, ValueError, TypeError)):
        received(rows)


def test_xfs_acls_of_the_second_form_are_left_out() -> None:
    pairs = [(b"user.b", b"1"), (b"trusted.SGI_ACL_FILE", b"2"), (b"user.a", b"3")]
    assert order_xattrs([*pairs, (b"user.b", b"later")]) == ((b"user.a", b"3"), (b"user.b", b"1"))


# Shown


def test_acls_in_words() -> None:
    assert acl_text(ACL) == TEXT
    assert acl_text(b"") is None
    assert acl_text(ACL[:-1]) is None
    assert acl_text(acl([(3, 7, 0)])) is None


def test_ls_shows_them_when_asked(image, imgtool_cli) -> None:
    lines = imgtool_cli("ls", "--engine", "direct", image, "/d", "--xattrs").text.splitlines()
    assert "link" in lines and '    security.selinux="link_t"' in lines
    assert '    user.comment="a text"' in lines
    assert f"    user.bytes=0s{base64.b64encode(FILE[b'user.bytes']).decode()}" in lines
    assert f"    system.posix_acl_access={TEXT.strip().replace(chr(10), ',')}" in lines
    plain = imgtool_cli("ls", "--engine", "direct", image, "/d").text.splitlines()
    assert plain == ["file", "link", "plain", "second"]


def test_ls_has_them_in_rows_when_asked_and_else_no_field(image, imgtool_cli) -> None:
    rows = json.loads(
        imgtool_cli("ls", "--engine", "direct", image, "/d", "--xattrs", "-o", "json").text
    )
    found = {row["path"]: row["xattrs"] for row in rows}
    assert found["/d/plain"] == []
    values = {
        entry["name"]: (
            base64.b64decode(entry["value_bytes"])
            if entry["value"] is None
            else entry["value"].encode()
        )
        for entry in found["/d/file"]
    }
    assert values == {os.fsdecode(name): value for name, value in FILE.items()}
    assert {"name": "user.comment", "value": "a text"} in found["/d/file"]
    assert {"name": "security.selinux", "value": SELINUX.decode()} in found["/d/file"]
    (row, *_) = json.loads(imgtool_cli("ls", "--engine", "direct", image, "/d", "-o", "json").text)
    assert "xattrs" not in row
    text = imgtool_cli("ls", "--engine", "direct", image, "/d/link", "--xattrs", "-o", "csv").text
    (line,) = csv.DictReader(io.StringIO(text))
    assert line["xattrs"] == 'security.selinux="link_t"'


def test_diff_compares_them_when_asked(image, tmp_path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(image.read_bytes())
    for command in ("ea_rm /d/file user.comment", "ea_set /d/plain user.new here"):
        words = ["debugfs", "-w", "-R", command, other]
        subprocess.run(words, check=True, env=environment(), capture_output=True)

    def diff(*more: str) -> str:
        done = run_here("diff", image, other, "--engine", "direct", *more)
        assert done.status == 0, done.err
        return done.text

    assert diff() == ""
    assert [line.split() for line in diff("--xattrs").splitlines()] == [
        ["changed", "file", "/d/file", "xattrs", "user.comment"],
        ["changed", "file", "/d/plain", "xattrs", "user.new"],
        ["changed", "file", "/d/second", "xattrs", "user.comment"],
    ]
    rows = json.loads(diff("--xattrs", "-o", "json"))
    assert [row["fields"] for row in rows] == [["xattrs"]] * 3
    plain = rows[1]
    assert (plain["xattrs_a"], plain["xattrs_b"]) == ([], [{"name": "user.new", "value": "here"}])


# Copied


def _on_host(path: Path) -> dict[bytes, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {
        os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
        for name in names
        if name != "security.selinux" or path.name != "plain"
    }


class Lines:
    def __init__(self, everything: bool = False) -> None:
        self.problems: list[str] = []
        self.kept = Keeping(everything)
        self.report = Report(self._problem, self._problem, xattrs=self.kept)

    def _problem(self, path: bytes, line: str) -> None:
        self.problems.append(line)


def _tell(values: dict[bytes, bytes], *, everything: bool) -> dict[bytes, bytes]:
    return {
        name: value
        for name, value in values.items()
        if everything or not name.startswith((b"security.", b"trusted."))
    }


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root sets trusted attributes")


@needs_root
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("source", ["/d", "/"])
def test_copy_keeps_user_attributes_and_acls_and_all_on_demand(
    guest, tmp_path, everything, source
) -> None:
    lines = Lines(everything)
    copy_out(guest, source, tmp_path / "copy", lines.report)
    top = tmp_path / "copy" / ("" if source == "/d" else "d")
    assert _on_host(top / "file") == _tell(FILE, everything=everything)
    assert _on_host(top) == _tell(FOLDER, everything=everything)
    assert _on_host(top / "link") == _tell(LINK, everything=everything)
    assert _on_host(top / "plain") == {}
    assert (top / "file").samefile(top / "second")
    assert lines.problems == []
    assert (top / "file").stat().st_mode & 0o777 == guest.lstat("/d/file").mode & 0o777
    assert (top / "file").stat().st_mtime_ns == guest.lstat("/d/file").mtime_ns
    if everything:
        assert lines.kept.lines() == []
    else:
        (line,) = lines.kept.lines()  # said once, and counted
        assert line.endswith("not kept (security.*: 5, trusted.*: 2): --xattrs all keeps them")


@needs_root
def test_a_copy_of_one_file_keeps_them_too(guest, tmp_path) -> None:
    lines = Lines()
    copy_out(guest, "/d/file", tmp_path, lines.report)
    assert _on_host(tmp_path / "file") == _tell(FILE, everything=False)
    assert len(lines.kept.lines()) == 1


@needs_root
def test_copy_out_says_once_what_it_does_not_keep(image, tmp_path, imgtool_cli) -> None:
    sources = ("/d/file", "/d/link", tmp_path)
    done = imgtool_cli("copy-out", "--engine", "direct", image, *sources)
    assert done.status == 0
    assert done.err.count("\n") == 1
    assert "are not kept (security.*: 3, trusted.*: 1): " in done.err
    assert "--xattrs all keeps them" in done.err
    again = imgtool_cli(
        *("copy-out", "--engine", "direct", image, *sources, "--overwrite", "--xattrs", "all")
    )
    assert (again.status, again.err) == (0, "")
    assert _on_host(tmp_path / "file") == FILE


def test_what_the_host_does_not_take_is_counted(guest, tmp_path, monkeypatch) -> None:
    real = os.setxattr

    def refusing(path: Any, name: bytes, value: bytes, **more: Any) -> None:
        if name in (ACL_ACCESS, b"user.long"):
            raise OSError(95, "Operation not supported")
        real(path, name, value, **more)

    monkeypatch.setattr(os, "setxattr", refusing)
    lines = Lines()
    copy_out(guest, "/d/file", tmp_path, lines.report)
    assert (tmp_path / "file").read_text() == "content"
    assert lines.kept.lines()[1].endswith("do not allow are not kept (ACLs: 1, user.*: 1)")


def test_a_read_only_file_gets_its_attributes_before_its_mode(image, tmp_path) -> None:
    # As an ordinary user: who may not write to a file may set no attribute of it.
    if os.geteuid():
        pytest.skip("needs root, to become another user")
    other = tmp_path / "other.img"
    other.write_bytes(image.read_bytes())
    for command in ("set_inode_field /d/file mode 0100444", "ea_rm /d/file user.long"):
        words = ["debugfs", "-w", "-R", command, other]
        subprocess.run(words, check=True, env=environment(), capture_output=True)
    with open_guest(other, engine="direct") as guest:
        entry = guest.with_xattrs(guest.lstat("/d/file"), None)
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, 65534, 65534)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.chdir(place)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            status = _copied_here(entry)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _copied_here(entry: Entry) -> int:
    kept = Keeping(everything=True)
    with Staging(Path("."), b"file") as staging:
        staging.file(b"", [b"content"])
        xattrs = kept.choose(entry.xattrs or ())
        attributes = Attributes(entry.mode, entry.uid, entry.gid, entry.mtime_ns, xattrs)
        staging.finish(b"", attributes, kept.note_refusal)
        staging.commit()
    found = os.listxattr("file")
    right = "user.comment" in found and "system.posix_acl_access" in found
    lines = kept.lines()
    return 0 if right and len(lines) == 1 and "(security.*: " in lines[0] else 1


# Tar streams


def test_the_tar_stream_has_all_of_them_for_gnu_tar(guest, tmp_path) -> None:
    stream = io.BytesIO()
    tar_out(guest, "/d", stream)
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as archive:
        records = {member.name: member.pax_headers for member in archive}
        assert archive.extractfile("./plain").read() == b"plain"  # type: ignore[union-attr]
    assert records["./plain"] == {}
    assert records["./file"]["SCHILY.acl.access"] == TEXT
    assert records["./file"]["SCHILY.xattr.user.comment"] == "a text"
    assert records["./file"]["SCHILY.xattr.user.a%3Db%25c"] == "odd name"
    assert records["."]["SCHILY.acl.default"] == TEXT
    if os.geteuid():
        return  # the rest needs root
    out = tmp_path / "out"
    out.mkdir()
    options = ["--xattrs", "--xattrs-include=*", "--acls"]
    done = subprocess.run(
        ["tar", "-x", "-p", "-C", out, *options], input=stream.getvalue(), capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert _on_host(out / "file") == FILE
    assert _on_host(out / "second") == FILE
    assert _on_host(out / "link") == LINK
    assert _on_host(out) == FOLDER
    assert _on_host(out / "plain") == {}


def test_damaged_attributes_alone_are_left_out_of_a_tar_stream(image, tmp_path):
    raw = bytearray(image.read_bytes())
    raw[raw.index(LONG) + 1] ^= 1  # the block has a checksum
    broken = tmp_path / "broken.img"
    broken.write_bytes(raw)
    reason = "a block of extended attributes has a wrong checksum"
    said: list[tuple[bytes, str]] = []
    stream = io.BytesIO()
    with open_guest(broken, engine="direct") as guest:
        tar_out(guest, "/d", stream, lambda path, line: said.append((path, line)))
        assert said == [(b"/d/file", reason), (b"/d/second", reason)]
        with pytest.raises(EngineError) as failed:
            tar_out(guest, "/d", io.BytesIO())
        assert str(failed.value.subject) == "/d/file"
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as archive:
        records = {member.name: member.pax_headers for member in archive}
        assert archive.extractfile("./file").read() == b"content"  # type: ignore[union-attr]
    assert {"./file", "./plain", "./link", "."} <= set(records)
    assert records["./file"] == {} and records["."]["SCHILY.acl.default"] == TEXT
    done = run_here("copy-out", "--engine", "direct", broken, "/d", "-")
    assert done.out == stream.getvalue()
    assert done.status == 1
    assert f"{reason} (/d/file)" in done.err


def test_a_stream_of_ntfs_that_is_no_attribute_costs_no_other(tmp_path):
    disk, host = tmp_path / "ntfs.img", tmp_path / "host"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkntfs", "-q", "-Q", "-F", disk], check=True, capture_output=True)
    for name, stream, size in (
        *(("file", "", 5), ("other", "", 5)),
        *(("file", "short", 10), ("file", "long", 100_000), ("other", "short", 10)),
    ):
        host.write_bytes(b"x" * size)
        named = ["-N", stream] if stream else []
        words = ["ntfscp", "-f", *named, disk, host, name]
        subprocess.run(words, check=True, capture_output=True)
    short = ((b"user.short", b"x" * 10),)
    told: list[str] = []
    tar = io.BytesIO()
    with open_guest(disk, engine="direct", notice=told.append) as guest:
        found = list(guest.walk("/", xattrs=True))
        tar_out(guest, "/", tar)
        assert guest.xattrs("/file") == short
        assert guest.oversized_xattrs == 3
    assert {entry.path: entry.xattrs for entry in found} == {b"/file": short, b"/other": short}
    assert told == ["extended attributes (streams of NTFS) of more than 64 KiB are left out: 3"]
    with tarfile.open(fileobj=io.BytesIO(tar.getvalue())) as archive:
        for name in ("./file", "./other"):
            assert archive.getmember(name).pax_headers == {"SCHILY.xattr.user.short": "x" * 10}
            assert archive.extractfile(name).read() == b"xxxxx"  # type: ignore[union-attr]
    for command in (
        ("ls", "--xattrs", disk, "/file"),
        ("copy-out", disk, "/file", tmp_path / "copy"),
        ("copy-out", disk, "/", "-"),
    ):
        done = run_here(*command, "--engine", "direct")
        assert done.status == 0, done.err
        assert "more than 64 KiB are left out: 1\n" in done.err
        if command[0] == "ls":
            assert done.out == b'/file\n    user.short="xxxxxxxxxx"\n'


def test_tar_stream_is_not_begun_where_the_appliance_is_needed(guest, monkeypatch):
    """A worker whose attributes need the appliance says so when it is asked for them."""
    asked: list[bool] = []
    worker = guest._guest
    listed = worker._list

    def note(path, deep, checksum, on_problem, xattrs, written=None):
        asked.append(xattrs)
        return listed(path, deep, checksum, on_problem, xattrs, written)

    monkeypatch.setattr(worker, "_list", note)
    tar_out(guest, "/d", io.BytesIO())
    with guest.tar("/d") as stream:
        assert stream.read(1)
    assert asked == [True, False]


def test_a_record_of_pax_counts_the_digits_of_its_own_length() -> None:
    for size in range(60, 130):
        raw = tar_headers.attributes(((b"user.x", b"v" * size),))
        length = int(raw[512:].split(b" ")[0])
        assert raw[512 : 512 + length].endswith(b"v\n")
        assert len(raw) % 512 == 0


# XFS, set by libxfs: kernels have long been built without version 4


@pytest.fixture(scope="module", params=[4, 5])
def xfs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XFS with attributes in an inode (/few), and in leaves, a tree and blocks (/many)."""
    folder = tmp_path_factory.mktemp("xfs")
    lines = ["/", "0 0", "d--755 0 0", "few ---644 0 0 /dev/null", "many ---644 0 0 /dev/null", "$"]
    (folder / "proto").write_text("\n".join(lines) + "\n")
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    # mkfs.xfs makes a filesystem below 300 MB only for its own test suite.
    env = environment({"TEST_DIR": "/", "TEST_DEV": "none", "QA_CHECK_FS": "1"})
    words: list[str | Path] = [
        "mkfs.xfs",
        "-q",
        "-m",
        f"crc={request.param - 4}",
        "-p",
        folder / "proto",
        image,
    ]
    subprocess.run(words, check=True, env=env, capture_output=True)
    words = ["xfs_db", "-x"]
    for path, values in XFS.items():
        words += ["-c", f"path {path}"]
        for name, size in values.items():
            space, _, rest = name.partition(".")
            words += ["-c", f"attr_set -{_SPACES[space]} -v {size} {rest}"]
    subprocess.run([*words, image], check=True, env=env, capture_output=True)
    return image


_SPACES = {"user": "u", "security": "s", "trusted": "r"}
XFS = {
    "/few": {"user.small": 5, "security.capability": 20, "trusted.key": 9},
    "/many": {
        **{f"user.name-{number}": number * 9 for number in range(1, 150)},
        "user.large": 40_000,
        "trusted.largest": 65_536,
    },
}


def test_every_form_of_attributes_on_xfs_is_read(xfs: Path) -> None:
    with open_guest(xfs, engine="direct") as guest:
        found = {
            entry.path.decode(): {name.decode(): value for name, value in entry.xattrs or ()}
            for entry in guest.walk("/", xattrs=True)
        }
    assert {
        path: {name: len(value) for name, value in values.items()} for path, values in found.items()
    } == XFS
    assert all(set(value) == {ord("v")} for values in found.values() for value in values.values())


def test_a_damaged_leaf_on_xfs_is_a_problem_of_its_file_alone(xfs: Path, tmp_path: Path) -> None:
    raw = bytearray(xfs.read_bytes())
    # Of the leaves (0xfbee, 0x3bee) every count of entries.
    leaves = [at for at in range(0, len(raw), 4096) if raw[at + 8 : at + 10] in MAGIC]
    assert leaves
    for at in leaves:
        counts = at + (56 if raw[at + 8] == 0x3B else 12)
        raw[counts : counts + 2] = b"\xff\xff"
    broken = tmp_path / "broken.img"
    broken.write_bytes(raw)
    said: list[tuple[bytes, str]] = []
    with open_guest(broken, engine="direct") as guest:
        found = {
            entry.path: entry.xattrs
            for entry in guest.walk("/", xattrs=True, on_problem=lambda *line: said.append(line))
        }
    assert found[b"/many"] is None and len(found[b"/few"] or ()) == 3
    assert [path for path, _ in said] == [b"/many"] and "attributes of inode" in said[0][1]


MAGIC = (b"\xfb\xee", b"\x3b\xee")
