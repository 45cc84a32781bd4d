"""inject: users, their keys and their passwords."""

from __future__ import annotations

import base64
import ctypes.util
import io
import os
import subprocess
from types import SimpleNamespace

import pytest

from imgtool.errors import NotInGuestError, RefusedError, UsageError
from imgtool.inject import crypt
from imgtool.inject.steps.accounts import User
from imgtool.inject.steps.files import Delete
from imgtool.inject.steps.passwords import Password, Secret
from imgtool.inject.steps.ssh_keys import SshKey
from tests.support.inject_root import Root

BLOB = base64.b64encode(b"\0\0\0\x0bssh-ed25519" + b"\0\0\0\x20" + bytes(32)).decode()
KEY = f"ssh-ed25519 {BLOB} me@here"


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path / "root")


def test_a_user_is_made_as_shadow_utils_would(root):
    done = root.twice(User("bob", comment="Bob B.", groups=("sudo", "www-data"), sudo="nopasswd"))
    assert done == ["changed"]
    assert root.text("/etc/passwd").endswith("bob:x:1001:1001:Bob B.:/home/bob:/bin/bash\n")
    assert "sudo:x:27:bob\n" in root.text("/etc/group")
    assert root.text("/etc/group").endswith("bob:x:1001:\n")
    assert root.text("/etc/gshadow").endswith("bob:!::\n")
    assert "www-data:*::bob\n" in root.text("/etc/gshadow")
    assert ":!:" in root.text("/etc/shadow").splitlines()[-1]
    assert root.mode("/etc/shadow") == 0o640
    assert root.text("/etc/subuid").endswith("bob:165536:65536\n")
    assert (root.mode("/home/bob"), root.owners["/home/bob"]) == (0o700, (1001, 1001))
    assert root.owners["/home/bob/.profile"] == (1001, 1001)
    assert root.text("/etc/sudoers.d/90-imgtool-bob") == "bob ALL=(ALL:ALL) NOPASSWD: ALL\n"
    assert root.mode("/etc/sudoers.d/90-imgtool-bob") == 0o440


def test_a_user_that_is_there_gets_only_what_is_missing(root):
    before = root.text("/etc/passwd")
    assert root.twice(User("alice", groups=("www-data",))) == ["changed"]
    assert root.text("/etc/passwd") == before
    assert "www-data:x:33:alice\n" in root.text("/etc/group")
    assert root.twice(User("alice", shell="/bin/sh")) == ["changed"]
    assert "alice:x:1000:1000:Alice:/home/alice:/bin/sh\n" in root.text("/etc/passwd")
    (outcome,) = root.take(User("alice", uid=1234))
    assert "with the number 1000" in str(outcome.error)


def test_a_system_user_has_a_low_number_and_no_home(root):
    assert root.twice(User("svc", system=True)) == ["changed"]
    assert root.text("/etc/passwd").endswith("svc:x:999:999::/home/svc:/bin/false\n")
    assert not (root.folder / "home/svc").exists()


def test_absent_group_fails_with_those_that_are_near(root):
    (outcome,) = root.take(User("bob", groups=("ww-data",)))
    assert isinstance(outcome.error, NotInGuestError)
    assert "www-data" in str(outcome.error.hint)


@pytest.mark.parametrize("step", [User("Bob"), User("a:b"), User("bob", comment="x:y\n")])
def test_what_would_break_a_line_of_passwd_is_refused(step):
    with pytest.raises(UsageError):
        step.check({})


def test_an_ssh_key_is_readable_by_its_user_alone(root):
    assert root.twice(SshKey("alice", key=KEY)) == ["changed"]
    assert root.text("/home/alice/.ssh/authorized_keys") == f"{KEY}\n"
    assert root.mode("/home/alice/.ssh") == 0o700
    assert root.mode("/home/alice/.ssh/authorized_keys") == 0o600
    for path in ("/home/alice/.ssh", "/home/alice/.ssh/authorized_keys"):
        assert root.owners[path] == (1000, 1000)


def test_ssh_key_is_known_by_itself_not_by_its_comment(root):
    folder = root.folder / "home/alice/.ssh"
    folder.mkdir(mode=0o700)
    (folder / "authorized_keys").write_text(f'command="x" ssh-ed25519 {BLOB} other')
    root.take(SshKey("alice", key=KEY))
    assert KEY not in root.text("/home/alice/.ssh/authorized_keys")
    assert root.mode("/home/alice/.ssh/authorized_keys") == 0o600


