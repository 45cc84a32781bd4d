"""Disks that are encrypted by LUKS, as QEMU makes them. QEMU measures for seconds how long it takes
to derive a key, and on a busy machine fails at it; `cryptsetup` is told how often to.
"""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

KEY = "imgtool"
SECRET = ("--object", f"secret,id=key,data={KEY}")

_CLUSTER = 64 << 10
_HEADER = 4040 * 512  # the header of LUKS with all its keys, in QEMU's layout
_EXTENSION = 0x0537BE77  # where in a qcow2 that header is
_ENVIRONMENT = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}


def luks(path: Path, size: int) -> Path:
    """A disk of LUKS 1 of so many bytes, which hold what they happen to."""
    with path.open("wb") as file:
        file.truncate(_HEADER + size)
    kind = ["--type", "luks1", "--cipher", "aes-xts-plain64", "--key-size", "512"]
    kind += ["--hash", "sha256", "--pbkdf-force-iterations", "1000"]
    words = ["cryptsetup", "-q", "luksFormat", *kind, "--align-payload", str(_HEADER // 512)]
    subprocess.run([*words, "--key-file=-", path], input=KEY.encode(), env=_ENVIRONMENT, check=True)
    return path


def luks_qcow2(path: Path, size: int) -> Path:
    """A qcow2 that is encrypted by LUKS; QEMU has looked through it with the key."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True)
    outer = luks(path.with_name(f"{path.name}.luks"), 0)
    plain, header = path.read_bytes(), outer.read_bytes()
    outer.unlink()
    (end,) = struct.unpack_from(">I", plain, 100)
    at = -(-len(plain) // _CLUSTER) * _CLUSTER
    extension = struct.pack(">IIQQ", _EXTENSION, 16, at, len(header))
    first = plain[:32] + struct.pack(">I", 2) + plain[36:end] + extension + plain[end:_CLUSTER]
    content = (first[:_CLUSTER] + plain[_CLUSTER:]).ljust(at, b"\0") + header
    path.write_bytes(content.ljust(-(-len(content) // _CLUSTER) * _CLUSTER, b"\0"))
    opened = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename={path}"
    check = ["qemu-img", "check", "-q", *SECRET, "--image-opts", opened]
    # The clusters of the header have to be counted.
    subprocess.run([*check, "-r", "all"], check=True, capture_output=True)
    subprocess.run(check, check=True)
    return path
