"""Overlays: made, committed, rebased, flattened; and what is refused, with what to do instead."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.info import probe
from imgtool.image.intent.intent_log import is_ours
from tests.support.records import left

SIZE = 4 << 20
NAMES = ["a:b, c", 'it\'s "q"', "new\nline", "-x", "json:ü"]


def qemu_img(*words: str | Path) -> bytes:
    return subprocess.run(["qemu-img", *words], check=True, capture_output=True).stdout


def write(image: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    argv: list[str | Path] = ["qemu-io", "-t", "writeback", "-f", "qcow2", *words, image.resolve()]
    subprocess.run(argv, check=True, capture_output=True)


def content(image: Path) -> bytes:
    argv = ["qemu-img", "dd", "-U", "-O", "raw", "bs=1M", f"if={open_chain(image).filename()}"]
    out = image.parent / "content"
    subprocess.run([*argv, f"of={out}"], check=True, capture_output=True)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


def info(image: Path) -> dict[str, object]:
    said: dict[str, object] = json.loads(qemu_img("info", "-U", "--output=json", image.resolve()))
    return said


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def nothing_left(folder: Path) -> bool:
    return not any(is_ours(path.name) for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base.qcow2 <- top.qcow2, and other.qcow2, with another content in each."""
    base, top, other = (tmp_path / f"{name}.qcow2" for name in ("base", "top", "other"))
    for image in (base, other):
        qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    write(base, "write -P 1 0 2M")
    write(other, "write -P 9 1M 2M")
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", top)
    write(top, "write -P 2 1M 64k", "write -z 512k 64k", "write -P 3 3M 64k")
    return tmp_path


def test_commit_rebase_and_flatten_give_the_same_content(folder, imgtool_cli):
    top, base, other = (folder / f"{name}.qcow2" for name in ("top", "base", "other"))
    expected = content(top)
    for name in ("rebased", "flat"):
        shutil.copy(top, folder / name)
    assert imgtool_cli("overlay", "rebase", folder / "rebased", other).status == 0
    assert imgtool_cli("overlay", "flatten", folder / "flat").status == 0
    (rebased := folder / "rebased").rename(folder / "r.qcow2")
    assert not rebased.exists()
    assert content(folder / "r.qcow2") == expected
    assert info(folder / "r.qcow2")["backing-filename"] == "other.qcow2"
    assert info(folder / "r.qcow2")["backing-filename-format"] == "qcow2"
    assert content(folder / "flat") == expected and "backing-filename" not in info(folder / "flat")
    done = imgtool_cli("overlay", "commit", top)
    assert done.status == 0, done.err
    assert content(base) == expected == content(top)
    assert top.stat().st_mtime_ns >= base.stat().st_mtime_ns
    assert nothing_left(folder)


