"""The one place that starts programs: `run()` to the end, `spawn()` for a server; and finds them.

Programs get an argument list (never a shell string), a scrubbed environment with the C locale, no
standard input unless given, and die with imgtool. Limits on memory, CPU time and wall time make
sure that a hostile image cannot make a program eat the host.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from imgtool.errors import HostError
from imgtool.host import interrupt
from imgtool.host.libc import libc
from imgtool.host.system_packages import install_program

log = logging.getLogger(__name__)

PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
TimeoutExpired = subprocess.TimeoutExpired
_PR_SET_PDEATHSIG = 1

# What programs are allowed to inherit. PATH decides which QEMU is used; the rest is where
# temporary files and caches go.
_KEPT = ("PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "USER", "LOGNAME")


@dataclass(frozen=True)
class Limits:
    """Limits for one program: memory and size of files in bytes, CPU and wall time in seconds."""

    memory: int | None = None
    cpu: int | None = None
    wall: float | None = None
    file_size: int | None = None


class TimedOut(HostError):
    """The program did not finish within its wall time; it was killed."""


class ProgramFailed(HostError):
    """The program ended with a status that the caller did not expect.

    `returncode` is negative for a signal; `stderr` is what the program said, decoded.
    """

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        said = stderr.strip().splitlines()
        super().__init__(
            f"{argv[0]} failed with status {returncode}: {said[-1] if said else 'no message'}"
        )
        self.returncode = returncode
        self.stderr = stderr


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment that programs get: what is kept, the C locale, and `extra`."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    # blkid and e2fsck are where Debian's ordinary users do not look.
    path = os.pathsep.join((kept.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    return {**kept, "PATH": path, "LC_ALL": "C.UTF-8", **(extra or {})}


def find(program: str) -> str | None:
    """Where `run` and `spawn` find a program; None if they do not."""
    return shutil.which(program, path=environment()["PATH"])


def _lower(kind: int, soft: int, hard: int) -> None:
    """Set a limit, which nobody may raise: a lower one of the host's stays."""
    there = resource.getrlimit(kind)[1]
    if there != resource.RLIM_INFINITY:
        soft, hard = min(soft, there), min(hard, there)
    resource.setrlimit(kind, (soft, hard))


def _prepare_child(
    limits: Limits, parent: int, preexec: Callable[[], None] | None = None
) -> Callable[[], None]:
    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent went between fork and prctl
            os._exit(127)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limits.memory is not None:
            _lower(resource.RLIMIT_AS, limits.memory, limits.memory)
        if limits.cpu is not None:
            _lower(resource.RLIMIT_CPU, limits.cpu, limits.cpu + 1)
        if limits.file_size is not None:
            _lower(resource.RLIMIT_FSIZE, limits.file_size, limits.file_size)
        if preexec is not None:
            preexec()

    return prepare


def _missing(program: str) -> HostError:
    return HostError("program not found", subject=program, hint=install_program(program))


