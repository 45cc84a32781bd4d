"""Layout discovery: which filesystem of the guest is mounted where.

A pure function over "list the filesystems, look into one": the same for every engine. It looks for
operating systems (os-release, fstab, Windows/System32) and follows the root's fstab. What it does
not decide by itself it says: several operating systems, or several filesystems and none of them an
operating system, are errors that list the choices as the user would type them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from imgtool.errors import (
    EngineError,
    NotInGuestError,
    join_names,
    shorten,
)
from imgtool.formats.foreign_tables import SUFFIX, TITLES
from imgtool.formats.fstab import FstabEntry, named_devices, parse_fstab
from imgtool.formats.numbers import whole_number
from imgtool.guest.blocks import LOCKED, UNKNOWN, Block, locked_devices
from imgtool.guest.device_names import DeviceNames, parse_crypttab
from imgtool.guest.model import Device, Layout, Mount, Unshown
from imgtool.text import typed

LAYOUT_FILE_LIMIT = 256 * 1024

# What holds other things rather than files: these, and parts of firmware RAID and the like.
_CONTAINERS = frozenset(("swap", "swsuspend", "ldm")) | LOCKED
_PARTS = ("_member", SUFFIX)
_MOST_LINES = 10
_MOST_SAID = 200  # characters of a name in fstab
_MOST_TYPED = 1000  # characters that are worth being typed
BUILT_IN = frozenset(("ext2", "ext3", "ext4"))
BTRFS_VOLUME = "btrfsvol:"


class NothingMounts(NotInGuestError):
    """There are filesystems, and none of them can be mounted."""


class Locked(NotInGuestError):
    """No operating system is in what can be read, and there is more that is encrypted."""

    def __init__(self, closed: Sequence[str], others: Sequence[str] = ()) -> None:
        said = "what it holds is encrypted, and no key fits"
        hint = f"give the key: --key {closed[0]}:file:FILE, or --key all:key:PASSPHRASE"
        if others:
            said = (
                "no operating system is in what can be read; the rest is encrypted, and no key fits"
            )
            hint += f"; or look at what is not encrypted: -m {others[0]}"
        super().__init__(
            said,
            subject=", ".join(closed[:_MOST_LINES]),
            hint=hint,
        )


class Volume(Protocol):
    """One filesystem, opened to be looked into."""

    def read(self, path: str, limit: int = LAYOUT_FILE_LIMIT) -> bytes | None:
        """The first `limit` bytes of a regular file, links followed; None if there is none."""

    def is_dir(self, path: str) -> bool:
        """Whether the path is a directory, spelled in any case on a case-insensitive filesystem."""


class Volumes(Protocol):
    """What layout discovery needs to know of a guest."""

    def filesystems(self) -> Sequence[Device]:
        """The filesystems, with btrfs subvolumes as `btrfsvol:DEVICE/PATH`."""

    def blocks(self) -> Sequence[Block]:
        """The block devices, with what is in the encrypted ones that a key opens."""

    def look_into(self, source: str) -> AbstractContextManager[Volume]:
        """Open one filesystem; `EngineError` if it cannot be mounted."""

    def subvolume_by_id(self, device: str, number: int) -> str | None:
        """The path of the btrfs subvolume with this id."""


@dataclass(frozen=True)
class Root:
    """A filesystem that is an operating system's root."""

    source: str
    os_type: str
    title: str
    fstab: bytes
    crypttab: bytes = b""


@dataclass(frozen=True)
class Findings:
    """What a look into every filesystem found: roots, and why some could not be mounted."""

    filesystems: tuple[Device, ...]
    roots: tuple[Root, ...]
    failures: dict[str, str]


def there_is(known: Collection[str]) -> str:
    """What to say to who names a filesystem that is not among those that there are."""
    if known:
        return "it has: " + join_names(sorted(known))
    return "it has none that can be read; 'imgtool filesystems --all' shows what it holds"


def holds_files(type: str | None) -> bool:
    """Whether a volume of this type could be mounted, as far as its type tells."""
    return type not in _CONTAINERS and not (type or "").endswith(_PARTS)


def _os_title(os_release: bytes) -> str:
    for line in os_release.decode("utf-8", "replace").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip("\"'")
    return "Linux"


