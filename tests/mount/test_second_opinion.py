"""Where libparted reads another place of a partition that is said, and nothing is written there."""

from __future__ import annotations

import logging
import struct
import subprocess

import pytest

from imgtool.engines.direct.parent import sandbox
from imgtool.engines.direct.wire.refusals import NoSandbox
from imgtool.mount.mounter import MountRequest
from imgtool.mount.mounting import mount, unmount
from tests.mount.host import good, here, imgtool, state_of
from tests.mount.images import blank, put
from tests.mount.test_tables import (
    MIB,
    SECTOR,
    gpt,
    gpt_4096,
    gpt_without_its_start,
    master_boot_record,
    msdos,
    sixty_logical,
    word,
    write,
)


def two_systems(folder):
    """Partition 1 of an msdos table; libparted takes the PC-98 one, of which 1 is elsewhere."""
    disk = blank(folder / "two.raw", 32 * MIB)
    words = ("mklabel", "pc98", "mkpart", "primary", "16MiB", "24MiB")
    subprocess.run(["parted", "-s", disk, *words], check=True)
    write(disk, 446, struct.pack("<B3xB3xII", 0, 0x83, 2048, 4096))
    put(word(folder / "one", "one"), disk, MIB)
    return disk


def crashing(folder):
    """A boot record with two logical partitions: libparted 3.5 does not survive it."""
    disk = blank(folder / "crashing.raw", 32 * MIB)
    write(disk, 0, master_boot_record([(5, 2048, 40000)]))
    chain = [
        (2048, [(0x83, 2048, 4096), (5, 8192, 8192)]),
        (10240, [(0x83, 2048, 4096), (5, 16384, 8192), (0x83, 6144, 1024)]),
        (18432, [(0x83, 2048, 4096)]),
    ]
    for sector, entries in chain:
        write(disk, sector * SECTOR, master_boot_record(entries))
    put(word(folder / "one", "one"), disk, 4096 * SECTOR)
    return disk


@pytest.mark.parametrize(
    ("make", "number", "told"),
    [
        (two_systems, 1, "has 2097152 bytes, but libparted reads byte 16"),
        (lambda folder: gpt_without_its_start(folder)[0], 3, "libparted reads no partition table"),
        (crashing, 5, "libparted failed at the partition table: it ended without an answer"),
    ],
    ids=["two systems", "no primary GPT", "a crash"],
)
def test_another_offset_is_said_and_not_written_to(tmp_path, place, make, number, told):
    disk = make(tmp_path)
    before = state_of([disk])
    refused = imgtool("mount", disk, place, "--via", "loop", "-p", number, "--rw")
    assert refused.status == 4
    assert told in refused.err
    assert "hint: mount it without --rw, and see what is there; " in refused.err
    assert "--force other-offset" in refused.err
    # The hint, followed: to look, and to write all the same.
    done = good("mount", disk, place, "--via", "loop", "-p", number)
    assert f"warning: /dev/sda{number}" in done.err and told in done.err
    assert (place / "word").read_text() in ("one", "three")
    here("umount", place)
    assert state_of([disk]) == before
    forced = ("--rw", "--force", "other-offset")
    done = good("mount", disk, place, "--via", "loop", "-p", number, *forced)
    assert told in done.err
    (place / "new").write_text("written")
    here("umount", place)


@pytest.mark.parametrize("make", [gpt, gpt_4096, msdos, sixty_logical])
def test_where_both_read_the_same_nothing_is_said(tmp_path, place, make):
    disk, words = make(tmp_path)
    for number in words:
        done = good("mount", disk, place, "--via", "loop", "-p", number, "--rw")
        here("umount", place)
        assert done.err == ""


def test_without_a_sandbox_there_is_no_second_opinion(tmp_path, place, monkeypatch, caplog):
    """It is said with -v alone; the offset is our own reader's."""
    disk = two_systems(tmp_path)

    def none(*_: object, **__: object) -> None:
        raise NoSandbox("there is none")

    monkeypatch.setattr(sandbox, "start_worker", none)
    told: list[str] = []
    with caplog.at_level(logging.INFO):
        mount(MountRequest(disk, place, via="loop", partition=1, notice=told.append))
    assert (place / "word").read_text() == "one"
    unmount(place)
    assert told == []
    assert "no second opinion of libparted: no sandbox can be had" in caplog.text
