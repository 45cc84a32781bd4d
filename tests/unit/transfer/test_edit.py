"""Changes to one file: what is meant is changed, and not a byte more."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from imgtool import cli
from imgtool.errors import HostError, ImgtoolError, NotInGuestError, RefusedError, UsageError
from imgtool.host import interrupt
from imgtool.transfer.edit import (
    Setting,
    Substitution,
    all_of,
    editor_words,
    in_editor,
    kept_if_refused,
    read_to_edit,
    refuse_settings,
    write_edited,
)


def substituted(expression: str, content: bytes) -> bytes:
    return Substitution.parse(expression).apply(content)


@pytest.mark.parametrize(
    ("expression", "content", "expected"),
    [
        ("s/a/b/", b"aa\naa\n", b"ba\nba\n"),
        ("s/a/b/g", b"aa\naa\n", b"bb\nbb\n"),
        ("s/A/b/gi", b"aA\n", b"bb\n"),
        ("s|/etc|/usr/etc|", b"/etc\n", b"/usr/etc\n"),
        (r"s/\/etc/x/", b"/etc", b"x"),
        (r"s/(\w+)=(\w+)/\2=\1/", b"key=value\r\n", b"value=key\r\n"),
        (r"s/^#?PermitRootLogin.*$/PermitRootLogin no/", b"#PermitRootLogin yes\r\n",
         b"PermitRootLogin no\r\n"),
        ("s/b//", b"abc", b"ac"),
        ("s/$/!/", b"one\n\nthree", b"one!\n!\nthree!"),
        ("s/x/y/", b"\xff\xfe\0x\n", b"\xff\xfe\0y\n"),
        ("s/\xe4/a/", "\xe4\n".encode(), b"a\n"),
        ("s/nothing/x/", b"same\r\nsame", b"same\r\nsame"),
    ],
)  # fmt: skip
def test_a_substitution_is_made_in_every_line(expression, content, expected):
    assert substituted(expression, content) == expected


@pytest.mark.parametrize(
    "expression",
    ["", "s", "a/b/c/", "s/a/b", "s/a/b/x", "s/a/b/c/d", "s/(/x/", r"s/a/\1/", "s a b ", "saxbx"],
)
def test_what_is_no_substitution_is_said(expression):
    with pytest.raises(UsageError):
        Substitution.parse(expression)


@pytest.mark.parametrize(
    ("setting", "content", "expected"),
    [
        ("A=2", b"A=1\nB=1\n", b"A=2\nB=1\n"),
        ("A=2", b"  A = 1\n", b"  A = 2\n"),
        ("A=2", b"export A=1\n", b"export A=2\n"),
        ("A=2", b"AB=1\nA=1\nA=1\n", b"AB=1\nA=2\nA=2\n"),
        ("Port=22", b"Port 2222\n", b"Port 22\n"),
        ("Port=22", b"#Port 2222\nHost x\n", b"#Port 2222\nPort 22\nHost x\n"),
        ("MODE=7", b"# MODE is used\n#MODE\t0\nx 1\n", b"# MODE is used\n#MODE\t0\nMODE\t7\nx 1\n"),
        ("MODE=7", b"# MODE is used\nx 1\n", b"# MODE is used\nx 1\nMODE 7\n"),
        ("MODE=7", b"# MODE = 1\nx=1\n", b"# MODE = 1\nMODE = 7\nx=1\n"),
        ("key=v w", b"key: old # note\n", b"key: v w\n"),
        ("B=1", b"A=1", b"A=1\nB=1\n"),
        ("B=1", b"A=1\r\n", b"A=1\r\nB=1\r\n"),
        ("B=1", b"", b"B=1\n"),
        ("No=yes", b"Port 22\nHost x\n", b"Port 22\nHost x\nNo yes\n"),
        ("A=", b"A=1\n", b"A=\n"),
        ("A=2", b"A=2\n", b"A=2\n"),
        ("A=2", b"\xff=1\nA=1\n", b"\xff=1\nA=2\n"),
        ("\udcff=\udcfe", b"A=1\n", b"A=1\n\xff=\xfe\n"),
        ("\udcff=2", b"\xff=1\n", b"\xff=2\n"),
    ],
)
def test_a_key_gets_its_value(setting, content, expected):
    assert Setting.parse(setting).apply(content) == expected


@pytest.mark.parametrize("setting", ["", "A", "=1", "A B=1", "A=1\nB=2", "#A=1"])
def test_what_is_no_setting_is_said(setting):
    with pytest.raises(UsageError, match="not KEY=VALUE"):
        Setting.parse(setting)


def test_changes_are_made_one_after_the_other():
    change = all_of([Substitution.parse("s/a/b/").apply, Substitution.parse("s/b/c/").apply])
    assert change(b"a") == b"c"


EDITOR = "import sys; p=sys.argv[-1]; b=open(p,'rb').read(); open(p,'wb').write(b.upper())"


def test_an_editor_gets_a_private_copy():
    seen = "import os,stat,sys; p=sys.argv[-1]; m=os.stat(p).st_mode; d=os.stat(os.path.dirname(p))"
    check = f"{seen}; sys.exit(stat.S_IMODE(m) != 0o600 or stat.S_IMODE(d.st_mode) != 0o700)"
    assert in_editor("shadow", [sys.executable, "-c", check])(b"secret") == b"secret"
    assert in_editor("note", [sys.executable, "-c", EDITOR])(b"\xfftext") == b"\xffTEXT"


def test_an_editor_that_fails_changes_nothing():
    with pytest.raises(ImgtoolError, match="ended with status 3; nothing was changed"):
        in_editor("note", [sys.executable, "-c", "import sys; sys.exit(3)"])(b"text")


def test_what_was_written_is_kept_where_it_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    for hint in (None, "wait"):
        with (
            pytest.raises(RefusedError) as refused,
            kept_if_refused("shadow", b"\xffsecret", said.append),
        ):
            raise RefusedError("in use", hint=hint)
        (kept,) = tmp_path.iterdir()
        assert str(kept) in str(refused.value.hint)
        assert (kept.read_bytes(), kept.stat().st_mode & 0o777) == (b"\xffsecret", 0o600)
        kept.unlink()
    assert said == []
    monkeypatch.setattr(interrupt, "pending", lambda: True)
    with pytest.raises(KeyboardInterrupt), kept_if_refused("note", b"text", said.append):
        raise KeyboardInterrupt
    (kept,) = tmp_path.iterdir()
    assert said == [f"what you wrote is kept in {kept}"]
    kept.unlink()
    with kept_if_refused("note", b"text", said.append):
        pass
    assert list(tmp_path.iterdir()) == []


class Guest:
    """A guest with one file, and what else is named."""

    def __init__(self, *names: bytes) -> None:
        self.names = {b"/etc/conf", *names}
        self.copied: list[tuple[bytes, bytes]] = []
        self.written: list[tuple[bytes, bytes]] = []
        self.calls = self

    def resolve(self, path: str | bytes) -> bytes:
        return os.fsencode(path)

    def lstat(self, path: bytes) -> SimpleNamespace:
        if path not in self.names:
            raise NotInGuestError("no such file")
        return SimpleNamespace(type="file" if path == b"/etc/conf" else "symlink")

    def read_bytes(self, path: bytes, limit: int) -> bytes:
        return b"old"

    def copy(self, source: bytes, path: bytes) -> None:
        self.copied.append((source, path))

    def rewrite(self, path: bytes, content: bytes) -> None:
        self.written.append((path, content))


def test_a_backup_replaces_nothing():
    free, taken = Guest(), Guest(b"/etc/conf.bak")
    write_edited(free, b"/etc/conf", b"old", b"new", backup=".bak")  # type: ignore[arg-type]
    assert free.copied == [(b"/etc/conf", b"/etc/conf.bak")]
    assert free.written == [(b"/etc/conf", b"new")]
    with pytest.raises(RefusedError, match="would overwrite"):
        write_edited(taken, b"/etc/conf", b"old", b"new", backup=".bak")  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="would overwrite"):
        read_to_edit(taken, "/etc/conf", backup=".bak")  # type: ignore[arg-type]
    assert taken.copied == []


@pytest.mark.parametrize(
    "words",
    [
        ("edit", "disk.raw", "/etc/x", "--set", "A=1"),
        ("copy-in", "disk.raw", "x", "/etc"),
        ("inject", "disk.raw", "--hostname", "x"),
    ],
)
def test_what_writes_does_not_do_so_with_the_direct_engine(words, capsys):
    assert cli._run([*words, "--engine", "direct"]) == 2
    assert "direct engine does not write" in capsys.readouterr().err


def test_the_editor_is_the_users(monkeypatch):
    monkeypatch.setenv("EDITOR", "no-such-editor -x")
    monkeypatch.setenv("VISUAL", f"{sys.executable} -u")
    assert editor_words() == [sys.executable, "-u"]
    monkeypatch.delenv("VISUAL")
    with pytest.raises(HostError, match="not installed"):
        editor_words()
    assert os.environ["EDITOR"].startswith("no-such")


@pytest.mark.parametrize("name", [b"/etc/fstab", b"/etc/hosts", b"/etc/shadow"])
def test_files_without_keys_take_no_settings(name):
    with pytest.raises(UsageError, match="no keys and values"):
        refuse_settings(name)
    refuse_settings(b"/etc/ssh/sshd_config")


@pytest.mark.parametrize(
    ("content", "there"),
    [(b"Port 22\n", True), (b"#Port 22\n", False), (b"Portal 1\n", False), (b" Port=1", True)],
)
def test_a_setting_knows_whether_a_line_has_its_key(content, there):
    assert Setting("Port", "1").is_in(content) is there
