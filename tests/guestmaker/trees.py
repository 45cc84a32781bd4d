"""The files of operating systems: a small hand-made root, and a real Debian."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from imgtool.host.process import run
from tests.guestmaker import facts
from tests.guestmaker.disks import write_files

SUITE = "bookworm"
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "ifupdown",
    "iproute2",
    "netbase",
    "procps",
    "openssh-client",
)
_PROXIES = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}

_PASSWD = "root:x:0:0:root:/root:/bin/bash\nalice:x:1000:1000:Alice:/home/alice:/bin/bash\n"
_GROUP = "root:x:0:\nalice:x:1000:\n"
_SHADOW = "root:*:19800:0:99999:7:::\nalice:!:19800:0:99999:7:::\n"

_OS_RELEASE = {
    "debian": 'PRETTY_NAME="Debian GNU/Linux {0} (bookworm)"\nNAME="Debian GNU/Linux"\n'
    'VERSION_ID="{0}"\nID=debian\n',
    "fedora": 'NAME="Fedora Linux"\nVERSION_ID={0}\nID=fedora\n'
    'PRETTY_NAME="Fedora Linux {0} (Server Edition)"\n',
}


def elf() -> bytes:
    """An ELF header and a program that exits: enough to tell the architecture, x86_64."""
    code = bytes.fromhex("b83c00000031ff0f05")  # exit(0)
    entry = 0x400000 + 64 + 56
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    size = 64 + 56 + len(code)
    program = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, size, size, 4096)
    return header + program + code


def fill_home(home: Path) -> None:
    """/home/alice, and what is in it, hers."""
    write_files(
        home,
        {
            "alice/letter.txt": facts.LETTER,
            "alice/.profile": "PATH=$HOME/bin:$PATH\n",
            "alice/documents/notes.bin": facts.NOTES,
            "alice/documents/empty": b"",
        },
    )
    (home / "alice/link-to-letter").symlink_to("letter.txt")
    for path in [home / "alice", *(home / "alice").rglob("*")]:
        os.chown(path, *facts.ALICE, follow_symlinks=False)
    (home / "alice").chmod(0o750)
    when = time.mktime((2024, 2, 29, 12, 0, 0, 0, 0, 0)) - time.timezone
    os.utime(home / "alice/letter.txt", (when, when))


def _fill_kernel(tree: Path) -> None:
    modules = f"usr/lib/modules/{facts.KERNEL}"
    write_files(
        tree,
        {
            f"boot/vmlinuz-{facts.KERNEL}": b"not a kernel\n" * 100,
            f"boot/initrd.img-{facts.KERNEL}": b"not an initrd\n" * 100,
            f"boot/config-{facts.KERNEL}": "CONFIG_EXT4_FS=y\n",
            f"{modules}/modules.dep": "kernel/drivers/net/dummy.ko:\n",
            f"{modules}/kernel/drivers/net/dummy.ko": elf(),
        },
    )


def small_root(
    tree: Path,
    fstab: str,
    *,
    distribution: str = "debian",
    version: str = "12",
    hostname: str = facts.HOSTNAME,
    files: Mapping[str, bytes | str] | None = None,
) -> Path:
    """A root of some twenty files that is recognised as an operating system."""
    tree.mkdir()
    for folder in ("usr/bin", "usr/lib", "usr/sbin", "dev", "proc", "sys", "run", "tmp", "var/log"):
        (tree / folder).mkdir(parents=True)
    for link in ("bin", "lib", "sbin"):
        (tree / link).symlink_to(f"usr/{link}")
    release = _OS_RELEASE[distribution].format(version)
    write_files(
        tree,
        {
            "etc/hostname": f"{hostname}\n",
            "etc/fstab": fstab,
            "etc/passwd": _PASSWD,
            "etc/group": _GROUP,
            "etc/shadow": _SHADOW,
            "usr/lib/os-release": release,
            "usr/bin/bash": elf(),
            "usr/bin/ls": elf(),
            "root/.bashrc": "",
            **(files or {}),
        },
    )
    (tree / "etc/os-release").symlink_to("../usr/lib/os-release")
    if distribution == "debian":
        write_files(tree, {"etc/debian_version": f"{version}.0\n", "var/lib/dpkg/status": ""})
    else:
        write_files(tree, {"etc/fedora-release": f"Fedora release {version} (Forty)\n"})
    (tree / "usr/bin/sh").symlink_to("bash")
    for program in ("bash", "ls"):
        (tree / "usr/bin" / program).chmod(0o755)
    (tree / "etc/shadow").chmod(0o640)
    (tree / "tmp").chmod(0o1777)
    _fill_kernel(tree)
    fill_home(tree / "home")
    return tree


def _mirrors() -> list[Path]:
    """The machine's own package sources where they are of the same suite."""
    folder = Path("/etc/apt")
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*.sources"))]
    return [file for file in files if file.exists() and SUITE in file.read_text()]


def debian_archive(cache: Path) -> Path:
    """A tar of a real Debian 12, kept in `cache` under a name that says how it was made."""
    words = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE]
    key = hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
    archive = cache / f"debian-{key}.tar"
    if not archive.exists():
        draft = cache / f"debian-{key}.draft.tar"
        run([*words, draft, *_mirrors()], env=_PROXIES)
        draft.replace(archive)
    os.utime(archive)
    return archive


def debian_root(tree: Path, archive: Path, fstab: str) -> Path:
    """A real Debian 12 with alice in it, 9,500 files in /usr."""
    tree.mkdir()
    run(["tar", "-C", tree, "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xpf", archive])
    for name, line in (
        ("passwd", "alice:x:1000:1000:Alice:/home/alice:/bin/bash"),
        ("group", "alice:x:1000:"),
        ("shadow", "alice:!:19800:0:99999:7:::"),
    ):
        with (tree / "etc" / name).open("a") as file:
            file.write(line + "\n")
    write_files(tree, {"etc/hostname": f"{facts.HOSTNAME}\n", "etc/fstab": fstab})
    _fill_kernel(tree)
    fill_home(tree / "home")
    return tree
