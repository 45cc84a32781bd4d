"""What is missing is named with the command that installs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imgtool.engines import fallback
from imgtool.engines.direct.parent import sandbox
from imgtool.engines.direct.wire.refusals import NotInstalled
from imgtool.engines.libguestfs.appliance import launch
from imgtool.errors import HostError
from imgtool.host import process
from imgtool.host.system_packages import PACKAGES, binding_fix, install_program
from imgtool.image.qemu import nbd


@pytest.mark.parametrize("program", PACKAGES)
def test_the_package_has_the_program(program):
    there = process.find(program)
    if there is None:
        pytest.skip(f"{program} is not installed here")
    # What a link of the alternatives leads to, and both names of a merged /usr.
    within = there.removeprefix("/usr")
    names = {there, str(Path(there).resolve()), within, f"/usr{within}"}
    done = subprocess.run(["dpkg", "-S", *names], capture_output=True, text=True, check=False)
    owners = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert owners & set(PACKAGES[program].split())
    assert install_program(program) == f"sudo apt-get install {PACKAGES[program]}"


def test_a_program_that_is_not_there_comes_with_the_command(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError) as error:
        process.run(["qemu-img", "--version"])
    assert error.value.hint == "sudo apt-get install qemu-utils"


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("guestfs", "python3-guestfs", launch._bindings),
        ("nbd", "python3-libnbd", nbd._binding),
    ],
)
def test_a_binding_that_is_not_there_comes_with_the_command(monkeypatch, module, package, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(HostError) as error:
        call()
    assert error.value.hint == binding_fix(package) == f"sudo apt-get install {package}"


def test_environment_without_system_modules_is_said_to_be_so(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/somewhere/site-packages"])
    assert "--system-site-packages" in binding_fix("python3-libnbd")
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    assert "/usr/bin/python3 only" in binding_fix("python3-libnbd")


def test_the_direct_engine_names_the_package_of_what_it_lacks(monkeypatch):
    monkeypatch.setattr(sandbox, "find", lambda program: None)
    with pytest.raises(NotInstalled, match=r"qemu-nbd .*\(sudo apt-get install qemu-utils\)"):
        sandbox._program("qemu-nbd")
    monkeypatch.setattr(sandbox, "find_spec", lambda module: None)
    with pytest.raises(NotInstalled, match=r"nbd .*\(sudo apt-get install python3-libnbd\)"):
        sandbox._module_folders(("nbd",))


def test_a_host_that_lacks_something_is_no_fault_of_the_image():
    """Without another engine, and with one that lacks something too."""
    import contextlib

    def lacking():
        raise NotInstalled("the Python module nbd is not installed (FIX)")

    def lacking_too():
        raise HostError("no bindings", hint="OTHER FIX")

    with contextlib.ExitStack() as stack, pytest.raises(HostError, match=r"nbd .* \(FIX\)"):
        fallback.ChosenGuest(stack, lacking, None, image="disk")
    with contextlib.ExitStack() as stack, pytest.raises(HostError) as error:
        fallback.ChosenGuest(stack, lacking, lacking_too, image="disk")
    assert "no bindings" in error.value.message
    assert "nbd is not installed (FIX)" in error.value.message
    assert error.value.hint == "OTHER FIX"
