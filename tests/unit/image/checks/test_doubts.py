"""What is doubtful is read with one line about it, and not written to unless that is asked for."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imgtool.engines.libguestfs.appliance import launch
from imgtool.errors import Reason, RefusedError
from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.info import probe
from imgtool.image.change.transaction import transaction
from imgtool.image.checks.checking import check_metadata
from imgtool.image.checks.doubts import doubts_of, wrong_entries
from tests.support.checks import check_chain
from tests.support.luks import SECRET, luks_qcow2

SIZE = 8 << 20
SECOND = 10**9


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def qemu_io(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run(["qemu-io", *words, image], check=True, capture_output=True)


def overlay(new: Path, base: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.name, new)
    return new


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """An overlay with something in it, whose base was replaced after it."""
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE))
    image = overlay(tmp_path / "top.qcow2", base)
    qemu_io(image, "write -P 1 0 64k")
    base.unlink()
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE))
    later = image.stat().st_mtime_ns + SECOND
    os.utime(base, ns=(later, later))
    return image


def l1_of(image: Path) -> tuple[int, list[int]]:
    data = image.read_bytes()
    count, offset = struct.unpack_from(">IQ", data, 36)
    return offset, list(struct.unpack_from(f">{count}Q", data, offset))


def damage(image: Path) -> Path:
    """Overwrite the image's first second table with what cannot be one."""
    table = l1_of(image)[1][0] & 0x00FFFFFFFFFFFE00
    with image.open("r+b") as file:
        file.seek(table)
        file.write(bytes(range(256)) * 256)
    return image


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    qemu_io(image, "write -P 1 0 4M")
    return damage(image)


WRITES = [
    ("resize", "{}", "16M"),
    ("compact", "{}"),
    ("snapshot", "create", "{}", "now"),
    ("overlay", "flatten", "{}"),
    ("overlay", "rebase", "{}", "other.qcow2"),
    ("overlay", "commit", "{}"),
    ("check", "--repair", "leaks", "{}"),
]


@pytest.mark.parametrize("words", WRITES, ids=lambda words: " ".join(words))
def test_overlay_is_not_written_to_after_its_base_was_changed(top, monkeypatch, imgtool_cli, words):
    monkeypatch.chdir(top.parent)
    qemu_img("create", "-q", "-f", "qcow2", "other.qcow2", str(SIZE))
    before = (top.read_bytes(), top.stat().st_mtime_ns)
    command = [word.format(top.name) for word in words]
    refused = imgtool_cli(*command)
    assert refused.status == 4, refused.err
    assert "was changed after it" in refused.err
    assert re.findall(r"--force ([a-z-]+)", refused.err) == ["base-newer"]
    assert (top.read_bytes(), top.stat().st_mtime_ns) == before
    every_other = [w for r in Reason if r is not Reason.BASE_NEWER for w in ("--force", r)]
    assert imgtool_cli(*command, *every_other).status == 4
    assert imgtool_cli(*command, "--force", "base-newer").status == 0


def test_the_hint_for_a_base_that_was_only_touched_helps(top, imgtool_cli):
    hint = imgtool_cli("resize", top, "16M").err
    command = re.search(r"touch -r \S+ \S+(?=;)", hint)
    assert command is not None
    subprocess.run(command[0], shell=True, check=True)
    assert imgtool_cli("resize", top, "16M").status == 0


def encrypted(image: Path, how: str) -> Path:
    """An image that QEMU encrypts, by LUKS or, as it did long ago, by AES alone."""
    if how == "luks":
        return luks_qcow2(image, SIZE)
    options = f"encrypt.format={how},encrypt.key-secret=key"
    qemu_img("create", "-q", *SECRET, "-f", "qcow2", "-o", options, image, str(SIZE))
    return image


