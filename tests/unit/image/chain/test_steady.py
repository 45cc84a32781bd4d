"""What was looked at is what is opened, also where another user can exchange files meanwhile."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgtool import opening
from imgtool.engines.direct.parent.sandbox import Images
from imgtool.errors import ExitStatus, ImageError, RefusedError
from imgtool.guest.partitions import partitions_of
from imgtool.image.chain.chain import Chain, open_chain
from imgtool.image.chain.steady import (
    is_name_out_of_reach,
    is_out_of_reach,
    is_safe_from_others,
    refuse_others_opened,
    steady,
)
from imgtool.image.change import compacting, transaction
from imgtool.image.change import plan as working
from imgtool.image.change.made import made_file as really_made_file
from imgtool.image.checks import ages
from imgtool.image.intent import intent_log
from imgtool.image.policy import AllowedDirs
from imgtool.image.qemu.disk_reader import open_contents
from imgtool.image.qemu.nbd import serve
from imgtool.image.qemu.qemu_img import qemu_img as run_qemu_img

MIB = 1 << 20
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_bytes(b"S" * MIB)
    os.utime(path, (1, 1))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An overlay on a raw base, in a folder that everybody may write to."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    folder.chmod(0o777)
    base = folder / "base.raw"
    base.write_bytes(b"1" * MIB)
    os.utime(base, (1, 1))
    words = ("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "disk.qcow2")
    subprocess.run(["qemu-img", *words], check=True)
    return folder / "disk.qcow2"


def exchange(image: Path, secret: Path) -> None:
    base = image.with_name("base.raw")
    if not base.is_symlink():
        base.rename(base.with_name("aside"))
        base.symlink_to(secret)


def content(chain: Chain) -> bytes:
    with open_contents(chain) as (read, size):
        return read(0, size)


def test_base_exchanged_before_it_is_opened_is_refused(
    image: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at where its name leads, and its opening."""
    real = AllowedDirs.find_base

    def find_base(self: AllowedDirs, name: str, *, of: Path) -> tuple[Path, str | None]:
        found = real(self, name, of=of)
        exchange(image, secret)
        return found

    monkeypatch.setattr(AllowedDirs, "find_base", find_base)
    with pytest.raises(RefusedError, match="exchanged") as caught:
        open_chain(image)
    assert caught.value.status is ExitStatus.REFUSED
    assert str(image.with_name("base.raw")) in str(caught.value)


