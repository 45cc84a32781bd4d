"""copy-out and copy-in on real, awkward and damaged guests."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.support import guests
from tests.support.guests import guest

pytestmark = pytest.mark.appliance


@pytest.fixture
def overlay(tmp_path, monkeypatch):
    """A throw-away overlay on a guest, to write to."""

    def made(name: str) -> Path:
        base = guest(name)
        monkeypatch.setenv("IMGTOOL_BACKING_DIRS", str(base.parent))
        path: Path = tmp_path / f"{name}.qcow2"
        kind = "raw" if base.suffix == ".raw" else "qcow2"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", kind]
        subprocess.run([*argv, "-b", base, path], check=True)
        return path

    return made


def listed(imgtool_cli, image, path, engine="auto") -> dict[str, dict[str, Any]]:
    result = imgtool_cli("ls", image, "-R", path, "-o", "jsonl", "--engine", engine)
    rows = [json.loads(line) for line in result.text.splitlines()]
    return {row["path"]: row for row in rows}


def test_awkward_names_links_modes_and_times_arrive_as_they_are(imgtool_cli, tmp_path):
    image = guest("awkward")
    sources = ["/names", "/links", "/modes", "/times", "/hard", "/special"]
    result = imgtool_cli("copy-out", image, *sources, tmp_path)
    assert result.status == 0, result.err
    names = {os.fsencode(name) for name in os.listdir(tmp_path / "names")}
    assert names == {b"plain", *guests.AWKWARD_NAMES.values()}
    for name in guests.AWKWARD_NAMES.values():
        assert (tmp_path / "names" / os.fsdecode(name)).read_bytes() == name
    for name, target in guests.AWKWARD_LINKS.items():
        assert os.readlink(os.fsencode(tmp_path / "links") + b"/" + name) == target
    for text, mode in guests.AWKWARD_MODES.items():
        assert (tmp_path / "modes" / text).stat().st_mode & 0o7777 == mode
    odd = (tmp_path / "modes" / "odd-owner").stat()
    assert (odd.st_uid, odd.st_gid) == guests.ODD_OWNER
    for text, moment in guests.AWKWARD_TIMES.items():
        assert (tmp_path / "times" / text).stat().st_mtime_ns == moment
    inodes = {(tmp_path / path.lstrip("/")).stat().st_ino for path in guests.HARD_LINKS}
    assert len(inodes) == 1
    for text in guests.AWKWARD_DEVICES:
        assert not os.path.lexists(tmp_path / "special" / text)
        assert f"/special/{text}" in result.err


def test_hostile_listing_cannot_steer_the_terminal(imgtool_cli):
    shown = imgtool_cli("ls", guest("awkward"), "-l", "/names", "/links").out
    assert not any(byte < 32 and byte != 10 for byte in shown)
    assert b"\xc2\x9b" not in shown
    rows = listed(imgtool_cli, guest("awkward"), "/names")
    assert len(rows) == len(guests.AWKWARD_NAMES) + 1
    assert any("path_bytes" in row for row in rows.values())


def test_a_sparse_file_stays_sparse(imgtool_cli, tmp_path):
    result = imgtool_cli("copy-out", guest("awkward"), guests.SPARSE_FILE, tmp_path)
    assert result.status == 0, result.err
    copy = tmp_path / Path(guests.SPARSE_FILE).name
    assert copy.stat().st_size == guests.SPARSE_SIZE
    assert copy.stat().st_blocks * 512 < 1 << 20
    with copy.open("rb") as file:
        for offset, data in guests.SPARSE_ISLANDS.items():
            file.seek(offset)
            assert file.read(len(data)) == data


def test_fifty_thousand_names_in_one_directory(imgtool_cli):
    lines = imgtool_cli("ls", guest("many"), "/d").text.splitlines()
    assert lines == [f"file-{number:05}" for number in range(guests.MANY_FILES)]


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_that_cannot_be_read_does_not_stop_the_rest(imgtool_cli, tmp_path, keep):
    more = ["--keep-partial"] if keep else []
    result = imgtool_cli(
        "copy-out", guest("damaged"), "/a-good.txt", "/tree", "/z-good.txt", tmp_path, *more
    )
    assert result.status == 1
    for path, content in guests.DAMAGED_GOOD.items():
        assert (tmp_path / path.lstrip("/")).read_bytes() == content
    assert guests.DAMAGED_UNREADABLE in result.err
    assert guests.DAMAGED_INODE in result.err
    assert (tmp_path / guests.DAMAGED_UNREADABLE.lstrip("/")).exists() is keep
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".imgtool")]


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    """An ext2 with one bad entry in /bad, which the kernel passes over without an error."""
    folder = tmp_path_factory.mktemp("lossy")
    root = folder / "root"
    for name in ("bad/one", "bad/three", "bad/two", "good/four"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    image = folder / "lossy.img"
    words = ["mke2fs", "-q", "-t", "ext2", "-O", "^dir_index", "-d", root, image, "8M"]
    subprocess.run(words, check=True, capture_output=True)
    raw = bytearray(image.read_bytes())
    at = raw.index(b"three") - 8
    assert raw[at + 6] == 5
    raw[at + 6] = 0xF0
    image.write_bytes(raw)
    return image


@pytest.mark.parametrize("path", ["/", "/bad"])
@pytest.mark.parametrize("deep", [False, True])
def test_entries_that_the_kernel_passes_over_are_an_error(imgtool_cli, lossy, path, deep):
    result = imgtool_cli("ls", lossy, path, *(["-R"] if deep else []))
    if path == "/" and not deep:
        assert (result.status, result.err) == (0, "")  # it is not looked into
        return
    assert result.status == 1
    assert result.err.count("\n") == 1 and "damaged" in result.err and "(/bad)" in result.err
    names = {line.rpartition("/")[2] for line in result.text.splitlines()}
    assert "three" not in names
    assert ("four" in names) == (path == "/")


def test_a_copy_without_what_the_kernel_passes_over_is_an_error(imgtool_cli, lossy, tmp_path):
    result = imgtool_cli("copy-out", lossy, "/bad", "/good", tmp_path)
    assert result.status == 1 and "(/bad)" in result.err
    assert (tmp_path / "good/four").read_text() == "good/four"
    stream = imgtool_cli("copy-out", lossy, "/bad", "-")
    assert stream.status == 1 and "damaged" in stream.err


def test_existing_file_is_replaced_only_on_demand(imgtool_cli, tmp_path):
    (tmp_path / "readme.txt").write_text("mine")
    refused = imgtool_cli("copy-out", guest("data"), "/readme.txt", tmp_path)
    assert refused.status == 4
    assert "--overwrite" in refused.err
    assert (tmp_path / "readme.txt").read_text() == "mine"
    done = imgtool_cli("copy-out", guest("data"), "/readme.txt", tmp_path, "--overwrite")
    assert done.status == 0
    assert (tmp_path / "readme.txt").read_bytes() == guests.DATA_FILES["/readme.txt"]


def test_a_destination_that_is_full_keeps_nothing_half_written(imgtool_cli, tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", tmp_path], check=True)
    try:
        result = imgtool_cli("copy-out", guest("data"), "/photos", tmp_path)
        assert result.status == 6
        assert "no space left" in result.err
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_directory_as_a_tar_stream(imgtool_cli):
    result = imgtool_cli("copy-out", guest("data"), "/photos", "-")
    assert result.status == 0
    with tarfile.open(fileobj=io.BytesIO(result.out)) as archive:
        content = archive.extractfile("./cat.raw")
        assert content is not None
        assert content.read() == guests.DATA_FILES["/photos/cat.raw"]


def test_copy_in_keeps_modes_and_times_and_gives_root_the_files(imgtool_cli, overlay, tmp_path):
    image = overlay("data")
    source = tmp_path / "conf"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "script").write_text("#!/bin/sh\n")
    (source / "sub" / "script").chmod(0o750)
    os.utime(source / "sub" / "script", ns=(1, 1614834367_123456789))
    os.chown(source / "sub" / "script", 4321, 4321)
    (source / "link").symlink_to("sub/script")
    (source / os.fsdecode(b"odd\xff")).write_bytes(b"odd")
    result = imgtool_cli("copy-in", image, source, "/photos")
    assert result.status == 0, result.err
    rows = listed(imgtool_cli, image, "/photos/conf")
    script = rows["/photos/conf/sub/script"]
    assert (script["uid"], script["gid"], script["mode"]) == (0, 0, "0750")
    assert script["mtime"] == "2021-03-04T05:06:07.123456789Z"
    assert rows["/photos/conf/link"]["target"] == "sub/script"
    assert any(row.get("path_bytes") for row in rows.values())
    assert imgtool_cli("cat", image, "/photos/cat.raw").out == guests.DATA_FILES["/photos/cat.raw"]


def test_copy_in_of_a_tar_stream_with_an_owner(imgtool_cli, overlay):
    image = overlay("data")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("./etc/motd")
        member.size, member.uid = 3, 77
        archive.addfile(member, io.BytesIO(b"hi\n"))
    stream = buffer.getvalue()
    result = imgtool_cli("copy-in", image, "--owner", "5:6", "-", "/", stdin=stream)
    assert result.status == 0, result.err
    row = listed(imgtool_cli, image, "/etc")["/etc/motd"]
    assert (row["uid"], row["gid"]) == (5, 6)


def test_a_replaced_file_leaves_its_owner_and_mode(imgtool_cli, overlay, tmp_path):
    """As a write to it would: set-user-ID and capabilities go."""
    image = overlay("data")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, mode in (("tool", 0o4755), ("table", 0o640)):
            member = tarfile.TarInfo(name)
            member.size, member.uid, member.gid, member.mode = 3, 77, 78, mode
            archive.addfile(member, io.BytesIO(b"old"))
    # The owners and modes of a stream are its own.
    assert imgtool_cli("copy-in", image, "-", "/", stdin=buffer.getvalue()).status == 0
    rows = listed(imgtool_cli, image, "/", engine="direct")
    assert [(rows[f"/{name}"]["uid"], rows[f"/{name}"]["mode"]) for name in ("tool", "table")] == [
        (77, "4755"),
        (77, "0640"),
    ]
    for name in ("tool", "table", "other"):
        (tmp_path / name).write_text("new")
        (tmp_path / name).chmod(0o604)
    files = [tmp_path / name for name in ("tool", "table", "other")]
    result = imgtool_cli("copy-in", image, *files, "/")
    assert result.status == 0, result.err
    rows = listed(imgtool_cli, image, "/", engine="direct")
    found = {name: (rows[name]["uid"], rows[name]["gid"], rows[name]["mode"]) for name in rows}
    assert (found["/tool"], found["/table"]) == ((77, 78, "0755"), (77, 78, "0640"))
    assert found["/other"] == (0, 0, "0604")
    result = imgtool_cli("copy-in", image, files[1], "/", "--group", "9", "--mode", "600")
    assert result.status == 0, result.err
    row = listed(imgtool_cli, image, "/", engine="direct")["/table"]
    assert (row["uid"], row["gid"], row["mode"]) == (77, 9, "0600")


def test_rm_removes_all_or_nothing(imgtool_cli, overlay):
    image = overlay("data")
    assert imgtool_cli("copy-in", image, __file__, "/photos").status == 0
    there = set(listed(imgtool_cli, image, "/photos", engine="direct"))
    assert len(there) == 2
    assert imgtool_cli("rm", image, "/photos").status == 4
    assert imgtool_cli("rm", image, "/photos/*.raw", "/photos/nothing").status == 5
    assert set(listed(imgtool_cli, image, "/photos", engine="direct")) == there
    result = imgtool_cli("rm", image, "/photos/*.raw")
    assert result.status == 0, result.err
    left = {path for path in there if not path.endswith(".raw")}
    assert set(listed(imgtool_cli, image, "/photos", engine="direct")) == left
    assert imgtool_cli("rm", "-rf", image, "/photos", "/nothing").status == 0
    assert "/photos" not in listed(imgtool_cli, image, "/", engine="direct")


def test_a_tar_stream_that_leads_elsewhere_changes_nothing(imgtool_cli, overlay):
    image = overlay("data")
    before = image.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../escape"))
    result = imgtool_cli("copy-in", image, "-", "/photos", stdin=buffer.getvalue())
    assert result.status == 1
    assert "outside" in result.err
    assert len(image.read_bytes()) >= len(before)
    assert "/escape" not in listed(imgtool_cli, image, "/")


def test_a_guest_that_is_full_keeps_its_files(imgtool_cli, overlay, tmp_path):
    image = overlay("data")
    big = tmp_path / "cat.raw"
    big.write_bytes(os.urandom(64 << 20))
    result = imgtool_cli("copy-in", image, big, "/photos")
    assert result.status == 1
    assert "no space left on the guest" in result.err
    assert imgtool_cli("cat", image, "/photos/cat.raw").out == guests.DATA_FILES["/photos/cat.raw"]
    assert not [path for path in listed(imgtool_cli, image, "/") if ".imgtool" in path]


def test_labels_are_kept_and_given_by_the_guests_policy(
    imgtool_cli, overlay, tmp_path, open_guests
):
    image = overlay("selinux")
    (tmp_path / "shadow").write_text("root:*:::::::\n")
    (tmp_path / "new.conf").write_text("x\n")
    odd = tmp_path / os.fsdecode(b"\xff.conf")
    odd.write_text("x\n")
    sources = (tmp_path / "shadow", tmp_path / "new.conf", odd)
    result = imgtool_cli("copy-in", image, *sources, "/etc")
    assert result.status == 0, result.err
    with open_guests.shared(image) as opened:
        opened.mount_layout()
        for path, label in (
            (b"/etc/shadow", guests.SELINUX_LABELS["/etc/shadow"]),
            (b"/etc/new.conf", guests.SELINUX_NEW["/etc/new.conf"]),
            (b"/etc/\xff.conf", guests.SELINUX_NEW["/etc/new.conf"]),
        ):
            found = opened.calls.getxattr(path, b"security.selinux")
            assert found.rstrip(b"\0").decode() == label
