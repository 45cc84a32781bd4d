"""What the parent believes of a worker that was taken over by its image: nothing.

The liar is the real worker in its sandbox, with some of its answers replaced.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from imgtool import open_guest
from imgtool.compare.differences import Walk
from imgtool.engines.direct.parent import client as wire
from imgtool.engines.direct.parent import guest as direct_guest
from imgtool.engines.direct.parent import pipes, questions, sandbox
from imgtool.engines.direct.parent.client import Client, WorkerFailed
from imgtool.engines.direct.parent.pipes import Pipes, TimeBudget
from imgtool.engines.direct.parent.volumes import WorkerVolume
from imgtool.engines.direct.wire import frames, messages, requests
from imgtool.engines.direct.wire.frames import BadMessage
from imgtool.engines.direct.worker import server
from imgtool.engines.libguestfs.appliance import launch
from imgtool.errors import EngineError, ImageError, Interrupted, NotInGuestError
from imgtool.guest.model import Entry, Mount
from imgtool.host import interrupt
from imgtool.host.process import environment
from imgtool.transfer.copy_out import Report, copy_out
from tests.support.workers import client_of

pytestmark = pytest.mark.usefixtures("worker_may_fail")

LIAR = """
import sys; sys.path[:0] = {{paths!r}}
import time
from imgtool.engines.direct.wire import frames as protocol
from imgtool.engines.direct.worker import __main__ as start
from imgtool.engines.direct.worker.server import Worker
DIRECTORY, FILE = 0o40755, 0o100644
def row(path, mode=FILE, size=1, mtime=0):
    return [path, 0, 12, mode, 0, 0, size, mtime, 8, 1, 0, None, None, None]
