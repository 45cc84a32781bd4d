"""What operating system a guest has, from its files alone: the answers of libguestfs's inspection.

Where an unusual guest or another version of libguestfs could give another answer than the one here,
`Undetermined` is raised.

Facts: guestfs(3), "INSPECTION", and the behaviour of libguestfs 1.48; elf(5).
"""

from __future__ import annotations

import re
import struct

from imgtool.formats.files import SMALL_FILE, Files, Undetermined, small, text
from imgtool.formats.release_files import read_release
from imgtool.guest.model import OperatingSystem

__all__ = ["Files", "Undetermined", "identify"]

AUGEAS_LIMIT = 100_000
MOST_KERNELS = 10_000

_FORMATS = {
    "apk": ("alpinelinux",),
    "deb": ("debian", "kalilinux", "kylin", "linuxmint", "ubuntu"),
    "ebuild": ("gentoo",),
    "pacman": ("archlinux",),
    "pisi": ("pardus",),
    "rpm": (
        *("altlinux", "centos", "fedora", "mageia", "meego", "neokylin", "openmandriva"),
        *("opensuse", "oraclelinux", "redhat-based", "rhel", "rocky", "scientificlinux"),
        *("sles", "suse-based"),
    ),
    "xbps": ("voidlinux",),
}
_MANAGEMENT = {
    "apk": ("alpinelinux",),
    "apt": ("altlinux", "debian", "kalilinux", "kylin", "linuxmint", "ubuntu"),
    "dnf": ("neokylin", "openmandriva"),
    "pacman": ("archlinux",),
    "pisi": ("pardus",),
    "portage": ("gentoo",),
    "urpmi": ("mageia",),
    "xbps": ("voidlinux",),
    "yum": ("meego",),
    "zypper": ("opensuse", "sles", "suse-based"),
}
_RED_HATS = frozenset(("centos", "oraclelinux", "redhat-based", "rhel", "rocky", "scientificlinux"))


