"""Runs the examples of the documentation: each page in a folder of its own, with the guests that
it names in it, all its blocks of console one after the other in one shell.

    python -m tests.docs.examples [--write] PAGE...

says where a page is wrong; with --write what is printed now is written into it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.docs.varying import same
from tests.support.documentation import ROOT, Typed, blocks, name_of, pages, typed
from tests.support.guests import disks, guest

# Where the pages say that the images are.
SHOWN = "/srv"
_MARK = re.compile(r"\n?\x1e(\d+)\x1e\n")
_LONGEST = 600


def _copy(source: Path) -> Callable[[Path], None]:
    def make(target: Path) -> None:
        subprocess.run(
            ["cp", "--sparse=always", "--reflink=auto", "--no-preserve=all", source, target],
            check=True,
        )

    return make


def _tuesday(target: Path) -> None:
    """What the guest was on another day: an overlay with one file more in /etc."""
    _copy(guest("overlay1"))(target)
    names = ["-f", "qcow2", "-F", "qcow2", "-b", "guest.qcow2"]
    subprocess.run(["qemu-img", "rebase", "-u", *names, target], check=True)


# The images that pages may name, and what each is.
IMAGES: dict[str, Callable[[], Callable[[Path], None]]] = {
    "guest.qcow2": lambda: _copy(guest("lvm")),
    "tuesday.qcow2": lambda: _tuesday,
    "disk.raw": lambda: _copy(guest("plain")),
    "windows.qcow2": lambda: _copy(guest("windows")),
    "luks.qcow2": lambda: _copy(guest("luks")),
    "multiboot.qcow2": lambda: _copy(guest("multiboot")),
    "fedora.qcow2": lambda: _copy(guest("selinux")),
    "damaged.qcow2": lambda: _copy(guest("damaged")),
    "root.raw": lambda: _copy(disks("twodisk")[0]),
    "data.raw": lambda: _copy(disks("twodisk")[1]),
}


@dataclass
class Difference:
    """An example of a page that prints something else."""

    page: Path
    example: Typed
    printed: list[str]

    def __str__(self) -> str:
        written = "\n".join(self.example.output)
        printed = "\n".join(self.printed)
        return (
            f"{name_of(self.page)}, line {self.example.line}: $ {self.example.command}\n"
            f"--- written\n{written}\n--- printed\n{printed}\n"
        )


def examples(page: Path) -> list[Typed]:
    """The commands of a page that are run. A block of Python is one: the next has its output."""
    found: list[Typed] = []
    program = None
    for block in blocks(page):
        if program is not None and block.language == "text":
            run_it = f"python3 - <<'END'\n{program}\nEND"
            lines_above = run_it.count("\n")
            found.append(Typed(run_it, block.line - lines_above, block.text.splitlines()))
        program = block.text if block.language == "python" and block.not_run is None else None
        if block.language == "console" and block.not_run is None:
            found += typed(block)
    return found


def _prepare(folder: Path, page: Path) -> dict[str, str]:
    """Images and a PATH with this imgtool for the examples of a page."""
    source = "\n".join(one.command for one in examples(page))
    needed = [name for name in IMAGES if re.search(rf"(?<![\w.-]){re.escape(name)}\b", source)]
    if "tuesday.qcow2" in needed:
        needed.insert(0, "guest.qcow2")  # a base is older than its overlay
    for name in dict.fromkeys(needed):
        IMAGES[name]()(folder / name)
    programs = folder.with_name("bin")
    programs.mkdir()
    for name, words in (("imgtool", "-m imgtool"), ("python3", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} {words} "$@"\n')
        program.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("IMGTOOL_", "LC_"))}
    return kept | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "IMGTOOL_STATE_DIR": str(folder.with_name("state")),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
    }


def _has_namespaces() -> bool:
    probe = ["unshare", "--mount", "mount", "--bind", "/tmp", SHOWN]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def run(page: Path) -> Iterator[tuple[Typed, list[str]]]:
    """Each example of a page with the lines that it printed."""
    every = examples(page)
    with tempfile.TemporaryDirectory(prefix="examples-of-docs-") as base:
        folder = Path(base) / "srv"
        folder.mkdir()
        environment = _prepare(folder, page)
        script = "".join(
            f"printf '\\036%d\\036\\n' {number}\n{one.command}\n"
            for number, one in enumerate(every)
        )
        shell = ["bash", "--noprofile", "--norc", "-c", script]
        if _has_namespaces():  # then tables are as wide as their paths
            inside = 'mount --bind "$0" "$1" && cd "$1" && shift && exec "$@"'
            shell = ["unshare", "--mount", "sh", "-c", inside, str(folder), SHOWN, *shell]
        done = subprocess.run(
            shell,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_LONGEST,
            check=False,
        )
        told = done.stdout.decode(errors="replace").replace(str(folder), SHOWN)
    parts = _MARK.split("\n" + told)
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        yield every[int(number)], text.splitlines()


def differences(page: Path) -> list[Difference]:
    """The examples of a page that are wrong."""
    return [
        Difference(page, one, printed)
        for one, printed in run(page)
        if not same([line for line in one.output if line], [line for line in printed if line])
    ]


def write(wrong: list[Difference]) -> None:
    """Put what was printed into the page; three dots that still fit are not lost, since only what
    is wrong is written."""
    if not wrong:
        return
    page = wrong[0].page
    lines = page.read_text().splitlines()
    for one in reversed(wrong):
        first = one.example.line + one.example.command.count("\n")
        lines[first : first + len(one.example.output)] = one.printed
    page.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("pages", nargs="*", type=Path)
    wanted = parser.parse_args()
    failed = False
    for page in [path.resolve() for path in wanted.pages] or pages():
        wrong = differences(page) if examples(page) else []
        for one in wrong:
            print(one)
        if wanted.write:
            write(wrong)
        failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    assert shutil.which("qemu-img")
    main()
