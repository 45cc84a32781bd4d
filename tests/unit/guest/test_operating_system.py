"""What a guest's files say of its operating system, as libguestfs would say it."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest

from imgtool.formats.release_files import spelling
from imgtool.guest.operating_system import Undetermined, identify
from tests.unit.guest.test_packages import FakeFiles

ROOT = "/dev/sda1"


def elf(machine: int = 62, bits: int = 64, *, big: bool = False, kind: int = 2) -> bytes:
    order = ">" if big else "<"
    identity = b"\x7fELF" + bytes([bits // 32, 2 if big else 1, 1])
    return identity.ljust(16, b"\0") + struct.pack(order + "HHI", kind, machine, 1)


def os_release(**fields: str) -> str:
    return "".join(f'{name}="{value}"\n' for name, value in fields.items())


def ident(name: str, pretty: str, version: str | None = None) -> dict[str, str]:
    version_id = {} if version is None else {"VERSION_ID": version}
    return {"/etc/os-release": os_release(ID=name, PRETTY_NAME=pretty, **version_id)}


def guest(files: Mapping[str, str | bytes], *, fstab: bool = True) -> FakeFiles:
    every: dict[str, str | bytes] = {"/bin/true": "", "/etc/passwd": "", **files}
    if fstab:
        every.setdefault("/etc/fstab", "")
    return FakeFiles({k: v.encode() if isinstance(v, str) else v for k, v in every.items()})


def look(files: Mapping[str, str | bytes]):
    return identify(guest(files), ROOT, {"/": ROOT})


REDHAT = "/etc/redhat-release"
CENTOS7 = "CentOS Linux release 7.9.2009 (Core)"
ROCKY90 = "Rocky Linux release 9.0 (Blue Onyx)"
MINT = (
    "DISTRIB_ID=LinuxMint\nDISTRIB_RELEASE=21.2\n"
    'DISTRIB_CODENAME=victoria\nDISTRIB_DESCRIPTION="Linux Mint 21.2 Victoria"\n'
)

# Files, then distribution, version, product name, package format and management.
RELEASES = {
    "debian": (
        {**ident("debian", "Debian GNU/Linux 12", "12"), "/etc/debian_version": "12.5\n"},
        ("debian", "12.5", "12.5", "deb", "apt"),
    ),
    "debian without debian_version": (
        ident("debian", "Debian GNU/Linux 12 (bookworm)", "12"),
        ("debian", "12.0", "Debian GNU/Linux 12 (bookworm)", "deb", "apt"),
    ),
    "debian unstable": (
        {**ident("debian", "Debian trixie/sid"), "/etc/debian_version": "trixie/sid\n"},
        ("debian", None, "trixie/sid", "deb", "apt"),
    ),
    "debian with lsb-release": (
        {
            **ident("debian", "Debian GNU/Linux 11", "11"),
            "/etc/lsb-release": 'DISTRIB_ID=Debian\nDISTRIB_DESCRIPTION="Debian one"\n',
            "/etc/debian_version": "11.6\n",
        },
        ("debian", "11.0", "Debian one", "deb", "apt"),
    ),
    "ubuntu": (
        {**ident("ubuntu", "Ubuntu 22.04.3 LTS", "22.04"), "/etc/debian_version": "b/sid\n"},
        ("ubuntu", "22.04", "Ubuntu 22.04.3 LTS", "deb", "apt"),
    ),
    "linuxmint": (
        {**ident("linuxmint", "Linux Mint 21.2", "21.2"), "/etc/lsb-release": MINT},
        ("linuxmint", "21.2", "Linux Mint 21.2 Victoria", "deb", "apt"),
    ),
    "kali": (
        ident("kali", "Kali GNU/Linux Rolling", "2023.4"),
        ("kalilinux", "2023.4", "Kali GNU/Linux Rolling", "deb", "apt"),
    ),
    "fedora": (
        {**ident("fedora", "Fedora Linux 40 (Server)", "40"), "/usr/bin/dnf": "x"},
        ("fedora", "40.0", "Fedora Linux 40 (Server)", "rpm", "dnf"),
    ),
    "fedora without dnf": (
        ident("fedora", "Fedora Linux 40 (Server)", "40"),
        ("fedora", "40.0", "Fedora Linux 40 (Server)", "rpm", "yum"),
    ),
    "fedora without os-release": (
        {REDHAT: "Fedora release 13 (Goddard)\n"},
        ("fedora", "13.0", "Fedora release 13 (Goddard)", "rpm", "yum"),
    ),
    "rhel 10": (
        ident("rhel", "Red Hat Enterprise Linux 10.0 (Coughlan)", "10.0"),
        ("rhel", "10.0", "Red Hat Enterprise Linux 10.0 (Coughlan)", "rpm", "dnf"),
    ),
    "rhel 6": (
        {REDHAT: "Red Hat Enterprise Linux Server release 6.9 (Santiago)\n"},
        ("rhel", "6.9", "Red Hat Enterprise Linux Server release 6.9 (Santiago)", "rpm", "yum"),
    ),
    "rhel 4": (
        {REDHAT: "Red Hat Enterprise Linux AS release 4 (Nahant Update 8)\n"},
        (
            *("rhel", "4.8", "Red Hat Enterprise Linux AS release 4 (Nahant Update 8)"),
            *("rpm", "up2date"),
        ),
    ),
    "centos": (
        {**ident("centos", "CentOS Linux 7 (Core)", "7"), "/etc/centos-release": CENTOS7 + "\n"},
        ("centos", "7.9", CENTOS7, "rpm", "yum"),
    ),
    "centos stream": (
        {
            **ident("centos", "CentOS Stream 9", "9"),
            "/etc/centos-release": "CentOS Stream release 9\n",
        },
        ("centos", "9.0", "CentOS Stream release 9", "rpm", "dnf"),
    ),
    "rocky": (
        ident("rocky", "Rocky Linux 9.3 (Blue Onyx)", "9.3"),
        ("rocky", "9.3", "Rocky Linux 9.3 (Blue Onyx)", "rpm", "dnf"),
    ),
    "rocky 9.0": (
        {**ident("rocky", "Rocky Linux 9", "9.0"), "/etc/rocky-release": ROCKY90 + "\n"},
        ("rocky", "9.0", ROCKY90, "rpm", "dnf"),
    ),
    "almalinux": (
        {**ident("almalinux", "AlmaLinux 9.3", "9.3"), REDHAT: "AlmaLinux release 9.3 (S)\n"},
        ("redhat-based", "9.3", "AlmaLinux release 9.3 (S)", "rpm", "dnf"),
    ),
    "oraclelinux": (
        {
            **ident("ol", "Oracle Linux Server 9.3", "9.3"),
            "/etc/oracle-release": "Oracle Linux Server release 9.3\n",
            REDHAT: "Red Hat Enterprise Linux release 9.3 (Plow)\n",
        },
        ("oraclelinux", "9.3", "Oracle Linux Server release 9.3", "rpm", "dnf"),
    ),
    "scientific": (
        {
            **ident("scientific", "Scientific Linux 7.9 (Nitrogen)", "7.9"),
            REDHAT: "Scientific Linux release 7.9 (Nitrogen)\n",
        },
        ("scientificlinux", "7.9", "Scientific Linux release 7.9 (Nitrogen)", "rpm", "yum"),
    ),
    "an empty redhat-release": ({REDHAT: ""}, ("redhat-based", None, None, "rpm", None)),
    "opensuse leap": (
        ident("opensuse-leap", "openSUSE Leap 15.5", "15.5"),
        ("opensuse", "15.5", "openSUSE Leap 15.5", "rpm", "zypper"),
    ),
    "sles": (
        ident("sles", "SUSE Linux Enterprise Server 15 SP5", "15.5"),
        ("sles", "15.5", "SUSE Linux Enterprise Server 15 SP5", "rpm", "zypper"),
    ),
    "sles 11": (
        {"/etc/SuSE-release": "SUSE Linux Enterprise Server 11\nVERSION = 11\nPATCHLEVEL = 4\n"},
        ("sles", "11.4", "SUSE Linux Enterprise Server 11", "rpm", "zypper"),
    ),
    "a SuSE-release too long to read": (
        {"/etc/SuSE-release": "openSUSE 13.2\n" + "x" * (3 << 20)},
        ("suse-based", None, None, "rpm", "zypper"),
    ),
    "alpine": (
        ident("alpine", "Alpine Linux v3.19", "3.19.1"),
        ("alpinelinux", "3.19", "Alpine Linux v3.19", "apk", "apk"),
    ),
    "arch": (
        {**ident("arch", "Arch Linux"), "/etc/arch-release": ""},
        ("archlinux", None, "Arch Linux", "pacman", "pacman"),
    ),
    "gentoo": (
        ident("gentoo", "Gentoo Linux", "2.14"),
        ("gentoo", "2.14", "Gentoo Linux", "ebuild", "portage"),
    ),
    "void": (ident("void", "Void Linux"), ("voidlinux", None, "Void Linux", "xbps", "xbps")),
    "altlinux": (
        ident("altlinux", "ALT Workstation 10.2", "10.2"),
        ("altlinux", "10.2", "ALT Workstation 10.2", "rpm", "apt"),
    ),
    "cirros": (
        {**ident("cirros", "CirrOS 0.6.2", "0.6.2"), "/etc/cirros/version": "0.6.2\n"},
        ("cirros", "0.6", "0.6.2", None, None),
    ),
    "old cirros": (
        {"/etc/br-version": "2012.05\n", "/usr/share/cirros/logo": "x"},
        ("cirros", "2012.05", "2012.05", None, None),
    ),
    "old buildroot": (
        {"/etc/br-version": "2012.05-gabc\n"},
        ("buildroot", "2012.05", "2012.05-gabc", None, None),
    ),
    "quoted": (
        {
            "/etc/os-release": '#c\nID=\'fedora\'\nPRETTY_NAME="a \\"b\\" \\$c \\x"\n'
            "VERSION_ID=39\nFOO=bar=baz\n"
        },
        ("fedora", "39.0", 'a "b" $c \\x', "rpm", "yum"),
    ),
    "nothing said": ({"/etc/hostname": "nobody\n"}, (None, None, None, None, None)),
}


@pytest.mark.parametrize("name", RELEASES)
def test_the_distribution_is_what_libguestfs_says_it_is(name):
    files, expected = RELEASES[name]
    found = look(files)
    assert found.type == "linux"
    assert (
        found.distribution,
        found.version,
        found.product_name,
        found.package_format,
        found.package_management,
    ) == expected


@pytest.mark.parametrize(
    ("numbers", "content", "written"),
    [
        ((24, 4), b'ID=ubuntu\nVERSION_ID="24.04"\n', "24.04"),
        ((24, 4), b"DISTRIB_RELEASE=24.04\n", "24.04"),
        ((2012, 5), b"2012.05-gabc\n", "2012.05"),
        ((12, 5), b'VERSION_ID="12"\n', "12.5"),
        ((12, 5), b"VERSION_ID=13.05\n", "12.5"),
        ((9, 2), b"", "9.2"),
    ],
)
def test_a_version_is_given_as_it_is_written(
    numbers: tuple[int, int], content: bytes, written: str
):
    assert spelling(*numbers, content) == written


FEDORA = ident("fedora", "Fedora Linux 40", "40")


@pytest.mark.parametrize(
    ("files", "architecture"),
    [
        ({"/bin/bash": elf(62)}, "x86_64"),
        ({"/bin/bash": elf(62, kind=3)}, "x86_64"),
        ({"/bin/ls": elf(183)}, "aarch64"),
        ({"/bin/sh": elf(3, 32)}, "i386"),
        ({"/bin/bash": b"#!/bin/sh\n", "/bin/ls": elf(40, 32)}, "arm"),
        ({"/bin/bash": elf(21)}, "ppc64le"),
        ({"/bin/bash": elf(21, big=True)}, "ppc64"),
        ({"/bin/bash": elf(22, big=True)}, "s390x"),
        ({"/bin/bash": elf(243)}, "riscv64"),
        ({"/bin/bash": elf(20, 32, big=True)}, "ppc"),
        ({}, None),
    ],
)
def test_the_architecture_is_that_of_the_first_program(files, architecture):
    assert look({**FEDORA, **files}).architecture == architecture


@pytest.mark.parametrize(
    ("files", "hostname"),
    [
        ({"/etc/hostname": "a\n"}, "a"),
        ({"/etc/hostname": "a"}, "a"),
        ({"/etc/HOSTNAME": "upper\n", "/etc/hostname": "lower\n"}, "upper"),
        ({"/etc/hostname": " spaced \r\n"}, " spaced \r"),
        ({"/etc/hostname": "", "/etc/sysconfig/network": "A=yes\nHOSTNAME=b.c\n"}, "b.c"),
        ({"/etc/sysconfig/network": "# none\nNETWORKING=yes\n"}, None),
        ({"/etc/hostname": b"\xff\n"}, "�"),
        ({}, None),
    ],
)
def test_the_hostname_is_in_the_first_file_that_has_one(files, hostname):
    assert look({**FEDORA, **files}).hostname == hostname


def test_kernels_are_sorted_and_mountpoints_passed_on():
    files = {
        **FEDORA,
        "/lib/modules/6.2/modules.dep": "",
        "/lib/modules/6.10/modules.dep": "",
    }
    layout = {"/home": "/dev/sda3", "/": ROOT, "/boot": "/dev/sda2"}
    found = identify(guest(files), ROOT, layout)
    assert found.kernels == ("6.10", "6.2")
    assert list(found.mountpoints.items()) == sorted(layout.items())
    assert found.root == ROOT
    assert found.applications is None


@pytest.mark.parametrize(
    "files",
    [
        ident("nixos", "NixOS 23.11", "23.11"),
        ident("coreos", "Container Linux by CoreOS", "2512.3.0"),
        {"/etc/lsb-release": "DISTRIB_ID=Surprise\n"},
        {**FEDORA, "/Windows/System32/cmd.exe": ""},
        {**FEDORA, "/bsd": ""},
        {**FEDORA, "/grub/menu.lst": ""},
        {**FEDORA, "/bin/bash": elf(8)},
        {**FEDORA, "/bin/bash": elf(62, kind=4)},
        {**FEDORA, "/bin/bash": elf()[:12]},
        {**FEDORA, "/bin/bash": b"MZ" + bytes(60)},
        {**FEDORA, "/etc/hostname": "# a comment\nname\n"},
        {**FEDORA, "/etc/hostname": "na\0me\n"},
        {**FEDORA, "/etc/sysconfig/network": "HOSTNAME=$(hostname)\n"},
        ident("fedora", "Fedora", "9" * 50),
    ],
)
def test_what_libguestfs_might_see_otherwise_is_left_to_it(files):
    with pytest.raises(Undetermined):
        look(files)


@pytest.mark.parametrize("mountpoint", ["/usr/share", "/etc", "/bin", "/usr/lib/modules"])
def test_mount_below_what_is_looked_into_is_undetermined(mountpoint):
    with pytest.raises(Undetermined):
        identify(guest(FEDORA), ROOT, {"/": ROOT, mountpoint: "/dev/sda2"})


def test_a_root_without_fstab_and_hosts_is_left_to_libguestfs():
    with pytest.raises(Undetermined):
        identify(guest(FEDORA, fstab=False), ROOT, {"/": ROOT})
