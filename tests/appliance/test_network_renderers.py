"""inject's network and cloud-init steps, read by the guest's own programs in a real Debian root."""

from __future__ import annotations

import configparser
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from imgtool.inject.guest_files import resolver
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.cloud import SEED, CloudInit
from imgtool.inject.steps.network import KEYFILES, Ethernet, Network, renderer_of
from imgtool.inject.steps.services import Service
from tests.support.bootable import inside, mounted, needs_pc
from tests.support.inject_root import Root

pytestmark = [pytest.mark.appliance, needs_pc]

STATIC = Ethernet.of(
    "ens16",
    {
        "addresses": ["192.0.2.10/24", "2001:db8::10/64"],
        "routes": [
            {"to": "default", "via": "192.0.2.1"},
            {"to": "2001:db8:ff::/64", "via": "2001:db8::1"},
        ],
        "nameservers": {"addresses": ["192.0.2.53", "2001:db8::53"], "search": ["a.example"]},
        "mtu": 1400,
    },
)
ASKS = Ethernet.of("ens17", {"dhcp4": True, "dhcp6": True, "mtu": 1400})
BY_MAC = Ethernet.of("lan0", {"dhcp4": True, "macaddress": "52:54:00:00:00:15"})


class Tree(Root):
    """The root of a guest as it is; everything in it is root's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owners = {}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Tree]:
    with mounted(tmp_path) as folder:
        yield Tree(folder)


def settings(text: str) -> set[tuple[str, str]]:
    """Sections and lines of a file of systemd's; sections may come more than once."""
    found, section = set(), ""
    for line in text.splitlines():
        section = line if line.startswith("[") else section
        found.add((section, line))
    return found


def test_netplan_makes_of_it_what_was_meant(root: Tree):
    assert renderer_of(GuestOverlay(root)) == "netplan"
    assert root.twice(Network((STATIC, ASKS, BY_MAC))) == ["changed"]
    done = inside(root.folder, "netplan", "generate")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    made = root.host("/run/systemd/network")
    assert settings((made / "10-netplan-ens16.network").read_text()) >= {
        ("[Match]", "Name=ens16"),
        ("[Link]", "MTUBytes=1400"),
        ("[Network]", "Address=192.0.2.10/24"),
        ("[Network]", "Address=2001:db8::10/64"),
        ("[Network]", "DNS=192.0.2.53"),
        ("[Network]", "DNS=2001:db8::53"),
        ("[Network]", "Domains=a.example"),
        ("[Route]", "Destination=0.0.0.0/0"),
        ("[Route]", "Gateway=192.0.2.1"),
        ("[Route]", "Destination=2001:db8:ff::/64"),
        ("[Route]", "Gateway=2001:db8::1"),
    }
    asks = settings((made / "10-netplan-ens17.network").read_text())
    assert asks >= {("[Network]", "DHCP=yes"), ("[Link]", "MTUBytes=1400")}
    by_mac = settings((made / "10-netplan-lan0.network").read_text())
    assert by_mac >= {
        ("[Match]", "PermanentMACAddress=52:54:00:00:00:15"),
        ("[Network]", "DHCP=ipv4"),
    }


def test_networkmanager_reads_every_line_of_its_files(root: Tree):
    assert root.twice(Network((STATIC, ASKS, BY_MAC), "NetworkManager")) == ["changed"]
    for name in ("ens16", "ens17", "lan0"):
        text = root.text(f"{KEYFILES}/imgtool-{name}.nmconnection")
        # Read, set to what it is already, written: what it does not know would be gone.
        change = ("connection", "modify", "connection.autoconnect", "yes")
        done = inside(root.folder, "nmcli", "--offline", *change, input=text.encode())
        assert (done.returncode, done.stderr) == (0, "")
        ours, theirs = configparser.ConfigParser(), configparser.ConfigParser()
        ours.read_string(text)
        theirs.read_string(done.stdout)
        for section in ours.sections():
            assert dict(ours[section]).items() <= dict(theirs[section]).items()


