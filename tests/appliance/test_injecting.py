"""inject on a real guest with SELinux: one launch, and none for the second time."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from imgtool import open_guest
from imgtool.engines.libguestfs.write.apply import apply_changes, refuse_if_changed
from imgtool.engines.libguestfs.write.guest import LibguestfsWritableGuest
from imgtool.errors import RefusedError
from imgtool.inject.planner import LocatedStep, check, inject, plan
from imgtool.inject.spec import read_spec
from imgtool.inject.steps.files import AppendLine, Write
from imgtool.opening import open_guest_to_write
from tests.support import guests
from tests.support.guests import guest

pytestmark = pytest.mark.appliance

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDXesQdb4gODUz8PQ0wbF2IeAn4cstalBTQe9urxVk7o me"
SPEC = f"""\
vars: {{place: "the folder"}}
steps:
  - hostname: "{{{{ image }}}}.example.org"
  - write: {{path: /etc/new.conf, content: "new\\n", mode: 0640}}
  - append-line: {{path: /etc/new.conf, line: "one more"}}
  - template: {{path: /srv/www/index.html, content: "{{{{ place }}}}\\n", owner: alice}}
  - copy: {{source: tree, path: /opt/tree}}
  - mkdir: {{path: /var/lib/app/data, mode: 0750, owner: "alice:alice"}}
  - link: {{path: /srv/current, target: www}}
  - chmod: {{path: /home/alice/letter.txt, mode: 0600}}
  - chown: {{path: /home/alice/.profile, owner: root}}
  - delete: /home/alice/documents
  - user: {{name: bob, comment: Bob}}
  - ssh-key: {{user: alice, key: "{KEY}"}}
  - password: {{user: bob, env: GUEST_PASSWORD}}
  - selinux: relabel
"""
LABELS = {
    "/etc/new.conf": guests.SELINUX_NEW["/etc/new.conf"],
    "/home/alice/.ssh/authorized_keys": guests.SELINUX_NEW["/home/alice/new"],
    "/srv/www/index.html": guests.SELINUX_NEW["/srv/www/index.html"],
    "/etc/hostname": guests.SELINUX_LABELS["/etc/hostname"],
    "/etc/shadow": guests.SELINUX_LABELS["/etc/shadow"],
}


def test_a_spec_is_carried_out_in_one_launch_and_once(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GUEST_PASSWORD", "correct horse")
    image = tmp_path / "web.qcow2"
    shutil.copy(guest("selinux"), image)
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/file").write_bytes(b"content")
    (tmp_path / "tree/large").write_bytes(bytes(range(256)) * 8192)
    (tmp_path / "tree/link").symlink_to("deep/file")
    (tmp_path / "site.yaml").write_text(SPEC)
    spec, problems = read_spec(tmp_path / "site.yaml")
    assert problems == []
    assert spec is not None
    variables = {"image": "web", **spec.variables}
    assert check(spec.steps, variables) == []
    launches = []
    labels = {}

    @contextlib.contextmanager
    def to_write():
        launches.append(image)
        with open_guest_to_write(image) as opened:
            assert isinstance(opened, LibguestfsWritableGuest)
            yield opened
            for path in LABELS:
                raw = opened.calls.getxattr(path.encode(), b"security.selinux")
                labels[path] = raw.rstrip(b"\0").decode()
            # What has changed since it was looked at is not written over.
            _, changes = plan(opened, spec.steps[:2], variables)
            opened.calls.write(b"/etc/new.conf", b"somebody else's")
            with pytest.raises(RefusedError, match="changed while"):
                refuse_if_changed(opened, changes)
            _, back = plan(opened, spec.steps[1:3], variables)
            apply_changes(opened, back)

    def direct():
        return open_guest(image, engine="direct")

    first = inject(direct, to_write, spec.steps, variables)
    assert first.errors == []
    assert first.committed
    # The last one may find labels that the guest's maker left wrong, or none.
    statuses = [outcome.status for outcome in first.outcomes]
    assert statuses[:-1] == ["changed"] * (len(spec.steps) - 1)
    assert labels == LABELS

    with direct() as opened:
        assert opened.read_bytes("/etc/hostname") == b"web.example.org\n"
        assert opened.read_bytes("/etc/new.conf") == b"new\none more\n"
        assert opened.read_bytes("/srv/current/index.html") == b"the folder\n"
        assert opened.read_bytes("/opt/tree/link") == b"content"
        assert opened.read_bytes("/opt/tree/large") == bytes(range(256)) * 8192
        assert f"{KEY}\n".encode() == opened.read_bytes("/home/alice/.ssh/authorized_keys")
        assert b"bob:x:1001:1001:Bob:/home/bob:/bin/bash\n" in opened.read_bytes("/etc/passwd")
        facts = {
            "/etc/new.conf": (0o640, 0, 0),
            "/srv/www/index.html": (0o644, 1000, 0),
            "/var/lib/app/data": (0o750, 1000, 1000),
            "/home/alice/letter.txt": (0o600, 1000, 1000),
            "/home/alice/.profile": (0o644, 0, 1000),
            "/home/alice/.ssh": (0o700, 1000, 1000),
            "/home/alice/.ssh/authorized_keys": (0o600, 1000, 1000),
            "/etc/shadow": (0o640, 0, 0),
        }
        found = {path: opened.lstat(path) for path in facts}
        assert {
            path: (entry.mode & 0o7777, entry.uid, entry.gid) for path, entry in found.items()
        } == facts
        names = {os.fsdecode(entry.name) for entry in opened.entries("/home/alice")}
        assert "documents" not in names

    before = image.read_bytes()
    again = inject(direct, to_write, spec.steps[:-1], variables)
    assert {outcome.status for outcome in again.outcomes} == {"unchanged"}
    assert launches == [image]
    assert image.read_bytes() == before


def test_every_filesystem_that_is_written_to_is_checked(tmp_path: Path):
    image = tmp_path / "lvm.qcow2"
    shutil.copy(guest("lvm"), image)
    steps = [
        LocatedStep(Write("/home/new", content="a new file"), "1"),
        LocatedStep(AppendLine("/boot/grub.cfg", line="a file that is there"), "2"),
    ]
    with open_guest_to_write(image) as opened:
        assert isinstance(opened, LibguestfsWritableGuest)
        sources = {mount.mountpoint: mount.source for mount in opened.layout.mounts}
        _, first = plan(opened, [LocatedStep(Write("/boot/grub.cfg", content="x\n"), "0")], {})
        apply_changes(opened, first)
        opened.calls.touched.clear()
        _, changes = plan(opened, steps, {})
        assert [path for path, _ in changes.rewritten] == ["/boot/grub.cfg"]
        apply_changes(opened, changes)
        checked = {one.device for one in opened._written_to()}
        assert checked >= {sources["/home"], sources["/boot"]}
        opened.calls.touched.clear()
        opened.calls.write(b"/boot/grub.cfg", b"y")
        assert {one.device for one in opened._written_to()} == {sources["/boot"]}
        # What went below a filesystem that is not there would never be seen.
        opened._unshown["/boot"] = "it cannot be mounted"
        with pytest.raises(RefusedError, match="it cannot be mounted"):
            opened._written_to()
        opened._unshown.clear()
