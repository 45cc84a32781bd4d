"""What the release files under /etc say of a distribution, as libguestfs reads them.

A fixed list of files is asked in order. Each may fill in the distribution, the version and the
product name; the first that is satisfied ends the search, and what an unsatisfied one has filled in
stays. A distribution whose name is not in the lists here is `Undetermined`: a younger libguestfs
may know it.

Facts: the behaviour of libguestfs 1.48; os-release(5).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from imgtool.formats.files import SMALL_FILE, Files, Undetermined, small, text

# os-release's ID: libguestfs's name of the distribution.
_OS_RELEASE_IDS = {
    "alpine": "alpinelinux",
    "altlinux": "altlinux",
    "arch": "archlinux",
    "centos": "centos",
    "coreos": "coreos",
    "debian": "debian",
    "fedora": "fedora",
    "frugalware": "frugalware",
    "gentoo": "gentoo",
    "kali": "kalilinux",
    "kylin": "kylin",
    "mageia": "mageia",
    "neokylin": "neokylin",
    "openmandriva": "openmandriva",
    "opensuse": "opensuse",
    "pardus": "pardus",
    "pld": "pldlinux",
    "rhel": "rhel",
    "rocky": "rocky",
    "sled": "sles",
    "sles": "sles",
    "ubuntu": "ubuntu",
    "void": "voidlinux",
}
# These say nothing to libguestfs, which goes on to the release files.
_IDS_PASSED_OVER = frozenset(("almalinux", "buildroot", "cirros", "linuxmint", "ol", "scientific"))
_LSB_IDS = {
    "CoreOS": "coreos",
    "LinuxMint": "linuxmint",
    "Mageia": "mageia",
    "Ubuntu": "ubuntu",
}
_LSB_IDS_PASSED_OVER = frozenset(("", "Arch", "Debian", "Fedora", "Gentoo", "Kali", "openSUSE"))
_MAJOR_ONLY = frozenset(("centos", "debian", "rocky"))
_WRITTEN = re.compile(rb"""(?:VERSION_ID=|DISTRIB_RELEASE=)?["']?([0-9]{1,9})\.([0-9]{1,9})""")
_ROLLING = frozenset(("archlinux", "gentoo", "voidlinux"))


class Release:
    """What the release files have said so far; the product name is as in the file."""

    def __init__(self) -> None:
        self.distribution: str | None = None
        self.product: bytes | None = None
        self.version: tuple[int, int] | None = None
        self._minor = "0"

    def version_in(self, text: bytes) -> None:
        found = re.search(rb"([0-9]+)\.([0-9]+)", text) or re.search(rb"([0-9]+)", text)
        if found is not None:
            self.version_of(*found.groups())

    def version_of(self, major: bytes, minor: bytes | None = None) -> None:
        self.version = (_number(major), _number(minor or b"0"))
        self._minor = text(minor or b"0")

    @property
    def spelling(self) -> str | None:
        """The version as it is written there: 24.04 is not 24.4."""
        if self.version is None or self.version == (0, 0):
            return None
        return f"{self.version[0]}.{self._minor}"


_Test = Callable[[Files, bytes, Release], bool]


def _number(digits: bytes) -> int:
    if len(digits) > 9:
        raise Undetermined("a version number of more than nine digits")
    return int(digits)


def _fields(content: bytes) -> list[tuple[bytes, bytes]]:
    lines = (line for line in content.split(b"\n") if line and not line.startswith(b"#"))
    return [(key, value) for key, _, value in (line.partition(b"=") for line in lines)]


def _plain_unquoted(value: bytes) -> bytes:
    if len(value) >= 2 and value[:1] in (b'"', b"'") and value[:1] == value[-1:]:
        return value[1:-1]
    return value


def _shell_unquoted(value: bytes) -> bytes:
    if len(value) >= 2 and value[:1] == value[-1:] == b'"':
        return re.sub(rb'\\([$`"\\])', rb"\1", value[1:-1])
    return _plain_unquoted(value)


def _os_release(_files: Files, content: bytes, release: Release) -> bool:
    if len(content) > SMALL_FILE:
        return False
    for key, quoted in _fields(content):
        value = _shell_unquoted(quoted)
        if key == b"ID":
            name = text(value)
            if name in _OS_RELEASE_IDS:
                release.distribution = _OS_RELEASE_IDS[name]
            elif name.startswith("opensuse-"):
                release.distribution = "opensuse"
            elif name not in _IDS_PASSED_OVER:
                raise Undetermined(f"a distribution that calls itself {name[:40]!r}")
        elif key == b"PRETTY_NAME":
            release.product = value
        elif key == b"VERSION_ID":
            neokylin = re.search(rb"^V([0-9]+)Update([0-9]+)$", value)
            if neokylin is not None:
                release.version_of(*neokylin.groups())
            else:
                release.version_in(value)
    if release.distribution is None or release.product is None:
        return False
    if release.version is None:
        if release.distribution not in _ROLLING:
            return False
        release.version = (0, 0)
    # These name the major version alone there, and the whole one in a file of their own.
    return not (release.distribution in _MAJOR_ONLY and release.version[1] == 0)


def _lsb_release(_files: Files, content: bytes, release: Release) -> bool:
    satisfied = False
    if len(content) > SMALL_FILE:
        return False
    for key, quoted in _fields(content):
        value = _plain_unquoted(quoted)
        if key == b"DISTRIB_ID":
            name = text(value)
            if name in _LSB_IDS:
                release.distribution = _LSB_IDS[name]
                satisfied = True
            elif name not in _LSB_IDS_PASSED_OVER:
                raise Undetermined(f"a distribution that calls itself {name[:40]!r}")
        elif key == b"DISTRIB_RELEASE":
            release.version_in(value)
        elif key == b"DISTRIB_DESCRIPTION":
            release.product = value
            satisfied = True
    return satisfied


