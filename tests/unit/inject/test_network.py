"""inject: the network for what the guest uses, and seeds for cloud-init."""

from __future__ import annotations

import configparser
import gzip
import shutil

import pytest
import yaml

from imgtool.errors import NotInGuestError, UsageError
from imgtool.inject.guest_files import resolver
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps import network
from imgtool.inject.steps.cloud import SEED, CloudInit
from imgtool.inject.steps.network import Ethernet, Network, renderer_of
from tests.support.inject_root import Root

STATIC = Ethernet.of(
    "eth0",
    {
        "addresses": ["192.0.2.10/24", "2001:db8::10/64"],
        "routes": [{"to": "default", "via": "192.0.2.1"}, {"to": "default", "via": "2001:db8::1"}],
        "nameservers": {"addresses": ["192.0.2.53"], "search": ["example.org"]},
        "mtu": 1400,
    },
)
DHCP = Ethernet("eth1", dhcp4=True)


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path / "root")


def give(root: Root, *paths: str) -> None:
    for path in paths:
        root.host(path).parent.mkdir(parents=True, exist_ok=True)
        root.host(path).write_text("")


def test_the_guests_own_way_is_found(root):
    assert renderer_of(GuestOverlay(root)) == "ifupdown"
    give(root, "/usr/sbin/NetworkManager")
    assert renderer_of(GuestOverlay(root)) == "NetworkManager"
    give(root, "/usr/sbin/netplan")
    assert renderer_of(GuestOverlay(root)) == "netplan"


def test_ifupdown_reads_one_file_an_interface_and_no_old_stanza(root):
    old = "auto lo eth0\niface lo inet loopback\n\niface eth0 inet dhcp\n    metric 5\n"
    root.host(network.INTERFACES).write_text(old)
    assert root.twice(Network((STATIC, DHCP))) == ["changed"]
    main = root.text(network.INTERFACES)
    assert main == "auto lo\niface lo inet loopback\n\n\nsource /etc/network/interfaces.d/*\n"
    text = root.text("/etc/network/interfaces.d/imgtool-eth0")
    assert "iface eth0 inet static\n    address 192.0.2.10/24\n    mtu 1400\n" in text
    assert "iface eth0 inet6 static\n    address 2001:db8::10/64\n" in text
    assert "up ip -4 route replace 0.0.0.0/0 via 192.0.2.1 dev eth0" in text
    assert "iface eth1 inet dhcp\n" in root.text("/etc/network/interfaces.d/imgtool-eth1")


def test_ifupdown_sets_an_mtu_with_an_address_from_a_server(root):
    step = Network((Ethernet.of("eth0", {"dhcp4": True, "mtu": 1400}),), "ifupdown")
    assert root.twice(step) == ["changed"]
    text = root.text("/etc/network/interfaces.d/imgtool-eth0")
    assert "iface eth0 inet dhcp\n    up ip link set dev eth0 mtu 1400\n" in text


@pytest.mark.parametrize("renderer", ["ifupdown", "networkd", "netplan"])
def test_name_servers_count_where_nothing_hands_them_on(root, renderer):
    old = "# old\nnameserver 10.0.0.1\nsearch build.example\noptions rotate\n"
    root.host(resolver.RESOLV_CONF).write_text(old)
    assert root.twice(Network((STATIC, DHCP), renderer)) == ["changed"]
    assert root.text(resolver.RESOLV_CONF) == (
        "# old\noptions rotate\nsearch example.org\nnameserver 192.0.2.53\n"
    )
    if renderer == "ifupdown":
        assert "dns-" not in root.text("/etc/network/interfaces.d/imgtool-eth0")


def test_name_servers_are_left_to_what_hands_them_on(root):
    root.host(resolver.RESOLV_CONF).write_text("nameserver 10.0.0.1\n")
    assert root.twice(Network((STATIC,), "NetworkManager")) == ["changed"]
    give(root, "/usr/sbin/resolvconf")
    assert root.twice(Network((STATIC,), "ifupdown")) == ["changed"]
    text = root.text("/etc/network/interfaces.d/imgtool-eth0")
    assert "    dns-nameservers 192.0.2.53\n    dns-search example.org\n" in text
    give(root, "/usr/lib/systemd/systemd-resolved")
    assert root.twice(Network((STATIC,), "networkd")) == ["changed"]
    assert root.text(resolver.RESOLV_CONF) == "nameserver 10.0.0.1\n"


def test_systemd_resolved_is_told_what_ifupdown_does_not_tell(root):
    give(root, "/usr/lib/systemd/systemd-resolved", "/usr/bin/resolvectl")
    root.host("/usr/sbin/resolvconf").symlink_to("../bin/resolvectl")
    root.host(resolver.RESOLV_CONF).symlink_to("../run/systemd/resolve/stub-resolv.conf")
    assert root.twice(Network((STATIC,), "ifupdown")) == ["changed"]
    assert root.text(resolver.DROP_IN) == "[Resolve]\nDNS=192.0.2.53\nDomains=example.org\n"
    assert "dns-" not in root.text("/etc/network/interfaces.d/imgtool-eth0")


def test_netplan_gets_a_file_for_root_alone(root):
    assert root.twice(Network((STATIC, DHCP), "netplan")) == ["changed"]
    found = yaml.safe_load(root.text(network.NETPLAN))["network"]
    assert found["version"] == 2
    assert found["ethernets"]["eth0"]["addresses"] == ["192.0.2.10/24", "2001:db8::10/64"]
    assert found["ethernets"]["eth1"]["dhcp4"] is True
    assert root.mode(network.NETPLAN) == 0o600


