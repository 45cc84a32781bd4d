"""A guest as it will be, in memory.

Nothing is written here. Steps read and change a `GuestOverlay`; when every step could be taken,
what is different is written in one go (`imgtool.engines.libguestfs.write.apply`). So a step that
fails has touched nothing, and a guest that is as it should be is not even opened to be written.

What is written is written as root, also in folders of the guest's users. A user's link is therefore
followed only to what is that user's own, and a file that a user may have linked into a folder from
elsewhere is left alone: neither makes a user the owner of what is not his.
"""

from __future__ import annotations

import dataclasses
import os
import stat

from imgtool.errors import ImgtoolError, NotInGuestError, RefusedError
from imgtool.guest.changes import Changes, Content, Owner
from imgtool.guest.model import Entry
from imgtool.inject.overlay_reader import Files, OverlayReader, size_of


class GuestOverlay(OverlayReader):
    """The files of a guest, to be looked at and changed.

    Every method that changes something says whether it was different before. `touched` are the
    paths that were changed since it was emptied, `relabel` whether all files are to be labelled.
    """

    def __init__(self, base: Files) -> None:
        super().__init__(base)
        self.touched: set[str] = set()
        self.relabel = False

    def _make(
        self,
        here: str,
        kind: int,
        mode: int,
        owner: Owner,
        *,
        size: int = 0,
        target: bytes | None = None,
    ) -> None:
        name = os.fsencode(here)
        self.touched.add(here)
        self._now[here] = Entry(name, kind | mode, *owner, size=size, mtime_ns=0, target=target)

    def _set(self, here: str, entry: Entry) -> None:
        self.touched.add(here)
        self._now[here] = entry

    def place(self, path: str, *, follow: bool = False, replaces: bool = False) -> str:
        """`real`, of what is to be changed; with `replaces` only its name is, in its folder.

        Raises `RefusedError` where a user of the guest led there and it is not that user's.
        """
        here, makers = self._resolve(path, follow=follow)
        folder = self._entry(here.rpartition("/")[0]) if here.count("/") > 1 else None
        entry = self._entry(here) if here != "/" else None
        changed = folder if replaces or entry is None else entry
        if makers - {0 if changed is None else changed.uid}:
            raise RefusedError(
                "a user's link leads to what is not the user's; it is not followed",
                subject=path,
                hint=f"name what it leads to, if that is meant: {here}",
            )
        if not replaces and self._may_be_linked(here):
            raise RefusedError(
                "a file that a user may have linked from elsewhere is not changed",
                subject=path,
                hint="it has several names, and is not of who may write to this folder; "
                "delete this name in a step before",
            )
        return here

    def _may_be_linked(self, here: str) -> bool:
        """Whether a user could have made this name for a file of somebody else."""
        above = here.rpartition("/")[0]
        if self._is_removed(here):
            return False
        file, folder = self._before(here), self._before(above) if above else None
        if file is None or folder is None or file.type != "file" or file.nlink < 2:
            return False
        if folder.uid != 0:
            return file.uid != folder.uid
        return bool(folder.mode & (stat.S_IWGRP | stat.S_IWOTH))

    def _folder_of(self, here: str) -> None:
        folder = here.rpartition("/")[0]
        entry = self._entry(folder) if folder else None
        if folder and (entry is None or entry.type != "directory"):
            raise NotInGuestError("no such folder in the guest", subject=folder)

    def write(
        self,
        path: str,
        content: Content,
        *,
        mode: int | None = None,
        owner: Owner | None = None,
        new_mode: int = 0o644,
        new_owner: Owner = (0, 0),
    ) -> bool:
        """Have a regular file with this content; a link at the end is followed.

        A file that is there stays the same file, with its mode and owner but for what `mode` and
        `owner` say; a new one otherwise gets `new_mode` and `new_owner`.
        """
        here = self.place(path, follow=True)
        entry = self._entry(here)
        if entry is None:
            self._folder_of(here)
            bits = new_mode if mode is None else mode
            self._make(here, stat.S_IFREG, bits, owner or new_owner, size=size_of(content))
            self._contents[here] = content
            return True
        if entry.type != "file":
            raise ImgtoolError(f"not a regular file but a {entry.type}", subject=path)
        different = not self._holds(here, content)
        if different:
            self._set(here, dataclasses.replace(entry, size=size_of(content)))
            self._contents[here] = content
        if mode is not None:
            different |= self.chmod(here, mode)
        if owner is not None:
            different |= self.chown(here, owner)
        return different

    def folder(
        self,
        path: str,
        *,
        mode: int | None = None,
        owner: Owner | None = None,
        new_mode: int = 0o755,
        new_owner: Owner = (0, 0),
    ) -> bool:
        """Have a folder, and those above it; `mode` and `owner` are of the last one."""
        parent = path.rstrip("/").rpartition("/")[0]
        different = False
        if parent and self.kind(parent) is None:
            different = self.folder(parent, new_owner=new_owner)
        here = self.place(path, follow=True)
        entry = self._entry(here) if here != "/" else None
        if here != "/" and entry is None:
            bits = new_mode if mode is None else mode
            self._make(here, stat.S_IFDIR, bits, owner or new_owner)
            return True
        if entry is not None and entry.type != "directory":
            raise ImgtoolError(f"not a folder but a {entry.type}", subject=path)
        if mode is not None:
            different |= self.chmod(here, mode)
        if owner is not None:
            different |= self.chown(here, owner)
        return different

    def symlink(self, path: str, target: str, *, owner: Owner = (0, 0)) -> bool:
        """Have a symbolic link with this target, in the place of what is no folder."""
        here = self.place(path, replaces=True)
        entry = self._entry(here)
        wanted = os.fsencode(target)
        if entry is not None:
            if entry.type == "symlink" and entry.target == wanted:
                return False
            if entry.type == "directory":
                raise ImgtoolError("a folder is where the link is to be", subject=path)
            self.delete(here)
        self._folder_of(here)
        self._make(here, stat.S_IFLNK, 0o777, owner, size=len(wanted), target=wanted)
        return True

    def delete(self, path: str) -> bool:
        """Have nothing at a path; a folder goes with all that is in it, a link alone."""
        try:
            here = self.place(path, replaces=True)
        except NotInGuestError:
            return False
        if here == "/":
            raise ImgtoolError("the root of the guest is not deleted", subject=path)
        if self._entry(here) is None:
            return False
        self.touched.add(here)
        for made in [one for one in self._now if one == here or one.startswith(here + "/")]:
            del self._now[made]
            self._contents.pop(made, None)
        if self._entry(here) is not None:
            self._removed[here] = None
        return True

    def chmod(self, path: str, mode: int) -> bool:
        """Have this mode, of twelve bits, on what a path leads to; links are followed."""
        here, entry = self._there(path, follow=True)
        if stat.S_IMODE(entry.mode) == mode:
            return False
        self._set(here, dataclasses.replace(entry, mode=stat.S_IFMT(entry.mode) | mode))
        return True

    def chown(self, path: str, owner: Owner, *, follow: bool = True) -> bool:
        """Have this owner on what a path leads to, or on the link itself."""
        here, entry = self._there(path, follow=follow)
        if (entry.uid, entry.gid) == owner:
            return False
        self._set(here, dataclasses.replace(entry, uid=owner[0], gid=owner[1]))
        return True

    def _there(self, path: str, *, follow: bool) -> tuple[str, Entry]:
        here = self.place(path, follow=follow)
        entry = self._entry(here)
        if entry is None:
            raise NotInGuestError("no such file or directory in the guest", subject=path)
        return here, entry

    # What is different in the end

    def changes(self) -> Changes:
        """What has to be written; nothing where changes came to nothing."""
        back = [path for path in self._removed if path in self._now and self._is_as_it_was(path)]
        found = Changes(dict(self._seen), relabel=self.relabel)
        found.removed = [path for path in self._removed if path not in back]
        for here in sorted(self._now, key=lambda path: path.split("/")):
            if any(here == path or here.startswith(f"{path}/") for path in back):
                continue
            entry, content = self._now[here], self._contents.get(here)
            assert entry is not None
            before = None if self._is_removed(here) else self._seen.get(here)
            if before is None:
                found.made.append((entry, content))
                continue
            if content is not None and not (
                before.size == entry.size and self._held(here, content)
            ):
                found.rewritten.append((here, content))
            found.add_attributes(here, before, entry)
        return found

    def _is_as_it_was(self, path: str) -> bool:
        """Whether what was removed and made again is the same, with all that is in it."""
        now, before = self._entry(path), self._before(path)
        if now is None or before is None or _facts(now) != _facts(before):
            return False
        if now.type == "file":
            content = self._contents.get(path, b"")
            return before.size == now.size and self._held(path, content)
        if now.type != "directory":
            return now.type == "symlink"
        held = {os.fsdecode(one.path) for one in self._base.entries(os.fsencode(path))}
        made = {one for one in self._now if one.rpartition("/")[0] == path}
        return held == made and all(map(self._is_as_it_was, sorted(held)))


def _facts(entry: Entry) -> tuple[object, ...]:
    return entry.mode, entry.uid, entry.gid, entry.target
