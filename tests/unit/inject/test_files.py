"""inject: files and folders, planned on a root that is a folder of this host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgtool.errors import ImgtoolError, NotInGuestError, RefusedError, UsageError
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps import files
from tests.support.inject_root import Root


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path / "root")


def test_a_file_is_written_once_and_keeps_its_mode(root):
    (root.folder / "etc/motd").write_text("old")
    (root.folder / "etc/motd").chmod(0o600)
    assert root.twice(files.Write("/etc/motd", content="new\n")) == ["changed"]
    assert (root.text("/etc/motd"), root.mode("/etc/motd")) == ("new\n", 0o600)


def test_a_new_file_gets_mode_and_owner_by_the_guests_own_names(root):
    step = files.Write("/etc/app.conf", "0640", "alice:www-data", "x\n")
    assert root.twice(step) == ["changed"]
    assert root.mode("/etc/app.conf") == 0o640
    assert root.owners["/etc/app.conf"] == (1000, 33)


def test_absent_name_fails_with_those_that_are_near(root):
    (outcome,) = root.take(files.ChangeOwner("/etc/hostname", owner="alicia"))
    assert isinstance(outcome.error, NotInGuestError)
    assert "alice" in str(outcome.error.hint)


def test_a_failed_step_leaves_the_others_unwritten(root):
    outcomes = root.take(
        files.Write("/etc/motd", content="x"), files.Write("/no/such/folder/x", content="x")
    )
    assert [outcome.status for outcome in outcomes] == ["changed", "failed"]
    assert not (root.folder / "etc/motd").exists()


def test_later_steps_see_what_earlier_ones_did(root):
    done = root.twice(
        files.MakeFolder("/srv/app/data", "0750", "alice"),
        files.Write("/srv/app/data/x", content="1\n"),
        files.AppendLine("/srv/app/data/x", line="2"),
        files.Link("/srv/app/current", "data"),
        files.AppendLine("/srv/app/current/x", line="3"),
        files.ChangeMode("/srv/app/current/x", mode="0600"),
    )
    assert done == ["changed"] * 6
    assert root.text("/srv/app/data/x") == "1\n2\n3\n"
    assert root.mode("/srv/app/data/x") == 0o600
    assert root.mode("/srv/app/data") == 0o750
    assert (root.mode("/srv/app"), root.owners["/srv/app"]) == (0o755, (0, 0))


@pytest.mark.parametrize(
    ("old", "new"),
    [("a\nb\n", "a\nb\nline\n"), ("a", "a\nline\n"), ("", "line\n"), ("a\r\n", "a\r\nline\r\n")],
)
def test_a_line_is_appended_as_the_file_has_its_lines(root, old, new):
    (root.folder / "etc/x").write_bytes(old.encode())
    assert root.twice(files.AppendLine("/etc/x", line="line")) == ["changed"]
    assert (root.folder / "etc/x").read_bytes() == new.encode()


def test_a_link_of_the_guest_never_leads_out_of_it(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (root.folder / "etc/up").symlink_to("../../../../../../.." + str(outside))
    (root.folder / "etc/absolute").symlink_to(outside)
    for name in ("up", "absolute"):
        (outcome,) = root.take(files.Write(f"/etc/{name}/x", content="x"))
        assert isinstance(outcome.error, NotInGuestError)
    assert list(outside.iterdir()) == []
    view = GuestOverlay(root)
    assert view.real("/etc/up") == "/etc/up"
    assert view.real("/etc/absolute", follow=True) if root.host(str(outside)).exists() else True


@pytest.mark.parametrize(
    "step",
    [
        files.Write("/home/alice/d/motd", content="x"),
        files.Write("/home/alice/d/hostname", content="x"),
        files.AppendLine("/home/alice/shadow", line="x"),
        files.MakeFolder("/home/alice/d/new"),
        files.MakeFolder("/home/alice/d", owner="alice"),
        files.ChangeMode("/home/alice/shadow", mode="0666"),
        files.ChangeOwner("/home/alice/shadow", owner="alice"),
        files.ChangeOwner("/home/alice/d", owner="alice", recursive=True),
        files.Link("/home/alice/d/new", "/dev/null"),
        files.Delete("/home/alice/d/hostname"),
    ],
)
def test_a_users_link_leads_to_nothing_of_somebody_else(root, step):
    for name, target in (("d", "/etc"), ("shadow", "/etc/shadow")):
        (root.folder / "home/alice" / name).symlink_to(target)
        root.owners[f"/home/alice/{name}"] = (1000, 1000)
    before = dict(root.owners)
    (outcome,) = root.take(step)
    assert isinstance(outcome.error, RefusedError)
    assert root.owners == before and root.text("/etc/hostname") == "dead-guest\n"


def test_links_of_root_and_to_the_users_own_are_followed(root):
    for name, target, uid in (("mine", "letter.txt", 1000), ("roots", "/etc/hostname", 0)):
        (root.folder / "home/alice" / name).symlink_to(target)
        root.owners[f"/home/alice/{name}"] = (uid, uid)
    root.owners["/home/alice/letter.txt"] = (1000, 1000)
    steps = [files.Write(f"/home/alice/{name}", content="x") for name in ("mine", "roots")]
    assert root.twice(*steps) == ["changed"] * 2
    assert root.text("/home/alice/letter.txt") == root.text("/etc/hostname") == "x"
    made = files.Link("/home/alice/of-a-step", "/etc")
    assert root.twice(made, files.Write("/home/alice/of-a-step/motd", content="y"))[1] == "changed"


@pytest.mark.parametrize("folder", ["home/alice", "tmp"])
def test_file_that_a_user_may_have_linked_is_not_changed(root, folder):
    (root.folder / "tmp").mkdir()
    (root.folder / "tmp").chmod(0o1777)
    (root.folder / folder / "x").hardlink_to(root.folder / "etc/shadow")
    for step in (
        files.Write(f"/{folder}/x", content="x"),
        files.ChangeOwner(f"/{folder}", owner="alice", recursive=True),
        files.ChangeMode(f"/{folder}/x", mode="0666"),
    ):
        (outcome,) = root.take(step)
        assert isinstance(outcome.error, RefusedError)
    assert "/etc/shadow" not in root.owners and root.mode("/etc/shadow") == 0o640
    steps = (files.Delete(f"/{folder}/x"), files.Write(f"/{folder}/x", content="x"))
    assert [outcome.error for outcome in root.take(*steps)] == [None, None]
    assert root.text("/etc/shadow") != "x"


def test_hard_links_where_only_root_makes_them_are_changed(root):
    (root.folder / "usr/bin/sh").hardlink_to(root.folder / "usr/bin/bash")
    assert root.twice(files.ChangeMode("/usr/bin/sh", mode="0755")) == ["changed"]


def test_links_in_a_loop_are_an_error_and_no_hang(root):
    (root.folder / "etc/a").symlink_to("b")
    (root.folder / "etc/b").symlink_to("a")
    (outcome,) = root.take(files.Write("/etc/a", content="x"))
    assert "too many symbolic links" in str(outcome.error)


def test_a_device_is_never_read_or_written(root):
    os.mkfifo(root.folder / "etc/fifo")
    (outcome,) = root.take(files.AppendLine("/etc/fifo", line="x"))
    assert isinstance(outcome.error, ImgtoolError)
    assert "fifo" in str(outcome.error)


def test_folders_are_copied_and_merged(root, tmp_path):
    source = tmp_path / "app"
    (source / "sub").mkdir(parents=True)
    (source / "sub/file").write_text("one")
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o755)
    (source / "link").symlink_to("sub/file")
    step = files.Copy("/opt", source=source)
    assert root.twice(step) == ["changed"]
    assert root.text("/opt/sub/file") == "one"
    assert root.mode("/opt/run") == 0o755
    assert os.readlink(root.folder / "opt/link") == "sub/file"
    (source / "sub/file").write_text("two")
    assert root.twice(step) == ["changed"]
    assert root.text("/opt/sub/file") == "two"
    assert root.twice(files.Copy("/opt/", source=source / "run")) == ["unchanged"]
    assert root.twice(files.Copy("/etc", source=source / "run")) == ["changed"]
    assert root.text("/etc/run") == "#!/bin/sh\n"


def test_absent_source_is_told_before_a_guest_is_opened(tmp_path):
    with pytest.raises(ImgtoolError, match="cannot be read"):
        files.Copy("/opt", source=tmp_path / "gone").check({})


def test_templates_are_filled_and_missing_variables_are_errors(root, tmp_path):
    source = tmp_path / "t"
    source.write_text("server {{ name }}; ${shell} {{port}}\n")
    step = files.Template("/etc/t", source=source)
    assert root.twice(step, variables={"name": "web", "port": "80"}) == ["changed"]
    assert root.text("/etc/t") == "server web; ${shell} 80\n"
    with pytest.raises(UsageError, match="'port' is not given"):
        step.check({"name": "web"})


def test_what_is_deleted_and_made_again_has_nothing_of_the_old(root):
    done = root.take(
        files.Delete("/home/alice"),
        files.MakeFolder("/home/alice"),
        files.Write("/home/alice/new", content="x"),
    )
    assert [outcome.status for outcome in done] == ["changed"] * 3
    assert os.listdir(root.folder / "home/alice") == ["new"]
    assert root.twice(files.Delete("/nothing/here")) == ["unchanged"]


def test_owner_of_a_tree_is_changed_but_not_beyond_its_links(root):
    (root.folder / "home/alice/etc").symlink_to("/etc")
    root.owners["/home/alice"] = (0, 0)
    assert root.twice(files.ChangeOwner("/home/alice", "alice:alice", True)) == ["changed"]
    assert root.owners["/home/alice/letter.txt"] == (1000, 1000)
    assert root.owners["/home/alice/etc"] == (1000, 1000)
    assert "/etc" not in root.owners and "/etc/hostname" not in root.owners


def test_a_new_owner_does_not_cost_the_setuid_bit(root):
    (root.folder / "usr/bin/bash").chmod(0o4755)
    view = GuestOverlay(root)
    assert view.chown("/usr/bin/bash", (1000, 1000))
    assert view.changes().modes == [("/usr/bin/bash", 0o4755)]


@pytest.mark.parametrize(
    "step",
    [
        files.Write("etc/motd"),
        files.Write("/etc/../../x"),
        files.Delete("/"),
        files.ChangeMode("/x", mode="0999"),
        files.ChangeOwner("/x", owner="a:b:c"),
        files.AppendLine("/x", line="two\nlines"),
        files.Link("/x", ""),
    ],
)
def test_what_makes_no_sense_is_told_before_a_guest_is_opened(step):
    with pytest.raises(UsageError):
        step.check({})


def test_a_large_file_is_compared_and_written_as_a_stream(root, tmp_path):
    source = tmp_path / "large"
    source.write_bytes(bytes(3 << 20))
    assert root.twice(files.Copy("/opt.bin", source=source)) == ["changed"]
    view = GuestOverlay(root)
    view.write("/new.bin", source)
    assert isinstance(view.changes().made[0][1], Path)
