"""A Debian 12 that starts: with kernel, systemd, sshd, and all that may configure its network.

`machine()` boots an image of it under emulation, with its serial console in the caller's hands.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import os
import platform
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from imgtool.host.process import run
from tests.guestmaker.build import default_cache
from tests.guestmaker.disks import MIB, Slice, blank, ext, partition, place, write_files
from tests.guestmaker.trees import _PROXIES, SUITE, _mirrors

needs_pc = pytest.mark.skipif(platform.machine() != "x86_64", reason="it is a guest for PCs")
UUID = "5f1d3a52-0f8b-4b6c-9d31-000000000b01"
MACHINE_ID = "0123456789abcdef0123456789abcdef"
_ROOT = Slice(1, 1150)
_PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "libpam-systemd", "kmod", "tzdata", "iproute2"),
    *("linux-image-cloud-amd64", "initramfs-tools", "openssh-server", "sudo"),
    *("netplan.io", "network-manager", "systemd-resolved", "ifupdown", "isc-dhcp-client"),
    "cloud-init",
)
# What the machine of `machine` has; with every driver there is, the start takes longer.
_DRIVERS = " && ".join(
    (
        'mkdir -p "$1/etc/initramfs-tools/conf.d"',
        'echo MODULES=list > "$1/etc/initramfs-tools/conf.d/drivers"',
        r"printf 'virtio_pci\nvirtio_blk\next4\n' > "
        '"$1/etc/initramfs-tools/modules"',
    )
)
# Emulated, these take half of the time of a start: indirect calls, the clock, drivers and units
# that nobody uses.
_FASTER = "mitigations=off tsc=reliable module_blacklist=ata_piix,psmouse,pcspkr,i2c_piix4"
_WITHOUT = (
    *("e2scrub_reap.service", "systemd-binfmt.service", "modprobe@drm.service"),
    *("modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@dm_mod.service"),
    *("modprobe@loop.service", "systemd-pstore.service", "apt-daily.timer", "dev-hugepages.mount"),
)
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_BEGUN = re.compile(r"\x1b(\[[0-9;?]*)?\Z")
_FILES = {
    "etc/fstab": f"UUID={UUID} / ext4 errors=remount-ro 0 1\n",
    "etc/hostname": "golden\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n127.0.1.1\tgolden\n",
    "etc/machine-id": f"{MACHINE_ID}\n",
    # Interfaces without a connection of their own belong to the other three.
    "etc/NetworkManager/conf.d/only-what-is-told.conf": "[main]\nno-auto-default=*\n",
}


@dataclass(frozen=True)
class Bootable:
    """The disk, which must not be written, and what it is booted by."""

    disk: Path
    kernel: Path
    initrd: Path
    root_offset: int = _ROOT.start * MIB


@cache
def bootable() -> Bootable:
    """The guest, made at the first call and kept beside the others, by a hash of its recipe."""
    cache_folder = default_cache()
    recipe = f"{(SUITE, UUID, _ROOT, _PACKAGES, _DRIVERS, _FILES)}{inspect.getsource(_make)}"
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    folder = cache_folder / f"bootable-{key}"
    made = Bootable(folder / "disk.raw", folder / "kernel", folder / "initrd")
    cache_folder.mkdir(parents=True, exist_ok=True)
    with (cache_folder / "bootable.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draft = cache_folder / f"bootable-{key}.draft"
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            _make(draft)
            draft.replace(folder)
        os.utime(folder)
    return made


def _make(folder: Path) -> None:
    tree = folder / "tree"
    words: list[str | Path] = ["mmdebstrap", "--quiet", "--variant=minbase"]
    words += ["--aptopt=APT::Install-Recommends false", "--dpkgopt=force-unsafe-io"]
    words += [f"--dpkgopt=path-exclude=/usr/share/{x}/*" for x in ("doc", "man", "locale")]
    words += [f"--essential-hook={_DRIVERS}", f"--include={','.join(_PACKAGES)}"]
    run([*words, SUITE, tree, *_mirrors()], env=_PROXIES)
    write_files(tree, _FILES)
    for name in ("vmlinuz", "initrd.img"):
        (found,) = (tree / "boot").glob(f"{name}-*")
        shutil.copy(found, folder / {"vmlinuz": "kernel", "initrd.img": "initrd"}[name])
    ext(folder / "root", _ROOT.size * MIB, tree, uuid=UUID)
    disk = blank(folder / "disk.raw", (_ROOT.start + _ROOT.size + 1) * MIB)
    partition(disk, "dos", [_ROOT])
    place(folder / "root", disk, _ROOT.start * MIB)
    (folder / "root").unlink()
    shutil.rmtree(tree)


class Console:
    """The serial console of a machine that runs; `text` is all that came so far."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        self._seen = 0
        self._cut_off = ""
        self.text = ""

    def _more(self, end: float, wanted: str) -> bool:
        """Read on; whether there was anything. `AssertionError` when the time is over."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(end - time.monotonic(), 0))
        assert ready, f"too late for {wanted} on the console:\n{self.text[-3000:]}"
        chunk = os.read(self._process.stdout.fileno(), 65536)
        with self._log.open("ab") as log:
            log.write(chunk)
        came = _CONTROL.sub("", self._cut_off + chunk.decode(errors="replace"))
        complete = _BEGUN.sub("", came)
        self._cut_off = came[len(complete) :]
        self.text += complete
        return bool(chunk)

    def wait_for(self, pattern: str, seconds: float = 300) -> str:
        """What came since the last call, up to this; `AssertionError` where it does not come."""
        end = time.monotonic() + seconds
        while True:
            found = re.compile(pattern).search(self.text, self._seen)
            if found:
                before, self._seen = self.text[self._seen : found.end()], found.end()
                return before
            more = self._more(end, pattern)
            assert more, f"it ended without {pattern} on the console:\n{self.text[-3000:]}"

    def say(self, line: str) -> None:
        """Type a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def wait_for_end(self, seconds: float = 120) -> None:
        """Until the machine has switched itself off."""
        end = time.monotonic() + seconds
        while self._more(end, "the end"):
            pass
        assert self._process.wait(10) == 0


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """The root of a copy of the guest, mounted in `folder`, for its programs to be run in."""
    copy, at = folder / "copy.raw", folder / "root"
    at.mkdir()
    guest = bootable()
    run(["cp", "--sparse=always", guest.disk, copy])
    run(["mount", "-o", f"loop,offset={guest.root_offset}", copy, at])
    try:
        yield at
    finally:
        run(["umount", at])
        copy.unlink()


