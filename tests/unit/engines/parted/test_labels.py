"""What libparted reads in its sandbox is what parted(8) prints; no lie of it is believed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from imgtool import cli
from imgtool.engines.direct.parent import sandbox
from imgtool.engines.direct.parent.sandbox import Kind
from imgtool.engines.direct.wire import frames
from imgtool.engines.direct.wire.refusals import NoSandbox
from imgtool.engines.parted.parent import asking
from imgtool.engines.parted.parent.sectors import table_sectors
from imgtool.errors import EngineError

MIB = 1 << 20
SIZE = 96 * MIB
LABELS = {
    "sun": "mkpart 1MiB 20MiB mkpart 24MiB 60MiB set 2 root on",
    "dvh": "mkpart primary ext2 8MiB 20MiB mkpart primary ext2 24MiB 60MiB",
    "bsd": "mkpart ext2 1MiB 20MiB mkpart ext2 24MiB 60MiB",
    "atari": "mkpart primary ext2 1MiB 20MiB mkpart primary ext2 24MiB 60MiB",
    "amiga": "mkpart one ext2 2MiB 20MiB mkpart two ext2 24MiB 60MiB",
    "mac": "mkpart one ext2 1MiB 20MiB mkpart two ext2 24MiB 60MiB set 3 root on",
    "pc98": "mkpart primary ext2 1MiB 20MiB mkpart primary ext2 24MiB 60MiB",
    "gpt": "mkpart one 1MiB 20MiB mkpart two 24MiB 60MiB",
    "msdos": "mkpart primary 1MiB 20MiB mkpart extended 24MiB 90MiB mkpart logical 25MiB 40MiB"
    " mkpart logical 50MiB 88MiB",
    "loop": "",
}
OTHERS = [label for label in LABELS if label not in ("gpt", "msdos", "loop")]


def run(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        status = int(cli._run([str(word) for word in words]))
    except SystemExit as error:
        status = int(str(error.code))
    return (status, *capfd.readouterr())


def disk_with(path: Path, label: str) -> Path:
    with path.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(
        ["parted", "-s", "-a", "none", path, "mklabel", label, *LABELS[label].split()], check=True
    )
    return path


def printed(path: Path) -> tuple[str, list[tuple[int, int, int]]]:
    """The label, and number, start and size of each partition, as parted(8) prints them."""
    done = subprocess.run(
        ["parted", "-s", "-m", path, "unit", "B", "print"],
        check=True,
        capture_output=True,
        text=True,
    )
    _, about, *lines = done.stdout.splitlines()
    rows = [re.match(r"(\d+):(\d+)B:\d+B:(\d+)B:", line) for line in lines]
    found = [tuple(map(int, row.groups())) for row in rows if row]
    return about.split(":")[5], found  # type: ignore[return-value]


def asked(path: Path, kind: Kind = Kind.NAMESPACES) -> asking.Label:
    content = os.open(path, os.O_RDONLY)
    try:
        size = path.stat().st_size
        return asking._answer(kind, lambda at, count: os.pread(content, count, at), size, 512)
    finally:
        os.close(content)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("label", LABELS)
def test_the_sandbox_reads_what_parted_prints(tmp_path: Path, label: str, kind: Kind) -> None:
    disk = disk_with(tmp_path / "disk", label)
    name, rows = printed(disk)
    assert len(rows) >= (1 if label == "loop" else 2)
    answer = asked(disk, kind)
    assert answer.name == name == label
    assert [(row.number, row.start, row.size) for row in answer.rows] == rows


@pytest.mark.parametrize("label", OTHERS)
def test_partitions_shows_what_parted_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], label: str
) -> None:
    disk = disk_with(tmp_path / "disk", label)
    before = disk.stat()
    status, out, err = run(capfd, "partitions", disk, "-o", "json")
    assert (status, err) == (0, "")
    shown = json.loads(out)
    assert [(row["number"], row["start"], row["size"]) for row in shown] == printed(disk)[1]
    for row in shown:
        assert row["table"] == label
        assert row["end"] == row["start"] + row["size"] - 1
        assert row["start_sector"] * row["sector_size"] == row["start"]
    if label in ("sun", "mac"):
        assert shown[-1]["type_name"] == "root"
    if label in ("amiga", "mac"):
        assert shown[-2]["name"] == "one"
    assert disk.stat().st_mtime_ns == before.st_mtime_ns


def test_only_sectors_with_tables_leave_the_disk(tmp_path: Path) -> None:
    disk = disk_with(tmp_path / "disk", "msdos")
    with disk.open("r+b") as file:
        for at in range(MIB, SIZE - MIB, 4096):
            if not file.seek(at) or not any(file.read(512)):
                file.seek(at)
                file.write(b"secret")
    content = disk.read_bytes()
    given = list(table_sectors(lambda at, count: content[at : at + count], SIZE))
    assert sum(len(data) for _, data in given) < 4 * MIB
    assert not any(b"secret" in data for _, data in given)
    assert [row.number for row in asked(disk).rows] == [1, 2, 5, 6]


def test_table_is_named_without_a_sandbox(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_with(tmp_path / "disk", "sun")

    def none(*_: object, **__: object) -> None:
        raise NoSandbox("there is none")

    monkeypatch.setattr(sandbox, "start_worker", none)
    status, out, err = run(capfd, "partitions", disk, "-o", "json")
    (row,) = json.loads(out)
    assert (status, row["table"], row["number"]) == (0, "sun", None)
    assert "the rows of Sun partition tables are not read: no sandbox can be had" in err


def test_without_pyparted_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_with(tmp_path / "disk", "sun")
    monkeypatch.setattr(
        sandbox, "find_spec", lambda name: None if name == "_ped" else find_spec(name)
    )
    status, _, err = run(capfd, "partitions", disk)
    assert status == 0
    assert "the Python module _ped is not installed" in err


def test_a_crash_in_the_sandbox_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = disk_with(tmp_path / "disk", "sun")
    # Without a shell to start, libparted itself crashes as it is loaded.
    monkeypatch.setitem(asking._SHELL, Kind.NAMESPACES, ("true", ()))
    status, _, err = run(capfd, "partitions", disk)
    assert status == 1
    assert err.splitlines() == [
        "imgtool: error: libparted failed at the partition table: it ended without an answer"
        " (/dev/sda)"
    ]


def told(**changes: object) -> bytes:
    answer = {"label": "sun", "rows": [[1, "primary", 8, 16, None, []]], "said": [], **changes}
    payload = json.dumps(answer).encode()
    head = frames.READY + bytes(4) + frames.JSON + len(payload).to_bytes(4, "big")
    return head + payload + frames.END + bytes(4)


def test_a_true_answer_is_taken() -> None:
    label = asking.parse_answer(told(), SIZE, 512)
    assert (label.name, label.rows[0].start, label.rows[0].size) == ("sun", 4096, 8192)


@pytest.mark.parametrize(
    "lie",
    [
        told(label=5),
        told(label="\x1b[2J"),
        told(label=None),
        told(rows=[[0, "primary", 8, 16, None, []]]),
        told(rows=[[1, "primary", -1, 16, None, []]]),
        told(rows=[[1, "primary", 8, 0, None, []]]),
        told(rows=[[1, "primary", 1 << 62, 1 << 62, None, []]]),
        told(rows=[[1, "other", 8, 16, None, []]]),
        told(rows=[[1, "primary", 8, 16, 7, []]]),
        told(rows=[[1, "primary", 8, 16, None, ["\n"]]]),
        told(rows=[[1, "primary", 8, 16, None]]),
        told(rows=[[1, "primary", 8, 16, None, []]] * 2),
        told(rows=[[n, "primary", 8, 16, None, []] for n in range(1, 5000)]),
        told(said="x"),
        told(more=1),
        told() + b".",
        told()[:-1],
        frames.READY + bytes(4) + frames.JSON + b"\xff" * 4,
        b"x" * 100,
    ],
)
def test_a_lie_of_the_sandbox_is_not_believed(lie: bytes) -> None:
    with pytest.raises(frames.BadMessage):
        asking.parse_answer(lie, SIZE, 512)


def test_what_it_says_cannot_steer_a_terminal() -> None:
    (line,) = asking.parse_answer(told(said=["\x1b[2J" + "x" * 1000]), SIZE, 512).said
    assert "\x1b" not in line and len(line) <= 300


def test_a_program_that_says_too_much_or_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for script, patience, reason in (
        ("sleep 60", 0.5, "no answer within"),
        ("exec yes", 60.0, "too long"),
    ):
        monkeypatch.setattr(asking, "PATIENCE", patience)
        with (
            subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process,
            pytest.raises((EngineError, frames.BadMessage), match=reason),
        ):
            try:
                asking._heard(process)
            finally:
                process.kill()
        assert process.returncode != 0
