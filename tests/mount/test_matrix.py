"""Every filesystem, table, format and mechanism: the files are those that the engine reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mount.host import (
    as_the_engine_reads_it,
    good,
    mount_at,
    state_of,
    tree,
    without_times,
)
from tests.mount.images import FILESYSTEMS, FORMATS, TABLES, plant

COMBINATIONS = [
    (filesystem, table, format, via)
    for filesystem in FILESYSTEMS
    for table in TABLES
    for format in FORMATS
    for via in ("loop", "export")
    if via == "export" or format == "raw"
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The tree that was put in, for the filesystem that the direct engine does not read."""
    folder = tmp_path_factory.mktemp("planted")
    plant(folder)
    return tree(folder)


@pytest.mark.parametrize(("filesystem", "table", "format", "via"), COMBINATIONS)
def test_the_files_are_those_in_the_image(images, place, planted, filesystem, table, format, via):
    image = images.get(filesystem, table, format)
    before = state_of(image.files)
    good("mount", image.path, place, "--via", via, *image.chosen)
    mounted = mount_at(place)
    found = tree(place)
    good("umount", place)
    assert {"ro", "nosuid", "nodev", "noexec"} <= mounted.options
    assert mounted.type == filesystem
    if filesystem == "btrfs":
        assert without_times(planted).items() <= without_times(found).items()
        assert set(found) - set(planted) == {b"/inner", b"/inner/inside"}
    else:
        assert found == as_the_engine_reads_it(image.path, "-m", image.device)
        assert without_times(planted).items() <= without_times(found).items()
    assert state_of(image.files) == before
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("via", "options", "direct"), [("loop", "", "0"), ("export", "", "1"), ("export", "--rw", "0")]
)
def test_what_qemu_exports_is_not_cached_twice(images, place, tmp_path, via, options, direct):
    """Which would make reading slower; but QEMU may mix up what is written directly."""
    image = images.copy(images.get("ext4"), tmp_path)
    good("mount", image.path, place, "--via", via, *image.chosen, *options.split())
    device = Path(mount_at(place).source)
    flag = Path("/sys/block", device.name, "loop/dio").read_text().strip()
    good("umount", place)
    assert flag == direct
