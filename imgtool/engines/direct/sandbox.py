"""The sandbox: one bwrap tree for the worker and its qemu-nbd, with nothing in it but the image.

No network, no other processes, no writable place but a small tmpfs, a user namespace of its own
also for root, no new privileges, system calls filtered, memory and CPU time limited; it dies with
imgtool. The files of the image's chain were opened by imgtool after the chain rule was checked, and
are the only files of the host in it besides the system's libraries, Python, and qemu-nbd.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool.engines.direct import seccomp
from imgtool.engines.direct.filesystem import NeedsAppliance
from imgtool.image.chain import Chain
from imgtool.image.host_file import node_driver
from imgtool.image.places import printable
from imgtool.image.snapshot_view import loaded
from imgtool.process import PIPE, Limits, find, spawn

if TYPE_CHECKING:
    import subprocess

# Of each process in the tree. QEMU's caches and threads need address space, not memory.
MEMORY = 4 << 30
CPU = 4 * 3600
SCRATCH = 256 << 20

_PYTHON = "/usr/bin/python3"
# Buffers of a megabyte come and go: memory that is given back each time costs more than the copy.
_MEMORY_KEPT = (
    "GLIBC_TUNABLES",
    "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=134217728",
)
_START = (
    "import sys; sys.path[:0] = {paths!r}; from imgtool.engines.direct.start import main; main()"
)


def _program(name: str) -> str:
    found = find(name)
    if found is None:
        raise NeedsAppliance(f"{name} is not installed")
    return os.path.realpath(found)


def _module_folders() -> dict[str, str]:
    """Where the worker's Python modules are on the host, and where it sees them."""
    here = Path(__file__).resolve().parents[2]
    folders = {str(here): "/python/own/imgtool"}
    for module in ("nbd", "google_crc32c"):
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise NeedsAppliance(f"the Python module {module} is not installed")
        package = Path(spec.origin).parent
        folder = os.path.realpath(package.parent if spec.submodule_search_locations else package)
        folders.setdefault(folder, f"/python/{len(folders)}")
    return folders


class Images:
    """The files of some chains, open, with the names that they have in the sandbox."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.names: dict[Path, str] = {}
        self.descriptors: dict[str, int] = {}
        self.owner: tuple[int, int] | None = None
        try:
            for chain in chains:
                if any(link.extents for link in chain.links):
                    raise NeedsAppliance("an image in several extents")
                if any(link.encrypted for link in chain.links):
                    raise NeedsAppliance("an image encrypted by QEMU")
                for path in (*chain.files, *([chain.header] if chain.header else [])):
                    self.add(path)
            self._choose_owner()
        except BaseException:
            self.close()
            raise

    def add(self, path: Path) -> None:
        """One more file."""
        if path in self.names:
            return
        if node_driver(path) != "file":
            raise NeedsAppliance(f"{printable(path)} is a block device")
        name = f"/images/{len(self.names)}"
        try:
            self.descriptors[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NeedsAppliance(f"{printable(path)}: {error.strerror}") from error
        self.names[path] = name

    def add_made(self, path: Path) -> None:
        """A file that another sandbox made: it has to be one, and nobody else's."""
        name = f"/images/{len(self.names)}"
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            descriptor = self.descriptors[name] = os.open(path, flags)
        except OSError as error:
            raise NeedsAppliance("the overlay with its journal is not one") from error
        about = os.fstat(descriptor)
        owner = self.owner[0] if self.owner else os.geteuid()
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1 or about.st_uid != owner:
            raise NeedsAppliance("the overlay with its journal is not one")
        self.names[path] = name

    def _choose_owner(self) -> None:
        """Root in a user namespace of its own may open only root's files and what all may read."""
        if os.geteuid() != 0:
            return
        stats = [os.fstat(descriptor) for descriptor in self.descriptors.values()]
        closed = [s for s in stats if s.st_uid != 0 and not s.st_mode & stat.S_IROTH]
        if not closed:
            return
        first = closed[0]
        if any(s.st_uid != first.st_uid and not s.st_mode & stat.S_IROTH for s in stats):
            raise NeedsAppliance("the image's files belong to several users")
        self.owner = (first.st_uid, first.st_gid)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()