def frame(self, kind, payload=b""):
    protocol.send(self._out, kind, payload)
    self._out.flush()
{lies}
start.main()
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("liars")
    root = folder / "root"
    (root / "etc").mkdir(parents=True)
    (root / "small").write_text("small")
    (root / "empty").touch()
    (root / "etc/hostname").write_text("guest")
    (root / ".ssh").mkdir()
    (root / ".ssh/authorized_keys").write_text("mallory")
    (root / "data").symlink_to("/.ssh")
    (root / "all").symlink_to("/")
    (root / "large").write_bytes(os.urandom(5 << 20))
    with (root / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.write(b"x")
    path = folder / "disk.img"
    words = ("mke2fs", "-q", "-t", "ext4", "-d", root, path, "32M")
    subprocess.run(words, check=True, env=environment())
    return path


def _braced(lies: str) -> str:
    """The lies as a part of what `sandbox` fills in."""
    return lies.replace("{", "{{").replace("}", "}}")


@pytest.fixture
def lying(image: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    @contextlib.contextmanager
    def opened(lies: str) -> Iterator[Any]:
        monkeypatch.setattr(sandbox, "_START", LIAR.format(lies=_braced(lies)))
        with open_guest(image, engine="direct", mounts=[Mount("/dev/sda", "/")]) as guest:
            yield guest

    return opened


def copied(guest: Any, source: str, dest: Path) -> list[str]:
    said: list[str] = []

    def problem(path: bytes, line: str) -> None:
        said.append(line)

    copy_out(guest, source, dest, Report(problem, problem))
    return said


# Reasons


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("'x' * (2 << 20)", "the filesystem cannot be mounted: xxxx"),
        ("'\\x1b[2J' * (1 << 17)", "the filesystem cannot be mounted: \\x1b[2J"),
        ("5", "its answer makes no sense"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_a_reason_is_one_line_whatever_is_said(image, monkeypatch, said, means, given):
    lies = f"""
def mount(self, request): return [{said}]
Worker.do_mount = mount
"""
    monkeypatch.setattr(sandbox, "_START", LIAR.format(lies=_braced(lies)))
    told: list[str] = []
    options: Any = {"mounts": [Mount("/dev/sda", "/")]} if given else {}
    with open_guest(image, engine="direct", notice=told.append, **options) as guest:
        if given or said == "5":
            with pytest.raises((EngineError, ImageError)) as failed:
                guest.lstat("/small")
            told.append(failed.value.message)
        else:
            with contextlib.suppress(NotInGuestError):
                guest.lstat("/small")
    assert len(told) == 1 and means in told[0]
    assert len(told[0]) < 400 and told[0].isprintable()


# Names


def test_worker_does_not_choose_a_name_on_the_host(lying, tmp_path):
    lies = """
def lstat(self, request): return row("/.bash_login")
def resolve(self, request): return "/.bash_login"
Worker.do_lstat = lstat; Worker.do_resolve = resolve
"""
    with lying(lies) as guest, pytest.raises(ImageError, match="makes no sense"):
        copied(guest, "/small", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_called_what_was_typed_wherever_a_link_leads(image, tmp_path):
    with open_guest(image, engine="direct") as guest:
        assert copied(guest, "/data/", tmp_path) == []
        assert copied(guest, "/all/", tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == {"data", "all"}
    assert (tmp_path / "data/authorized_keys").read_text() == "mallory"
    assert (tmp_path / "all/etc/hostname").read_text() == "guest"


@pytest.mark.parametrize("found", ["/.bash_login", "/small/x", "small", "/../small"])
def test_the_spelling_of_a_name_differs_in_case_alone(lying, found):
    lies = f"""
Worker.do_spelling = lambda self, request: {found!r}
Worker.do_is_dir = lambda self, request: "Windows" in request.path
"""
    with lying(lies) as guest, pytest.raises(ImageError, match="makes no sense"):
        guest.lstat("/small")


LISTED = {
    "elsewhere": "[row('/small')]",
    "beside": "[row('/etc2/x')]",
    "the directory itself": "[row('/etc')]",
    "nothing": "[row('/etc/')]",
    "an empty name": "[row('/etc//x')]",
    "this directory": "[row('/etc/.')]",
    "the one above": "[row('/etc/../x')]",
    "no known type": "[row('/etc/x', 0o644)]",
    "a problem elsewhere": "[['/small', 'it is damaged']]",
    "a problem without a name": "[['', 'it is damaged']]",
    "a problem that is none": "[['/etc/x', 5.5]]",
    "a count below nothing": "[['/etc/x', -1]]",
    "a problem without an end": "[['/etc/x', 'x' * 100000]]",
    "too deep": "[row('/etc' + '/x' * 11000)]",
    "no row": "[[]]",
    "no list": "'[['",
    "nothing at all": "[]",
}


@pytest.mark.parametrize("told", LISTED)
@pytest.mark.parametrize("deep", [False, True])
def test_what_is_listed_lies_in_the_directory(lying, told, deep):
    lies = f"Worker.do_walk = lambda self, request: {LISTED[told]}"
    said: list[tuple[bytes, str]] = []
    with lying(lies) as guest, pytest.raises(ImageError, match=r"no sense|no rows"):
        listed = guest.walk if deep else guest.entries
        list(listed("/etc", on_problem=lambda path, line: said.append((path, line))))
    assert said == []


def test_what_is_deeper_is_only_in_a_walk(lying):
    lies = "Worker.do_walk = lambda self, request: [row('/etc/x/y')]"
    with lying(lies) as guest:
        assert [entry.path for entry in guest.walk("/etc")] == [b"/etc/x/y"]
        with pytest.raises(ImageError, match="no sense"):
            list(guest.entries("/etc"))


def test_walks_that_are_compared_are_in_order():
    walk = Walk(lambda path, line: None)
    names = (b"/", b"/a", b"/a/b", b"/a-b", b"/a-a")
    walk.start(Entry(name, 0o100644, 0, 0, 0, 0) for name in names)
    with pytest.raises(EngineError, match="not in order"):
        while walk.head is not None:
            walk.advance()


# Disks and filesystems

OPENED = """
from itertools import count
def block(device, kind="device", type="ext4", parents=()):
    return [device, kind, 1 << 25, type, None, None, None, None, "", "", list(parents)]
def told(blocks, groups=()):
    Worker.do_open = lambda self, request: {"blocks": list(blocks), "groups": list(groups)}
disk = block("/dev/sda")
def partitions(number):
    return [block(f"/dev/sda{n}", "partition", parents=["/dev/sda"]) for n in range(1, number + 1)]
"""
CLAIMED = {
    "no disk": "told([])",
    "another disk": "told([disk, block('/dev/sdb')])",
    "a disk of another name": "told([block('/dev/sdb')])",
    "a disk that is a partition": "told([block('/dev/sda', 'partition')])",
    "the same disk again": "told([disk, disk])",
    "two partitions of one name": "told([disk, *partitions(1) * 2])",
    "a partition of no disk": "told([disk, block('/dev/sda1', 'partition', parents=['/dev/sdz'])])",
    "too many partitions": "told([disk, *partitions(40_000)])",
    "too many groups": "told([disk], [[f'g{n}', '', 0, [], []] for n in range(5000)])",
    "too many volumes": "told([disk], [['g', '', 0, [], [[f'v{n}', '', 0] for n in range(5000)]]])",
    "too many members": "told([disk], [['g', '', 0, [['', '/dev/sda', 0]] * 5000, []]])",
    "groups that are none": "told([disk], ['gg'])",
}


@pytest.mark.parametrize("claim", CLAIMED)
def test_guest_has_the_disks_that_it_was_given_alone(lying, claim):
    started = time.monotonic()
    with pytest.raises(ImageError, match="makes no sense"), lying(OPENED + CLAIMED[claim]):
        pass
    assert time.monotonic() - started < 5


def test_a_journal_lies_on_a_disk_that_was_given(lying):
    lies = "Worker.do_journals = lambda self, request: [['/dev/sda', [[1, 0, 4096]]]]"
    with pytest.raises(ImageError, match="a place on no disk"), lying(lies):
        pass


MANY = """
import time
told([disk, *partitions(4000)])
def look(self, request): time.sleep(PAUSE)
Worker.do_look = look
Worker.do_is_dir = lambda self, request: False
Worker.do_journals = lambda self, request: []
"""


@pytest.fixture
def without_mounts(image: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    @contextlib.contextmanager
    def opened(lies: str) -> Iterator[Any]:
        monkeypatch.setattr(sandbox, "_START", LIAR.format(lies=_braced(lies)))
        with open_guest(image, engine="direct") as guest:
            yield guest

    return opened


def test_layout_is_found_in_time_with_many_filesystems(without_mounts, monkeypatch):
    monkeypatch.setitem(wire._PATIENCE_FOR_LAYOUT, "start", 1.0)
    started = time.monotonic()
    with (
        without_mounts(OPENED + MANY.replace("PAUSE", "0.02")) as guest,
        pytest.raises(ImageError, match="does not come to an end"),
    ):
        guest.layout  # noqa: B018 - found
    assert time.monotonic() - started < 5


def test_filesystems_at_their_most_take_no_time(without_mounts):
    started = time.monotonic()
    with (
        without_mounts(OPENED + MANY.replace("PAUSE", "0")) as guest,
        pytest.raises(NotInGuestError, match="no operating system was found"),
    ):
        guest.layout  # noqa: B018 - found
    assert time.monotonic() - started < 10


# Contents


def test_a_file_is_no_longer_than_it_was_said_to_be(lying):
    lies = """
def read(self, request):
    for _ in range(100): frame(self, protocol.DATA, b"x")
Worker.do_read = read
"""
    for part in (None, 3):
        with lying(lies) as guest, pytest.raises(EngineError, match="more than was asked for"):
            opened = guest.open("/small") if part is None else guest.open_range("/small", 0, part)
            with opened as stream:
                while stream.read(1):
                    pass


@pytest.mark.parametrize(
    "ranges",
    ["[[1 << 62, 1 << 62]]", "[[0, 65 << 20]]", "[[4096, 1], [0, 1]]", "[[0, 2], [1, 2]]", "[[0]]"],
)
def test_the_ranges_of_a_file_lie_in_it(lying, ranges):
    lies = f"Worker.do_ranges = lambda self, request: {ranges}"
    with lying(lies) as guest, pytest.raises(ImageError, match="makes no sense"):
        guest.data_ranges("/sparse")


@pytest.mark.parametrize(
    "rows", ["[[0, 5, 0, 1 << 50]]", "[[0, 5, 7, 0]]", "[[3, 3, 0, 0]]", "[['0']]", "7"]
)
def test_a_file_lies_on_the_guests_own_disks(lying, rows, monkeypatch):
    monkeypatch.setattr(direct_guest, "_LARGE", 1)
    lies = f"Worker.do_runs = lambda self, request: {rows}"
    with lying(lies) as guest, pytest.raises(ImageError, match="makes no sense"):
        guest.read_bytes("/small")


def test_an_empty_file_is_empty_and_none_is_none(image):
    with open_guest(image, engine="direct") as guest:
        volume = WorkerVolume(client_of(guest))
        guest.layout  # noqa: B018 - mounted
        assert volume.read("/empty") == b""
        assert volume.read("/small") == b"small"
        assert volume.read("/none") is None
        assert guest.read_bytes("/empty") == b""


def test_a_lost_disk_is_no_damage_of_one_file(lying):
    lies = """
honest = Worker.do_read
def read(self, request):
    self._open_volumes.disks[0]._nbd.shutdown()
    return honest(self, request)
Worker.do_read = read
"""
    with lying(lies) as guest, pytest.raises(ImageError, match="QEMU has gone away"):
        guest.open("/large").__enter__()


# Answers without sense

ROW = ["/etc/x", 0, 12, 0o100644, 0, 0, 1, 5, 8, 1, 0, "/target", "0" * 64, "0" * 64]
XATTRS = [["user.a", "YQ=="], ["user.b", ""]]
BLOCK = ["/dev/sda", "device", 1 << 25, "ext4", "l", "u", "p", "n", "t", "d", []]
PART = ["/dev/sda1", "partition", 1 << 24, "ext4", None, None, None, None, "", "", ["/dev/sda"]]
GROUP = ["g", "u", 5, [["u", "/dev/sda1", 5]], [["v", "u", 5]]]
LINES = {
    *("root", "type", "distribution", "version", "product_name", "architecture", "hostname"),
    *("package_format", "package_management"),
}
SYSTEM: dict[str, Any] = dict.fromkeys(LINES, "x") | {
    "mountpoints": {"/": "/dev/sda"},
    "kernels": ["6.1"],
    "applications": [["bash", "5", "1", 0, "amd64"]],
}
# Each question, and what its answer looks like.
DECODED: dict[str, tuple[questions.Question[Any], Any]] = {
    "devices": (
        questions.opening([["x"]], [], [], ring=None, scratch=None),
        {"blocks": [BLOCK, PART], "groups": [GROUP]},
    ),
    "journals": (questions.journals(), [["/dev/sda", [[0, 1, 2]]]]),
    "stretches": (questions.written([1, None]), [[[0, 5], [6, 9]], None]),
    "no answer": (questions.look("/dev/sda"), None),
    "reasons": (questions.mount([("/dev/sda", "/"), ("/dev/sdb", "/x")]), ["why", None]),
    "space": (questions.usage("/dev/sda"), [1, 2, 3, 4, 5]),
    "a system": (questions.inspect("/dev/sda", {"/": "/dev/sda"}, True), SYSTEM),
    "a path": (questions.resolve("/x"), "/etc/x"),
    "a spelling": (questions.spelling("/etc"), "/ETC"),
    "an entry": (questions.lstat("/etc/x"), ROW),
    "yes": (questions.is_dir("/etc", False), True),
    "attributes": (questions.xattrs("/etc/x"), [XATTRS, 1]),
    "an entry below": (questions.walk("/etc", False, None, True, None), [[*ROW, XATTRS]]),
    "a problem": (questions.walk("/etc", True, None, False, None), [["/etc/x", "damaged"]]),
    "a count": (questions.walk("/etc", True, None, True, None), [["/etc/x", 3]]),
    "a checksum": (questions.checksum("/etc/x", "md5"), "0" * 32),
    "bytes": (questions.read("/etc/x", 0, 5), b"bytes"),
    "a small file": (questions.small("/etc/x", 5), b"small"),
    "runs": (questions.runs("/etc/x", 0, 6, [100]), [[0, 5, 0, 7], [5, 6, 0, 99]]),
    "ranges": (questions.ranges("/etc/x", 100), [[0, 5], [6, 2]]),
    "bytes of a stream": (questions.tar("/etc", [], False, False), b"bytes"),
    "a problem in a stream": (questions.tar("/etc", [], False, True), ["/etc/x", "damaged"]),
}
NONSENSE: tuple[object, ...] = (
    *(None, True, 0, -1, 1.5, float("nan"), 1 << 70, "", "x", "\0", "\ud800", "\udcff", "\u20ac"),
    *("x" * 5000, [], [[]], {}, {"x": 1}, [1, 2, 3], ["/etc/x", []]),
)


def distorted(answer: Any) -> Iterator[Any]:
    """The answer with nonsense in the place of each of its parts, with one more and one fewer."""
    yield from NONSENSE
    if isinstance(answer, list):
        yield from (answer[:-1], [*answer, None], [*answer, *answer], answer[::-1])
        for number, part in enumerate(answer):
            for other in distorted(part):
                yield [*answer[:number], other, *answer[number + 1 :]]
    if isinstance(answer, dict):
        yield from (answer | {"more": 1}, dict(list(answer.items())[1:]))
        for name, part in answer.items():
            for other in distorted(part):
                yield answer | {name: other}


def decoded(question: questions.Question[Any], answer: Any) -> Any:
    """What is made of an answer, to its end."""
    made = question.decode(answer)
    return list(made) if isinstance(made, Iterator) else made


def test_every_answer_is_looked_at() -> None:
    asked = {type(question.request) for question, _ in DECODED.values()}
    assert asked == set(requests.KINDS.values())


@pytest.mark.parametrize("kind", DECODED)
def test_senseless_answer_is_called_that(kind):
    question, answer = DECODED[kind]
    decoded(question, copy.deepcopy(answer))
    refused = 0
    for other in distorted(answer):
        try:
            decoded(question, copy.deepcopy(other))
        except BadMessage:
            refused += 1
    assert refused > 10


# Of these questions the answer is bytes, or may be.
IN_BYTES = {requests.Read, requests.Tar, requests.Small}


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize(
    "data",
    [b"x", bytearray(b"/etc/x"), memoryview(b"0" * 32)],
    ids=lambda data: type(data).__name__,
)
def test_bytes_are_an_answer_where_they_were_asked_for(kind, data):
    question, _ = DECODED[kind]
    if type(question.request) not in IN_BYTES:
        with pytest.raises(BadMessage):
            decoded(question, data)
    elif not isinstance(question.request, requests.Small):
        assert bytes(decoded(question, data)) == bytes(data)


# What no answer to a question is, besides what is nonsense in the place of any.
NO_ANSWERS: dict[str, list[Any]] = {
    "no answer": [True, False, 0, "", []],
    "yes": [None, 0, 1, "true", [True]],
    "space": [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, -1], [1, 2, 3, 4, 5.0]],
    "bytes": [None, "bytes", ["/etc/x", "damaged"]],
    # What is lent is good until the next part, and longer than that is no small file kept.
    "a small file": [b"longer", bytearray(b"longer"), memoryview(b"small"), "small", 0, False],
    "bytes of a stream": [None, "bytes", ["/etc/x", "damaged"]],
    "a problem in a stream": [["/etc2/x", "damaged"], ["/etc/x/../y", "damaged"], ["/etc/x"], ROW],
    "journals": [[["/dev/sda", [[0, 1]]]], [["/dev/sda", [[0, 1, -2]]]], [[5, []]]],
    "runs": [[[0, 5, 1, 7]], [[0, 5, 0, 96]], [[0, 5, 0, 7], [4, 6, 0, 90]]],
}


@pytest.mark.parametrize("kind", NO_ANSWERS)
def test_what_is_no_answer_is_refused(kind):
    question, _ = DECODED[kind]
    for answer in NO_ANSWERS[kind]:
        with pytest.raises(BadMessage):
            decoded(question, answer)


SILENT: dict[str, tuple[str, Callable[[Any], object]]] = {
    "a filesystem that answers": ("do_look = lambda self, r: 5", lambda g: g.lstat("/small")),
    "a directory that is 1": ("do_is_dir = lambda self, r: 1", lambda g: g.lstat("/small")),
    "no path": ("do_resolve = lambda self, r: None", lambda g: g.resolve("/small")),
    "no entry": ("do_lstat = lambda self, r: None", lambda g: g.lstat("/small")),
    "no sum": ("do_checksum = lambda self, r: None", lambda g: g.checksum("md5", "/small")),
    "no attributes": ("do_xattrs = lambda self, r: None", lambda g: g.xattrs("/small")),
    "no space": ("do_usage = lambda self, r: None", lambda g: g.usage()),
    "no stretches": ("do_written = lambda self, r: None", lambda g: g.written_stretches([1])),
    "words for bytes": ("do_read = lambda self, r: 'small'", lambda g: g.read_bytes("/small")),
    "a problem for bytes": (
        "do_read = lambda self, r: ['/small', 'x']",
        lambda g: g.read_bytes("/small"),
    ),
    "a problem that was not asked for": (
        "do_tar = lambda self, r: ['/etc/x', 'damaged']",
        lambda g: g.tar("/etc").__enter__(),
    ),
}


@pytest.mark.parametrize("way", SILENT)
def test_no_answer_and_another_answer_fail_the_worker(lying, way):
    lie, ask = SILENT[way]
    with lying(f"Worker.{lie}") as guest, pytest.raises(ImageError, match="makes no sense"):
        ask(guest)


def test_an_answer_has_one_part(lying):
    lies = """
def resolve(self, request):
    for _ in range(2): self._json("/small")
Worker.do_resolve = resolve
"""
    with lying(lies) as guest, pytest.raises(ImageError, match="several parts"):
        guest.resolve("/small")


@pytest.mark.parametrize("defect", [AttributeError, TypeError, KeyError, ValueError])
def test_a_defect_of_imgtool_is_not_taken_for_a_lying_worker(image, monkeypatch, defect):
    def broken(*_: object) -> Entry:
        raise defect("ours")

    monkeypatch.setattr(messages, "entry_at", broken)
    launched: list[str] = []
    monkeypatch.setattr(launch, "launch_appliance", lambda *_, **__: launched.append("appliance"))
    mounts = [Mount("/dev/sda", "/")]
    with open_guest(image, mounts=mounts) as guest, pytest.raises(defect, match="ours"):
        guest.lstat("/small")
    assert launched == []


# Time


class Liar:
    """A program that has the pipes of a worker."""

    def __init__(self, program: str) -> None:
        head = "import sys, time; put = sys.stdout.buffer.write; flush = sys.stdout.flush\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", head + program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


FOR_EVER = {
    "a byte now and then": (
        "put(b'J\\0\\0\\1\\0')\nwhile True: put(b' '); flush(); time.sleep(0.05)",
        "does not answer",
    ),
    "no data": (
        "while True: put(b'D\\0\\0\\0\\0'); flush()",
        "without what should be in it",
    ),
    "no rows": (
        "while True: put(b'J\\0\\0\\0\\2[]'); flush(); time.sleep(0.05)",
        "does not come to an end",
    ),
    "signs of life where there is nothing to work at": (
        "while True: put(b'~\\0\\0\\0\\0'); flush(); time.sleep(0.05)",
        "nothing to work at",
    ),
    "signs of more than life": (
        "put(b'~\\0\\0\\0\\1 '); flush(); time.sleep(60)",
        "without what should be in it",
    ),
}


@pytest.mark.parametrize("way", FOR_EVER)
def test_nobody_waits_for_ever(monkeypatch, way):
    monkeypatch.setitem(wire._PATIENCE, "start", 1.0)
    program, reason = FOR_EVER[way]
    started = time.monotonic()
    with Liar(program) as process:
        client = Client(process, image="disk", silence=1.5)
        with pytest.raises(WorkerFailed, match=reason):
            for _ in client.payloads(requests.Walk("/", True, None, False, None)):
                pass
    assert time.monotonic() - started < 10


def test_a_sum_does_not_take_for_ever(monkeypatch):
    monkeypatch.setitem(wire._PATIENCE_FOR_SUMS, "start", 1.0)
    with Liar("while True: put(b'~\\0\\0\\0\\0'); flush(); time.sleep(0.02)") as process:
        client = Client(process, image="disk", silence=5.0)
        with pytest.raises(WorkerFailed, match="does not come to an end"):
            client.call(questions.checksum("/small", "md5"))


@pytest.mark.parametrize("more", ["~\\0\\0\\0\\0", "D\\0\\0\\0\\1x"])
def test_what_is_told_to_stop_stops_in_time(more):
    program = f"put(b'D\\0\\0\\0\\1x')\nwhile True: put(b'{more}'); flush(); time.sleep(0.02)"
    started = time.monotonic()
    with Liar(program) as process:
        client = Client(process, image="disk", silence=1.0)
        answer = client.stream(questions.read("/small", 0, 5))
        assert next(answer) == b"x"
        with pytest.raises(WorkerFailed, match="does not answer"):
            answer.close()
    assert time.monotonic() - started < 10


def test_who_does_not_listen_is_not_spoken_to_for_ever():
    started = time.monotonic()
    with Liar("time.sleep(60)") as process:
        client = Client(process, image="disk", silence=1.0)
        with pytest.raises(WorkerFailed, match="does not answer"):
            client.call(questions.tar("/", ["x" * (1 << 20)], False, False))
    assert time.monotonic() - started < 10


def test_ctrl_c_is_heard_however_much_the_worker_says(monkeypatch):
    monkeypatch.setattr(interrupt, "pending", lambda: True)
    with Liar("while True: put(b'J\\0\\0\\0\\2[]')") as process:
        client = Client(process, image="disk")
        with pytest.raises(Interrupted):
            for _ in client.payloads(requests.Walk("/", True, None, False, None)):
                pass
        process.wait(10)  # nothing more is heard of it


def test_a_conversation_may_have_any_descriptor():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with Liar(
            "put(b'J\\0\\0\\0\\4' + b'true' + b'.\\0\\0\\0\\0'); flush(); time.sleep(60)"
        ) as process:
            assert process.stdout is not None and process.stdout.fileno() > 1024
            assert Client(process, image="disk").call(questions.is_dir("/small", False)) is True
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_patience_is_earned():
    patience = TimeBudget(10.0, least=100.0, answer=1.0, most=30.0)
    for _ in range(3):
        patience.spend(8.0)
        patience.credit(1000)  # no more than there was
    with pytest.raises(BadMessage):  # all in all
        patience.spend(8.0)
    patience = TimeBudget(10.0, least=100.0, answer=1.0)
    for _ in range(10):
        patience.spend(2.0)
        patience.credit_answer()
        if patience._left < 2:
            break
    with pytest.raises(BadMessage):
        patience.spend(2.0)


def test_time_that_imgtool_is_stopped_is_not_the_workers(monkeypatch):
    answers, more = os.pipe()
    requests = os.open(os.devnull, os.O_WRONLY)
    clock = itertools.count(0, 1000)  # Ctrl-Z again and again
    monkeypatch.setattr(pipes, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    try:
        ends = Pipes(requests, answers)
        ends.allow(60.0)
        os.write(more, b"abc")
        assert ends.read(3) == b"abc"
        assert ends.spent() < 10
    finally:
        for descriptor in (answers, more, requests):
            os.close(descriptor)


def test_a_slow_disk_gives_signs_of_life_by_the_clock(monkeypatch):
    clock = itertools.count(0, 3)  # each look at it is three seconds later
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    out = io.BytesIO()
    summing = server.Worker(SimpleNamespace(poll_control=lambda: None), out, [])  # type: ignore[arg-type]
    monkeypatch.setattr(summing, "_read_for_checksum", lambda found: [b"x"] * 20)
    found: Any = None
    assert summing._sum(found, "md5") == hashlib.md5(b"x" * 20).hexdigest()
    assert out.getvalue().count(frames.ALIVE) >= 9
