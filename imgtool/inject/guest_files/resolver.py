"""Name servers for guests in which nothing hands on those of an interface.

systemd-networkd tells them to systemd-resolved, which is a package of its own in Debian; ifupdown
leaves them to resolvconf, and what Debian 12's has for systemd-resolved does not work. Without
these, /etc/resolv.conf counts as it stands: resolv.conf(5).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from imgtool.inject.guest_overlay import GuestOverlay

RESOLV_CONF = "/etc/resolv.conf"
DROP_IN = "/etc/systemd/resolved.conf.d/90-imgtool.conf"


def has_resolvconf(view: GuestOverlay) -> bool:
    """Whether ifupdown's `dns-` options are read: by resolvconf(8), not by resolvectl for it."""
    paths = [path for path in ("/sbin/resolvconf", "/usr/sbin/resolvconf") if view.kind(path)]
    return any(not view.real(path, follow=True).endswith("/resolvectl") for path in paths)


def has_resolved(view: GuestOverlay) -> bool:
    """Whether the guest has systemd-resolved."""
    paths = ("/usr/lib/systemd/systemd-resolved", "/lib/systemd/systemd-resolved")
    return any(view.kind(path) == "file" for path in paths)


def tell_resolved(view: GuestOverlay, servers: Sequence[str], search: Sequence[str]) -> bool:
    """Name servers of the whole machine, for systemd-resolved: resolved.conf(5)."""
    lines = ["[Resolve]"]
    lines += [f"DNS={' '.join(servers)}"] if servers else []
    lines += [f"Domains={' '.join(search)}"] if search else []
    changed = view.folder(DROP_IN.rpartition("/")[0])
    return view.write(DROP_IN, ("\n".join(lines) + "\n").encode()) or changed


def write_resolv_conf(view: GuestOverlay, servers: Sequence[str], search: Sequence[str]) -> bool:
    """The name servers instead of those that are there; a link is the file of another program."""
    entry = view.lstat(RESOLV_CONF)
    if entry is not None and entry.type != "file":
        return False
    old = (view.read(RESOLV_CONF) or b"").decode("utf-8", "surrogateescape")
    replaced = {"nameserver"} if servers else set()
    replaced |= {"search", "domain"} if search else set()
    kept = [line for line in old.splitlines() if (line.split() or [""])[0] not in replaced]
    lines = [*kept, *([f"search {' '.join(search)}"] if search else [])]
    lines += [f"nameserver {server}" for server in servers]
    return view.write(RESOLV_CONF, os.fsencode("\n".join(lines) + "\n"))