def test_networkmanager_gets_a_keyfile_for_root_alone(root):
    assert root.twice(Network((STATIC, DHCP), "NetworkManager")) == ["changed"]
    path = f"{network.KEYFILES}/imgtool-eth0.nmconnection"
    assert root.mode(path) == 0o600
    found = configparser.ConfigParser()
    found.read_string(root.text(path))
    assert dict(found["ipv4"]) == {
        "method": "manual", "address1": "192.0.2.10/24", "route1": "0.0.0.0/0,192.0.2.1",
        "dns": "192.0.2.53;", "dns-search": "example.org;",
    }  # fmt: skip
    assert found["ipv6"]["address1"] == "2001:db8::10/64"
    assert found["connection"]["interface-name"] == "eth0"
    assert found["ethernet"]["mtu"] == "1400"


def test_networkd_gets_a_file_before_all_others(root):
    by_mac = Ethernet("lan0", dhcp4=True, dhcp6=True, mac="52:54:00:12:34:56")
    assert root.twice(Network((STATIC, by_mac), "networkd")) == ["changed"]
    text = root.text(f"{network.NETWORKD}/05-imgtool-eth0.network")
    assert "[Match]\nName=eth0\n" in text and "DHCP=no\nAddress=192.0.2.10/24\n" in text
    assert "[Route]\nDestination=::/0\nGateway=2001:db8::1\n" in text
    other = root.text(f"{network.NETWORKD}/05-imgtool-lan0.network")
    assert "MACAddress=52:54:00:12:34:56\n" in other and "DHCP=yes\n" in other


def test_a_guest_with_nothing_known_is_told_so(root):
    shutil.rmtree(root.folder / "usr/sbin")
    (outcome,) = root.take(Network((DHCP,)))
    assert isinstance(outcome.error, NotInGuestError)


@pytest.mark.parametrize(
    "given",
    [
        {"addresses": ["192.0.2.10"]},
        {"addresses": ["192.0.2.300/24"]},
        {"routes": [{"to": "default", "via": "router"}]},
        {"routes": [{"to": "2001:db8::/32", "via": "192.0.2.1"}]},
        {"nameservers": {"addresses": ["dns"]}},
        {"nameservers": {"search": ["a b"]}},
    ],
)
def test_what_is_no_address_is_told_before_a_guest_is_opened(given):
    with pytest.raises(UsageError):
        Network((Ethernet.of("eth0", given),)).check({})


def test_a_seed_is_written_for_root_alone(root, tmp_path):
    give(root, "/etc/cloud/cloud.cfg")
    (tmp_path / "user").write_text("#cloud-config\npackages: [nginx]\n")
    step = CloudInit(
        {
            "user-data": tmp_path / "user",
            "meta-data": {"instance-id": "i-1"},
            "network-config": {"version": 2, "ethernets": {"eth0": {"dhcp4": True}}},
        }
    )
    assert root.twice(step) == ["changed"]
    assert root.text(f"{SEED}/user-data") == "#cloud-config\npackages: [nginx]\n"
    assert yaml.safe_load(root.text(f"{SEED}/meta-data")) == {"instance-id": "i-1"}
    assert root.mode(f"{SEED}/user-data") == 0o600
    assert root.twice(CloudInit({"user-data": {"a": 1}, "meta-data": {"instance-id": "i-1"}}))
    assert root.text(f"{SEED}/user-data") == "#cloud-config\na: 1\n"


def test_a_guest_without_cloud_init_is_told_so(root):
    (outcome,) = root.take(CloudInit({"meta-data": {"instance-id": "i"}}))
    assert isinstance(outcome.error, NotInGuestError)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("user-data", "packages: [nginx]\n"),
        ("user-data", "#cloud-config\n- a list\n"),
        ("user-data", "#cloud-config\na: [\n"),
        ("meta-data", "local-hostname: x\n"),
        ("meta-data", "- a\n"),
        ("network-config", "ethernets: {}\n"),
        ("network-config", "version: 1\n"),
        ("network-config", "version: 2\nethernets: []\n"),
    ],
)
def test_a_seed_that_cloud_init_would_not_take_is_told_before(tmp_path, part, text):
    (tmp_path / "part").write_text(text)
    with pytest.raises(UsageError, match=part):
        CloudInit({part: tmp_path / "part"}).check({})


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (gzip.compress(b"packages: [nginx]\n"), "does not know what this is"),
        (gzip.compress(b"#cloud-config\n- a list\n"), "not a mapping"),
        (gzip.compress(bytes(17 << 20)), "longer than"),
        (gzip.compress(b"#cloud-config\na: 1\n")[:-4], "cut off"),
        (b"\x1f\x8bnot gzip", "not a gzip file"),
    ],
    ids=["no header", "no mapping", "too long", "cut off", "no gzip"],
)
def test_packed_user_data_are_looked_into_before(tmp_path, packed, reason):
    (tmp_path / "part").write_bytes(packed)
    with pytest.raises(UsageError, match=f"user-data: .*{reason}"):
        CloudInit({"user-data": tmp_path / "part"}).check({})


def test_packed_user_data_are_written_as_they_are(root, tmp_path):
    give(root, "/etc/cloud/cloud.cfg")
    packed = gzip.compress(b"#cloud-config\npackages: [nginx]\n")
    (tmp_path / "part").write_bytes(packed)
    assert root.twice(CloudInit({"user-data": tmp_path / "part"})) == ["changed"]
    assert root.host(f"{SEED}/user-data").read_bytes() == packed
