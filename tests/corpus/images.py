"""The test images in Debian's source packages: fetched, unpacked, one file each."""

from __future__ import annotations

import binascii
import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# Of btrfs-progs, what is not `.raw` is metadata in a format of its own.
_ALL = re.compile("")
PACKAGES = {
    "btrfs-progs": re.compile(r"\.raw"),
    "cryptsetup": _ALL,
    "dosfstools": _ALL,
    "exfatprogs": _ALL,
    "e2fsprogs": _ALL,
    "libarchive": _ALL,
    "libguestfs": _ALL,
    "qemu": _ALL,
    "util-linux": _ALL,
}
# Packages whose images are not in the sources of the oldest Debian that is used, by a newer one.
_NEWER = {"exfatprogs": "trixie"}
_IMAGE = re.compile(
    r"(?:^|/)(?:tests?|libarchive)/.*"
    r"(?:\.(?:img|raw|dd|iso|qcow2?|vmdk|vdi|vhdx?|vpc|E01|fsck)|/image|sample_images/[^/]+)"
    r"(?:\.restored)?(?P<packed>(?:\.(?:gz|xz|bz2|Z|uu|tar))*)$"
)
_LARGEST = 1 << 30  # unpacked; what is larger is no test of reading
_SMALLEST = 512
_BLOCK = 1 << 16


def fetch(folder: Path) -> list[Path]:
    """The source archives of the packages, of the Debian that this machine runs or a newer one.

    The machine's own lists and sources stay as they are. Needs apt and a mirror with sources.
    """
    for name in ("lists/partial", "cache", "archives"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    fields = "$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)"
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", fields, "Created-By: Packages"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = [tuple(line.split()) for line in targets.splitlines()]
    used = [fields for fields in found if fields[0] == "Debian" and "-" not in fields[2]]
    lines = {
        f"deb-src {address} {each} {component}\n"
        for _, address, release, component in used
        for each in (release, *_NEWER.values())
    }
    own = used[0][2]
    (folder / "sources.list").write_text("".join(sorted(lines)))
    apt = ["apt-get", "-q", "-o", "APT::Sandbox::User=root"]
    apt += ["-o", f"Dir::Etc::SourceList={folder / 'sources.list'}"]
    apt += ["-o", "Dir::Etc::SourceParts=/dev/null", "-o", f"Dir::Cache={folder / 'cache'}"]
    apt += ["-o", f"Dir::State::Lists={folder / 'lists'}"]
    subprocess.run([*apt, "update"], check=True, stdout=subprocess.DEVNULL)
    archives = folder / "archives"
    wanted = [f"{name}/{_NEWER.get(name, own)}" for name in PACKAGES]
    words = [*apt, "source", "--download-only", *wanted]
    subprocess.run(words, check=True, cwd=archives, stdout=subprocess.DEVNULL)
    orig = sorted(archives.glob("*.orig.tar.*"))
    return [path for path in orig if not path.name.endswith(".asc")]


def unpack(archive: Path, folder: Path) -> list[Path]:
    """The images of one source archive, as PACKAGE/NAME below a folder; each content once."""
    package = archive.name.partition("_")[0]
    made: dict[bytes, Path] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            matched = _IMAGE.search(member.name)
            if not member.isfile() or matched is None or not PACKAGES[package].search(member.name):
                continue
            file = tar.extractfile(member)
            assert file is not None
            name = member.name.partition("/")[2].removesuffix(matched["packed"]).replace("/", "-")
            path = folder / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():  # it is there packed and as it is
                continue
            digest = _write(_unpacked(file, member.name), path)
            if digest is None or digest in made:
                path.unlink(missing_ok=True)
            else:
                made[digest] = path
    return list(made.values())


def _unpacked(file: IO[bytes], name: str) -> Iterator[bytes]:
    """The content in pieces, whatever it is packed in, from the outermost to the innermost."""
    while True:
        stem, _, kind = name.rpartition(".")
        if kind == "gz":
            file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
        elif kind == "xz":
            file = lzma.LZMAFile(file)  # noqa: SIM115
        elif kind == "bz2":
            file = bz2.BZ2File(file)
        elif kind == "tar":  # of one image, which may be sparse
            inner = tarfile.open(fileobj=file, mode="r|")  # noqa: SIM115
            image = next(member for member in inner if member.isfile())
            file = inner.extractfile(image)  # type: ignore[assignment]
        elif kind == "Z":
            content = subprocess.run(["zcat"], input=file.read(), capture_output=True, check=True)
            yield content.stdout
            return
        elif kind == "uu":
            packed = b"".join(_uudecoded(file))
            if stem.endswith(".Z"):
                packed = subprocess.run(["zcat"], input=packed, capture_output=True).stdout
            yield packed
            return
        elif kind == "fsck":  # a hex dump, of which only what is not zero is there
            done = subprocess.run(["xxd", "-r"], input=file.read(), capture_output=True, check=True)
            yield done.stdout
            return
        else:
            break
        name = stem
    while piece := file.read(_BLOCK):
        yield piece


def _uudecoded(file: IO[bytes]) -> Iterator[bytes]:
    for line in file:
        if line.startswith((b"begin ", b"end")) or line == b"`\n":
            continue
        with contextlib.suppress(binascii.Error):  # some begin with a licence
            yield binascii.a2b_uu(line)


def _write(pieces: Iterator[bytes], path: Path) -> bytes | None:
    """Write a sparse file; its checksum, or None where it is not worth looking at."""
    digest, length = hashlib.sha256(), 0
    with path.open("wb") as new:
        for piece in pieces:
            digest.update(piece)
            length += len(piece)
            if length > _LARGEST:
                return None
            for at in range(0, len(piece), _BLOCK):
                block = piece[at : at + _BLOCK]
                if block.strip(b"\0"):
                    new.write(block)
                else:
                    new.seek(len(block), os.SEEK_CUR)
        new.truncate(length)
    return digest.digest() if length >= _SMALLEST else None