@pytest.mark.parametrize("format", ["raw", "vmdk"])
def test_commit_to_another_format_grows_a_smaller_base(tmp_path, imgtool_cli, format):
    base, top = tmp_path / "base", tmp_path / "top"
    qemu_img("create", "-q", "-f", format, base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-F", format, "-b", "base", top, "2M")
    write(top, "write -P 7 1536k 64k")
    expected = content(top)
    done = imgtool_cli("overlay", "commit", top, "--remove")
    if format == "raw":
        assert done.status == 0, done.err
        assert base.read_bytes() == expected and not top.exists()
    else:  # QEMU cannot make one grow; then nothing was done
        assert done.status == 1 and "nothing had been written" in done.err
        assert content(top) == expected
    assert nothing_left(tmp_path)


def test_commit_to_a_larger_base_is_refused(folder, imgtool_cli):
    qemu_img("resize", "-q", "--shrink", folder / "top.qcow2", "1M")
    done = imgtool_cli("overlay", "commit", folder / "top.qcow2")
    assert done.status == 4 and "imgtool resize" in done.err
    assert imgtool_cli("resize", folder / "top.qcow2", str(SIZE), "--force", "is-base").status == 0
    assert imgtool_cli("overlay", "commit", folder / "top.qcow2").status == 0


def test_a_base_of_other_overlays_is_not_written_to(folder, imgtool_cli):
    top, base = folder / "top.qcow2", folder / "base.qcow2"
    before = content(top)
    done = imgtool_cli("overlay", "create", base, folder / "second.qcow2")
    assert done.status == 0
    for words in (
        ("overlay", "commit", top),
        ("resize", base, "8M"),
        ("snapshot", "revert", base, "x", "--discard"),
    ):
        refused = imgtool_cli(*words)
        assert refused.status == 4, refused.err
        assert "second.qcow2" in refused.err and "hint:" in refused.err
    assert content(top) == before
    assert imgtool_cli("overlay", "commit", top, "--force", "is-base").status == 0
    again = ("overlay", "commit", folder / "second.qcow2", "--remove")
    assert imgtool_cli(*again).status == 4
    forced = (*again, "--force", "is-base")
    refused = imgtool_cli(*forced)
    assert refused.status == 4 and "--force base-newer" in refused.err
    assert imgtool_cli(*forced, "--force", "base-newer").status == 0


def test_an_overlay_with_overlays_is_not_removed(folder, imgtool_cli):
    imgtool_cli("overlay", "create", folder / "top.qcow2", folder / "higher.qcow2")
    done = imgtool_cli("overlay", "commit", folder / "top.qcow2", "--remove")
    assert done.status == 4 and "higher.qcow2" in done.err and "without --remove" in done.err


@pytest.mark.parametrize("command", ["commit", "rebase", "flatten"])
def test_internal_snapshots_are_not_lost(folder, imgtool_cli, command):
    top = folder / "top.qcow2"
    qemu_img("snapshot", "-c", "mine", top)
    more = [folder / "other.qcow2"] if command == "rebase" else []
    before = everything(folder)
    done = imgtool_cli("overlay", command, top, *more)
    assert done.status == 4 and "mine" in done.err and "--force snapshots" in done.err
    assert everything(folder) == before


@pytest.mark.parametrize(
    "words",
    [
        ("overlay", "create", "base.qcow2", "new.qcow2", "--protect-base"),
        ("overlay", "commit", "top.qcow2", "--remove"),
        ("overlay", "rebase", "top.qcow2", "other.qcow2"),
        ("overlay", "rebase", "--unsafe", "--force", "other-base", "top.qcow2", "other.qcow2"),
        ("overlay", "flatten", "top.qcow2"),
        ("compact", "top.qcow2"),
    ],
    ids=" ".join,
)
def test_a_dry_run_changes_nothing(folder, imgtool_cli, monkeypatch, words):
    monkeypatch.chdir(folder)
    before = everything(folder)
    done = imgtool_cli(*words, "--dry-run")
    assert done.status == 0 and "would" in done.err
    assert everything(folder) == before


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_a_name(tmp_path, imgtool_cli, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    base, top = f"{name}.base", f"{name}.top"
    dashes = ["--"] if name.startswith("-") else []
    assert imgtool_cli("create", *dashes, base, "1M").status == 0
    assert imgtool_cli("overlay", "create", *dashes, base, top).status == 0
    write(tmp_path / top, "write -P 4 0 64k")
    expected = content(tmp_path / top)
    for command in ("snapshot create", "snapshot delete"):
        done = imgtool_cli(*command.split(), *dashes, top, "s")
        assert done.status == 0, done.err
    done = imgtool_cli("overlay", "rebase", *dashes, top, base)
    assert done.status == 0, done.err
    for command in ("compact", "overlay commit", "overlay flatten"):
        done = imgtool_cli(*command.split(), *dashes, top)
        assert done.status == 0, done.err
        assert content(tmp_path / top) == expected
    assert content(tmp_path / base) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([base, top])


def test_a_name_that_is_not_utf8_is_refused_in_words(folder, imgtool_cli):
    name = folder / os.fsdecode(b"\xff.qcow2")
    (folder / "base.qcow2").rename(name)
    done = imgtool_cli("overlay", "create", name, folder / "new.qcow2")
    assert done.status == 3 and "not UTF-8" in done.err
    assert not (folder / "new.qcow2").exists() and nothing_left(folder)


def test_a_folder_is_moved_as_a_whole(tmp_path, imgtool_cli):
    vm, sub = tmp_path / "vm", tmp_path / "vm" / "sub"
    sub.mkdir(parents=True)
    imgtool_cli("create", vm / "base", "1M")
    assert imgtool_cli("overlay", "create", vm / "base", vm / "beside").status == 0
    assert imgtool_cli("overlay", "create", vm / "base", sub / "below").status == 0
    vm.rename(tmp_path / "moved")
    assert info(tmp_path / "moved" / "beside")["backing-filename"] == "base"
    below = open_chain(tmp_path / "moved" / "sub" / "below", backing_dirs=[tmp_path / "moved"])
    assert below.base.path.samefile(tmp_path / "moved" / "base")
    outside = tmp_path / "outside"
    outside.mkdir()
    dirs = ("--backing-dir", tmp_path / "moved")
    assert imgtool_cli("overlay", "create", tmp_path / "moved" / "base", outside / "o").status == 0
    assert info(outside / "o")["backing-filename"] == str(tmp_path / "moved" / "base")
    assert imgtool_cli("overlay", "flatten", outside / "o").status == 4
    assert imgtool_cli("overlay", "commit", outside / "o", *dirs).status in (0, 4)


def test_images_through_links_are_the_images(folder, tmp_path, imgtool_cli):
    links = folder / "links"
    links.mkdir()
    (links / "vm").symlink_to(folder / "top.qcow2")
    expected = content(folder / "top.qcow2")
    done = imgtool_cli("overlay", "rebase", links / "vm", folder / "other.qcow2")
    assert done.status in (0, 3), done.err  # its relative base is not beside the link
    (links / "base.qcow2").symlink_to(folder / "base.qcow2")
    done = imgtool_cli("overlay", "rebase", links / "vm", folder / "other.qcow2")
    assert done.status == 0, done.err
    assert info(folder / "top.qcow2")["backing-filename"] == "other.qcow2"
    assert content(folder / "top.qcow2") == expected
    assert imgtool_cli("overlay", "flatten", folder / "top.qcow2").status == 0
    assert (links / "vm").is_symlink() and content(links / "vm") == expected


def test_flatten_keeps_what_is_not_content(folder, imgtool_cli):
    top = folder / "top.qcow2"
    os.setxattr(top, "user.note", b"kept")
    top.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(top, 1234, 4321)
    for image in (top, folder / "base.qcow2"):
        os.utime(image, ns=(10**18, 10**18))
    before = top.stat()
    assert imgtool_cli("overlay", "flatten", top).status == 0
    after = top.stat()
    assert after.st_ino != before.st_ino
    for kept in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
        assert getattr(after, kept) == getattr(before, kept), kept
    assert os.getxattr(top, "user.note") == b"kept"


@pytest.mark.parametrize("command", ["compact", "overlay flatten"])
def test_a_file_with_several_names_is_not_replaced_unasked(folder, imgtool_cli, command):
    top = folder / "top.qcow2"
    (folder / "other name").hardlink_to(top)
    done = imgtool_cli(*command.split(), top)
    assert done.status == 4 and "2 names" in done.err and "--force hard-links" in done.err
    assert imgtool_cli(*command.split(), top, "--force", "hard-links").status == 0


def test_a_protected_base_stays_as_it_is_for_root_too(folder, imgtool_cli):
    base, new = folder / "base.qcow2", folder / "new.qcow2"
    os.remove(folder / "top.qcow2")
    assert imgtool_cli("overlay", "create", base, new, "--protect-base").status == 0
    assert base.stat().st_mode & 0o222 == 0
    write(new, "write -P 5 0 64k")
    for words in (("overlay", "commit", new), ("compact", base), ("snapshot", "create", base, "s")):
        done = imgtool_cli(*words)
        assert done.status == 4 and "chmod u+w" in done.err, done.err
    base.chmod(0o644)
    assert imgtool_cli("overlay", "commit", new).status == 0


def test_protection_is_undone_where_the_overlay_cannot_be_made(folder, imgtool_cli, monkeypatch):
    from imgtool.errors import ImgtoolError
    from imgtool.image.change.plan import Work

    def fail(*arguments: object, **options: object) -> None:
        raise ImgtoolError("it cannot get its name")

    monkeypatch.setattr(Work, "place", fail)
    mode = (folder / "base.qcow2").stat().st_mode
    done = imgtool_cli("overlay", "create", folder / "base.qcow2", folder / "n", "--protect-base")
    assert done.status == 1
    assert (folder / "base.qcow2").stat().st_mode == mode
    assert not (folder / "n").exists() and nothing_left(folder)


@pytest.mark.parametrize("there", ["file", "directory", "dangling link"])
def test_nothing_is_overwritten(folder, imgtool_cli, there):
    new = folder / "new"
    {
        "file": lambda: new.write_bytes(b"x"),
        "directory": new.mkdir,
        "dangling link": lambda: new.symlink_to("nowhere"),
    }[there]()
    for words in (
        ("overlay", "create", folder / "base.qcow2", new),
        ("convert", folder / "base.qcow2", new),
        ("create", new, "1M"),
    ):
        done = imgtool_cli(*words)
        assert done.status == 4 and "exists already" in done.err
    assert nothing_left(folder)
    assert imgtool_cli("create", folder / "no" / "folder", "1M").status == 6


def test_rebase_refuses_what_would_make_garbage(folder, imgtool_cli):
    top, base, other = (folder / f"{name}.qcow2" for name in ("top", "base", "other"))
    before = everything(folder)
    higher = folder / "higher.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "top.qcow2", higher)
    before = everything(folder)
    for words, status, said in (
        (("--unsafe", top, other), 4, "higher.qcow2"),
        ((top, higher), 4, "loop"),
        (("--unsafe", top, higher), 4, "loop"),
        (("--unsafe", higher, other), 4, "another content"),
        (("--unsafe", other, base), 4, "stands on no image"),
        ((base, other), 3, "no overlay"),
        ((folder / "gone", base), 3, "no such file"),
        ((top, folder / "gone"), 3, "no such file"),
    ):
        done = imgtool_cli("overlay", "rebase", *words)
        assert done.status == status and said in done.err, done.err
    assert everything(folder) == before
    same = shutil.copy(base, folder / "moved.qcow2")
    os.remove(higher)
    assert imgtool_cli("overlay", "rebase", "--unsafe", top, same).status == 0
    base.unlink()
    os.rename(same, base)
    done = imgtool_cli("overlay", "rebase", "--unsafe", top, base)  # what it is for
    assert done.status == 0, done.err


def test_cut_off_commit_is_read_by_overlay_and_finished(folder, imgtool_cli):
    top, base = folder / "top.qcow2", folder / "base.qcow2"
    expected = content(top)
    left(base, of_overlay=top, operation="commit", overlay="top.qcow2", remove=False)
    write(base, "write -P 2 1M 4k")  # a part of it
    assert content(base) == expected
    assert imgtool_cli("chain", "check", base).err + imgtool_cli("chain", "check", base).text
    for words in (("overlay", "flatten", top), ("overlay", "rebase", top, folder / "other.qcow2")):
        done = imgtool_cli(*words, "--dry-run")
        assert done.status == 4 and "imgtool recover" in done.err
    os.rename(folder, moved := folder.with_name("moved"))
    done = imgtool_cli("recover", moved / "top.qcow2")
    assert done.status == 0 and "finished" in done.err
    assert content(moved / "base.qcow2") == expected == content(moved / "top.qcow2")
    assert nothing_left(moved)


def test_commit_says_that_its_overlay_is_gone(folder, imgtool_cli):
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    left(base, of_overlay=top, operation="commit", overlay="top.qcow2", remove=False)
    write(base, "write -P 2 1M 4k")  # a part of it
    os.rename(folder / "top.qcow2", folder / "away.qcow2")
    for words in (("info",), ("compact",), ("overlay", "flatten"), ("recover",)):
        done = imgtool_cli(*words, folder / "base.qcow2")
        assert done.status in (3, 4) and "top.qcow2" in done.err, (words, done.err)
    os.rename(folder / "away.qcow2", folder / "top.qcow2")
    assert imgtool_cli("recover", folder / "base.qcow2").status == 0


def test_image_that_changes_after_the_look_is_left_alone(folder):
    from imgtool.errors import RefusedError
    from imgtool.image.change.overlays import plan_flatten

    plan = plan_flatten(folder / "top.qcow2")
    write(folder / "base.qcow2", "write -P 8 0 64k")
    with pytest.raises(RefusedError, match="changed by somebody"):
        plan.run()
    assert nothing_left(folder)


def test_an_image_in_use_is_refused_with_the_process(folder, imgtool_cli):
    top = folder / "top.qcow2"
    argv = ["qemu-io", "-f", "qcow2", top]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"length\n")
        process.stdin.flush()
        process.stdout.readline()
        for words in (
            ("overlay", "commit", top),
            ("overlay", "flatten", top),
            ("overlay", "rebase", top, folder / "other.qcow2"),
            ("overlay", "create", top, folder / "new.qcow2"),
            ("compact", top),
            ("compact", folder / "base.qcow2"),  # which it has open, though only to read
            ("snapshot", "create", top, "s"),
            ("resize", top, "+1M"),
        ):
            done = imgtool_cli(*words)
            assert done.status == 4, (words, done.err)
            assert f"process {process.pid}" in done.err and "hint:" in done.err
        # A base that is only read can have another overlay.
        done = imgtool_cli("overlay", "create", folder / "base.qcow2", folder / "second.qcow2")
        assert done.status == 0, done.err
        process.stdin.close()


def test_guest_cannot_start_while_its_image_is_replaced(folder):
    from imgtool.image.locking.locks import block_writers

    top = folder / "top.qcow2"
    argv = ["qemu-io", "-f", "qcow2", "-c", "write 0 4k", top]
    with block_writers(open_chain(top)):
        done = subprocess.run(argv, check=False, capture_output=True)
        assert b"lock" in done.stderr + done.stdout
        qemu_img("convert", "-O", "raw", top, folder / "copy")
    assert subprocess.run(argv, check=True, capture_output=True).stderr == b""


def test_too_little_space_is_told_before_anything_is_done(folder, imgtool_cli, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    before = everything(folder)
    for words in (("commit",), ("flatten",), ("rebase", folder / "other.qcow2")):
        done = imgtool_cli("overlay", words[0], folder / "top.qcow2", *words[1:])
        assert done.status == 4 and "too little space" in done.err and "--force space" in done.err
    assert everything(folder) == before


def test_encrypted_images_and_data_files_are_refused(tmp_path, imgtool_cli):
    secret = ("--object", "secret,id=s,data=x")  # the old kind, which needs no second of hashing
    luks = tmp_path / "luks.qcow2"
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, luks, "1M")
    data = tmp_path / "data.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/d.raw", data, "1M")
    for image, said in ((luks, "encrypted"), (data, "another file")):
        for words in (("compact",), ("snapshot", "create"), ("overlay", "create")):
            more = ["new"] if len(words) > 1 else []
            if image == data and words[0] == "overlay":
                continue
            done = imgtool_cli(*words, image, *(tmp_path / word for word in more))
            assert done.status == 3 and said in done.err, (words, done.err)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ("overlay", "commit", "top.qcow2"),
        ("overlay", "rebase", "base.qcow2", "other.qcow2"),
        ("overlay", "rebase", "--unsafe", "base.qcow2", "other.qcow2"),
        ("resize", "base.qcow2", "8M", "--force", "is-base"),
        ("snapshot", "create", "base.qcow2", "new"),
        ("snapshot", "delete", "base.qcow2", "one"),
        ("snapshot", "revert", "base.qcow2", "one", "--discard", "--force", "is-base"),
        ("check", "--repair", "all", "base.qcow2"),
    ],
    ids=" ".join,
)
def test_a_file_with_other_names_is_not_written_to(folder, imgtool_cli, monkeypatch, words):
    """By the other name the record of work that is cut off would not be found."""
    monkeypatch.chdir(folder)
    if "rebase" in words:
        words = [word.replace("base.qcow2", "top.qcow2") for word in words]
    if words[0] == "snapshot":
        qemu_img("snapshot", "-c", "one", "base.qcow2")
        os.utime("top.qcow2")
    written = Path("top.qcow2" if "rebase" in words else "base.qcow2")
    Path("second name").hardlink_to(written)
    before = everything(folder)
    done = imgtool_cli(*words)
    assert done.status == 4 and "2 names (hard links)" in done.err, done.err
    assert everything(folder) == before
    shutil.copy2(written, "NEW")  # as the hint says
    Path("NEW").replace(written)
    done = imgtool_cli(*words)
    assert "hard links" not in done.err and done.status in (0, 4), done.err


