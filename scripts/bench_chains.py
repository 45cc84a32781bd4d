"""What scripts/bench measures of chains: points of one compared, chains and forests shown."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from bench_cases import (
    DIRECT,
    IMGTOOL,
    NO_ENGINE,
    REPOSITORY,
    CannotMeasure,
    Case,
    Command,
    Peer,
    Place,
    finished,
    image,
    imgtool,
    line,
    put_overlay,
    say,
)

LINKS = 50
FOREST = 10_000
MERGED = 512 << 20

# Files of the guest that an overlay changes.
CHANGED = (
    *("adduser.conf", "bash.bashrc", "bindresvport.blacklist", "debconf.conf", "deluser.conf"),
    *("e2scrub.conf", "fstab", "gai.conf", "host.conf", "login.defs"),
)


def base(place: Place) -> str:
    """What the image stands on, as a word of a command."""
    return str(place.image.parent / "base.qcow2")


def make_changed(folder: Path) -> Path:
    """An overlay on a copy of the guest, with ten files changed."""
    say("changing ten files")
    printed = finished([str(REPOSITORY / "scripts/make-guests"), "lvm.qcow2"])
    below = shutil.copyfile(Path(printed.splitlines()[-1]) / "lvm.qcow2", folder / "base.qcow2")
    overlay = folder / "overlay.qcow2"
    put_overlay(below, overlay)
    changed = []
    for name in CHANGED:
        words = [str(IMGTOOL), "cat", str(below), f"/etc/{name}"]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
        if done.returncode != 0:
            raise CannotMeasure(f"the guest has no /etc/{name}")
        changed.append(folder / name)
        changed[-1].write_bytes(done.stdout + b"# changed\n")
    finished([str(IMGTOOL), "copy-in", str(overlay), *map(str, changed), "/etc"])
    return overlay


def make_links(folder: Path) -> Path:
    """A chain of LINKS images, a raw base below; the active image."""
    words = ["qemu-img", "create", "-q", "-f", "qcow2"]
    below = folder / "base.raw"
    finished(["qemu-img", "create", "-q", "-f", "raw", str(below), "1G"])
    for number in range(1, LINKS):
        overlay = folder / f"link-{number:02}.qcow2"
        finished([*words, "-F", below.suffix[1:], "-b", below.name, str(overlay)])
        below = overlay
    return below


def make_forest(folder: Path) -> Path:
    """FOREST overlays on one base, copies of one of which only the header was written."""
    base, first = folder / "base.raw", folder / "first.qcow2"
    finished(["qemu-img", "create", "-q", "-f", "raw", str(base), "1G"])
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, str(first)]
    finished(words)
    template = first.read_bytes()
    for number in range(FOREST - 2):
        with (folder / f"guest-{number:05}.qcow2").open("wb") as file:
            file.write(template[:4096])
            file.truncate(len(template))
    return folder


def virt_diff(*words: str) -> Command:
    """`virt-diff -a BASE -A OVERLAY WORDS...`."""
    return line("virt-diff", *words, "-a", base, "-A", image)


def make_merge(folder: Path) -> Path:
    """Two bases that differ, and an overlay on the first with MERGED bytes of its own."""
    for number, name in enumerate(("base", "other"), 1):
        words = [str(folder / f"{name}.qcow2")]
        finished(["qemu-img", "create", "-q", "-f", "qcow2", *words, "4G"])
        written = f"write -q -P {number} 0 {MERGED}"
        finished(["qemu-io", "-c", written, *words])
    overlay = folder / "overlay.qcow2"
    put_overlay(Path("base.qcow2"), overlay)
    for at in range(0, MERGED, 4 << 20):  # every other two mebibytes, and as much beyond the base
        for where in (at, MERGED + at):
            finished(["qemu-io", "-c", f"write -q -P 3 {where} 2M", str(overlay)])
    return overlay


def take_merge(place: Place) -> None:
    """Copies of the images, to be worked on."""
    for name in ("base.qcow2", "other.qcow2", "overlay.qcow2"):
        finished(["cp", "--sparse=always", str(place.image.parent / name), str(place.folder)])


def own(name: str) -> Callable[[Place], str]:
    """One of those copies."""
    return lambda place: str(place.folder / f"{name}.qcow2")


def work_case(name: str, words: Sequence[Callable[[Place], str]], bare: Command) -> Case:
    """A sub-command of `imgtool overlay` against the bare qemu-img: without guards and proof."""
    return Case(
        name,
        lambda place, engine: line(str(IMGTOOL), "overlay", name, *words)(place),
        (Peer("qemu-img", bare, 1.1),),
        engines=(NO_ENGINE,),
        prepare=take_merge,
        make_image=make_merge,
        needs_guest=False,
        silent=True,
        step=name,
    )


CHAIN_CASES = (
    work_case("commit", [own("overlay")], line("qemu-img", "commit", "-q", "-d", own("overlay"))),
    work_case(
        "rebase",
        [own("overlay"), own("other")],
        line("qemu-img", "rebase", "-q", "-F", "qcow2", "-b", own("other"), own("overlay")),
    ),
    work_case(
        "flatten",
        [own("overlay")],
        line("qemu-img", "convert", "-q", "-O", "qcow2", own("overlay"), own("new")),
    ),
    Case(
        "diff",
        imgtool("diff", "--against-base", image),
        (Peer("virt-diff", virt_diff(), direct=1 / 30, appliance=True),),
        engines=(DIRECT,),
        limits={DIRECT: 2.0},
        make_image=make_changed,
    ),
    Case(
        "diff-checksum",
        imgtool("diff", "--checksum", "md5", "--against-base", image),
        (Peer("virt-diff", virt_diff("--checksum=md5"), direct=1 / 30, appliance=True),),
        engines=(DIRECT,),
        make_image=make_changed,
        by_name=True,  # the peer takes minutes
    ),
    Case(
        "chain-show",
        lambda place, engine: [str(IMGTOOL), "chain", "show", str(place.image)],
        (Peer("qemu-img", line("qemu-img", "info", "--backing-chain", image), 1.0),),
        engines=(NO_ENGINE,),
        limits={NO_ENGINE: 0.5},
        make_image=make_links,
        needs_guest=False,
    ),
    Case(
        "chain-tree",
        lambda place, engine: [str(IMGTOOL), "chain", "tree", str(place.image)],
        engines=(NO_ENGINE,),
        limits={NO_ENGINE: 10.0},
        make_image=make_forest,
        needs_guest=False,
    ),
)
