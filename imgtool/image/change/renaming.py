"""A device that had another name when the work on it was interrupted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imgtool.errors import Force
from imgtool.image import headers
from imgtool.image.change.changes import refuse_if_changed
from imgtool.image.intent.intent_log import Record
from imgtool.image.intent.intent_state import has_another_name, refuse_another_file
from imgtool.image.intent.marks import mark_of
from imgtool.image.locking.host_file import qemu_name
from imgtool.image.qemu.qemu_img import qemu_img

Dirs = Sequence[str | Path]


def name_anew(record: Record, overlay: Path, backing_dirs: Dirs, force: Force) -> None:
    """Give the device that an overlay stands on its present name in the overlay's header, where it
    had another one when the work was interrupted."""
    image = record.image
    if not has_another_name(image, record.facts, overlay):
        return
    refuse_another_file(image, record.facts, overlay, force=force)
    refuse_if_changed(record, overlay, backing_dirs, force)
    header = headers.read(overlay)
    format = header.backing_format if header is not None else None
    words: list[str | Path] = ["rebase", "-u", "-f", "qcow2", "-F", format or "raw"]
    qemu_img([*words, "-b", image.absolute(), qemu_name(overlay)], image=overlay)
    # It was as noted, and is to be taken for that again.
    record.note(noted={**_all_noted(record), "overlay": mark_of(overlay)})


def _all_noted(record: Record) -> dict[str, object]:
    files = record.facts.get("noted")
    return files if isinstance(files, dict) else {}
