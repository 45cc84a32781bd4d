"""The jobs that scripts/bench measures: their commands, their images and their targets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
IMGTOOL = REPOSITORY / ".venv/bin/imgtool"
LAYOUT = "/dev/debian-vg/root:/"  # the root of the guest, for guestfish

LIBGUESTFS = "libguestfs"
DIRECT = "direct"
NO_ENGINE = "none"

GIBIBYTE = 1 << 30
LARGE_SIZE = 4 * GIBIBYTE
LARGE_FILE_SIZE = 2 * GIBIBYTE
MANY = 100
FEW = MANY // 2
MILLION_DIRECTORIES = 1000
MILLION_FILES_EACH = 1000

# Of ext4: Documentation/filesystems/ext4/super.rst in Linux
SUPERBLOCK = 1024
INCOMPATIBLE_FEATURES = 0x60
NEEDS_RECOVERY = 0x4

DISSECT = ("dissect.target", "dissect.fve", "dissect.extfs", "dissect.xfs", "dissect.fat")


class CannotMeasure(Exception):
    """A command failed, or something that the bench needs is missing."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Place:
    """What one run may use: the image, and a folder of its own that is removed afterwards."""

    image: Path
    folder: Path

    @property
    def overlay(self) -> Path:
        """The image that is written to."""
        return self.folder / "overlay.qcow2"

    @property
    def source(self) -> Path:
        """The file that is copied in."""
        return self.folder / "copied-in"

    @property
    def destination(self) -> Path:
        """The folder that is copied out to."""
        return self.folder / "out"

    def overlays(self, count: int) -> list[Path]:
        """Images of a fleet, all on the same base."""
        return [self.folder / f"overlay-{number:03}.qcow2" for number in range(count)]


Command = Callable[[Place], list[str]]
OwnCommand = Callable[[Place, str], list[str]]  # with the engine
Word = str | Callable[[Place], str]


def nothing(place: Place) -> None:
    """No preparation."""


@dataclass(frozen=True)
class Peer:
    """Another program that does the job.

    imgtool may take `target` times as long as it does through libguestfs, `direct` times through
    the direct engine, and not less than `least` times.
    """

    name: str
    command: Command
    target: float | None = None
    direct: float | None = None
    least: float | None = None
    appliance: bool = False  # launches one of its own

    def target_of(self, engine: str) -> float | None:
        """The target of an engine."""
        return self.direct if engine == DIRECT else self.target


@dataclass(frozen=True)
class Case:
    """One job, done by imgtool with each of the engines and by the peers."""

    name: str
    imgtool: OwnCommand
    peers: tuple[Peer, ...] = ()
    engines: tuple[str, ...] = (LIBGUESTFS, DIRECT)
    limits: Mapping[str, float] = field(default_factory=dict)  # seconds, by engine
    memory_limit: float | None = None  # MB
    whole_tree: bool = False  # the memory is that of imgtool and of all that it started
    prepare: Callable[[Place], None] = nothing  # before each run, not measured
    finish: Callable[[Place], None] = nothing  # after each run, not measured
    make_image: Callable[[Path], Path] | None = None  # in this folder; the guest where None
    install: Callable[[], None] | None = None  # what only this case needs
    needs_guest: bool = True
    large: bool = False  # only where large images are asked for
    by_name: bool = False  # only where named
    once: bool = False  # one round
    silent: bool = False  # says nothing when it went well
    step: str | None = None  # imgtool's time is that of this step, as its last line says
    step_of_peers: bool = False  # so is theirs


def say(line: str) -> None:
    """Progress, on stderr."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


def finished(words: list[str]) -> str:
    """Run what is not measured; its stdout."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise CannotMeasure(f"{words[0]} failed with status {done.returncode}")
    return done.stdout


def system_program(name: str) -> str:
    """Debian keeps some outside the PATH of ordinary users."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    return shutil.which(name, path=path) or name


def cache_folder() -> Path:
    """What imgtool and its bench keep for the next time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imgtool"


# Preparations