def _name_test(distribution: str, pattern: bytes | None = None) -> _Test:
    def test(_files: Files, content: bytes, release: Release) -> bool:
        first = b"" if len(content) > SMALL_FILE else content.partition(b"\n")[0]
        if not first:
            return False
        release.product = first
        release.distribution = distribution
        if pattern is None:
            release.version_in(first)
            return True
        found = re.search(pattern, first)
        if found is None:
            return False
        release.version_of(*found.groups())
        return True

    return test


def _just(distribution: str) -> _Test:
    def test(_files: Files, _content: bytes, release: Release) -> bool:
        release.distribution = distribution
        return True

    return test


def _suse(_files: Files, content: bytes, release: Release) -> bool:
    if len(content) > SMALL_FILE:
        return False
    lines = [*content.split(b"\n"), b"", b""]
    release.product = lines[0]
    if re.match(rb"SUSE (Linux|LINUX) Enterprise |Novell Linux Desktop ", lines[0]):
        major = re.match(rb"VERSION = ([0-9]+)", lines[1])
        minor = re.match(rb"PATCHLEVEL = ([0-9]+)", lines[2])
        release.distribution = "sles"
        release.version = None
        if major is not None:
            release.version_of(major[1], None if minor is None else minor[1])
    elif re.match(rb"(openSUSE|SuSE Linux|SUSE LINUX) ", lines[0]):
        release.version_in(lines[1])
        release.distribution = "opensuse"
    return True


def _buildroot(files: Files, content: bytes, release: Release) -> bool:
    cirros = files.file_header("/usr/share/cirros/logo", 1) is not None
    return _name_test("cirros" if cirros else "buildroot")(files, content, release)


_UPDATES = rb".*release ([0-9]+).*Update ([0-9]+)"
_MINOR = rb".*release ([0-9]+)\.([0-9]+)"
_MAJOR = rb".*release ([0-9]+)"


def _releases(path: str, distribution: str, name: bytes, *forms: bytes) -> list[tuple[str, _Test]]:
    return [(path, _name_test(distribution, name + form)) for form in forms]


_REDHAT = "/etc/redhat-release"
_TESTS: tuple[tuple[str, _Test], ...] = (
    ("/etc/os-release", _os_release),
    ("/etc/lsb-release", _lsb_release),
    (
        "/etc/openmandriva-release",
        _name_test("openmandriva", rb"OpenMandriva.*release ([0-9]+)\.([0-9]+)\.?(?:[0-9]+)? .*"),
    ),
    *_releases("/etc/oracle-release", "oraclelinux", b"Oracle Linux", _UPDATES, _MINOR, _MAJOR),
    *_releases("/etc/centos-release", "centos", b"CentOS", _UPDATES, _MINOR, _MAJOR),
    *_releases("/etc/rocky-release", "rocky", b"Rocky Linux", _MINOR, _MAJOR),
    ("/etc/altlinux-release", _name_test("altlinux")),
    (_REDHAT, _name_test("fedora", rb"Fedora release ([0-9]+)")),
    *_releases(_REDHAT, "rhel", b"Red Hat", _UPDATES, _MINOR, _MAJOR),
    *_releases(_REDHAT, "centos", b"CentOS", _UPDATES, _MINOR, _MAJOR),
    *_releases(_REDHAT, "rocky", b"Rocky Linux", _MINOR, _MAJOR),
    *_releases(_REDHAT, "scientificlinux", b"Scientific Linux", _UPDATES, _MINOR, _MAJOR),
    (_REDHAT, _name_test("redhat-based")),
    (_REDHAT, _just("redhat-based")),
    ("/etc/debian_version", _name_test("debian")),
    ("/etc/pardus-release", _name_test("pardus")),
    ("/etc/arch-release", _just("archlinux")),
    ("/etc/gentoo-release", _name_test("gentoo")),
    ("/etc/meego-release", _name_test("meego")),
    ("/etc/slackware-version", _name_test("slackware")),
    ("/etc/ttylinux-target", _name_test("ttylinux")),
    ("/etc/SuSE-release", _suse),
    ("/etc/SuSE-release", _just("suse-based")),
    ("/etc/cirros/version", _name_test("cirros")),
    ("/etc/br-version", _buildroot),
    ("/etc/alpine-release", _name_test("alpinelinux")),
    ("/etc/frugalware-release", _name_test("frugalware", rb"Frugalware ([0-9]+)\.([0-9]+)")),
    ("/etc/pld-release", _name_test("pldlinux", rb"([0-9]+)\.([0-9]+) PLD Linux")),
)


def spelling(major: int, minor: int, content: bytes) -> str:
    """A version as it is written in a release file, where that has these numbers: 24.04."""
    for line in content.split(b"\n"):
        found = _WRITTEN.match(line)
        if found is not None and (int(found[1]), int(found[2])) == (major, minor):
            return f"{text(found[1])}.{text(found[2])}"
    return f"{major}.{minor}"


def read_release(files: Files) -> Release:
    """What the release files say together, in libguestfs's order."""
    release = Release()
    read: dict[str, bytes | None] = {}
    for path, test in _TESTS:
        if path not in read:
            read[path] = small(files, path)
        content = read[path]
        if content is not None and test(files, content, release):
            break
    return release
