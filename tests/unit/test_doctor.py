"""`imgtool doctor`: each thing that can be missing is named, with what to do about it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imgtool import doctor
from imgtool.doctor import Check, Host, examine
from imgtool.engines.direct.parent import sandbox
from imgtool.engines.direct.parent.sandbox import Kind
from imgtool.engines.direct.wire import landlock
from imgtool.engines.libguestfs.appliance import launch
from imgtool.engines.libguestfs.appliance.saved import Saved
from imgtool.errors import HostError, UsageError
from imgtool.host.process import run
from imgtool.mount.mechanisms.registry import MECHANISMS, mechanisms

KERNEL = "6.1.0-9-cloud-amd64"
PROGRAMS = (
    *("qemu-img", "qemu-nbd", "qemu-storage-daemon", "qemu-system-x86_64", "supermin"),
    *("bwrap", "unshare", "cat", "fusermount3", "rsync", "hpmount"),
)
NOBODY = 65534

# What this host's own programs and sandboxes say stays the same: each is asked once. Whatever a
# test puts in their place is asked every time.
Done = subprocess.CompletedProcess[bytes]
_ASKED: dict[tuple[object, ...], Done] = {}
_TRIED: set[tuple[object, ...]] = set()


def is_own(program: str, machine: Path) -> bool:
    found = shutil.which(program)
    return found is not None and not Path(found).resolve().is_relative_to(machine)


def run_once(machine: Path) -> Callable[..., Done]:
    def asked(argv: list[str], **options: Any) -> Done:
        found = shutil.which(argv[0])
        if found is None or not is_own(argv[0], machine):
            return run(argv, **options)
        key = (Path(found).resolve(), *argv[1:])
        if key not in _ASKED:
            _ASKED[key] = run(argv, **options)
        return _ASKED[key]

    return asked


def try_once(machine: Path) -> Callable[[Kind], None]:
    really = sandbox.try_kind

    def tried(kind: Kind) -> None:
        key = (kind, landlock.version(), os.geteuid())
        if key in _TRIED and (kind is not Kind.NAMESPACES or is_own("bwrap", machine)):
            return
        really(kind)
        if kind is not Kind.NAMESPACES or is_own("bwrap", machine):
            _TRIED.add(key)

    return tried


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A machine on which all is well, in a folder that every user can enter."""
    top = Path(tempfile.mkdtemp(prefix="doctor-of-test-", dir="/tmp"))
    top.chmod(0o755)
    host = Host(
        boot=top / "boot",
        dev=top / "dev",
        modules=top / "modules",
        proc=top / "proc",
        sys=top / "sys",
        libraries=top / "lib",
        release=KERNEL,
        machine="x86_64",
    )
    write(host.boot / f"vmlinuz-{KERNEL}", "kernel")
    write(
        host.modules / KERNEL / "modules.dep", "kernel/drivers/block/nbd.ko:\nkernel/md/dm-mod.ko:"
    )
    parts = host.libraries / "x86_64-linux-gnu/guestfs/supermin.d"
    write(parts / "daemon.tar.gz", "")
    write(parts / "packages", "e2fsprogs\nlvm2\n")
    for package in ("xfsprogs", "hfsplus", "rsync", "policycoreutils"):
        write(parts / f"packages-{package}", f"{package}\n")
    write(host.proc / "meminfo", "MemTotal: 8000000 kB\nMemAvailable:    4000000 kB\n")
    for misc, node in (("fuse", "fuse"), ("loop-control", "loop-control")):
        write(host.sys / "class/misc" / misc, "")
        write(host.dev / node, "")
    programs = top / "bin"
    programs.mkdir()
    for program in PROGRAMS:
        (programs / program).symlink_to(str(shutil.which(program)))
    (top / "cache").mkdir()
    monkeypatch.setattr(doctor, "run", run_once(top))
    monkeypatch.setattr(sandbox, "try_kind", try_once(top))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("LIBGUESTFS_CACHEDIR", str(top / "cache"))
    for variable in ("LIBGUESTFS_PATH", "LIBGUESTFS_HV", "SUPERMIN_KERNEL", "TMPDIR"):
        monkeypatch.delenv(variable, raising=False)
    yield host
    shutil.rmtree(top)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def check(host: Host, name: str) -> Check:
    (found,) = [check for check in examine(host=host) if check.name == name]
    return found


