"""Containers as docker and podman make them: runc, the profile for system calls of both, masked
paths, and few capabilities or none.

The root is one of the host's own release, so that the tests' Python runs in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Of golang-github-containers-common; moby's has the same calls.
PROFILE = Path("/usr/share/containers/seccomp.json")
PACKAGES = ("bubblewrap", "e2fsprogs", "python3", "python3-guestfs", "python3-libnbd", "qemu-utils")
# What docker leaves to a container's root.
CAPABILITIES = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL"),
    *("CAP_NET_BIND_SERVICE", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID"),
    "CAP_SYS_CHROOT",
)
_MASKED = (
    *("/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware"),
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


@dataclass(frozen=True)
class Box:
    """Containers on one root; `images` is a folder that they see as it is, read-only."""

    root: Path
    images: Path

    def run(
        self, *words: str | Path, user: int = 0, without: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """What a program says in a new container, as this user, with the usual profile but for the
        calls in `without`."""
        for folder in map(Path, self._folders()):
            (self.root / folder.relative_to("/")).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as bundle:
            config = self._config([str(word) for word in words], user, without)
            Path(bundle, "config.json").write_text(json.dumps(config))
            name = f"imgtool-{os.getpid()}-{Path(bundle).name}"
            state = Path(bundle, "state")
            return subprocess.run(
                ["runc", "--root", state, "run", "--bundle", bundle, name],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=300,
            )

    def imgtool(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """As `run`, for this tree's imgtool."""
        return self.run(sys.executable, "-m", "imgtool", *words, **options)

    def _folders(self) -> list[str]:
        # Some of what is needed may be Debian's on the host; the release is the same.
        host = {name for name in sys.path if name.endswith("dist-packages") and Path(name).is_dir()}
        return sorted({str(ROOT), sys.prefix, str(self.images), *host})

    def _config(self, words: Sequence[str], user: int, without: Sequence[str]) -> dict[str, Any]:
        held = list(CAPABILITIES) if user == 0 else []
        temporary = [_mount(at, "tmpfs", "mode=1777") for at in ("/tmp", "/var/tmp")]
        bound = [_mount(at, "bind", "rbind", "ro", source=at) for at in self._folders()]
        return {
            "ociVersion": "1.0.2",
            "hostname": "box",
            "root": {"path": str(self.root), "readonly": True},
            "process": {
                "user": {"uid": user, "gid": user},
                "args": words,
                "cwd": str(ROOT),
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp"],
                "capabilities": {
                    "bounding": list(CAPABILITIES),
                    "effective": held,
                    "permitted": held,
                },
            },
            "mounts": [
                _mount("/proc", "proc"),
                _mount("/dev", "tmpfs", "nosuid", "mode=755"),
                _mount("/sys", "sysfs", "nosuid", "noexec", "nodev", "ro"),
                *temporary,
                *bound,
            ],
            "linux": {
                "namespaces": [
                    {"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")
                ],
                "maskedPaths": list(_MASKED),
                "readonlyPaths": list(_READ_ONLY),
                "seccomp": _profile(held, without),
            },
        }


def _mount(at: str, kind: str, *options: str, source: str | None = None) -> dict[str, Any]:
    return {
        "destination": at,
        "type": kind,
        "source": source or kind,
        "options": list(options),
    }


def _profile(held: Sequence[str], without: Sequence[str]) -> dict[str, Any]:
    """The profile for a container with these capabilities, as runc takes it."""
    profile = json.loads(PROFILE.read_text())
    machine = os.uname().machine
    arch = {"x86_64": "amd64", "aarch64": "arm64"}[machine]
    rules = []
    for rule in profile["syscalls"]:
        asked, barred = rule.get("includes") or {}, rule.get("excludes") or {}
        if not set(asked.get("caps") or ()) <= set(held) or set(barred.get("caps") or ()) & set(
            held
        ):
            continue
        if arch not in asked.get("arches", [arch]) or arch in barred.get("arches", []):
            continue
        names = [name for name in rule["names"] if name not in without]
        kept = {key: rule[key] for key in ("action", "errnoRet") if rule.get(key) is not None}
        if names:
            rules.append({"names": names, "args": rule.get("args") or [], **kept})
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [f"SCMP_ARCH_{machine.upper()}"],
        "syscalls": rules,
    }