def make_overlay(place: Place) -> None:
    """A fresh overlay on the guest, and a file to put into it."""
    place.source.write_bytes(os.urandom(64 << 10))
    put_overlay(place.image, place.overlay)


def make_overlays(place: Place) -> None:
    """Overlays on the guest, beside each other."""
    first, *others = place.overlays(MANY)
    put_overlay(place.image, first)
    for other in others:
        shutil.copyfile(first, other)


def put_overlay(base: Path, overlay: Path) -> None:
    """An empty overlay on this base."""
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"]
    finished([*words, "-b", str(base), str(overlay)])


def make_destination(place: Place) -> None:
    """An empty folder to copy out to."""
    place.destination.mkdir()


# Images


def make_ext4(image: Path, size: int, *options: str) -> None:
    """An ext4 image of this size."""
    with image.open("wb") as file:
        file.truncate(size)
    finished([system_program("mke2fs"), "-q", "-t", "ext4", "-m", "0", *options, str(image)])


def make_large(folder: Path, size: int = LARGE_SIZE) -> Path:
    """A raw ext4 image with one file of this size in it, /large, without a hole."""
    room = size * 5 // 2  # the file and the image, or the image and the copy taken out of it
    if shutil.disk_usage(folder).free < room:
        raise CannotMeasure(f"--large needs {room >> 30} GiB free in {folder}")
    say(f"making a file of {size >> 30} GiB")
    contents = folder / "contents"
    contents.mkdir()
    block = os.urandom(1 << 20)
    with (contents / "large").open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    image = folder / "large.raw"
    make_ext4(image, size + (512 << 20), "-d", str(contents))
    shutil.rmtree(contents)
    return image


def make_large_qcow2(folder: Path) -> Path:
    """The same as qcow2, with a smaller file."""
    raw = make_large(folder, LARGE_FILE_SIZE)
    image = raw.with_suffix(".qcow2")
    finished(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)])
    raw.unlink()
    return image


def make_million(folder: Path) -> Path:
    """An ext4 image with a million empty files; it takes a minute or two, so it is kept."""
    kept = cache_folder() / "bench" / "million-1.raw"
    if kept.exists():
        return kept
    say("making a million files")
    kept.parent.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    fast = memory if os.access(memory, os.W_OK) else folder
    made = folder / "million.raw"
    with tempfile.TemporaryDirectory(prefix="imgtool-bench-", dir=fast) as contents:
        for number in range(MILLION_DIRECTORIES):
            directory = Path(contents) / f"directory-{number:03}"
            directory.mkdir()
            for file in range(MILLION_FILES_EACH):
                os.mknod(f"{directory}/file-{file:03}", 0o644)
        inodes = MILLION_DIRECTORIES * (MILLION_FILES_EACH + 1) + 1000
        make_ext4(made, GIBIBYTE, "-N", str(inodes), "-d", contents)
    partial = kept.with_suffix(f".{os.getpid()}")  # the cache may be another filesystem
    try:
        finished(["cp", "--sparse=always", str(made), str(partial)])
        partial.replace(kept)
    finally:
        partial.unlink(missing_ok=True)
    made.unlink()
    return kept


def make_crashed(folder: Path) -> Path:
    """An ext4 image as a host that lost its power leaves it: taken while it was mounted."""
    if os.geteuid() != 0:
        raise CannotMeasure("only root can measure this: the image is copied while it is mounted")
    live, crashed, mountpoint = folder / "live.raw", folder / "crashed.raw", folder / "mounted"
    make_ext4(live, 256 << 20)
    mountpoint.mkdir()
    finished([system_program("mount"), "-o", "loop,rw", str(live), str(mountpoint)])
    try:
        for number in range(200):
            (mountpoint / f"file-{number:03}").write_bytes(os.urandom(4096))
        finished(["sync", "--file-system", str(mountpoint)])
        shutil.copyfile(live, crashed)
    finally:
        finished([system_program("umount"), str(mountpoint)])
    with crashed.open("rb") as file:
        file.seek(SUPERBLOCK + INCOMPATIBLE_FEATURES)
        features = int.from_bytes(file.read(4), "little")
    if not features & NEEDS_RECOVERY:
        raise CannotMeasure("the copy of the mounted image does not need its journal")
    return crashed