def arguments(
    images: Images,
    filter_at: int,
    start: str,
    *,
    programs: Sequence[str],
    options: Sequence[str] = (),
    user: int = 65534,
) -> list[str]:
    """The command line of a sandbox with these images, programs of the host, and Python in it.

    `start` is the Python program, with `{paths}` where it says where modules are; `filter_at` the
    descriptor of the filter for system calls; `options` go to bwrap as they are; `user` is the
    UID and GID that programs see as theirs.
    """
    modules = _module_folders()
    words = [
        _program("bwrap"),
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--new-session",
        # bwrap itself would be in it, with its file as the host has it, in /proc/1/exe.
        "--as-pid-1",
    ]
    words += ["--cap-drop", "ALL", "--uid", str(user), "--gid", str(user), "--hostname", "sandbox"]
    words += ["--clearenv", "--setenv", "LC_ALL", "C.UTF-8", "--setenv", *_MEMORY_KEPT]
    words += ["--ro-bind", "/usr/lib", "/usr/lib", "--symlink", "usr/lib", "/lib"]
    for folder in ("lib64", "lib32"):
        if Path("/usr", folder).is_dir():
            words += ["--ro-bind", f"/usr/{folder}", f"/usr/{folder}"]
            words += ["--symlink", f"usr/{folder}", f"/{folder}"]
    words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    words += ["--ro-bind", _python(), _PYTHON]
    for name in programs:
        words += ["--ro-bind", _program(name), f"/usr/bin/{name}"]
    # /proc/sys would be writable for root: its kernel asks for the user, not for capabilities.
    words += ["--proc", "/proc", "--remount-ro", "/proc"]
    words += ["--dev", "/dev", *options, "--remount-ro", "/dev"]
    words += ["--size", "4096", "--tmpfs", "/dev/shm", "--remount-ro", "/dev/shm"]
    words += ["--size", str(SCRATCH), "--tmpfs", "/tmp"]
    for folder, seen in modules.items():
        words += ["--ro-bind", folder, seen]
    for name, descriptor in images.descriptors.items():
        words += ["--ro-bind", f"/proc/self/fd/{descriptor}", name]
    words += ["--remount-ro", "/", "--seccomp", str(filter_at), "--chdir", "/"]
    paths = ["/python/own", *(seen for seen in modules.values() if seen != "/python/own/imgtool")]
    return [*words, _PYTHON, "-I", "-S", "-B", "-c", start.format(paths=paths)]


def _python() -> str:
    """The interpreter itself, whichever links and environments lead to it."""
    found = os.path.realpath(sys.executable)
    if not str(os.__file__).startswith("/usr/lib/"):
        raise NeedsAppliance("this Python is not the system's own")
    return found


def server(
    chain: Chain,
    images: Images,
    *,
    snapshot: str | None = None,
    force_share: bool = False,
    overlay: Path | None = None,
) -> list[str]:
    """The command line that serves a chain inside the sandbox, on the socket that it inherits.

    An `overlay` of the images stands on the chain.
    """
    argv = ["/usr/bin/qemu-nbd", "--read-only", "--persistent", "--allocation-depth"]
    argv += loaded(chain, snapshot)
    node = chain.blockdev(force_share=force_share, names=images.names)
    if overlay is not None:
        file = {"driver": "file", "filename": images.names[overlay]}
        node = {"driver": "qcow2", "file": file, "backing": node, "read-only": True}
    return [*argv, "json:" + json.dumps(node, ensure_ascii=False)]


@contextlib.contextmanager
def program_filter(*, mounts: bool = False) -> Iterator[int]:
    """A descriptor of the filter for a whole sandbox, as bwrap takes it."""
    if not seccomp.supported():
        raise NeedsAppliance("the sandbox does not know this machine's system calls")
    descriptor = os.memfd_create("imgtool", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, seccomp.tree_filter(mounts=mounts))
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def sandboxed(
    images: Images, *, memory: int = MEMORY, shared: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The worker, running; requests go to its stdin, answers come from its stdout. It inherits the
    descriptors in `shared`.

    What it and QEMU say is in the pipe of its stderr, which holds no more than a pipe does.
    """
    with (
        program_filter() as descriptor,
        spawn(
            arguments(images, descriptor, _START, programs=("qemu-nbd",)),
            limits=Limits(memory=memory, cpu=CPU),
            pass_fds=[*images.descriptors.values(), descriptor, *shared],
            stdin=PIPE,
            stdout=PIPE,
            stderr=PIPE,
            owner=images.owner,
        ) as process,
    ):
        yield process
