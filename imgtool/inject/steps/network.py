"""The network of a guest, in the form that the guest reads.

A step says it in a part of netplan's words (netplan-yaml(5)); it is written for netplan,
NetworkManager (nm-settings-keyfile(5)), systemd-networkd (systemd.network(5)) or ifupdown
(interfaces(5)).
"""

from __future__ import annotations

import ipaddress
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NotRequired, TypedDict, TypeVar

from imgtool.errors import ImgtoolError, NotInGuestError, UsageError
from imgtool.inject.guest_files import resolver
from imgtool.inject.guest_files.units import ADMIN
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import TEXT, YES_OR_NO, Schema, mapping
from imgtool.inject.steps.step import Step, StepContext

NETPLAN = "/etc/netplan/90-imgtool.yaml"
KEYFILES = "/etc/NetworkManager/system-connections"
NETWORKD = "/etc/systemd/network"
INTERFACES = "/etc/network/interfaces"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_Address = TypeVar("_Address")
_TEXTS: Schema = {"type": "array", "items": TEXT}
_ETHERNET = mapping(
    {
        "dhcp4": YES_OR_NO,
        "dhcp6": YES_OR_NO,
        "addresses": _TEXTS,
        "routes": {
            "type": "array",
            "items": mapping({"to": TEXT, "via": TEXT}, required=("to", "via")),
        },
        "nameservers": mapping({"addresses": _TEXTS, "search": _TEXTS}),
        "macaddress": {
            "description": "Of the interface that is meant, whatever it is called.",
            "type": "string",
            "pattern": "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$",
        },
        "mtu": {"type": "integer", "minimum": 68, "maximum": 65535},
    }
)
_DOMAIN = re.compile(r"[A-Za-z0-9~._-]{1,253}")


class _Servers(TypedDict, total=False):
    addresses: list[str]
    search: list[str]


class _Ethernet(TypedDict, total=False):
    """An interface in a spec, as the schema has it."""

    dhcp4: bool
    dhcp6: bool
    addresses: list[str]
    routes: list[dict[str, str]]
    nameservers: _Servers
    macaddress: str
    mtu: int


@dataclass(frozen=True)
class Ethernet:
    """One interface."""

    name: str
    dhcp4: bool = False
    dhcp6: bool = False
    addresses: tuple[str, ...] = ()
    routes: tuple[tuple[str, str], ...] = ()
    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    mac: str | None = None
    mtu: int | None = None

    @classmethod
    def of(cls, name: str, given: _Ethernet) -> Ethernet:
        """An interface as a spec says it."""
        servers: _Servers = given.get("nameservers", {})
        return cls(
            name,
            bool(given.get("dhcp4")),
            bool(given.get("dhcp6")),
            tuple(given.get("addresses", ())),
            tuple((route["to"], route["via"]) for route in given.get("routes", ())),
            tuple(servers.get("addresses", ())),
            tuple(servers.get("search", ())),
            given["macaddress"].lower() if "macaddress" in given else None,
            given.get("mtu"),
        )

    def check(self) -> None:
        """Raises `UsageError` for what is no name, address or network."""
        if not _NAME.fullmatch(self.name):
            raise UsageError("not the name of an interface", subject=self.name)
        for address in self.addresses:
            if "/" not in address:
                raise UsageError("an address has a prefix, such as /24", subject=address)
            _parse(ipaddress.ip_interface, address)
        for to, via in self.routes:
            hop = _parse(ipaddress.ip_address, via)
            if to != "default" and _parse(ipaddress.ip_network, to).version != hop.version:
                raise UsageError("a route leads by an address of its own kind", subject=via)
        for server in self.servers:
            _parse(ipaddress.ip_address, server)
        for domain in self.search:
            if not _DOMAIN.fullmatch(domain):
                raise UsageError("not a domain", subject=domain)

    def of_version(self, version: int) -> list[str]:
        """Its addresses of IPv4 or IPv6."""
        return [a for a in self.addresses if ipaddress.ip_interface(a).version == version]

    def hops(self, version: int) -> list[tuple[str, str]]:
        """Its routes of IPv4 or IPv6: where to, as a network, and by which address."""
        everything = {4: "0.0.0.0/0", 6: "::/0"}[version]
        return [
            (everything if to == "default" else to, via)
            for to, via in self.routes
            if ipaddress.ip_address(via).version == version
        ]

    def resolvers(self, version: int) -> list[str]:
        """Its name servers of IPv4 or IPv6."""
        return [s for s in self.servers if ipaddress.ip_address(s).version == version]


def _parse(parse: Callable[[str], _Address], text: str) -> _Address:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"not an address: {error}", subject=text) from error


class _Network(TypedDict):
    ethernets: dict[str, _Ethernet]
    renderer: NotRequired[str]


