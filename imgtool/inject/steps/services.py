"""Enabling and disabling units as `systemctl --root` does it, without running it.

Source: systemctl(1), and src/shared/install.c of systemd for what is linked where.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from imgtool.errors import ImgtoolError, UsageError
from imgtool.inject.guest_files.units import (
    ADMIN,
    FOLDERS,
    NULL,
    Unit,
    find,
    masked,
    require_systemd,
    unit_name,
)
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import NAMES, Schema
from imgtool.inject.steps.step import Option, Step, StepContext

ACTIONS = ("enable", "disable", "mask", "unmask")
# The keys of [Install] that make links in folders of other units, and how these are called.
_FOLDERS = {"WantedBy": "wants", "RequiredBy": "requires", "UpheldBy": "upholds"}


@dataclass(frozen=True)
class Service(Step):
    """A unit that is started with the guest, or not, or never."""

    kind = "service"
    schema: ClassVar[Schema] = {
        "description": "Units of systemd.",
        "type": "object",
        "minProperties": 1,
        "maxProperties": 1,
        "additionalProperties": False,
        "properties": dict.fromkeys(ACTIONS, NAMES),
    }
    option = Option("--service", "enable:UNIT", "Or disable:, mask:, unmask:.")
    action: str
    unit: str

    @classmethod
    def from_spec(cls, value: Mapping[str, str | list[str]], folder: Path) -> Sequence[Step]:
        """A step for each unit."""
        ((action, units),) = value.items()
        return [cls(action, unit) for unit in ([units] if isinstance(units, str) else units)]

    @classmethod
    def from_option(cls, text: str) -> Step:
        """What is done, to which unit."""
        return cls(*cls.option.two_parts(text, "enable:UNIT, disable:, mask: or unmask:"))

    @property
    def subject(self) -> str:
        """What is done, to which unit."""
        return f"{self.action} {self.unit}"

    def check(self, variables: Mapping[str, str]) -> None:
        """The action is known and the unit's name is one."""
        if self.action not in ACTIONS:
            raise UsageError(f"a service is one of: {', '.join(ACTIONS)}", subject=self.action)
        try:
            unit_name(self.unit)
        except ValueError as error:
            raise UsageError("not the name of a unit", subject=self.unit) from error

    def apply(self, site: StepContext) -> bool:
        """Make or remove the links."""
        require_systemd(site.view)
        doing = {"enable": enable, "disable": disable, "mask": _mask, "unmask": _unmask}
        return doing[self.action](site.view, unit_name(self.unit))


def enable(view: GuestOverlay, name: str) -> bool:
    """Have a unit started with what its [Install] names, and the units that it brings along.

    Raises `NotInGuestError` for a unit that is not there, `ImgtoolError` for one that is masked or
    that cannot be enabled.
    """
    return _enable(view, name, set(), asked=True)


def _enable(view: GuestOverlay, name: str, done: set[str], *, asked: bool) -> bool:
    if masked(view, name):
        raise ImgtoolError("the unit is masked", subject=name, hint="unmask it first")
    unit = find(view, name)
    if unit.name in done:
        return False
    done.add(unit.name)
    keys = (*_FOLDERS, "Alias", "Also")
    if asked and not any(unit.words(key) for key in keys):
        raise ImgtoolError(
            "the unit has no [Install] section: it is started by others, or by hand", subject=name
        )
    if unit.is_template:
        instances = unit.words("DefaultInstance")
        if not instances:
            raise ImgtoolError(
                "the unit is a template: name an instance of it",
                subject=name,
                hint=f"such as {unit.instance('NAME').name}",
            )
        unit = unit.instance(instances[-1])
    changed = False
    for key, ending in _FOLDERS.items():
        for other in unit.words(key):
            changed |= _link(view, unit, f"{ADMIN}/{_safe(other)}.{ending}/{unit.name}")
    for alias in unit.words("Alias"):
        if _safe(alias) != unit.name:
            changed |= _link(view, unit, f"{ADMIN}/{alias}")
    for other in unit.words("Also"):
        changed |= _enable(view, _safe(other), done, asked=False)
    return changed


def _safe(name: str) -> str:
    """A unit's name out of a guest's file, which may say anything."""
    try:
        if unit_name(name) != name:
            raise ValueError(name)
    except ValueError as error:
        raise ImgtoolError("its [Install] names what is no unit", subject=name) from error
    return name


def _link(view: GuestOverlay, unit: Unit, path: str) -> bool:
    entry = view.lstat(path)
    if entry is not None:
        if entry.type != "symlink":
            raise ImgtoolError("something else is where the link is to be", subject=path)
        # Whoever enabled it may have written another path of the same file.
        if view.kind(path) and view.real(path, follow=True) == view.real(unit.path, follow=True):
            return False
        target = os.fsdecode(entry.target or b"")
        if target.rpartition("/")[2] != unit.path.rpartition("/")[2]:
            raise ImgtoolError(
                f"another unit has this name: {target}", subject=path, hint="disable that one first"
            )
    view.folder(path.rpartition("/")[0])
    return view.symlink(path, unit.path)


def disable(view: GuestOverlay, name: str) -> bool:
    """Remove every link with which a unit, or what it brings along, was enabled."""
    done: set[str] = set()
    return _disable(view, name, done)


def _disable(view: GuestOverlay, name: str, done: set[str]) -> bool:
    unit = Unit(name, f"{ADMIN}/{name}", {}) if masked(view, name) else find(view, name)
    if unit.name in done:
        return False
    done.add(unit.name)

    def ours(other: str) -> bool:
        if unit.is_template:  # all of its instances go
            prefix, _, kind = unit.name.rpartition(".")
            return other.startswith(prefix) and other.endswith(f".{kind}")
        return other == unit.name

    changed = False
    for entry_name in view.names(ADMIN):
        path = f"{ADMIN}/{entry_name}"
        entry = view.lstat(path)
        if entry is None:
            continue
        if entry.type == "directory" and entry_name.endswith(
            tuple(f".{ending}" for ending in _FOLDERS.values())
        ):
            for inner in view.names(path):
                at = view.lstat(f"{path}/{inner}")
                if ours(inner) and at is not None and at.type == "symlink":
                    changed |= view.delete(f"{path}/{inner}")
        elif entry.type == "symlink" and entry.target != NULL.encode():
            target = (entry.target or b"").decode("utf-8", "replace")
            last = target.rpartition("/")[2]
            in_place = target.rpartition("/")[0] in FOLDERS or "/" not in target
            if ours(last) and (entry_name != last or not in_place):
                changed |= view.delete(path)
    for other in unit.words("Also"):
        changed |= _disable(view, _safe(other), done)
    return changed


def _mask(view: GuestOverlay, name: str) -> bool:
    if masked(view, name):
        return False
    find(view, name)
    path = f"{ADMIN}/{name}"
    entry = view.lstat(path)
    if entry is not None and entry.type != "symlink":
        raise ImgtoolError(
            "the unit's own file is where the mask is to be", subject=path, hint="disable the unit"
        )
    view.folder(ADMIN)
    return view.symlink(path, NULL)


def _unmask(view: GuestOverlay, name: str) -> bool:
    if masked(view, name):
        return view.delete(f"{ADMIN}/{name}")
    find(view, name)
    return False