# They do not come so far that they look into the guest.
INTO_GUESTS = [
    ("copy-in", "{}", "other.qcow2", "/"),
    ("copy-in", "-n", "{}", "other.qcow2", "/"),
    ("edit", "-e", "s/a/b/", "{}", "/etc/fstab"),
    ("edit", "-n", "-e", "s/a/b/", "{}", "/etc/fstab"),
    ("inject", "--hostname", "web", "{}"),
    ("inject", "-n", "--hostname", "web", "{}"),
    ("mount", "--rw", "-m", "/dev/sda:/", "{}", "folder"),
]


@pytest.mark.parametrize("words", INTO_GUESTS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize("reason", ["base-newer", "damaged"])
def test_nothing_is_written_into_a_guest_on_a_doubtful_image(
    request, monkeypatch, tmp_path, imgtool_cli, words, reason
):
    image = request.getfixturevalue({"base-newer": "top", "damaged": "damaged"}[reason])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "other.qcow2", str(SIZE))
    before = (image.read_bytes(), image.stat().st_mtime_ns)
    refused = imgtool_cli(*(word.format(image.name) for word in words))
    assert refused.status == 4, refused.err
    assert re.findall(r"--force ([a-z-]+)", refused.err) == [reason]
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before


def no_appliance(*words: object, **named: object) -> None:
    raise AssertionError("an appliance was started")


