"""Starting the appliance: KVM where it works, emulation where it does not.

/dev/kvm can be there and yet unusable (nested virtualisation, containers): QEMU then aborts after
seconds or hangs for ever. So the first launch tries KVM under a time limit and falls back to
emulation (TCG), says so once, and remembers it for this boot, QEMU and kernel, so that the next
command does not pay again. Emulated, an appliance that was saved goes on (`saved`).
`LIBGUESTFS_BACKEND` and `LIBGUESTFS_BACKEND_SETTINGS` win.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgtool.engines.libguestfs.appliance import saved
from imgtool.engines.libguestfs.appliance.monitor import Watch
from imgtool.errors import EngineError, HostError, Interrupted
from imgtool.host import interrupt
from imgtool.host.process import command_of, processes_naming
from imgtool.host.scratch import goes_with, scratch_folder
from imgtool.host.system_packages import binding_fix

log = logging.getLogger(__name__)

# A launch with working KVM takes 2 to 10 s; one without, on a busy machine, 10 to 60 s.
KVM_LIMIT = 45.0
FIRST_EMULATION_LIMIT = 120.0
EMULATION_LIMIT = 600.0
SAVED_LIMIT = 120.0  # of a saved appliance, which takes a second
# Where libguestfs has its temporary files, if not where all programs have.
TEMPORARY_VARIABLE = "LIBGUESTFS_TMPDIR"

# The appliance runs no program but its own, for one user: zeroing every page that its kernel
# allocates, AppArmor, audit and the mitigations against other users' programs are a sixth of an
# emulated launch. More udev workers than there are processors only wait for each other.
_KERNEL_OPTIONS = "init_on_alloc=0 apparmor=0 audit=0 mitigations=off udev.children-max=2"

# What each handle's appliance is called, and who listens to its QEMU, while there is the handle.
_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_watches: weakref.WeakKeyDictionary[Any, Watch] = weakref.WeakKeyDictionary()

_DOCTOR = "run 'imgtool doctor --launch' to see what is missing"


def cache_dir() -> Path:
    """Where imgtool remembers what it found out about this machine."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "imgtool"


def _machine() -> dict[str, str]:
    """What decides whether KVM works: this boot, this QEMU, this kernel."""
    qemu = shutil.which(f"qemu-system-{platform.machine()}") or ""
    changed = str(Path(qemu).stat().st_mtime_ns) if qemu else ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "qemu": qemu, "changed": changed, "kernel": platform.release()}


def last_accelerator() -> str | None:
    """`kvm` or `tcg`: what the last launch on this machine, as it is now, ended with."""
    try:
        note = json.loads((cache_dir() / "acceleration.json").read_text())
        machine = _machine()
    except (OSError, ValueError):  # without /proc it is not known which boot this is
        return None
    if not isinstance(note, dict) or note.get("machine") != machine:
        return None
    outcome = note.get("outcome")
    return outcome if outcome in ("kvm", "tcg") else None


def _remember(outcome: str) -> None:
    folder = cache_dir()
    note = folder / "acceleration.json"
    # A cache that cannot be written costs time, not correctness.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"machine": _machine(), "outcome": outcome}))
        draft.replace(note)


def _bindings() -> Any:
    try:
        import guestfs
    except ImportError as error:
        raise HostError(
            "the libguestfs Python bindings are not available to this Python",
            subject=sys.executable,
            hint=binding_fix("python3-guestfs"),
        ) from error
    return guestfs


def new_handle(*, debug: bool = False, temporary: Path | None = None) -> Any:
    """A libguestfs handle that is not launched yet, with a folder for its temporary files."""
    handle = _bindings().GuestFS(python_return_dict=True, close_on_exit=False)
    if temporary is not None:
        handle.set_tmpdir(str(temporary))
    # Ctrl-C goes to imgtool alone, which decides what happens to the appliance.
    handle.set_pgroup(True)
    handle.set_smp(min(2, os.cpu_count() or 1))
    given = handle.get_append()  # of the environment, LIBGUESTFS_APPEND
    handle.set_append(f"{_KERNEL_OPTIONS} {given}" if given else _KERNEL_OPTIONS)
    _names[handle] = f"imgtool-{secrets.token_hex(8)}"
    handle.set_identifier(_names[handle])
    _watches[handle] = Watch(handle, functools.partial(_kill_named, _names[handle]))
    if debug:
        handle.set_trace(True)
        handle.set_verbose(True)
    return handle


