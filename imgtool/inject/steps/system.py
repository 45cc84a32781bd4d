"""Steps on what a system is called, and on its time, language and identity."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from imgtool.errors import ImgtoolError, NotInGuestError, UsageError
from imgtool.inject.guest_files.passwd import missing
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import WORD, Schema
from imgtool.inject.steps.step import Option, Step, StepContext, WordStep, filled

_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?")
_ZONES = "/usr/share/zoneinfo"
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")
_LOCALE = re.compile(r"[A-Za-z]{1,3}(_[A-Z]{2})?(\.[A-Za-z0-9-]+)?(@[a-z]+)?|C(\.UTF-8)?|POSIX")


@dataclass(frozen=True)
class _Named(Step):
    schema = WORD
    name: str

    @property
    def subject(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True)
class Hostname(_Named):
    """The name of the host, in /etc/hostname and /etc/hosts."""

    kind = "hostname"
    option = Option("--hostname", "NAME", "The host's name; {{ image }} is the image's.", once=True)

    def subject_in(self, variables: Mapping[str, str]) -> str:
        """The name, filled in."""
        return filled(self.name, variables, self.name)

    def check(self, variables: Mapping[str, str]) -> None:
        """A name as RFC 1123 has it, of at most 64 bytes as Linux has it."""
        _check_hostname(filled(self.name, variables, self.name))

    def apply(self, site: StepContext) -> bool:
        """Write the name; in /etc/hosts it replaces the old one, and stands with 127.0.1.1 where
        Debian's installer puts it."""
        view = site.view
        name = site.filled(self.name, self.name)
        _check_hostname(name)
        before = (view.read("/etc/hostname") or b"").decode("utf-8", "replace")
        old = next((x.strip() for x in before.splitlines() if x.strip()[:1] not in ("", "#")), "")
        changed = False
        if old != name:
            changed = view.write("/etc/hostname", f"{name}\n".encode())
        hosts = (view.read("/etc/hosts") or b"").decode("utf-8", "surrogateescape")
        debian = view.kind("/etc/debian_version") is not None
        new = hosts_with(hosts, old, name, always=debian)
        if new != hosts:
            changed |= view.write("/etc/hosts", os.fsencode(new))
        return changed


def _check_hostname(name: str) -> None:
    if len(name) > 64 or not all(
        len(part) <= 63 and _LABEL.fullmatch(part) for part in name.split(".")
    ):
        raise UsageError(
            "not a host name: letters, digits and '-' between dots, at most 64 in all (RFC 1123)",
            subject=name,
        )


def hosts_with(text: str, old: str, name: str, *, always: bool) -> str:
    """The text of /etc/hosts in which the host is called `name` and no longer `old`.

    With `always` a line for 127.0.1.1 is added where no line names the host (hosts(5) of Debian).
    """
    ours = [name, name.partition(".")[0]] if "." in name else [name]
    old_short = old.partition(".")[0]

    def stale(field: str) -> bool:
        if old_short in ("", "localhost") or field in ours:
            return False
        return field in (old, old_short) or field.startswith(f"{old_short}.")

    lines, named = [], False
    for line in text.splitlines():
        words, mark, comment = line.partition("#")
        address, *fields = words.split() or [""]
        names: list[str] = []
        for field in fields:
            names += [new for new in (ours if stale(field) else [field]) if new not in names]
        if address == "127.0.1.1" and not set(ours) <= set(names):
            names = [*ours, *(field for field in names if field not in ours)]
        named = named or set(ours) <= set(names)
        if names != fields:
            line = f"{address}\t{' '.join(names)}" + (f" {mark}{comment}" if mark else "")
        lines.append(line)
    if not named and always:
        at = next((n for n, one in enumerate(lines) if one.startswith("127.0.0.1")), -1) + 1
        lines.insert(at, f"127.0.1.1\t{' '.join(ours)}")
    if lines == text.splitlines():
        return text
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Timezone(_Named):
    """The time zone: /etc/localtime, and /etc/timezone where it is."""

    kind = "timezone"
    option = Option("--timezone", "ZONE", "Such as Europe/Warsaw.", once=True)

    def check(self, variables: Mapping[str, str]) -> None:
        """It looks like a name of the zone database."""
        if not _ZONE.fullmatch(self.name):
            raise UsageError("not a time zone", subject=self.name, hint="such as Europe/Warsaw")

    def apply(self, site: StepContext) -> bool:
        """Only for a zone that the guest has, or that every guest knows (UTC)."""
        view = site.view
        if view.kind(f"{_ZONES}/{self.name}") != "file":
            if self.name not in ("UTC", "Etc/UTC"):
                raise self._unknown(view)
            # localtime(5): without the link it is UTC.
            changed = view.delete("/etc/localtime")
        else:
            changed = view.symlink("/etc/localtime", f"..{_ZONES}/{self.name}")
        if view.kind("/etc/timezone") is not None:
            changed |= view.write("/etc/timezone", f"{self.name}\n".encode())
        return changed

    def _unknown(self, view: GuestOverlay) -> ImgtoolError:
        if view.kind(_ZONES) != "directory":
            return NotInGuestError(
                "the guest has no time zones", subject=_ZONES, hint="install tzdata in it"
            )
        folder, _, _ = self.name.rpartition("/")
        names = view.names(f"{_ZONES}/{folder}" if folder else _ZONES)
        return missing("time zone", self.name, [f"{folder}/{n}" if folder else n for n in names])


