"""Scripts rely on the rows of -o json: each has a schema, and real rows are as it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

from imgtool.cli.command_table import COMMANDS, GROUPS, app_with
from imgtool.cli.commands import (
    appliance,
    chain_checks,
    chains,
    diffing,
    images,
    injected,
    inspecting,
    listing,
    looking,
    measuring,
    mounting,
    schemas,
    single,
    snapshotting,
    space,
)
from imgtool.cli.output import Output
from imgtool.engines.libguestfs.appliance import saved
from tests.support.commands import run_here
from tests.support.documentation import commands_of
from tests.support.guests import guest
from tests.support.schemas import require_schema, validator

# The fields of each, and those that are there only where an option asks for them.
FIELDS = {
    "df": (space.DF_FIELDS, ()),
    "filesystems": (space.FILESYSTEM_FIELDS, ()),
    "partitions": (space.PARTITION_FIELDS, ()),
    "ls": (listing.FIELDS, ("inode", "xattrs")),
    "find": (listing.FIELDS, ("line_number", "line")),
    "du": (measuring.FIELDS, ()),
    "stat": (looking.STAT_FIELDS, ()),
    "diff": (diffing.FIELDS, diffing.XATTRS),
    "inspect": (inspecting.FIELDS[:-1], inspecting.FIELDS[-1:]),
    "doctor": (inspecting.DOCTOR_FIELDS, ()),
    "inject": (injected.FIELDS, ()),
    "mounts": (mounting.FIELDS, ()),
    "info": (images.FIELDS, ()),
    "check": (single.CHECK_FIELDS, ()),
    "snapshot list": (snapshotting.FIELDS, ()),
    "appliance list": (appliance.FIELDS, ()),
    "chain show": (chains.SHOW_FIELDS, ()),
    "chain tree": (chains.TREE_FIELDS, ()),
    "chain check": (chain_checks.FIELDS, ()),
}


def with_json() -> set[str]:
    """The commands that have -o with json."""
    root = commands_of(typer.main.get_command(app_with(None)))
    every = {name: root[name] for name in COMMANDS}
    for group in GROUPS:
        every |= {f"{group} {name}": one for name, one in commands_of(root[group]).items()}
    return {
        name
        for name, command in every.items()
        for parameter in command.params
        if Output.json.value in getattr(parameter.type, "choices", ())
    }


def test_each_command_with_json_has_a_schema_and_no_other():
    assert with_json() == set(FIELDS)
    files = (Path(schemas.__file__).parents[2] / "schemas").glob("*.json")
    assert {file.stem for file in files} == {name.replace(" ", "-") for name in FIELDS}


@pytest.mark.parametrize("name", FIELDS)
def test_a_schema_has_the_fields_of_the_code(name):
    schema = validator(name).schema
    fields, optional = FIELDS[name]
    exact = {field for field in schema["properties"] if field.endswith("_bytes")}
    assert set(schema["properties"]) - exact == {*fields, *optional}
    assert sorted(schema["required"]) == sorted(fields)
    assert schema["additionalProperties"] is False
    assert [f for f, one in schema["properties"].items() if not one.get("description")] == []


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_has_its_own_sentence(name):
    """The page of the command has the same: a schema that is read alone has nothing above it."""
    fields = validator(name).schema["properties"].items()
    said = [one["description"] for field, one in fields if not field.endswith("_bytes")]
    assert [text for text in said if said.count(text) > 1] == []
    assert [text for text in said if re.search(r"\babove\b|^As for\b|^As in\b", text)] == []


@pytest.mark.parametrize("name", FIELDS)
def test_a_row_with_a_field_more_or_less_is_refused(name):
    schema = validator(name)
    assert list(schema.iter_errors({"new": 1, **dict.fromkeys(schema.schema["required"])}))
    assert list(schema.iter_errors({}))


def test_rows_that_are_not_as_the_schema_says_are_found():
    with pytest.raises(jsonschema.ValidationError):
        require_schema(["mounts", "-o", "json"], b'[{"image": 1}]')
    with pytest.raises(jsonschema.ValidationError):
        require_schema(["chain", "show", "x", "--output=jsonl"], b"{}\n")
    assert require_schema(["ls", "x", "/"], b"{}") == []


def rows(*words: object, statuses: tuple[int, ...] = (0,), **environment: str) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = run_here(*words)
    assert done.status in statuses, done.err
    assert done.out
    return require_schema([str(word) for word in words], done.out)


READ = [
    ("df", "-o", "json", "GUEST"),
    ("df", "-o", "jsonl", "GUEST", "PLAIN"),
    ("filesystems", "-o", "json", "--all", "GUEST"),
    ("partitions", "-o", "json", "GUEST"),
    ("partitions", "-o", "json", "PLAIN"),
    ("ls", "-o", "json", "--checksum", "md5", "--xattrs", "GUEST", "/etc", "/dev", "/usr/bin"),
    ("diff", "-o", "json", "--xattrs", "--checksum", "md5", "--against-base", "OVERLAY"),
    ("inspect", "-o", "json", "--packages", "GUEST"),
    ("inspect", "-o", "json", "PLAIN"),
    ("info", "-o", "json", "OVERLAY"),
    ("check", "-o", "json", "GUEST"),
    ("check", "-o", "json", "PLAIN"),
    ("chain", "show", "-o", "json", "OVERLAY"),
    ("inject", "-o", "json", "-n", "GUEST", "--delete", "/no-such-file"),
]


@pytest.mark.parametrize("words", READ, ids=" ".join)
def test_what_is_read_of_a_guest(words):
    paths = {"GUEST": guest("lvm"), "PLAIN": guest("plain"), "OVERLAY": guest("overlay2")}
    assert rows(*[paths.get(word, word) for word in words])


def test_what_fails_has_rows_too(tmp_path):
    nothing = tmp_path / "nothing.qcow2"
    assert rows("df", "-o", "json", nothing, statuses=(3,))
    assert rows("inject", "-o", "json", nothing, "--delete", "/x", statuses=(3,))


def test_names_that_are_not_utf_8(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / os.fsdecode(b"n\xff")).symlink_to(os.fsdecode(b"t\xff"))
    image = tmp_path / os.fsdecode(b"disk\xff.img")
    make = ["mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "root", image, "8M"]
    subprocess.run(make, check=True, capture_output=True)
    found = rows("ls", "-o", "json", "-R", "--format", "raw", image, "/")
    assert any("path_bytes" in row and "target_bytes" in row for row in found)
    overlay = tmp_path / os.fsdecode(b"over\xff.qcow2")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", image, overlay]
    subprocess.run(create, check=True)
    (row,) = [row for row in rows("chain", "tree", "-o", "json", tmp_path) if row["depth"]]
    assert "path_bytes" in row
    assert "backing_bytes" in row


def test_snapshots_and_images_below_a_folder(tmp_path):
    image, overlay = tmp_path / "disk.qcow2", tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "8M"], check=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "before", image], check=True)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", overlay]
    subprocess.run(create, check=True)
    (tmp_path / "broken.qcow2").write_bytes(overlay.read_bytes()[:600])
    assert rows("snapshot", "list", "-o", "json", image)
    assert rows("info", "-o", "json", image)[0]["snapshots"]
    assert len(rows("chain", "tree", "-o", "json", tmp_path)) == 3
    assert rows("chain", "check", "-o", "json", tmp_path, statuses=(0, 3))


def test_checks_of_this_machine():
    assert rows("doctor", "-o", "json", statuses=(0, 6))


def test_saved_appliances(tmp_path):
    folder = tmp_path / "imgtool/appliance/1"
    folder.mkdir(parents=True)
    for part in (folder, *folder.parents[:2]):
        part.chmod(0o700)
    facts = {"version": saved._VERSION, "disks": 1, "time": time.time_ns(), "hypervisor": "x"}
    (folder / "saved.json").write_text(json.dumps(facts))
    assert rows("appliance", "list", "-o", "json", XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices are root's")
def test_mounts(tmp_path):
    image, there = tmp_path / "disk.img", tmp_path / "mnt"
    there.mkdir()
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image, "8M"], check=True, capture_output=True)
    program = [sys.executable, "-m", "imgtool"]
    words = ["--via", "loop", "--format", "raw", "-m", "/dev/sda:/"]
    subprocess.run([*program, "mount", *words, image, there], check=True)
    try:
        found = rows("mounts", "-o", "json")
    finally:
        subprocess.run([*program, "umount", there], check=True)
    assert str(there) in [row["mountpoint"] for row in found]


def test_a_schema_goes_into_a_closed_pipe_without_a_traceback():
    line = f"{sys.executable} -m imgtool schema ls | true"
    for _ in range(5):
        done = subprocess.run(["sh", "-c", line], capture_output=True, check=False, text=True)
        assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lss"], "No such command 'lss'. Did you mean 'ls'?"),
        (["chain", "chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["cat"], "it has no -o json, and so no schema (imgtool cat)"),
        (["chain"], "it has no -o json, and so no schema (imgtool chain)"),
    ],
)
def test_what_has_no_schema_is_wrong_usage(words, line):
    program = [sys.executable, "-m", "imgtool", "schema", *words]
    done = subprocess.run(program, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == f"imgtool: error: {line}"
    assert re.match(r"  hint: |$", "".join(done.stderr.splitlines()[1:2]))


def test_a_schema_is_shown_as_it_is_in_the_package():
    program = [sys.executable, "-m", "imgtool", "schema", "chain", "show"]
    done = subprocess.run(program, capture_output=True, check=True, text=True)
    assert done.stdout == schemas.schema_text("chain show")
