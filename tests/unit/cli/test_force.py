"""`--force REASON`: a refusal names the one guard that it gives up, and it gives up no other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imgtool.errors import Reason
from imgtool.image.locking.locks import in_use_for_writing
from tests.support.commands import Result

MIB = 1 << 20
Words = tuple[str, ...]


def qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)


def overlay(name: str, base: str) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, name)


def _is_base() -> Words:
    qemu_img("create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    overlay("top.qcow2", "base.qcow2")
    return ("resize", "base.qcow2", "8M")


def _snapshots() -> Words:
    _is_base()
    qemu_img("snapshot", "-c", "mine", "top.qcow2")
    return ("overlay", "flatten", "top.qcow2")


def _hard_links() -> Words:
    _is_base()
    Path("another").hardlink_to("base.qcow2")
    return ("compact", "base.qcow2")


def _shrink() -> Words:
    Path("disk.raw").write_bytes(b"x" * (8 * MIB))
    return ("resize", "disk.raw", "4M", "--format", "raw")


def _cut_partition() -> Words:
    Path("disk.raw").write_bytes(bytes(8 * MIB))
    table = b"label: dos\nstart=2048, size=8192, type=83\n"
    subprocess.run(["/sbin/sfdisk", "-q", "disk.raw"], input=table, check=True)
    return ("resize", "disk.raw", "4M")


def _other_base() -> Words:
    _is_base()
    qemu_img("create", "-q", "-f", "qcow2", "other.qcow2", "4M")
    subprocess.run(["qemu-io", "-c", "write -P 7 0 64k", "other.qcow2"], check=True)
    return ("overlay", "rebase", "--unsafe", "top.qcow2", "other.qcow2")


SITUATIONS: dict[Reason, Callable[[], Words]] = {
    Reason.IS_BASE: _is_base,
    Reason.SNAPSHOTS: _snapshots,
    Reason.HARD_LINKS: _hard_links,
    Reason.SHRINK: _shrink,
    Reason.CUT_PARTITION: _cut_partition,
    Reason.OTHER_BASE: _other_base,
}


def gives_up_one_guard(run: Callable[..., Result], words: Words, reason: Reason) -> None:
    """It is refused with this reason alone, and done where that is given, and no other."""
    refused = run(*words)
    assert refused.status == 4, refused.err
    named = re.findall(r"--force ([a-z-]+)", refused.err)
    assert named == [reason]
    others = [word for other in Reason if other is not reason for word in ("--force", other)]
    assert run(*words, *others).status == 4
    done = run(*words, "--force", reason)
    assert done.status == 0, done.err


@pytest.mark.parametrize("reason", SITUATIONS)
def test_a_refusal_names_what_gives_up_its_guard_alone(tmp_path, monkeypatch, imgtool_cli, reason):
    monkeypatch.chdir(tmp_path)
    gives_up_one_guard(imgtool_cli, SITUATIONS[reason](), reason)


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs loop devices"
)
def test_in_use_gives_up_devices_of_the_host(tmp_path, monkeypatch, imgtool_cli):
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "4M")
    attach = ["losetup", "--find", "--show", "disk.qcow2"]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        words = ("snapshot", "create", "disk.qcow2", "now")
        assert f"in use by the loop device {device}" in imgtool_cli(*words).err
        gives_up_one_guard(imgtool_cli, words, Reason.IN_USE)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert "now" in imgtool_cli("snapshot", "list", "disk.qcow2").text


def test_nothing_gives_up_the_locks_of_a_guest(tmp_path, monkeypatch, imgtool_cli):
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "disk.qcow2", "4M")
    every = [word for reason in Reason for word in ("--force", reason)]
    before = Path("disk.qcow2").read_bytes()
    argv = ["qemu-io", "-f", "qcow2", "-c", "sleep 60000", "disk.qcow2"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as guest:
        until = time.monotonic() + 60
        while in_use_for_writing("disk.qcow2") is None:
            assert guest.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        refused = imgtool_cli("snapshot", "create", "disk.qcow2", "now", *every)
        guest.kill()
    assert refused.status == 4 and f"in use by qemu-io, process {guest.pid}" in refused.err
    assert "--force" not in refused.err
    assert Path("disk.qcow2").read_bytes() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_owner_gives_up_that_the_file_keeps_its_owner():
    with tempfile.TemporaryDirectory(prefix="force-of-test-") as name:
        folder, user = Path(name), 12345
        image = folder / "disk.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", image, "4M")
        image.chmod(0o666)
        (folder / "state").mkdir()
        for path in (folder, folder / "state"):
            os.chown(path, user, user)

        def run(*words: str) -> Result:
            done = subprocess.run(
                [sys.executable, "-m", "imgtool", *words],
                env={**os.environ, "IMGTOOL_STATE_DIR": str(folder / "state")},
                capture_output=True,
                text=True,
                user=user,
                group=user,
                extra_groups=(),
            )
            return Result(done.returncode, done.stdout.encode(), done.stderr)

        if run("--version").status != 0:
            pytest.skip("another user cannot read this checkout")
        gives_up_one_guard(run, ("compact", str(image)), Reason.OWNER)
        assert image.stat().st_uid == user


def test_every_guard_has_its_own_reason(tmp_path, monkeypatch, imgtool_cli):
    monkeypatch.chdir(tmp_path)
    words = _snapshots()
    shutil.copy("top.qcow2", "second.qcow2")
    words = ("overlay", "commit", "top.qcow2")
    assert "--force is-base" in imgtool_cli(*words).err
    second = imgtool_cli(*words, "--force", "is-base")
    assert second.status == 4 and "--force snapshots" in second.err
    assert imgtool_cli(*words, "--force", "is-base", "--force", "snapshots").status == 0


@pytest.mark.parametrize("given", ["yes", "", "IS-BASE"])
def test_an_unknown_reason_is_a_usage_error_with_the_list(tmp_path, imgtool_cli, given):
    done = imgtool_cli("resize", tmp_path / "none", "1M", "--force", given)
    assert done.status == 2
    assert all(f"'{reason}'" in done.err for reason in Reason)


WRITING = (
    *("copy-in", "edit", "inject", "mount", "check", "convert", "resize", "compact", "recover"),
    *("overlay create", "overlay commit", "overlay rebase", "overlay flatten"),
    *("snapshot create", "snapshot revert", "snapshot delete"),
)


@pytest.mark.parametrize("command", WRITING)
def test_every_command_that_writes_has_it(imgtool_cli, command):
    assert "--force" in imgtool_cli(*command.split(), "--help").text
