"""The kinds of checksum that contents of files are compared by, as `hashlib` names them."""

from __future__ import annotations

CHECKSUMS = ("md5", "sha1", "sha256")
