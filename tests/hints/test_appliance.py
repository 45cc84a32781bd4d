"""Hints about what is written into a guest: all are brought up, which takes no appliance, and then
followed together, in as few launches as that needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hints.following import Done, hint, imgtool, pattern_of
from tests.hints.images import system

pytestmark = pytest.mark.appliance

UNIT = "[Install]\nWantedBy=multi-user.target\n"
ADMIN = "etc/systemd/system"
UNITS = "usr/lib/systemd/system"
DIRECT = ("--engine", "direct", "--backing-dir", ".")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield


def brought_up(template: str, done: Done) -> str:
    """The hint, which has this template."""
    assert done.status != 0, done.text
    text = hint(done.err)
    assert pattern_of(template).fullmatch(text), text
    return text


def read(image: str, path: str) -> str:
    return imgtool("cat", image, path, *DIRECT).text


GUEST = {
    "usr/lib/systemd/systemd": "",
    "etc/cloud/cloud.cfg": "users: []\n",
    "etc/cloud/cloud-init.disabled": "",
    f"{UNITS}/masked.service": UNIT,
    f"{ADMIN}/masked.service": "-> /dev/null",
    f"{UNITS}/gdm.service": "[Install]\nAlias=display-manager.service\n",
    f"{UNITS}/lightdm.service": "[Install]\nAlias=display-manager.service\n",
    f"{ADMIN}/display-manager.service": f"-> /{UNITS}/lightdm.service",
    f"{ADMIN}/own.service": UNIT,
    f"{ADMIN}/multi-user.target.wants/own.service": f"-> /{ADMIN}/own.service",
    "home/alice/.ssh/authorized_keys": "-> ../keys",
    "home/alice/out": "-> /etc",
    "etc/motd": "old\n",
    "etc/motd.bak": "mine\n",
}
SEED = {"meta-data": {"instance-id": "i-1"}}
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGFh" + "YWFh" * 9 + "YWE= alice"


@dataclass(frozen=True)
class Fix:
    """A step that fails with this hint, and those that it says to take instead."""

    hint: str
    wrong: dict[str, Any]
    steps: tuple[dict[str, Any], ...]


FIXES = (
    Fix("delete that file in a step before", {"cloud-init": SEED},
        ({"delete": "/etc/cloud/cloud-init.disabled"}, {"cloud-init": SEED})),
    Fix("unmask it first", {"service": {"enable": "masked.service"}},
        ({"service": {"unmask": "masked.service"}}, {"service": {"enable": "masked.service"}})),
    Fix("disable that one first", {"service": {"enable": "gdm.service"}},
        ({"service": {"disable": "lightdm.service"}}, {"service": {"enable": "gdm.service"}})),
    Fix("disable the unit", {"service": {"mask": "own.service"}},
        ({"service": {"disable": "own.service"}},)),
    Fix("delete it in a step before, or add the key to the right file with append-line",
        {"ssh-key": {"user": "alice", "key": KEY}},
        ({"delete": "/home/alice/.ssh/authorized_keys"},
         {"ssh-key": {"user": "alice", "key": KEY}})),
    Fix("delete it in a step before, or add the key to the right file with append-line",
        {"ssh-key": {"user": "alice", "key": KEY}},
        ({"append-line": {"path": "/etc/keys-of-alice", "line": KEY}},)),
    Fix("name what it leads to, if that is meant: {}",
        {"write": {"path": "/home/alice/out/issue", "content": "x"}},
        ({"write": {"path": "/etc/issue", "content": "x"}},)),
    Fix("give it under 'vars' of the spec, or with --var {}=VALUE",
        {"template": {"path": "/etc/greeting", "content": "{{ word }}"}},
        ({"template": {"path": "/etc/greeting", "content": "{{ word }}"}},)),
    Fix("give the file with .pub", {"ssh-key": {"user": "root", "file": "id"}},
        ({"ssh-key": {"user": "root", "file": "id.pub"}},)),
)  # fmt: skip


def _spec(name: str, *steps: dict[str, Any]) -> None:
    Path(name).write_text(json.dumps({"steps": steps}))


def test_steps_that_are_refused():
    Path("id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    Path("id.pub").write_text(f"{KEY}\n")
    system("a.raw", GUEST)
    system("b.raw", GUEST)
    before = Path("a.raw").read_bytes()
    for fix in FIXES:
        _spec("spec.yaml", fix.wrong)
        text = brought_up(fix.hint, imgtool("inject", "a.raw", "spec.yaml"))
        if fix.hint.startswith("name what"):
            assert text.endswith(": /etc/issue")
    given = ("--var", "word=hello")  # as the hint names it
    _spec("spec.yaml", *(step for fix in FIXES for step in fix.steps))
    several = ("a.raw", "b.raw", "spec.yaml", *given)
    brought_up("--clone-dir is for several", imgtool("inject", "--clone", "new.qcow2", *several))
    one = imgtool("inject", "--clone", "new.qcow2", "--clone-dir", "new", "a.raw", "spec.yaml")
    brought_up("give one of them", one)

    Path("new").mkdir()
    done = imgtool("inject", "--clone-dir", "new", *several)
    assert done.status == 0, done.err
    assert Path("a.raw").read_bytes() == before == Path("b.raw").read_bytes()
    for name in ("new/a.qcow2", "new/b.qcow2"):
        names = {row["path"]: row for row in json.loads(
            imgtool("ls", "-R", name, "/etc", "/home", "-o", "json", *DIRECT).text
        )}  # fmt: skip
        assert "/etc/cloud/cloud-init.disabled" not in names
        assert f"/{ADMIN}/masked.service" not in names
        assert f"/{ADMIN}/multi-user.target.wants/masked.service" in names
        assert names[f"/{ADMIN}/display-manager.service"]["target"].endswith("gdm.service")
        assert f"/{ADMIN}/multi-user.target.wants/own.service" not in names
        assert KEY in read(name, "/home/alice/.ssh/authorized_keys")
        assert KEY in read(name, "/etc/keys-of-alice")
        assert KEY in read(name, "/root/.ssh/authorized_keys")
        assert (read(name, "/etc/issue"), read(name, "/etc/greeting")) == ("x", "hello")
        assert read(name, "/etc/motd") == "old\n"


def test_an_edit_that_is_refused():
    system("disk.raw", GUEST)
    before = Path("disk.raw").read_bytes()
    words = ("edit", "disk.raw", "/etc/motd")
    brought_up("change the file with -e or --set instead", imgtool(*words))
    change = (*words, "-e", "s/old/new/")
    missing = imgtool(*change, "--tmp-dir", "none")
    brought_up("--tmp-dir names one that is there", missing)

    assert Path("disk.raw").read_bytes() == before

    Path("there").mkdir()
    done = imgtool(*change, "--tmp-dir", "there", "-b", ".bak2")
    assert done.status == 0, done.err
    assert read("disk.raw", "/etc/motd") == "new\n"
    assert read("disk.raw", "/etc/motd.bak2") == "old\n"
    assert read("disk.raw", "/etc/motd.bak") == "mine\n"
    assert list(Path("there").iterdir()) == []
