"""inject: units enabled as systemctl does it, and scripts of the first start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from imgtool.errors import NotInGuestError, UsageError
from imgtool.inject.steps import firstboot
from imgtool.inject.steps.firstboot import FirstBoot
from imgtool.inject.steps.services import Service
from tests.support.inject_root import Root

ADMIN = "etc/systemd/system"
VENDOR = "/usr/lib/systemd/system"


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path / "root")


def links(root: Root) -> dict[str, str]:
    folder = root.folder / ADMIN
    return {
        str(path.relative_to(folder)): os.readlink(path)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink()
    }


def test_a_unit_is_enabled_where_its_install_section_says(root):
    assert root.twice(Service("enable", "ssh")) == ["changed"]
    assert links(root) == {
        "multi-user.target.wants/ssh.service": f"{VENDOR}/ssh.service",
        "sshd.service": f"{VENDOR}/ssh.service",
    }
    assert root.twice(Service("disable", "sshd.service")) == ["changed"]
    assert links(root) == {}


def test_templates_get_their_default_instance(root):
    assert root.twice(Service("enable", "getty@.service")) == ["changed"]
    assert root.twice(Service("enable", "getty@ttyS0")) == ["changed"]
    assert sorted(links(root)) == [
        "getty.target.wants/getty@tty1.service",
        "getty.target.wants/getty@ttyS0.service",
    ]
    assert set(links(root).values()) == {f"{VENDOR}/getty@.service"}
    assert root.twice(Service("disable", "getty@ttyS0")) == ["changed"]
    assert sorted(links(root)) == ["getty.target.wants/getty@tty1.service"]


def test_units_that_bring_each_other_along_end(root):
    assert root.twice(Service("enable", "pair.socket")) == ["changed"]
    assert sorted(links(root)) == [
        "a.target.requires/pair.service",
        "b.target.requires/pair.service",
        "sockets.target.wants/pair.socket",
    ]


def test_a_unit_that_was_enabled_by_another_path_is_enabled(root):
    wants = root.folder / ADMIN / "multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "cron.service").symlink_to("/lib/systemd/system/cron.service")
    assert root.twice(Service("enable", "cron")) == ["unchanged"]


def test_an_alias_of_another_unit_is_not_taken_away(root):
    root.take(Service("enable", "ssh"))
    other = root.folder / "usr/lib/systemd/system/other.service"
    other.write_text("[Install]\nAlias=sshd.service\n")
    (outcome,) = root.take(Service("enable", "other"))
    assert "another unit has this name" in str(outcome.error)
    assert links(root)["sshd.service"] == f"{VENDOR}/ssh.service"


def test_a_drop_in_can_say_where_a_unit_belongs(root):
    folder = root.folder / f"{ADMIN}/static.service.d"
    folder.mkdir(parents=True)
    (folder / "x.conf").write_text("[Install]\nWantedBy=%p.target\n")
    assert root.twice(Service("enable", "static")) == ["changed"]
    assert list(links(root)) == ["static.target.wants/static.service"]


def test_masks_are_links_to_nothing(root):
    assert root.twice(Service("mask", "cron")) == ["changed"]
    assert links(root) == {"cron.service": "/dev/null"}
    (outcome,) = root.take(Service("enable", "cron"))
    assert "masked" in str(outcome.error)
    assert root.twice(Service("unmask", "cron")) == ["changed"]
    assert links(root) == {}


@pytest.mark.parametrize("action", ["enable", "disable", "mask", "unmask"])
def test_an_unknown_unit_fails_with_those_that_are_near(root, action):
    (outcome,) = root.take(Service(action, "chron"))
    assert isinstance(outcome.error, NotInGuestError)
    assert "cron.service" in str(outcome.error.hint)


def test_a_static_unit_cannot_be_enabled(root):
    (outcome,) = root.take(Service("enable", "static"))
    assert "no [Install]" in str(outcome.error)


def test_a_hostile_install_section_makes_no_link_elsewhere(root):
    (root.folder / "usr/lib/systemd/system/bad.service").write_text(
        "[Install]\nWantedBy=../../../../tmp/x\n"
    )
    (outcome,) = root.take(Service("enable", "bad"))
    assert "what is no unit" in str(outcome.error)


@pytest.mark.parametrize("name", ["../x", "a b", ""])
def test_the_name_of_a_unit_is_one(name):
    with pytest.raises(UsageError):
        Service("enable", name).check({})


def test_a_guest_without_systemd_is_told_so(root):
    shutil.rmtree(root.folder / "usr/lib/systemd")
    for step in (Service("enable", "ssh"), FirstBoot(name="x", content="#!/bin/sh\n")):
        (outcome,) = root.take(step)
        assert "no systemd" in str(outcome.error)


def steps(*names: str) -> list[FirstBoot]:
    return [FirstBoot(name=name, content=f"#!/bin/sh\necho {name} >> said\n") for name in names]


def test_first_start_scripts_run_once_in_order_and_are_logged(root, tmp_path):
    failing = FirstBoot(name="broken", content="#!/bin/sh\necho no >&2; exit 3\n")
    assert root.twice(*steps("b", "a"), failing) == ["changed"] * 3
    names = sorted(os.listdir(root.host(firstboot.SCRIPTS)))
    assert names == ["0001-b", "0002-a", "0003-broken"]
    assert list(links(root)) == ["multi-user.target.wants/imgtool-firstboot.service"]
    # The runner as it is, with its folders in the root of the test.
    runner = tmp_path / "run"
    text = root.text(f"{firstboot.FOLDER}/run")
    for path in (firstboot.SCRIPTS, firstboot.DONE, firstboot.LOG):
        text = text.replace(f"={path}", f"={root.host(path)}")
    runner.write_text(text)
    root.host(firstboot.LOG).parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sh", runner], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (tmp_path / "said").read_text() == "b\na\n"
    log = root.text(firstboot.LOG)
    assert log == done.stdout
    assert "0003-broken ended with status 3" in log and "no\n" in log
    again = subprocess.run(["sh", runner], cwd=tmp_path, capture_output=True, check=False)
    assert (again.returncode, again.stdout) == (0, b"")


def test_a_script_that_has_run_is_not_replaced_but_followed(root):
    root.take(*steps("a"))
    other = FirstBoot(name="a", content="#!/bin/sh\necho other\n")
    assert root.twice(other) == ["changed"]
    assert os.listdir(root.host(firstboot.SCRIPTS)) == ["0001-a"]
    root.host(firstboot.DONE).mkdir(parents=True)
    (root.host(firstboot.DONE) / "0001-a").write_text("0\n")
    assert root.twice(*steps("a")) == ["changed"]
    assert sorted(os.listdir(root.host(firstboot.SCRIPTS))) == ["0001-a", "0002-a"]


@pytest.mark.parametrize("text", ["echo hello\n", "#!/bin/sh\r\necho\r\n"])
def test_script_that_could_not_run_is_told_before_opening(tmp_path: Path, text):
    (tmp_path / "s.sh").write_text(text, newline="")
    with pytest.raises(UsageError):
        FirstBoot(tmp_path / "s.sh").check({})


@pytest.mark.skipif(shutil.which("systemctl") is None, reason="no systemctl to compare with")
def test_links_are_those_that_systemctl_makes(tmp_path):
    ours, theirs = Root(tmp_path / "ours"), Root(tmp_path / "theirs")
    units = ["ssh.service", "cron.service", "getty@.service", "getty@ttyS0.service"]
    units += ["pair.socket", "pair.service"]
    orders = [("enable", unit) for unit in units]
    orders += [("disable", unit) for unit in ("pair.service", "getty@.service", "ssh.service")]
    for action, unit in [*orders, ("mask", "cron.service")]:
        ours.take(Service(action, unit))
        words = ["systemctl", f"--root={theirs.folder}", action, unit]
        subprocess.run(words, capture_output=True, check=False)
        # Where /lib is a link, systemctl writes the one or the other path of a unit.
        made = links(theirs).items()
        found = {name: re.sub("^/lib/", "/usr/lib/", target) for name, target in made}
        assert links(ours) == found, (action, unit)
