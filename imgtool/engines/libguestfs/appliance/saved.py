"""The saved appliance: a launched appliance in a file, which continues in a second.

An appliance takes ten seconds and more to start where there is no KVM. `save` starts one with
empty disks, writes its memory to a file at the moment at which it would tell libguestfs that it is
there, and gives libguestfs a program to start in QEMU's place (`starter`). A launch that asks for
the same appliance (same QEMU, kernel, memory, number of disks) then continues that memory with the
guest's disks in the place of the empty ones; `settle` lets the appliance's kernel look at them
again, sets its clock, and mixes new random numbers into those that it has. Any other launch is an
ordinary one.

The kernel uses what was mixed in only when it seeds its generator anew, within a minute, and no
program of the appliance can tell it to do so at once. Until then each continuation of one saved
appliance may see the same random numbers. imgtool makes all that has to be secret, or unique, on
the host.

No guest was ever in the memory that is saved. The files are the user's own and are used only while
nobody else may write to them.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import logging
import os
import pwd
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from imgtool.engines.libguestfs.appliance.monitor import Monitor
from imgtool.engines.libguestfs.appliance.starter import (
    appliance_drive,
    file_of,
    identity,
    quote_option,
    shape,
)
from imgtool.engines.libguestfs.appliance.starter import stands as _stands
from imgtool.errors import EngineError, HostError, ImgtoolError, RefusedError, shorten
from imgtool.host.process import PIPE, command_of, run, spawn
from imgtool.host.scratch import scratch_folder
from imgtool.text import typed

log = logging.getLogger(__name__)

_VERSION = 2  # of what is in the folder
_DUMMY = 1 << 20  # bytes of the disks that the appliance has while it is saved
_LONGEST = 300.0  # seconds for an emulated appliance on a busy machine
# The appliance has opened the channel and waits for somebody to be at its other end.
_REST = 1.0

# What the appliance's own start-up does once it sees disks, for the disks that it sees now.
_SETTLE = r"""
date -s @NOW >/dev/null
head -c 256 /dev/hwrng >/dev/urandom 2>/dev/null
root=$(mountpoint -d /)
for disk in /sys/block/sd*; do
    [ "$(cat $disk/dev)" = "$root" ] && continue
    echo 1 >$disk/device/rescan || exit 1
    blockdev --flushbufs --rereadpt /dev/${disk##*/} || exit 1
done
udevadm settle
if grep -qs 'raid_member' /run/udev/data/b*; then
    mdadm -As --auto=yes --run
    udevadm settle
fi
if grep -qs 'ID_FS_TYPE=LVM2_member' /run/udev/data/b*; then
    lvm pvscan --cache --activate ay
fi
if grep -qsi 'ID_PART_ENTRY_TYPE=\(0x42\|5808c8aa\|af9b60a0\)' /run/udev/data/b*; then
    ldmtool create all
fi
udevadm settle
echo settled
"""


@dataclass(frozen=True)
class Saved:
    """A saved appliance, for guests of so many disks.

    `size` is in bytes of room taken, `time` in nanoseconds since 1970. A `fresh` one was made of
    the QEMU and the appliance that are there now.
    """

    folder: Path
    disks: int
    size: int
    time: int
    hypervisor: str
    fresh: bool

    @property
    def starter(self) -> Path:
        return self.folder / "qemu"


def _safe(folder: Path) -> bool:
    """Whether all of it is this user's, and nobody else can write to it or replace it."""
    for path in (folder.parent, folder, *folder.iterdir()):
        facts = path.lstat()
        if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            log.info("%s is not used: others may have written to it", path)
            return False
    if (above := _find_exposed(folder.parent)) is not None:
        log.info("%s is not used: others may write to %s", folder, above)
        return False
    return True


def _find_exposed(home: Path) -> Path | None:
    """A folder above, in which somebody else could put another in the place of this one."""
    for path in home.absolute().resolve().parents:
        facts = path.stat()
        if facts.st_uid not in (0, os.geteuid()):
            return path
        if facts.st_mode & stat.S_ISVTX:  # in it, names are taken away by their owners alone
            continue
        others = facts.st_mode & stat.S_IWOTH
        if others or (facts.st_mode & stat.S_IWGRP and not _is_own_group(facts.st_gid)):
            return path
    return None


def _is_own_group(number: int) -> bool:
    """Whether it is the group that many systems give to each user for himself."""
    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(number)
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def _read(folder: Path) -> Saved | None:
    try:
        if not _safe(folder):
            return None
        facts = json.loads((folder / "saved.json").read_text())
        if facts["version"] != _VERSION:
            return None
        written = [path.stat() for path in folder.iterdir()]
        return Saved(
            folder=folder,
            disks=int(facts["disks"]),
            size=sum(one.st_blocks * 512 for one in written),
            time=int(facts["time"]),
            hypervisor=str(facts["hypervisor"]),
            # The Python of an environment that was removed since starts nothing.
            fresh=_stands(facts) and os.access(str(facts["python"]), os.X_OK),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def all_saved(home: Path) -> list[Saved]:
    """The saved appliances in a folder, those for the fewest disks first."""
    try:
        found = [_read(folder) for folder in home.iterdir() if folder.name.isdigit()]
    except OSError:
        return []
    return sorted((one for one in found if one is not None), key=lambda one: one.disks)


def for_handle(home: Path, handle: Any) -> Saved | None:
    """The saved appliance for a handle that has its drives, if there is a fresh one."""
    saved = _read(home / str(len(handle.debug_drives())))
    if saved is None:
        return None
    if not saved.fresh:
        log.info("the saved appliance is not used: QEMU or the appliance is another one now")
        return None
    if saved.hypervisor != handle.get_hv():
        log.info("the saved appliance is not used: it was made with %s", saved.hypervisor)
        return None
    return saved


def is_continued(handle: Any) -> bool:
    """Whether a launched handle's appliance is a saved one that continues."""
    return "-incoming" in command_of(handle.get_pid())


def settle(handle: Any) -> None:
    """Let an appliance that continues see the disks that it has now, and what time it is.

    Raises `EngineError` if it does not.
    """
    try:
        said = handle.debug("sh", [_SETTLE.replace("NOW", f"{time.time():.3f}")])
    except RuntimeError as error:
        raise EngineError(f"the saved appliance does not see the disks: {error}") from error
    if said.split()[-1:] != ["settled"]:
        raise EngineError(f"the saved appliance does not see the disks: {shorten(said)}")


def save(home: Path, handle: Any, hypervisor: str) -> Saved:
    """Start the appliance that this handle, not launched yet, would start, and save it.

    What the handle has as drives is counted but not used. Replaces what was saved for this many
    disks. Raises `HostError` if the appliance does not start, there is no room, or others may
    write to the place, and `RefusedError` while another one is saved.
    """
    with scratch_folder("save") as folder:
        argv = _ask_arguments(handle, hypervisor, folder)
        try:
            with _place_for_new(home) as new:
                _start_and_save(argv, hypervisor, folder, new)
                _describe(argv, len(handle.debug_drives()), hypervisor, new)
                _put_in_place(new, home / str(len(handle.debug_drives())))
        except OSError as error:
            if isinstance(error, ImgtoolError):
                raise
            reason = f"the appliance cannot be saved: {error.strerror}"
            raise HostError(reason, subject=home) from error
    saved = _read(home / str(len(handle.debug_drives())))
    if saved is None:
        raise HostError("the appliance was saved but cannot be used", subject=home)
    return saved


@contextlib.contextmanager
def _place_for_new(home: Path) -> Iterator[Path]:
    """A private folder for what is saved, removed with the block unless it was put in its place.

    What saves that were killed have left is removed first: it can be large.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (home, home.parent):  # imgtool's own, whatever the umask was
        if path.stat().st_uid == os.geteuid() and path.name in ("appliance", "imgtool"):
            path.chmod(path.stat().st_mode & ~(stat.S_IWGRP | stat.S_IWOTH))
    if (above := _find_exposed(home)) is not None:
        raise HostError(
            "an appliance is not saved where others could put another in its place",
            subject=above,
            hint=f"chmod go-w {typed(above)}, or set XDG_CACHE_HOME to a folder that is yours"
            " alone",
        )
    lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError("another appliance is being saved", subject=home) from None
        for left in (*home.glob(".new-*"), *home.glob(".old-*")):
            shutil.rmtree(left, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
        try:
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)
    finally:
        os.close(lock)


def _describe(argv: list[str], disks: int, hypervisor: str, folder: Path) -> None:
    """Write down what was saved, and what starts it."""
    facts = {
        "version": _VERSION,
        "disks": disks,
        "time": time.time_ns(),
        "hypervisor": hypervisor,
        "python": sys.executable,
        "shape": shape(argv),
        "files": [
            identity(hypervisor),
            identity(file_of(argv[appliance_drive(argv)]), time=False),
        ],
    }
    (folder / "saved.json").write_text(json.dumps(facts))
    _write_starter(folder)


def _put_in_place(new: Path, place: Path) -> None:
    for path in new.iterdir():
        path.chmod(0o700 if path.name == "qemu" else 0o600)  # whatever the umask
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if place.exists():
        gone = Path(tempfile.mkdtemp(prefix=".old-", dir=place.parent))
        place.rename(gone / "old")
        shutil.rmtree(gone)
    new.rename(place)


def remove_all(home: Path) -> None:
    """Remove what was saved, and what was left of it; launches that have begun with it go on."""
    try:
        shutil.rmtree(home)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"cannot be removed: {error.strerror}", subject=home) from error


def _write_starter(folder: Path) -> None:
    """A program for libguestfs to start, which finds the rest beside itself."""
    source = resources.files(__package__).joinpath("starter.py").read_text()
    (folder / "starter.py").write_text(source)
    program = folder / "qemu"
    python = shlex.quote(sys.executable)
    program.write_text(
        f'#!/bin/sh\nhere=$(dirname "$0")\nexec {python} -IS "$here/starter.py" "$here" "$@"\n'
    )
    program.chmod(0o700)


def _ask_arguments(handle: Any, hypervisor: str, folder: Path) -> list[str]:
    """The arguments with which libguestfs would start QEMU."""
    asked = folder / "asked"
    recorder = folder / "qemu"
    recorder.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -kernel "*)\n'
        f"    printf '%s\\0' \"$@\" >{shlex.quote(str(asked))}; exit 1 ;;\n"
        "esac\n"
        f'exec {shlex.quote(hypervisor)} "$@"\n'
    )
    recorder.chmod(0o700)
    handle.set_hv(str(recorder))
    reason = "libguestfs does not start QEMU itself"
    try:
        handle.launch()  # in vain
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    try:
        argv = [os.fsdecode(word) for word in asked.read_bytes().split(b"\0")[:-1]]
    except FileNotFoundError:
        raise HostError(f"the appliance cannot be saved: {reason}") from None
    if appliance_drive(argv) < 0:
        raise HostError("the appliance cannot be saved: it has no disk of its own")
    return argv


def _start_and_save(argv: list[str], hypervisor: str, scratch: Path, new: Path) -> None:
    own = appliance_drive(argv)
    root = new / "root.qcow2"
    options = ["-f", "qcow2", "-b", file_of(argv[own]), "-F", "raw"]
    run(["qemu-img", "create", "-q", *options, root])
    empty = scratch / "empty"
    with empty.open("wb") as file:
        file.truncate(_DUMMY)
    words = list(argv)
    words[own] = f"file={quote_option(root)},id=appliance,cache=unsafe,if=none,format=qcow2"
    for number, (before, word) in enumerate(zip(["", *argv], argv, strict=False)):
        if before == "-drive" and number != own:
            disk = shape(["-drive", word])[1]
            words[number] = f"file={quote_option(empty)},snapshot=on,format=raw,id={disk},if=none"
        elif before == "-chardev" and _is(word, "channel0"):
            socket = quote_option(scratch / "channel")
            words[number] = f"socket,path={socket},id=channel0,server=on,wait=off"
        elif before == "-chardev":  # that of the monitor
            words[number] = "stdio,id=imgtool"
        elif before == "-serial":
            words[number] = f"file:{scratch / 'console'}"
    with spawn([hypervisor, *words], stdin=PIPE, stdout=PIPE) as qemu:
        assert qemu.stdin is not None and qemu.stdout is not None and qemu.stderr is not None
        try:
            _save(Monitor(qemu.stdin, qemu.stdout), new)
        except EOFError:
            said = qemu.stderr.read().decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else "QEMU ended"
            raise HostError(f"the appliance cannot be saved: {reason}") from None
        qemu.wait(60)


def _save(qmp: Monitor, new: Path) -> None:
    until = time.monotonic() + _LONGEST
    while not _waits(qmp):
        if time.monotonic() > until:
            raise HostError("the appliance cannot be saved: it does not start")
        time.sleep(0.1)
    time.sleep(_REST)
    qmp.do("migrate-set-parameters", {"max-bandwidth": 1 << 40})
    state = shlex.quote(str(new / "state"))
    qmp.do("migrate", {"uri": f"exec:cat >{state}"})
    while (status := qmp.do("query-migrate")["status"]) not in ("completed", "failed"):
        time.sleep(0.05)
    if status == "failed":
        raise HostError("the appliance cannot be saved: no room?", subject=new.parent)
    qmp.do("quit")


def _is(word: str, identifier: str) -> bool:
    return f"id={identifier}" in word.split(",")


def _waits(qmp: Monitor) -> bool:
    """Whether the appliance has opened the channel to libguestfs."""
    return any(
        port["label"] == "channel0" and port["frontend-open"] for port in qmp.do("query-chardev")
    )