# e_machine of an ELF file: libguestfs's name of the architecture; 64 is the class.
_MACHINES = {
    3: "i386",
    20: "ppc",
    21: "ppc64",
    22: "s390",
    40: "arm",
    43: "sparc64",
    50: "ia64",
    62: "x86_64",
    183: "aarch64",
    243: "riscv",
}
# What libguestfs would look into, or has another name for: programs of DOS, cpio, compressed.
_OTHER_PROGRAMS = (b"MZ", b"0707", b"\xc7\x71", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5")


def _elf_architecture(header: bytes) -> str | None:
    """The architecture of a program from its first bytes; None for what is not a program."""
    if not header.startswith(b"\x7fELF"):
        if header.startswith(_OTHER_PROGRAMS):
            raise Undetermined("a shell that is neither an ELF program nor a script")
        return None
    if len(header) < 20 or header[4] not in (1, 2) or header[5] not in (1, 2):
        raise Undetermined("a shell with a damaged ELF header")
    big = header[5] == 2
    kind, machine = struct.unpack_from(">HH" if big else "<HH", header, 16)
    if kind not in (1, 2, 3):
        raise Undetermined("a shell that is an ELF file of another kind")
    name = _MACHINES.get(machine)
    if name is None:
        raise Undetermined(f"ELF machine {machine}")
    if name == "ppc64":
        return "ppc64" if big else "ppc64le"
    if name == "s390":
        return "s390" if header[4] == 1 else "s390x"
    if name == "riscv":
        return f"riscv{header[4] * 32}"
    return name


def _architecture(files: Files) -> str | None:
    for path in ("/bin/bash", "/bin/ls", "/bin/echo", "/bin/rm", "/bin/sh"):
        header = files.file_header(path, 20)
        found = _elf_architecture(header) if header is not None else None
        if found is not None:
            return found
    return None


def _network_hostname(content: bytes) -> str | None:
    if len(content) > AUGEAS_LIMIT:
        raise Undetermined("/etc/sysconfig/network is long")
    found: list[bytes] = []
    for line in content.split(b"\n"):
        if not line.strip() or line.startswith(b"#"):
            continue
        plain = re.fullmatch(rb"([A-Za-z_][A-Za-z0-9_]*)=([A-Za-z0-9._:/-]+)", line)
        if plain is None:
            raise Undetermined("/etc/sysconfig/network is more than plain assignments")
        if plain[1] == b"HOSTNAME":
            found.append(plain[2])
    if len(found) > 1:
        raise Undetermined("/etc/sysconfig/network names the host twice")
    return text(found[0]) if found else None


def _hostname(files: Files) -> str | None:
    for path in ("/etc/HOSTNAME", "/etc/hostname"):
        content = small(files, path)
        if not content or len(content) > SMALL_FILE:
            continue
        first = content.partition(b"\n")[0]
        # Versions of libguestfs differ in whether they go on to the next line.
        if not first or first.startswith(b"#"):
            raise Undetermined(f"{path} begins with a comment or an empty line")
        return text(first)
    content = small(files, "/etc/sysconfig/network")
    return None if content is None else _network_hostname(content)


def _management(files: Files, distribution: str | None, major: int) -> str | None:
    if distribution == "fedora":
        if major >= 22 and files.file_header("/usr/bin/dnf", 1) is not None:
            return "dnf"
        return "yum" if major >= 1 else None
    if distribution in _RED_HATS:
        for least, name in ((8, "dnf"), (5, "yum"), (2, "up2date")):
            if major >= least:
                return name
        return None
    return _holding(_MANAGEMENT, distribution)


def _holding(table: dict[str, tuple[str, ...]], distribution: str | None) -> str | None:
    return next((name for name, members in table.items() if distribution in members), None)


# Where one of these is, libguestfs sees a /boot, a BSD, a Hurd or a Minix before a Linux.
_NOT_LINUX = (
    *("/grub/menu.lst", "/grub/grub.conf", "/grub2/grub.cfg"),
    *("/etc/freebsd-update.conf", "/netbsd", "/bsd", "/hurd/console", "/service/vm"),
)
# libguestfs looks at the root filesystem alone, and merges what it thinks to be a /usr.
_LOOKED_INTO = ("/bin", "/etc", "/usr")
_APART = ("/usr/local", "/usr/src")


def _check_layout(files: Files, mountpoints: dict[str, str]) -> None:
    for path in mountpoints:
        # A whole /usr is seen where it belongs, whatever libguestfs makes of it.
        if path in ("/", "/usr") or path.startswith(tuple(f"{apart}/" for apart in _APART)):
            continue
        first = "/" + path.strip("/").partition("/")[0]
        if first in _LOOKED_INTO and path not in _APART:
            raise Undetermined(f"{path} is a filesystem of its own")
        if all(files.is_dir(f"{path}/{name}") for name in ("etc", "bin", "share", "local")):
            raise Undetermined(f"{path} looks like a /usr")


def _check_linux(files: Files) -> None:
    if files.is_dir("/Windows/System32"):
        raise Undetermined("Windows")
    for path in _NOT_LINUX:
        if files.file_header(path, 1) is not None:
            raise Undetermined(f"an operating system with {path}")
    if not (files.is_dir("/etc") and files.is_dir("/bin")):
        raise Undetermined("no /etc and /bin")
    if all(files.file_header(path, 1) is None for path in ("/etc/fstab", "/etc/hosts")):
        raise Undetermined("neither /etc/fstab nor /etc/hosts")


def _kernels(files: Files) -> tuple[str, ...]:
    if not files.is_dir("/lib/modules"):
        return ()
    names = files.names("/lib/modules")
    if len(names) > MOST_KERNELS:
        raise Undetermined("/lib/modules has very many names")
    return tuple(sorted(text(name) for name in names))


def _known(value: str | None) -> str | None:
    return None if value in ("", "unknown") else value


def identify(files: Files, root: str, mountpoints: dict[str, str]) -> OperatingSystem:
    """The operating system on the filesystem `root`, its `applications` not listed.

    Raises `Undetermined` where libguestfs might answer otherwise: Windows and the BSDs,
    distributions that were not tried, a /usr of its own, odd release files.
    """
    _check_layout(files, mountpoints)
    _check_linux(files)
    release = read_release(files)
    if release.distribution == "coreos":
        raise Undetermined("CoreOS, whose parts are on several filesystems")
    major = (release.version or (0, 0))[0]
    return OperatingSystem(
        root=root,
        type="linux",
        distribution=release.distribution,
        version=release.spelling,
        product_name=None if release.product is None else _known(text(release.product)),
        architecture=_architecture(files),
        hostname=_known(_hostname(files)),
        package_format=_holding(_FORMATS, release.distribution),
        package_management=_management(files, release.distribution, major),
        mountpoints={place: mountpoints[place] for place in sorted(mountpoints)},
        kernels=_kernels(files),
    )
