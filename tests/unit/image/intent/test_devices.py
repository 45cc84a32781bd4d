"""A block device is found again by what lasts of it, whatever it is called: so is the record of
work on it, and no record is taken for that of another device."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from imgtool.errors import Reason, RefusedError
from imgtool.host.process import environment
from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.reading import chain_to_read
from imgtool.image.change import recovery, transaction
from imgtool.image.change.recovery import recover
from imgtool.image.intent import devices, intent_log
from imgtool.image.intent.devices import identity, key_of, same_device
from imgtool.image.intent.intent_log import read_facts, record_path
from imgtool.image.intent.marks import identity_of, is_same_file
from tests.support.records import left
from tests.support.writes import KILLED, NEW, OLD, fill, in_child, pattern, reads_as

SIZE, OTHER = 4 << 20, 0x55
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for device nodes")
needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs loop devices"
)


@dataclass
class Host:
    """What the kernel and udev say of the devices of a host."""

    folder: Path
    names: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("sys/dev/block", "sys/block", "by-id", "dev", "records"):
            (self.folder / name).mkdir(parents=True)
        self.boot("first")

    def boot(self, id: str) -> None:
        """Start the host anew: nothing of before is there."""
        (self.folder / "boot_id").write_text(id)
        for name in ("sys", "by-id"):
            shutil.rmtree(self.folder / name)
        (self.folder / "sys/dev/block").mkdir(parents=True)
        (self.folder / "sys/block").mkdir()
        (self.folder / "by-id").mkdir()

    def disk(self, name: str, number: tuple[int, int], seq: int, **files: str | bytes) -> Path:
        """A disk with these files in sysfs, where `__` is a slash; its node."""
        return self._put(self.folder / "sys/devices" / name, number, diskseq=f"{seq}\n", **files)

    def part(self, disk: str, number: tuple[int, int], index: int, uevent: str = "") -> Path:
        folder = self.folder / "sys/devices" / disk / f"{disk}{index}"
        return self._put(folder, number, partition=f"{index}\n", uevent=uevent)

    def _put(self, folder: Path, number: tuple[int, int], **files: str | bytes) -> Path:
        for file, content in files.items():
            path = folder / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        (self.folder / "sys/dev/block" / f"{number[0]}:{number[1]}").symlink_to(folder)
        if "partition" not in files:
            (self.folder / "sys/block" / folder.name).symlink_to(folder)
        return self.node(folder.name, number)

    def node(self, name: str, number: tuple[int, int]) -> Path:
        path = self.folder / "dev" / name
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(*number))
        return path

    def link(self, name: str, node: Path) -> None:
        (self.folder / "by-id" / name).symlink_to(node)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with none but the devices that a test gives it."""
    made = Host(tmp_path / "host")
    monkeypatch.setattr(devices, "SYS", made.folder / "sys")
    monkeypatch.setattr(devices, "BY_ID", made.folder / "by-id")
    monkeypatch.setattr(devices, "_BOOT", made.folder / "boot_id")
    monkeypatch.setattr(intent_log, "FOR_DEVICES", made.folder / "records")
    return made


# Which device it is

DISKS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "SCSI": ({"device__wwid": "naa.5000c500a1b2c3d4\n"}, "wwid:naa.5000c500a1b2c3d4"),
    "ATA": (
        {"device__wwid": "t10.ATA     QEMU HARDDISK    QM00001 \n"},
        "wwid:t10.ATA QEMU HARDDISK QM00001",
    ),
    "NVMe": ({"wwid": "eui.0025385b71b0c2d1\n"}, "wwid:eui.0025385b71b0c2d1"),
    "virtio": ({"serial": "a-serial"}, "serial:a-serial"),
    "page 80": (
        {
            "device__vpd_pg80": b"\0\x80\0\x08S1234567",
            "device__vendor": "ACME    ",
            "device__model": "Disk    ",
        },
        "serial:ACME Disk S1234567",
    ),
    "eMMC": (
        {"device__cid": "90014a4842473461"},
        "cid:90014a4842473461",
    ),
    "LVM": ({"dm__uuid": "LVM-" + "g" * 32 + "v" * 32}, "dm:LVM-" + "g" * 32 + "v" * 32),
    "RAID": (
        {"md__uuid": "3a5f7c10-aaaa-bbbb-cccc-0123456789ab\n"},
        "md:3a5f7c10aaaabbbbcccc0123456789ab",
    ),
}


