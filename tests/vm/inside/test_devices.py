"""Devices of device-mapper as imgtool knows them again: only a kernel with dm-mod has any."""

from __future__ import annotations

from pathlib import Path

from imgtool.image.intent.devices import identity, same_device
from imgtool.image.intent.intent_log import open_record, read_facts, record_path
from tests.vm.inside.machine import MIB, loop_device, run, sparse, wait_until
from tests.vm.inside.test_the_machine import make_group


def test_volume_is_the_same_by_every_name_and_after_a_rename(tmp_path: Path) -> None:
    with loop_device(sparse(tmp_path / "pv", 64 * MIB)) as device:
        only = ("--devicesfile", "", "--devices", device)
        make_group(str(device), "named", "--setautoactivation", "n")
        run("lvcreate", *only, "-an", "--zero", "n", "--size", "16M", "--name", "other", "named")
        run("vgchange", "-ay", *only, "named")
        try:
            volume, other = Path("/dev/named/a-b"), Path("/dev/named/other")
            wait_until(volume.is_block_device, str(volume))
            ids = identity(volume)
            assert ids[0].startswith("dm:LVM-") and len(ids[0]) == len("dm:LVM-") + 64
            assert same_device(ids, identity(other)) is False
            with open_record(volume, create=True) as record:
                assert record is not None
                record.note(operation="resize", identity=ids)
            links = [
                link
                for link in Path("/dev/disk/by-id").iterdir()
                if link.resolve() == volume.resolve()
            ]
            names = [Path("/dev/mapper/named-a--b"), volume.resolve(), *links]
            assert len(names) > 2
            assert {record_path(name) for name in names} == {record_path(volume)}
            assert record_path(other) != record_path(volume)
            # Both names are the other one's by now, and the numbers too.
            run("vgchange", "-an", *only, "named")
            run("lvrename", *only, "named", "a-b", "first")
            run("lvrename", *only, "named", "other", "a-b")
            run("vgchange", "-ay", *only, "named")
            wait_until(volume.is_block_device, str(volume))
            assert read_facts(volume) == {}
            assert read_facts(Path("/dev/named/first"))["operation"] == "resize"
            record_path(Path("/dev/named/first")).unlink()
        finally:
            run("vgchange", "-an", *only, "named")
