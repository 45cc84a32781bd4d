"""Which engine answers: the direct one as long as it accepts, and the appliance without a seam."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from imgtool.engines.direct.parent.client import WorkerFailed
from imgtool.engines.direct.wire.refusals import NoSandbox, Unsupported
from imgtool.engines.fallback import ChosenGuest
from imgtool.errors import EngineError, HostError, ImageError, Interrupted, NotInGuestError
from imgtool.guest.model import Entry
from imgtool.host import interrupt


def entry(name: str) -> Entry:
    return Entry(f"/{name}".encode(), 0o100644, 0, 0, 0, 0)


class Engine:
    """A guest that says who it is, and refuses what it is told to refuse."""

    def __init__(self, name: str, refuses: Exception | None = None) -> None:
        self.engine = name
        self.refuses = refuses
        self.closed = False

    def _check(self) -> None:
        if self.refuses is not None:
            raise self.refuses

    def lstat(self, path: str) -> Entry:
        self._check()
        return entry(self.engine)

    def walk(self, path: str, **options: Any) -> Iterator[Entry]:
        self._check()
        yield entry(self.engine)
        yield entry("second")

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[io.BytesIO]:
        self._check()
        yield io.BytesIO(self.engine.encode())


@pytest.fixture
def made() -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def make(
            refuses: Exception | None = None,
            opening: Exception | None = None,
            appliance: bool = True,
            launching: Exception | None = None,
        ) -> Any:
            direct, other = Engine("direct", refuses), Engine("libguestfs")
            launches: list[Engine] = []

            @contextlib.contextmanager
            def open_direct() -> Iterator[Any]:
                if opening is not None:
                    raise opening
                yield direct
                direct.closed = True

            @contextlib.contextmanager
            def launch() -> Iterator[Any]:
                if launching is not None:
                    raise launching
                launches.append(other)
                yield other

            guest = ChosenGuest(stack, open_direct, launch if appliance else None, image="disk")
            return SimpleNamespace(guest=guest, direct=direct, launches=launches)

        yield make


def test_no_appliance_is_started_where_none_is_needed(made):
    chosen = made()
    assert chosen.guest.lstat("/x").name == b"direct"
    assert chosen.guest.engine == "direct"
    assert chosen.launches == []


@pytest.mark.usefixtures("worker_may_fail")
@pytest.mark.parametrize(
    "reason", [Unsupported("it is btrfs"), WorkerFailed("it died")], ids=["refusal", "failure"]
)
def test_a_refusal_is_answered_by_the_appliance(made, reason):
    for chosen in (made(refuses=reason), made(opening=reason)):
        assert [found.name for found in chosen.guest.walk("/")] == [b"libguestfs", b"second"]
        with chosen.guest.open("/x") as stream:
            assert stream.read() == b"libguestfs"
        assert chosen.guest.engine == "libguestfs"
        assert len(chosen.launches) == 1


@pytest.mark.parametrize("appliance", [True, False])
def test_failed_worker_ends_the_command_under_test(made, appliance):
    reason = WorkerFailed("it died")
    with pytest.raises(WorkerFailed, match="it died"):
        made(opening=reason, appliance=appliance)
    chosen = made(refuses=reason, appliance=appliance)
    with pytest.raises(WorkerFailed, match="it died"):
        chosen.guest.lstat("/x")
    with pytest.raises(WorkerFailed, match="it died"):
        list(chosen.guest.walk("/"))
    assert chosen.launches == []


def test_the_sandbox_is_gone_before_the_appliance_starts(made):
    chosen = made(refuses=Unsupported("no"))
    chosen.guest.lstat("/x")
    assert chosen.direct.closed


def test_refusal_without_the_appliance_is_an_error(made):
    with pytest.raises(ImageError, match="it is btrfs"):
        made(refuses=Unsupported("it is btrfs"), appliance=False).guest.lstat("/x")
    with pytest.raises(ImageError, match="it is btrfs"):
        made(opening=Unsupported("it is btrfs"), appliance=False)


def test_host_without_sandbox_and_appliance_cannot_do_it(made, monkeypatch):
    reason = "no sandbox can be had (namespaces: they are not allowed)"
    with pytest.raises(HostError, match="no sandbox can be had") as failed:
        made(opening=NoSandbox(reason), appliance=False)
    assert failed.value.status == 6
    assert "doctor" in (failed.value.hint or "")
    # Where the appliance cannot be had either, both reasons are said.
    with pytest.raises(
        HostError, match=r"no kernel in /boot; and .* no sandbox can be had"
    ) as failed:
        made(opening=NoSandbox(reason), launching=HostError("no kernel in /boot", hint="install"))
    assert (failed.value.status, failed.value.hint) == (6, "install")
    assert made(opening=NoSandbox(reason)).guest.lstat("/x").name == b"libguestfs"


def test_what_is_not_in_the_guest_needs_no_second_opinion(made):
    chosen = made(refuses=NotInGuestError("no such file"))
    with pytest.raises(NotInGuestError):
        chosen.guest.lstat("/x")
    assert chosen.launches == []


def test_nothing_is_said_twice_if_a_refusal_comes_late(made):
    chosen = made()

    def late(path: str, **options: Any) -> Iterator[Entry]:
        yield entry("first")
        raise Unsupported("too late")

    chosen.direct.walk = late
    found = chosen.guest.walk("/")
    assert next(found).name == b"first"
    with pytest.raises(EngineError, match="too late"):
        next(found)
    assert chosen.launches == []


def test_no_appliance_is_started_after_ctrl_c(made, monkeypatch):
    chosen = made(refuses=Unsupported("it is btrfs"))
    monkeypatch.setattr(interrupt, "pending", lambda: True)
    with pytest.raises(Interrupted):
        chosen.guest.lstat("/x")
    assert chosen.launches == []


@pytest.mark.parametrize(
    ("subformat", "size", "where"),
    [
        ("monolithicFlat", "1M", "in a file of their own"),
        ("twoGbMaxExtentSparse", "1M", "in a file of their own"),
        ("twoGbMaxExtentSparse", "5G", "in 3 files of their own"),
    ],
)
def test_vmdk_in_other_files_is_refused_with_their_count(
    tmp_path, imgtool_cli, subformat, size, where
):
    image = tmp_path / "disk.vmdk"
    words = ["qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", image, size]
    subprocess.run(words, check=True)
    done = imgtool_cli("filesystems", image, "--engine", "direct")
    assert done.status == 3
    assert f"a VMDK whose data are {where} (" in done.err


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized"])
def test_a_vmdk_in_one_file_is_read(tmp_path, imgtool_cli, subformat):
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.vmdk"
    subprocess.run(["mke2fs", "-q", "-t", "ext2", raw, "4M"], check=True)
    words = ["convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, image]
    subprocess.run(["qemu-img", *words], check=True)
    done = imgtool_cli("filesystems", image, "--engine", "direct", "-o", "json")
    assert (done.status, done.err) == (0, "")
    assert [row["type"] for row in json.loads(done.text)] == ["ext2"]
