"""Promises about the code itself: layers, licences, sizes, what a command imports."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgtool.engines.direct.parent import sandbox

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "imgtool").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# The rooms, each allowed to know only those before it, and itself. `opening` brings the engines and
# the images together; `doctor` looks at everything.
ROOMS = (
    *("errors", "text", "host", "formats"),
    *("image.locking.held", "image.policy", "image.locking", "image.headers", "image.intent"),
    *("image.chain", "image.qemu", "image.checks", "image.change", "guest"),
    *("engines.direct.wire", "engines.direct.worker", "engines.direct.replay.inside"),
    *("engines.parted.confined", "engines.direct.parent", "engines.parted.parent"),
    *("engines.libguestfs.appliance", "engines.libguestfs.guest"),
    *("engines.libguestfs.write", "engines.fallback", "opening"),
    *("search", "transfer", "compare", "mount", "inject", "doctor", "cli"),
)
# What starts the replay is the host's side, and in its room.
SAME_ROOM = {"engines.direct.replay.host": "engines.direct.parent"}
# Packages that hold rooms and nothing else.
HALLS = (
    *("image", "engines", "engines.direct", "engines.direct.replay", "engines.parted"),
    "engines.libguestfs",
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


@functools.cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for path in MODULES for found in imports_of(path))


def room(module: str) -> int | None:
    """Which room a module of imgtool is in; None for the doors, halls and other packages."""
    if not module.startswith("imgtool.") or module in DOORS:
        return None
    name = module.removeprefix("imgtool.")
    name = next((at for inside, at in SAME_ROOM.items() if is_in(name, inside)), name)
    return next((place for place, at in enumerate(ROOMS) if is_in(name, at)), None)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def climbs(found: Import) -> bool:
    importer, imported = room(found.importer), room(found.imported)
    upward = importer is not None and imported is not None and imported > importer
    return upward and not found.for_types_only


def test_every_module_is_in_a_room() -> None:
    assert len(MODULES) > 10
    halls = [*DOORS, *(f"imgtool.{hall}" for hall in HALLS)]
    homeless = [
        name for name in map(module_name, MODULES) if name not in halls and room(name) is None
    ]
    assert homeless == []
    assert [
        hall
        for hall in HALLS
        if len(Path(ROOT, "imgtool", *hall.split("."), "__init__.py").read_text().splitlines()) > 5
    ] == []


def test_a_room_knows_only_the_rooms_before_it() -> None:
    assert [str(found) for found in all_imports() if climbs(found)] == []


def test_only_the_command_line_uses_the_front_door() -> None:
    """What `from imgtool import open_guest` gives is for users: further in, it makes a circle."""
    leaning = [
        str(found)
        for found in all_imports()
        if found.importer not in DOORS
        and found.importer.split(".")[1] != "cli"
        and (found.imported == "imgtool" or found.imported.startswith("imgtool."))
        and room(found.imported) is None
        and found.imported.removeprefix("imgtool.").split(".")[0] not in ("image", "engines")
    ]
    assert leaning == []


def test_rooms_check_sees_upward_imports_in_every_spelling() -> None:
    path = ROOT / "imgtool/image/chain/chain.py"
    upward = (
        "import imgtool.cli.render",
        "from imgtool.guest import model",
        "from ...cli import x",
        "from imgtool.image.change import plan",
        "from ..checks.findings import between",
    )
    for source in (*upward, "def f():\n    from imgtool.engines.direct.parent import client"):
        assert [climbs(found) for found in imports_of(path, source)] == [True], source
    for source in ("from imgtool.host.process import run", "from . import info", "import json"):
        assert [climbs(found) for found in imports_of(path, source)] == [False], source


# What the sandbox's programs may import: what both sides share, parsers, what a guest is made of.
CONFINED = ("engines.direct.worker", "engines.direct.replay.inside", "engines.parted.confined")
SHARED = (
    *("engines.direct.wire", "formats", "errors"),
    *("guest.blocks", "guest.model", "guest.operating_system", "guest.packages"),
)
REPLAY = ("host.process", "host.interrupt")  # it starts qemu-img
PURE = ("errors", "text", "formats")


def outside(
    importers: tuple[str, ...], allowed: tuple[str, ...], source: str | None = None
) -> list[str]:
    """Imports of imgtool's own by the modules in `importers` that are not of what is `allowed`."""
    found = []
    for path in MODULES:
        name = module_name(path).removeprefix("imgtool.")
        if any(is_in(name, importer) for importer in importers):
            found += [one for one in imports_of(path, source) if one.package == "imgtool"]
    return sorted(
        {
            str(one)
            for one in found
            if not any(
                is_in(one.imported.removeprefix("imgtool."), at) for at in (*importers, *allowed)
            )
        }
    )


