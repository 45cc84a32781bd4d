"""What imgtool needs of the machine, and whether it is there: `examine()`.

Every check is one line for the user, with the fix where something can be done. Nothing here changes
the machine, and nothing but `launch=True` takes longer than a moment.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imgtool.engines.libguestfs.appliance.launch import last_accelerator, saved_home
from imgtool.engines.libguestfs.appliance.saved import all_saved
from imgtool.errors import HostError, UsageError
from imgtool.host.process import Limits, run
from imgtool.host.system_packages import PACKAGES, binding_fix, install

CACHE_NEEDS = 1_000_000_000  # bytes, while supermin builds the appliance
MEMORY_NEEDS = 1_500_000_000  # bytes: the appliance's 1280 MiB and QEMU's own
_MOMENT = Limits(wall=10)

# linux/kvm.h
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_CREATE_VCPU = 0xAE41


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    `ok` is True if it is there and works, False if it is not and something of the main job suffers,
    None if it is not there and does not matter for the main job. The main job cannot run if a
    `required` check is not ok. `found` is what was seen; `fix` is what can be done.
    """

    name: str
    ok: bool | None
    required: bool
    found: str
    fix: str | None = None


@dataclass(frozen=True)
class Host:
    """Where the machine's parts are looked for. Tests point this at a machine of their own."""

    boot: Path = Path("/boot")
    dev: Path = Path("/dev")
    modules: Path = Path("/lib/modules")
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    libraries: Path = Path("/usr/lib")
    release: str = platform.release()
    machine: str = platform.machine()
    system_prefix: Path = Path("/usr")


def examine(
    *,
    launch: bool = False,
    launcher: Callable[[], float] | None = None,
    host: Host | None = None,
) -> tuple[Check, ...]:
    """Look at everything that imgtool needs, most basic things first.

    With `launch`, also starts the appliance through `launcher`, which returns the seconds that it
    took or raises `HostError`.
    """
    if launch and launcher is None:
        raise UsageError("examine(launch=True) needs a launcher")
    host = host or Host()
    kvm = _kvm(host)
    checks = [
        *_bindings(host),
        *_qemu(host),
        *_appliance(host),
        kvm,
        _check_saved_appliance(kvm),
        _cache_space(),
        _memory(host),
        *_sandboxes(host),
        _fuse(host),
        _device(host, "loop devices", "loop", "loop-control", "loop-control"),
        _nbd(host),
        _device(host, "device-mapper", "dm_mod", "mapper/control", "device-mapper"),
        *_mounts(),
    ]
    if launch and launcher is not None:
        checks.append(_launch(launcher))
    return tuple(checks)


def _accessible(path: Path, mode: int) -> bool:
    # The effective user is the one that open() asks about.
    return os.access(path, mode, effective_ids=True)


def _exists(path: Path) -> bool:
    # Unlike Path.exists() no error for what is in a folder that this user cannot enter.
    return _accessible(path, os.F_OK)


