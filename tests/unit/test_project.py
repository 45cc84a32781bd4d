"""Promises about the code itself: layers, licences, sizes, what a command imports."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "imgtool").rglob("*.py"))

# The layers, each allowed to know only those before it. `interrupt` and `mountinfo` need nothing;
# `opening` brings the engines and the images together; `doctor` looks at everything.
LAYERS = (
    *("errors", "interrupt", "said", "scratch", "process", "mountinfo", "image", "guest"),
    *("engines", "opening", "transfer", "compare", "mount", "inject", "doctor", "cli"),
)
# `imgtool` itself is the front door, `python -m imgtool` the back door: they know everything.
DOORS = ("imgtool", "imgtool.__main__")


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and where the import is written."""

    importer: str
    line: int
    imported: str
    for_types_only: bool

    @property
    def package(self) -> str:
        return self.imported.split(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def type_checking_lines(tree: ast.Module) -> set[int]:
    """The lines under `if TYPE_CHECKING:`, which never run."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
    }


def imports_of(path: Path, source: str | None = None) -> Iterator[Import]:
    tree = ast.parse(path.read_text() if source is None else source)
    never_run = type_checking_lines(tree)
    importer = module_name(path)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            start = ".".join([*above, node.module or ""]).rstrip(".")
            base = start if node.level else str(node.module)
            # `from imgtool import interrupt` imports a module, `from x import name` maybe: the
            # longer name tells no lie about the layer.
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(importer, node.lineno, name, node.lineno in never_run)


def all_imports() -> list[Import]:
    return [found for path in MODULES for found in imports_of(path)]


def layer(module: str) -> int | None:
    """Which layer a module of imgtool is in; None for the doors and for other packages."""
    parts = module.split(".")
    if parts[0] != "imgtool" or module in DOORS or len(parts) < 2:
        return None
    return LAYERS.index(parts[1]) if parts[1] in LAYERS else None


def climbs(found: Import) -> bool:
    importer, imported = layer(found.importer), layer(found.imported)
    return importer is not None and imported is not None and imported > importer


def test_every_module_has_a_place_in_the_layers() -> None:
    assert len(MODULES) > 10
    homeless = [
        name for name in map(module_name, MODULES) if name not in DOORS and layer(name) is None
    ]
    assert homeless == []


def test_a_layer_knows_only_the_layers_before_it() -> None:
    assert [str(found) for found in all_imports() if climbs(found)] == []


def test_only_the_command_line_uses_the_front_door() -> None:
    """What `from imgtool import open_guest` gives is for users: further in, it makes a circle."""
    leaning = [
        str(found)
        for found in all_imports()
        if found.importer not in DOORS
        and found.importer.split(".")[1] != "cli"
        and (found.imported == "imgtool" or found.imported.startswith("imgtool."))
        and layer(found.imported) is None
    ]
    assert leaning == []


def test_the_layer_check_sees_upward_imports_in_every_spelling() -> None:
    path = ROOT / "imgtool/image/chain/chain.py"
    upward = ("import imgtool.cli.render", "from imgtool.guest import model", "from ..cli import x")
    for source in (*upward, "def f():\n    from imgtool.engines.direct import client"):
        assert [climbs(found) for found in imports_of(path, source)] == [True], source
    for source in ("from imgtool.host.process import run", "from . import locks", "import json"):
        assert [climbs(found) for found in imports_of(path, source)] == [False], source


def test_parted_is_imported_only_for_host_mounts() -> None:
    """libparted's licence is the GPL: it stays in one corner."""
    elsewhere = [
        str(found)
        for found in all_imports()
        if found.package in ("parted", "_ped") and not found.importer.startswith("imgtool.mount")
    ]
    assert elsewhere == []


def test_pytsk3_is_imported_only_in_the_worker_of_the_direct_engine() -> None:
    elsewhere = [
        str(found)
        for found in all_imports()
        if found.package == "pytsk3" and not found.importer.startswith("imgtool.engines.direct")
    ]
    assert elsewhere == []


def test_programs_are_started_in_one_place() -> None:
    """Limits, a scrubbed environment and the death with imgtool hold for every program."""
    elsewhere = [
        str(found)
        for found in all_imports()
        if found.package in ("subprocess", "multiprocessing", "pty")
        and found.importer != "imgtool.host.process"
        and not found.for_types_only
    ]
    starters = {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp"}
    calls = [
        f"{module_name(path)}:{node.lineno} uses os.{node.attr}"
        for path in MODULES
        # Programs of their own: one becomes QEMU, one starts it in the sandbox.
        if path.name not in ("starter.py", "program.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and (node.attr in starters or node.attr.startswith(("exec", "spawn")))
    ]
    assert elsewhere + calls == []


def test_no_module_grows_past_500_lines() -> None:
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def imported_by_running(*arguments: str) -> set[str]:
    """The packages that `python -m imgtool ARGUMENTS` imports, by what Python itself reports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "imgtool", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(errors)
    return {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }


@pytest.mark.parametrize("arguments", [("--help",), ("ls", "--help")], ids=" ".join)
def test_help_imports_no_binding_and_no_engine(arguments: tuple[str, ...]) -> None:
    imported = imported_by_running(*arguments)
    assert "imgtool" in imported
    assert imported & {"guestfs", "libguestfsmod", "parted", "_ped", "nbd", "libnbdmod"} == set()
    assert "rich" not in imported


def test_setup_builds_on_the_python_of_the_bindings() -> None:
    """pyproject, ruff and mypy agree on the oldest Python that set-up accepts."""
    setup = (ROOT / "scripts/setup.sh").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert "python=/usr/bin/python3 " in setup
    assert "version_info < (3, 11)" in setup
    assert 'requires-python = ">=3.11"' in project


@pytest.mark.parametrize("script", ["setup.sh", "check.sh", "test.sh", "build-docs"])
def test_scripts_stop_at_the_first_error_and_can_be_run(script: str) -> None:
    path = ROOT / "scripts" / script
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()