def kill(handle: Any) -> None:
    """Stop the appliance at once, from any thread; the call under way then fails.

    It is found by the name that its kernel is told: libguestfs answers no question about a handle,
    not even for the process, while a call of it is under way.
    """
    _kill_named(_names[handle])


def _kill_named(name: str) -> None:
    for pid in processes_naming(f"guestfs_identifier={name}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _try(handle: Any, limit: float, then: Callable[[Any], None] = lambda handle: None) -> None:
    """Launch, and do what is to be done `then`; a limit, or Ctrl-C, ends the one and the other."""
    ended = threading.Event()

    def stop() -> None:
        while not ended.wait(0.05):  # it may be about to start
            kill(handle)

    def later() -> None:
        threading.Thread(target=stop, daemon=True).start()

    timer = threading.Timer(limit, stop)
    timer.daemon = True
    with interrupt.on_interrupt(later):
        timer.start()
        _watches[handle].start()
        try:
            handle.launch()
            then(handle)
        finally:
            ended.set()
            timer.cancel()
        if interrupt.pending():
            raise Interrupted("interrupted")


def _explain(error: Exception) -> HostError:
    said = str(error)
    readable = [k for k in Path("/boot").glob("vmlinu*") if os.access(k, os.R_OK)]
    if "supermin" in said and not readable:
        present = sorted(Path("/boot").glob("vmlinu*"))
        if present:
            return HostError(
                "the appliance's kernel cannot be read",
                subject=present[0],
                hint=f"sudo chmod 0644 {present[0]}, or run as root",
            )
        return HostError(
            "no kernel for the appliance is installed",
            subject="/boot",
            hint="sudo apt-get install linux-image-cloud-amd64 (Ubuntu: linux-image-virtual)",
        )
    if "qemu" in said and "not found" in said:
        return HostError("QEMU is not installed", hint="sudo apt-get install qemu-system-x86")
    return HostError(f"the appliance does not start: {said.splitlines()[0]}", hint=_DOCTOR)


def _kvm_there() -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def saved_home() -> Path:
    """Where saved appliances are."""
    return cache_dir() / "appliance"


def _backend_is_given() -> bool:
    return "LIBGUESTFS_BACKEND" in os.environ or "LIBGUESTFS_BACKEND_SETTINGS" in os.environ


@dataclass(frozen=True)
class _Attempt:
    """One way to start: what it is called in the log, and what is said if it does not work."""

    name: str
    limit: float
    force_tcg: bool = False
    saved: bool = False
    otherwise: str = ""


def _attempts() -> list[_Attempt]:
    """The ways to try, the one to prefer first."""
    if _backend_is_given():
        return [_Attempt("the backend of the environment", EMULATION_LIMIT)]
    # Emulated with two processors, the appliance's kernel once in a while never comes up.
    hangs = f"the appliance is not there after {FIRST_EMULATION_LIMIT:.0f} s; starting it once more"
    emulated = [
        _Attempt("tcg", FIRST_EMULATION_LIMIT, force_tcg=True, otherwise=hangs),
        _Attempt("tcg", EMULATION_LIMIT, force_tcg=True),
    ]
    if saved.all_saved(saved_home()):
        otherwise = (
            "the saved appliance does not continue; starting one from the beginning "
            "('imgtool appliance save' saves it anew)"
        )
        emulated.insert(0, _Attempt("saved", SAVED_LIMIT, True, saved=True, otherwise=otherwise))
    if not _kvm_there() or last_accelerator() == "tcg":
        return emulated
    otherwise = (
        "KVM does not work on this machine; using emulation, which is slower "
        "(remembered until the next boot)"
    )
    return [_Attempt("kvm", KVM_LIMIT, otherwise=otherwise), *emulated]


def _settle(handle: Any) -> None:
    if saved.is_continued(handle):
        saved.settle(handle)


def _first_that_starts(
    add_drives: Callable[[Any], None],
    attempts: list[_Attempt],
    notice: Callable[[str], None],
    debug: bool,
    temporary: Path,
) -> tuple[Any, str]:
    """A launched handle, and what accelerates it: `kvm`, `tcg`, or what the environment says."""
    for attempt in attempts:
        handle = new_handle(debug=debug, temporary=temporary)
        started = time.monotonic()
        try:
            if attempt.force_tcg:
                handle.set_backend_settings(["force_tcg"])
            add_drives(handle)
            if attempt.saved:
                found = saved.for_handle(saved_home(), handle)
                if found is None:
                    close(handle)
                    continue
                handle.set_hv(str(found.starter))
            _try(handle, attempt.limit, _settle if attempt.saved else lambda handle: None)
            continues = attempt.saved and saved.is_continued(handle)
        except (RuntimeError, EngineError) as error:
            close(handle)
            if interrupt.pending():
                raise Interrupted("interrupted") from error
            ended_by_itself = time.monotonic() - started < attempt.limit
            again = attempts[attempts.index(attempt) + 1 :]
            if not again or (ended_by_itself and attempt.name == again[0].name):
                raise _explain(error) from error
            log.info("appliance: %s", error)
            notice(attempt.otherwise)
            continue
        except BaseException:
            close(handle)
            raise
        how = "tcg" if attempt.saved and not continues else attempt.name
        log.info("appliance: launched (%s) in %.1f s", how, time.monotonic() - started)
        return handle, "tcg" if attempt.force_tcg else attempt.name
    raise AssertionError("the last attempt starts or raises")


@contextlib.contextmanager
def launch_appliance(
    add_drives: Callable[[Any], None],
    *,
    notice: Callable[[str], None],
    debug: bool = False,
) -> Iterator[Any]:
    """A launched handle with the drives that `add_drives` gives it; closed with the block.

    `notice` gets a line for the user when KVM or a saved appliance turns out not to work. Raises
    `HostError` when no appliance starts, with what to install.
    """
    attempts = _attempts()
    with scratch_folder("appliance", os.environ.get(TEMPORARY_VARIABLE)) as temporary:
        handle, name = _first_that_starts(add_drives, attempts, notice, debug, temporary)
        if attempts[0].name == "kvm":
            _remember(name)
        try:
            _note_sockets(handle, temporary)
            yield handle
        except Exception as error:
            if failed := _watches[handle].failed:
                raise _not_written(failed) from error
            raise
        finally:
            close(handle)
    if failed := _watches[handle].failed:
        raise _not_written(failed)


def _note_sockets(handle: Any, temporary: Path) -> None:
    """libguestfs keeps its sockets in a folder that nobody can choose: QEMU is told which."""
    with contextlib.suppress(RuntimeError):  # a backend without a process
        for word in command_of(handle.get_pid()):
            if found := re.search(r"path=(/[^,]*/libguestfs\w+)/", word):
                goes_with(temporary, found[1])


def _not_written(reason: str) -> HostError:
    if "No space left" in reason:
        hint = "make room; copy-in, edit and inject write to --tmp-dir DIR until they are done"
        return HostError("the host has no room left for what is written", hint=hint)
    return HostError(f"the host cannot write what is written to the guest: {reason}")


def close(handle: Any) -> None:
    """Let a handle and its appliance go."""
    handle.close()
    _watches[handle].close()


def time_launch(*, debug: bool = False) -> float:
    """Start the appliance on a scratch disk and stop it; the seconds that it took to be ready."""
    lines: list[str] = []

    def scratch(handle: Any) -> None:
        handle.add_drive_scratch(1 << 20)

    started = time.monotonic()
    with launch_appliance(scratch, notice=lines.append, debug=debug):
        return time.monotonic() - started


def save_appliance(disks: int) -> saved.Saved:
    """Save a launched appliance for guests of so many disks; see `saved`. Raises `HostError`."""
    handle = new_handle()
    hypervisor = str(handle.get_hv())
    try:
        handle.set_backend_settings(["force_tcg"])
        for _ in range(disks):
            handle.add_drive_scratch(1 << 20)
        return saved.save(saved_home(), handle, hypervisor)
    finally:
        close(handle)
