"""The keys by which an SSH server is known."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from imgtool.inject.guest_files.units import ADMIN, FOLDERS, has_systemd
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import Schema
from imgtool.inject.steps.services import enable
from imgtool.inject.steps.step import Option, StepContext, WordStep

UNIT = "imgtool-ssh-host-keys.service"
_KEY = re.compile(r"ssh_host_[A-Za-z0-9_]*key(\.pub|-cert\.pub)?")
# What makes the keys elsewhere: sshd-keygen.target and sshd-keygen@.service (Fedora),
# sshdgenkeys.service (Arch), sshd-gen-keys-start (openSUSE).
_MAKES_KEYS = re.compile(rb"keygen|gen-?keys")
SERVICE = """\
[Unit]
Description=SSH host keys of this machine's own
ConditionPathExistsGlob=!/etc/ssh/ssh_host_*_key
After=cloud-init.service
Before=ssh.service sshd.service

[Service]
Type=oneshot
ExecStart=/usr/bin/ssh-keygen -A

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class SshHostKeys(WordStep):
    """No SSH host keys, lest several guests have the same; the guest makes its own."""

    kind = "ssh-host-keys"
    word = "remove"
    schema: ClassVar[Schema] = {"const": word}
    option = Option("--ssh-host-keys-remove", None, "No SSH host keys.")

    def apply(self, site: StepContext) -> bool:
        """Delete /etc/ssh/ssh_host_*_key and .pub, and see to it that new ones are made."""
        view = site.view
        keys = [name for name in view.names("/etc/ssh") if _KEY.fullmatch(name)]
        for name in keys:
            view.delete(f"/etc/ssh/{name}")
        made = _nobody_makes_them(view) and _makes_them(view)
        return bool(keys) or made


def _nobody_makes_them(view: GuestOverlay) -> bool:
    """Whether sshd would not start any more. Debian's package makes keys when it is installed, and
    no unit of it does."""
    programs = ("/usr/sbin/sshd", "/usr/bin/ssh-keygen")
    if not has_systemd(view) or not all(view.kind(path) == "file" for path in programs):
        return False
    paths = [f"{folder}/{name}" for folder in FOLDERS for name in ("ssh.service", "sshd.service")]
    texts = [view.read(path) or b"" for path in paths if view.kind(path) == "file"]
    return bool(texts) and not any(map(_MAKES_KEYS.search, texts))


def _makes_them(view: GuestOverlay) -> bool:
    changed = view.folder(ADMIN)
    changed |= view.write(f"{ADMIN}/{UNIT}", SERVICE.encode(), mode=0o644, owner=(0, 0))
    return enable(view, UNIT) or changed