def _look(source: str, volume: Volume) -> Root | None:
    if volume.is_dir("/Windows/System32"):
        return Root(source, "windows", "Windows", b"")
    if not volume.is_dir("/etc"):
        return None
    os_release = volume.read("/etc/os-release") or volume.read("/usr/lib/os-release")
    fstab = volume.read("/etc/fstab")
    if os_release is None and (fstab is None or volume.read("/etc/passwd") is None):
        return None
    mapped = fstab is not None and (b"/dev/mapper/" in fstab or b"/dm-name-" in fstab)
    crypttab = volume.read("/etc/crypttab") if mapped else None
    return Root(source, "linux", _os_title(os_release or b""), fstab or b"", crypttab or b"")


def btrfs_device(source: str, devices: Sequence[Device]) -> str | None:
    """The device of `btrfsvol:DEVICE/SUBVOLUME`; None for anything else."""
    if not source.startswith(BTRFS_VOLUME):
        return None
    rest = source.removeprefix(BTRFS_VOLUME)
    owners = [d.device for d in devices if rest.startswith(d.device + "/")]
    return max(owners, key=len, default=None)


def _subvolume(source: str, device: str) -> str:
    return source.removeprefix(f"{BTRFS_VOLUME}{device}/")


def _names_itself(root: Root, device: str) -> bool:
    entries, _ = parse_fstab(root.fstab)
    own = _subvolume(root.source, device)
    return any(
        entry.mountpoint == "/" and (entry.option("subvol") or "").strip("/") == own
        for entry in entries
    )


def _without_snapshots(roots: list[Root], devices: Sequence[Device]) -> list[Root]:
    """Of several roots on one btrfs, the one that its own fstab names: the rest are snapshots."""
    kept: list[Root] = []
    by_device: dict[str, list[Root]] = {}
    for root in roots:
        by_device.setdefault(btrfs_device(root.source, devices) or root.source, []).append(root)
    for device, group in by_device.items():
        if len(group) > 1:
            named = [r for r in group if r.source != device and _names_itself(r, device)]
            default = [r for r in group if r.source == device]
            group = named or default or group
        kept.extend(group)
    return kept


def survey(volumes: Volumes) -> Findings:
    """Look into every filesystem once, for operating systems."""
    filesystems = tuple(volumes.filesystems())
    roots: list[Root] = []
    failures: dict[str, str] = {}
    # Those first that every kernel knows without a module: the appliance is still loading others.
    for filesystem in sorted(filesystems, key=lambda f: f.type not in BUILT_IN):
        if not holds_files(filesystem.type):
            continue
        try:
            with volumes.look_into(filesystem.device) as volume:
                root = _look(filesystem.device, volume)
        except EngineError as error:
            failures[filesystem.device] = error.message
            continue
        if root is not None:
            roots.append(root)
    order = {filesystem.device: place for place, filesystem in enumerate(filesystems)}
    roots.sort(key=lambda root: order[root.source])
    return Findings(filesystems, tuple(_without_snapshots(roots, filesystems)), failures)


def _describe_type(type: str) -> str:
    table = TITLES.get(type.removesuffix(SUFFIX))
    if type.endswith(SUFFIX) and table:
        return f"its {table} partition table is not read"
    return type


# With which options the kernel, and its like, may still read a damaged filesystem. The copies of an
# ext superblock are where mke2fs puts them for blocks of 4 KiB and of 1 KiB.
_STILL_READABLE = {
    "ext2": ("sb=131072:ext2", "sb=8193:ext2"),
    "ext3": ("noload", "noload,sb=131072:ext3", "noload,sb=8193:ext3"),
    "ext4": ("noload", "noload,sb=131072:ext4", "noload,sb=8193:ext4"),
    "xfs": ("norecovery",),
    "btrfs": ("degraded", "rescue=all"),
    "f2fs": ("norecovery",),
}


def _still_readable(findings: Findings) -> str:
    """What a user may type to read a filesystem that does not mount all the same."""
    for one in findings.filesystems:
        if one.device in findings.failures and (options := _STILL_READABLE.get(one.type or "")):
            return "what can still be read, perhaps: " + ", or ".join(
                f"-m {one.device}:/:{words}" for words in options
            )
    return "'imgtool filesystems --all' shows what the image holds"


