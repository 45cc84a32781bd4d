"""inject: specs, options, and what is told of them before anything is started."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jsonschema
import pytest

import imgtool.opening
from imgtool.errors import UsageError
from imgtool.inject.option_parsers import steps_of, variables_of
from imgtool.inject.registry import OPTIONS
from imgtool.inject.spec import read_spec, schema_text
from imgtool.inject.steps.accounts import User
from imgtool.inject.steps.files import ChangeOwner, Copy, Write
from imgtool.inject.steps.passwords import Password
from tests.support.chain_images import qcow2
from tests.support.inject_root import Root

EVERYTHING = """\
vars: {name: web}
steps:
  - write: {path: /etc/motd, content: "hello\\n", mode: 0644, owner: 0}
  - copy: {source: here, path: /opt/}
  - template: {content: "{{ name }}", path: /etc/name}
  - append-line: {path: /etc/x, line: y}
  - mkdir: /srv
  - mkdir: {path: /srv/a, mode: 750}
  - chmod: {path: /srv/a, mode: "0700"}
  - chown: {path: /srv/a, owner: alice, recursive: true}
  - link: {path: /a, target: b}
  - delete: /tmp/x
  - hostname: web1
  - timezone: Europe/Warsaw
  - locale: C.UTF-8
  - user: bob
  - user: {name: eve, uid: 1234, groups: sudo, sudo: nopasswd}
  - ssh-key: {user: root, file: key.pub}
  - password: {user: root, env: SECRET}
  - service: {enable: [a, b.socket]}
  - firstboot: {name: a.sh, content: "#!/bin/sh\\n"}
  - network: {ethernets: {eth0: {dhcp4: true}}}
  - cloud-init: {meta-data: {instance-id: a}}
  - machine-id: reset
  - ssh-host-keys: remove
  - selinux: relabel