def test_what_is_confined_imports_only_what_is_in_the_sandbox() -> None:
    assert outside(CONFINED[:1], SHARED) == []
    assert outside(CONFINED, (*SHARED, *REPLAY)) == []
    assert outside(("formats",), PURE) == []
    # That this can fail:
    assert outside(CONFINED[:1], SHARED, "from imgtool.image.chain.chain import Chain") != []
    assert outside(("formats",), PURE, "import imgtool.host.process") != []


def test_sandbox_has_the_modules_that_run_in_it_and_no_others() -> None:
    known = {module_name(path): path for path in MODULES}
    left = [name for name in known if any(is_in(name, f"imgtool.{at}") for at in CONFINED)]
    used = set()
    while left:
        name = left.pop()
        used |= {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 2)}
        found = [one.imported for one in imports_of(known[name]) if not one.for_types_only]
        named = {one if one in known else one.rpartition(".")[0] for one in found}
        left += [one for one in named if one in known and one not in used]
    bound = {name for name in known for at in sandbox.CONFINED if is_bound(known[name], at)}
    assert used - bound == set()
    # Whole folders are bound: of those one module at least is used.
    assert [at for at in sandbox.CONFINED if not any(is_bound(known[n], at) for n in used)] == []


def is_bound(path: Path, name: str) -> bool:
    return path.is_relative_to(ROOT / "imgtool" / name)


def test_the_host_never_imports_what_is_confined() -> None:
    inside = [
        str(found)
        for found in all_imports()
        if not any(is_in(found.importer.removeprefix("imgtool."), at) for at in CONFINED)
        and any(is_in(found.imported.removeprefix("imgtool."), at) for at in CONFINED)
    ]
    assert inside == []


def test_copies_and_steps_write_by_the_interface_of_guests() -> None:
    engines = [
        str(found)
        for found in all_imports()
        if found.importer.startswith(("imgtool.transfer", "imgtool.inject"))
        and found.imported.startswith("imgtool.engines")
    ]
    assert engines == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = {module_name(path) for path in MODULES}
    graph: dict[str, set[str]] = {name: set() for name in known}
    for found in all_imports():
        target = found.imported if found.imported in known else found.imported.rpartition(".")[0]
        if target in known and target != found.importer and not found.for_types_only:
            graph[found.importer].add(target)
    size = None
    while size != len(graph):  # who imports none that is left, or is imported by none
        size = len(graph)
        used = set().union(*graph.values()) & set(graph)
        graph = {name: targets & set(graph) for name, targets in graph.items() if name in used}
        graph = {name: targets for name, targets in graph.items() if targets}
    assert sorted(graph) == []


def test_parted_is_imported_only_in_its_sandbox() -> None:
    """libparted is C, meets hostile tables, and its licence is the GPL: it stays in one corner."""
    importers = {
        found.importer.rpartition(".")[0]
        for found in all_imports()
        if found.package in ("parted", "_ped")
    }
    assert importers == {"imgtool.engines.parted.confined"}


def unused_dependencies(project: str) -> list[str]:
    """What pyproject.toml depends on and no code imports."""
    modules = {"pyparted": "_ped", "PyYAML": "yaml", "google-crc32c": "google_crc32c"}
    wanted = tomllib.loads(project)["project"]["dependencies"]
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in wanted]
    used = {found.package for found in all_imports() if not found.for_types_only}
    return [name for name in names if modules.get(name, name) not in used]


def test_every_dependency_is_used() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert unused_dependencies(project) == []
    # That this can fail:
    more = project.replace("dependencies = [", 'dependencies = ["requests>=2",', 1)
    assert unused_dependencies(more) == ["requests"]


def test_pytsk3_is_imported_only_in_the_direct_engines_worker() -> None:
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
        if path.name not in ("starter.py", "launcher.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and (node.attr in starters or node.attr.startswith(("exec", "spawn")))
    ]
    assert elsewhere + calls == []


# Where a value may be of any type: what libraries without types give, and what they call. A folder
# stands for all in it.
UNTYPED = {
    "engines/libguestfs": "handles of libguestfs",
    "opening.py": "handles of libguestfs",
    "engines/direct/worker/sources.py": "handles of libnbd",
    "image/qemu/nbd.py": "handles of libnbd",
    "engines/direct/worker/signatures.py": "ctypes",
    "engines/parted/confined/__main__.py": "pyparted",
    "cli/__init__.py": "parsers of Typer",
    "cli/help_text.py": "parsers of Typer",
    "cli/commands/helping.py": "parsers of Typer",
    "cli/guest_command.py": "values that Typer has parsed by an option's annotation",
    "cli/completing.py": "values that Typer has parsed by an option's annotation",
    "inject/yaml_lines.py": "values of YAML",
    "inject/spec.py": "errors of jsonschema",
    "inject/steps/step.py": "values of YAML that fit a step's schema",
    "transfer/copy_out.py": "values of marshal",
}


