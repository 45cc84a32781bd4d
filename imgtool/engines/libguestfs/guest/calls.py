"""libguestfs calls that take or give names, exact to the byte.

The Python binding passes strings as UTF-8 and cannot pass, or mangles, names that are not. These
calls use the same handle through the C library, with `bytes`. Functions, structures and option
bits are those of guestfs(3); the layout of `guestfs_statns` is 22 signed 64-bit integers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import re
import shlex
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p
from itertools import islice
from typing import Any

from imgtool.errors import EngineError, HostError
from imgtool.formats.xattrs import Xattrs, order_xattrs
from imgtool.guest.model import Entry
from imgtool.host.libc import libc
from imgtool.host.system_packages import install
from imgtool.text import printable

# All that the library says when a program in the appliance fails while it sends.
_GAVE_UP = "file receive cancelled by daemon"
_OCTAL = re.compile(rb"\\([0-7]{3})")


class _Statns(ctypes.Structure):
    _fields_ = [
        (name, c_int64)
        for name in [
            "dev",
            "ino",
            "mode",
            "nlink",
            "uid",
            "gid",
            "rdev",
            "size",
            "blksize",
            "blocks",
            "atime_sec",
            "atime_nsec",
            "mtime_sec",
            "mtime_nsec",
            "ctime_sec",
            "ctime_nsec",
            "spare1",
            "spare2",
            "spare3",
            "spare4",
            "spare5",
            "spare6",
        ]
    ]


class _Xattr(ctypes.Structure):
    # The name is a string, the value has a length.
    _fields_ = [("name", c_char_p), ("length", c_uint32), ("value", c_void_p)]

    @property
    def content(self) -> bytes:
        return ctypes.string_at(self.value, self.length) if self.length else b""


class _XattrList(ctypes.Structure):
    _fields_ = [("len", c_uint32), ("val", POINTER(_Xattr))]


class _StatnsList(ctypes.Structure):
    _fields_ = [("len", c_uint32), ("val", POINTER(_Statns))]


class _TarOut(ctypes.Structure):
    _fields_ = [
        ("bitmask", c_uint64),
        ("compress", c_char_p),
        ("numericowner", c_int),
        ("excludes", POINTER(c_char_p)),
        ("xattrs", c_int),
        ("selinux", c_int),
        ("acls", c_int),
    ]


class _TarIn(ctypes.Structure):
    _fields_ = [
        ("bitmask", c_uint64),
        ("compress", c_char_p),
        ("xattrs", c_int),
        ("selinux", c_int),
        ("acls", c_int),
    ]


class _CopyAttributes(ctypes.Structure):
    _fields_ = [
        ("bitmask", c_uint64),
        ("all", c_int),
        ("mode", c_int),
        ("xattributes", c_int),
        ("ownership", c_int),
    ]


class _Relabel(ctypes.Structure):
    _fields_ = [("bitmask", c_uint64), ("force", c_int)]


_XATTRIBUTES = 1 << 2
_NUMERICOWNER = 1 << 1
_EXCLUDES = 1 << 2
_TAR_XATTRS, _TAR_ACLS = 1 << 3, 1 << 5
_FORCE = 1 << 0


def _load() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libguestfs.so.0")
    except OSError as error:
        raise HostError(
            "libguestfs is not installed",
            subject="libguestfs.so.0",
            hint=install("python3-guestfs"),
        ) from error
    strings = POINTER(c_char_p)
    for name, result, arguments in (
        ("last_error", c_char_p, []),
        ("last_errno", c_int, []),
        ("realpath", c_void_p, [c_char_p]),
        ("case_sensitive_path", c_void_p, [c_char_p]),
        ("checksum", c_void_p, [c_char_p, c_char_p]),
        ("getxattr", c_void_p, [c_char_p, c_char_p, POINTER(ctypes.c_size_t)]),
        ("lgetxattr", c_void_p, [c_char_p, c_char_p, POINTER(ctypes.c_size_t)]),
        ("lremovexattr", c_int, [c_char_p, c_char_p]),
        ("lgetxattrs", POINTER(_XattrList), [c_char_p]),
        ("lxattrlist", POINTER(_XattrList), [c_char_p, strings]),
        ("lstatns", POINTER(_Statns), [c_char_p]),
        ("lstatnslist", POINTER(_StatnsList), [c_char_p, strings]),
        ("readlinklist", POINTER(c_void_p), [c_char_p, strings]),
        ("find0", c_int, [c_char_p, c_char_p]),
        ("ls0", c_int, [c_char_p, c_char_p]),
        ("download", c_int, [c_char_p, c_char_p]),
        ("download_offset", c_int, [c_char_p, c_char_p, c_int64, c_int64]),
        ("checksums_out", c_int, [c_char_p, c_char_p, c_char_p]),
        ("tar_out_opts_argv", c_int, [c_char_p, c_char_p, POINTER(_TarOut)]),
        ("tar_in_opts_argv", c_int, [c_char_p, c_char_p, POINTER(_TarIn)]),
        ("copy_attributes_argv", c_int, [c_char_p, c_char_p, POINTER(_CopyAttributes)]),
        ("rename", c_int, [c_char_p, c_char_p]),
        ("mkdir_mode", c_int, [c_char_p, c_int]),
        ("upload", c_int, [c_char_p, c_char_p]),
        ("write", c_int, [c_char_p, c_char_p, ctypes.c_size_t]),
        ("selinux_relabel_argv", c_int, [c_char_p, c_char_p, POINTER(_Relabel)]),
        ("chmod", c_int, [c_int, c_char_p]),
        ("lchown", c_int, [c_int, c_int, c_char_p]),
        ("ln_sf", c_int, [c_char_p, c_char_p]),
        ("cp_a", c_int, [c_char_p, c_char_p]),
        ("rm_rf", c_int, [c_char_p]),
        ("debug", c_void_p, [c_char_p, strings]),
    ):
        function = getattr(library, f"guestfs_{name}")
        function.restype = result
        function.argtypes = [c_void_p, *arguments]
    library.guestfs_set_error_handler.argtypes = [c_void_p, c_void_p, c_void_p]
    library.guestfs_set_error_handler.restype = None
    library.guestfs_free_statns.argtypes = [c_void_p]
    library.guestfs_free_xattr_list.argtypes = [c_void_p]
    library.guestfs_free_statns_list.argtypes = [c_void_p]
    return library


def _strings(values: Sequence[bytes]) -> ctypes.Array[c_char_p]:
    return (c_char_p * (len(values) + 1))(*values, None)


def _entry(path: bytes, stat: _Statns, target: bytes | None = None) -> Entry:
    return Entry(
        path=path,
        mode=stat.mode,
        uid=stat.uid,
        gid=stat.gid,
        size=stat.size,
        mtime_ns=stat.mtime_sec * 1_000_000_000 + stat.mtime_nsec,
        blocks=stat.blocks,
        nlink=stat.nlink,
        inode=stat.ino,
        device=stat.dev,
        rdev=stat.rdev,
        target=target,
    )


class CallFailed(EngineError):
    """A libguestfs call failed; `errno` is the appliance's, 0 where it gave none."""

    def __init__(self, message: str, errno: int, path: bytes) -> None:
        super().__init__(message, subject=printable(path))
        self.errno = errno


