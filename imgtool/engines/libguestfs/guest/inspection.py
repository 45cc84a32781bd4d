"""Operating systems, hostname, packages: libguestfs's own inspection."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from imgtool.engines.libguestfs.guest.volumes import guest_names, reason
from imgtool.errors import EngineError
from imgtool.formats.application import Application
from imgtool.formats.files import SMALL_FILE
from imgtool.formats.release_files import spelling
from imgtool.guest.blocks import Block
from imgtool.guest.model import OperatingSystem
from imgtool.host import program_messages

log = logging.getLogger(__name__)


class InspectionFailed(EngineError):
    """libguestfs's inspection gave up on the whole guest."""


def _known(call: Callable[[str], str], root: str) -> str | None:
    try:
        value = call(root)
    except RuntimeError:
        return None
    return None if value in ("", "unknown") else value


def _version(handle: Any, root: str) -> str | None:
    major = handle.inspect_get_major_version(root)
    minor = handle.inspect_get_minor_version(root)
    if major <= 0 and minor <= 0:
        return None
    content = b""
    for path in ("/etc/os-release", "/etc/lsb-release", "/etc/br-version"):
        with contextlib.suppress(RuntimeError):
            if handle.is_file(path, followsymlinks=True):
                content += bytes(handle.pread(path, SMALL_FILE, 0)) + b"\n"
    return spelling(major, minor, content)


def _mount_all(handle: Any, mountpoints: dict[str, str]) -> None:
    for mountpoint in sorted(mountpoints, key=len):
        with contextlib.suppress(RuntimeError):  # an fstab that lies
            handle.mount_ro(mountpoints[mountpoint], mountpoint)


def _kernels(handle: Any) -> tuple[str, ...]:
    with contextlib.suppress(RuntimeError):
        if handle.is_dir("/lib/modules", followsymlinks=True):
            return tuple(sorted(handle.ls("/lib/modules")))
    return ()


def _applications(handle: Any, root: str) -> tuple[Application, ...]:
    try:
        rows = handle.inspect_list_applications2(root)
    except RuntimeError as error:
        told = program_messages.by_rpm(str(error))
        raise EngineError(
            f"the packages cannot be listed: {told.means}", subject=root, hint=told.step
        ) from error
    return tuple(
        Application(
            name=row["app2_name"],
            version=row["app2_version"],
            release=row["app2_release"],
            epoch=row["app2_epoch"],
            arch=row["app2_arch"],
        )
        for row in rows
    )


def operating_systems(
    handle: Any, blocks: Sequence[Block], *, packages: bool
) -> tuple[OperatingSystem, ...]:
    """Each operating system that `inspect_os` finds."""
    try:
        roots = guest_names(blocks, handle.inspect_os()).values()
    except RuntimeError as error:
        log.info("inspection failed: %s", reason(error))
        raise InspectionFailed("libguestfs cannot tell which operating system it is") from error
    found = []
    for root in roots:
        listed = handle.inspect_get_mountpoints(root)
        names = guest_names(blocks, listed.values())
        mountpoints = {place: names[source] for place, source in sorted(listed.items())}
        _mount_all(handle, mountpoints)
        try:
            found.append(
                OperatingSystem(
                    root=root,
                    type=handle.inspect_get_type(root),
                    distribution=_known(handle.inspect_get_distro, root),
                    version=_version(handle, root),
                    product_name=_known(handle.inspect_get_product_name, root),
                    architecture=_known(handle.inspect_get_arch, root),
                    hostname=_known(handle.inspect_get_hostname, root),
                    package_format=_known(handle.inspect_get_package_format, root),
                    package_management=_known(handle.inspect_get_package_management, root),
                    mountpoints=mountpoints,
                    kernels=_kernels(handle),
                    applications=_applications(handle, root) if packages else None,
                )
            )
        finally:
            handle.umount_all()
    return tuple(found)
