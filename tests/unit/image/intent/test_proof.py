"""What lies beside an image as a record of work is believed only where it proves who wrote it, and
then only of the very files that it was written of."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
from pathlib import Path

import pytest

from imgtool.errors import RefusedError
from imgtool.image.chain.chain import open_chain
from imgtool.image.change import transaction
from imgtool.image.change.recovery import recover
from imgtool.image.intent import proof
from imgtool.image.intent.intent_log import (
    load_intent,
    read_facts,
    record_path,
    temporary_path,
)
from imgtool.image.intent.marks import identity_of
from imgtool.transfer.staging import BadName, split
from tests.support.records import left, new_record, planted

MIB = 1 << 20


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def overlay_of(base: Path, new: Path, format: str = "qcow2") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", "-F", format, "-b", base, new)
    return new


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, str(MIB))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"mine" * (MIB // 4))
    return path


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a secret of its own for one test will be."""
    monkeypatch.setenv("IMGTOOL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(proof, "_known", {})
    return tmp_path / "state" / "record-secret"


# Records that somebody else put there


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("command", [("resize", "2M"), ("recover",), ("compact",)])
def test_planted_record_gets_no_overlay_removed_or_written(
    base, tmp_path, imgtool_cli, command, remove
):
    (tmp_path / "theirs").mkdir()
    victim = overlay_of(base, tmp_path / "theirs" / "victim.qcow2")
    step = {"step": "proved"} if remove else {}
    facts = {"operation": "commit", "overlay": str(victim), "remove": remove, **step}
    record = planted(base, of_overlay=victim, **facts)
    before = base.read_bytes(), victim.read_bytes()
    verb, *more = command
    done = imgtool_cli(verb, base, *more)
    assert done.status == 4, done.err
    what = f"it would remove {victim}" if remove else f"it would write what {victim} holds"
    assert what in done.err and "--force unproved" in done.err and "--keep" in done.err
    forced = imgtool_cli("recover", base, "--force", "unproved")  # but not in another folder
    assert forced.status == 4 and f"--backing-dir {victim.parent}" in forced.err
    assert (base.read_bytes(), victim.read_bytes()) == before and record.exists()
    # What the hints promise.
    assert imgtool_cli("recover", base, "--keep").status == 0
    assert (base.read_bytes(), victim.read_bytes()) == before and not record.exists()
    planted(base, of_overlay=victim, **facts)
    words = ("--force", "unproved", "--backing-dir", victim.parent)
    assert imgtool_cli("recover", base, *words).status == 0
    assert victim.exists() is not remove


def test_a_planted_record_cannot_show_another_disk(disk, tmp_path, imgtool_cli):
    neighbour = tmp_path / "neighbour.raw"
    neighbour.write_bytes(b"secret" * 100_000)
    path = overlay_of(disk, disk.with_name(f".{disk.name}.imgtool-12345678"), "raw")
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", neighbour, path)
    planted(disk, of_overlay=path, operation="commit", overlay=path.name)
    for status, command, *options in ((4, "info"), (4, "info", "--format", "raw"), (0, "check")):
        done = imgtool_cli(command, disk, *options)
        assert b"secret" not in done.out
        assert done.status == status, done.err


def test_planted_record_gets_no_raw_disk_repaired_as_qcow2(disk, base, imgtool_cli):
    disk.write_bytes(base.read_bytes())
    before = disk.read_bytes()
    planted(disk, operation="resize", format="qcow2", noted={})
    assert imgtool_cli("recover", disk).status == 4
    assert imgtool_cli("resize", disk, "2M", "--format", "raw").status == 4
    assert disk.read_bytes() == before


@pytest.mark.parametrize(
    "facts",
    [
        {"operation": "commit", "overlay": "half \ud800"},
        {"operation": "write", "step": "commit", "overlay": "\ud800", "images": ["\ud800"]},
        {
            "operation": "write",
            "step": "ready",
            "overlay": "x",
            "images": ["\ud800"],
            "id": "\ud800",
        },
        {"operation": "compact", "temporary": "\ud800"},
        {"operation": "\ud800"},
        {"operation": "revert", "to": "\ud800", "saved": "\ud800"},
    ],
    ids=ascii,
)
@pytest.mark.parametrize("put", [left, planted])
def test_half_a_character_in_a_record_is_refused_in_words(disk, imgtool_cli, facts, put):
    put(disk, **{**facts, "noted": {}})
    before = disk.read_bytes()
    done = imgtool_cli("recover", disk)
    assert done.status == 4 and "internal" not in done.err, done.err
    imgtool_cli("info", disk)
    done = imgtool_cli("recover", disk, "--keep")
    assert done.status == 0, done.err
    assert disk.read_bytes() == before and not record_path(disk).exists()


def test_no_record_makes_a_message_long(disk, imgtool_cli):
    for facts in (
        {"operation": "commit", "overlay": "x" * 100_000},
        {"operation": "compact", "temporary": "x" * 100_000},
        {"operation": "x" * 100_000},
        {"operation": "revert", "to": "x" * 100_000, "saved": "y" * 100_000},
        {"operation": "write", "step": "ready", "images": ["x" * 100_000], "overlay": "x"},
    ):
        for put in (planted, left):
            put(disk, **facts, noted={})
            done = imgtool_cli("recover", disk)
            assert done.status in (3, 4) and len(done.err) < 2000, facts["operation"][:20]


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:-1], lines[-1].replace('"b"', '"c"')],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[2], lines[1]],
        lambda lines: [*lines, '{"overlay": "x"}\n'],
        lambda lines: [*lines, lines[-1]],
    ],
    ids=["changed", "first missing", "other order", "added", "repeated"],
)
def test_a_record_that_somebody_changed_proves_nothing(disk, change):
    with new_record(disk) as record:
        for step in ("a", "aa", "b"):
            record.note(operation="resize", step=step)
    written = load_intent(disk)
    assert written is not None and written.proved
    path = record_path(disk)
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    written = load_intent(disk)
    assert written is not None and not written.proved


