"""A witness of the end of an imgtool that is killed at work on an image.

What was written to the image before that is imgtool's own, what was written later is somebody
else's, and nobody may lose it. The witness is a shell that waits until imgtool and the QEMUs that
it has started are gone, and then sets the time of the record's file, and a mark on it that it did.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from imgtool.errors import HostError
from imgtool.host.process import DEVNULL, spawn
from imgtool.image.locking.held import kept_open

_MARK = stat.S_IXUSR  # of no use on a record, and kept by whoever copies it


def is_marked(status: os.stat_result) -> bool:
    """Whether the time of a record is that of the end of an imgtool, and not of a sign of life."""
    return bool(status.st_mode & _MARK)


@contextlib.contextmanager
def witness(record: int) -> Iterator[None]:
    """While the block runs there is a witness of the record that this descriptor is of; where there
    can be none it runs without."""
    with contextlib.ExitStack() as stack:
        # Opened anew, since what is inherited would keep the lock on it; and not by its name, at
        # which there can be another file by now.
        descriptor = os.open(f"/proc/self/fd/{record}", os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        if is_marked(os.fstat(descriptor)):
            os.fchmod(descriptor, 0o644)
        reading, writing = os.pipe()
        stack.callback(os.close, writing)
        try:
            file = f"/proc/self/fd/{descriptor}"
            # Reading ends when the last of those who have the other end is gone.
            words = ["sh", "-c", f"read -r _; touch -c {file} && chmod u+x {file}"]
            waiting = spawn(
                words,
                stdin=reading,
                stderr=DEVNULL,
                pass_fds=(descriptor,),
                outlives=True,
            )
            with contextlib.suppress(HostError):  # a host without a shell
                stack.enter_context(waiting)
        finally:
            os.close(reading)
        stack.enter_context(kept_open(writing))
        yield
