"""Copies of an image's content in a new file that is made like the old one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from imgtool.image.chain.chain import Chain
from imgtool.image.chain.info import ImageInfo
from imgtool.image.chain.qemu_info import ask_qemu, details_of
from imgtool.image.locking.host_file import qemu_name
from imgtool.image.qemu.qemu_img import size_needed

if TYPE_CHECKING:
    from imgtool.image.change.plan import Work

_SPARE = 1 << 20  # for what a size is told without: the folder's own growth


def options_like(link: ImageInfo) -> str:
    """The options of `qemu-img create` that make a qcow2 image as this one was made.

    Empty for another format: then QEMU's own choice is as good as any.
    """
    if link.format != "qcow2":
        return ""
    details = details_of(ask_qemu(link.path, qemu_name(link.path), "qcow2"))
    options: dict[str, object] = {
        "compat": details.get("compat"),
        "cluster_size": link.cluster_size,
    }
    if options["compat"] != "0.10":  # which knows none of these
        options["refcount_bits"] = details.get("refcount-bits")
        options["lazy_refcounts"] = _switch(details.get("lazy-refcounts"))
        options["compression_type"] = details.get("compression-type")
        if details.get("extended-l2"):
            options["extended_l2"] = "on"
    return ",".join(f"{name}={value}" for name, value in options.items() if value is not None)


def _switch(value: object) -> str | None:
    return None if value is None else "on" if value else "off"


def size_of_copy(chain: Chain, options: str = "", format: str = "qcow2") -> int:
    """What a copy of a chain's content can take at most, in bytes."""
    return size_needed(chain.filename(force_share=True), format, options) + _SPARE


def convert(
    work: Work, name: str, chain: Chain, new: Path, options: str, *more: str | Path
) -> None:
    """Copy a chain's content into a new qcow2 file; a step of `work`."""
    words: list[str | Path] = ["convert", "-O", "qcow2", *more]
    if options:
        words += ["-o", options]
    # QEMU looks for a base by a relative name beside what it writes.
    made = None if "-B" in more else new
    work.qemu_img(name, [*words, chain.filename(), new], chain.active.path, made=made)
