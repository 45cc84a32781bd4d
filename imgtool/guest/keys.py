"""Keys for encrypted devices, selected as in the virt tools: `ID:key:PASSPHRASE`, `ID:file:FILE`.

`ID` is the device (`/dev/sda2`), its LUKS UUID, or `all`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imgtool.errors import ImgtoolError, UsageError, join_names


@dataclass(frozen=True)
class Key:
    """A passphrase for the device, UUID or `all` that `selector` names."""

    selector: str
    passphrase: str = field(repr=False)

    def fits(self, device: str, uuid: str) -> bool:
        """Whether the key is meant for this device."""
        return self.selector in ("all", device) or self.selector.lower() == uuid.lower()

    def __str__(self) -> str:
        """The key as it could have been typed, its file not needed any more."""
        return f"{self.selector}:key:{self.passphrase}"


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
    content = content.removesuffix(b"\n")
    try:
        if b"\0" not in content:  # which ends what the appliance is given
            return Key(selector, content.decode())
        reason = None
    except UnicodeDecodeError as error:
        reason = error
    raise UsageError(
        "the key file is not text; binary key files cannot be used",
        subject=value,
        hint=f"give a passphrase of the same device: --key {selector}:key:PASSPHRASE",
    ) from reason


def keys_told(
    keys: Sequence[Key], encrypted: Mapping[str, str], closed: Collection[str]
) -> list[str]:
    """Lines on the keys that were of no use.

    `encrypted` are the encrypted devices, and their UUIDs; `closed` those that no key opened. A key
    for `all` of them may find none.
    """
    lines = []
    for key in keys:
        if key.selector == "all" or any(key.fits(*pair) for pair in encrypted.items()):
            continue
        there = join_names(
            f"{device} ({uuid})" if uuid else device for device, uuid in encrypted.items()
        )
        lines.append(
            f"the key for {key.selector} is not used: "
            + (f"the encrypted devices are {there}" if there else "nothing here is encrypted")
        )
    lines += [
        f"{device} stays locked: no key that was given for it opens it"
        for device in closed
        if any(key.fits(device, encrypted[device]) for key in keys)
    ]
    return list(dict.fromkeys(lines))