def stopping(host: Host) -> list[str]:
    """The names of what keeps the main job from running."""
    return [check.name for check in examine(host=host) if check.required and not check.ok]


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Not root for a moment, so that permissions count."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def remove_program(host: Host, program: str) -> None:
    (host.boot.parent / "bin" / program).unlink()


def replace_program(host: Host, program: str, script: str) -> None:
    path = host.boot.parent / "bin" / program
    path.unlink()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_machine_that_has_everything_can_do_the_main_job(machine: Host) -> None:
    assert stopping(machine) == []


def test_missing_need_comes_with_a_name_and_what_was_seen(machine: Host) -> None:
    shutil.rmtree(machine.boot)
    shutil.rmtree(machine.libraries)
    shutil.rmtree(machine.dev)
    checks = examine(host=machine)
    assert len({check.name for check in checks}) == len(checks)
    assert all(check.found and "\n" not in check.found for check in checks)
    assert all(check.fix for check in checks if check.ok is False)


@pytest.mark.parametrize(
    ("program", "package"),
    [
        ("qemu-img", "qemu-utils"),
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("supermin", "supermin"),
    ],
)
def test_missing_program_stops_the_main_job_and_names_a_package(
    machine: Host, program: str, package: str
) -> None:
    remove_program(machine, program)
    assert stopping(machine) == [program]
    assert check(machine, program).fix == f"sudo apt-get install {package}"


@pytest.mark.parametrize("program", ["qemu-nbd", "qemu-storage-daemon"])
def test_a_program_of_other_jobs_does_not_stop_the_main_job(machine: Host, program: str) -> None:
    remove_program(machine, program)
    assert stopping(machine) == []
    assert check(machine, program).ok is None


def test_programs_are_shown_with_their_version(machine: Host) -> None:
    replace_program(machine, "qemu-img", "echo 'qemu-img version 9.2.1 (Debian 1:9.2.1)'")
    assert check(machine, "qemu-img").found == "9.2.1"


def test_a_program_that_does_not_run_counts_as_missing(machine: Host) -> None:
    replace_program(machine, "qemu-img", "echo 'libfoo.so.1: cannot open' >&2; exit 127")
    found = check(machine, "qemu-img")
    assert found.ok is False
    assert "libfoo.so.1" in found.found
    assert "reinstall" in str(found.fix)


def test_bindings_of_another_python_are_explained(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "guestfs", None)
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    assert stopping(machine) == ["Python binding guestfs"]
    fix = str(check(machine, "Python binding guestfs").fix)
    assert "/usr/bin/python3 -m venv --system-site-packages" in fix


def test_missing_bindings_of_system_python_name_their_package(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "guestfs", None)
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert check(machine, "Python binding guestfs").fix == "sudo apt-get install python3-guestfs"


