"""A Linux guest that is hibernated is not written to."""

from __future__ import annotations

import pytest

from imgtool.errors import RefusedError
from imgtool.guest import hibernation
from imgtool.guest.blocks import Block


def page(signature: bytes, size: int = 4096) -> bytes:
    """The first page of swap with this signature."""
    return signature.rjust(size - 10 + len(signature), b"\0").ljust(size, b"\0")


@pytest.mark.parametrize("size", [4096, 16384, 65536])
@pytest.mark.parametrize("signature", [b"S1SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001"])
def test_the_signature_stands_at_the_end_of_the_first_page(signature, size):
    assert hibernation.is_asleep(page(signature, size))
    assert not hibernation.is_asleep(page(b"SWAPSPACE2", size))
    assert not hibernation.is_asleep(b"") and not hibernation.is_asleep(signature)


def test_swap_files_are_those_of_fstab():
    fstab = (
        b"/dev/sda2 none swap sw 0 0\n# /old none swap\n/swap/file none swap sw\n/x /y ext4\n\xff\n"
    )
    assert list(hibernation.swap_files(fstab)) == ["/swap/file"]


def test_a_device_with_the_memory_of_a_guest_is_named():
    blocks = [
        Block(device=f"/dev/sda{n}", kernel=f"sda{n}", kind="partition", size=1, type=kind)
        for n, kind in enumerate(("ext4", "swap", "swsuspend"), 1)
    ]
    hibernation.refuse_sleeping_devices(blocks[:2])
    with pytest.raises(RefusedError, match="hibernated") as refused:
        hibernation.refuse_sleeping_devices(blocks)
    assert refused.value.subject == "/dev/sda3"
    assert "shut it down" in str(refused.value.hint)


@pytest.mark.parametrize("name", ["/swapfile", "/var/swap"])
def test_a_file_with_the_memory_of_a_guest_is_named(name):
    files = {"/etc/fstab": b"/var/swap none swap sw 0 0\n", "/swap.img": page(b"SWAPSPACE2")}

    def read(path: str, limit: int) -> bytes | None:
        return files[path][:limit] if path in files else None

    hibernation.refuse_sleeping_files(read)
    files[name] = page(b"S1SUSPEND\0")
    with pytest.raises(RefusedError, match="hibernated") as refused:
        hibernation.refuse_sleeping_files(read)
    assert refused.value.subject == name
