"""What a qcow2 image is made of, times what is done to it: content, snapshots, bitmaps, names,
features, and what belongs to the file, before and after."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imgtool.image.chain.chain import open_chain
from imgtool.image.chain.holdings import Holdings
from imgtool.image.change.transaction import transaction
from tests.support.holding import MIB, contents, held, nothing_left, qemu_img, tables, write

FEATURES = {
    "usual": (),
    "old": ("compat=0.10",),
    "lazy": ("lazy_refcounts=on",),
    "extended": ("extended_l2=on", "cluster_size=16k"),
    "zstd": ("compression_type=zstd",),
    "small": ("cluster_size=512",),
    "large": ("cluster_size=2M",),
    "narrow": ("refcount_bits=8",),
    "wide": ("refcount_bits=64",),
}
# The others take as long again each, and differ less.
_ALWAYS = ("usual", "old", "extended")
EXTRAS = ("snapshots", "snapshots+bitmap", "bitmap", "vm-state", "compressed", "nothing")


@dataclass(frozen=True)
class Subject:
    """An image on a base, with an overlay on it, and what is in it before it is worked on."""

    image: Path
    extra: str
    holdings: Holdings
    contents: list[bytes]

    @property
    def has_bitmap(self) -> bool:
        return "bitmap" in self.extra

    @property
    def has_snapshots(self) -> bool:
        return "snapshots" in self.extra or self.extra == "vm-state"


def _saved_machine(image: Path) -> None:
    """A snapshot with the state of a machine, which has no devices."""
    argv = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    argv += ["-drive", f"file={image},if=none,id=d,format=qcow2", "-monitor", "stdio"]
    subprocess.run(
        argv, input=b"savevm machine\nquit\n", check=True, capture_output=True, timeout=60
    )


def _made(folder: Path, feature: str, extra: str) -> Path:
    base, image = folder / "base.qcow2", folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "6M")
    write(base, "write -P 1 0 3M")
    options = ",".join(FEATURES[feature])
    words = ["create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2"]
    qemu_img(*words, *(["-o", options] if options else []), image, "6M")
    write(image, "write -P 2 1M 2M")
    if extra == "compressed":
        write(image, "write -c -P 3 4M 2M")
    if "snapshots" in extra:
        qemu_img("snapshot", "-c", "one", image)
        if feature != "old":
            qemu_img("resize", "-q", image, "8M")
        write(image, "write -P 4 0 2M")
        qemu_img("snapshot", "-c", "two", image)
        write(image, "write -P 5 3M 1M")
    if extra == "vm-state":
        _saved_machine(image)
        write(image, "write -P 5 3M 1M")
    if "bitmap" in extra:
        qemu_img("bitmap", "--add", image, "since")
        write(image, "write -P 6 4M 300k")
    image.chmod(0o640)
    os.setxattr(image, "user.note", b"kept")
    return image


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}

    def template(feature: str, extra: str) -> Path:
        if (feature, extra) not in made:
            folder = tmp_path_factory.mktemp(f"{feature}-{extra}")
            _made(folder, feature, extra)
            made[feature, extra] = folder
        return made[feature, extra]

    return template


def snapshot_create(case: Subject, run: Callable[..., None]) -> None:
    run("snapshot", "create", case.image, "new")
    after = held(case.image)
    assert after.snapshots is not None and case.holdings.snapshots is not None
    assert after.snapshots[-1].name == b"new"
    assert replace(after, snapshots=after.snapshots[:-1]) == case.holdings
    assert contents(case.image) == [*case.contents, case.contents[0]]


def snapshot_delete(case: Subject, run: Callable[..., None]) -> None:
    if not case.holdings.snapshots:
        return
    first = case.holdings.snapshots[0]
    run("snapshot", "delete", case.image, first.name.decode())
    assert held(case.image) == case.holdings.without_snapshot((first.id or b"").decode())
    assert contents(case.image) == [case.contents[0], *case.contents[2:]]


def snapshot_revert(case: Subject, run: Callable[..., None]) -> None:
    if not case.holdings.snapshots:
        return
    first = case.holdings.snapshots[0]
    if case.has_bitmap:
        content = case.image.read_bytes()
        run("snapshot", "revert", case.image, first.name.decode(), "--save-as", "new", status=4)
        assert case.image.read_bytes() == content
        return
    run("snapshot", "revert", case.image, first.name.decode(), "--save-as", "new")
    after = held(case.image)
    assert after.snapshots is not None and after.virtual_size == first.disk_size
    assert after.snapshots[:-1] == case.holdings.snapshots
    was, *kept = case.contents
    assert contents(case.image) == [kept[0], *kept, was]


def grow(case: Subject, run: Callable[..., None]) -> None:
    if case.holdings.made[0] == 2 and case.has_snapshots:
        content = case.image.read_bytes()
        run("resize", case.image, "9M", status=4)
        assert case.image.read_bytes() == content
        return
    run("resize", case.image, "9M")
    assert held(case.image) == case.holdings.after_resize(9 * MIB)
    was, *kept = case.contents
    assert contents(case.image) == [was.ljust(9 * MIB, b"\0"), *kept]


def compact(case: Subject, run: Callable[..., None]) -> None:
    run("compact", case.image)
    assert held(case.image) == case.holdings and contents(case.image) == case.contents


def flatten(case: Subject, run: Callable[..., None]) -> None:
    if case.has_snapshots:
        content = case.image.read_bytes()
        run("overlay", "flatten", case.image, status=4)
        assert case.image.read_bytes() == content
        return
    run("overlay", "flatten", case.image)
    assert held(case.image) == case.holdings.on(None, None)
    assert contents(case.image) == case.contents


def rebase(case: Subject, run: Callable[..., None]) -> None:
    other = case.image.with_name("other.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", other, "6M")
    write(other, "write -P 7 2M 3M")
    if case.has_snapshots:
        content = case.image.read_bytes()
        run("overlay", "rebase", case.image, other, status=4)
        assert case.image.read_bytes() == content
        return
    run("overlay", "rebase", case.image, other)
    assert held(case.image) == case.holdings.on("other.qcow2", "qcow2")
    assert contents(case.image) == case.contents


def rebase_unsafe(case: Subject, run: Callable[..., None]) -> None:
    moved = case.image.with_name("moved.qcow2")
    case.image.with_name("base.qcow2").rename(moved)
    run("overlay", "rebase", "--unsafe", case.image, moved)
    assert held(case.image) == case.holdings.on("moved.qcow2", "qcow2")
    assert contents(case.image) == case.contents


def commit_into(case: Subject, run: Callable[..., None]) -> None:
    top = case.image.with_name("top.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", top)
    write(top, "write -P 8 5M 1M", "write -P 9 1M 64k")
    expected = contents(top)[0]
    run("overlay", "commit", top, "--remove")
    assert not top.exists() and held(case.image) == case.holdings
    assert contents(case.image) == [expected, *case.contents[1:]]


def commit_down(case: Subject, run: Callable[..., None]) -> None:
    base = case.image.with_name("base.qcow2")
    if case.has_snapshots:
        content = base.read_bytes()
        run("overlay", "commit", case.image, status=4)
        assert base.read_bytes() == content
        return
    run("overlay", "commit", case.image)
    assert held(case.image) == case.holdings and contents(case.image) == case.contents
    assert contents(base) == case.contents[:1]


def write_to(case: Subject, run: Callable[..., None]) -> None:
    chain = open_chain(case.image)
    with transaction([chain], notice=lambda line: None) as writing:
        write(writing.chains[0].active.path, "write -P 10 0 128k")
        writing.commit()
    assert held(case.image) == case.holdings
    expected = b"\n" * (128 << 10) + case.contents[0][128 << 10 :]
    assert contents(case.image) == [expected, *case.contents[1:]]


def _leak(image: Path) -> None:
    """QEMU itself leaves clusters that nothing uses, where it is killed while it writes."""
    argv = ["qemu-io", "-f", "qcow2", "-c", "write -P 11 5M 1M", "-c", "abort", str(image)]
    subprocess.run(argv, check=False, capture_output=True)


def repair_after_a_crash(case: Subject, run: Callable[..., None]) -> None:
    _leak(case.image)
    crashed, expected = held(case.image), contents(case.image)
    run("check", "--repair", "all", case.image)
    assert held(case.image) == crashed and contents(case.image) == expected
    assert crashed.snapshots == case.holdings.snapshots and tables(case.image) == {}


OPERATIONS = (
    *(snapshot_create, snapshot_delete, snapshot_revert, grow, compact, flatten, rebase),
    *(rebase_unsafe, commit_into, commit_down, write_to, repair_after_a_crash),
)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize(
    "feature",
    [name if name in _ALWAYS else pytest.param(name, marks=pytest.mark.long) for name in FEATURES],
)
def test_nothing_is_lost(feature, extra, templates, tmp_path, imgtool_cli):
    """Each operation on a copy of one image."""
    if feature == "old" and "bitmap" in extra:
        return  # that version has none
    template = templates(feature, extra)
    for operation in OPERATIONS:
        folder = tmp_path / operation.__name__
        shutil.copytree(template, folder, copy_function=shutil.copy2)
        image = folder / "disk.qcow2"
        os.utime(image)

        def run(*words: str | Path, status: int = 0) -> None:
            done = imgtool_cli(*words)
            assert done.status == status, f"{words}: {done.err}"

        case = Subject(image, extra, held(image), contents(image))
        try:
            operation(case, run)
            assert tables(image) == {}
        except AssertionError as error:
            raise AssertionError(f"{operation.__name__}: {error}") from error
        status = image.stat()
        assert stat.S_IMODE(status.st_mode) == 0o640 and os.getxattr(image, "user.note") == b"kept"
        assert nothing_left(folder)
        shutil.rmtree(folder)
