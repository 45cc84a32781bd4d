"""Keys for encrypted devices: each that is of no use is said, and what stays locked too."""

from __future__ import annotations

from pathlib import Path

import pytest

from imgtool.engines.libguestfs.guest.volumes import ApplianceVolumes
from imgtool.errors import UsageError
from imgtool.guest.keys import Key, keys_told, parse_key
from imgtool.mount import mounting
from imgtool.mount.mounter import MountRequest
from imgtool.opening import open_guest
from tests.unit.engines.libguestfs.test_names import disk, line, part

UUID = "99999999-2222-3333-4444-555555555555"


class Handle:
    """An appliance with an encrypted partition of this type, which one passphrase opens."""

    def __init__(self, type: str) -> None:
        self.type = type
        self.opened: list[tuple[str, str]] = []

    def debug(self, command: str, words: list[str]) -> str:
        rows = disk("sda", 0) + part("sda1", "sda", fstype="ext4")
        rows += part("sda2", "sda", fstype=self.type, uuid=UUID) + disk("sdb", 1, fstype="ext2")
        if self.opened:
            name = self.opened[0][1]
            rows += line(kname="dm-0", pkname="sda2", name=name, type="crypt", fstype="ext4")
        return rows + "--logical-volumes--\n"

    def cryptsetup_open(self, device: str, key: str, name: str) -> None:
        if key != "secret":
            raise RuntimeError("cryptsetup_open: No key available with this passphrase.")
        self.opened.append((device, name))

    def lvm_scan(self, activate: bool) -> None:
        pass


def blocks(type: str, *keys: Key) -> tuple[list[str], list[str]]:
    """What filesystems there are with these keys, and what is said."""
    said: list[str] = []
    volumes = ApplianceVolumes(Handle(type), None, keys, said.append)  # type: ignore[arg-type]
    return [row.device for row in volumes.filesystems()], said


@pytest.mark.parametrize("type", ["crypto_LUKS", "BitLocker"])
@pytest.mark.parametrize("selector", ["all", "/dev/sda2", UUID, UUID.upper()])
def test_a_key_that_fits_opens_what_it_is_for(type, selector):
    found, said = blocks(type, Key("all", "wrong"), Key(selector, "secret"))
    assert found == ["/dev/sda1", "/dev/mapper/imgtool-luks0"]
    assert said == []


@pytest.mark.parametrize("type", ["crypto_LUKS", "BitLocker"])
def test_a_wrong_key_is_said(type):
    found, said = blocks(type, Key("all", "wrong"))
    assert found == ["/dev/sda1", "/dev/sda2"]
    assert said == ["/dev/sda2 stays locked: no key that was given for it opens it"]


def test_a_key_for_nobody_is_said_with_what_there_is():
    _, said = blocks("crypto_LUKS", Key("/dev/sda9", "secret"))
    assert said == [
        f"the key for /dev/sda9 is not used: the encrypted devices are /dev/sda2 ({UUID})"
    ]
    _, said = blocks("ext4", Key("/dev/sda9", "secret"), Key("all", "secret"))
    assert said == ["the key for /dev/sda9 is not used: nothing here is encrypted"]


def test_many_encrypted_devices_are_a_line_of_bounded_length():
    (line,) = keys_told([Key("x", "k")], {f"/dev/sda{n}": UUID for n in range(1000)}, [])
    assert len(line) < 2000


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a\0b"])
def test_a_binary_key_file_is_one_clear_line_with_what_to_do(tmp_path: Path, content: bytes):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UsageError, match="the key file is not text") as caught:
        parse_key(f"all:file:{tmp_path}/key")
    assert "--key all:key:PASSPHRASE" in str(caught.value.hint)


def test_a_mount_takes_the_key_itself_and_needs_no_file_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pass").write_text("se:cret\n")
    wanted = MountRequest(Path("disk.raw"), Path("mnt"), keys=["all:file:pass"])
    (word,) = mounting._request(wanted, tmp_path)["keys"]
    Path("pass").unlink()
    assert parse_key(word) == Key("all", "se:cret")


def test_keys_are_not_passed_over_by_the_direct_engine(tmp_path):
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    with (
        pytest.raises(UsageError, match="opens nothing that is encrypted"),
        open_guest(image, format="raw", keys=["all:key:x"], engine="direct"),
    ):
        pass