def uses_any(source: str) -> bool:
    return any(
        (isinstance(node, ast.Name) and node.id == "Any")
        or (isinstance(node, ast.Attribute) and node.attr == "Any")
        for node in ast.walk(ast.parse(source))
    )


def test_values_of_any_type_are_at_the_edges_alone() -> None:
    using = [
        str(path.relative_to(ROOT / "imgtool")) for path in MODULES if uses_any(path.read_text())
    ]
    places = {
        at: [name for name in using if name == at or name.startswith(f"{at}/")] for at in UNTYPED
    }
    assert sorted(set(using).difference(*places.values())) == []
    assert [at for at in UNTYPED if not places[at]] == []


def test_the_check_of_any_sees_it_in_every_spelling() -> None:
    for use in ("x: Any = 5", "def f(x: list[Any]): pass", "import typing as t\nx: t.Any = 5"):
        assert uses_any(use), use
    for other in ("Anybody = 5", '"""Any value."""', "x: object = any([])"):
        assert not uses_any(other), other


def test_no_module_grows_past_500_lines() -> None:
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def defined_tests(tree: ast.Module) -> Iterator[str]:
    """The tests of a file, those of a class as CLASS.NAME; what is defined twice comes twice."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef):
            scope = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and child.name.startswith("test"):
                    yield scope + child.name


def long_names(names: Iterable[str]) -> list[str]:
    return [name for name in names if len(name.rpartition(".")[2]) >= 60]


def hidden_tests(names: Iterable[str]) -> list[str]:
    """Tests that never run, since a later one in the same file has the same name."""
    return [name for name, count in Counter(names).items() if count > 1]


def test_names_of_tests_are_short_and_each_its_own() -> None:
    wrong = {}
    for path in TESTS:
        names = list(defined_tests(ast.parse(path.read_text())))
        wrong[str(path.relative_to(ROOT))] = long_names(names) + hidden_tests(names)
    assert {path: names for path, names in wrong.items() if names} == {}


def test_check_of_names_sees_long_and_hidden_ones() -> None:
    longest, longer = "test_" + "x" * 54, "test_" + "x" * 55
    source = f"""
def {longest}(): pass
def {longer}(): pass
@pytest.mark.parametrize("x", [1])
def test_twice(x): pass
class TestThese:
    def {longer}(self): pass
    def {longest}(self): pass
    def test_again(self): pass
    def test_again(self): pass
def test_twice(): pass
"""
    names = list(defined_tests(ast.parse(source)))
    assert sorted(long_names(names)) == sorted([longer, f"TestThese.{longer}"])
    assert sorted(hidden_tests(names)) == ["TestThese.test_again", "test_twice"]


def imported_by_running(*arguments: str) -> set[str]:
    """The modules that `python -m imgtool ARGUMENTS` imports, by what Python itself reports."""
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
        line.rsplit("|", 1)[1].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("ls", "--help"), ("inject", "--help")], ids=" ".join
)
def test_help_imports_no_binding_and_no_engine(arguments: tuple[str, ...]) -> None:
    modules = imported_by_running(*arguments)
    imported = {name.split(".")[0] for name in modules}
    assert "imgtool" in imported
    assert [name for name in modules if name.startswith("imgtool.engines")] == []
    assert imported & {"guestfs", "libguestfsmod", "parted", "_ped", "nbd", "libnbdmod"} == set()
    assert imported & {"yaml", "jsonschema"} == set()
    assert "rich" not in imported


def test_setup_builds_on_the_python_of_the_bindings() -> None:
    """pyproject, ruff and mypy agree on the oldest Python that set-up accepts."""
    setup = (ROOT / "scripts/setup.sh").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert "python=/usr/bin/python3 " in setup
    assert "version_info < (3, 11)" in setup
    assert 'requires-python = ">=3.11"' in project


@pytest.mark.parametrize(
    "script", ["setup.sh", "check.sh", "test.sh", "build-docs", "build-completions"]
)
def test_scripts_stop_at_the_first_error_and_can_be_run(script: str) -> None:
    path = ROOT / "scripts" / script
    assert os.access(path, os.X_OK)
    assert "\nset -euo pipefail\n" in path.read_text()
