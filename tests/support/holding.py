"""Images that hold more than content, what is in them, and damage to their tables."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from imgtool.formats.qcow2_bitmaps import Bitmap
from imgtool.host.process import spawn
from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.holdings import Held, Holdings, holdings_of
from imgtool.image.intent.intent_log import is_ours
from imgtool.image.qemu.disk_reader import open_contents

MIB = 1 << 20
CLUSTER = 65536
INCOMPATIBLE, AUTOCLEAR = 79, 95  # the lowest bytes of these features in the header


def qemu_img(*words: str | Path) -> bytes:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True).stdout


def write(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    argv: list[str | Path] = ["qemu-io", "-t", "writeback", "-f", "qcow2", *words, image]
    subprocess.run(argv, check=True, capture_output=True)


def with_both(path: Path, *options: str) -> Path:
    """`one` holds ones in its first MiB, the present state nines; `since` notes a later write."""
    qemu_img("create", "-q", "-f", "qcow2", *options, path, "8M")
    write(path, "write -P 1 0 2M")
    qemu_img("snapshot", "-c", "one", path)
    write(path, "write -P 9 0 1M")
    qemu_img("bitmap", "--add", path, "since")
    write(path, "write -P 8 3M 128k")
    return path


def held(image: Path) -> Holdings:
    found = holdings_of(image, "qcow2")
    assert found is not None
    return found


def bitmaps_in(image: Path) -> tuple[Bitmap, ...]:
    bitmaps = held(image).bitmaps
    assert bitmaps is not None
    return bitmaps


def snapshots_in(image: Path) -> tuple[Held, ...]:
    snapshots = held(image).snapshots
    assert snapshots is not None
    return snapshots


def contents(image: Path) -> list[bytes]:
    """The disk, and as it was at each snapshot."""
    chain = open_chain(image)
    found = []
    for name in (None, *(snapshot.name for snapshot in chain.active.snapshots)):
        with open_contents(chain, snapshot=name) as (read, size):
            found.append(read(0, size))
    return found


def noted_in(image: Path, bitmap: str) -> list[tuple[int, int]]:
    """The stretches of the disk that a bitmap says were written to, as QEMU's own server tells."""
    socket, ready = image.parent / "nbd.sock", image.parent / "nbd.pid"
    argv = ["qemu-nbd", "-r", "-t", "-B", bitmap, "-k", str(socket), "-f", "qcow2"]
    with spawn([*argv, f"--pid-file={ready}", str(image)]):
        while not ready.exists():
            pass
        node = f"driver=nbd,server.type=unix,server.path={socket}"
        dirty = f"{node},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
        said = json.loads(qemu_img("map", "--output=json", "--image-opts", dirty))
    socket.unlink(missing_ok=True)
    ready.unlink(missing_ok=True)
    # What is noted as written to is told as a part without data.
    return [(row["start"], row["length"]) for row in said if not row["data"]]


def tables(image: Path) -> dict[str, int]:
    argv = ("qemu-img", "check", "--output=json", image)
    answer = json.loads(subprocess.run(argv, check=False, capture_output=True).stdout)
    return {kind: answer[kind] for kind in ("corruptions", "leaks") if answer.get(kind)}


def patch(image: Path, at: int, content: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(at)
        file.write(content)


def refcounts(image: Path) -> int:
    """Where the first block of them is, of 16 bits each."""
    content = image.read_bytes()
    table = int.from_bytes(content[48:56], "big")
    return int.from_bytes(content[table : table + 8], "big")


def leak(image: Path) -> None:
    """A cluster behind the last one is counted as used."""
    number = -(-image.stat().st_size // CLUSTER)
    with image.open("r+b") as file:
        file.truncate((number + 1) * CLUSTER)
    patch(image, refcounts(image) + 2 * number, b"\0\1")


def miscount(image: Path) -> None:
    """A cluster that is in use is counted as free."""
    patch(image, refcounts(image) + 2 * 10, b"\0\0")


def kill_a_writer(image: Path) -> None:
    """A QEMU that has the image open; its bitmaps, of which it has marked one at least as in use,
    stay so."""
    argv = ["qemu-io", "-f", "qcow2", "-c", "sleep 60000", str(image)]
    deadline = time.monotonic() + 20
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not any(bitmap.in_use for bitmap in held(image).bitmaps or ()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()


def nothing_left(folder: Path) -> bool:
    return not any(is_ours(path.name) for path in folder.iterdir())