@dataclass(frozen=True)
class Locale(_Named):
    """The language of the system: LANG."""

    kind = "locale"
    option = Option("--locale", "LOCALE", "Such as pl_PL.UTF-8.", once=True)

    def check(self, variables: Mapping[str, str]) -> None:
        """It looks like a locale."""
        if not _LOCALE.fullmatch(self.name):
            raise UsageError("not a locale", subject=self.name, hint="such as pl_PL.UTF-8")

    def apply(self, site: StepContext) -> bool:
        """In the file that the guest reads: Debian's /etc/default/locale or /etc/locale.conf."""
        view = site.view
        path = "/etc/locale.conf"
        debian = view.kind("/etc/debian_version") is not None
        if debian:
            # Since Debian 13 the old name is a link to the new one.
            if view.kind(path) is None or view.kind("/etc/default/locale") is not None:
                path = "/etc/default/locale"
            view.folder("/etc/default")
        old = (view.read(path) or b"").decode("utf-8", "surrogateescape")
        lines, found = [], False
        for line in old.splitlines():
            if re.match(r"\s*LANG=", line):
                if found:
                    continue
                found = True
                value = line.partition("=")[2].strip().strip("\"'")
                line = line if value == self.name else f"LANG={self.name}"
            lines.append(line)
        if not found:
            lines.append(f"LANG={self.name}")
        changed = view.write(path, os.fsencode("\n".join(lines) + "\n"))
        if debian:
            changed |= self._ask_for(view)
        return changed

    def _ask_for(self, view: GuestOverlay) -> bool:
        """Debian makes its locales from /etc/locale.gen: ask for this one there."""
        text = (view.read("/etc/locale.gen") or b"").decode("utf-8", "surrogateescape")
        name, dot, charset = self.name.partition(".")
        if not text or not dot or name == "C":
            return False
        entry = f"{self.name} {charset.partition('@')[0]}"
        lines = text.splitlines()
        if entry in (line.strip() for line in lines):
            return False
        for number, line in enumerate(lines):
            if line.lstrip("# ").rstrip() == entry:
                lines[number] = entry
                break
        else:
            lines.append(entry)
        return view.write("/etc/locale.gen", os.fsencode("\n".join(lines) + "\n"))


@dataclass(frozen=True)
class MachineId(WordStep):
    """No machine ID: the guest makes itself one at its next start."""

    kind = "machine-id"
    word = "reset"
    schema: ClassVar[Schema] = {"const": word}
    option = Option("--machine-id-reset", None, "A new machine ID at the next start.")

    def apply(self, site: StepContext) -> bool:
        """Empty, not missing: an empty file is filled where /etc is mounted read-only too, and does
        not make the start a first boot, which would undo what was enabled (machine-id(5))."""
        view = site.view
        changed = False
        if view.kind("/etc/machine-id") is not None:
            changed = view.write("/etc/machine-id", b"")
        elif view.kind("/usr/lib/systemd") is not None or view.kind("/lib/systemd") is not None:
            changed = view.write("/etc/machine-id", b"", mode=0o444)
        copy = view.lstat("/var/lib/dbus/machine-id")
        # A link leads to /etc/machine-id already; D-Bus makes a copy anew.
        if copy is not None and copy.type != "symlink":
            changed |= view.delete("/var/lib/dbus/machine-id")
        return changed


@dataclass(frozen=True)
class Relabel(WordStep):
    """The SELinux labels of the guest's policy on every file."""

    kind = "selinux"
    word = "relabel"
    schema: ClassVar[Schema] = {"const": word}
    option = Option("--selinux-relabel", None, "Label every file anew.")

    def apply(self, site: StepContext) -> bool:
        """Asked for here; whether a label was another one is known when it has been done."""
        if site.view.kind("/etc/selinux/config") is None:
            raise NotInGuestError("the guest does not use SELinux", subject="/etc/selinux/config")
        site.view.relabel = True
        return False