@pytest.mark.parametrize("kind", ["extent", "data file"])
def test_so_it_is_with_the_other_files_that_a_header_names(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    disk, part = tmp_path / "theirs/disk.vmdk", tmp_path / "theirs/part"
    disk.parent.mkdir()
    if kind == "extent":
        words: list[str | Path] = [
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            "subformat=monolithicFlat",
            disk,
            "1M",
        ]
        subprocess.run(["qemu-img", *words], check=True)
        part = tmp_path / "theirs/disk-flat.vmdk"
    else:
        words = ["create", "-q", "-f", "qcow2", "-o", f"data_file={part}", disk, "1M"]
        subprocess.run(["qemu-img", *words], check=True)
    real = AllowedDirs.follow

    def follow(self: AllowedDirs, name: str, *, of: Path, role: str) -> Path:
        found = real(self, name, of=of, role=role)
        part.unlink()
        part.symlink_to(secret)
        return found

    monkeypatch.setattr(AllowedDirs, "follow", follow)
    with pytest.raises(RefusedError, match="exchanged"):
        open_chain(disk)


USES: dict[str, Callable[[Chain], object]] = {
    "sandbox": lambda chain: Images([chain]).close(),
    "server": lambda chain: serve(chain).__enter__(),
    "partitions": partitions_of,
    "steady": lambda chain: steady(chain).__enter__(),
}


@pytest.mark.parametrize("use", USES)
def test_base_exchanged_after_the_look_is_not_opened(image: Path, secret: Path, use: str) -> None:
    chain = open_chain(image)
    exchange(image, secret)
    with pytest.raises(RefusedError, match="exchanged"):
        USES[use](chain)


def test_a_raw_disk_that_is_exchanged_is_not_read(image: Path, secret: Path) -> None:
    chain = open_chain(image.with_name("base.raw"), format="raw")
    exchange(image, secret)
    with pytest.raises(RefusedError, match="exchanged"):
        content(chain)


def test_header_rewritten_after_the_look_gets_nothing_served(
    image: Path, secret: Path, tmp_path: Path
) -> None:
    """The file is the same, and its owner has written another header into it, which names a file
    for the data."""
    chain = open_chain(image)
    forged = tmp_path / "forged"
    options = f"data_file={secret},data_file_raw=on"
    words = ("create", "-q", "-f", "qcow2", "-o", options, forged, "1M")
    subprocess.run(["qemu-img", *words], check=True)
    secret.write_bytes(b"S" * MIB)
    image.write_bytes(forged.read_bytes())
    with pytest.raises(RefusedError, match="exchanged"), serve(chain):
        pytest.fail("it was served")


def test_chain_that_others_can_exchange_is_served_by_descriptor(image: Path) -> None:
    chain = open_chain(image)
    assert not is_safe_from_others(chain)
    with steady(chain) as seen:
        assert "/proc/" in seen.filename() and "base.raw" not in seen.filename()
        assert not seen.safe_by_name
        exchange(image, image)  # too late
        with serve(seen) as server:
            assert server.read(0, MIB) == b"1" * MIB


def test_a_chain_of_the_users_own_is_opened_by_name(image: Path) -> None:
    image.parent.chmod(0o755)
    chain = open_chain(image)
    assert is_safe_from_others(chain)
    with steady(chain) as seen:
        assert seen is chain


@pytest.mark.parametrize(
    ("name", "mode", "safe"),
    [
        (".", 0o755, True),
        (".", 0o1777, True),  # a sticky one: others exchange only what is theirs
        (".", 0o775, False),
        (".", 0o757, False),
        ("base.raw", 0o664, False),
        ("base.raw", 0o666, False),
        ("disk.qcow2", 0o622, False),
        ("base.raw", 0o600, True),
    ],
)
def test_who_may_write_to_a_file_or_its_folder_can_exchange_it(
    image: Path, name: str, mode: int, safe: bool
) -> None:
    image.parent.chmod(0o755)
    (image.parent / name).chmod(mode)
    assert is_safe_from_others(open_chain(image)) is safe


@needs_root
@pytest.mark.parametrize("name", [".", "disk.qcow2", "base.raw", "link"])
def test_an_owner_can_exchange_it(image: Path, name: str) -> None:
    image.parent.chmod(0o1777)
    (image.parent / "link").symlink_to("disk.qcow2")
    os.chown(image.parent / name, NOBODY, NOBODY, follow_symlinks=False)
    assert not is_safe_from_others(open_chain(image.parent / "link"))


def test_folders_by_which_a_link_leads_count_as_well(image: Path, tmp_path: Path) -> None:
    image.parent.chmod(0o755)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open/link").symlink_to(image)
    (tmp_path / "door").symlink_to(tmp_path / "open/link")
    assert is_safe_from_others(open_chain(image))
    assert not is_safe_from_others(open_chain(tmp_path / "door"))


class Handle:
    """What a handle of libguestfs is told of drives."""

    def __init__(self) -> None:
        self.drives: list[tuple[str, dict[str, Any]]] = []

    def set_autosync(self, on: bool) -> None:
        """Nothing to be synced."""

    def add_drive_opts(self, name: str, **options: Any) -> None:
        self.drives.append((name, options))


@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_the_appliance_reads_disks_from_a_server_alone(image: Path, mode: int) -> None:
    """Neither can others exchange them, nor is what they contain taken for an image."""
    import contextlib

    image.parent.chmod(mode)
    handle = Handle()
    with contextlib.ExitStack() as stack:
        opening._drives([open_chain(image)], None, False, stack)(handle)
    ((name, options),) = handle.drives
    assert options["readonly"]
    assert (name, options["protocol"], options["format"]) == ("", "nbd", "raw")


def test_what_a_process_has_opened_is_compared(image: Path, secret: Path) -> None:
    chain = open_chain(image)
    with image.open("rb"), image.with_name("base.raw").open("rb"):
        refuse_others_opened(os.getpid(), [chain])
        with secret.open("rb"), pytest.raises(RefusedError):
            refuse_others_opened(os.getpid(), [chain], besides=[Path("/none")])
    with image.open("rb"), pytest.raises(RefusedError, match=r"base\.raw"):
        refuse_others_opened(os.getpid(), [chain])


@pytest.mark.parametrize(
    "words", [["convert", "disk.qcow2", "new"], ["overlay", "flatten", "disk.qcow2"]]
)
def test_copy_has_nothing_of_a_file_put_there_as_it_begins(
    image: Path,
    secret: Path,
    imgtool_cli: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    def qemu_img(words: Any, **options: Any) -> None:
        exchange(image, secret)
        run_qemu_img(words, **options)

    monkeypatch.setattr(working, "qemu_img", qemu_img)
    folder = image.parent
    imgtool_cli(*(str(folder / word) if "." in word or word == "new" else word for word in words))
    for path in folder.iterdir():
        if not path.is_symlink():
            assert b"SSSS" not in path.read_bytes(), path


@pytest.mark.parametrize("command", ["convert", "flatten", "compact"])
def test_work_in_a_folder_of_others_gives_what_it_should(
    image: Path, imgtool_cli: Any, command: str
) -> None:
    subprocess.run(["qemu-io", "-c", "write -P 0x32 0 64k", image], check=True)
    new = image.with_name("new.qcow2")
    words = {
        "convert": ["convert", image, new],
        "flatten": ["overlay", "flatten", image],
        "compact": ["compact", image],
    }[command]
    done = imgtool_cli(*words)
    assert done.status == 0, done.err
    made = new if command == "convert" else image
    expected = b"2" * (64 << 10) + b"1" * (MIB - (64 << 10))
    out = image.with_name("out")
    subprocess.run(["qemu-img", "convert", "-O", "raw", made, out], check=True)
    assert out.read_bytes() == expected


def put_link(folder: Path, target: Path) -> int:
    """What the owner of the folder does to files that are being made in it; how many."""
    made = [path for path in folder.glob(".*.imgtool-*") if path.name[-8:].isalnum()]
    made = [path for path in made if not path.name.endswith("record") and not path.is_symlink()]
    for number, path in enumerate(made):
        path.rename(folder / f"aside{number}")
        path.symlink_to(target)
    return len(made)


@pytest.mark.parametrize(
    "words",
    [
        ["create", "new.qcow2", "1M"],
        ["create", "new.raw", "1M", "--to", "raw"],
        ["convert", "disk.qcow2", "new.qcow2"],
        ["convert", "disk.qcow2", "new.raw", "--to", "raw"],
        ["overlay", "create", "disk.qcow2", "new.qcow2"],
        ["overlay", "flatten", "disk.qcow2"],
        ["compact", "alone.raw", "--format", "raw"],
        ["compact", "kept.qcow2"],
    ],
    ids=" ".join,
)
def test_link_in_the_place_of_a_new_file_is_not_written_through(
    image: Path,
    secret: Path,
    imgtool_cli: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    folder, secret_before = image.parent, secret.read_bytes()
    (folder / "alone.raw").write_bytes(bytes(MIB))
    if "kept.qcow2" in words:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / words[-1], "1M"])
        subprocess.run(["qemu-img", "snapshot", "-c", "one", folder / words[-1]], check=True)
    links = []

    def qemu_img(given: Any, **options: Any) -> None:
        links.append(put_link(folder, secret))
        run_qemu_img(given, **options)

    def made_file(path: Path, *, write: bool = False) -> Any:
        links.append(put_link(folder, secret))
        return really_made_file(path, write=write)

    monkeypatch.setattr(working, "qemu_img", qemu_img)
    monkeypatch.setattr(compacting, "made_file", made_file)
    done = imgtool_cli(*(folder / word if "." in word else word for word in words))
    assert sum(links) >= 1
    assert done.status != 0
    assert secret.read_bytes() == secret_before


def test_an_overlay_to_write_to_is_not_made_through_a_link(
    image: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = secret.read_bytes()
    chain = open_chain(image)

    def qemu_img(given: Any, **options: Any) -> None:
        assert put_link(image.parent, secret) == 1
        run_qemu_img(given, **options)

    monkeypatch.setattr(transaction, "qemu_img", qemu_img)
    with pytest.raises(ImageError):
        transaction.overlay_on(chain, image.with_name(".disk.qcow2.imgtool-01234567"))
    assert secret.read_bytes() == before


@pytest.mark.parametrize(
    "words",
    [
        ["create", "new.qcow2", "1M"],
        ["create", "new.raw", "1M", "--to", "raw"],
        ["create", "new.vmdk", "1M", "--to", "vmdk"],
        ["create", "new.vdi", "1M", "--to", "vdi"],
        ["create", "new.vpc", "1M", "--to", "vpc"],
        ["create", "new.vhdx", "1M", "--to", "vhdx"],
        ["convert", "disk.qcow2", "new.raw", "--to", "raw"],
        ["convert", "disk.qcow2", "new.vmdk", "--to", "vmdk"],
        ["convert", "disk.qcow2", "new.vdi", "--to", "vdi"],
        ["convert", "disk.qcow2", "new.vpc", "--to", "vpc"],
        ["convert", "disk.qcow2", "new.vhdx", "--to", "vhdx"],
        ["convert", "disk.qcow2", "new.qcow2", "--compress"],
        ["overlay", "create", "disk.qcow2", "new.qcow2"],
    ],
    ids=" ".join,
)
def test_every_format_is_made_in_a_folder_of_others(
    image: Path, imgtool_cli: Any, words: list[str]
) -> None:
    done = imgtool_cli(*(image.with_name(word) if "." in word else word for word in words))
    assert done.status == 0, done.err
    (new,) = image.parent.glob("new.*")
    chain = open_chain(new)
    assert chain.active.virtual_size >= MIB
    assert content(chain)[:MIB] == (bytes(MIB) if words[0] == "create" else b"1" * MIB)


@pytest.mark.parametrize("words", [["overlay", "flatten", "disk.qcow2"], ["compact", "disk.qcow2"]])
@pytest.mark.parametrize("what", ["image", "new file"])
def test_image_alone_is_replaced_and_by_what_was_made_alone(
    image: Path,
    secret: Path,
    imgtool_cli: Any,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    what: str,
) -> None:
    """The owner of the folder exchanges one of the two after the proof."""
    secret.chmod(0o4755)
    real, before, old = working.replace, secret.read_bytes(), image.read_bytes()
    theirs = image.with_name("theirs")
    theirs.write_bytes(b"forged")
    theirs.chmod(0o644)

    def replace(temporary: Path, *arguments: Any) -> None:
        if what == "image":
            image.rename(image.with_name("aside"))
            image.symlink_to(secret)
        else:
            theirs.replace(temporary)
        real(temporary, *arguments)

    monkeypatch.setattr(working, "replace", replace)
    done = imgtool_cli(*(image.with_name(word) if "." in word else word for word in words))
    assert done.status == 4, done.err
    assert "exchanged" in done.err if what == "image" else "in the place" in done.err
    assert not secret.is_symlink() and secret.read_bytes() == before
    assert (image.with_name("aside") if what == "image" else image).read_bytes() == old
    for path in image.parent.iterdir():
        assert path.is_symlink() or not path.stat().st_mode & 0o4000, path


@pytest.mark.parametrize("words", [["overlay", "flatten", "link"], ["compact", "link"]])
def test_image_named_by_a_link_is_replaced_where_it_is(
    image: Path, tmp_path: Path, imgtool_cli: Any, words: list[str]
) -> None:
    link = tmp_path / "link"
    link.symlink_to(image)
    (tmp_path / "base.raw").symlink_to(image.with_name("base.raw"))
    before = image.stat().st_ino
    done = imgtool_cli(*(link if word == "link" else word for word in words))
    assert done.status == 0, done.err
    assert link.is_symlink() and image.stat().st_ino != before
    assert content(open_chain(link))[:MIB] == b"1" * MIB


def test_compacted_image_has_nothing_of_a_passing_file(
    image: Path, imgtool_cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With its snapshots it is copied by imgtool itself, as it is."""
    kept, other = image.with_name("kept.qcow2"), tmp_path / "other.qcow2"
    for path in (kept, other):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
        value = "0x53" if path == other else "0x31"
        subprocess.run(["qemu-io", "-c", f"write -P {value} 0 64k", path], check=True)
        subprocess.run(["qemu-img", "snapshot", "-c", "one", path], check=True)
    real = compacting._copy_used

    def copy_used(*arguments: Any) -> None:
        kept.rename(kept.with_name("aside"))
        kept.symlink_to(other)
        try:
            real(*arguments)
        finally:
            kept.unlink()
            kept.with_name("aside").rename(kept)

    monkeypatch.setattr(compacting, "_copy_used", copy_used)
    done = imgtool_cli("compact", kept)
    assert done.status == 4, done.err
    assert "exchanged" in done.err
    for path in image.parent.iterdir():
        assert b"SSSS" not in path.read_bytes(), path


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse"])
def test_image_of_several_files_is_read_without_special_rights(
    image: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """QEMU looks for its files beside the name that it is given."""
    path = image.with_name("disk.vmdk")
    words = ("create", "-q", "-f", "vmdk", "-o", f"subformat={kind}", path, "1M")
    subprocess.run(["qemu-img", *words], check=True)
    subprocess.run(["qemu-io", "-f", "vmdk", "-c", "write -P 0x31 0 64k", path], check=True)
    chain = open_chain(path)
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    with steady(chain) as seen:
        assert content(seen)[: 64 << 10] == b"1" * (64 << 10)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(RefusedError, match="exchange"), steady(chain):
        pass


def test_a_record_that_goes_takes_no_other_with_it(image: Path, tmp_path: Path) -> None:
    """By its name there is that of another image in another folder by now."""
    folder, ours = image.parent, tmp_path / "ours"
    ours.mkdir()
    with intent_log.open_record(image, create=True) as own:
        assert own is not None
        own.note(operation="resize")
        other = ours / own.path.name
        other.write_text("theirs")
        folder.rename(tmp_path / "aside")
        folder.symlink_to(ours)
        own.remove()
    assert other.read_text() == "theirs"


def test_a_record_changes_no_file_that_is_put_in_its_place(
    image: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for one and the making of it."""
    secret.chmod(0o600)
    real, path = os.open, intent_log.record_path(image)

    def put_there(name: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if name == path and flags & os.O_CREAT and not path.exists():
            path.hardlink_to(secret)
        return real(name, flags, *arguments, **named)

    monkeypatch.setattr(os, "open", put_there)
    with pytest.raises(RefusedError), intent_log.open_record(image, create=True):
        pass
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.read_bytes() == b"S" * MIB


def test_an_overlay_of_another_folder_keeps_its_times(image: Path, tmp_path: Path) -> None:
    """A link that was there when overlays were looked for."""
    base, other = image.with_name("base.raw"), tmp_path / "other.qcow2"
    words = ("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", other)
    subprocess.run(["qemu-img", *words], check=True)
    os.utime(other, (2, 2))
    os.chown(base, NOBODY, NOBODY)
    image.with_name("link.qcow2").symlink_to(other)
    os.utime(image, (2, 2))
    with ages.kept_younger(base):
        os.utime(base, (3, 3))
    assert other.stat().st_mtime == 2
    assert image.stat().st_mtime == 3  # which is of that folder


@needs_root
@pytest.mark.parametrize(
    ("what", "safe"),
    [("folder", True), ("image of another", True), ("folder link", False), ("link", False)],
)
def test_a_name_is_in_reach_where_one_on_the_way_to_it_is(
    tmp_path: Path, what: str, safe: bool
) -> None:
    """In a folder like /tmp each owner of a link can lead it elsewhere."""
    ours, sticky = tmp_path / "ours", tmp_path / "sticky"
    ours.mkdir()
    sticky.mkdir()
    sticky.chmod(0o1777)
    image = ours / "disk.raw"
    image.write_bytes(bytes(512))
    path = image
    if what == "image of another":
        os.chown(image, NOBODY, NOBODY)
    elif what == "folder link":
        path = sticky / "link" / "disk.raw"
        path.parent.symlink_to(ours)
        os.lchown(path.parent, NOBODY, NOBODY)
    elif what == "link":
        path = sticky / "disk.raw"
        path.symlink_to(image)
        os.lchown(path, NOBODY, NOBODY)
    assert is_name_out_of_reach(path) is safe
    assert is_out_of_reach(path) is (what == "folder")
