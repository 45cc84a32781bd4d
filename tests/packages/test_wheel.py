"""What is built for PyPI, installed where only the system's own Python modules are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.guests import guest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


def checked(*words: str | Path, cwd: Path) -> str:
    """What a program says, in an environment without the one of these tests."""
    environment = {
        "PATH": os.environ["PATH"].replace(f"{ROOT}/.venv/bin:", ""),
        "HOME": str(Path.home()),
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(cwd),
    }
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, made of what is committed."""
    folder = tmp_path_factory.mktemp("built")
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    (folder / "source").mkdir()
    subprocess.run(["tar", "x"], cwd=folder / "source", input=archive.stdout, check=True)
    checked(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    checked(folder / "venv/bin/pip", "install", "-q", "build", cwd=folder)
    words = ("-m", "build", "--outdir", folder / "dist", folder / "source")
    checked(folder / "venv/bin/python", *words, cwd=folder)
    return folder / "dist"


def test_both_have_the_schemas_and_the_licence(built: Path):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as zipped, tarfile.open(sdist) as tar:
        for names in (zipped.namelist(), tar.getnames()):
            assert any(name.endswith("schemas/ls.json") for name in names)
            assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_reads_and_writes_a_guest(built: Path, tmp_path: Path, kind: str):
    (package,) = built.glob(kind)
    checked("/usr/bin/python3", "-m", "venv", "--system-site-packages", "venv", cwd=tmp_path)
    checked("venv/bin/pip", "install", "-q", package, cwd=tmp_path)
    image = tmp_path / "guest.qcow2"
    checked("cp", "--sparse=always", guest("lvm"), image, cwd=tmp_path)

    def imgtool(*words: str) -> str:
        return checked("venv/bin/imgtool", *words, cwd=tmp_path)

    place = checked(
        "venv/bin/python", "-c", "import imgtool; print(imgtool.__file__)", cwd=tmp_path
    )
    assert Path(place).is_relative_to(tmp_path)
    assert imgtool("--version").startswith("imgtool 0.")
    assert "/dev/debian-vg/root" in imgtool("df", "guest.qcow2")
    assert "sources.list.d" in imgtool("ls", "guest.qcow2", "/etc/apt")
    imgtool("copy-out", "guest.qcow2", "/etc/hostname", "name")
    assert (tmp_path / "name").read_text() == "dead-guest\n"
    (tmp_path / "motd").write_text("hello\n")
    imgtool("copy-in", "guest.qcow2", "motd", "/etc")
    assert imgtool("cat", "guest.qcow2", "/etc/motd") == "hello\n"
    assert json.loads(imgtool("schema", "ls"))["properties"]
