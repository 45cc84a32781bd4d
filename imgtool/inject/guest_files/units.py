"""Units of systemd as files: where they are, and what their [Install] sections ask for.

Sources: systemd.unit(5), "UNIT FILE LOAD PATH", "[INSTALL] SECTION OPTIONS" and "SPECIFIERS".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from imgtool.errors import ImgtoolError, NotInGuestError
from imgtool.inject.guest_overlay import GuestOverlay

ADMIN = "/etc/systemd/system"
# What /run has is gone at the next start.
FOLDERS = (ADMIN, "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
NULL = "/dev/null"
_TYPES = (
    *("service", "socket", "device", "mount", "automount", "swap", "target"),
    *("path", "timer", "slice", "scope"),
)
_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")
_SPECIFIER = re.compile(r"%(.)")


def unit_name(typed: str) -> str:
    """The name of a unit; what has no type is a service. `ValueError` if it is none."""
    name = typed if typed.rpartition(".")[2] in _TYPES and "." in typed else f"{typed}.service"
    if not _NAME.fullmatch(name) or name.startswith((".", "@")):
        raise ValueError(typed)
    return name


@dataclass(frozen=True)
class Unit:
    """A unit that the guest has: its name, the file that it is read from, and what [Install] says.

    `name` has an instance where it was asked for with one, `path` is then that of the template.
    """

    name: str
    path: str
    install: Mapping[str, Sequence[str]]

    @property
    def template(self) -> str | None:
        """The template of an instance, or the template itself; None for what is neither."""
        prefix, at, rest = self.name.partition("@")
        return f"{prefix}@.{rest.rpartition('.')[2]}" if at else None

    @property
    def is_template(self) -> bool:
        """Whether it is a template without an instance."""
        return self.template == self.name

    def instance(self, of: str) -> Unit:
        """The instance of a template."""
        prefix, _, rest = self.name.partition("@")
        return Unit(f"{prefix}@{of}.{rest.rpartition('.')[2]}", self.path, self.install)

    def words(self, key: str) -> list[str]:
        """What a key of [Install] asks for, its specifiers filled in."""
        return [self._fill(word) for value in self.install.get(key, ()) for word in value.split()]

    def _fill(self, word: str) -> str:
        stem, _, _ = self.name.rpartition(".")
        prefix, _, instance = stem.partition("@")
        values = {
            "n": self.name, "N": stem, "p": prefix, "P": prefix, "i": instance, "I": instance,
            "j": prefix.rpartition("-")[2], "%": "%",
        }  # fmt: skip

        def value(found: re.Match[str]) -> str:
            if found[1] not in values:
                raise ImgtoolError(
                    f"its [Install] has %{found[1]}, which only the running guest knows",
                    subject=self.name,
                )
            return values[found[1]]

        return _SPECIFIER.sub(value, word)


def has_systemd(view: GuestOverlay) -> bool:
    """Whether the guest starts by systemd."""
    return any(view.kind(f"{folder}/systemd") == "file" for folder in _PROGRAMS)


def require_systemd(view: GuestOverlay) -> None:
    """Raises `NotInGuestError` for a guest that starts by something else."""
    if not has_systemd(view):
        raise NotInGuestError(
            "the guest has no systemd, and units are systemd's", subject=_PROGRAMS[0]
        )


_PROGRAMS = ("/usr/lib/systemd", "/lib/systemd")


def masked(view: GuestOverlay, name: str) -> bool:
    """Whether a unit is masked by a link to /dev/null."""
    entry = view.lstat(f"{ADMIN}/{name}")
    return entry is not None and entry.target == NULL.encode()


def find(view: GuestOverlay, name: str) -> Unit:
    """The unit of that name; of an alias the unit that it leads to.

    Raises `NotInGuestError`, with the names that are near, for one that the guest does not have.
    """
    unit = _there(view, name)
    if unit is not None:
        return unit
    known = sorted(all_names(view))
    # An alias is a link only as long as the unit is enabled: 'sshd' is 'ssh' in any case.
    for other in known:
        if other.rpartition(".")[2] == name.rpartition(".")[2] and "@" not in other:
            unit = _there(view, other)
            if unit is not None and name in unit.install.get("Alias", ()):
                return unit
    raise _unknown(view, name, known)


def _there(view: GuestOverlay, name: str) -> Unit | None:
    for candidate in (name, _template_of(name)):
        for folder in FOLDERS:
            path = f"{folder}/{candidate}"
            if candidate is None or view.kind(path) != "file":
                continue
            real = view.real(path, follow=True)
            last = real.rpartition("/")[2]
            # An alias leads to a unit beside it; a link from elsewhere is the unit's own file.
            if last != candidate and real.rpartition("/")[0] in _real_folders(view):
                name = last if candidate == name else name
                path = _known_path(view, real)
            return Unit(name, path, _install(view, path, name))
    return None


def _real_folders(view: GuestOverlay) -> set[str]:
    return {view.real(folder, follow=True) for folder in FOLDERS if view.kind(folder)}


def _known_path(view: GuestOverlay, real: str) -> str:
    """The path of a unit file as systemd writes it, by the folders that it searches."""
    folder, _, name = real.rpartition("/")
    for known in FOLDERS:
        if view.kind(known) and view.real(known, follow=True) == folder:
            return f"{known}/{name}"
    return real


def _template_of(name: str) -> str | None:
    prefix, at, rest = name.partition("@")
    stem, _, kind = rest.rpartition(".")
    return f"{prefix}@.{kind}" if at and stem else None


def all_names(view: GuestOverlay) -> set[str]:
    """The names of all units that the guest has."""
    found = set()
    for folder in FOLDERS:
        found |= {name for name in view.names(folder) if name.rpartition(".")[2] in _TYPES}
    return found


def _unknown(view: GuestOverlay, name: str, known: Sequence[str]) -> ImgtoolError:
    stem = name.rpartition(".")[0]
    if view.kind(f"/etc/init.d/{stem}") == "file":
        return ImgtoolError(
            "this is an init script and no unit; only the running guest can enable it", subject=name
        )
    near = difflib.get_close_matches(name, known, 3)
    hint = f"it has: {', '.join(near)}" if near else None
    return NotInGuestError("the guest has no such unit", subject=name, hint=hint)


def _install(view: GuestOverlay, path: str, name: str) -> dict[str, list[str]]:
    """The [Install] section of a unit file and of its drop-ins, in the order of their names."""
    found: dict[str, list[str]] = {}
    texts = [view.read(path) or b""]
    drop_ins: dict[str, str] = {}
    for unit in dict.fromkeys((path.rpartition("/")[2], name)):
        for folder in reversed(FOLDERS):
            for conf in view.names(f"{folder}/{unit}.d"):
                if conf.endswith(".conf"):
                    drop_ins[conf] = f"{folder}/{unit}.d/{conf}"
    texts += [view.read(drop_ins[conf]) or b"" for conf in sorted(drop_ins)]
    for text in texts:
        for key, value in _assignments(text.decode("utf-8", "replace")):
            if value:
                found.setdefault(key, []).append(value)
            else:
                found.pop(key, None)  # an empty value takes back what was set
    return found


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    section, kept = "", ""
    for raw in text.splitlines():
        line = kept + raw.strip()
        if raw.strip().startswith(("#", ";")):
            continue
        if line.endswith("\\"):
            kept = line[:-1] + " "
            continue
        kept = ""
        if line.startswith("["):
            section = line
        elif section == "[Install]" and "=" in line:
            key, _, value = line.partition("=")
            yield key.strip(), value.strip()