@needs_root
@pytest.mark.parametrize("kind", DISKS)
def test_a_disk_is_known_by_what_the_kernel_says_of_it(host, kind):
    files, lasting = DISKS[kind]
    before = host.disk("sdb", (8, 16), 5, **files)
    ids, key = identity(before), key_of(identity(before), before)
    assert ids[0] == lasting and "sdb" not in key and "/" not in key
    host.boot("second")
    other = host.disk("sdb", (8, 16), 5)  # the same name, and even the same numbers
    after = host.disk("sdc", (8, 32), 9, **files)
    host.link("a-new-rule_of_udev", after)
    assert same_device(ids, identity(after)) is True
    assert key_of(identity(after), after) == key
    assert same_device(ids, identity(other)) is None  # and never True


@needs_root
def test_what_has_no_number_is_known_until_it_is_taken_away(host):
    nothing = {"device__wwid": "naa.0000000000000000", "serial": "0000", "device__model": " "}
    node = host.disk("sdb", (8, 16), 5, **nothing)
    ids = identity(node)
    assert ids == ["at:8:16", "seq:5", "boot:first"]
    assert key_of(ids, node) == "dev-sdb"
    assert same_device(ids, identity(node)) is True
    host.boot("first")
    assert same_device(ids, identity(host.disk("sdb", (8, 16), 6))) is None
    host.boot("second")
    assert same_device(ids, identity(host.disk("sdb", (8, 16), 5))) is None


@needs_root
def test_network_block_device_is_another_once_connected_anew(host):
    node = host.disk("nbd0", (43, 0), 5, pid="4242\n")
    ids = identity(node)
    (host.folder / "sys/devices/nbd0/pid").write_text("4243\n")
    assert same_device(ids, identity(node)) is None


@needs_root
def test_kernel_without_diskseq_tells_attachments_by_sysfs(host):
    def attach(name: str) -> list[str]:
        (host.folder / "sys/dev/block/8:16").unlink(missing_ok=True)
        node = host.disk(name, (8, 16), 5)
        (host.folder / "sys/devices" / name / "diskseq").unlink()
        return identity(node)

    ids = attach("sdb")
    assert same_device(ids, attach("sdc")) is None
    assert any(one.startswith("seq:inode ") for one in ids)


@needs_root
def test_a_number_that_two_disks_have_is_none(host):
    files = {"device__wwid": "t10.USB     Stick    0123456789"}
    first = host.disk("sdb", (8, 16), 5, **files)
    second = host.disk("sdc", (8, 32), 6, **files)
    host.link("usb-Stick_0123456789-0:0", first)
    host.link("wwn-0x5000c500a1b2c3d4", second)
    assert identity(first)[0] == "at:8:16"
    assert identity(second)[0] == "by-id:wwn-0x5000c500a1b2c3d4"
    assert same_device(identity(first), identity(second)) is None
    # One that is unique in the world is had twice by one disk that two ways lead to.
    host.boot("second")
    for name, number in (("sdb", (8, 16)), ("sdc", (8, 32))):
        host.disk(name, number, 5, device__wwid="naa.5000c500a1b2c3d4")
    ways = [identity(host.folder / "dev" / name) for name in ("sdb", "sdc")]
    assert same_device(*ways) is True