@dataclass(frozen=True)
class Network(Step):
    """The interfaces of a guest."""

    kind = "network"
    schema = mapping(
        {
            "renderer": {"enum": ["netplan", "NetworkManager", "networkd", "ifupdown"]},
            "ethernets": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": {"pattern": f"^{_NAME.pattern}$"},
                "additionalProperties": {"$ref": "#/$defs/ethernet"},
            },
        },
        description="Interfaces, in the words of netplan; written for what the guest uses.",
        required=("ethernets",),
    )
    definitions: ClassVar[Mapping[str, Schema]] = {"ethernet": _ETHERNET}
    ethernets: tuple[Ethernet, ...]
    renderer: str | None = None

    @classmethod
    def from_spec(cls, value: _Network, folder: Path) -> Sequence[Step]:
        """All interfaces at once."""
        ethernets = [Ethernet.of(name, one) for name, one in value["ethernets"].items()]
        return [cls(tuple(ethernets), value.get("renderer"))]

    @property
    def subject(self) -> str:
        """The interfaces' names."""
        return " ".join(ethernet.name for ethernet in self.ethernets)

    def check(self, variables: Mapping[str, str]) -> None:
        """Names, addresses and routes are such."""
        for ethernet in self.ethernets:
            ethernet.check()

    def apply(self, site: StepContext) -> bool:
        """Write them for what the guest uses."""
        view = site.view
        renderer = self.renderer or renderer_of(view)
        changed = _RENDERERS[renderer](view, self.ethernets)
        servers = _once(server for one in self.ethernets for server in one.servers)
        search = _once(domain for one in self.ethernets for domain in one.search)
        if not (servers or search) or renderer == "NetworkManager":
            return changed
        if not resolver.has_resolved(view):
            if renderer != "ifupdown" or not resolver.has_resolvconf(view):
                changed |= resolver.write_resolv_conf(view, servers, search)
        elif renderer == "ifupdown":
            changed |= resolver.tell_resolved(view, servers, search)
        return changed


