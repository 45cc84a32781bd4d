"""What may hold a disk and is no image of one: archives, compressed files, forensic and backup
formats. Taken as a raw disk, each would be read as nonsense.

Signatures: file(1)'s magic/Magdir (archive, compress, filesystems, virtual), libewf's "EWF
specification", Proxmox's "VMA archive format", QEMU's block/parallels.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imgtool.text import typed


@dataclass(frozen=True)
class Packed:
    """A kind of file, by the bytes at an offset; `step` gets at what is in it, `{}` is its name."""

    magic: bytes
    name: str
    step: str
    offset: int = 0


_UNPACKED = ", then look at NEW"
_EXPORTED = ", then look at NEW.raw"
KINDS = (
    Packed(b"\x1f\x8b", "compressed by gzip", f"gzip -dc {{}} > NEW{_UNPACKED}"),
    Packed(b"\xfd7zXZ\0", "compressed by xz", f"xz -dc {{}} > NEW{_UNPACKED}"),
    Packed(b"BZh", "compressed by bzip2", f"bzip2 -dc {{}} > NEW{_UNPACKED}"),
    Packed(b"\x28\xb5\x2f\xfd", "compressed by zstd", f"zstd -dc {{}} > NEW{_UNPACKED}"),
    Packed(b"\x04\x22\x4d\x18", "compressed by lz4", f"lz4 -dc {{}} > NEW{_UNPACKED}"),
    Packed(b"LZIP", "compressed by lzip", f"lzip -dc {{}} > NEW{_UNPACKED}"),
    Packed(b"\x89LZO\0\r\n\x1a\n", "compressed by lzop", f"lzop -dc {{}} > NEW{_UNPACKED}"),
    Packed(b"ustar", "a tar archive", "tar xf {}, then look at the disk that was in it", 257),
    Packed(b"PK\x03\x04", "a zip archive", "unzip {}, then look at the disk that was in it"),
    Packed(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {}, then look at the disk in it"),
    Packed(b"Rar!\x1a\x07", "a rar archive", "unrar x {}, then look at the disk in it"),
    Packed(
        b"EVF\x09\x0d\x0a\xff\0", "an E01 image of EnCase", f"ewfexport -u -t NEW {{}}{_EXPORTED}"
    ),
    Packed(b"LVF\x09\x0d\x0a\xff\0", "an L01 file of EnCase", "it holds files and no disk"),
    Packed(b"EVF2\r\n\x81\0", "an Ex01 image of EnCase", f"ewfexport -u -t NEW {{}}{_EXPORTED}"),
    Packed(
        b"AFF10\r\n\0", "an AFF image", "affconvert -r {} of afflib-tools makes a raw disk of it"
    ),
    Packed(b"VMA\0", "a backup of Proxmox (VMA)", "vma extract {} FOLDER, on a Proxmox host"),
    Packed(
        b"MSWIM\0\0\0", "a Windows image (WIM)", "wimapply {} FOLDER; it holds files and no disk"
    ),
    Packed(b"\x3a\xff\x26\xed", "a sparse image of Android", f"simg2img {{}} NEW{_UNPACKED}"),
    Packed(
        b"partclone-image",
        "an image of partclone",
        f"partclone.restore -W -C -s {{}} -O NEW{_UNPACKED}",
    ),
    Packed(b"\0ntfsclone-image", "an image of ntfsclone", f"ntfsclone -r -O NEW {{}}{_UNPACKED}"),
    Packed(b"FsA0", "an archive of FSArchiver", "fsarchiver archinfo {} shows what is in it"),
)
# Of those that QEMU knows, and imgtool does not.
_OTHER_FORMATS = ("parallels", "bochs", "cloop", "dmg")
_OVA = b".ovf\0"
LONGEST = 512


def packed_as(start: bytes) -> Packed | None:
    """What a file is that begins with these bytes, of which there are `LONGEST` where it has as
    many; None for all that may be a raw disk."""
    for kind in KINDS:
        if start.startswith(kind.magic, kind.offset):
            return kind
    return None


def words_for(kind: Packed, start: bytes, path: Path) -> tuple[str, str]:
    """What the file is and what gets at the disk in it, in words."""
    is_ova = kind.offset and (path.suffix.lower() == ".ova" or _OVA in start[:100])
    name = "an appliance of virtual machines (OVA, a tar archive)" if is_ova else kind.name
    return f"it is no disk image but {name}", kind.step.format(typed(path))


def step_for_format(format: str, path: Path) -> str:
    """What to do with an image whose format QEMU knows and imgtool does not."""
    if format in _OTHER_FORMATS:
        return f"qemu-img convert -f {format} -O qcow2 {typed(path)} NEW{_UNPACKED}"
    return "no image of this kind is read"
