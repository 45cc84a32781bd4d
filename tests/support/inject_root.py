"""A folder that looks like the root of a guest, for steps to be taken in without an appliance."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from imgtool.errors import NotInGuestError
from imgtool.guest.changes import Changes
from imgtool.guest.model import Entry
from imgtool.inject.planner import LocatedStep, Outcome, plan
from imgtool.inject.steps.step import Step

PASSWD = "root:x:0:0:root:/root:/bin/bash\nalice:x:1000:1000:Alice:/home/alice:/bin/bash\n"
TREE: Mapping[str, str] = {
    "etc/hostname": "dead-guest\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n127.0.1.1\tdead-guest\n\n::1\tlocalhost ip6-localhost\n",
    "etc/debian_version": "12.0\n",
    "etc/passwd": PASSWD,
    "etc/group": "root:x:0:\nsudo:x:27:\nalice:x:1000:\nwww-data:x:33:\n",
    "etc/shadow": "root:*:19800:0:99999:7:::\nalice:!:19800:0:99999:7:::\n",
    "etc/gshadow": "root:*::\nsudo:*::\nalice:!::\nwww-data:*::\n",
    "etc/login.defs": "# comment\nUID_MIN\t\t1000\nUID_MAX 60000\nHOME_MODE\t0700\n"
    "ENCRYPT_METHOD YESCRYPT\n",
    "etc/default/useradd": "SHELL=/bin/sh\n",
    "etc/skel/.profile": "# profile\n",
    "etc/sudoers": "root ALL=(ALL:ALL) ALL\n@includedir /etc/sudoers.d\n",
    "etc/subuid": "alice:100000:65536\n",
    "etc/timezone": "Etc/UTC\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "var/lib/dbus/machine-id": "0123456789abcdef0123456789abcdef\n",
    "etc/ssh/ssh_host_ed25519_key": "private\n",
    "etc/ssh/ssh_host_ed25519_key.pub": "public\n",
    "etc/ssh/sshd_config": "\n",
    "etc/network/interfaces": "auto lo\niface lo inet loopback\n",
    "usr/sbin/ifup": "",
    "usr/bin/bash": "",
    "usr/share/zoneinfo/Europe/Warsaw": "TZif",
    "usr/share/zoneinfo/Etc/UTC": "TZif",
    "usr/lib/systemd/systemd": "",
    "usr/lib/systemd/system/ssh.service": "[Unit]\nDescription=x\n[Install]\n"
    "WantedBy=multi-user.target\nAlias=sshd.service\n",
    "usr/lib/systemd/system/cron.service": "[Install]\nWantedBy=multi-user.target\n",
    "usr/lib/systemd/system/static.service": "[Service]\nExecStart=/bin/true\n",
    "usr/lib/systemd/system/getty@.service": "[Install]\nWantedBy=getty.target\n"
    "DefaultInstance=tty1\n",
    "usr/lib/systemd/system/pair.socket": "[Install]\nWantedBy=sockets.target\nAlso=pair.service\n",
    "usr/lib/systemd/system/pair.service": "[Install]\nRequiredBy=a.target \\\n b.target\n"
    "Also=pair.socket\n",
    "home/alice/letter.txt": "dear guest\n",
    "root/.bashrc": "",
}


class Root:
    """A guest's files below a folder of the host; owners are remembered, not set."""

    windows = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owners: dict[str, tuple[int, int]] = {"/home/alice": (1000, 1000)}
        for name, text in TREE.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        for link in ("bin", "sbin", "lib"):
            (folder / link).symlink_to(f"usr/{link}")
        (folder / "etc/shadow").chmod(0o640)

    def host(self, path: str | bytes) -> Path:
        """Where a path without links is on the host."""
        return self.folder / os.fsdecode(path).lstrip("/")

    def lstat(self, path: str | bytes) -> Entry:
        name = os.fsdecode(path)
        try:
            found = self.host(path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise NotInGuestError("no such file", subject=name) from None
        target = None
        if self.host(path).is_symlink():
            target = os.fsencode(os.readlink(self.host(path)))
        return Entry(
            os.fsencode(name), found.st_mode, *self.owners.get(name, (0, 0)),
            size=found.st_size, mtime_ns=found.st_mtime_ns, target=target, nlink=found.st_nlink,
        )  # fmt: skip

    def entries(self, path: str | bytes, *, on_problem: object = None) -> Iterator[Entry]:
        for child in sorted(self.host(path).iterdir()):
            yield self.lstat("/" + str(child.relative_to(self.folder)))

    def open(self, path: str | bytes) -> BinaryIO:
        return self.host(path).open("rb")

    def read_bytes(self, path: str | bytes, limit: int | None = None) -> bytes:
        return self.host(path).read_bytes()

    def carry_out(self, changes: Changes) -> None:
        """What the appliance does with changes."""
        for path in changes.removed:
            at = self.host(path)
            shutil.rmtree(at) if at.is_dir() and not at.is_symlink() else at.unlink()
        for entry, content in changes.made:
            name, at = os.fsdecode(entry.path), self.host(entry.path)
            if entry.type == "directory":
                at.mkdir()
            elif entry.type == "symlink":
                at.symlink_to(os.fsdecode(entry.target or b""))
            else:
                assert content is not None
                at.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
            if entry.type != "symlink":
                at.chmod(entry.mode & 0o7777)
            self.owners[name] = (entry.uid, entry.gid)
        for path, content in changes.rewritten:
            raw = content.read_bytes() if isinstance(content, Path) else content
            self.host(path).write_bytes(raw)
        for path, owner in changes.owners:
            self.owners[path] = owner
        for path, mode in changes.modes:
            self.host(path).chmod(mode)

    def take(self, *steps: Step, variables: Mapping[str, str] | None = None) -> list[Outcome]:
        """Check and take steps, and carry out what they come to unless one fails."""
        given = variables or {}
        for step in steps:
            step.check(given)
        placed = [LocatedStep(step, f"step {n}") for n, step in enumerate(steps, 1)]
        outcomes, changes = plan(self, placed, given)  # type: ignore[arg-type]
        if all(outcome.error is None for outcome in outcomes):
            self.carry_out(changes)
        return list(outcomes)

    def twice(self, *steps: Step, variables: Mapping[str, str] | None = None) -> list[str]:
        """What became of steps; taken once more, none of them changes anything."""
        first = self.take(*steps, variables=variables)
        assert [outcome.error for outcome in first] == [None] * len(first)
        placed = [LocatedStep(step, "") for step in steps]
        outcomes, changes = plan(self, placed, variables or {})  # type: ignore[arg-type]
        assert {outcome.status for outcome in outcomes} == {"unchanged"}, outcomes
        assert not changes
        return [outcome.status for outcome in first]

    def text(self, path: str) -> str:
        """A file as text."""
        return self.host(path).read_text()

    def mode(self, path: str) -> int:
        """The mode of a path."""
        return self.host(path).lstat().st_mode & 0o7777