def _once(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def renderer_of(view: GuestOverlay) -> str:
    """What configures the network of a guest; `NotInGuestError` if nothing known does."""
    if any(view.kind(p) for p in ("/usr/sbin/netplan", "/usr/share/netplan/netplan.script")):
        return "netplan"
    enabled = [
        name
        for folder in view.names(ADMIN)
        if folder.endswith(".wants")
        for name in view.names(f"{ADMIN}/{folder}")
    ]
    if "NetworkManager.service" in enabled or view.kind("/usr/sbin/NetworkManager") == "file":
        return "NetworkManager"
    if "systemd-networkd.service" in enabled:
        return "networkd"
    if any(view.kind(path) for path in ("/sbin/ifup", "/usr/sbin/ifup")):
        return "ifupdown"
    if view.kind("/usr/lib/systemd/systemd-networkd") or view.kind("/lib/systemd/systemd-networkd"):
        return "networkd"
    raise NotInGuestError(
        "the guest has nothing known that configures its network",
        subject="netplan, NetworkManager, systemd-networkd, ifupdown",
    )


def _netplan(view: GuestOverlay, ethernets: tuple[Ethernet, ...]) -> bool:
    import yaml

    found: dict[str, object] = {}
    for one in ethernets:
        entry: dict[str, object] = {"dhcp4": one.dhcp4, "dhcp6": one.dhcp6}
        if one.mac:
            entry["match"] = {"macaddress": one.mac}
        if one.addresses:
            entry["addresses"] = list(one.addresses)
        if one.routes:
            entry["routes"] = [{"to": to, "via": via} for to, via in one.routes]
        servers = {"addresses": list(one.servers), "search": list(one.search)}
        if one.servers or one.search:
            entry["nameservers"] = {key: value for key, value in servers.items() if value}
        if one.mtu:
            entry["mtu"] = one.mtu
        found[one.name] = entry
    text = yaml.safe_dump({"network": {"version": 2, "ethernets": found}}, sort_keys=False)
    changed = view.folder("/etc/netplan")
    # netplan warns of files that others can read.
    return view.write(NETPLAN, text.encode(), mode=0o600, owner=(0, 0)) or changed


def _network_manager(view: GuestOverlay, ethernets: tuple[Ethernet, ...]) -> bool:
    changed = view.folder(KEYFILES, new_mode=0o700)
    for one in ethernets:
        name = f"imgtool-{one.name}"
        # The same connection each time, so that a second run changes nothing.
        lines = ["[connection]", f"id={name}", f"uuid={uuid.uuid5(uuid.NAMESPACE_DNS, name)}"]
        lines += ["type=ethernet", "autoconnect-priority=100"]
        lines += [] if one.mac else [f"interface-name={one.name}"]
        ethernet = [f"mac-address={one.mac}"] if one.mac else []
        ethernet += [f"mtu={one.mtu}"] if one.mtu else []
        lines += ["", "[ethernet]", *ethernet] if ethernet else []
        for version, dhcp in ((4, one.dhcp4), (6, one.dhcp6)):
            addresses = one.of_version(version)
            lines += ["", f"[ipv{version}]"]
            # By itself IPv6 does what the router says.
            rest = "auto" if version == 6 else "disabled"
            method = "auto" if dhcp else "manual" if addresses else rest
            lines.append(f"method={method}")
            lines += [f"address{n}={a}" for n, a in enumerate(addresses, 1)]
            lines += [f"route{n}={to},{via}" for n, (to, via) in enumerate(one.hops(version), 1)]
            servers = one.resolvers(version)
            lines += [f"dns={';'.join(servers)};"] if servers else []
            lines += [f"dns-search={';'.join(one.search)};"] if one.search else []
        path = f"{KEYFILES}/{name}.nmconnection"
        # NetworkManager leaves files alone that others than root can read.
        changed |= view.write(path, _text(lines), mode=0o600, owner=(0, 0))
    return changed


def _networkd(view: GuestOverlay, ethernets: tuple[Ethernet, ...]) -> bool:
    changed = view.folder(NETWORKD)
    for one in ethernets:
        lines = ["[Match]", f"MACAddress={one.mac}" if one.mac else f"Name={one.name}"]
        if one.mtu:
            lines += ["", "[Link]", f"MTUBytes={one.mtu}"]
        dhcp = {(True, True): "yes", (True, False): "ipv4", (False, True): "ipv6"}
        lines += ["", "[Network]", f"DHCP={dhcp.get((one.dhcp4, one.dhcp6), 'no')}"]
        lines += [f"Address={address}" for address in one.addresses]
        lines += [f"DNS={server}" for server in one.servers]
        lines += [f"Domains={' '.join(one.search)}"] if one.search else []
        for to, via in (*one.hops(4), *one.hops(6)):
            lines += ["", "[Route]", f"Destination={to}", f"Gateway={via}"]
        # Before the files of others: the first that matches is taken.
        changed |= view.write(f"{NETWORKD}/05-imgtool-{one.name}.network", _text(lines))
    return changed


def _ifupdown(view: GuestOverlay, ethernets: tuple[Ethernet, ...]) -> bool:
    old = (view.read(INTERFACES) or b"").decode("utf-8", "surrogateescape")
    text = old
    changed = view.folder(f"{INTERFACES}.d")
    resolvconf = resolver.has_resolvconf(view)
    for one in ethernets:
        if one.mac:
            raise ImgtoolError(
                "ifupdown knows interfaces by their names, not by 'macaddress'", subject=one.name
            )
        text = _without(text, one.name)
        lines = [f"auto {one.name}", f"allow-hotplug {one.name}"]
        for version, dhcp in ((4, one.dhcp4), (6, one.dhcp6)):
            lines += _stanzas(one, version, dhcp, resolvconf)
        changed |= view.write(f"{INTERFACES}.d/imgtool-{one.name}", _text(lines))
    if not re.search(rf"^\s*source(-directory)?\s+({INTERFACES}|interfaces)\.d\b", text, re.M):
        text += f"\nsource {INTERFACES}.d/*\n"
    if text != old:
        changed |= view.write(INTERFACES, os.fsencode(text))
    return changed


def _stanzas(one: Ethernet, version: int, dhcp: bool, resolvconf: bool) -> list[str]:
    family = {4: "inet", 6: "inet6"}[version]
    options = []
    if one.mtu:
        # interfaces(5): a method that asks a server has no such option.
        options += [
            f"    up ip link set dev {one.name} mtu {one.mtu}" if dhcp else f"    mtu {one.mtu}"
        ]
    options += [
        f"    up ip -{version} route replace {to} via {via} dev {one.name}"
        for to, via in one.hops(version)
    ]
    servers = one.resolvers(version)
    options += [f"    dns-nameservers {' '.join(servers)}"] if servers and resolvconf else []
    options += [f"    dns-search {' '.join(one.search)}"] if one.search and resolvconf else []
    addresses = one.of_version(version)
    if dhcp:
        options += [f"    up ip -{version} address replace {a} dev {one.name}" for a in addresses]
        return [f"iface {one.name} {family} dhcp", *options]
    if not addresses:
        return [] if version == 6 else [f"iface {one.name} {family} manual", *options]
    lines = []
    for number, address in enumerate(addresses):
        lines += [f"iface {one.name} {family} static", f"    address {address}"]
        lines += options if number == 0 else []
    return lines


def _without(text: str, interface: str) -> str:
    """The text of interfaces(5) without the stanzas of an interface, which would count as well."""
    kept, dropping = [], False
    for line in text.splitlines(keepends=True):
        words = line.split()
        first = words[0] if words else ""
        if first in ("iface", "mapping", "source", "source-directory") or first.startswith(
            ("auto", "allow-", "no-auto-down", "no-scripts")
        ):
            dropping = first in ("iface", "mapping") and words[1:2] == [interface]
            if first in ("auto", "allow-hotplug") and interface in words[1:]:
                rest = [word for word in words[1:] if word != interface]
                line = f"{first} {' '.join(rest)}\n" if rest else ""
        if not dropping:
            kept.append(line)
    return "".join(kept)


def _text(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


_RENDERERS = {
    "netplan": _netplan,
    "NetworkManager": _network_manager,
    "networkd": _networkd,
    "ifupdown": _ifupdown,
}
