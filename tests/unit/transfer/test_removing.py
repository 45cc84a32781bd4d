"""rm: what is planned, and what is refused before anything is written."""

from __future__ import annotations

import stat
from types import SimpleNamespace
from typing import cast

import pytest

from imgtool.errors import EngineError, NotInGuestError, RefusedError, UsageError
from imgtool.guest.guest import Guest
from imgtool.guest.model import Entry, Mount
from imgtool.guest.paths import guest_path
from imgtool.transfer.removing import plan_removal

_FILES = ("/etc/a", "/etc/b", "/etc/z", "/srv/aaa", "/srv/zzz", "/boot/vmlinuz")
_DIRECTORIES = ("/", "/etc", "/srv", "/srv/data", "/boot", "/etc/dir")


class _Guest:
    """A guest of a few names."""

    def __init__(self, *more: str, windows: bool = False, unshown: tuple[str, ...] = ()) -> None:
        self.windows = windows
        self.names = {name.encode(): stat.S_IFREG for name in (*_FILES, *more)}
        self.names |= {name.encode(): stat.S_IFDIR for name in _DIRECTORIES}
        self.layout = SimpleNamespace(mounts=[Mount("/dev/sda1", "/"), Mount("/dev/sda2", "/boot")])
        self.unshown = lambda: dict.fromkeys(unshown, "no such disk")
        self.unreadable: bytes | None = None

    def path(self, typed: str | bytes) -> bytes:
        return guest_path(typed, windows=self.windows)

    def resolve(self, path: str | bytes) -> bytes:
        return self.lstat(path).path

    def lstat(self, path: str | bytes) -> Entry:
        found = self.path(path)
        if found not in self.names:
            raise NotInGuestError("no such file or directory in the guest", subject=path)
        return Entry(found, self.names[found] | 0o644, 0, 0, 0, 0)

    def entries(self, path: bytes) -> list[Entry]:
        above = path.rstrip(b"/") + b"/"
        found = []
        for name, kind in sorted(self.names.items()):
            if name.startswith(above) and b"/" not in name[len(above) :] and name != b"/":
                if name == self.unreadable:
                    raise EngineError("a damaged inode", subject=name)
                found.append(Entry(name, kind | 0o644, 0, 0, 0, 0))
        return found


def _plan(guest: _Guest, *typed: str, recursive: bool = False, missing_ok: bool = False):
    found = plan_removal(cast(Guest, guest), typed, recursive=recursive, missing_ok=missing_ok)
    return found.removed


def test_what_is_named_is_planned_once():
    assert _plan(_Guest(), "/etc/[ab]", "/etc/a") == ["/etc/a", "/etc/b"]
    assert _plan(_Guest(), "/etc", "/etc/a", recursive=True) == ["/etc"]
    assert _plan(_Guest(), "/etc/*/", recursive=True) == ["/etc/dir"]


def test_what_is_not_there_is_left_out_where_that_is_right():
    assert _plan(_Guest(), "/nothing", "/etc/a", "/nothing/*", missing_ok=True) == ["/etc/a"]
    with pytest.raises(NotInGuestError):
        _plan(_Guest(), "/nothing", "/etc/a")


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        ("/", UsageError),
        ("/etc/..", UsageError),
        ("/etc/*/..", UsageError),
        ("/etc/.", UsageError),
        ("/etc/../etc/a", UsageError),
        ("etc/a", UsageError),
        ("/boot", RefusedError),
        ("/*", RefusedError),
    ],
)
def test_what_rm_does_not_remove(typed: str, error: type[Exception]):
    with pytest.raises(error):
        _plan(_Guest(), typed, recursive=True)
    with pytest.raises(RefusedError, match="it is a directory"):
        _plan(_Guest(), "/etc")


@pytest.mark.parametrize("typed", ["/srv", "/srv/data", "/srv/data/secret", "/srv/*"])
@pytest.mark.parametrize("missing_ok", [False, True])
def test_nothing_goes_where_a_filesystem_is_not_shown(typed: str, missing_ok: bool):
    """What is there may be below it, and the place is one that the guest needs."""
    guest = _Guest(unshown=("/srv/data",))
    with pytest.raises(RefusedError, match="is not shown"):
        _plan(guest, typed, recursive=True, missing_ok=missing_ok)
    assert _plan(guest, "/srv/aaa") == ["/srv/aaa"]


def test_a_directory_that_cannot_be_read_whole_gives_no_plan():
    guest = _Guest()
    guest.unreadable = b"/etc/b"
    with pytest.raises(EngineError, match="damaged"):
        _plan(guest, "/etc/*", recursive=True, missing_ok=True)


def test_names_with_a_backslash_are_not_paths():
    """In a Windows guest such a name, found by a pattern, would be another path."""
    guest = _Guest("/etc/x\\..\\..\\boot", windows=True)
    with pytest.raises(EngineError, match="backslash"):
        _plan(guest, "/etc/*", recursive=True)