# Other files than those that it was written of


@pytest.mark.parametrize("operation", ["resize", "snapshot create", "revert", "commit", "compact"])
def test_record_of_another_image_is_refused_by_every_operation(base, imgtool_cli, operation):
    """Put beside an image by copying a folder, or an older image put at its name."""
    top = overlay_of(base, base.with_name("top.qcow2"))
    made = temporary_path(base)
    made.write_bytes(b"all of the new one")
    facts = {"to": "1", "saved": "s", "overlay": top.name, "remove": True, "temporary": made.name}
    left(base, of_overlay=top, operation=operation, step="proved", made=identity_of(made), **facts)
    older = base.read_bytes()
    base.rename(base.with_name("away.qcow2"))
    base.write_bytes(older)
    done = imgtool_cli("recover", base)
    assert done.status == 4 and "--force copy" in done.err and "--keep" in done.err, done.err
    assert base.read_bytes() == older and top.exists() and made.exists()
    done = imgtool_cli("recover", base, "--keep")
    assert done.status == 0 and top.exists()
    kept = [path for path in base.parent.iterdir() if b"the new one" in path.read_bytes()]
    assert len(kept) == 1, done.err


def test_inode_given_to_the_next_file_is_another_file(tmp_path):
    image = Path.cwd() / f".imgtool-test-{os.getpid()}"  # not in memory, which has no generations
    numbers = set()
    try:
        for _ in range(8):
            image.write_bytes(b"x")
            numbers.add(tuple(identity_of(image)))
            image.unlink()
    finally:
        image.unlink(missing_ok=True)
    if len(next(iter(numbers))) == 1:
        pytest.skip("this file system has no generations")
    assert len(numbers) == 8


def test_what_is_not_the_file_that_was_made_is_not_removed(disk):
    made = temporary_path(disk)
    made.write_bytes(b"half")
    left(disk, operation="compact", temporary=made.name, made=identity_of(made))
    made.rename(made.with_name("moved"))
    made.write_bytes(b"precious")
    assert "it stays" in str(recover(disk))
    assert made.read_bytes() == b"precious" and not record_path(disk).exists()


def test_a_format_that_is_given_is_not_overridden_by_a_record(base, imgtool_cli):
    top = overlay_of(base, base.with_name("top.qcow2"))
    left(base, of_overlay=top, operation="commit", overlay=top.name, noted={})
    left(base, of_overlay=top, operation="commit", overlay=top.name, step="begun")
    assert len(open_chain(base, format="qcow2").links) == 2
    with pytest.raises(RefusedError, match="as qcow2, not as raw") as caught:
        open_chain(base, format="raw")
    assert "leave --format out" in str(caught.value.hint)