def _describe(findings: Findings) -> str:
    words = []
    for filesystem in findings.filesystems:
        note = findings.failures.get(filesystem.device)
        words.append(
            f"{filesystem.device} ({_describe_type(filesystem.type or UNKNOWN)}"
            + (f", cannot be mounted: {shorten(note, 120)})" if note else ")")
        )
    return join_names(words)


def _choose_root(findings: Findings, wanted: str | None) -> Root | None:
    roots = findings.roots
    if wanted is not None:
        for root in roots:
            if root.source == wanted:
                return root
        choices = join_names(r.source for r in roots) or "none was found"
        raise NotInGuestError(
            "no operating system has this root filesystem",
            subject=wanted,
            hint=f"operating systems in the image: {choices}",
        )
    if len(roots) > 1:
        choices = join_names(
            (f"--root {typed(root.source)}  ({root.title})" for root in roots), "  or  "
        )
        raise NotInGuestError("the image has several operating systems", hint=f"add {choices}")
    return roots[0] if roots else None


def _data_layout(findings: Findings, closed: Sequence[str]) -> Layout:
    usable = [
        f for f in findings.filesystems if holds_files(f.type) and f.device not in findings.failures
    ]
    devices = [f for f in usable if not f.device.startswith(BTRFS_VOLUME)]
    if closed:
        # What is open, such as a /boot, is not the guest.
        raise Locked(closed, [f.device for f in devices])
    if len(devices) == 1:
        return Layout((Mount(devices[0].device, "/"),))
    if not usable:
        if findings.failures:
            raise NothingMounts(
                "no filesystem can be mounted: " + _describe(findings),
                hint=_still_readable(findings),
            )
        raise NotInGuestError(
            "the image holds no filesystem that can be read"
            + (f": {_describe(findings)}" if findings.filesystems else ""),
            hint="'imgtool partitions' and 'imgtool info' show what it is",
        )
    raise NotInGuestError(
        "no operating system was found; filesystems: " + _describe(findings),
        hint="say which one to use: " + "  or  ".join(f"-m {typed(f.device)}" for f in usable),
    )


def _btrfs_source(volumes: Volumes, device: str, entry: FstabEntry) -> str | None:
    path = entry.option("subvol")
    if path is None and (id := entry.option("subvolid")):
        number = whole_number(id)
        path = None if number is None else volumes.subvolume_by_id(device, number)
        if path is None and number != 5:
            return None
    path = (path or "").strip("/")
    return f"{BTRFS_VOLUME}{device}/{path}" if path else device


def _device_names(volumes: Volumes, root: Root, findings: Findings) -> DeviceNames:
    entries, _ = parse_fstab(root.fstab)
    names = DeviceNames(
        findings.filesystems,
        volumes.blocks(),
        parse_crypttab(root.crypttab),
        # What is put into a drive is on no disk.
        set(named_devices(root.fstab)) - {entry.spec for entry in entries if entry.on_a_disc},
    )
    own = btrfs_device(root.source, findings.filesystems) or root.source
    specs = {entry.spec for entry in entries if entry.mountpoint == "/"}
    if len(specs) == 1:  # of several nobody knows which one the guest starts from
        names.learn(specs.pop(), own)
    return names


class _Found:
    """Which filesystem each line of fstab means."""

    def __init__(self, volumes: Volumes, root: Root, findings: Findings) -> None:
        self._volumes = volumes
        self._names = _device_names(volumes, root, findings)
        self._closed = locked_devices(volumes.blocks())
        self._asked: dict[FstabEntry, str | None] = {}
        own = btrfs_device(root.source, findings.filesystems) or root.source
        # What is shown already, and by which name of it: nothing else than that can mean it.
        self._taken = dict.fromkeys((own, root.source), "")
        entries, _ = parse_fstab(root.fstab)
        for entry in entries:
            if entry.mountpoint == "/":
                self._taken = dict.fromkeys(self._taken, entry.spec)
        for entry in entries:
            named = self._names.find(entry.spec)
            if named is not None and not named.guessed:
                source = self._source(entry, named.device)
                if source is not None:
                    self._taken.setdefault(source, entry.spec)

    def _source(self, entry: FstabEntry, device: str) -> str | None:
        if device in self._closed or entry.fstype != "btrfs":
            return device
        if entry not in self._asked:  # the appliance lists all subvolumes for that
            self._asked[entry] = _btrfs_source(self._volumes, device, entry)
        return self._asked[entry]

    def _or_locked(self) -> str:
        if not self._closed:
            return ""
        are = "is" if len(self._closed) == 1 else "are"
        key = f"--key {self._closed[0]}:file:FILE"
        return f", or in {join_names(self._closed)}, which {are} encrypted ({key})"

    def source(self, entry: FstabEntry) -> str | Unshown:
        """What to mount, or why there is nothing."""
        named = self._names.find(entry.spec)
        source = None if named is None else self._source(entry, named.device)
        if source in self._closed:
            why = f"{source} is encrypted, and no key opens it (--key {source}:file:FILE)"
            return Unshown(entry.mountpoint, why, entry.at_boot, entry.is_optional)
        if named is not None and source is not None:
            known_as = self._taken.setdefault(source, entry.spec) if named.guessed else entry.spec
            # A guess that leads to what is there already was wrong: it is on another disk.
            if known_as == entry.spec:
                return source
        said = shorten(entry.spec, _MOST_SAID)
        why = f"{said} is on none of the disks given{self._or_locked()}"
        if several := self._names.several(entry.spec):
            why = f"{said} may be each of these: {join_names(several)}"
        return Unshown(entry.mountpoint, why, entry.at_boot, entry.is_optional)