@needs_root
def test_partition_is_known_by_disk_and_uuid_or_number(host):
    def parts(disk: str, major: int, wwid: str, *uuids: str) -> list[list[str]]:
        host.disk(disk, (major, 0), major, device__wwid=wwid)
        lines = [f"DEVTYPE=partition\nPARTUUID={uuid}\n" if uuid else "" for uuid in uuids]
        return [identity(host.part(disk, (major, n), n, line)) for n, line in enumerate(lines, 1)]

    one, two = parts("sdb", 8, "naa.5000c500a1b2c3d4", "AA-01", "AA-02")
    (other,) = parts("sdc", 9, "naa.5000c500ffffffff", "AA-01")
    host.boot("second")
    # The numbers were changed, and the disk has the other one's name.
    two_now, one_now = parts("sdc", 9, "naa.5000c500a1b2c3d4", "aa-02", "aa-01")
    assert same_device(one, one_now) is True and same_device(two, two_now) is True
    assert same_device(one, two_now) is False
    assert same_device(other, one_now) is False
    host.boot("third")
    one_plain, two_plain = parts("sdb", 8, "naa.5000c500a1b2c3d4", "", "")
    assert same_device(one, one_plain) is True  # a kernel that says no more than the number
    assert same_device(two, one_plain) is False
    assert same_device(one_plain, identity(host.folder / "dev/sdb")) is False
    keys = {key_of(ids, host.folder / "dev/sdb1") for ids in (one_plain, two_plain, one, two)}
    assert len(keys) == 4


AT = ["at:8:48", "seq:7", "boot:other"]
LINKS = ["ata-Disk_S1", "wwn-0x5000c500a1b2c3d4"]


@pytest.mark.parametrize(
    ("noted", "now", "same"),
    [
        (LINKS, LINKS, True),
        # One more, or one fewer
        (LINKS, [*LINKS, "scsi-SATA_Disk_S1"], True),
        (LINKS, LINKS[:1], True),
        (["nvme-Disk_S1"], ["nvme-Disk_S1", "nvme-Disk_S1_1", "nvme-eui.0025385b71b0c2d1"], True),
        # Another disk
        (LINKS, ["ata-Disk_S2", "wwn-0x5000c500ffffffff"], False),
        # One says so, the other not
        (LINKS, ["ata-Disk_S1", "wwn-0x5000c500ffffffff"], None),
        (LINKS, ["scsi-SATA_Disk_S1"], None),
        (LINKS, [], None),
        # What is on a disk, or was chosen by somebody
        (["lvm-pv-uuid-x", "dm-name-a-b"], ["lvm-pv-uuid-x", "dm-name-a-b"], None),
        (["dm-name-vg-a", "dm-uuid-LVM-x"], ["dm-name-vg-b", "dm-uuid-LVM-x"], True),
        (["dm-name-vg-a", "dm-uuid-LVM-x"], ["dm-name-vg-a", "dm-uuid-LVM-y"], False),
        (["md-uuid-1:2:3:4", "md-name-h:0"], ["md:1234"], True),
        (["ata-Disk_S1-part1"], ["by-id:ata-Disk_S1", "part:1"], True),
        (["ata-Disk_S1-part1"], ["by-id:ata-Disk_S1", "part:2"], False),
        (["ata-Disk_S1-part1"], ["by-id:ata-Disk_S1"], False),
        # What imgtool 0.1 noted of others
        (["8:16", "5", "boot"], ["at:8:16", "seq:5", "boot:boot"], True),
        (["8:16", "5", "boot"], ["at:8:16", "seq:6", "boot:boot"], None),
        (["8:16", "5", "boot"], ["at:8:32", "seq:5", "boot:boot"], None),
        (["8:16", "boot"], ["at:8:16", "seq:5", "boot:boot"], None),
        # What is no identity of a device
        (None, LINKS, None),
        ([], LINKS, None),
        ([12, 34], LINKS, None),
        ([["x"]], LINKS, None),
        ("ata-Disk_S1", LINKS, None),
    ],
)
def test_identities_are_compared_by_what_both_know(noted: Any, now, same):
    attached = [] if any(one.startswith("at:") for one in now) else AT
    assert same_device(noted, [*now, *attached]) is same


