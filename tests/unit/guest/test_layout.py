"""Layout discovery, on guests that exist only as answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest

from imgtool.errors import EngineError, NotInGuestError
from imgtool.formats.fstab import parse_fstab
from imgtool.formats.numbers import whole_number
from imgtool.guest.blocks import Block
from imgtool.guest.device_names import mapper_to_volume
from imgtool.guest.guest import user_names
from imgtool.guest.layout import discover, there_is
from imgtool.guest.model import Device, Mount


class FakeVolume:
    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def read(self, path: str, limit: int = 1 << 18) -> bytes | None:
        return self._files.get(path)

    def is_dir(self, path: str) -> bool:
        return any(name.startswith(path + "/") for name in self._files)


class FakeGuest:
    """Filesystems as {device: (type, files or None where it does not mount)}."""

    def __init__(
        self, filesystems, disks=("/dev/sda",), ids=None, subvolumes=None, parents=None
    ) -> None:
        self._parents = parents or {}
        self._filesystems = filesystems
        self._disks = disks
        self._ids = ids or {}
        self._subvolumes = subvolumes or {}

    def filesystems(self) -> Sequence[Device]:
        return [Device("filesystem", name, kind) for name, (kind, _) in self._filesystems.items()]

    def blocks(self) -> Sequence[Block]:
        names = dict.fromkeys([*self._disks, *self._filesystems, *self._ids.values()])
        return [self._block(name) for name in names if not name.startswith("btrfsvol:")]

    def _block(self, name: str) -> Block:
        kind = "device" if name in self._disks else "md" if "/md" in name else "partition"
        ids = {kind: value for (kind, value), device in self._ids.items() if device == name}
        type = self._filesystems.get(name, (None, None))[0]
        return Block(name, kind, 1 << 20, type, parents=self._parents.get(name, ()), **ids)

    @contextlib.contextmanager
    def look_into(self, source: str) -> Iterator[FakeVolume]:
        files = self._filesystems[source][1]
        if files is None:
            raise EngineError("wrong fs type", subject=source)
        yield FakeVolume(files)

    def subvolume_by_id(self, device: str, number: int) -> str | None:
        return self._subvolumes.get((device, number))


def linux(fstab: str = "", name: str = "Debian 12") -> dict[str, bytes]:
    return {
        "/etc/os-release": f'PRETTY_NAME="{name}"\n'.encode(),
        "/etc/fstab": fstab.encode(),
        "/etc/passwd": b"root:x:0:0::/root:/bin/sh\n",
    }


def mounts(guest: FakeGuest, **options) -> dict[str, str]:
    return {m.mountpoint: m.source for m in discover(guest, **options).mounts}


@pytest.mark.parametrize("digits", ["2" * 5000, "²", "٣", "", "-1", "0x5"])
def test_numbers_of_a_guest_are_decimal_digits_and_few(digits):
    assert whole_number(digits) is None
    assert whole_number("9" * 18) == 10**18 - 1
    fstab = (
        f"LABEL=r / ext4\nLABEL=b /b btrfs subvolid={digits or 'x'}\n/dev/nvme{digits}n1p1 /n x\n"
    )
    guest = FakeGuest(
        {"/dev/sda1": ("ext4", linux(fstab)), "/dev/sda2": ("btrfs", {})},
        ids={("label", "r"): "/dev/sda1", ("label", "b"): "/dev/sda2"},
    )
    assert mounts(guest) == {"/": "/dev/sda1"}
    assert set(discover(guest).missed) == {"/b", "/n"}
    assert user_names(f"b:x:{digits}:0::/:/bin/sh\na:x:7:0::/:/bin/sh\n".encode()) == {7: "a"}


@pytest.mark.parametrize(
    "crypttab",
    [
        "x /dev/mapper/x\n",
        "x /dev/mapper/y\ny /dev/disk/by-id/dm-name-x\n",
        "x /dev/mapper/n0\n" + "".join(f"n{n} /dev/mapper/n{n + 1}\n" for n in range(5000)),
    ],
)
def test_a_crypttab_in_a_circle_leads_nowhere(crypttab):
    files = {**linux("/dev/mapper/x /home ext4\n"), "/etc/crypttab": crypttab.encode()}
    layout = discover(FakeGuest({"/dev/sda1": ("ext4", files)}))
    assert set(layout.missed) == {"/home"}


def test_encryption_in_encryption_is_told_by_crypttab():
    crypttab = b"in /dev/mapper/out\nout UUID=l0\n"
    files = {**linux("/dev/mapper/in /home ext4\n"), "/etc/crypttab": crypttab}
    guest = FakeGuest(
        {
            "/dev/sda1": ("ext4", files),
            "/dev/sda2": ("crypto_LUKS", None),
            "/dev/mapper/a": ("crypto_LUKS", None),
            "/dev/mapper/b": ("ext4", {}),
        },
        ids={("uuid", "l0"): "/dev/sda2"},
        parents={"/dev/mapper/a": ("/dev/sda2",), "/dev/mapper/b": ("/dev/mapper/a",)},
    )
    assert mounts(guest)["/home"] == "/dev/mapper/b"


def test_the_roots_fstab_is_followed_through_every_kind_of_spec():
    fstab = """
    /dev/mapper/vg--a-root / ext4 errors=remount-ro 0 1
    UUID=1234-ABCD /boot/efi vfat umask=0077 0 1
    UUID=b007 /boot ext2 defaults 0 2
    LABEL=home /home xfs defaults 0 2
    PARTUUID=9d /srv ext4 defaults 0 2
    /dev/vdb1 /data ext4 defaults 0 2
    /dev/mapper/vg--a-swap none swap sw 0 0
    /dev/sr0 /media/cdrom0 udf,iso9660 user,noauto 0 0
    """
    guest = FakeGuest(
        {
            "/dev/sda1": ("vfat", {}),
            "/dev/sda2": ("ext2", {}),
            "/dev/sda4": ("ext4", {}),
            "/dev/sdb1": ("ext4", {}),
            "/dev/vg-a/home": ("xfs", {}),
            "/dev/vg-a/root": ("ext4", linux(fstab)),
            "/dev/vg-a/swap": ("swap", None),
        },
        disks=("/dev/sda", "/dev/sdb"),
        ids={
            ("uuid", "1234-ABCD"): "/dev/sda1",
            ("uuid", "b007"): "/dev/sda2",
            ("label", "home"): "/dev/vg-a/home",
            ("partuuid", "9d"): "/dev/sda4",
        },
    )
    layout = discover(guest)
    assert {m.mountpoint: m.source for m in layout.mounts} == {
        "/": "/dev/vg-a/root",
        "/boot": "/dev/sda2",
        "/boot/efi": "/dev/sda1",
        "/data": "/dev/sdb1",
        "/home": "/dev/vg-a/home",
        "/srv": "/dev/sda4",
    }
    assert layout.problems == ()
    order = [m.mountpoint for m in layout.mounts]
    assert order[0] == "/"
    assert order.index("/boot") < order.index("/boot/efi")


def test_an_fstab_that_lies_is_told_and_does_not_stop_the_rest():
    fstab = (
        "UUID=missing /srv ext4 defaults 0 0\nrubbish\n"
        "/dev/sda2 /with\\040space ext4 defaults 0 0\n"
        "/srv /bind none bind 0 0\nserver:/x /nfs nfs defaults 0 0\n"
        "/dev/sda2 /a/../../b ext4 defaults 0 0\n"
    )
    layout = discover(FakeGuest({"/dev/sda1": ("ext4", linux(fstab)), "/dev/sda2": ("ext4", {})}))
    assert layout.mounts == (Mount("/dev/sda1", "/"), Mount("/dev/sda2", "/with space"))
    assert len(layout.problems) == 3
    assert any("/srv" in p and "UUID=missing" in p for p in layout.problems)


def test_a_data_disk_with_one_filesystem_is_mounted_at_the_root():
    assert mounts(FakeGuest({"/dev/sda": ("ext4", {"/file": b""})})) == {"/": "/dev/sda"}


def test_filesystems_without_system_say_what_to_type():
    guest = FakeGuest({"/dev/sda1": ("ext4", {}), "/dev/sda2": ("xfs", {})})
    with pytest.raises(NotInGuestError) as caught:
        discover(guest)
    assert "-m /dev/sda1" in str(caught.value.hint)
    assert "-m /dev/sda2" in str(caught.value.hint)


def test_systems_are_listed_and_root_chooses():
    guest = FakeGuest({"/dev/sda1": ("ext4", linux()), "/dev/sda2": ("ext4", linux(name="Fedora"))})
    with pytest.raises(NotInGuestError) as caught:
        discover(guest)
    assert "--root /dev/sda1" in str(caught.value.hint)
    assert "Fedora" in str(caught.value.hint)
    assert mounts(guest, root="/dev/sda2") == {"/": "/dev/sda2"}
    with pytest.raises(NotInGuestError, match="/dev/sdz"):
        discover(guest, root="/dev/sdz")


def test_unmountable_filesystem_is_named_with_the_reason():
    with pytest.raises(NotInGuestError, match="wrong fs type"):
        discover(FakeGuest({"/dev/sda1": ("ext4", None)}))


def test_an_encrypted_disk_without_key_asks_for_one():
    with pytest.raises(NotInGuestError) as caught:
        discover(FakeGuest({"/dev/sda2": ("crypto_LUKS", None)}))
    assert "--key /dev/sda2" in str(caught.value.hint)


def test_btrfs_root_is_the_subvolume_of_its_own_fstab():
    fstab = (
        "UUID=b / btrfs subvol=@ 0 0\nUUID=b /home btrfs subvol=/@home 0 0\n"
        "UUID=b /var btrfs subvolid=260 0 0\n"
    )
    guest = FakeGuest(
        {
            "/dev/sda2": ("btrfs", {"/@/x": b""}),
            "btrfsvol:/dev/sda2/@": ("btrfs", linux(fstab)),
            "btrfsvol:/dev/sda2/@home": ("btrfs", {}),
            "btrfsvol:/dev/sda2/.snapshots/1/snapshot": ("btrfs", linux(fstab)),
        },
        ids={("uuid", "b"): "/dev/sda2"},
        subvolumes={("/dev/sda2", 260): "@var"},
    )
    assert mounts(guest) == {
        "/": "btrfsvol:/dev/sda2/@",
        "/home": "btrfsvol:/dev/sda2/@home",
        "/var": "btrfsvol:/dev/sda2/@var",
    }


def test_windows_is_known_by_its_system_folder():
    guest = FakeGuest(
        {"/dev/sda1": ("ntfs", {}), "/dev/sda2": ("ntfs", {"/Windows/System32/cmd.exe": b""})}
    )
    layout = discover(guest)
    assert layout.os_type == "windows"
    assert layout.mounts == (Mount("/dev/sda2", "/"),)


def test_a_separate_usr_does_not_hide_the_root():
    files = linux("/dev/sda2 /usr ext4 defaults 0 0\n")
    del files["/etc/os-release"]
    guest = FakeGuest({"/dev/sda1": ("ext4", files), "/dev/sda2": ("ext4", {"/lib/x": b""})})
    assert mounts(guest) == {"/": "/dev/sda1", "/usr": "/dev/sda2"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("debian--vg-root", "/dev/debian-vg/root"),
        ("vg-my--lv", "/dev/vg/my-lv"),
        ("a--b--c-d--e", "/dev/a-b-c/d-e"),
    ],
)
def test_mapper_names_are_read_as_lvm_escapes_them(name, path):
    assert mapper_to_volume(name) == path


@pytest.mark.parametrize("spec", ["/dev/vda2", "/dev/hda2", "/dev/xvda2", "/dev/nvme0n1p2"])
def test_disk_keeps_its_place_whatever_driver_the_guest_used(spec):
    guest = FakeGuest(
        {"/dev/sda1": ("ext4", linux(f"{spec} /x ext4 defaults 0 0")), "/dev/sda2": ("ext4", {})}
    )
    assert mounts(guest)["/x"] == "/dev/sda2"


def test_comments_and_pseudo_filesystems_are_no_entries():
    entries, problems = parse_fstab(b"#\n\nproc /proc proc defaults 0 0\ntmpfs /tmp tmpfs d 0 0\n")
    assert entries == ()
    assert problems == ()


def test_where_there_is_nothing_no_list_is_promised():
    assert there_is(["/dev/sdb", "/dev/sda"]) == "it has: /dev/sda, /dev/sdb"
    assert "none that can be read" in there_is([])
