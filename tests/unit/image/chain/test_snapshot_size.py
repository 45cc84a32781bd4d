"""A snapshot of a disk that had another size is read at the size that it had then."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from imgtool.errors import ImageError
from imgtool.guest.partitions import partitions_of
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.qemu.nbd import serve
from imgtool.opening import open_guest

MIB = 1 << 20
OPTIONS = [
    "cluster_size=512",
    "cluster_size=64k",
    "cluster_size=2M",
    "extended_l2=on",
    "lazy_refcounts=on",
]


def qemu_img(*words: str | Path) -> bytes:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True).stdout


def qemu_io(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, image], check=True, capture_output=True)


def read(chain: Chain, snapshot: str | None) -> bytes:
    with serve(chain, snapshot=snapshot) as server:
        return server.read(0, server.size)


def sized(folder: Path, options: str, *, base: bool = False) -> tuple[Path, dict[str, bytes]]:
    """An image of 2 MiB with snapshots of 6 MiB and of 1, and what each of them holds."""
    image, below = folder / "disk.qcow2", folder / "base.raw"
    words = ["create", "-q", "-f", "qcow2", "-o", options]
    if base:
        below.write_bytes(b"\x09" * 8 * MIB)
        words += ["-b", str(below), "-F", "raw"]
    qemu_img(*words, image, "6M")
    qemu_io(image, "write -P 1 0 1M", "write -P 2 5M 1M")
    qemu_img("snapshot", "-c", "large", image)
    rest = b"\x09" if base else b"\0"
    large = b"\1" * MIB + rest * 4 * MIB + b"\2" * MIB
    qemu_img("resize", "-q", "--shrink", image, "1M")
    qemu_io(image, "write -P 3 512k 512k")
    qemu_img("snapshot", "-c", "small", image)
    small = b"\1" * (MIB // 2) + b"\3" * (MIB // 2)
    qemu_img("resize", "-q", image, "2M")
    qemu_io(image, "write -P 4 0 2M")
    return image, {"large": large, "small": small}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", [False, True])
def test_it_is_read_as_it_was_whatever_its_size(tmp_path: Path, options: str, base: bool) -> None:
    image, then = sized(tmp_path, options, base=base)
    before = image.read_bytes()
    chain = open_chain(image)
    for name, content in then.items():
        assert read(chain, name) == content
    assert read(chain, None) == b"\4" * 2 * MIB
    assert image.read_bytes() == before


@pytest.mark.parametrize("name", ["large", "small"])
def test_convert_makes_a_disk_of_the_size_that_it_had(tmp_path, imgtool_cli, name):
    image, then = sized(tmp_path, OPTIONS[1])
    new = tmp_path / "new.raw"
    done = imgtool_cli("convert", image, new, "--to", "raw", "--snapshot", name)
    assert done.status == 0, done.err
    assert new.read_bytes() == then[name]


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A disk of 24 MiB, with a filesystem to its very end and a file `then` in it, at a snapshot;
    now of 8 MiB, without any."""
    image, raw, folder = tmp_path / "guest.qcow2", tmp_path / "raw", tmp_path / "root"
    folder.mkdir()
    (folder / "then").write_bytes(b"then" * MIB)
    with raw.open("wb") as file:
        file.truncate(24 * MIB)
    table = "label: gpt\nfirst-lba: 64\nstart=64, type=linux\n"
    subprocess.run(["sfdisk", "-q", raw], input=table.encode(), check=True)
    words = ("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", folder)
    subprocess.run([*words, "-E", "offset=32768", raw, "23000k"], check=True, capture_output=True)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    qemu_img("snapshot", "-c", "then", image)
    qemu_img("resize", "-q", "--shrink", image, "8M")
    qemu_io(image, "write -z 0 8M")
    return image


def test_larger_disks_guest_is_read_without_the_appliance(guest, imgtool_cli):
    with open_guest(guest, snapshot="then", engine="direct") as seen:
        assert seen.read_bytes("/then") == b"then" * MIB
    table = partitions_of(open_chain(guest), snapshot="then")
    raw = open_chain(guest.with_name("raw"), format="raw")
    assert table == partitions_of(raw) and not table.problems
    done = imgtool_cli("partitions", guest, "--snapshot", "then", "-o", "json")
    assert done.status == 0, done.err
    assert [row["size"] for row in json.loads(done.out)] == [row.size for row in table.partitions]


def test_a_table_that_cannot_be_read_is_an_error(guest: Path) -> None:
    chain = open_chain(guest)
    with guest.open("r+b") as file:
        file.seek(60)
        file.write(bytes(12))
    with pytest.raises(ImageError, match="table of snapshots"), serve(chain, snapshot="then"):
        pytest.fail("it was served")