def test_write_in_another_format_than_the_cut_off_is_refused(disk, imgtool_cli):
    what = disk.with_name("what")
    what.write_bytes(b"what")
    left(disk, operation="resize", format="raw")
    done = imgtool_cli("copy-in", disk, what, "/", "--format", "qcow2")
    assert done.status == 4
    assert "it was being written to as raw, not as qcow2, when that was interrupted" in done.err
    assert record_path(disk).exists()
    record_path(disk).unlink()
    with transaction.transaction([open_chain(disk, format="raw")], notice=lambda line: None):
        facts = read_facts(disk)
    assert (facts["operation"], facts["format"]) == ("write", "raw")


# The secret


def test_secret_is_made_on_first_use_for_its_owner_alone(secret, disk):
    assert load_intent(disk) is None and not secret.exists()
    left(disk, operation="resize")
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in secret.parent.iterdir()] == ["record-secret"]
    assert secret.read_bytes().hex() not in record_path(disk).read_text()
    written = load_intent(disk)
    assert written is not None and written.proved


def test_a_secret_whose_maker_was_killed_is_used(secret, disk, monkeypatch):
    left(disk, operation="resize")
    secret.with_name("record-secret.0123abcd").hardlink_to(secret)  # its name until it was whole
    monkeypatch.setattr(proof, "_known", {})
    written = load_intent(disk)
    assert written is not None and written.proved
    assert [path.name for path in secret.parent.iterdir()] == ["record-secret"]


def test_a_lost_secret_leaves_a_way_out(secret, disk, imgtool_cli, monkeypatch):
    left(disk, operation="resize", format="raw", noted={})
    secret.unlink()
    monkeypatch.setattr(proof, "_known", {})
    done = imgtool_cli("recover", disk)
    assert done.status == 4 and "before its secret was lost" in done.err
    done = imgtool_cli("recover", disk, "--force", "unproved")
    assert done.status == 0 and f"to do: have QEMU repair the tables of {disk}" in done.err
    assert not record_path(disk).exists()


@pytest.mark.parametrize("wrong", ["readable by others", "short", "a link", "two names"])
def test_a_secret_that_others_may_know_is_not_used(secret, disk, monkeypatch, wrong):
    left(disk, operation="resize")
    if wrong == "readable by others":
        secret.chmod(0o644)
    elif wrong == "short":
        secret.write_bytes(b"short")
    elif wrong == "a link":
        secret.rename(secret.with_name("other"))
        secret.symlink_to("other")
    else:
        secret.with_name("other").hardlink_to(secret)
    monkeypatch.setattr(proof, "_known", {})
    written = load_intent(disk)
    assert written is not None and not written.proved


def test_where_no_secret_can_be_made_the_work_goes_on(secret, disk, imgtool_cli):
    secret.parent.write_bytes(b"no folder")
    assert imgtool_cli("resize", disk, "2M", "--format", "raw").status == 0
    assert disk.stat().st_size == 2 * MIB and not record_path(disk).exists()


def test_another_home_is_the_same_user(monkeypatch):
    monkeypatch.delenv("IMGTOOL_STATE_DIR")
    found = set()
    for home in ("/nowhere", "/root", None):
        if home is None:
            monkeypatch.delenv("HOME")
        else:
            monkeypatch.setenv("HOME", home)
        found.add(proof.state_folder())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert proof.state_folder() is None
    monkeypatch.setattr(
        pwd, "getpwuid", lambda uid: pwd.struct_passwd(["u", "x", uid, 1, "", "/h", ""])
    )
    assert proof.state_folder() == Path("/h/.local/state/imgtool")
    assert len(found) == 1


# What comes out of a guest


@pytest.mark.parametrize(
    "path",
    [
        b".disk.raw.imgtool-record",
        b"folder/.disk.raw.imgtool-0123abcd",
        b".imgtool-0123456789ab/file",  # what copy-out would remove the next time
        b".\xff.imgtool-record",
    ],
)
def test_name_that_imgtool_takes_as_its_own_stays_in_the_guest(path):
    with pytest.raises(BadName, match="for its own"):
        split(path)


def test_names_that_only_look_similar_come_out():
    for path in (b"imgtool-record", b"x.imgtool-1", b".imgtool", b".imgtool.conf"):
        assert split(path) == (path,)


def test_a_record_is_json_for_who_looks_at_it(disk):
    left(disk, operation="resize")
    assert [json.loads(line)["operation"] for line in record_path(disk).open()] == ["resize"]