def _from_fstab(volumes: Volumes, root: Root, findings: Findings) -> Layout:
    entries, problems = parse_fstab(root.fstab)
    sources = _Found(volumes, root, findings)
    found = [Mount(root.source, "/")]
    lines = list(problems)
    unshown: dict[str, Unshown] = {}
    taken = {"/"}
    for entry in entries:
        mountpoint = entry.mountpoint
        if mountpoint == "/":
            continue
        source = sources.source(entry)
        if mountpoint in taken:
            lines.append(f"fstab mounts two filesystems at {mountpoint}; the first is shown")
        elif isinstance(source, Unshown):
            unshown.setdefault(mountpoint, source)
        else:
            taken.add(mountpoint)
            found.append(Mount(source, mountpoint))
    found.sort(key=lambda mount: (mount.mountpoint.count("/"), mount.mountpoint != "/"))
    missing = [one for one in unshown.values() if one.mountpoint not in taken]
    lines += [
        f"{shorten(one.mountpoint, _MOST_SAID)} is not shown: {one.why}"
        for one in missing
        if one.is_said
    ]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more lines of fstab like these"]
    lines += _what_to_type(found, missing, findings)
    return Layout(tuple(found), root.source, root.os_type, tuple(lines), tuple(missing))


def _what_to_type(
    mounts: Sequence[Mount], missing: Sequence[Unshown], findings: Findings
) -> list[str]:
    """How to show what fstab names in a way that says nothing here."""
    used = {btrfs_device(m.source, findings.filesystems) or m.source for m in mounts}
    free = [
        one.device
        for one in findings.filesystems
        if holds_files(one.type)
        and one.type != UNKNOWN
        and one.device not in findings.failures
        and (btrfs_device(one.device, findings.filesystems) or one.device) not in used
    ]
    asked = [one.mountpoint for one in missing if one.is_said]
    if not (free and asked):
        return []
    sure = len(free) == len(asked) == 1
    given = [(m.source, m.mountpoint) for m in mounts]
    given.append((free[0] if sure else "DEVICE", asked[0]))
    if any(":" in mountpoint or not mountpoint.isprintable() for _, mountpoint in given):
        return []  # nobody can type that
    words = [
        "-m " + typed(source if mountpoint == "/" else f"{source}:{mountpoint}")
        for source, mountpoint in given
    ]
    if len(line := " ".join(words)) > _MOST_TYPED:
        return []
    where = "" if sure else f", DEVICE being one of {', '.join(free[:_MOST_LINES])}"
    return [f"to show {asked[0]} all the same, say what is where: {line}{where}"]


def discover(volumes: Volumes, *, root: str | None = None) -> Layout:
    """The guest's layout, with the operating system on `root` where there are several.

    A data disk with one filesystem is mounted at `/`. Raises `NotInGuestError` where there is
    nothing to mount or a choice is left, naming the choices.
    """
    findings = survey(volumes)
    chosen = _choose_root(findings, root)
    if chosen is None:
        return _data_layout(findings, locked_devices(volumes.blocks()))
    return _from_fstab(volumes, chosen, findings)
