"""inject on a Debian that is then started: what a spec says is so in the running guest."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.bootable import MACHINE_ID, bootable, machine, needs_pc

pytestmark = [pytest.mark.appliance, needs_pc]

PASSWORD = "correct horse"
STATIC = {16: "netplan", 17: "networkd", 18: "NetworkManager", 19: "ifupdown"}
DHCP = 20
SPEC = """\
steps:
  - hostname: "{{ image }}.example.org"
  - timezone: Europe/Warsaw
  - user: {name: bob, comment: Bob, sudo: password}
  - ssh-key: {user: bob, file: key.pub}
  - password: {user: bob, env: BOBS_PASSWORD}
  - write:
      path: /usr/local/sbin/report
      mode: 0755
      content: |
        #!/bin/sh
        echo start >> /var/lib/starts
        echo "REPORT of start $(wc -l < /var/lib/starts) of $(hostname) $(cat /etc/machine-id)."
  - write:
      path: /etc/systemd/system/report.service
      content: |
        [Unit]
        After=imgtool-firstboot.service
        [Service]
        Type=oneshot
        RemainAfterExit=yes
        ExecStart=/usr/local/sbin/report
        StandardOutput=journal+console
        [Install]
        WantedBy=multi-user.target
  - service: {enable: report}
  - firstboot:
      name: zz
      content: |
        #!/bin/sh
        echo "FIRST: the one"
        stat -c '%n %U:%G %a' /home/bob/.ssh /home/bob/.ssh/authorized_keys
        ssh-keygen -lf /home/bob/.ssh/authorized_keys
        exit 3
  - firstboot:
      name: aa
      content: |
        #!/bin/sh
        echo "FIRST: the other as $(id -un), $(ip route get 198.51.19.1 | head -n 1)"
  - machine-id: reset
  - ssh-host-keys: remove
"""
# One interface of each renderer, by its name or by its MAC address, and one that asks a server.
NETWORK = """\
  - network:
      renderer: {renderer}
      ethernets:
        {name}:
          addresses: [10.77.{n}.10/24, "2001:db8:{n}::10/64"]
          routes:
            - {{to: 198.51.{n}.0/24, via: 10.77.{n}.1}}
            - {{to: "2001:db8:ff{n}::/64", via: "2001:db8:{n}::1"}}
          nameservers: {{addresses: [10.77.{n}.53, "2001:db8:{n}::53"], search: [n{n}.example]}}
          mtu: 1400
"""
ASKS = """\
        ens20: {dhcp4: true}
