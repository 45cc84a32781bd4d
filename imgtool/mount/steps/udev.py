"""Keeping the host's udev away from the devices of a mount.

udev looks into every block device that appears: it gives it names by UUID and label, which clones
share with the host's own disks, activates volume groups, assembles RAIDs, tells the desktop. For
devices of a mount it must do none of that. A rule of their own says so, for as long as they are
there, and is in force before they are.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from imgtool.errors import HostError
from imgtool.host.process import Limits, ProgramFailed, run

_RULES = Path("/run/udev/rules.d")
# After the rules that decode device-mapper's own flags, before those that look into devices: the
# first are 10 and 11 upstream, 55 and 56 on Debian, the others 13 and 60.
_NAMES = ("12-imgtool-{id}.rules", "57-imgtool-{id}.rules")
_MOMENT = Limits(wall=60)
_TRIES = 3


def running() -> bool:
    """Whether there is a udev to keep away."""
    return Path("/run/udev/control").exists()


def _tell(*words: str) -> None:
    """Tell udev, again if that fails: a busy udev may close the connection (broken pipe).

    After the last try it is left: udev sees rules that changed by itself within three seconds.
    """
    with contextlib.suppress(HostError):
        for _ in range(_TRIES):
            with contextlib.suppress(ProgramFailed):
                run(["udevadm", *words], limits=_MOMENT)
                return


def _reload() -> None:
    _tell("control", "--reload")


def _rule_for(device: str) -> str:
    return (
        f'SUBSYSTEM=="block", KERNEL=="{device}|{device}p*", '
        'ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1", ENV{UDISKS_IGNORE}="1"'
    )


def _files(mount_id: str) -> list[Path]:
    return [_RULES / name.format(id=mount_id) for name in _NAMES]


def _write(mount_id: str, lines: list[str], *, in_force: bool = True) -> None:
    for rules in _files(mount_id):
        draft = rules.with_suffix(".draft")
        draft.write_text("\n".join(dict.fromkeys(lines)) + "\n")
        draft.replace(rules)
    if in_force:
        _reload()


def _lines(mount_id: str) -> list[str]:
    rules = _files(mount_id)[0]
    return rules.read_text().splitlines() if rules.exists() else []


def keep_away(mount_id: str, *devices: str) -> None:
    """Write the rule for these devices, by kernel name, and for what the mount itself maps.

    It is in force once it names a device: what is mapped stands on one.
    """
    if not running():
        return
    _RULES.mkdir(exist_ok=True)
    lines = _lines(mount_id) or [
        "# Written by imgtool; gone with the mount.",
        f'SUBSYSTEM=="block", ENV{{DM_NAME}}=="*imgtool?{mount_id}*", '
        'ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1", '
        'ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1", ENV{UDISKS_IGNORE}="1"',
    ]
    lines += [_rule_for(device) for device in devices]
    _write(mount_id, lines, in_force=bool(devices))


def leave_alone(mount_id: str, device: str) -> None:
    """Take a device out of the rule: somebody else was faster, and it is theirs."""
    if running():
        _write(mount_id, [line for line in _lines(mount_id) if line != _rule_for(device)])


def settle() -> None:
    """Wait until udev has done with what it was told."""
    if running():
        _tell("settle", "--timeout=10")


def let_go(mount_id: str) -> None:
    """Remove the rule."""
    found = False
    for rules in _files(mount_id):
        for suffix in (".rules", ".draft"):
            rules = rules.with_suffix(suffix)
            if rules.exists():
                found = True
                rules.unlink(missing_ok=True)
    if found and running():
        _reload()