def test_ifupdown_would_do_what_was_meant(root: Tree):
    step = Network((STATIC, ASKS), "ifupdown")
    assert root.twice(step) == ["changed"]
    listed = inside(root.folder, "ifquery", "--list")
    assert {"ens16", "ens17"} <= set(listed.stdout.split())
    static = inside(root.folder, "ifup", "--no-act", "--verbose", "ens16")
    assert static.returncode == 0, static.stderr
    for line in (
        "ip addr add 192.0.2.10/255.255.255.0",
        "ip link set dev ens16 mtu 1400",
        "ip -4 route replace 0.0.0.0/0 via 192.0.2.1 dev ens16",
        "ip -6 addr add 2001:db8::10/64",
        "ip -6 route replace 2001:db8:ff::/64 via 2001:db8::1 dev ens16",
    ):
        assert line in static.stderr + static.stdout
    asks = inside(root.folder, "ifup", "--no-act", "--verbose", "ens17")
    assert asks.returncode == 0, asks.stderr
    for line in ("dhclient -4", "dhclient -6", "ip link set dev ens17 mtu 1400"):
        assert line in asks.stderr + asks.stdout


def test_the_renderer_is_the_one_of_the_packages_that_are_there(root: Tree):
    def purge(package: str) -> None:
        done = inside(root.folder, "dpkg", "--purge", "--force-depends", package)
        assert done.returncode == 0, done.stderr

    purge("netplan.io")
    assert renderer_of(GuestOverlay(root)) == "NetworkManager"
    purge("network-manager")
    assert renderer_of(GuestOverlay(root)) == "ifupdown"
    purge("systemd-resolved")
    assert root.twice(Network((STATIC,))) == ["changed"]
    assert root.text(resolver.RESOLV_CONF).endswith(
        "search a.example\nnameserver 192.0.2.53\nnameserver 2001:db8::53\n"
    )
    assert root.twice(Service("enable", "systemd-networkd")) == ["changed"]
    assert renderer_of(GuestOverlay(root)) == "networkd"


USER_DATA = {
    "users": [{"name": "eve", "shell": "/bin/bash"}],
    "write_files": [{"path": "/srv/told", "content": "by the seed\n"}],
    # The root is a file of the host here.
    "resize_rootfs": False,
    "growpart": {"mode": "off"},
    "ssh_deletekeys": False,
    "ssh_genkeytypes": ["ed25519"],
}


def test_cloud_init_takes_the_seed_and_does_what_it_says(root: Tree):
    network = {
        "version": 2,
        "ethernets": {"ens16": {"addresses": ["192.0.2.10/24"], "mtu": 1400}},
    }
    meta = {"instance-id": "i-1", "local-hostname": "seeded"}
    step = CloudInit({"user-data": USER_DATA, "meta-data": meta, "network-config": network})
    assert root.twice(step) == ["changed"]
    valid = inside(root.folder, "cloud-init", "schema", "--config-file", f"{SEED}/user-data")
    assert valid.returncode == 0, valid.stderr
    assert "Valid cloud-config" in valid.stdout
    words = ["--network-data", f"{SEED}/network-config", "--kind", "yaml", "--distro", "debian"]
    words += ["--output-kind", "netplan", "--directory", "/srv/converted"]
    converted = inside(root.folder, "cloud-init", "devel", "net-convert", *words)
    assert converted.returncode == 0, converted.stderr
    (made,) = (path for path in root.host("/srv/converted").rglob("*") if path.is_file())
    assert yaml.safe_load(made.read_text())["network"] == network
    starts = (
        "/usr/lib/cloud-init/ds-identify --force > /dev/null 2>&1"
        " && cloud-init init --local && cloud-init init && hostname && cloud-id"
    )
    done = inside(root.folder, "sh", "-c", starts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == ["seeded", "nocloud"]
    assert root.text("/srv/told") == "by the seed\n"
    assert "\neve:" in root.text("/etc/passwd")
    assert "192.0.2.10" in root.text("/etc/network/interfaces.d/50-cloud-init")
    result = json.loads(root.text("/run/cloud-init/instance-data.json"))
    assert result["ds"]["meta_data"]["instance-id"] == "i-1"


def test_cloud_inits_own_check_would_find_a_mistake(root: Tree):
    assert root.twice(
        CloudInit({"user-data": {"users": 5}, "meta-data": {"instance-id": "i-1"}})
    ) == ["changed"]
    found = inside(root.folder, "cloud-init", "schema", "--config-file", f"{SEED}/user-data")
    assert found.returncode != 0