# Dissect, in an environment of its own


def dissect_folder() -> Path:
    """The virtual environment that dissect is installed in."""
    return cache_folder() / "bench-dissect"


def install_dissect() -> None:
    """Install dissect, once, from the package index that pip is set up for."""
    folder, wanted = dissect_folder(), "\n".join(DISSECT)
    installed = folder / "installed"
    if installed.exists() and installed.read_text() == wanted:
        return
    say("installing dissect")
    try:
        finished([sys.executable, "-m", "venv", "--clear", str(folder)])
        finished([str(folder / "bin/pip"), "install", "-qq", *DISSECT])
    except CannotMeasure as error:
        raise CannotMeasure(f"dissect cannot be installed: {error}", 6) from error
    installed.write_text(wanted)


# Commands


def image(place: Place) -> str:
    """The image, as a word of a command."""
    return str(place.image)


def overlay(place: Place) -> str:
    """The overlay, as a word of a command."""
    return str(place.overlay)


def source(place: Place) -> str:
    """What is copied in, as a word of a command."""
    return str(place.source)


def destination(place: Place) -> str:
    """Where to copy to, as a word of a command."""
    return str(place.destination)


def line(*words: Word) -> Command:
    """A command of these words."""
    return lambda place: [word if isinstance(word, str) else word(place) for word in words]


def imgtool(command: str, *words: Word) -> OwnCommand:
    """`imgtool COMMAND --engine ENGINE WORDS...`."""
    return lambda place, engine: [str(IMGTOOL), command, "--engine", engine, *line(*words)(place)]


def virt(
    program: str, *words: Word, target: float | None = None, direct: float | None = None
) -> Peer:
    """`PROGRAM -a IMAGE WORDS...`."""
    command = line(program, "-a", image, *words)
    return Peer(program, command, target, direct, appliance=True)


def dissect(*words: str, direct: float) -> Peer:
    """`target-fs -q IMAGE WORDS...`."""
    program = str(dissect_folder() / "bin/target-fs")
    return Peer("target-fs", line(program, "-q", image, *words), direct=direct)


def df_of_many(count: int) -> OwnCommand:
    """`imgtool df` of so many overlays, two at a time; their base is in another folder."""

    def command(place: Place, engine: str) -> list[str]:
        words = ("-P", "2", "--backing-dir", str(place.image.parent))
        return imgtool("df", *words, *map(str, place.overlays(count)))(place, engine)

    return command


def completion(place: Place, engine: str) -> list[str]:
    """What bash asks after `imgtool ls IMAGE /et<TAB>`."""
    return [
        *("env", "_IMGTOOL_COMPLETE=complete_bash", "COMP_CWORD=3"),
        *(f"COMP_WORDS=imgtool ls {place.image} /et", str(IMGTOOL)),
    ]


COLD = {DIRECT: 0.3}  # seconds
OVERVIEW = 1 / 80  # of the virt tools' time
MUCH_FASTER = 0.2  # than dissect