@pytest.mark.parametrize("words", INTO_GUESTS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_nothing_is_written_into_a_guest_on_what_qemu_encrypted(
    monkeypatch, tmp_path, imgtool_cli, words, kind
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    image = encrypted(tmp_path / "disk.qcow2", kind)
    qemu_img("create", "-q", "-f", "qcow2", "other.qcow2", str(SIZE))
    monkeypatch.setattr(launch, "launch_appliance", no_appliance)
    before = (image.read_bytes(), image.stat().st_mtime_ns)
    command = [word.format(image.name) for word in words]
    clones = [["--clone", "new.qcow2"]] if words[0] != "mount" else []
    for more in ([], *clones):
        refused = imgtool_cli(*command, *more)
        assert refused.status == 4, refused.err
        assert "it is encrypted by QEMU, and imgtool cannot give QEMU the key" in refused.err
        assert "hint: qemu-img can make one without, with --object secret" in refused.err
        assert (image.read_bytes(), image.stat().st_mtime_ns) == before
        assert not Path("new.qcow2").exists()


READS = [
    ("info", "{}"),
    ("partitions", "{}"),
    ("convert", "{}", "new.raw", "--to", "raw"),
    ("filesystems", "{}", "--engine", "direct"),
]


@pytest.mark.parametrize("words", READS, ids=lambda words: words[0])
def test_it_is_read_with_one_line_about_the_base(top, monkeypatch, imgtool_cli, words):
    monkeypatch.chdir(top.parent)
    done = imgtool_cli(*(word.format(top.name) for word in words))
    assert done.status == 0
    assert done.err.count("was changed after it") == 1


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """An overlay on a guest, written to after it was made."""
    tree, base = tmp_path / "tree", tmp_path / "base.raw"
    for folder in ("bin", "etc"):
        (tree / folder).mkdir(parents=True)
    (tree / "etc/os-release").write_text("ID=debian\nVERSION_ID=12\n")
    (tree / "etc/fstab").touch()
    subprocess.run(["mke2fs", "-q", "-t", "ext2", "-d", tree, base, "4M"], check=True)
    image = tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, image)
    later = image.stat().st_mtime_ns + SECOND
    os.utime(base, ns=(later, later))
    return image


INSIDE = [
    ("ls", "{}", "/etc"),
    ("cat", "{}", "/etc/os-release"),
    ("df", "{}"),
    ("filesystems", "{}", "--all"),
    ("inspect", "{}"),
    ("copy-out", "{}", "/etc", "-"),
    ("diff", "{}", "{}", "--path", "/etc"),
]


@pytest.mark.parametrize("words", INSIDE, ids=lambda words: words[0])
def test_a_guest_is_read_with_one_line_about_the_base(guest, imgtool_cli, words):
    before = guest.read_bytes(), guest.stat().st_mtime_ns
    done = imgtool_cli(*(word.format(guest) for word in words), "--engine", "direct")
    assert done.status == 0, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("imgtool: warning: ") and "was changed after it" in line
    assert (guest.read_bytes(), guest.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    "words",
    [
        ("edit", "{}", "/etc/os-release", "-e", "s/12/13/"),
        ("inject", "{}", "--hostname", "new"),
        ("copy-in", "{}", "{}", "/etc"),
    ],
    ids=lambda words: words[0],
)
def test_a_guest_is_not_written_to_after_its_base_was_changed(guest, words):
    before = guest.read_bytes(), guest.stat().st_mtime_ns
    argv = [sys.executable, "-m", "imgtool", *(word.format(guest) for word in words)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert re.findall(r"--force ([a-z-]+)", done.stderr) == ["base-newer"]
    assert (guest.read_bytes(), guest.stat().st_mtime_ns) == before


@pytest.mark.parametrize("words", READS[:2], ids=lambda words: words[0])
def test_a_damaged_image_is_read_with_one_line_about_it(damaged, imgtool_cli, words):
    done = imgtool_cli(*(word.format(damaged) for word in words))
    assert done.err.count("warning: its tables are damaged") == 1
    assert max(map(len, done.err.splitlines())) < 400


@pytest.mark.parametrize(
    "words", [("resize", "{}", "16M"), ("compact", "{}"), ("snapshot", "create", "{}", "now")]
)
def test_a_damaged_image_is_not_written_to(damaged, imgtool_cli, words):
    before = damaged.read_bytes()
    refused = imgtool_cli(*(word.format(damaged) for word in words))
    assert refused.status == 4
    assert "its tables are damaged" in refused.err and "--force damaged" in refused.err
    assert damaged.read_bytes() == before


def test_a_damaged_base_is_not_committed_into(tmp_path, damaged, imgtool_cli):
    new = overlay(tmp_path / "top.qcow2", damaged)
    before = damaged.read_bytes()
    refused = imgtool_cli("overlay", "commit", new)
    assert refused.status == 4 and "--force damaged" in refused.err
    assert damaged.read_bytes() == before


def test_lost_space_is_no_damage(tmp_path, imgtool_cli):
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    with image.open("r+b") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        file.truncate(20 << 16)
        file.seek(block + 2 * 19)
        file.write(b"\0\1")
    assert check_metadata(probe(image)).leaks == 1
    assert imgtool_cli("resize", image, "16M").status == 0


def test_sound_tables_of_every_kind_raise_no_doubt(tmp_path):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(range(256)) * (SIZE // 256))
    for number, options in enumerate(
        (
            ("-o", "compat=0.10"),
            ("-c",),
            ("-o", "cluster_size=512"),
            ("-o", "cluster_size=2M"),
            ("-o", "extended_l2=on"),
            ("-c", "-o", "compression_type=zstd"),
        )
    ):
        image = tmp_path / f"{number}.qcow2"
        qemu_img("convert", "-O", "qcow2", *options, raw, image)
        qemu_io(image, "write -z 1M 1M", "discard 3M 1M")
        assert doubts_of(open_chain(image)) == ()


def test_the_tables_of_a_large_image_are_looked_at_in_no_time(tmp_path):
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, "200G")
    link = probe(image)
    took = []
    for _ in range(3):
        started = time.monotonic()
        assert wrong_entries(link) == 0
        took.append(time.monotonic() - started)
    assert min(took) < 0.1  # 0.01 s where nothing else runs


def in_order(*images: Path) -> bool:
    return all(not check_chain(image, metadata=False) for image in images)


@pytest.mark.parametrize(
    "words",
    [
        ("snapshot", "create", "{}", "now"),
        ("check", "--repair", "leaks", "{}"),
        ("overlay", "rebase", "{}", "base.qcow2"),
        ("overlay", "commit", "{}"),
        ("compact", "{}"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_invisible_work_leaves_the_overlays_younger(tmp_path, monkeypatch, imgtool_cli, words):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE))
    middle = overlay(tmp_path / "middle.qcow2", base)
    qemu_io(middle, "write -P 1 0 64k")
    high = overlay(tmp_path / "high.qcow2", middle)
    highest = overlay(tmp_path / "highest.qcow2", high)
    assert in_order(middle, high, highest)
    done = imgtool_cli(*(word.format("middle.qcow2") for word in words))
    assert done.status == 0, done.err
    assert middle.stat().st_mtime_ns >= base.stat().st_mtime_ns
    assert in_order(middle, high, highest)


def test_an_overlay_that_was_older_before_stays_so(top, imgtool_cli):
    assert imgtool_cli("snapshot", "create", top.with_name("base.qcow2"), "now").status == 0
    assert [finding.what for finding in check_chain(top)] == ["base-newer"]


def test_a_name_that_is_only_written_keeps_the_trace(top, imgtool_cli):
    moved = shutil.copy(top.with_name("base.qcow2"), top.with_name("moved.qcow2"))
    top.with_name("base.qcow2").unlink()
    assert imgtool_cli("overlay", "rebase", "--unsafe", top, moved).status == 0
    assert [finding.what for finding in check_chain(top)] == ["base-newer"]


def test_no_message_is_longer_than_a_few_lines(tmp_path, imgtool_cli, capsys):
    from imgtool.cli import render

    render.message("warning", "x" * 100_000)
    render.hint("y " * 100_000)
    assert all(len(line) < 4100 for line in capsys.readouterr().err.splitlines())
    base = tmp_path / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, str(SIZE))
    names = [f"{number:02}-{'n' * 60}" for number in range(60)]
    first = overlay(tmp_path / f"{names[0]}.qcow2", base)
    for name in names[1:]:
        shutil.copyfile(first, tmp_path / f"{name}.qcow2")
    refused = imgtool_cli("resize", base, "16M")
    assert refused.status == 4 and "and 52 more" in refused.err
    for name in names[:12]:
        qemu_img("snapshot", "-c", name, base)
    missing = imgtool_cli("convert", base, tmp_path / "new", "--snapshot", "none")
    assert missing.status == 5 and "and 4 more" in missing.err


def crashed(folder: Path) -> Path:
    """An image whose writer was killed before its lazy refcounts were written."""
    image = folder / "disk.qcow2"
    options = "lazy_refcounts=on"
    qemu_img("create", "-f", "qcow2", "-o", options, image, "4M")
    words = ("qemu-io", "-c", "write -P 7 0 1M", "-c", "abort", image)
    subprocess.run(words, capture_output=True)
    return image


def read(image: Path, at: str) -> bool:
    """Whether a guest still finds what was written before the crash."""
    done = subprocess.run(
        ["qemu-io", "-r", "-U", "-c", f"read -P 7 {at}", image], capture_output=True, text=True
    )
    return "Pattern verification failed" not in done.stdout


def test_what_a_crash_has_left_is_not_written_over(tmp_path, imgtool_cli):
    """As the base of an overlay, QEMU takes clusters that the tables do not count yet for free."""
    image = crashed(tmp_path)
    before = image.read_bytes()
    top = tmp_path / "top.qcow2"
    for words in (
        ("resize", image, "+1M"),
        ("compact", image),
        ("snapshot", "create", image, "now"),
        ("check", "--repair", "leaks", image),
        ("overlay", "commit", top),
    ):
        if top in words:
            overlay(top, image)
            qemu_io(top, "write -P 8 2M 1M")
        refused = imgtool_cli(*words)
        assert (refused.status, image.read_bytes()) == (4, before), words
        assert "its tables lag behind" in refused.err
        assert f"imgtool check --repair all {image}" in refused.err
    assert read(top, "0 1M")
    top.unlink()
    with (
        pytest.raises(RefusedError, match="lag behind"),
        transaction([open_chain(image)], notice=lambda line: None),
    ):
        pass
    assert imgtool_cli("check", "--repair", "all", image).status == 0
    with transaction([open_chain(image)], notice=lambda line: None) as writing:
        qemu_io(writing.chains[0].active.path, "write -P 8 2M 1M")
        writing.commit()
    assert read(image, "0 1M") and not read(image, "2M 1M")
    qemu_img("check", image)