# Where the record is


@needs_root
def test_every_name_of_a_device_leads_to_its_record(host, tmp_path):
    node = host.disk("dm-3", (253, 3), 5, dm__uuid="LVM-xyz")
    mapper = host.node("mapper/vg-lv", (253, 3))
    group = tmp_path / "vg"
    group.mkdir()
    (group / "lv").symlink_to(node)
    (tmp_path / "link").symlink_to(group / "lv")
    names = [node, mapper, group / "lv", tmp_path / "link"]
    assert len({record_path(name) for name in names}) == 1
    left(node, operation="resize")
    for name in names:
        assert read_facts(name)["operation"] == "resize"
        assert is_same_file(identity_of(node), name)
    made = intent_log.temporary_path(mapper).name
    assert all(intent_log.is_temporary_of(name, made) for name in names)


@needs_root
@pytest.mark.parametrize("known", ["naa.5000c500a1b2c3d4", None])
def test_disks_that_exchange_their_names_keep_their_records(host, known):
    wwids = {"device__wwid": known} if known else {}
    first = host.disk("sdb", (8, 16), 5, **wwids)
    second = host.disk("sdc", (8, 32), 6, device__wwid="naa.5000c500ffffffff")
    left(first, operation="write", step="commit", overlay="/gone")
    host.boot("second")
    first = host.disk("sdc", (8, 32), 6, **wwids)
    second = host.disk("sdb", (8, 16), 5, device__wwid="naa.5000c500ffffffff")
    if known:
        assert read_facts(first)["operation"] == "write"
        assert read_facts(second) == {}
        return
    # Nothing tells which disk it was: it is at the name, and is not followed.
    assert read_facts(first) == {}
    assert read_facts(second)["operation"] == "write"
    with pytest.raises(RefusedError, match="may be another one") as refused:
        recover(second, force=[Reason.COPY, Reason.CHANGED])
    assert "--keep" in str(refused.value.hint)
    assert recover(second, end=True)
    assert read_facts(second) == {}


def put_old(node: Path, noted: list[str], name: str) -> Path:
    """A record as imgtool 0.1 left it."""
    new = left(node, operation="resize", identity=noted)
    return new.rename(intent_log.FOR_DEVICES / f".dev-{name}.imgtool-record")


@needs_root
def test_earlier_record_is_found_at_its_old_name_by_its_disk(host):
    noted = ["ata-Disk_S1", "wwn-0x5000c500a1b2c3d4"]
    first = host.disk("sdc", (8, 32), 6, device__wwid="naa.5000c500a1b2c3d4")
    second = host.disk("sdb", (8, 16), 5, device__wwid="naa.5000c500ffffffff")
    for link in noted:
        host.link(link, first)
    host.link("ata-Disk_S2", second)
    old = put_old(first, noted, "sdb")
    assert record_path(first) == old and read_facts(first)["operation"] == "resize"
    assert record_path(second) != old and read_facts(second) == {}


@needs_root
def test_earlier_record_of_an_unknown_disk_is_looked_at(host):
    node = host.disk("sdb", (8, 16), 5, device__wwid="naa.5000c500a1b2c3d4")
    old = put_old(node, ["8:16", "4", "earlier"], "sdb")
    assert record_path(node) == old
    with pytest.raises(RefusedError, match="may be another one"):
        recover(node, force=[Reason.COPY])


@needs_root
def test_records_are_looked_through_only_if_believed(host):
    node = host.disk("sdb", (8, 16), 5, device__wwid="naa.5000c500a1b2c3d4")
    planted = left(node, operation="resize").rename(
        intent_log.FOR_DEVICES / ".dev-mallory.imgtool-record"
    )
    assert record_path(node) == planted
    os.chown(planted, 4321, 4321)
    assert record_path(node) != planted
    os.mkfifo(intent_log.FOR_DEVICES / ".dev-fifo.imgtool-record")
    (intent_log.FOR_DEVICES / ".dev-link.imgtool-record").symlink_to(planted)
    assert record_path(node) != planted


