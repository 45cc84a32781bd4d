"""What new users of a guest are like: its login.defs(5) and /etc/default/useradd."""

from __future__ import annotations

from collections.abc import Mapping

from imgtool.inject.guest_overlay import GuestOverlay


def login_defs(view: GuestOverlay) -> Mapping[str, str]:
    """The settings of /etc/login.defs, or of the file below /usr that stands for it."""
    for path in ("/etc/login.defs", "/usr/etc/login.defs"):
        content = view.read(path)
        if content is not None:
            pairs = (line.split(None, 1) for line in content.decode("utf-8", "replace").split("\n"))
            return {
                pair[0]: pair[1].strip()
                for pair in pairs
                if len(pair) == 2 and not pair[0].startswith("#")
            }
    return {}


def useradd_defaults(view: GuestOverlay) -> Mapping[str, str]:
    """The settings of /etc/default/useradd."""
    found = {}
    for line in (view.read("/etc/default/useradd") or b"").decode("utf-8", "replace").split("\n"):
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith("#"):
            found[key.strip()] = value.strip().strip("\"'")
    return found


def number(settings: Mapping[str, str], key: str, default: int) -> int:
    """A number of login.defs, decimal, octal or hexadecimal; the default for what is none."""
    text = settings.get(key, "")
    try:
        if text[:1] == "0" and text.isdigit():
            return int(text, 8)
        return int(text, 0)
    except ValueError:
        return default