def test_missing_nbd_and_parted_do_not_stop_the_main_job(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nbd", None)
    monkeypatch.setitem(sys.modules, "parted", None)
    assert stopping(machine) == []
    assert check(machine, "Python binding nbd").ok is None
    assert check(machine, "Python binding parted").ok is None


def test_unreadable_kernel_is_named_with_the_command_to_type(
    machine: Host,
) -> None:
    kernel = machine.boot / f"vmlinuz-{KERNEL}"
    kernel.chmod(0)
    with ordinary_user():
        found = check(machine, "appliance kernel")
    assert (found.ok, found.required) == (False, True)
    assert str(kernel) in found.found
    assert f"sudo chmod 0644 {kernel}" in str(found.fix)
    assert "dpkg-statoverride" in str(found.fix)


def test_older_readable_kernel_does_not_hide_the_newest(
    machine: Host,
) -> None:
    newest = "6.1.0-10-cloud-amd64"  # by number newer than -9, by letters older
    write(machine.boot / f"vmlinuz-{newest}", "kernel")
    write(machine.modules / newest / "modules.dep", "")
    (machine.boot / f"vmlinuz-{newest}").chmod(0)
    with ordinary_user():
        found = check(machine, "appliance kernel")
    assert found.ok is False
    assert newest in found.found


def test_no_kernel_stops_the_main_job(machine: Host) -> None:
    (machine.boot / f"vmlinuz-{KERNEL}").unlink()
    assert stopping(machine) == ["appliance kernel"]
    assert "linux-image-cloud-amd64" in str(check(machine, "appliance kernel").fix)


def test_a_kernel_without_its_modules_stops_the_main_job(machine: Host) -> None:
    shutil.rmtree(machine.modules)
    assert stopping(machine) == ["appliance kernel"]
    assert "no modules" in check(machine, "appliance kernel").found


def test_a_kernel_chosen_by_the_user_is_the_one_that_counts(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUPERMIN_KERNEL", str(machine.boot / "bzImage"))
    assert stopping(machine) == ["appliance kernel"]
    write(machine.boot / "bzImage", "kernel")
    assert stopping(machine) == []


def test_no_appliance_stops_the_main_job(machine: Host) -> None:
    shutil.rmtree(machine.libraries)
    assert stopping(machine) == ["appliance"]


def test_an_incomplete_appliance_folder_stops_the_main_job(machine: Host) -> None:
    next(machine.libraries.glob("*/guestfs/supermin.d/daemon.tar.gz")).unlink()
    assert stopping(machine) == ["appliance"]


def test_a_fixed_appliance_needs_neither_supermin_nor_a_kernel(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = machine.boot.parent / "fixed"
    for name in ("kernel", "initrd", "root"):
        write(fixed / name, "")
    monkeypatch.setenv("LIBGUESTFS_PATH", str(fixed))
    remove_program(machine, "supermin")
    shutil.rmtree(machine.boot)
    assert stopping(machine) == []
    assert str(fixed) in check(machine, "appliance").found


def test_a_path_to_no_appliance_names_the_variable(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBGUESTFS_PATH", str(machine.boot))
    assert stopping(machine) == ["appliance"]
    assert "LIBGUESTFS_PATH" in str(check(machine, "appliance").fix)


def test_filesystems_that_the_appliance_cannot_read_are_named(machine: Host) -> None:
    parts = next(machine.libraries.glob("*/guestfs/supermin.d"))
    (parts / "packages-xfsprogs").unlink()
    (parts / "packages-policycoreutils").unlink()
    found = check(machine, "appliance extras")
    assert (found.ok, found.required) == (False, False)
    assert found.found == "without XFS, SELinux labels"
    assert found.fix == "sudo apt-get install libguestfs-xfs; scripts/setup.sh adds setfiles"


def test_an_extra_that_is_listed_but_not_installed_is_missing(machine: Host) -> None:
    remove_program(machine, "hpmount")
    assert check(machine, "appliance extras").found == "without HFS+"


def test_a_machine_without_kvm_can_do_the_main_job(machine: Host) -> None:
    found = check(machine, "KVM")
    assert (found.ok, found.required) == (None, False)
    assert "no " in found.found and "emulation" in found.found


def test_kvm_without_permission_says_which_group(machine: Host) -> None:
    write(machine.dev / "kvm", "")
    (machine.dev / "kvm").chmod(0o600)
    with ordinary_user():
        found = check(machine, "KVM")
    assert found.ok is None
    assert "permission" in found.found
    assert "kvm" in str(found.fix)


def test_kvm_device_without_virtual_machines_is_not_usable(machine: Host) -> None:
    (machine.dev / "kvm").symlink_to("/dev/null")
    before = sorted(Path("/proc/self/fd").iterdir())
    found = check(machine, "KVM")
    assert found.ok is None
    assert "cannot make a virtual machine" in found.found
    assert sorted(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize(
    ("states", "ok", "said", "fix"),
    [
        ([], None, "none", "imgtool appliance save"),
        ([False], None, "of another QEMU", "imgtool appliance save"),
        ([True, False], True, "so many disks: 1 (150 MB)", None),
    ],
)
def test_without_kvm_a_saved_appliance_is_looked_for(machine, monkeypatch, states, ok, said, fix):
    saved = [
        Saved(Path("/cache"), number, 150_000_000, 0, "qemu", fresh)
        for number, fresh in enumerate(states, 1)
    ]
    monkeypatch.setattr(doctor, "all_saved", lambda home: saved)
    found = check(machine, "saved appliance")
    assert (found.ok, found.required, found.fix) == (ok, False, fix)
    assert said in found.found


def test_last_launch_counts_in_the_boot_that_it_was_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    launch._remember("tcg")
    assert launch.last_accelerator() == "tcg"
    # A rescue system without /proc does not know which boot it is.
    elsewhere = lambda name: Path("/none" if name.startswith("/proc") else name)  # noqa: E731
    monkeypatch.setattr(launch, "Path", elsewhere)
    assert launch.last_accelerator() is None


def test_too_little_memory_stops_the_main_job(machine: Host) -> None:
    write(machine.proc / "meminfo", "MemTotal: 8000000 kB\nMemAvailable: 700000 kB\n")
    assert stopping(machine) == ["memory"]
    assert "0.7 GB" in check(machine, "memory").found


def test_the_memory_limit_of_a_container_counts(machine: Host) -> None:
    write(machine.sys / "fs/cgroup/memory.max", "536870912\n")
    assert stopping(machine) == ["memory"]
    write(machine.sys / "fs/cgroup/memory.max", "max\n")
    assert stopping(machine) == []


def test_full_disk_stops_the_main_job_unless_appliance_is_built(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CACHE_NEEDS", 1 << 62)
    assert stopping(machine) == ["space for the appliance"]
    cache = Path(os.environ["LIBGUESTFS_CACHEDIR"])
    write(cache / f".guestfs-{os.geteuid()}" / "appliance.d" / "root", "")
    assert stopping(machine) == []


def test_the_appliance_cache_goes_where_libguestfs_puts_it(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIBGUESTFS_CACHEDIR")
    monkeypatch.setenv("TMPDIR", str(machine.boot.parent / "nowhere"))
    found = check(machine, "space for the appliance")
    assert found.ok is False
    assert "nowhere" in found.found
    monkeypatch.delenv("TMPDIR")
    assert "/var/tmp" in check(machine, "space for the appliance").found


def test_a_host_that_forbids_user_namespaces_names_the_switch(machine: Host) -> None:
    replace_program(machine, "bwrap", "echo 'bwrap: Permission denied' >&2; exit 1")
    write(machine.proc / "sys/kernel/apparmor_restrict_unprivileged_userns", "1\n")
    found = check(machine, "sandbox (bubblewrap)")
    assert found.ok is None
    assert "Permission denied" in found.found
    assert found.fix == "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"


def test_a_sandbox_that_does_not_start_in_time_is_said_to_be_so(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_MOMENT", 0.2)
    replace_program(machine, "bwrap", "exec /bin/sleep 60")
    found = check(machine, "sandbox (bubblewrap)")
    assert (found.ok, found.found) == (None, "it did not start within 0.2 s")


def test_the_sandbox_that_is_used_is_named(machine: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    used = "works, and is used"
    assert check(machine, "sandbox (bubblewrap)").found == used
    assert check(machine, "sandbox (Landlock)").found == "works"
    replace_program(machine, "bwrap", "echo 'bwrap: Permission denied' >&2; exit 1")
    assert check(machine, "sandbox (bubblewrap)").ok is None
    assert check(machine, "sandbox (Landlock)").found == f"{used}; no journal is replayed in it"
    monkeypatch.setattr(landlock, "version", lambda: 0)
    found = check(machine, "sandbox (Landlock)")
    assert (found.ok, found.found) == (None, "this kernel has no Landlock")
    assert "5.13" in (found.fix or "")


def test_a_device_node_without_its_driver_does_not_count(machine: Host) -> None:
    write(machine.dev / "mapper/control", "")
    found = check(machine, "device-mapper")
    assert found.ok is None
    assert found.fix == "sudo modprobe dm_mod"
    write(machine.sys / "class/misc/device-mapper", "")
    assert check(machine, "device-mapper").ok is True


def test_nbd_is_absent_loadable_without_partitions_or_usable(machine: Host) -> None:
    assert check(machine, "nbd devices").fix == "sudo modprobe nbd max_part=16"
    write(machine.sys / "block/nbd0", "")
    write(machine.sys / "module/nbd/parameters/max_part", "0\n")
    assert "max_part=0" in check(machine, "nbd devices").found
    write(machine.sys / "module/nbd/parameters/max_part", "16\n")
    assert check(machine, "nbd devices").ok is True
    shutil.rmtree(machine.sys / "block")
    shutil.rmtree(machine.modules / KERNEL)
    assert "does not have it" in check(machine, "nbd devices").found


def test_an_ordinary_user_needs_fusermount_for_fuse(machine: Host) -> None:
    remove_program(machine, "fusermount3")
    (machine.dev / "fuse").chmod(0o666)
    with ordinary_user():
        found = check(machine, "FUSE")
    assert found.ok is None
    assert found.fix == "sudo apt-get install fuse3"


def test_every_way_to_mount_is_asked_and_no_module_is_loaded(
    machine: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool]] = []

    def answer(name: str, reason: str | None) -> Callable[..., str | None]:
        def missing(*, load: bool = True) -> str | None:
            asked.append((name, load))
            return reason

        return missing

    for name, mechanism in mechanisms():
        reason = "no luck here" if name == "nbd" else None
        monkeypatch.setattr(mechanism, "missing", answer(name, reason))
    for name in ("fuse", "export"):
        assert check(machine, f"mount --via {name}").found == "every image"
    assert check(machine, "mount --via loop") == Check(
        "mount --via loop", True, False, "raw images"
    )
    assert check(machine, "mount --via nbd") == Check(
        "mount --via nbd", None, False, "no luck here"
    )
    assert {name for name, _ in asked} == set(MECHANISMS)
    assert not any(load for _, load in asked)


def test_an_ordinary_user_is_told_what_only_root_can_mount(machine: Host) -> None:
    with ordinary_user():
        found = check(machine, "mount --via loop")
    assert (found.ok, found.fix) == (None, "run imgtool as root")
    assert "root" in found.found


def test_a_launch_is_reported_with_its_seconds(machine: Host) -> None:
    found = examine(host=machine, launch=True, launcher=lambda: 12.34)[-1]
    assert (found.name, found.ok) == ("launch", True)
    assert "12.3 s" in found.found


def test_failed_launch_stops_the_main_job_and_gives_its_hint(machine: Host) -> None:
    def fail() -> float:
        raise HostError("the appliance does not start", hint="buy memory")

    found = examine(host=machine, launch=True, launcher=fail)[-1]
    assert (found.ok, found.required, found.fix) == (False, True, "buy memory")


def test_nothing_is_launched_unless_asked(machine: Host) -> None:
    def forbidden() -> float:
        raise AssertionError("launched")

    names = [check.name for check in examine(host=machine, launcher=forbidden)]
    assert "launch" not in names
    with pytest.raises(UsageError):
        examine(host=machine, launch=True)


def test_the_programs_that_are_asked_leave_nothing_behind(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program = tmp_path / "bin/supermin"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nmkdir "${TMPDIR:-/var/tmp}/left"; echo supermin 5.2.2\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert check(machine, "supermin").found == "5.2.2"
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]
    assert not Path("/var/tmp/left").exists()
