"""Keys for encrypted devices, selected as in the virt tools: `ID:key:PASSPHRASE`, `ID:file:FILE`.

`ID` is the device (`/dev/sda2`), its LUKS UUID, or `all`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from imgtool.errors import ImgtoolError, UsageError


@dataclass(frozen=True)
class Key:
    """A passphrase for the device, UUID or `all` that `selector` names."""

    selector: str
    passphrase: str = field(repr=False)

    def fits(self, device: str, uuid: str) -> bool:
        """Whether the key is meant for this device."""
        return self.selector in ("all", device) or self.selector.lower() == uuid.lower()


def parse_key(text: str) -> Key:
    """Parse a `--key` selector; the passphrase in a file ends before a final newline.

    Raises `UsageError` for another form, `ImgtoolError` for a file that cannot be read.
    """
    selector, _, rest = text.partition(":")
    kind, colon, value = rest.partition(":")
    if not selector or not colon or kind not in ("key", "file"):
        raise UsageError(
            "not a key selector",
            # What was typed may hold the passphrase: name the device alone.
            subject=selector or "--key",
            hint="use --key DEVICE:file:FILE, --key UUID:key:PASSPHRASE or --key all:...",
        )
    if kind == "key":
        return Key(selector, value)
    try:
        content = Path(value).read_bytes()
    except OSError as error:
        raise ImgtoolError(
            f"the key file cannot be read: {error.strerror}", subject=value
        ) from error
    if len(content) > 64 * 1024:
        raise UsageError("the key file is larger than 64 KiB", subject=value)
    try:
        return Key(selector, content.removesuffix(b"\n").decode())
    except UnicodeDecodeError as error:
        raise UsageError(
            "the key file is not text; binary key files cannot be used", subject=value
        ) from error
