"""A launch that hangs, as it does where /dev/kvm is there and broken, ends at its limit."""

from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from imgtool.engines.libguestfs.appliance import launch
from imgtool.host.process import processes_naming

# What libguestfs asks of QEMU before the launch is answered by QEMU; the appliance never starts.
QEMU = """#!{python}
import os, sys, time
if any("guestfs_identifier" in word for word in sys.argv):
    time.sleep(600)
os.execv({qemu!r}, sys.argv)
"""


@pytest.fixture
def handle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    qemu = shutil.which("qemu-system-x86_64") or shutil.which("qemu-system-aarch64")
    assert qemu is not None, "QEMU is not installed: scripts/setup.sh"
    wrapper = tmp_path / "qemu"
    wrapper.write_text(QEMU.format(python=sys.executable, qemu=qemu))
    wrapper.chmod(0o755)
    monkeypatch.setenv("LIBGUESTFS_HV", str(wrapper))
    monkeypatch.setenv("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
    monkeypatch.setenv("LIBGUESTFS_APPEND", "of_the_user=1")
    handle = launch.new_handle()
    handle.add_drive_scratch(1 << 20)
    yield handle
    handle.close()


def test_the_limit_ends_it(handle) -> None:
    name = handle.get_identifier()
    with pytest.raises(RuntimeError):
        launch._try(handle, 1.0)
    assert processes_naming(f"guestfs_identifier={name}") == []


def test_the_limit_ends_also_what_comes_after_the_launch(monkeypatch) -> None:
    """A saved appliance that hangs once it continues."""
    killed = threading.Event()

    class Launched:
        def launch(self) -> None:
            pass

    def hangs(handle: Launched) -> None:
        if not killed.wait(30):
            pytest.fail("nobody stops it")
        raise RuntimeError("the appliance is gone")

    handle = Launched()
    monkeypatch.setattr(launch, "kill", lambda handle: killed.set())
    monkeypatch.setitem(launch._watches, handle, SimpleNamespace(start=lambda: None))
    with pytest.raises(RuntimeError, match="is gone"):
        launch._try(handle, 0.2, hangs)


def test_what_the_user_appends_stays(handle) -> None:
    assert handle.get_append().endswith(" of_the_user=1")