"""
LOOKS = {
    "id": "id bob",
    "name": "hostname",
    "zone": "date +%Z",
    "active": "systemctl is-active report ssh imgtool-ssh-host-keys systemd-networkd",
    "enabled": "systemctl is-enabled report ssh",
    "failed": "systemctl --failed --plain --no-legend",
    "links": "ip -j address",
    "routes": "ip -j route",
    "routes6": "ip -j -6 route",
    "servers": "resolvectl dns",
    "search": "resolvectl domain",
    "connections": "nmcli -t -f NAME,DEVICE,STATE connection show",
    "interfaces": "ifquery --state",
    "complaints": "journalctl -b -q -p warning -o cat -u systemd-networkd -u NetworkManager"
    " -u networking | grep -e imgtool -e netplan -e interfaces.d",
}


@dataclass(frozen=True)
class Seen:
    """What a guest said at its first start, to `LOOKS` over SSH, after it, and at the second."""

    image: Path
    rows: list[dict[str, Any]]
    first: str
    login: str
    looks: dict[str, str]
    log: str
    second: str

    def listed(self, look: str) -> list[dict[str, Any]]:
        links: list[dict[str, Any]] = json.loads(self.looks[look])
        return links


def _imgtool(*words: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "imgtool", *words],
        env={**os.environ, "BOBS_PASSWORD": PASSWORD},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert PASSWORD not in done.stdout + done.stderr
    return done.stdout


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _interfaces(port: int) -> list[str]:
    words = []
    for n in (*STATIC, DHCP):
        to_ssh = f",hostfwd=tcp:127.0.0.1:{port}-:22" if n == DHCP else ""
        words += ["-netdev", f"user,id=n{n},net=10.88.{n}.0/24,ipv6=off{to_ssh}"]
        words += ["-device", f"virtio-net-pci,netdev=n{n},addr={n:#x},mac=52:54:00:00:00:{n}"]
    return words


def _over_ssh(folder: Path, port: int) -> dict[str, str]:
    """With the key, and as root with the password."""
    script = "\n".join(f"echo; echo '=== {name}'; {line}" for name, line in LOOKS.items())
    options = {
        "Port": port, "IdentityFile": folder / "key", "IdentitiesOnly": "yes", "BatchMode": "yes",
        "StrictHostKeyChecking": "accept-new", "UserKnownHostsFile": folder / "known_hosts",
    }  # fmt: skip
    words = ["ssh", "-F", "none", *(f"-o{name}={value}" for name, value in options.items())]
    words += ["bob@127.0.0.1", "sudo -S -p '' sh -s"]
    done = subprocess.run(
        words, input=f"{PASSWORD}\n{script}\n", capture_output=True, text=True, timeout=120
    )
    parts = re.split(r"^=== (\w+)\n", done.stdout, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))
    assert set(found) == set(LOOKS), f"{done.stdout}{done.stderr}"
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("booting")
    image = folder / "web1.raw"
    subprocess.run(["cp", "--sparse=always", bootable().disk, image], check=True)
    keygen = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me", "-f", folder / "key")
    subprocess.run(keygen, check=True)
    steps = SPEC
    for n, renderer in STATIC.items():
        by_mac = renderer in ("networkd", "NetworkManager")
        name = f'lan{n}, macaddress: "52:54:00:00:00:{n}"' if by_mac else f"ens{n}"
        given, _, mac = name.partition(", ")
        steps += NETWORK.format(n=n, renderer=renderer, name=given)
        steps += f"          {mac}\n" if mac else ""
        steps += ASKS if renderer == "netplan" else ""
    (folder / "site.yaml").write_text(steps)
    rows = _imgtool("inject", image, folder / "site.yaml", "-o", "json")
    port = _free_port()
    with machine(image, folder / "first.log", network=_interfaces(port)) as console:
        first = console.wait_for(r"REPORT of start .*\.\n")
        console.say("")
        first += console.wait_for("login: ")
        console.say("bob")
        console.wait_for("Password: ")
        console.say(PASSWORD)
        console.wait_for(r"bob@web1:~\$ ")
        console.say("id -u && echo in''side")
        login = console.wait_for("\ninside\n")
        # Making an RSA key may take longer than all the rest.
        console.say("until [ -e /run/sshd.pid ]; do sleep 1; done; echo li''stening")
        console.wait_for("\nlistening\n")
        looks = _over_ssh(folder, port)
        console.say(f"echo '{PASSWORD}' | sudo -S -p '' systemctl poweroff")
        console.wait_for_end()
    log = _imgtool("cat", "--engine", "direct", image, "/var/log/imgtool-firstboot.log")
    offline = ("networking.service", "NetworkManager.service", "systemd-networkd.service")
    waits = ("systemd-networkd-wait-online.service", "NetworkManager-wait-online.service")
    with machine(image, folder / "second.log", without=(*offline, *waits)) as console:
        second = console.wait_for(r"REPORT of start .*\.\n")
    yield Seen(image, json.loads(rows), first, login, looks, log, second)


def test_every_step_is_in_the_image(seen: Seen):
    assert {row["status"] for row in seen.rows} == {"changed"}
    assert {row["committed"] for row in seen.rows} == {True}


def test_the_guest_is_called_so_and_has_an_identity_of_its_own(seen: Seen):
    (found,) = re.findall(r"REPORT of start 1 of web1\.example\.org ([0-9a-f]{32})\.", seen.first)
    assert found != MACHINE_ID
    assert "web1 login: " in seen.first
    assert seen.looks["name"] == "web1.example.org"
    assert seen.looks["zone"] in ("CET", "CEST")
    assert f"REPORT of start 2 of web1.example.org {found}." in seen.second


def test_the_user_is_there_and_logs_in_with_password_and_key(seen: Seen):
    assert "\n1000\n" in seen.login
    assert seen.looks["id"] == "uid=1000(bob) gid=1000(bob) groups=1000(bob)"
    assert "/home/bob/.ssh bob:bob 700\n" in seen.log
    assert "/home/bob/.ssh/authorized_keys bob:bob 600\n" in seen.log
    fingerprint = subprocess.run(
        ["ssh-keygen", "-lf", seen.image.with_name("key.pub")], capture_output=True, text=True
    )
    assert fingerprint.stdout in seen.log


def test_services_are_enabled_and_run(seen: Seen):
    assert seen.looks["enabled"].split() == ["enabled", "enabled"]
    assert seen.looks["active"].split() == ["active", "active", "inactive", "active"]
    # One of the scripts of the first start fails, and says so.
    assert [line.split()[0] for line in seen.looks["failed"].splitlines()] == [
        "imgtool-firstboot.service"
    ]


def test_the_ssh_server_has_new_keys(seen: Seen):
    at = "/etc/ssh/ssh_host_ed25519_key.pub"
    new = _imgtool("cat", "--engine", "direct", seen.image, at).split()[1]
    old = _imgtool("cat", "--engine", "direct", bootable().disk, at).split()[1]
    assert new != old
    assert new in seen.image.with_name("known_hosts").read_text()


def test_first_start_scripts_run_once_in_order_of_the_spec(seen: Seen):
    route = "198.51.19.1 via 10.77.19.1 dev ens19 src 10.77.19.10"
    for text in (seen.first, seen.log):
        said = re.findall(r"FIRST: .*\w|ended with status \d", text)
        assert said[0] == "FIRST: the one"
        assert said[1] == "ended with status 3"
        # After the network.
        assert said[2].startswith(f"FIRST: the other as root, {route}")
        assert said[3:] == ["ended with status 0"]
    assert "FIRST: " not in seen.second


@pytest.mark.parametrize("n", STATIC)
def test_each_renderer_configures_its_interface(seen: Seen, n: int):
    name = f"ens{n}"
    (link,) = [link for link in seen.listed("links") if link["ifname"] == name]
    addresses = {f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"]}
    assert {f"10.77.{n}.10/24", f"2001:db8:{n}::10/64"} <= addresses
    assert link["mtu"] == 1400
    routes = {
        (route["dst"], route["gateway"])
        for look in ("routes", "routes6")
        for route in seen.listed(look)
        if route["dev"] == name and "gateway" in route
    }
    assert routes == {
        (f"198.51.{n}.0/24", f"10.77.{n}.1"),
        (f"2001:db8:ff{n}::/64", f"2001:db8:{n}::1"),
    }
    # What ifupdown has for systemd-resolved does not work, so it is told for the whole machine.
    label = "Global" if STATIC[n] == "ifupdown" else f"({name})"
    for look, wanted in (
        ("servers", {f"10.77.{n}.53", f"2001:db8:{n}::53"}),
        ("search", {f"n{n}.example"}),
    ):
        (line,) = [line for line in seen.looks[look].splitlines() if label in line]
        assert set(line.partition(": ")[2].split()) == wanted


def test_each_interface_is_its_renderers(seen: Seen):
    connections = seen.looks["connections"].splitlines()
    assert "imgtool-lan18:ens18:activated" in connections
    assert not [line for line in connections if "ens19" in line or "ens16" in line]
    assert "ens19=ens19" in seen.looks["interfaces"].split()
    (asked,) = [link for link in seen.listed("links") if link["ifname"] == f"ens{DHCP}"]
    assert f"10.88.{DHCP}.15" in {a["local"] for a in asked["addr_info"]}


def test_nothing_is_complained_of(seen: Seen):
    assert seen.looks["complaints"] == ""