def _text(path: Path) -> str:
    """What is in a file, stripped; nothing if there is none that this user can read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _bindings(host: Host) -> Iterator[Check]:
    for module, package in (("guestfs", "python3-guestfs"), ("nbd", "python3-libnbd")):
        name = f"Python binding {module}"
        required = module == "guestfs"
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            ok = False if required else None
            fix = binding_fix(package, host.system_prefix)
            yield Check(name, ok, required, f"{error} ({sys.executable})", fix)
        else:
            yield Check(name, True, required, str(found.__file__))
    # Looked for, not imported: libparted runs in a sandbox alone. Without it `partitions` reads no
    # tables of other systems, and `mount --via loop` has no second opinion.
    yield _module(
        "Python binding parted", "parted", binding_fix("python3-parted", host.system_prefix)
    )
    # Without it the direct engine leaves all to the appliance.
    known = ("google_crc32c", "crc32c")
    crc = next((name for name in known if importlib.util.find_spec(name)), known[0])
    fix = binding_fix("python3-crc32c", host.system_prefix)
    yield _module("Python module for CRC-32C", crc, fix)


def _module(name: str, module: str, fix: str) -> Check:
    found = importlib.util.find_spec(module)
    if found is None:
        return Check(name, None, False, f"not found by {sys.executable}", fix)
    return Check(name, True, False, str(found.origin))


def _qemu(host: Host) -> Iterator[Check]:
    system = f"qemu-system-{host.machine}"
    package = "qemu-system-x86" if host.machine == "x86_64" else "qemu-system-arm"
    yield _program("qemu-img", PACKAGES["qemu-img"], required=True)
    yield _program(os.environ.get("LIBGUESTFS_HV") or system, package, required=True)
    yield _program("qemu-nbd", PACKAGES["qemu-nbd"], required=False)
    yield _program("qemu-storage-daemon", PACKAGES["qemu-storage-daemon"], required=False)


def _program(program: str, package: str, *, required: bool) -> Check:
    missing = False if required else None
    if shutil.which(program) is None:
        return Check(program, missing, required, "not found on PATH", install(package))
    try:
        # supermin makes a folder for itself before it knows what it is asked, and leaves it.
        with tempfile.TemporaryDirectory(prefix="imgtool-") as folder:
            done = run([program, "--version"], limits=_MOMENT, env={"TMPDIR": folder})
    except HostError as error:
        fix = f"sudo apt-get install --reinstall {package}"
        return Check(program, missing, required, error.message, fix)
    version = re.search(r"\d+\.\d[\w.]*", done.stdout.decode(errors="replace"))
    return Check(program, True, required, version[0] if version else "version unknown")


def _appliance(host: Host) -> Iterator[Check]:
    """supermin, its parts, the kernel and the extras; or none of them for a fixed appliance."""
    path = os.environ.get("LIBGUESTFS_PATH")
    # libguestfs takes the first folder with supermin's parts, and only then looks for a fixed one.
    folders = (
        [Path(p) for p in path.split(":")] if path else sorted(host.libraries.glob("*/guestfs"))
    )
    parts = next((f / "supermin.d" for f in folders if _exists(f / "supermin.d")), None)
    fixed = next(
        (f for f in folders if all(_exists(f / n) for n in ("kernel", "initrd", "root"))), None
    )
    if parts is None and fixed is not None:
        yield Check("appliance", True, True, f"fixed appliance in {fixed}")
        for name in ("supermin", "appliance kernel", "appliance extras"):
            yield Check(name, None, False, "not needed: the appliance is a fixed one")
        return
    yield _program("supermin", PACKAGES["supermin"], required=True)
    if parts is None:
        where = path or host.libraries
        fix = "unset LIBGUESTFS_PATH, or correct it" if path else install("python3-guestfs")
        yield Check("appliance", False, True, f"neither supermin.d nor a fixed one in {where}", fix)
    elif not _exists(parts / "daemon.tar.gz"):
        fix = "sudo apt-get install --reinstall libguestfs0"
        yield Check("appliance", False, True, f"{parts} is incomplete", fix)
    else:
        yield Check("appliance", True, True, str(parts))
    yield _kernel(host)
    if parts is not None:
        yield _extras(parts)


def _by_version(kernel: Path) -> list[tuple[int, str]]:
    pieces = re.findall(r"\d+|\D+", kernel.name)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _kernel(host: Host) -> Check:
    """The kernel that supermin will take: the newest in /boot that has its modules."""
    name = "appliance kernel"
    package = {"x86_64": "linux-image-cloud-amd64", "aarch64": "linux-image-cloud-arm64"}
    fix = f"{install(package.get(host.machine, 'linux-image'))} (Ubuntu: linux-image-virtual)"
    if chosen := os.environ.get("SUPERMIN_KERNEL"):
        kernel = Path(chosen)
    else:
        kernels = sorted(host.boot.glob("vmlinu?-*"), key=_by_version)
        if not kernels:
            return Check(name, False, True, f"no kernel in {host.boot}", fix)
        complete = [
            k for k in kernels if _exists(host.modules / k.name.partition("-")[2] / "modules.dep")
        ]
        if not complete:
            found = f"{kernels[-1]} has no modules in {host.modules}"
            return Check(name, False, True, found, fix)
        kernel = complete[-1]
    if not _exists(kernel):
        found = f"{kernel}, named by SUPERMIN_KERNEL, does not exist"
        return Check(name, False, True, found, "unset SUPERMIN_KERNEL, or correct it")
    if not _accessible(kernel, os.R_OK):
        # Ubuntu installs its kernels for root's eyes only.
        return Check(
            name,
            False,
            True,
            f"{kernel} cannot be read by this user",
            f"sudo chmod 0644 {kernel}; to keep it so: "
            f"sudo dpkg-statoverride --update --add root root 0644 {kernel}",
        )
    return Check(name, True, True, str(kernel))


# What the appliance lacks unless asked for: what for, the package in supermin's lists, a program
# of it (supermin leaves out what is listed but not installed), and what puts it there.
_EXTRAS = (
    ("XFS", "xfsprogs", "mkfs.xfs", "libguestfs-xfs"),
    ("HFS+", "hfsplus", "hpmount", "libguestfs-hfsplus"),
    ("rsync", "rsync", "rsync", "libguestfs-rsync"),
    ("SELinux labels", "policycoreutils", "setfiles", None),
)


def _extras(parts: Path) -> Check:
    name = "appliance extras"
    listed = {word for file in parts.glob("*packages*") for word in _text(file).split()}
    # Debian gives ordinary users a PATH without the sbin folders.
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    missing = [
        (purpose, package)
        for purpose, word, program, package in _EXTRAS
        if word not in listed or shutil.which(program, path=path) is None
    ]
    if not missing:
        return Check(name, True, False, ", ".join(extra[0] for extra in _EXTRAS))
    packages = " ".join(package for _, package in missing if package)
    fixes = [install(packages)] if packages else []
    if any(package is None for _, package in missing):
        fixes.append("scripts/setup.sh adds setfiles")
    found = f"without {', '.join(purpose for purpose, _ in missing)}"
    return Check(name, False, False, found, "; ".join(fixes))


def _kvm(host: Host) -> Check:
    """Whether a virtual machine can be made. That it also runs, only a launch can tell."""
    node = host.dev / "kvm"
    slow = "emulation is used, which is slower"
    if not _exists(node):
        fix = "enable virtualisation in the firmware or, in a guest, nested virtualisation"
        return Check("KVM", None, False, f"no {node}: {slow}", fix)
    if not _accessible(node, os.R_OK | os.W_OK):
        fix = "sudo usermod -aG kvm $USER, and log in again"
        return Check("KVM", None, False, f"no permission for {node}: {slow}", fix)
    opened: list[int] = []
    try:
        opened.append(os.open(node, os.O_RDWR | os.O_CLOEXEC))
        version = fcntl.ioctl(opened[0], _KVM_GET_API_VERSION, 0)
        opened.append(fcntl.ioctl(opened[0], _KVM_CREATE_VM, 0))
        opened.append(fcntl.ioctl(opened[1], _KVM_CREATE_VCPU, 0))
    except OSError as error:
        steps = ("be opened", "make a virtual machine", "make a virtual processor")
        found = f"{node} cannot {steps[len(opened)]}: {error.strerror}; {slow}"
        return Check("KVM", None, False, found, "nested virtualisation may be off, or KVM in use")
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)
    if last_accelerator() == "tcg":
        found = f"{node} makes virtual machines, but the appliance did not start with it: {slow}"
        return Check("KVM", None, False, found, "nested virtualisation may be broken on the host")
    found = f"{node} makes virtual machines (API {version})"
    if last_accelerator() != "kvm":
        found += "; whether they run, --launch tries"
    return Check("KVM", True, False, found)


def _check_saved_appliance(kvm: Check) -> Check:
    """Whether an emulated appliance was saved that commands can continue."""
    name = "saved appliance"
    if kvm.ok:
        return Check(name, None, False, "not needed where appliances run with KVM")
    found = all_saved(saved_home())
    fresh = [one for one in found if one.fresh]
    if fresh:
        disks = ", ".join(str(one.disks) for one in fresh)
        size = sum(one.size for one in fresh) / 1e6
        return Check(name, True, False, f"for guests of so many disks: {disks} ({size:.0f} MB)")
    why = "of another QEMU, kernel or libguestfs" if found else "none"
    return Check(
        name, None, False, f"{why}: each command starts an appliance", "imgtool appliance save"
    )


def _cache_space() -> Check:
    """Room where libguestfs keeps the appliance that supermin builds."""
    name = "space for the appliance"
    set_by = next((v for v in ("LIBGUESTFS_CACHEDIR", "TMPDIR") if os.environ.get(v)), None)
    folder = Path(os.environ[set_by] if set_by else "/var/tmp")
    other = "set LIBGUESTFS_CACHEDIR to another folder"
    if not _accessible(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        return Check(name, False, True, f"{folder} is not a folder that can be written to", other)
    numbers = os.statvfs(folder)
    free = numbers.f_bavail * numbers.f_frsize
    built = _exists(folder / f".guestfs-{os.geteuid()}" / "appliance.d" / "root")
    found = f"{free / 1e9:.1f} GB free in {folder}{', and one is built' if built else ''}"
    if free < CACHE_NEEDS and not built:
        return Check(name, False, True, found, f"free {CACHE_NEEDS / 1e9:.0f} GB, or {other}")
    return Check(name, True, True, found)


def _memory(host: Host) -> Check:
    said = re.search(r"^MemAvailable:\s*(\d+) kB", _text(host.proc / "meminfo"), re.MULTILINE)
    if said is None:
        return Check("memory", None, False, f"not told by {host.proc / 'meminfo'}")
    available = int(said[1]) * 1024
    limit = host.sys / "fs/cgroup/memory.max"  # a container's own
    if (allowed := _text(limit)).isdigit():
        available = min(available, int(allowed))
    found = f"{available / 1e9:.1f} GB available"
    if available < MEMORY_NEEDS:
        fix = f"the appliance needs {MEMORY_NEEDS / 1e9:.1f} GB: stop something, or add memory"
        return Check("memory", False, True, found, fix)
    return Check("memory", True, True, found)


def _sandboxes(host: Host) -> Iterator[Check]:
    """The kinds of sandbox that the direct engine can have, tried as it would start them."""
    from imgtool.engines.direct.parent.sandbox import Kind, try_kind
    from imgtool.engines.direct.wire.refusals import NoSandbox, Unsupported

    used = False
    for kind, name in (
        (Kind.NAMESPACES, "sandbox (bubblewrap)"),
        (Kind.LANDLOCK, "sandbox (Landlock)"),
    ):
        try:
            try_kind(kind)
        except NoSandbox as error:
            fix = _namespaces_fix(host) if kind is Kind.NAMESPACES else _LANDLOCK_FIX
            yield Check(name, None, False, str(error), fix)
        except Unsupported as error:  # of which there is a line above
            yield Check(name, None, False, str(error))
        else:
            journals = "" if kind is Kind.NAMESPACES else "; no journal is replayed in it"
            yield Check(name, True, False, "works" if used else f"works, and is used{journals}")
            used = True


_LANDLOCK_FIX = "Linux 5.13 and newer have it; in a container: a profile that permits landlock_*"


def _namespaces_fix(host: Host) -> str:
    if shutil.which("bwrap") is None:
        return install("bubblewrap")
    switches = {"unprivileged_userns_clone": "1", "apparmor_restrict_unprivileged_userns": "0"}
    for switch, wanted in switches.items():
        if _text(host.proc / "sys/kernel" / switch) not in ("", wanted):
            return f"sudo sysctl kernel.{switch}={wanted}"
    return "allow user namespaces (in a container: a seccomp profile that permits them)"


def _fuse(host: Host) -> Check:
    found = _device(host, "FUSE", "fuse", "fuse", "fuse")
    program = shutil.which("fusermount3") or shutil.which("fusermount")
    if found.ok and program is None and os.geteuid() != 0:  # root mounts without it
        return Check("FUSE", None, False, "fusermount3 not found on PATH", install("fuse3"))
    return found


def _device(host: Host, name: str, module: str, node_name: str, misc: str) -> Check:
    """A control device in /dev: it counts only with the driver behind it."""
    node = host.dev / node_name
    if not _exists(host.sys / "class/misc" / misc):
        return _module_to_load(host, name, module)
    if not _exists(node):
        return Check(
            name, None, False, f"no {node}", f"in a container: run it with --device {node}"
        )
    if not _accessible(node, os.R_OK | os.W_OK):
        return Check(name, None, False, f"no permission for {node}", "run as root")
    return Check(name, True, False, str(node))


def _module_to_load(host: Host, name: str, module: str, options: str = "") -> Check:
    index = host.modules / host.release / "modules.dep"
    names = {
        Path(line.partition(":")[0]).name.partition(".ko")[0] for line in _text(index).splitlines()
    }
    if module in {name.replace("-", "_") for name in names}:
        fix = f"sudo modprobe {module}{options}"
        return Check(name, None, False, "its module is not loaded", fix)
    return Check(name, None, False, f"this kernel ({host.release}) does not have it")


def _nbd(host: Host) -> Check:
    if not _exists(host.sys / "block/nbd0"):
        return _module_to_load(host, "nbd devices", "nbd", " max_part=16")
    most = host.sys / "module/nbd/parameters/max_part"
    if _text(most) == "0":
        fix = "sudo modprobe -r nbd; sudo modprobe nbd max_part=16"
        return Check("nbd devices", None, False, "loaded without partitions (max_part=0)", fix)
    return Check("nbd devices", True, False, "loaded")


def _mounts() -> Iterator[Check]:
    """What `mount --via` can do here, asked of the mounts themselves."""
    from imgtool.mount.mechanisms.available import not_root
    from imgtool.mount.mechanisms.registry import mechanisms

    for via, mechanism in mechanisms():
        name, missing = f"mount --via {via}", mechanism.missing(load=False)
        if missing is None:
            images = "raw images" if mechanism.raw_only else "every image"
            yield Check(name, True, False, images)
        else:
            fix = "run imgtool as root" if missing == not_root() else None
            yield Check(name, None, False, missing, fix)


def _launch(launcher: Callable[[], float]) -> Check:
    try:
        seconds = launcher()
    except HostError as error:
        return Check("launch", False, True, str(error), error.hint)
    return Check("launch", True, True, f"the appliance was ready in {seconds:.1f} s")
