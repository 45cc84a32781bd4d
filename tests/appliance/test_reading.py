"""Reading real guests through the appliance: what users see, and what the peers say of the same."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess

import pytest

from tests.support import guests
from tests.support.guests import guest

pytestmark = pytest.mark.appliance
PEER_ENVIRONMENT = {**os.environ, "LIBGUESTFS_BACKEND_SETTINGS": "force_tcg", "LC_ALL": "C"}


def peer(*arguments: object) -> bytes:
    """What a tool of libguestfs answers on the same image."""
    return subprocess.run(
        [str(argument) for argument in arguments],
        env=PEER_ENVIRONMENT,
        check=True,
        capture_output=True,
        timeout=300,
    ).stdout


@pytest.fixture(scope="module")
def lvm():
    return guest("lvm.qcow2")


def test_the_layout_is_the_one_that_inspection_finds(lvm, imgtool_cli, open_guests):
    listed = imgtool_cli("filesystems", lvm, "-o", "json")
    rows = json.loads(listed.text)
    ours = {row["mountpoint"]: row["device"] for row in rows if row["mountpoint"]}
    inspected = imgtool_cli("inspect", lvm, "-o", "json")
    (system,) = json.loads(inspected.text)
    assert ours == system["mountpoints"]
    assert set(ours) == {"/", "/boot", "/boot/efi", "/home"}
    assert system["distribution"] == "debian"
    assert system["version"].startswith("12")
    assert system["hostname"] == "dead-guest"
    assert system["package_format"] == "deb"


def test_names_are_those_of_virt_ls(lvm, imgtool_cli):
    ours = imgtool_cli("ls", lvm, "-R", "/etc").text.splitlines()
    theirs = peer("virt-ls", "-R", "-a", lvm, "/etc").decode().splitlines()
    assert sorted(ours) == sorted("/etc/" + name.lstrip("/") for name in theirs if name.strip("/"))
    assert len(ours) > 200


def test_bytes_are_those_of_virt_cat(lvm, imgtool_cli):
    ours = imgtool_cli("cat", lvm, "/usr/bin/dpkg")
    assert ours.status == 0
    assert ours.out == peer("virt-cat", "-a", lvm, "/usr/bin/dpkg")


def test_sizes_are_those_of_virt_df(lvm, imgtool_cli):
    rows = json.loads(imgtool_cli("df", lvm, "-o", "json").text)
    ours = {row["device"]: row for row in rows}
    for row in csv.DictReader(io.StringIO(peer("virt-df", "--csv", "-a", lvm).decode())):
        mine = ours[row["Filesystem"]]
        assert mine["size"] // 1024 == int(row["1K-blocks"])
        assert mine["used"] // 1024 == int(row["Used"])
        assert mine["available"] // 1024 == int(row["Available"])
    assert all(row["error"] is None for row in rows)


def test_devices_are_those_of_virt_filesystems(lvm, imgtool_cli):
    result = imgtool_cli("filesystems", lvm, "--all", "-o", "json")
    ours = {(row["kind"], row["device"]): row for row in json.loads(result.text)}
    for _ in range(3):
        answer = peer("virt-filesystems", "--all", "--long", "--uuid", "--csv", "-a", lvm)
        # Once in a while the kernel of the peer's appliance finds its own disk first.
        if b"/dev/sdb" not in answer:
            break
    for row in csv.DictReader(io.StringIO(answer.decode())):
        mine = ours.pop((row["Type"], row["Name"]))
        assert mine["label"] == (row["Label"] or None)
        if (
            row["Type"] == "filesystem"
        ):  # the peer gives the filesystem's own size, not the device's
            assert mine["size"] == guests.LVM_FILESYSTEMS[row["Name"]][3]
        else:
            assert mine["size"] == int(row["Size"])
        if row["Type"] != "pv":  # the peer does not say which device a PV is on
            assert mine["parents"] == [p for p in row["Parent"].split(",") if p]
    assert not ours


def test_every_form_of_output_says_the_same(lvm, imgtool_cli):
    rows = json.loads(imgtool_cli("ls", lvm, "/etc", "-o", "json").text)
    lines = imgtool_cli("ls", lvm, "/etc", "-o", "jsonl").text.splitlines()
    assert [json.loads(line) for line in lines] == rows
    table = imgtool_cli("ls", lvm, "/etc").text.splitlines()
    assert table == [row["path"].removeprefix("/etc/") for row in rows]
    sheet = csv.DictReader(io.StringIO(imgtool_cli("ls", lvm, "/etc", "-o", "csv").text))
    assert [row["path"] for row in sheet] == [row["path"] for row in rows]
    passwd = next(row for row in rows if row["path"] == "/etc/passwd")
    assert passwd["user"] == passwd["group"] == "root"
    assert passwd["mode"] == "0644"
    assert passwd["type"] == "file"


def test_checksums_are_those_of_the_contents(lvm, imgtool_cli):
    path = "/etc/os-release"
    content = imgtool_cli("cat", lvm, path).out
    for kind in ("md5", "sha1", "sha256"):
        row = json.loads(
            imgtool_cli("ls", lvm, "/usr/lib/os-release", "--checksum", kind, "-o", "jsonl").text
        )
        assert row["checksum"] == hashlib.new(kind, content).hexdigest()


def test_a_missing_path_does_not_stop_the_others(lvm, imgtool_cli):
    result = imgtool_cli("cat", lvm, "/nowhere", "/etc/hostname")
    assert result.status == 5
    assert result.out == b"dead-guest\n"
    assert result.err == "imgtool: error: no such file or directory in the guest (/nowhere)\n"
    result = imgtool_cli("ls", lvm, "/nowhere", "/home", "-o", "json")
    assert result.status == 5
    assert any(row["path"] == "/home/alice" for row in json.loads(result.text))


def test_a_given_layout_is_used_as_it_is(lvm, imgtool_cli):
    result = imgtool_cli("ls", lvm, "-m", "/dev/debian-vg/home", "/alice", "-o", "json")
    assert result.status == 0
    assert json.loads(result.text)
    wrong = imgtool_cli("ls", lvm, "-m", "/dev/sdz9", "/")
    assert wrong.status == 5
    assert "/dev/debian-vg/root" in wrong.err


def test_reading_changes_neither_a_byte_nor_the_mtime(imgtool_cli, open_guests):
    image = guest("plain.raw")
    before = (image.stat().st_mtime_ns, hashlib.sha256(image.read_bytes()).hexdigest())
    for command in (["ls", image, "-R", "/etc"], ["df", image], ["cat", image, "/etc/hostname"]):
        assert imgtool_cli(*command).status == 0
    after = (image.stat().st_mtime_ns, hashlib.sha256(image.read_bytes()).hexdigest())
    assert before == after


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_a_disk_contains_is_never_opened_as_an_image(imgtool_cli, tmp_path, format):
    """A guest that writes the header of an image to its disk names no file of the host."""
    contents = tmp_path / "contents"
    contents.mkdir()
    (contents / "file").write_text("secret of the host")
    secret = tmp_path / "secret.raw"
    with secret.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", contents, secret], check=True)
    inner, outer = tmp_path / "inner", tmp_path / "guests" / "disk"
    outer.parent.mkdir()
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", inner]
    subprocess.run(words, check=True)
    with inner.open("r+b") as file:
        file.truncate(16 << 20)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format, inner, outer], check=True)
    given = ("--format", format, "--engine", "libguestfs")
    result = imgtool_cli("cat", outer, "/file", "-m", "/dev/sda", *given)
    assert result.status != 0
    assert result.out == b""
    result = imgtool_cli("filesystems", outer, "-o", "json", *given)
    assert [row["type"] for row in json.loads(result.text)] == ["unknown"]
