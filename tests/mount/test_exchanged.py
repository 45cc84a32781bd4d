"""Images in a folder that others may write to: what was looked at is what is mounted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from imgtool.mount import mounting
from tests.mount.host import here, state_of, tree
from tests.mount.images import Image, Images


def in_open_folder(images: Images, folder: Path, format: str) -> Image:
    made = images.copy(images.get("ext4", "gpt", format), folder)
    folder.chmod(0o777)
    return made


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("via", "format", "options"),
    [
        ("loop", "raw", ()),
        ("export", "raw", ()),
        ("export", "qcow2", ()),
        ("export", "chain", ()),
        ("export", "qcow2", ("--rw",)),
    ],
)
def test_it_is_mounted_as_elsewhere(images, place, theirs, via, format, options):
    here("mount", images.get("ext4").path, place, "--via", "loop", *images.get("ext4").chosen)
    expected = tree(place)
    here("umount", place)
    image = in_open_folder(images, theirs, format)
    before = state_of(image.files)
    here("mount", image.path, place, "--via", via, *image.chosen, *options)
    found = tree(place)
    if options:
        (place / "new").write_text("written")
    here("umount", place)
    assert found == expected
    if not options:
        assert state_of(image.files) == before
        return
    here("mount", image.path, place, "--via", via, *image.chosen)
    assert (place / "new").read_text() == "written"
    here("umount", place)


@pytest.mark.parametrize(("via", "format"), [("loop", "raw"), ("export", "qcow2")])
def test_an_image_that_is_exchanged_meanwhile_is_not_mounted(
    images, place, theirs, tmp_path, monkeypatch, via, format
):
    image = in_open_folder(images, theirs, format)
    secret = tmp_path / "secret"
    shutil.copy(image.path, secret)
    real = mounting._start

    def exchanged(*given: Any) -> object:
        if not image.path.is_symlink():
            image.path.rename(theirs / "aside")
            image.path.symlink_to(secret)
        return real(*given)

    monkeypatch.setattr(mounting, "_start", exchanged)
    words = ("mount", image.path, place, "--via", via, *image.chosen)
    if via == "loop":
        with pytest.raises(AssertionError, match=r"status 4.*was exchanged"):
            here(*words)
    else:  # QEMU was given a descriptor: it shows what was looked at
        here(*words)
        here("umount", place)
    assert not any(place.iterdir())
