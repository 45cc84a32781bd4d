"""Images that others made: every reading command ends as it should, and is right where it is sure.

The long form fetches the test images in Debian's source packages, some 490:
`pytest -m long tests/corpus`; IMGTOOL_CORPUS=FOLDER:FOLDER adds folders of images of one's own.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.corpus.images import fetch, unpack
from tests.corpus.look import COMMANDS, Answer, look, misbehaviour, run


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """A small filesystem with a file in it."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"content" * 1000)
    image = tmp_path / "ext4.img"
    words = ("-q", "-F", "-t", "ext4", "-d", tree, image, "4M")
    subprocess.run(["mke2fs", *words], check=True, capture_output=True)
    return image


def test_sound_image_is_what_the_kernel_shows(ext4):
    looked = look(ext4)
    assert looked.defects == []
    assert {name: answer.status for name, answer in looked.answers.items()} == {
        **dict.fromkeys(COMMANDS, 0),
        "inspect": 5,
    }
    assert looked.compared is (os.geteuid() == 0)


def test_what_was_expected_and_is_not_there_is_told(ext4):
    wanted = {
        "info": {"status": 3},
        "df": {"rows": [{"type": "xfs"}]},
        "inspect": {"says": "no such words"},
    }
    commands = {name: COMMANDS[name] for name in wanted}
    told = look(ext4, expected=wanted, commands=commands).defects
    assert [line.partition(":")[0] for line in told] == ["info", "df", "inspect"]


def test_a_wrong_answer_given_as_sure_is_told(ext4, monkeypatch):
    """The checker itself: an answer that is not blkid's, and one that is not the kernel's."""
    import tests.corpus.look as looking

    really = looking.run

    def wrong(words):
        answer = really(words)
        out = answer.out.replace(b"ext4", b"ext3").replace(b"7000", b"7001")
        return answer.__class__(answer.status, out, answer.err, answer.seconds, answer.memory)

    monkeypatch.setattr(looking, "run", wrong)
    told = look(ext4, commands={name: COMMANDS[name] for name in ("filesystems", "ls")}).defects
    assert any(line.startswith("filesystems: blkid says ext4") for line in told)
    assert any("the kernel has (7000" in line for line in told) is (os.geteuid() == 0)


def test_an_image_that_a_command_changed_is_told(ext4, monkeypatch):
    import tests.corpus.look as looking

    def touching(words):
        ext4.touch()
        return Answer(0, b"", "", 0.1, 0)

    monkeypatch.setattr(looking, "run", touching)
    assert "the image has changed" in look(ext4, commands={"info": ("info",)}).defects


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Answer(0, b"a\nb\n", "imgtool: warning: odd\n  hint: so\n", 0.1, 1 << 20), None),
        (Answer(0, b"", "Traceback (most recent call last):\n", 0.1, 0), "a traceback"),
        (Answer(-9, b"x", "", 0.1, 0), "status -9"),
        (Answer(0, b"x", "", 11.0, 0), "it took 11.0 s"),
        (Answer(0, b"x", "", 0.1, 600 << 20), "it took 600 MiB"),
        (Answer(0, b"x", "", 6.0, 0, waited=30.0), None),
        (Answer(0, b"x", "", 0.3, 0, waited=12.0), "it was waited for 12.0 s"),
        (Answer(3, b"x", "imgtool: error: " + "x" * 2000, 0.1, 0), "it says too much"),
        (Answer(3, b"x", "mount: wrong fs type\n", 0.1, 0), "a line that is not imgtool's"),
        (Answer(0, b"\x1b[2J", "", 0.1, 0), "it steers the terminal"),
        (Answer(3, b"", "", 0.1, 0), "status 3 without a word"),
    ],
)
def test_what_no_command_may_do_is_told(answer, told):
    found = list(misbehaviour(answer))
    assert found == [] if told is None else found[0].startswith(told)


def test_image_in_an_archive_is_taken_out(tmp_path):
    image = tmp_path / "exfat.img"
    image.write_bytes(b"an image" * 1000)
    packed = tmp_path / "exfat.img.tar.xz"
    with tarfile.open(packed, "w:xz") as inner:
        inner.add(image, "exfat.img")
    source = tmp_path / "exfatprogs_1.orig.tar.xz"
    with tarfile.open(source, "w:xz") as outer:
        outer.add(packed, "exfatprogs-1/tests/bad/exfat.img.tar.xz")
    (found,) = unpack(source, tmp_path / "images")
    assert found == tmp_path / "images/exfatprogs/tests-bad-exfat.img"
    assert found.read_bytes() == image.read_bytes()


@pytest.mark.long
def test_every_image_of_the_source_packages(tmp_path_factory):
    """About half an hour."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "imgtool", "corpus")
    folder = tmp_path_factory.mktemp("images")
    images = [path for archive in fetch(cache) for path in unpack(archive, folder)]
    assert len(images) > 400
    named = filter(None, os.environ.get("IMGTOOL_CORPUS", "").split(":"))
    # By a process of its own: what a program took counts what the one had that started it.
    words = [sys.executable, "-m", "tests.corpus", folder, *named]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


def test_an_image_that_is_packed_too_is_unpacked_once(tmp_path: Path):
    content = os.urandom(1024)
    for name, data in (("image", content), ("image.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
    archive = tmp_path / "e2fsprogs_1.orig.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("image", "image.gz"):
            tar.add(tmp_path / name, f"e2fsprogs-1/tests/one/{name}")
    (image,) = unpack(archive, tmp_path / "unpacked")
    assert image.read_bytes() == content


def test_what_a_program_took_is_its_own(ext4):
    kept = bytearray(os.urandom(1) * (700 << 20))  # of the process that starts it
    answer = run(["info", str(ext4)])
    assert answer.status == 0 and 10 << 20 < answer.memory < 300 << 20 < len(kept)