CASES = (
    Case(
        "help",
        lambda place, engine: [str(IMGTOOL), "--help"],
        engines=(NO_ENGINE,),
        limits={NO_ENGINE: 0.3},
        needs_guest=False,
    ),
    Case(
        "ls",
        imgtool("ls", image, "/etc"),
        (
            virt("virt-ls", "/etc", target=0.55, direct=OVERVIEW),
            Peer(
                "guestfish -m",
                line("guestfish", "--ro", "-a", image, "-m", LAYOUT, "ls", "/etc"),
                appliance=True,
            ),
        ),
        limits=COLD,
    ),
    Case(
        "cat",
        imgtool("cat", image, "/etc/passwd"),
        (virt("virt-cat", "/etc/passwd", target=0.55, direct=OVERVIEW),),
        limits=COLD,
    ),
    Case("df", imgtool("df", image), (virt("virt-df", target=0.55, direct=1 / 50),)),
    Case(
        "filesystems",
        imgtool("filesystems", "--all", "-l", image),
        (virt("virt-filesystems", "--all", "--long", target=0.55, direct=OVERVIEW),),
        limits=COLD,
    ),
    Case(
        "copy-in",
        # The overlay is not beside the guest, so the guest's folder is named.
        imgtool(
            *("copy-in", "--backing-dir", lambda place: str(place.image.parent)),
            *(overlay, source, "/root"),
        ),
        (
            Peer(
                "virt-copy-in",
                line("virt-copy-in", "-a", overlay, source, "/root"),
                0.55,
                appliance=True,
            ),
        ),
        engines=(LIBGUESTFS,),
        prepare=make_overlay,
        silent=True,
    ),
    Case(
        "copy-out",
        imgtool("copy-out", image, "/usr/share/doc", destination),
        (virt("virt-copy-out", "/usr/share/doc", destination, target=0.6, direct=0.1),),
        prepare=make_destination,
    ),
    Case(
        "ls-long",
        imgtool("ls", "-lR", image, "/usr"),
        (virt("virt-ls", "-lR", "/usr", direct=1 / 60),),
        engines=(DIRECT,),
    ),
    Case(
        "copy-out-usr",
        imgtool("copy-out", image, "/usr", destination),
        (virt("virt-copy-out", "/usr", destination, direct=0.1),),
        engines=(DIRECT,),
        prepare=make_destination,
    ),
    Case(
        "large-file",
        imgtool("copy-out", image, "/large", destination),
        (
            Peer(
                "qemu-img convert",
                line(
                    *("qemu-img", "convert", "-O", "raw", image),
                    lambda place: str(place.destination / "converted.raw"),
                ),
                direct=2.0,
            ),
        ),
        engines=(DIRECT,),
        prepare=make_destination,
        make_image=make_large_qcow2,
        needs_guest=False,
        large=True,
    ),
    Case(
        "dissect-ls",
        imgtool("ls", image, "/etc"),
        (dissect("ls", "/etc", direct=MUCH_FASTER),),
        engines=(DIRECT,),
        install=install_dissect,
        by_name=True,
    ),
    Case(
        "dissect-ls-long",
        imgtool("ls", "-lR", image, "/usr"),
        (dissect("ls", "-lR", "/usr", direct=MUCH_FASTER),),
        engines=(DIRECT,),
        install=install_dissect,
        by_name=True,
    ),
    Case(
        "many-images",
        df_of_many(MANY),
        engines=(DIRECT,),
        limits={DIRECT: 16.7},  # 6 images a second
        prepare=make_overlays,
    ),
    Case(
        "linear",
        df_of_many(FEW),
        (
            Peer(
                "twice as many",
                lambda place: df_of_many(MANY)(place, DIRECT),
                direct=0.6,
                least=0.4,
            ),
        ),
        engines=(DIRECT,),
        prepare=make_overlays,
    ),
    Case("completion", completion, engines=(DIRECT,), limits={DIRECT: 0.5}),
    Case(
        "crashed",
        imgtool("ls", image, "/"),
        engines=(DIRECT,),
        limits={DIRECT: 1.0},
        make_image=make_crashed,
        needs_guest=False,
    ),
    Case("memory-ls", imgtool("ls", "-R", image, "/"), memory_limit=150),
    Case(
        "memory-many-images",  # not measured with the time: looking takes some
        df_of_many(MANY),
        engines=(DIRECT,),
        memory_limit=400,
        whole_tree=True,
        prepare=make_overlays,
        once=True,
    ),
    Case(
        "memory-copy-out",
        imgtool("copy-out", image, "/large", destination),
        memory_limit=150,
        prepare=make_destination,
        make_image=make_large,
        needs_guest=False,
        large=True,
        once=True,
    ),
    Case(
        "memory-million",
        imgtool("ls", "-lR", "-o", "jsonl", image, "/"),
        engines=(DIRECT,),
        memory_limit=200,
        make_image=make_million,
        needs_guest=False,
        large=True,
        once=True,
    ),
)
