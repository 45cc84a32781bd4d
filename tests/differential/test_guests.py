"""Whole guests through both engines: the same answers, field for field, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.guests import LVM_LAYOUT, disks, guest

pytestmark = pytest.mark.appliance

# What the direct engine reads, and where a checksum of everything is cheap enough to ask for.
SMALL = ("windows", "selinux", "data", "liar", "twodisk", "awkward", "damaged")
LARGE = ("lvm", "plain", "overlay2", "many", "awkward")
# What it refuses, and a word of the reason.
REFUSED = {
    "btrfs": "btrfs",
    "md": "md arrays",
    "nofs": "/dev/sda2",
}


def words(name: str) -> list[object]:
    """IMAGE, and -A for the guest's further disks."""
    if name.startswith("overlay"):  # two images of two guests, made together
        return [guest(name)]
    first, *others = disks(name)
    return [first, *(word for disk in others for word in ("-A", disk))]


@pytest.fixture
def both(imgtool_cli):
    """Run a command through both engines: their results, the direct one's first."""

    def run(*arguments):
        return [imgtool_cli(*arguments, "--engine", engine) for engine in ("direct", "libguestfs")]

    return run


def rows(result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.text.splitlines()]


@pytest.mark.parametrize("name", dict.fromkeys([*SMALL, *LARGE]))
def test_space_and_devices(both, name):
    for command in (["df"], ["filesystems", "--all"]):
        direct, appliance = both(*command, *words(name), "-o", "jsonl")
        assert direct.status == appliance.status, direct.err
        assert rows(direct) == rows(appliance)
        assert len(rows(direct)) >= 1


@pytest.mark.parametrize("name", SMALL)
def test_names_fields_and_checksums_are_all_the_same(both, name):
    # A file of 8 GiB, though nearly all hole, takes the emulated appliance minutes.
    paths = ["/names", "/links", "/special", "/hard", "/modes"] if name == "awkward" else ["/"]
    command = ["ls", *words(name), *paths, "-R", "--checksum", "sha256", "-o", "jsonl"]
    direct, appliance = both(*command)
    assert rows(direct) == rows(appliance)
    assert len(rows(direct)) >= 4
    assert direct.status == appliance.status, direct.err
    failed = [{line.rsplit("(", 1)[-1] for line in r.err.splitlines()} for r in (direct, appliance)]
    assert failed[0] == failed[1]


@pytest.mark.parametrize("name", LARGE)
def test_every_name_with_all_its_fields(both, name):
    direct, appliance = both("ls", *words(name), "/", "-R", "-o", "jsonl")
    assert direct.status == appliance.status == 0, direct.err
    assert rows(direct) == rows(appliance)
    assert len(rows(direct)) > 100


def test_contents_of_a_real_system(both):
    for folder in ("/etc", "/usr/bin", "/var/lib/dpkg"):
        command = ["ls", *words("lvm"), folder, "--checksum", "sha256", "-o", "jsonl"]
        direct, appliance = both(*command)
        assert direct.status == appliance.status == 0
        assert rows(direct) == rows(appliance)


def test_long_listings_for_people(both):
    direct, appliance = both("ls", *words("lvm"), "-l", "/", "/dev", "/home", "/nowhere")
    assert direct.out == appliance.out
    assert direct.status == appliance.status == 5


def tree(place: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a directory of the host, with what copy-out has to keep."""
    found: dict[str, tuple[object, ...]] = {}
    for path in place.rglob("*"):
        about = path.lstat()
        kept = (about.st_mode, about.st_uid, about.st_gid, about.st_mtime_ns, about.st_nlink)
        if path.is_symlink():
            content: object = path.readlink()
        else:
            content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(place))] = (kept, content)
    return found


@pytest.mark.parametrize(
    ("name", "folder"), [("lvm", "/etc"), ("awkward", "/names"), ("awkward", "/hard")]
)
def test_a_directory_copied_out(imgtool_cli, tmp_path, name, folder):
    trees = []
    for engine in ("direct", "libguestfs"):
        place = tmp_path / engine
        place.mkdir()
        result = imgtool_cli("copy-out", *words(name), folder, place, "--engine", engine)
        assert result.status == 0, result.err
        trees.append(tree(place))
    assert trees[0] == trees[1]
    assert len(trees[0]) > 3


def test_windows_paths_in_any_case(both):
    for path in ("c:\\users\\ALICE\\documents\\letter.txt", "C:\\Windows\\nothing"):
        direct, appliance = both("cat", *words("windows"), path)
        assert (direct.status, direct.out) == (appliance.status, appliance.out)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("lvm", ["--packages"]),
        ("plain", ["--packages"]),
        ("selinux", []),  # these are of Fedora's kind, and have no database of packages
        ("multiboot", []),
        ("twodisk", []),
    ],
)
def test_what_is_installed(both, name, more):
    direct, appliance = both("inspect", *words(name), *more, "-o", "json")
    assert direct.status == appliance.status == 0, direct.err
    assert json.loads(direct.text) == json.loads(appliance.text)


def test_lying_fstab_does_not_hide_the_system(both):
    direct, appliance = both("inspect", *words("liar"), "-o", "json")
    assert direct.status == appliance.status == 0
    assert json.loads(direct.text) == json.loads(appliance.text)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_certain_is_refused_with_the_reason(imgtool_cli, name):
    result = imgtool_cli("ls", *words(name), "/", "--engine", "direct")
    assert result.status == 3
    assert result.out == b""
    assert REFUSED[name] in result.err


def test_the_layout_of_a_real_system(imgtool_cli):
    result = imgtool_cli("filesystems", *words("lvm"), "--engine", "direct", "-o", "json")
    found = {row["mountpoint"]: row["device"] for row in json.loads(result.text)}
    found.pop(None)
    assert found == LVM_LAYOUT