# Real devices, of which the kernel says what they stand on


@contextlib.contextmanager
def looped(*files: Path) -> Iterator[list[Path]]:
    """Loop devices on files."""
    made: list[Path] = []
    try:
        for file in files:
            words = ("losetup", "--find", "--show", file)
            done = subprocess.run(
                words, check=True, capture_output=True, text=True, env=environment()
            )
            made.append(Path(done.stdout.strip()))
        yield made
    finally:
        for device in made:
            subprocess.run(["losetup", "--detach", device], env=environment(), check=False)


def exchange(nodes: list[Path], files: list[Path]) -> None:
    """As the host may find its disks the next time it starts."""
    for device in nodes:
        subprocess.run(["losetup", "--detach", device], check=True, env=environment())
    for device, file in zip(nodes, reversed(files), strict=True):
        subprocess.run(["losetup", device, file], check=True, env=environment())


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(intent_log, "FOR_DEVICES", tmp_path / "records")
    intent_log.FOR_DEVICES.mkdir()
    made = [tmp_path / "first.raw", tmp_path / "second.raw"]
    for file in made:
        file.write_bytes(bytes([OLD]) * SIZE)
    return made


def cut(*images: Path) -> None:
    """Write to devices, and be killed when a part of it is in the first one."""

    def part(words: object, **options: object) -> None:
        with images[0].open("r+b") as file:
            file.write(bytes([NEW]) * 4096)
            os.fsync(file.fileno())
        os._exit(KILLED)

    def work() -> None:
        pytest.MonkeyPatch().setattr(recovery, "qemu_img", part)
        chains = [open_chain(image, format="raw") for image in images]
        with transaction.transaction(chains, notice=lambda line: None) as writing:
            for chain in writing.chains:
                fill(chain.active.path, "qcow2", NEW)
            writing.commit()

    assert in_child(work) == KILLED


def value_of(device: Path) -> int:
    (found,) = (value for value in (OLD, NEW, OTHER) if pattern(device, "raw", value))
    return found


@needs_loop
@pytest.mark.parametrize("interrupted", [0, 1])
def test_interrupted_work_follows_its_device_to_another_name(files, imgtool_cli, interrupted):
    with looped(*files) as nodes:
        cut(nodes[interrupted])
        exchange(nodes, files)
        torn, whole = nodes[1 - interrupted], nodes[interrupted]
        # The other device, which has the name now
        assert read_facts(whole) == {}
        with chain_to_read(whole, format="raw") as chain:
            assert reads_as(chain.filename(), OLD)
        shown = imgtool_cli("chain", "show", whole)
        assert shown.status == 0 and "interrupted" not in shown.err + shown.text
        assert "nothing was interrupted" in imgtool_cli("recover", whole).err
        with transaction.transaction([open_chain(whole, format="raw")], notice=print) as writing:
            fill(writing.chains[0].active.path, "qcow2", OTHER)
            writing.commit()
        assert value_of(whole) == OTHER
        # The one that was interrupted
        shown = imgtool_cli("chain", "show", torn)
        assert shown.status == 4 and "a write to it was interrupted" in shown.err
        with pytest.raises(RefusedError, match="had another name") as refused:
            open_chain(torn, format="raw")
        assert f"imgtool recover {torn}" in str(refused.value.hint)
        done = imgtool_cli("copy-in", torn, __file__, "/x", "--format", "raw")
        assert done.status == 4, done.err
        # What was written to a device since is not known once it was taken away.
        with pytest.raises(RefusedError, match="may have been written to"):
            recover(torn)
        assert "was finished" in str(recover(torn, force=[Reason.CHANGED]))
        assert value_of(torn) == NEW and value_of(whole) == OTHER
        assert list(intent_log.FOR_DEVICES.iterdir()) == []


