"""What the command line does by itself: escaping, sizes, times, paths, keys, rows."""

from __future__ import annotations

import csv
import io
import json
import logging

import pytest

from imgtool.cli import render
from imgtool.cli.output import Output
from imgtool.cli.session import set_up_logging, warning
from imgtool.errors import NotInGuestError, UsageError
from imgtool.guest.keys import parse_key
from imgtool.guest.model import Mount, SpaceUsage
from imgtool.guest.mounts import parse_mount
from imgtool.guest.paths import guest_path


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain", "plain"),
        (b"two words", "two\\ words"),
        (b"new\nline", "new\\nline"),
        (b"\x1b[31mred", "\\033[31mred"),
        (b"\xff\xfe", "\\377\\376"),
        ("gr\u00fc\u00df".encode(), "gr\u00fc\u00df"),
        ("\u202egpj.exe".encode(), "\\342\\200\\256gpj.exe"),
        ("\x9b31m".encode(), "\\302\\23331m"),
        (b"back\\slash", "back\\\\slash"),
    ],
)
def test_a_hostile_name_cannot_steer_the_terminal(name, shown):
    assert render.escape(name) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0"), (1023, "1023"), (1024, "1.0K"), (1025, "1.1K"), (10240, "10K"),
        (1048575, "1.0M"), (1 << 30, "1.0G"), (5 << 40, "5.0T"),
    ],
)  # fmt: skip
def test_human_sizes_are_those_of_ls(size, shown):
    assert render.human(size) == shown


def test_times_have_nanoseconds_and_damaged_ones_are_listed():
    assert render.timestamp(1_000_000_001) == "1970-01-01T00:00:01.000000001Z"
    assert render.timestamp(-1) == "1969-12-31T23:59:59.999999999Z"
    assert render.timestamp(2**80).startswith("9999-")


def test_a_name_that_is_not_utf8_keeps_its_bytes_in_json():
    assert render.name_fields("path", b"/a") == {"path": "/a"}
    assert render.name_fields("path", b"/\xff") == {"path": "/\ufffd", "path_bytes": "L/8="}


def test_json_is_one_array_and_jsonl_one_object_a_line(capsys):
    rows: list[dict[str, object]] = [{"a": 1, "b": None}, {"a": 2, "b": "x\n"}]
    render.emit(iter(rows), ("a", "b"), Output.json)
    assert json.loads(capsys.readouterr().out) == rows
    render.emit(iter(rows), ("a", "b"), Output.jsonl)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    render.emit(iter([]), ("a", "b"), Output.json)
    assert json.loads(capsys.readouterr().out) == []
    render.emit(iter(rows), ("a", "b"), Output.csv)
    out = capsys.readouterr().out
    assert list(csv.reader(io.StringIO(out))) == [["a", "b"], ["1", ""], ["2", "x\n"]]


class Terminal(io.StringIO):
    """Where a person looks."""

    def isatty(self) -> bool:
        return True


def test_csv_cannot_steer_a_terminal_and_is_bare_elsewhere(monkeypatch):
    rows = [{"path": "/\x1b[2Jname with a space", "all": ["\x9b31m"]}]
    for out in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stdout", out)
        render.emit(iter(rows), ("path", "all"), Output.csv)
        written = list(csv.reader(io.StringIO(out.getvalue())))[1]
        if out.isatty():
            assert written == ["/\\033[2Jname with a space", "\\302\\23331m"]
        else:
            assert written == [rows[0]["path"], "\x9b31m"]


def test_what_is_logged_cannot_steer_the_terminal(monkeypatch):
    err, root = io.StringIO(), logging.getLogger()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    try:
        set_up_logging(verbose=True, debug=False)
        logging.getLogger("imgtool").info("mounted %s\nat /", "/dev/\x1b[2J\udcff")
    finally:
        root.setLevel(level)
    assert err.getvalue() == "imgtool: mounted /dev/\\033[2J\\377\nat /\n"


def test_a_warning_is_said_once_in_a_command(capsys):
    for _ in range(2):
        set_up_logging(verbose=False, debug=False)
        warning("odd")
        warning("odd")
    assert capsys.readouterr().err == "imgtool: warning: odd\n" * 2


def test_use_is_rounded_up_as_df_does():
    usage = SpaceUsage("i", "/dev/sda1", "/", "ext4", size=1000, used=1, available=999)
    assert usage.use_percent == 1
    assert SpaceUsage("i", "d", None, None, error="x").use_percent is None


@pytest.mark.parametrize(
    ("typed", "windows", "path"),
    [
        ("/etc//hosts", False, b"/etc/hosts"),
        ("/etc/../x/.", False, b"/x"),
        ("//etc", False, b"/etc"),
        ("C:\\Windows\\System32", True, b"/Windows/System32"),
        ("c:/users", True, b"/users"),
        ("\\pagefile.sys", True, b"/pagefile.sys"),
        ("/back\\slash", False, b"/back\\slash"),
    ],
)
def test_guest_paths_as_typed(typed, windows, path):
    assert guest_path(typed, windows=windows) == path


def test_paths_that_make_no_sense_are_refused():
    with pytest.raises(UsageError):
        guest_path("etc/passwd")
    with pytest.raises(UsageError):
        guest_path("C:\\x")
    with pytest.raises(NotInGuestError):
        guest_path("D:\\x", windows=True)


def test_mounts_are_typed_as_in_the_virt_tools():
    assert parse_mount("/dev/sda1") == Mount("/dev/sda1", "/")
    assert parse_mount("/dev/vg/lv:/home:acl,noatime:xfs") == Mount(
        "/dev/vg/lv", "/home", "acl,noatime", "xfs"
    )
    assert parse_mount("btrfsvol:/dev/sda2/@:/").source == "btrfsvol:/dev/sda2/@"
    for wrong in ("sda1", "/dev/sda1:home"):
        with pytest.raises(UsageError):
            parse_mount(wrong)


def test_keys_never_show_their_passphrase(tmp_path):
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    key = parse_key(f"/dev/sda2:file:{file}")
    assert key.passphrase == "s3cret"
    assert "s3cret" not in repr(key)
    assert parse_key("all:key:a:b").passphrase == "a:b"
    assert key.fits("/dev/sda2", "x")
    assert not key.fits("/dev/sda3", "x")
    with pytest.raises(UsageError) as caught:
        parse_key("/dev/sda2:s3cret")
    assert "s3cret" not in str(caught.value)
