"""The sandbox: the worker and its qemu-nbd, with nothing but the image, in one of two ways.

NAMESPACES is one bwrap tree: no network, no other processes, no files of the host but the system's
libraries, Python, qemu-nbd and the image, no writable place but a small tmpfs, a user namespace of
its own. LANDLOCK is for hosts and containers where none can be made: the same files and no others
can be opened, none to write, and the calls that would reach a network or another process are
refused. What it does not hide is which other files there are, and what stat(2) says of them, the
host's name, and its own environment.

In both, rights are given up for good, root becomes another user, system calls are filtered, memory,
threads and CPU time are limited, and it dies with imgtool. The files of the image's chain were
opened by imgtool after the chain rule was checked.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from imgtool.engines.direct.parent import identity, scratch
from imgtool.engines.direct.wire import landlock, syscalls
from imgtool.engines.direct.wire.frames import READY
from imgtool.engines.direct.wire.refusals import (
    NoSandbox,
    NotInstalled,
    SandboxFailed,
    Unsupported,
)
from imgtool.errors import ImageError, RefusedError
from imgtool.host.process import PIPE, Limits, TimeoutExpired, find, spawn
from imgtool.host.system_packages import binding_fix, install_program
from imgtool.image.chain.chain import Chain
from imgtool.image.chain.snapshot_view import snapshot_option
from imgtool.image.locking.host_file import node_driver
from imgtool.text import printable

if TYPE_CHECKING:
    import subprocess

# Of each process in the tree. QEMU's caches and threads need address space, not memory.
MEMORY = 4 << 30
CPU = 4 * 3600
_MOMENT = 10.0  # seconds

_PYTHON = "/usr/bin/python3"
_SETTINGS = {
    "LC_ALL": "C.UTF-8",
    # Buffers of a megabyte come and go: memory that is given back each time costs more than the
    # copy. No addresses are set aside for each of QEMU's threads: they count as memory.
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=134217728:glibc.malloc.arena_max=1",
}
_START = "import sys; sys.path[:0] = {paths!r}; from {module} import main; main()"
_ENTER = (
    "import sys; sys.path[:0] = {paths!r}; "
    "from imgtool.engines.direct.worker.confinement import enter; enter(**{given!r})\n"
)
_CRC = "google_crc32c"
# What the programs of sandboxes import that is not imgtool's, and Debian's package of it.
_MODULES = {"nbd": "python3-libnbd", _CRC: "python3-crc32c", "_ped": "python3-parted"}
_OF_WORKER = ("nbd", _CRC)
# Of imgtool's own modules those that run confined, and what they import: a test knows which.
CONFINED = (
    *("__init__.py", "errors.py", "formats"),
    *(f"host/{name}.py" for name in ("__init__", "interrupt", "libc", "process")),
    "host/system_packages.py",
    *(f"guest/{name}.py" for name in ("__init__", "blocks", "model")),
    *(f"guest/{name}.py" for name in ("operating_system", "packages")),
    *("engines/__init__.py", "engines/direct/__init__.py", "engines/direct/wire"),
    *("engines/direct/worker", "engines/direct/replay"),
    *("engines/parted/__init__.py", "engines/parted/confined"),
)
# The program that loads libraries has the name that is in every program.
_LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")


class Kind(enum.Enum):
    """How a sandbox is closed; the value is what the user is told."""

    NAMESPACES = "namespaces"
    LANDLOCK = "Landlock"


def _program(name: str) -> str:
    found = find(name)
    if found is None:
        raise NotInstalled(f"{name} is not installed ({install_program(name)})")
    return os.path.realpath(found)


def _package() -> Path:
    return Path(__file__).resolve().parents[3]


def _checksums() -> str:
    """The module with CRC-32C, of two that will do; that of PyPI is the faster one."""
    return "google_crc32c" if find_spec("google_crc32c") else "crc32c"


def _module_folders(modules: Sequence[str]) -> list[str]:
    """Where modules that are not imgtool's are on the host."""
    folders: list[str] = []
    for name in modules:
        module, debian = _checksums() if name == _CRC else name, _MODULES[name]
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            fix = binding_fix(debian)
            raise NotInstalled(f"the Python module {module} is not installed ({fix})")
        package = Path(spec.origin).parent
        folder = os.path.realpath(package.parent if spec.submodule_search_locations else package)
        if folder not in folders:
            folders.append(folder)
    return folders


