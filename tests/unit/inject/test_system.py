"""inject: host names, time, language, identity."""

from __future__ import annotations

import os

import pytest

from imgtool.errors import NotInGuestError, UsageError
from imgtool.inject.steps import host_keys
from imgtool.inject.steps.host_keys import SshHostKeys
from imgtool.inject.steps.system import (
    Hostname,
    Locale,
    MachineId,
    Relabel,
    Timezone,
    hosts_with,
)
from tests.support.inject_root import Root


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path / "root")


def test_the_host_is_renamed_where_it_is_named(root):
    assert root.twice(Hostname("web1.example.org")) == ["changed"]
    assert root.text("/etc/hostname") == "web1.example.org\n"
    assert root.text("/etc/hosts").splitlines() == [
        "127.0.0.1\tlocalhost",
        "127.0.1.1\tweb1.example.org web1",
        "",
        "::1\tlocalhost ip6-localhost",
    ]
    assert root.twice(Hostname("{{ image }}"), variables={"image": "db"}) == ["changed"]
    assert "127.0.1.1\tdb\n" in root.text("/etc/hosts")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("127.0.0.1 localhost old\n", "127.0.0.1\tlocalhost new\n"),
        ("127.0.0.1 localhost\n", "127.0.0.1 localhost\n127.0.1.1\tnew\n"),
        ("10.0.0.5 old.lan old mail # us\n", "10.0.0.5\tnew mail # us\n"),
        ("127.0.1.1 old.lan old\n", "127.0.1.1\tnew\n"),
        ("127.0.1.1 other\n", "127.0.1.1\tnew other\n"),
        ("127.0.1.1 new\n", "127.0.1.1 new\n"),
        ("", "127.0.1.1\tnew\n"),
    ],
)
def test_hosts_keeps_every_other_name(before, after):
    assert hosts_with(before, "old", "new", always=True) == after
    assert hosts_with(after, "new", "new", always=True) == after


def test_a_guest_that_is_not_debian_gets_no_line_of_debians():
    text = "127.0.0.1 localhost\n"
    assert hosts_with(text, "localhost", "new", always=False) == text


@pytest.mark.parametrize("name", ["", "a..b", "-a", "a_b", "x" * 64, "żółw", "a b", "a/b", "a\n"])
def test_a_host_name_is_one_by_rfc_1123(name):
    with pytest.raises(UsageError):
        Hostname(name).check({})


def test_the_time_zone_is_one_of_the_guests(root):
    assert root.twice(Timezone("Europe/Warsaw")) == ["changed"]
    assert os.readlink(root.folder / "etc/localtime") == "../usr/share/zoneinfo/Europe/Warsaw"
    assert root.text("/etc/timezone") == "Europe/Warsaw\n"
    (outcome,) = root.take(Timezone("Europe/Warszawa"))
    assert isinstance(outcome.error, NotInGuestError)
    assert "Europe/Warsaw" in str(outcome.error.hint)


def test_the_language_is_set_where_debian_and_others_read_it(root):
    (root.folder / "etc/locale.gen").write_text("# en_US.UTF-8 UTF-8\n# pl_PL.UTF-8 UTF-8\n")
    assert root.twice(Locale("pl_PL.UTF-8")) == ["changed"]
    assert root.text("/etc/default/locale") == "LANG=pl_PL.UTF-8\n"
    assert root.text("/etc/locale.gen") == "# en_US.UTF-8 UTF-8\npl_PL.UTF-8 UTF-8\n"
    (root.folder / "etc/debian_version").unlink()
    (root.folder / "etc/locale.conf").write_text('LC_TIME=C\nLANG="en_US.UTF-8"\n')
    assert root.twice(Locale("de_DE.UTF-8")) == ["changed"]
    assert root.text("/etc/locale.conf") == "LC_TIME=C\nLANG=de_DE.UTF-8\n"


def test_the_machine_id_is_emptied_not_removed(root):
    assert root.twice(MachineId()) == ["changed"]
    assert root.text("/etc/machine-id") == ""
    assert not (root.folder / "var/lib/dbus/machine-id").exists()


def test_only_host_keys_are_removed(root):
    assert root.twice(SshHostKeys()) == ["changed"]
    assert os.listdir(root.folder / "etc/ssh") == ["sshd_config"]
    assert not root.host(f"/etc/systemd/system/{host_keys.UNIT}").exists()  # there is no sshd


SERVER = "usr/lib/systemd/system/ssh.service"


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("ExecStartPre=/usr/sbin/sshd -t", True),
        ("Wants=sshd-keygen.target", False),
        ("Wants=sshdgenkeys.service", False),
        ("ExecStartPre=/usr/sbin/sshd-gen-keys-start", False),
    ],
)
def test_guest_whose_sshd_needs_keys_makes_them(root, line, ours):
    for program in ("usr/sbin/sshd", "usr/bin/ssh-keygen"):
        (root.folder / program).write_text("")
    (root.folder / SERVER).write_text(f"[Service]\n{line}\n")
    assert root.twice(SshHostKeys()) == ["changed"]
    wanted = root.host(f"/etc/systemd/system/multi-user.target.wants/{host_keys.UNIT}")
    assert wanted.is_symlink() == ours
    if ours:
        assert root.text(f"/etc/systemd/system/{host_keys.UNIT}") == host_keys.SERVICE


def test_only_a_guest_with_selinux_is_relabelled(root):
    (outcome,) = root.take(Relabel())
    assert isinstance(outcome.error, NotInGuestError)