class Calls:
    """The byte-exact calls of one launched handle."""

    def __init__(self, handle: Any) -> None:
        self._library = _load()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype = c_void_p
        pointer.argtypes = [ctypes.py_object, c_char_p]
        self._handle = pointer(handle._o, b"guestfs_h")
        # What was written to: paths of files and folders.
        self.touched: set[bytes] = set()
        self._errors = 0
        # Extended attributes that were left out: they are longer than the kernel gives any.
        self.oversized_xattrs = 0

    def _change(self, name: str, path: bytes, *arguments: Any) -> None:
        self.touched.add(path)
        self._call(name, path, *arguments)

    def _call(self, name: str, path: bytes, *arguments: Any) -> Any:
        # The handle keeps its error handler by thread; the default one prints.
        self._library.guestfs_set_error_handler(self._handle, None, None)
        result = getattr(self._library, f"guestfs_{name}")(self._handle, *arguments)
        failed = result == -1 if isinstance(result, int) else not result
        if failed or result is None:
            said = self._library.guestfs_last_error(self._handle) or b"unknown error"
            errno = self._library.guestfs_last_errno(self._handle)
            # The library repeats the call and the path; the reason stands behind the last colon.
            reason = said.decode("utf-8", "replace").rsplit(": ", 1)[-1]
            if reason == _GAVE_UP:
                reason = "the guest's filesystem gives an error"
            raise CallFailed(reason, errno, path)
        return result

    def _take_string(self, pointer: int) -> bytes:
        try:
            return ctypes.string_at(pointer)
        finally:
            libc.free(pointer)

    def realpath(self, path: bytes) -> bytes:
        """The path with every symbolic link resolved inside the guest."""
        return self._take_string(self._call("realpath", path, path))

    def case_sensitive_path(self, path: bytes) -> bytes:
        """The path as a case-insensitive filesystem really spells it."""
        return self._take_string(self._call("case_sensitive_path", path, path))

    def checksum(self, kind: str, path: bytes) -> str:
        """The file's checksum, in hexadecimal."""
        return self._take_string(self._call("checksum", path, kind.encode(), path)).decode("ascii")

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        """One extended attribute; symbolic links are followed."""
        return self._xattr("getxattr", path, name)

    def _xattr(self, call: str, path: bytes, name: bytes) -> bytes:
        size = ctypes.c_size_t()
        pointer = self._call(call, path, path, name, ctypes.byref(size))
        try:
            return ctypes.string_at(pointer, size.value)
        finally:
            libc.free(pointer)

    def xattrs(self, path: bytes) -> Xattrs:
        """All extended attributes of what is at the path; a symbolic link is not followed."""
        try:
            answer = self._call("lgetxattrs", path, path)
        except CallFailed as error:
            if error.errno == errno.EOPNOTSUPP:  # a filesystem that has none
                return ()
            if error.errno == errno.E2BIG:  # one of them: a long stream of NTFS
                return self._fitting_xattrs(path)
            raise
        try:
            found = answer.contents
            return order_xattrs((x.name, x.content) for x in found.val[: found.len])
        finally:
            self._library.guestfs_free_xattr_list(answer)

    def _fitting_xattrs(self, path: bytes) -> Xattrs:
        """Those extended attributes that are not too large, one by one; the others are counted."""
        quoted = os.fsencode(shlex.quote(os.fsdecode(b"/sysroot" + path)))
        listing = self.shell(path, [b"getfattr", b"-h", b"--absolute-names", b"-m-", b"--", quoted])
        found = []
        # The first line is the path. Source: attr, tools/getfattr.c and libmisc/quote.c.
        for line in listing.split(b"\n")[1:]:
            if not line:
                continue
            name = _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), line)
            try:
                found.append((name, self._xattr("lgetxattr", path, name)))
            except CallFailed as error:
                if error.errno != errno.E2BIG:
                    raise
                self.oversized_xattrs += 1
        return order_xattrs(found)

    def xattrs_in(self, directory: bytes, names: Sequence[bytes]) -> list[Xattrs | None]:
        """The extended attributes of names in a directory, which have to fit into one message;
        None where they could not be read, for whatever reason.
        """
        answer = self._call("lxattrlist", directory, directory, _strings(names))
        try:
            found: list[Xattrs | None] = []
            rows = iter(answer.contents.val[: answer.contents.len])
            for head in rows:
                # Of each file first one that has no name, its value being how many there are, as a
                # string with a NUL at its end.
                count = head.content.rstrip(b"\0")
                of_it = [(x.name, x.content) for x in islice(rows, int(count or b"0"))]
                found.append(order_xattrs(of_it) if count else None)
            return found
        finally:
            self._library.guestfs_free_xattr_list(answer)

    def lstat(self, path: bytes) -> Entry:
        """What `lstat` says of one path, with the target of a symbolic link."""
        stat = self._call("lstatns", path, path)
        try:
            entry = _entry(path, stat.contents)
        finally:
            self._library.guestfs_free_statns(stat)
        if entry.type == "symlink":
            directory, _, name = path.rpartition(b"/")
            target = self._readlinks_in(directory or b"/", [name])[0]
            return dataclasses.replace(entry, target=target)
        return entry

    def lstats(self, paths: Sequence[bytes]) -> list[Entry | None]:
        """`lstat` of many absolute paths, with one call a directory; None where it failed."""
        found: dict[bytes, Entry | None] = {}
        by_directory: dict[bytes, list[bytes]] = {}
        for path in paths:
            directory, _, name = path.rpartition(b"/")
            by_directory.setdefault(directory or b"/", []).append(name)
        for directory, names in by_directory.items():
            prefix = directory.rstrip(b"/") + b"/"
            for name, entry in zip(names, self._lstats_in(directory, names), strict=True):
                found[prefix + name] = entry
        return [found[path] for path in paths]

    def _lstats_in(self, directory: bytes, names: Sequence[bytes]) -> list[Entry | None]:
        prefix = directory.rstrip(b"/") + b"/"
        answer = self._call("lstatnslist", directory, directory, _strings(names))
        try:
            stats = answer.contents
            # A failed lstat is an entry whose st_ino is -1.
            entries = [
                None if stats.val[i].ino == -1 else _entry(prefix + name, stats.val[i])
                for i, name in enumerate(names[: stats.len])
            ]
        finally:
            self._library.guestfs_free_statns_list(answer)
        links = [i for i, entry in enumerate(entries) if entry and entry.type == "symlink"]
        targets = self._readlinks_in(directory, [names[i] for i in links])
        for i, target in zip(links, targets, strict=True):
            entry = entries[i]
            assert entry is not None
            entries[i] = dataclasses.replace(entry, target=target)
        return entries

    def _readlinks_in(self, directory: bytes, names: Sequence[bytes]) -> list[bytes]:
        if not names:
            return []
        answer = self._call("readlinklist", directory, directory, _strings(names))
        targets = [self._take_string(answer[i]) for i in range(len(names))]
        libc.free(ctypes.cast(answer, c_void_p))
        return targets

    def find0(self, directory: bytes, output: str) -> None:
        """Write every name below `directory`, relative to it and NUL-terminated, to `output`."""
        self._call("find0", directory, directory, output.encode())

    def ls0(self, directory: bytes, output: str) -> None:
        """Write the names in `directory`, NUL-terminated, to `output`."""
        self._call("ls0", directory, directory, output.encode())

    def download(self, path: bytes, output: str) -> None:
        """Write a file's bytes to `output`."""
        self._call("download", path, path, output.encode())

    def download_range(self, path: bytes, output: str, offset: int, size: int) -> None:
        """Write `size` bytes of a file from `offset` to `output`."""
        self._call("download_offset", path, path, output.encode(), offset, size)

    def tar_out(
        self, directory: bytes, output: str, excludes: Sequence[bytes] = (), *, xattrs: bool = False
    ) -> None:
        """Write a tar of `directory`'s content, with numeric owners, to `output`.

        `excludes` are patterns of tar(1), relative to `directory` (`./name`).
        """
        options = _TarOut(bitmask=_NUMERICOWNER, numericowner=1)
        if xattrs:
            options.bitmask |= _TAR_XATTRS | _TAR_ACLS
            options.xattrs = options.acls = 1
        if excludes:
            options.bitmask |= _EXCLUDES
            options.excludes = ctypes.cast(_strings(excludes), POINTER(c_char_p))
        self._call(
            "tar_out_opts_argv", directory, directory, output.encode(), ctypes.byref(options)
        )

    def tar_in(self, source: str, directory: bytes) -> None:
        """Unpack the tar file `source` of the host into a directory of the guest."""
        self._change(
            "tar_in_opts_argv", directory, source.encode(), directory, ctypes.byref(_TarIn())
        )

    def copy_xattrs(self, source: bytes, target: bytes) -> None:
        """Give a file the extended attributes of another one."""
        options = _CopyAttributes(bitmask=_XATTRIBUTES, xattributes=1)
        self._change("copy_attributes_argv", target, source, target, ctypes.byref(options))

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        """Take an extended attribute away from what is at the path, if it has it."""
        try:
            self._change("lremovexattr", path, name, path)
        except CallFailed as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise

    def rename(self, source: bytes, target: bytes) -> None:
        """Rename within one filesystem, replacing what is there."""
        self._change("rename", target, source, target)

    def mkdir(self, path: bytes, mode: int) -> None:
        """Make a directory."""
        self._change("mkdir_mode", path, path, mode)

    def upload(self, source: str, path: bytes) -> None:
        """Make the file `source` of the host the content of a file, which stays the same file."""
        self._change("upload", path, source.encode(), path)

    def write(self, path: bytes, content: bytes) -> None:
        """Make these bytes the content of a file, in one message: libguestfs takes 4 MiB."""
        self._change("write", path, path, content, len(content))

    def relabel(self, contexts: bytes, path: bytes) -> None:
        """Give a file, or all below a folder, the SELinux labels of a guest's file_contexts."""
        options = ctypes.byref(_Relabel(bitmask=_FORCE, force=1))
        self._change("selinux_relabel_argv", path, contexts, path, options)

    def chmod(self, path: bytes, mode: int) -> None:
        """Change the mode of what is at the path; a symbolic link is followed."""
        self._change("chmod", path, mode, path)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        """Change the owner of what is at the path; a symbolic link is not followed."""
        self._change("lchown", path, uid, gid, path)

    def symlink(self, target: bytes, path: bytes) -> None:
        """Make a symbolic link, in the place of what is no directory."""
        self._change("ln_sf", path, target, path)

    def copy(self, source: bytes, path: bytes) -> None:
        """Copy a file with its mode, owner, times and extended attributes."""
        self._change("cp_a", path, source, path)

    def rm_rf(self, path: bytes) -> None:
        """Remove a file, or a directory with everything in it."""
        self._change("rm_rf", path, path)

    def has_new_errors(self) -> bool:
        """Whether the appliance's kernel has found damage since this was last asked.

        ext4 passes over a damaged part of a directory, lists the rest and says that all went well:
        it only counts (/sys/fs/ext4/DEVICE/errors_count; fs/ext4/dir.c, ext4_readdir).
        """
        said = self.shell(b"/", [b"cat", b"/sys/fs/ext4/*/errors_count", b"2>/dev/null || :"])
        before, self._errors = self._errors, sum(int(n) for n in said.split() if n.isdigit())
        return self._errors > before

    def shell(self, path: bytes, words: Sequence[bytes]) -> bytes:
        """Run a command in the appliance (never a program of the guest) and return its output.

        The appliance joins the words with spaces for its shell: quote what comes from a guest.
        """
        return self._take_string(self._call("debug", path, b"sh", _strings(words)))
