"""Who has an image open: found by QEMU's own locks, with a real QEMU holding them."""

from __future__ import annotations

import contextlib
import fcntl
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtool.errors import ExitStatus, RefusedError
from imgtool.host.process import spawn
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.info import probe
from imgtool.image.locking import locks
from imgtool.image.locking.held import descriptors
from imgtool.image.locking.locks import (
    Holder,
    held_for_writing,
    holders,
    in_use_for_writing,
    refuse_if_in_use,
)
from imgtool.image.locking.locks import warn_if_written as warning
from imgtool.image.qemu.nbd import serve
from imgtool.image.qemu.qemu_img import qemu_img


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    return path


@contextlib.contextmanager
def written_by_qemu(path: Path) -> Iterator[int]:
    """A storage daemon that exports the image for writing; gives its process id."""
    socket = path.parent / "daemon"
    argv = [
        "qemu-storage-daemon",
        f"--blockdev=driver=file,node-name=file,filename={path}",
        "--blockdev=driver=qcow2,node-name=disk,file=file",
        f"--nbd-server=addr.type=unix,addr.path={socket}",
        "--export=type=nbd,id=out,node-name=disk,writable=on",
        f"--pidfile={socket}.pid",
    ]
    with spawn(argv) as process:
        deadline = time.monotonic() + 20
        while not socket.with_suffix(".pid").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        yield process.pid


def test_nobody_holds_an_image_at_rest(image: Path) -> None:
    assert holders(image) == ()
    assert in_use_for_writing(image) is None
    refuse_if_in_use(open_chain(image))
    assert warning(open_chain(image)) is None


def test_a_writer_is_named_with_its_process(image: Path) -> None:
    with written_by_qemu(image) as pid:
        holder = in_use_for_writing(image)
        assert holder == Holder(pid=pid, program="qemu-storage-daemon", writes=True, exclusive=True)
        assert holders(image) == (holder,)
        assert str(holder) == f"qemu-storage-daemon, process {pid}"
    assert in_use_for_writing(image) is None


def test_image_in_use_refuses_writes_and_warns_readers(image: Path) -> None:
    with written_by_qemu(image) as pid:
        chain = open_chain(image)
        with pytest.raises(RefusedError, match=f"process {pid}") as caught:
            refuse_if_in_use(chain)
        assert caught.value.status is ExitStatus.REFUSED and caught.value.hint
        line = warning(chain)
        assert line is not None and f"process {pid}" in line and "inconsistent" in line


def test_an_image_in_use_is_still_read(image: Path) -> None:
    with written_by_qemu(image), serve(open_chain(image)) as server:
        assert server.read(0, 4096) == bytes(4096)


def test_an_overlay_is_not_written_while_its_base_is(image: Path) -> None:
    active = image.with_name("active.qcow2")
    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", active)
    subprocess.run(create, check=True)
    chain = open_chain(active)
    with written_by_qemu(image) as pid, pytest.raises(RefusedError, match=f"process {pid}"):
        refuse_if_in_use(chain)
    assert warning(chain) is None


def test_readers_keep_writers_away_from_the_active_image_alone(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    active = image.with_name("active.qcow2")
    create = ("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", active)
    subprocess.run(create, check=True)
    chain = open_chain(image)
    with serve(chain):
        (holder,) = holders(image)
        assert holder.program == "qemu-nbd" and not holder.writes and holder.exclusive
        assert in_use_for_writing(image) is None
        assert warning(chain) is None
        with pytest.raises(RefusedError, match="qemu-nbd"):
            refuse_if_in_use(chain)
        refuse_if_in_use(open_chain(active))


def test_a_holder_that_cannot_be_seen_still_counts(image: Path) -> None:
    # Our own process is left out of the search, so its lock is one without a visible process.
    with image.open("r+b") as file:
        lock = struct.pack("hhqqi0q", fcntl.F_RDLCK, 0, 101, 1, 0)
        fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, lock)
        holder = in_use_for_writing(image)
        assert isinstance(holder, Holder) and holder.pid is None and holder.writes
        with pytest.raises(RefusedError, match="cannot be seen"):
            refuse_if_in_use(open_chain(image))


def test_an_image_that_grows_just_now_is_not_called_truncated(image: Path) -> None:
    subprocess.run(
        ["qemu-io", "-c", "write -P 1 0 4M", image], check=True, stdout=subprocess.DEVNULL
    )
    with image.open("r+b") as file:
        lock = struct.pack("hhqqi0q", fcntl.F_RDLCK, 0, 101, 1, 0)
        fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, lock)
        file.truncate(3 << 20)
        (problem,) = probe(image).problems
    assert "being written" in problem


def test_held_locks_keep_writers_out_and_own_programs_in(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    guest = ("qemu-io", "-f", "qcow2", "-c", "write 0 64k", image)

    def status() -> int:
        return subprocess.run(guest, check=False, capture_output=True).returncode

    with held_for_writing([image]):
        assert status() == 1
        with held_for_writing([image]):  # one piece of work in another
            pass
        assert status() == 1 and holders(image) == ()
        own = Chain((probe(image),)).filename(read_only=False)
        qemu_img(["snapshot", "-c", "one", own], image=image)
        # As of an imgtool that is killed, whose QEMU is not gone yet.
        slow = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, pass_fds=descriptors(), start_new_session=True
        )
    assert status() == 1
    assert slow.stdin is not None
    slow.stdin.close()
    slow.wait()
    assert status() == 0