def _linked(root, name: str, target: str, uid: int = 1000) -> None:
    (root.folder / name).symlink_to(target)
    root.owners[f"/{name}"] = (uid, uid)


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_key_goes_through_no_link_in_a_home(root, uid):
    _linked(root, "home/alice/.ssh", "/root/.ssh", uid)
    (root.folder / "root/.ssh").mkdir(mode=0o700)
    (outcome,) = root.take(SshKey("alice", key=KEY))
    assert isinstance(outcome.error, RefusedError)
    assert os.listdir(root.folder / "root/.ssh") == []


def test_a_key_goes_into_no_file_that_a_user_linked(root):
    folder = root.folder / "home/alice/.ssh"
    folder.mkdir(mode=0o700)
    root.owners["/home/alice/.ssh"] = (1000, 1000)
    _linked(root, "home/alice/.ssh/authorized_keys", "../../../etc/shadow")
    (outcome,) = root.take(SshKey("alice", key=KEY))
    assert isinstance(outcome.error, RefusedError)
    (folder / "authorized_keys").unlink()
    (folder / "authorized_keys").hardlink_to(root.folder / "etc/shadow")
    (outcome,) = root.take(SshKey("alice", key=KEY))
    assert isinstance(outcome.error, RefusedError)
    assert KEY not in root.text("/etc/shadow")
    # What the hint says helps.
    done = root.twice(Delete("/home/alice/.ssh/authorized_keys"), SshKey("alice", key=KEY))
    assert done == ["changed", "changed"]


@pytest.mark.parametrize(
    "text",
    ["", "hello", f"ssh-rsa {BLOB}", "ssh-ed25519 AAAA", "-----BEGIN OPENSSH PRIVATE KEY-----"],
)
def test_what_is_no_public_key_is_told_before_a_guest_is_opened(tmp_path, text):
    (tmp_path / "key").write_text(text)
    with pytest.raises(UsageError):
        SshKey("alice", tmp_path / "key").check({})


def test_password_is_hashed_as_in_the_guest_and_kept_if_equal(root, tmp_path):
    (tmp_path / "secret").write_text("correct horse\n")
    step = Password("alice", Secret("file", str(tmp_path / "secret")))
    assert root.twice(step) == ["changed"]
    line = root.text("/etc/shadow").splitlines()[1]
    assert line.startswith("alice:$y$")
    assert "correct" not in repr(step) + repr(step.secret)
    (root.folder / "etc/login.defs").write_text("ENCRYPT_METHOD SHA512\n")
    assert root.twice(step) == ["unchanged"]
    (tmp_path / "secret").write_text("another\n")
    assert root.twice(Password("alice", Secret("file", str(tmp_path / "secret")))) == ["changed"]
    assert ":$6$" in root.text("/etc/shadow")


def test_hashes_are_those_that_openssl_makes():
    words = ["openssl", "passwd", "-6", "-salt", "abcdefgh", "secret"]
    other = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    assert crypt.verifies(b"secret", other)
    assert not crypt.verifies(b"Secret", other)


@pytest.mark.parametrize(
    "stored",
    ["$6$rounds=999999999$abc$x", "$y$jFT$aaaa$bbbb", "$7$CU..../....x$y", "x", "!", "*", ""],
)
def test_a_hash_that_would_cost_hours_is_not_computed(stored):
    assert not crypt.verifies(b"secret", stored)


def test_a_password_comes_from_the_environment_or_stdin_once(root, monkeypatch):
    monkeypatch.setenv("GUEST_PASSWORD", "horse")
    assert root.twice(Password("root", Secret("env", "GUEST_PASSWORD"))) == ["changed"]
    stdin = SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    assert root.twice(Password("root", Secret("stdin"))) == ["changed"]
    assert stdin.buffer.read() == b"two\n"


@pytest.mark.parametrize("value", ["$6$a$b\nroot2:x:0:0::/:/bin/sh", "hello", "$6$a:b"])
def test_a_hash_cannot_smuggle_in_a_line(value):
    with pytest.raises(UsageError):
        Password("root", Secret("hash", value)).check({})


def test_the_library_is_there():
    assert ctypes.util.find_library("crypt")


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "4294967295", ""])
def test_a_number_that_is_none_is_a_damaged_line_and_no_crash(root, number):
    (root.folder / "etc/passwd").write_text(f"eve:x:{number}:0::/home/eve:/bin/sh\n")
    (outcome,) = root.take(SshKey("eve", key=KEY))
    assert "damaged" in str(outcome.error)
    assert root.take(User("bob"))[0].status == "changed"