"""


def spec(folder: Path, text: str) -> Path:
    path = folder / "site.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    found, errors = read_spec(spec(folder, text))
    assert found is None
    return [str(error).removeprefix(f"{folder}/") for error in errors]


def test_the_schema_is_one_and_every_kind_of_step_can_be_made(tmp_path):
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    found, errors = read_spec(spec(tmp_path, EVERYTHING))
    assert errors == []
    assert found is not None
    kinds = {placed.step.kind for placed in found.steps}
    assert kinds == set(schema["$defs"]["step"]["properties"])
    assert found.steps[0].where == f"{tmp_path}/site.yaml:3"
    write, copy = found.steps[0].step, found.steps[1].step
    assert isinstance(write, Write) and write.mode == "0644"
    assert isinstance(copy, Copy) and copy.source == tmp_path / "here"
    assert found.variables == {"name": "web"}


def test_every_mistake_is_told_with_its_line(tmp_path):
    text = (
        "steps:\n"
        "  - hostnme: x\n"
        "  - write: {path: etc/motd, content: a}\n"
        "  - user:\n      name: bob\n      sudoo: true\n"
        "  - password: {user: bob}\n"
        "  - machine-id: rset\n"
        "  - delete: /a\n    mkdir: /b\n"
    )
    assert problems(tmp_path, text) == [
        "site.yaml:2: 'hostnme' is not known here; did you mean 'hostname'?",
        "site.yaml:3: 'path' is not as it has to be: An absolute path in the guest",
        "site.yaml:6: 'sudoo' is not known here; did you mean 'sudo'?",
        "site.yaml:7: 'password' needs one of: file, env, hash",
        "site.yaml:8: 'machine-id' is to be 'reset'",
        "site.yaml:9: a step is one thing: begin the next one with '- '",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps:\n  - a: [\n", 3),
        ("steps: []\nsteps: []\n", 2),
        ("steps: !!python/object:os.x\n", 1),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(tmp_path, text, line):
    with pytest.raises(UsageError, match=rf"site\.yaml:{line}: "):
        read_spec(spec(tmp_path, text))


@pytest.mark.parametrize("text", ["", "- a\n", "x: 1\n", "steps: {}\n"])
def test_what_is_no_spec_is_told(tmp_path, text):
    assert problems(tmp_path, text)


def test_a_password_is_in_no_message(tmp_path):
    said = problems(tmp_path, "steps:\n  - password: {user: a, password: hunter2}\n")
    assert "hunter2" not in "".join(said)
    with pytest.raises(UsageError) as caught:
        steps_of({"password": ["root:hunter2"]})
    assert "hunter2" not in f"{caught.value}{caught.value.hint}"


def test_options_are_taken_in_the_order_of_the_help(imgtool_cli):
    text = imgtool_cli("inject", "--help").text
    shown = text[text.index("Options") :]  # and not in the examples
    places = [shown.index(f" {option.name} ") for option, _ in OPTIONS]
    assert places == sorted(places)


def test_options_make_the_steps_that_they_say():
    steps = [
        placed.step
        for placed in steps_of(
            {
                "user": ["bob:sudo,adm:sudo", "eve:sudo"],
                "password": ["root:env:SECRET"],
                "copy": ["a:b:/etc/c"],
                "chown": ["alice:users:/srv"],
                "append_line": ["/etc/x:a:b"],
                "machine_id_reset": True,
            }
        )
    ]
    kinds = ["user", "user", "password", "copy", "append-line", "chown", "machine-id"]
    assert [step.kind for step in steps] == kinds
    bob, eve, password, copy, _, owner, _ = steps
    assert isinstance(bob, User) and (bob.groups, bob.sudo) == (("sudo", "adm"), True)
    assert isinstance(eve, User) and (eve.groups, eve.sudo) == ((), True)
    assert isinstance(password, Password)
    assert isinstance(copy, Copy) and (copy.source, copy.path) == (Path("a:b"), "/etc/c")
    assert isinstance(owner, ChangeOwner)
    assert (owner.owner, owner.path) == ("alice:users", "/srv")
    assert variables_of(["a=b=c"]) == {"a": "b=c"}


@pytest.fixture
def command(imgtool_cli, tmp_path, monkeypatch):
    """A command line on a root that is a folder, which must never be opened to be written; its
    images are there, without doubts."""
    root = Root(tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    for name in ("one.img", "two.img"):
        qcow2(tmp_path / name)

    @contextlib.contextmanager
    def opened(image, **options):
        yield root

    def never(*arguments, **options):
        raise AssertionError("the appliance was started")

    monkeypatch.setattr(imgtool.opening, "open_guest", opened)
    monkeypatch.setattr(imgtool.opening, "open_guest_to_write", never)
    return imgtool_cli


def test_a_guest_that_is_as_it_should_be_starts_no_appliance(command, tmp_path):
    path = spec(tmp_path, "steps:\n  - hostname: dead-guest\n  - mkdir: /etc\n")
    result = command("inject", "one.img", "two.img", path, "-o", "json")
    assert result.status == 0, result.err
    rows = json.loads(result.text)
    assert [row["status"] for row in rows] == ["unchanged"] * 4
    assert "everything was so already; nothing was written (one.img)" in result.err


def test_a_step_that_fails_starts_no_appliance_and_says_where(command, tmp_path):
    path = spec(tmp_path, "steps:\n  - mkdir: /new\n  - service: {enable: chron}\n")
    result = command("inject", "one.img", path, "-o", "json")
    assert result.status == 5
    rows = json.loads(result.text)
    assert [row["status"] for row in rows] == ["changed", "failed"]
    assert {row["committed"] for row in rows} == {False}
    assert f"error: {path}:3: the guest has no such unit (chron.service)" in result.err
    assert "hint: it has: cron.service" in result.err


def test_checks_come_before_a_guest_is_opened(command, tmp_path):
    path = spec(
        tmp_path,
        "steps:\n  - copy: {source: gone, path: /x}\n  - hostname: a_b\n"
        "  - template: {content: '{{ b }}', path: /x}\n",
    )
    result = command("inject", "one.img", path)
    assert result.status == 2
    assert [f"site.yaml:{n}: " in result.err for n in (2, 3, 4)] == [True] * 3
    assert command("inject", "one.img").status == 2
    assert command("inject", "one.img", "two.img", "--mkdir", "/a", "--clone", "x").status == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("one.img", "--clone", "x", "--clone", "y", "--clone", "x"), "two clones"),
        (("one.img", "--clone", "x", "--clone-dir", "."), "--clone and --clone-dir"),
        (("a/one.img", "b/one.qcow2", "--clone-dir", "."), "two clones"),
    ],
)
def test_each_clone_has_a_name_of_its_own(command, words, said):
    result = command("inject", *words, "--mkdir", "/a")
    assert result.status == 2
    assert said in result.err


def test_the_schema_is_printed(command):
    assert json.loads(command("inject", "--schema").text)["title"]