def run(
    argv: Sequence[str | Path],
    *,
    limits: Limits | None = None,
    input: bytes | None = None,
    ok: Sequence[int] = (0,),
    pass_fds: Sequence[int] = (),
    env: dict[str, str] | None = None,
    preexec: Callable[[], None] | None = None,
    new_group: bool = False,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end and return what it wrote.

    `preexec` is called in the new process before the program starts. `new_group`, a Ctrl-C at the
    terminal is for imgtool alone.

    Raises `HostError` if there is no such program, `TimedOut` past `limits.wall`, and
    `ProgramFailed` for a status that is not in `ok`.
    """
    limits = limits or Limits()
    words = [str(word) for word in argv]
    log.debug("run: %s", shlex.join(words))
    options = _options(limits, pass_fds, env, preexec)
    options["process_group"] = 0 if new_group else None
    stdin = subprocess.DEVNULL if input is None else PIPE
    with _start(words, stdin=stdin, stdout=PIPE, stderr=PIPE, options=options) as process:
        try:
            out, said = process.communicate(input, timeout=limits.wall)
        except subprocess.TimeoutExpired as error:
            message = f"{words[0]} took longer than {limits.wall} s and was stopped"
            raise TimedOut(message) from error
        finally:
            process.kill()  # does nothing to a program that has ended
    if process.returncode not in ok:
        raise ProgramFailed(words, process.returncode, said.decode(errors="replace"))
    return subprocess.CompletedProcess(words, process.returncode, out, said)


@contextlib.contextmanager
def spawn(
    argv: Sequence[str | Path],
    *,
    limits: Limits | None = None,
    pass_fds: Sequence[int] = (),
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.PIPE,
    env: dict[str, str] | None = None,
    outlives: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program that lives as long as the `with` block; it is gone when the block ends.

    One that `outlives` imgtool where that is killed has to end by itself.
    """
    words = [str(word) for word in argv]
    log.debug("spawn: %s", shlex.join(words))
    options = _options(limits or Limits(), pass_fds, env)
    if outlives:
        options["preexec_fn"] = None
        options["start_new_session"] = True
    with _start(words, stdin=stdin, stdout=stdout, stderr=stderr, options=options) as process:
        yield process


class _Options(TypedDict):
    """What `Popen` takes besides the words and the streams."""

    env: dict[str, str]
    pass_fds: Sequence[int]
    preexec_fn: Callable[[], None] | None
    process_group: NotRequired[int | None]
    start_new_session: NotRequired[bool]


def _options(
    limits: Limits,
    pass_fds: Sequence[int],
    env: dict[str, str] | None,
    preexec: Callable[[], None] | None = None,
) -> _Options:
    if limits.memory is not None:
        # Else each thread sets 64 MiB of addresses aside, which count: QEMU starts up to 64.
        env = {"MALLOC_ARENA_MAX": "1", **(env or {})}
    return {
        "env": environment(env),
        "pass_fds": pass_fds,
        "preexec_fn": _prepare_child(limits, os.getpid(), preexec),
    }


@contextlib.contextmanager
def _start(
    words: list[str], *, stdin: int, stdout: int, stderr: int, options: _Options
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that has ended, and was waited for, when the block ends: also after Ctrl-C, when
    what it had locked would else be locked for a moment more."""
    process = None
    try:
        with (
            interrupt.defer_interrupts()
        ):  # a process that Popen has not returned yet would be nobody's
            try:
                process = subprocess.Popen(
                    words, stdin=stdin, stdout=stdout, stderr=stderr, **options
                )
            except FileNotFoundError as error:
                raise _missing(words[0]) from error
        yield process
    finally:
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            # What could not be sent to a program that is gone is of no interest.
            with contextlib.suppress(OSError):
                stream.close()


def leave_running(
    argv: Sequence[str | Path],
    log_file: Path,
    *,
    env: dict[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
) -> subprocess.Popen[bytes]:
    """Start a program that goes on when imgtool has ended; it writes what it says to `log_file`.

    Whoever calls this has written down how to find and end it.
    """
    words = [str(word) for word in argv]
    log.debug("leave running: %s", shlex.join(words))
    with log_file.open("wb") as said:
        try:
            return subprocess.Popen(
                words,
                stdin=stdin,
                stdout=said,
                stderr=said,
                env=environment(env),
                cwd="/",
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise _missing(words[0]) from error


def interactive(argv: Sequence[str | Path]) -> int:
    """Run a program of the user's, such as an editor, on the terminal; its status.

    It gets the user's whole environment. Raises `HostError` if there is no such program.
    """
    words = [str(word) for word in argv]
    log.debug("run on the terminal: %s", shlex.join(words))
    try:
        return subprocess.run(words, check=False).returncode
    except FileNotFoundError as error:
        raise _missing(words[0]) from error


def command_of(pid: int) -> list[str]:
    """The words of a process's command line; none if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [os.fsdecode(word) for word in raw.split(b"\0")[:-1]]


def parent_of(pid: int) -> int | None:
    """The process that started a process, or has taken it over; None where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (OSError, ProcessLookupError):
        return None
    return next(
        (int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:")), None
    )


def processes_naming(text: str) -> list[int]:
    """The processes whose command line has this in it, but for this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(PermissionError):
                if any(text in word for word in command_of(int(entry.name))):
                    found.append(int(entry.name))
    return found