@needs_loop
def test_devices_that_exchange_names_are_finished_together(files):
    with looped(*files) as nodes:
        cut(*nodes)
        assert len(list(intent_log.FOR_DEVICES.iterdir())) == 4
        exchange(nodes, files)
        # The second one was not begun, and knows from the record of the first that it is to be.
        with pytest.raises(RefusedError, match="had another name"):
            open_chain(nodes[0], format="raw")
        assert "was finished" in str(recover(nodes[1], force=[Reason.CHANGED]))
        assert [value_of(device) for device in nodes] == [NEW, NEW]
        assert list(intent_log.FOR_DEVICES.iterdir()) == []


@needs_loop
def test_first_device_waits_for_one_that_is_elsewhere(files, tmp_path):
    third = tmp_path / "third.raw"
    third.write_bytes(bytes([OLD]) * SIZE)
    with looped(*files, third) as nodes:
        cut(*nodes[:2])
        exchange(nodes[1:], [files[1], third])
        with pytest.raises(RefusedError, match="which have other names now"):
            recover(nodes[0], force=[Reason.CHANGED])
        assert "was finished" in str(recover(nodes[2], force=[Reason.CHANGED]))
        assert "was finished" in str(recover(nodes[0], force=[Reason.CHANGED]))
        assert [value_of(device) for device in nodes] == [NEW, OLD, NEW]


@needs_loop
def test_users_overlay_is_committed_to_its_own_device(files, tmp_path):
    from imgtool.image.change.overlays import plan_commit

    overlay = tmp_path / "top.qcow2"
    with looped(*files) as nodes:
        words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", nodes[0], overlay]
        subprocess.run(words, check=True, env=environment())
        fill(overlay, "qcow2", NEW)

        def work() -> None:
            recorded = intent_log.Record.note

            def note(self: intent_log.Record, **facts: Any) -> None:
                recorded(self, **facts)
                if "overlay" not in facts["noted"]:
                    return
                with nodes[0].open("r+b") as file:
                    file.write(bytes([NEW]) * 4096)
                    os.fsync(file.fileno())
                os._exit(KILLED)

            intent_log.Record.note = note  # type: ignore[method-assign]
            plan_commit(overlay, remove=True, backing_dirs=["/dev"]).run()

        assert in_child(work) == KILLED
        exchange(nodes, files)
        with pytest.raises(RefusedError, match="had another name"):
            open_chain(nodes[1], format="raw")
        assert "finished" in str(recover(nodes[1], force=[Reason.CHANGED], backing_dirs=["/dev"]))
        assert [value_of(device) for device in nodes] == [OLD, NEW]
        assert not overlay.exists()


@needs_loop
def test_loop_device_is_the_part_of_the_file_it_stands_on(files):
    with looped(*files) as nodes:
        first, second = (identity(node) for node in nodes)
        assert first[0].startswith("loop:") and same_device(first, second) is False
        words = ["losetup", "--find", "--show", "--offset", "1048576", files[0]]
        made = subprocess.run(words, check=True, capture_output=True, text=True, env=environment())
        part = Path(made.stdout.strip())
        try:
            assert same_device(first, identity(part)) is False
        finally:
            subprocess.run(["losetup", "--detach", part], check=True, env=environment())
        exchange(nodes, files)
        assert same_device(first, identity(nodes[1])) is True
        copy = files[0].with_name("copy")
        shutil.copyfile(files[0], copy)
        subprocess.run(["losetup", "--detach", nodes[1]], check=True, env=environment())
        copy.rename(files[0])  # another file of that name
        subprocess.run(["losetup", nodes[1], files[0]], check=True, env=environment())
        assert same_device(first, identity(nodes[1])) is False
