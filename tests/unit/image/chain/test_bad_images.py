"""Images that cannot be right are refused in seconds, in one line, before any appliance."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imgtool import cli
from imgtool.cli.command_table import app_with
from imgtool.engines.libguestfs.appliance import launch


@pytest.fixture(autouse=True)
def no_appliance(monkeypatch):
    def launched(*arguments, **options):
        raise AssertionError("an appliance was started")

    monkeypatch.setattr(launch, "launch_appliance", launched)


def run(capfd, *arguments) -> tuple[int, str]:
    started = time.monotonic()
    status = int(cli._run([str(argument) for argument in arguments]))
    assert time.monotonic() - started < 10
    err = capfd.readouterr().err
    assert err.startswith("imgtool: error: ")
    assert len(err.splitlines()) <= 2
    return status, err


def qemu_img(*arguments) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def test_missing_directory_empty_and_noise(capfd, tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "noise").write_bytes(os.urandom(1 << 20))
    for name in ("missing", "empty", "noise", "."):
        status, err = run(capfd, "ls", tmp_path / name, "/")
        assert status == 3, err
        assert str(tmp_path) in err


def test_a_broken_chain_names_the_file(capfd, tmp_path):
    qemu_img("create", "-f", "qcow2", tmp_path / "base.qcow2", "1M")
    qemu_img(
        "create", "-f", "qcow2", "-F", "qcow2", "-b", tmp_path / "base.qcow2", tmp_path / "o.qcow2"
    )
    (tmp_path / "base.qcow2").unlink()
    status, err = run(capfd, "cat", tmp_path / "o.qcow2", "/x")
    assert status == 3
    assert "base.qcow2" in err


@pytest.mark.parametrize(
    "backing", ['json:{"driver":"file","filename":"/etc/shadow"}', "nbd://127.0.0.1/x"]
)
def test_a_chain_to_a_pseudo_name_or_the_network_is_refused(capfd, tmp_path, backing):
    qemu_img("create", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, tmp_path / "o.qcow2", "1M")
    status, _ = run(capfd, "ls", tmp_path / "o.qcow2", "/")
    assert status == 4


def test_chain_leaves_its_folder_only_for_a_named_one(capfd, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    qemu_img("create", "-f", "qcow2", tmp_path / "a/base.qcow2", "1M")
    overlay = tmp_path / "b/o.qcow2"
    qemu_img("create", "-f", "qcow2", "-F", "qcow2", "-b", tmp_path / "a/base.qcow2", overlay)
    status, err = run(capfd, "partitions", overlay)
    assert status == 4
    assert "--backing-dir" in err
    assert int(cli._run(["partitions", str(overlay), "--backing-dir", str(tmp_path / "a")])) == 0


@pytest.mark.parametrize("name", ["nowhere", "image"])
def test_a_backing_folder_that_is_none_is_not_overlooked(name, tmp_path, capsys):
    (tmp_path / "image").write_bytes(b"")
    words = ["ls", "--backing-dir", str(tmp_path / name), str(tmp_path / "image"), "/"]
    assert int(cli._run(words)) == 2
    assert "'--backing-dir'" in capsys.readouterr().err


def test_a_locked_image_is_not_written_and_the_holder_is_named(capfd, tmp_path):
    image = tmp_path / "held.qcow2"
    qemu_img("create", "-f", "qcow2", image, "1M")
    (tmp_path / "file").touch()
    node = f"qcow2,node-name=d,file.driver=file,file.filename={image}"
    argv = ["qemu-storage-daemon", "--blockdev", node, "--pidfile", str(tmp_path / "pid")]
    held = subprocess.Popen(argv)
    try:
        deadline = time.monotonic() + 10
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        status, err = run(capfd, "copy-in", image, tmp_path / "file", "/")
        assert status == 4
        assert str(held.pid) in err
    finally:
        held.terminate()
        held.wait()


def test_usage_errors_are_status_2(capfd, tmp_path):
    for arguments in (
        ["frob"],
        ["ls"],
        ["ls", "x", "/", "--engine", "none"],
        ["copy-in", "x", "y"],
        ["copy-in", "x", "y", "/", "--owner", "alice:"],
        ["copy-in", "x", "y", "/", "--owner", "alice:root", "--group", "root"],
        ["copy-in", "x", "y", "/", "--mode", "rw"],
        ["df", "a", "b", "-A", "c"],
        ["df", "a", "-a", "b"],
    ):
        assert run(capfd, *arguments)[0] == 2


@pytest.mark.parametrize("command", [("info",), ("chain", "show"), ("partitions", "-o", "json")])
def test_an_output_that_has_no_room_is_the_hosts_fault(tmp_path, command):
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "imgtool", *command, image],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 6
    assert "cannot be written: no space left on device" in done.stderr
    assert "hint:" in done.stderr


def test_a_path_that_is_not_there_has_no_title(tmp_path, capfd):
    (tmp_path / "tree/one").mkdir(parents=True)
    (tmp_path / "tree/two").mkdir()
    (tmp_path / "tree/two/file").touch()
    image = tmp_path / "disk.raw"
    mke2fs = ["mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "tree", image, "8M"]
    env = {**os.environ, "PATH": "/usr/sbin:/sbin:/usr/bin"}
    subprocess.run(mke2fs, check=True, env=env, capture_output=True)
    words = ["ls", "-m", "/dev/sda", str(image), "/gone", "/one", "/gone", "/two"]
    with pytest.raises(SystemExit) as ended:
        app_with("ls")(words, standalone_mode=False)
    assert ended.value.code == 5
    out, err = capfd.readouterr()
    assert out == "/one:\n\n/two:\nfile\n"
    assert err.count("(/gone)") == 2


def test_ctrl_c_is_status_130_and_says_so():
    code = (
        "import os, signal, sys, imgtool.cli as cli, imgtool.cli.commands.images\n"
        "def wait(*a, **k): os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)\n"
        "import imgtool.opening; imgtool.opening.images_to_read = wait\n"
        "sys.argv = ['imgtool', 'info', '/nonexistent']; cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert done.returncode == 130
    assert done.stderr == "imgtool: error: interrupted\n"