def test_cut_off_commit_is_repeated_where_tables_lag(tmp_path, imgtool_cli):
    """A base with lazy refcounts, at which QEMU was killed; and somebody linked it since."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    options = ("-o", "lazy_refcounts=on")
    qemu_img("create", "-q", "-f", "qcow2", *options, base, str(SIZE))
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", top)
    write(top, "write -P 2 1M 2M")
    left(base, of_overlay=top, operation="commit", overlay="top.qcow2", remove=False, step="begun")
    argv = ["qemu-io", "-c", "write -P 2 1M 1M", "-c", "sigraise 9", base]
    subprocess.run(argv, check=False, capture_output=True)
    assert probe(base).dirty
    (tmp_path / "second name").hardlink_to(base)
    expected = content(top)
    done = imgtool_cli("overlay", "commit", top)
    assert done.status == 0, done.err
    assert content(base) == expected and nothing_left(tmp_path)
    assert not probe(base).dirty


def test_what_is_removed_is_the_overlay_and_not_a_link_to_it(folder, imgtool_cli):
    link = folder / "link"
    link.symlink_to("top.qcow2")
    expected = content(folder / "top.qcow2")
    done = imgtool_cli("overlay", "commit", "--remove", link)
    assert done.status == 0, done.err
    assert not (folder / "top.qcow2").exists() and link.is_symlink()
    assert content(folder / "base.qcow2") == expected


@pytest.mark.parametrize(
    "words",
    [
        ("overlay", "create", "b.raw", "new.qcow2", "--base-format", "raw"),
        ("overlay", "rebase", "top.qcow2", "b.raw"),
        ("overlay", "rebase", "--unsafe", "--force", "other-base", "top.qcow2", "b.raw"),
    ],
    ids=" ".join,
)
def test_base_of_a_cut_off_write_is_finished_before_it_is_named(
    folder, imgtool_cli, monkeypatch, words
):
    """What holds all of it until then is not what the overlay is put on."""
    monkeypatch.chdir(folder)
    base, pending = Path("b.raw").absolute(), Path(".b.raw.imgtool-0302af8d").absolute()
    base.write_bytes(bytes(SIZE))
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, pending)
    write(pending, "write -P 5 0 64k")
    facts = {"operation": "write", "id": "1", "images": [base.name], "overlay": pending.name}
    left(base, of_overlay=pending, **facts, format="raw", step="commit")
    refused = imgtool_cli(*words, "--dry-run")
    assert refused.status == 4 and "imgtool recover" in refused.err, refused.err
    done = imgtool_cli(*words)
    assert done.status == 0, done.err
    made = info(folder / ("new.qcow2" if "create" in words else "top.qcow2"))
    assert made["backing-filename"] == "b.raw"
    assert made["backing-filename-format"] == "raw"
    assert base.read_bytes()[: 64 << 10] == b"\5" * (64 << 10)
    assert nothing_left(folder)