def inside(root: Path, *words: str, input: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run a program of a mounted guest where it sees no process or network of this machine."""
    unshared = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc"]
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
    }  # fmt: skip
    done = subprocess.run(
        [*unshared, "--root", root, *words], input=input, capture_output=True, env=environment
    )
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(words, done.returncode, out, err)


@contextlib.contextmanager
def machine(
    disk: Path, log: Path, *, network: Sequence[str] = (), without: Sequence[str] = ()
) -> Iterator[Console]:
    """Boot a raw disk, under emulation so that it is the same everywhere; it ends with the block.

    `network` are options of QEMU, `without` units that are not started; `log` gets the console.
    """
    guest = bootable()
    words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-machine", "pc,accel=tcg", "-cpu", "max,la57=off,svm=off,aes=off"]
    words += ["-smp", "2", "-m", "1024"]
    words += ["-serial", "stdio", "-kernel", str(guest.kernel), "-initrd", str(guest.initrd)]
    masks = " ".join(f"systemd.mask={unit}" for unit in (*_WITHOUT, *without))
    told = f"root=UUID={UUID} console=ttyS0 systemd.show_status=0 {_FASTER} {masks}"
    words += ["-append", told]
    words += ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"]
    words += ["-device", "virtio-rng-pci", *network]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr
    )
    try:
        yield Console(process, log)
    finally:
        process.kill()
        process.wait()
