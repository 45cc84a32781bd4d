"""Guest paths complete in the shell: fast, harmless, and without a word when something is wrong."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import run_here

HOSTILE = ["$(touch pwned)", "`id`", "\\$(touch pwned)", "a;b", "a b", "*", "a'b", 'a"b', "a\nb"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completing")
    root = folder / "root"
    (root / "etc/apt").mkdir(parents=True)
    (root / "etc/apt/sources.list").touch()
    for name in ("hostname", "hosts"):
        (root / "etc" / name).touch()
    (root / "hostile").mkdir()
    for name in (*HOSTILE, "plain"):
        (root / "hostile" / name).touch()
    (root / "link").symlink_to("etc")
    path = folder / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", root, path],
        check=True,
        env=environment,
        capture_output=True,
    )
    return path


def completed(*words: object, shell: str = "bash") -> list[str]:
    line = [str(word) for word in ("imgtool", *words)]
    asked = {
        "_IMGTOOL_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
        "_TYPER_COMPLETE_ARGS": " ".join(line),
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in asked.items():
            patch.setenv(name, value)
        done = run_here()
    assert done.err == ""
    return done.text.split()


@pytest.mark.parametrize("command", ["ls", "cat", "copy-out"])
def test_a_guest_path_is_completed_from_the_image(image, command):
    assert completed(command, image, "/etc/ho") == ["/etc/hostname", "/etc/hosts"]


def test_only_choice_of_a_directory_shows_what_is_in_it(image):
    assert completed("ls", image, "/et") == ["/etc/apt/", "/etc/hostname", "/etc/hosts"]


def test_a_link_to_a_directory_is_one(image):
    assert "/link/" in completed("ls", image, "/")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_name_that_a_shell_would_read_is_never_offered(image, shell):
    said = " ".join(completed("ls", image, "/hostile/", shell=shell))
    assert re.findall(r"/hostile/[^\"]*", said) == ["/hostile/plain"]


def test_host_files_complete_where_they_are_meant(image, tmp_path):
    (tmp_path / "letter.txt").touch()
    assert completed("copy-in", image, tmp_path / "let") == [str(tmp_path / "letter.txt")]
    assert f"{tmp_path}/" in completed("copy-out", image, "/etc/hosts", tmp_path)


@pytest.mark.parametrize("bad", ["missing", "directory", "noise"])
def test_a_bad_image_says_nothing(tmp_path, bad):
    path = tmp_path / bad
    if bad == "directory":
        path.mkdir()
    elif bad == "noise":
        path.write_bytes(os.urandom(1 << 20))
    assert completed("ls", path, "/et") == []


def test_help_completes_the_names_of_commands():
    assert completed("help", "cha") == ["chain"]
    assert completed("help", "chain", "") == ["show", "tree", "check"]
    assert completed("help", "chain", "show", "") == []