class Images:
    """The files of some chains, open, with the names that they have in the sandbox."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.descriptors: dict[Path, int] = {}
        self.user = identity.spare_user()
        try:
            for chain in chains:
                if parts := max(len(link.extents) for link in chain.links):
                    where = "a file" if parts == 1 else f"{parts} files"
                    raise Unsupported(f"a VMDK whose data are in {where} of their own")
                if any(link.encrypted for link in chain.links):
                    raise Unsupported("an image encrypted by QEMU")
                for path in (*chain.files, *([chain.header] if chain.header else [])):
                    self.add(path, chain)
        except BaseException:
            self.close()
            raise

    def add(self, path: Path, chain: Chain) -> None:
        """One more file, of a chain: the very one that was looked at."""
        if path in self.descriptors:
            return
        if node_driver(path) != "file":
            raise Unsupported(f"{printable(path)} is a block device")
        try:
            with chain.open_file(path) as file:
                self.descriptors[path] = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 0)
        except RefusedError:
            raise
        except (ImageError, OSError) as error:
            reason = error.message if isinstance(error, ImageError) else error.strerror
            raise Unsupported(f"{printable(path)}: {reason}") from error

    def add_made(self, path: Path) -> None:
        """A file that another sandbox made: it has to be one, and nobody else's."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            descriptor = self.descriptors[path] = os.open(path, flags)
        except OSError as error:
            raise Unsupported("the overlay with its journal is not one") from error
        about = os.fstat(descriptor)
        owner = os.geteuid() if self.user is None else self.user
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1 or about.st_uid != owner:
            raise Unsupported("the overlay with its journal is not one")

    def names(self, kind: Kind = Kind.NAMESPACES) -> dict[Path, str]:
        """The names that the files have in a sandbox of this kind."""
        if kind is Kind.LANDLOCK:
            return {path: f"/proc/self/fd/{number}" for path, number in self.descriptors.items()}
        return {path: f"/images/{number}" for number, path in enumerate(self.descriptors)}

    def close(self) -> None:
        """Close the files."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()


def _python() -> str:
    """The interpreter itself, whichever links and environments lead to it."""
    found = os.path.realpath(sys.executable)
    if not str(os.__file__).startswith("/usr/lib/"):
        raise Unsupported("this Python is not the system's own")
    return found


@contextlib.contextmanager
def in_namespaces(
    images: Images,
    *,
    programs: Sequence[str],
    modules: Sequence[str] = _OF_WORKER,
    options: Sequence[str] = (),
    rights: Sequence[str] = (),
    user: int = 65534,
) -> Iterator[tuple[list[str], list[str], list[int]]]:
    """The command line of a bwrap tree with these images and programs of the host in it, up to the
    Python that it starts; the folders in which that finds modules; the descriptors that it takes.

    `options` and `rights` (capabilities) are bwrap's. Programs see `user` as theirs; those of root
    are root in a user namespace that has all users, and may become another one.
    """
    words = [
        _bwrap(),
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
        "--unshare-cgroup-try",
        "--die-with-parent",
        "--new-session",
        "--as-pid-1",  # else bwrap itself would be in it, with its file as the host has it
    ]
    words += ["--cap-drop", "ALL", "--hostname", "sandbox", "--clearenv"]
    words += [word for setting in _SETTINGS.items() for word in ("--setenv", *setting)]
    words += ["--ro-bind", "/usr/lib", "/usr/lib", "--symlink", "usr/lib", "/lib"]
    for folder in ("lib64", "lib32"):
        if Path("/usr", folder).is_dir():
            words += ["--ro-bind", f"/usr/{folder}", f"/usr/{folder}"]
            words += ["--symlink", f"usr/{folder}", f"/{folder}"]
    words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    words += ["--ro-bind", _python(), _PYTHON]
    for name in programs:
        words += ["--ro-bind", _program(name), f"/usr/bin/{name}"]
    # No /proc: containers let none be mounted, and nothing needs it.
    words += ["--tmpfs", "/dev", "--dev-bind", "/dev/null", "/dev/null", *options]
    words += ["--remount-ro", "/dev"]
    words += ["--perms", "1777", "--size", str(scratch.LIMIT), "--tmpfs", "/tmp"]
    for name in CONFINED:
        words += ["--ro-bind", str(_package() / name), f"/python/own/imgtool/{name}"]
    folders = {folder: f"/python/{place}" for place, folder in enumerate(_module_folders(modules))}
    for folder, seen in folders.items():
        words += ["--ro-bind", folder, seen]
    names = images.names()
    for path, descriptor in images.descriptors.items():
        words += ["--ro-bind", f"/proc/self/fd/{descriptor}", names[path]]
    words += ["--remount-ro", "/", "--chdir", "/"]
    with contextlib.ExitStack() as stack:
        taken = list(images.descriptors.values())
        if images.user is None:
            words += ["--unshare-user", "--uid", str(user), "--gid", str(user)]
        else:
            taken.append(stack.enter_context(identity.user_namespace()))
            words += ["--userns", str(taken[-1])]
            rights = (*rights, "CAP_SETUID", "CAP_SETGID", "CAP_DAC_READ_SEARCH")
        words += [word for right in rights for word in ("--cap-add", right)]
        yield [*words, _PYTHON], ["/python/own", *folders.values()], taken


def _bwrap() -> str:
    try:
        return _program("bwrap")
    except Unsupported as error:
        raise NoSandbox(str(error)) from error


def _with_landlock(
    programs: Sequence[str], modules: Sequence[str]
) -> tuple[list[str], list[str], dict[str, int]]:
    """The command line of a Python that shuts itself in, up to its options; the folders in which
    it finds modules; what may be opened, which are the files that a bwrap tree would have.
    """
    settings = [f"{name}={value}" for name, value in _SETTINGS.items()]
    folders = _module_folders(modules)
    paths = {"/etc/ld.so.cache": landlock.READ, os.devnull: landlock.READ | landlock.WRITE}
    confined = [_package() / name for name in CONFINED]
    paths[str(_package())] = landlock.LIST
    paths |= {str(path): landlock.READ for path in confined if path.is_file()}
    own_folders = (str(path) for path in confined if path.is_dir())
    for folder in ("/usr/lib", "/usr/lib64", "/usr/lib32", *own_folders, *folders):
        paths[folder] = landlock.READ | landlock.LIST
    for program in (*map(_program, programs), *_LOADERS):
        paths[program] = landlock.READ | landlock.RUN
    there = {path: allowed for path, allowed in paths.items() if Path(path).exists()}
    own = str(_package().parent)
    return ["/usr/bin/env", "-i", *settings, _python()], [own, *folders], there


def server(
    chain: Chain,
    images: Images,
    *,
    kind: Kind = Kind.NAMESPACES,
    snapshot: str | None = None,
    force_share: bool = False,
    overlay: Path | None = None,
) -> list[str]:
    """The command line that serves a chain inside the sandbox, on the socket that it inherits.

    An `overlay` of the images stands on the chain.
    """
    program = "/usr/bin/qemu-nbd" if kind is Kind.NAMESPACES else _program("qemu-nbd")
    argv = [program, "--read-only", "--allocation-depth", *snapshot_option(chain, snapshot)]
    names = images.names(kind)
    node = chain.blockdev(force_share=force_share, names=names)
    if (unseen := chain.active.unseen) is not None and node["driver"] == "raw":
        node["size"] = unseen.there // 512 * 512  # QEMU would fill up the last sector with zeros
    if overlay is not None:
        file = {"driver": "file", "filename": names[overlay]}
        node = {"driver": "qcow2", "file": file, "backing": node, "read-only": True}
    return [*argv, "json:" + json.dumps(node, ensure_ascii=False)]


@contextlib.contextmanager
def start_worker(
    images: Images,
    *,
    kind: Kind = Kind.NAMESPACES,
    main: str = "imgtool.engines.direct.worker.__main__",
    programs: Sequence[str] = ("qemu-nbd",),
    modules: Sequence[str] = _OF_WORKER,
    options: Sequence[str] = (),
    memory: int = MEMORY,
    cpu: int = CPU,
    stdin: int = PIPE,
    shared: Sequence[int] = (),
    newest: int | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """The worker, running; requests go to its stdin, answers come from its stdout. It inherits the
    descriptors in `shared`. Of Landlock no version after `newest` is used.

    `main` is the module of another program than the worker, with the programs, modules and
    options of bwrap's that it needs.

    What it and QEMU say is in the pipe of its stderr, which holds no more than a pipe does. Raises
    `NoSandbox` where it cannot be started.
    """
    if not syscalls.known():
        raise NoSandbox("the sandbox does not know this machine's system calls")
    if not Path("/proc/self/fd").is_dir():  # by which the images are named
        raise NoSandbox("/proc is not mounted here")
    given: dict[str, object] = {"kept": list(shared), "user": images.user}
    with contextlib.ExitStack() as stack:
        taken = list(images.descriptors.values())
        if kind is Kind.NAMESPACES:
            words, folders, taken = stack.enter_context(
                in_namespaces(images, programs=programs, modules=modules, options=options)
            )
        else:
            if not landlock.version():
                raise NoSandbox("this kernel has no Landlock")
            words, folders, paths = _with_landlock(programs, modules)
            given |= {"images": taken, "paths": paths}
            given |= {} if newest is None else {"newest": newest}
        code = _ENTER.format(paths=folders, given=given) + _START.format(paths=folders, module=main)
        process = stack.enter_context(
            spawn(
                [*words, "-I", "-S", "-B", "-c", code],
                limits=Limits(memory=memory, cpu=cpu),
                pass_fds=[*taken, *shared],
                stdin=stdin,
                stdout=PIPE,
                stderr=PIPE,
            )
        )
        yield process


def try_kind(kind: Kind) -> None:
    """Close a sandbox of this kind around nothing; `NoSandbox`, or what else is missing, where that
    cannot be done.
    """
    images = Images(())
    with start_worker(images, kind=kind) as process:
        try:
            said, errors = process.communicate(timeout=_MOMENT)
        except TimeoutExpired as error:
            raise SandboxFailed(f"it did not start within {_MOMENT:g} s") from error
    if not said.startswith(READY):
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise SandboxFailed(last[0][:200] if last else "it ended")
