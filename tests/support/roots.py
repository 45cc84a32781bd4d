"""Small Debian systems in a folder, made by mmdebstrap and kept among the test guests."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.guestmaker.build import default_cache

# A root has to be a mount to be exchanged; what was the root before is gone for what runs in it.
_PIVOT = """
set -e
root=$1 tree=$2; shift 2
mount --bind "$root" "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mkdir -p "$root$tree" "$root/old"
mount --bind "$tree" "$root$tree"
cd "$root"
pivot_root . old
umount -l /old
cd "$tree"
exec "$@"
"""


def host_release() -> str:
    """The name of the Debian that runs here."""
    lines = Path("/etc/os-release").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)["VERSION_CODENAME"].strip('"')


def root_archive(release: str, packages: Sequence[str]) -> Path:
    """A tar archive of a small Debian with these packages; made when it is not there yet."""
    known = hashlib.sha256(json.dumps([release, *packages]).encode()).hexdigest()[:12]
    archive = default_cache() / f"root-{release}-{known}.tar"
    archive.parent.mkdir(parents=True, exist_ok=True)
    with (archive.parent / f".{archive.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            new = archive.with_suffix(".new.tar")
            words = ["mmdebstrap", "-q", "--variant=minbase", f"--include={','.join(packages)}"]
            subprocess.run([*words, release, new], check=True)
            new.rename(archive)
    return archive


@contextlib.contextmanager
def unpacked(archive: Path) -> Iterator[Path]:
    """The root in a folder, gone with the block. Its name is none that imgtool cleans up."""
    folder = Path(tempfile.mkdtemp(prefix="debian-root-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        words = ("tar", "-C", folder, "--exclude=./dev/*", "-xf", archive)
        subprocess.run(words, check=True)
        yield folder
    finally:
        shutil.rmtree(folder)


def entering(root: Path, tree: Path) -> list[str | Path]:
    """The words before a command that runs it in the root, with a folder of the host in its place,
    which becomes the present folder."""
    start = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _PIVOT, "sh"]
    return [*start, root, tree]
