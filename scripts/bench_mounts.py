"""What scripts/bench measures of host mounts: against the same commands by hand, and guestmount."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from pathlib import Path

from bench_cases import (
    IMGTOOL,
    NO_ENGINE,
    CannotMeasure,
    Case,
    Command,
    OwnCommand,
    Peer,
    Place,
    finished,
    make_destination,
    make_ext4,
    system_program,
)

START, SIZE = 1 << 20, 256 << 20
READ = 1 << 30
BY_HAND = 1.5  # times the shell script's
READY = 0.1  # of guestmount's
READING = 1 / 0.6  # times the plain loop mount's


def make_partitioned(folder: Path, size: int = SIZE, *options: str) -> Path:
    """A raw image with one partition, an ext4."""
    if os.geteuid() != 0:
        raise CannotMeasure("only root can mount block devices")
    piece, disk = folder / "piece", folder / "disk.raw"
    make_ext4(piece, size, *options)
    with disk.open("wb") as file:
        file.truncate(START + size + START)
    table = f"label: dos\nstart={START // 512}, size={size // 512}, type=83\n"
    words = [system_program("sfdisk"), "--quiet", str(disk)]
    subprocess.run(words, input=table, text=True, check=True)
    write = ["dd", f"if={piece}", f"of={disk}", "bs=1M", "conv=notrunc,sparse", "status=none"]
    finished([*write, "oflag=seek_bytes", f"seek={START}"])
    piece.unlink()
    return disk


def make_partitioned_qcow2(folder: Path) -> Path:
    """The same as qcow2."""
    raw = make_partitioned(folder)
    image = raw.with_suffix(".qcow2")
    finished(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)])
    return image


def make_readable(folder: Path) -> Path:
    """A raw image with one partition, and a file of 1 GiB in it."""
    contents = folder / "contents"
    contents.mkdir()
    block = os.urandom(1 << 20)
    with (contents / "large").open("wb") as file:
        for _ in range(READ // len(block)):
            file.write(block)
    disk = make_partitioned(folder, READ + SIZE, "-d", str(contents))
    (contents / "large").unlink()
    return disk


def shell(script: str) -> Command:
    """`sh -c SCRIPT IMAGE MOUNTPOINT FOLDER`."""
    return lambda place: [
        *("sh", "-ec", f'PATH="$PATH:/usr/sbin:/sbin"; {script}', "sh"),
        *(str(place.image), str(place.destination), str(place.folder)),
    ]


def own(script: str) -> OwnCommand:
    """The same, of imgtool."""
    command = shell(script.replace("imgtool ", f"{shlex.quote(str(IMGTOOL))} "))
    return lambda place, engine: command(place)


def unmounted(place: Place) -> None:
    """Whoever mounted it."""
    for words in (
        [str(IMGTOOL), "umount", str(place.destination)],
        ["guestunmount", str(place.destination)],
        ["umount", str(place.destination)],
    ):
        if place.destination.is_mount():
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(words, capture_output=True, check=False)


def with_nbd(place: Place) -> None:
    """The kernel's nbd devices, and a folder to mount at."""
    make_destination(place)
    finished([system_program("modprobe"), "nbd", "max_part=16"])


def forgotten(place: Place) -> None:
    """The page cache, and a folder to mount at."""
    make_destination(place)
    finished(["sync"])
    Path("/proc/sys/vm/drop_caches").write_text("3")


_EXPORT = """
    qemu-img create -q -f qcow2 -b "$1" -F qcow2 "$3/overlay"
    touch "$3/disk"
    qemu-storage-daemon --daemonize --pidfile "$3/pid" \\
        --blockdev "driver=qcow2,node-name=d,file.driver=file,file.filename=$3/overlay" \\
        --export "type=fuse,id=e,node-name=d,mountpoint=$3/disk,writable=on"
"""
_HAND_LOOP = f"""
    d=$(losetup --find --show --read-only --offset {START} --sizelimit {SIZE} "$1")
    mount -o ro "$d" "$2"; umount "$2"; losetup --detach "$d"
"""
_HAND_EXPORT = f"""{_EXPORT}
    d=$(losetup --find --show --offset {START} --sizelimit {SIZE} "$3/disk")
    mount -o ro "$d" "$2"; umount "$2"; losetup --detach "$d"
    pid=$(cat "$3/pid"); kill "$pid"; while kill -0 "$pid" 2>/dev/null; do sleep 0.01; done
"""
_HAND_NBD = """
    qemu-nbd --read-only --connect=/dev/nbd0 --pid-file="$3/pid" "$1"
    while [ ! -b /dev/nbd0p1 ]; do sleep 0.01; done
    mount -o ro /dev/nbd0p1 "$2"; umount "$2"
    pid=$(cat "$3/pid"); qemu-nbd --disconnect /dev/nbd0
    while [ -e /sys/block/nbd0/pid ] || kill -0 "$pid" 2>/dev/null; do sleep 0.01; done
"""
# What two commands cost before they are imgtool's.
_TWO_STARTS = shell(" ".join(2 * (f"{shlex.quote(str(IMGTOOL.with_name('python')))} -c pass;",)))
_PLAIN = f"ro,loop,offset={START},sizelimit={READ + SIZE}"
_READ = 'dd if="$2/large" of=/dev/null bs=1M'  # says last how long it took

MOUNT_CASES = (
    Case(
        "mount-loop",
        own('imgtool mount --via loop -p 1 "$1" "$2"; imgtool umount "$2"'),
        (Peer("by hand", shell(_HAND_LOOP), BY_HAND), Peer("two starts of Python", _TWO_STARTS)),
        engines=(NO_ENGINE,),
        prepare=make_destination,
        make_image=make_partitioned,
        needs_guest=False,
        silent=True,
    ),
    Case(
        "mount-export",
        own('imgtool mount --via export -p 1 "$1" "$2"; imgtool umount "$2"'),
        (Peer("by hand", shell(_HAND_EXPORT), BY_HAND),),
        engines=(NO_ENGINE,),
        prepare=make_destination,
        make_image=make_partitioned_qcow2,
        needs_guest=False,
        silent=True,
    ),
    Case(
        "mount-nbd",  # scripts/vm-run scripts/bench mount-nbd, where the kernel has no nbd
        own('imgtool mount --via nbd -p 1 "$1" "$2"; imgtool umount "$2"'),
        (Peer("by hand", shell(_HAND_NBD), BY_HAND), Peer("two starts of Python", _TWO_STARTS)),
        engines=(NO_ENGINE,),
        prepare=with_nbd,
        make_image=make_partitioned_qcow2,
        needs_guest=False,
        by_name=True,
        silent=True,
    ),
    Case(
        "mount-ready",
        own('imgtool mount --via export -p 1 "$1" "$2"'),
        (
            Peer(
                "guestmount",
                shell('guestmount --ro -a "$1" -m /dev/sda1 "$2"'),
                READY,
                appliance=True,
            ),
        ),
        engines=(NO_ENGINE,),
        prepare=make_destination,
        finish=unmounted,
        make_image=make_partitioned_qcow2,
        needs_guest=False,
        silent=True,
    ),
    Case(
        "mount-read",
        own(f'imgtool mount --via export -p 1 "$1" "$2"; {_READ}'),
        (
            Peer(
                "loop mount",
                shell(f'mount -o "{_PLAIN}" "$1" "$2"; {_READ}'),
                READING,
            ),
        ),
        engines=(NO_ENGINE,),
        prepare=forgotten,
        finish=unmounted,
        make_image=make_readable,
        needs_guest=False,
        silent=True,
        step="copied,",
        step_of_peers=True,
    ),
)
