"""Requests on their way to the worker, which believes its parent no more than it has to."""

from __future__ import annotations

import inspect
import io
import json
import os
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

from imgtool.engines.direct.wire import requests
from imgtool.engines.direct.wire.frames import BadMessage
from imgtool.engines.direct.worker.requests import Requests
from imgtool.engines.direct.worker.server import Refused, Worker

# One of each, and what it is on its way: another spelling would be another protocol.
REQUESTS: dict[str, tuple[requests.Request, dict[str, Any]]] = {
    "open": (
        requests.Open([["qemu-nbd", "x"]], [[(0, 5)], []], ["/dev/sda"], ring=7, scratch=None),
        {
            "disks": [["qemu-nbd", "x"]],
            "lost": [[[0, 5]], []],
            "unreplayed": ["/dev/sda"],
            "ring": 7,
            "scratch": None,
        },
    ),
    "journals": (requests.Journals(), {}),
    "written": (requests.Written([1, None]), {"links": [1, None]}),
    "look": (requests.Look("/dev/sda"), {"device": "/dev/sda"}),
    "mount": (requests.Mount([("/dev/sda", "/")]), {"mounts": [["/dev/sda", "/"]]}),
    "usage": (requests.Usage("/dev/sda"), {"device": "/dev/sda"}),
    "resolve": (requests.Resolve("/\udcff"), {"path": "/\udcff"}),
    "spelling": (requests.Spelling("/etc"), {"path": "/etc"}),
    "lstat": (requests.Lstat("/etc"), {"path": "/etc"}),
    "walk": (
        requests.Walk("/", True, "md5", False, [[(0, 5), (6, 9)], None]),
        {
            "path": "/",
            "deep": True,
            "checksum": "md5",
            "xattrs": False,
            "written": [[[0, 5], [6, 9]], None],
        },
    ),
    "xattrs": (requests.Xattrs("/etc"), {"path": "/etc"}),
    "checksum": (requests.Checksum("/x", "md5"), {"path": "/x", "kind": "md5"}),
    "read": (
        requests.Read("/x", 5, (1 << 63) - 1),
        {"path": "/x", "offset": 5, "length": (1 << 63) - 1},
    ),
    "runs": (requests.Runs("/x", 5, 6), {"path": "/x", "offset": 5, "length": 6}),
    "small": (requests.Small("/x", 4096), {"path": "/x", "limit": 4096}),
    "is_dir": (requests.IsDir("/x", False), {"path": "/x", "any_case": False}),
    "ranges": (requests.Ranges("/x"), {"path": "/x"}),
    "inspect": (
        requests.Inspect("/dev/sda", {"/": "/dev/sda"}, True),
        {"root": "/dev/sda", "mountpoints": {"/": "/dev/sda"}, "packages": True},
    ),
    "tar": (
        requests.Tar("/etc", ["/etc/x"], True, False),
        {"path": "/etc", "excluded": ["/etc/x"], "xattrs": True, "passes_over": False},
    ),
}


def test_every_request_has_a_name_and_an_answer() -> None:
    assert REQUESTS.keys() == requests.KINDS.keys()
    assert set(get_args(requests.Request)) == set(requests.KINDS.values())
    for name, kind in requests.KINDS.items():
        answer = getattr(Worker, f"do_{name}")
        assert list(inspect.signature(answer).parameters) == ["self", "request"]
        assert get_type_hints(answer)["request"] is kind
    answered = {name for name in vars(Worker) if name.startswith("do_")}
    assert answered == {f"do_{name}" for name in requests.KINDS}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_arrives_as_it_was_made(name: str) -> None:
    request, fields = REQUESTS[name]
    body = requests.encode(request)
    assert body == json.dumps({"do": name, **fields}).encode("ascii")
    arrived = requests.decode(body)
    assert type(arrived) is type(request)
    assert arrived == request


# What no field of theirs can be in the place of one of its kind.
OTHERS: tuple[Any, ...] = (5, True, 1.5, "x", None, [], [5], [[5]], ["x"], {}, {"x": 5})


def mistyped(value: Any) -> Iterator[Any]:
    """The value with one of another type for it, or for a part of it."""
    for other in OTHERS:
        kinds = {type(other), type(value)}
        # None may be meant, and so may an empty list or mapping.
        if len(kinds) == 2 and type(None) not in kinds:
            yield other
    if isinstance(value, list):
        for number, part in enumerate(value):
            for other in mistyped(part):
                yield [*value[:number], other, *value[number + 1 :]]
    if isinstance(value, dict):
        for key, part in value.items():
            for other in mistyped(part):
                yield value | {key: other}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_of_another_form_is_refused(name: str) -> None:
    _, fields = REQUESTS[name]
    wrong = [{**fields, "more": 1}]
    wrong += [{key: fields[key] for key in fields if key != left_out} for left_out in fields]
    wrong += [{**fields, key: other} for key in fields for other in mistyped(fields[key])]
    for other in wrong:
        with pytest.raises(BadMessage):
            requests.decode(json.dumps({"do": name, **other}).encode())


@pytest.mark.parametrize(
    "field",
    [
        ("lost", [[[0]]]),
        ("lost", [[[0, 5, 6]]]),
        ("lost", None),
        ("disks", [None]),
        ("unreplayed", [None]),
        ("ring", -1.0),
        ("ring", False),
    ],
    ids=str,
)
def test_what_is_opened_has_its_form(field: tuple[str, Any]) -> None:
    body = json.dumps({"do": "open", **REQUESTS["open"][1], field[0]: field[1]}).encode()
    with pytest.raises(BadMessage):
        requests.decode(body)


@pytest.mark.parametrize(
    "body",
    [
        *("", "x", "5", "null", "[]", '["do"]', "{}", '{"do": null}', '{"do": ["lstat"]}'),
        *('{"path": "/"}', '{"do": "", "path": "/"}', '{"do": "write", "path": "/"}'),
        *('{"do": "serve"}', '{"do": "__init__"}', '{"do": "Lstat", "path": "/"}'),
    ],
)
def test_a_request_of_no_known_kind_is_refused(body: str) -> None:
    with pytest.raises(BadMessage):
        requests.decode(body.encode())


def served(*bodies: bytes) -> bytes:
    """What a worker says that was given no disks, and is asked this."""
    ours, theirs = os.pipe()
    try:
        for body in bodies:
            os.write(theirs, len(body).to_bytes(4, "big") + body)
        os.close(theirs)
        out = io.BytesIO()
        worker = Worker(Requests(ours), out, [])
        worker._unopened = None  # they were opened
        worker.serve()
        return out.getvalue()
    finally:
        os.close(ours)


def test_the_worker_ends_with_what_is_no_request() -> None:
    assert served() == b""
    for body in (b'{"do": "serve"}', b'{"do": "lstat"}', b'{"do": "lstat", "path": 5}', b"[]"):
        with pytest.raises(BadMessage):
            served(body)


def test_disks_are_opened_once() -> None:
    with pytest.raises(Refused):
        served(requests.encode(requests.Open([], [], [], ring=None, scratch=None)))
