"""Tables of the documentation are those of the code: nothing is missing, and nothing is there that
the code does not know."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from email.utils import parsedate_to_datetime

import pytest

import imgtool
from imgtool.cli.commands import (
    appliance,
    chain_checks,
    chains,
    diffing,
    finding,
    images,
    injected,
    inspecting,
    listing,
    looking,
    measuring,
    mounting,
    single,
    snapshotting,
    space,
)
from imgtool.engines.direct.worker.fs import registry
from imgtool.errors import ExitStatus, Reason
from imgtool.formats import foreign_tables
from imgtool.image.chain.info import FORMATS
from tests.support.documentation import DOCS, ROOT, whole

_REASONS = "## Reasons of --force"
CODE = sorted((ROOT / "imgtool").rglob("*.py"))


def section(page: str, heading: str) -> str:
    """What a page says below a heading, up to the next one of its level or higher."""
    level = heading.split()[0]
    text = whole(DOCS / page)
    assert f"\n{heading}\n" in text, f"{page} has no {heading}"
    below = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"\n#{{1,{len(level)}}} ", below)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of the rows of the tables in a text, without the heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = [at for at, row in enumerate(cells) if set(row[0]) == {"-"}]
    return [row for at, row in enumerate(cells) if at not in heads and at + 1 not in heads]


def words(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_exit_statuses():
    numbers = {int(status) for status in ExitStatus}
    assert {int(row[0]) for row in rows((DOCS / "reference/exit-status.md").read_text())} == numbers
    manual = section("reference/imgtool.md", "## Exit status")
    assert {int(number) for number in re.findall(r"^(\d+)$", manual, re.M)} == numbers


def test_reasons_of_force():
    every = [f"`{reason}`\n: {reason.without}." for reason in Reason]
    for text in (whole(DOCS / "reference/reasons.md"), section("reference/imgtool.md", _REASONS)):
        assert re.findall(r"^`.*`\n: .*$", text, re.M) == every
    assert [reason for reason in Reason if not reason.without] == []


def test_variables_of_the_environment():
    named = set(words((DOCS / "reference/environment.md").read_text()))
    read = {
        variable
        for path in CODE
        for variable in re.findall(r"\"(IMGTOOL_[A-Z_]+)\"", path.read_text())
    }
    assert read - {"IMGTOOL_COMPLETE"} <= named  # the parser's own
    own = {word for word in named if re.fullmatch(r"IMGTOOL_[A-Z_]+", word)}
    assert own - {"IMGTOOL_GUESTS"} <= read  # of scripts


def test_image_formats():
    table = rows(section("reference/formats.md", "## Image formats"))
    assert {words(row[0])[0] for row in table} == set(FORMATS)
    made = section("reference/formats.md", "## Image formats").split("`imgtool convert` make ")[1]
    assert set(words(made.split("\n\n")[0])) == {str(one) for one in single.MadeFormat}


def test_formats_that_are_written_in_place():
    """The table says yes where the code has a way, and names each kind of VMDK."""
    from imgtool.image.chain import writable

    listed = rows(section("reference/formats.md", "## Image formats"))
    table = {words(row[0])[0]: row[2] for row in listed}
    for format in FORMATS:
        refused = writable._TABLE[format] in (writable._qcow, writable._vhdx)
        assert (table[format] == "no") == refused, format
    assert set(writable._VMDK_KINDS) <= set(re.findall(r"\w+", table["vmdk"]))


def test_filesystems_that_are_read_directly():
    table = rows(section("reference/formats.md", "## Filesystems"))
    directly = {words(row[0])[0] for row in table if row[1].startswith("yes")}
    assert directly == set(registry.READERS)


def test_partition_tables_that_are_named():
    text = section("reference/formats.md", "## Partition tables and volumes")
    (row,) = [row for row in rows(text) if row[0].startswith("tables of ")]
    titles = set(re.split(r", | and ", row[0].removeprefix("tables of ")))
    assert titles == set(foreign_tables.TITLES.values())
    named = section("reference/commands/partitions.md", "## Fields").split("`table`\n: ")[1]
    assert set(words(named.split(", whose")[0])) == {"gpt", "msdos", "none", *foreign_tables.TITLES}


def test_mechanisms_of_mount():
    page = (DOCS / "howto/mount-on-the-host.md").read_text()
    assert {words(row[0])[0] for row in rows(page)} == {str(one) for one in mounting.Via} - {"auto"}


def test_findings_of_chain_check():
    """Every `what` of a finding, with its severity where the code has one for it."""
    found: dict[str, set[str]] = {}
    for path in CODE:
        for severity, what in re.findall(
            r"\"(risk|warning|note)\",\s*\"([a-z]+(?:-[a-z]+)*)\",", path.read_text()
        ):
            if what not in ("risk", "warning", "note"):
                found.setdefault(what, set()).add(severity)
    assert len(found) > 15
    text = section("reference/commands/chain.md", "## What is found")
    said = dict(re.findall(r"^`([a-z-]+)` \((\w+)\)$", text, re.M))
    for what, severities in found.items():
        assert said.get(what) in severities, what
    code = "\n".join(path.read_text() for path in CODE)
    assert [what for what in said if f'"{what}"' not in code] == []


FIELDS = {
    ("df", "## Fields"): space.DF_FIELDS,
    ("filesystems", "## Fields"): space.FILESYSTEM_FIELDS,
    ("partitions", "## Fields"): space.PARTITION_FIELDS,
    ("ls", "## Fields"): (*listing.FIELDS, "inode", "xattrs"),
    ("find", "## Fields"): finding.MATCH_FIELDS,
    ("du", "## Fields"): measuring.FIELDS,
    ("stat", "## Fields"): looking.STAT_FIELDS,
    ("inspect", "## Fields"): inspecting.FIELDS,
    ("doctor", "## Fields"): inspecting.DOCTOR_FIELDS,
    ("diff", "## Fields"): (*diffing.FIELDS, *diffing.XATTRS),
    ("inject", "## Fields"): injected.FIELDS,
    ("mounts", "## Fields"): mounting.FIELDS,
    ("info", "## Fields"): images.FIELDS,
    ("check", "## Fields"): single.CHECK_FIELDS,
    ("snapshot", "## Fields of snapshot list"): snapshotting.FIELDS,
    ("appliance", "## Fields of appliance list"): appliance.FIELDS,
    ("chain", "## Fields of chain show"): chains.SHOW_FIELDS,
    ("chain", "## Fields of chain tree"): chains.TREE_FIELDS,
    ("chain", "## Fields of chain check"): chain_checks.FIELDS,
}


@pytest.mark.parametrize("where", FIELDS, ids=lambda where: f"{where[0]}-{where[1].split()[-1]}")
def test_fields(where):
    text = section(f"reference/commands/{where[0]}.md", where[1])
    terms = [line for line in text.splitlines() if re.fullmatch(r"(`\w+` ?)+", line)]
    assert sorted(words(" ".join(terms))) == sorted(FIELDS[where])


def _templates(node: ast.expr) -> list[str]:
    """What an expression may be as text, with `...` for what is filled in."""
    match node:
        case ast.Constant(value=str() as text):
            return [text]
        case ast.JoinedStr(values=parts):
            every = [_templates(part) or ["..."] for part in parts]
            return ["".join(one) for one in itertools.product(*every)]
        case ast.FormattedValue(value=value):
            return _templates(value) if isinstance(value, ast.IfExp) else ["..."]
        case ast.IfExp(body=first, orelse=second):
            return _templates(first) + _templates(second)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            pairs = itertools.product(_templates(left) or [""], _templates(right) or [""])
            return ["".join(pair) for pair in pairs]
        case _:
            return ["..."]


def texts() -> set[str]:
    """Every text in the code."""
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return {
        " ".join(template.split())
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
        for template in _templates(node)
    }


def _headings() -> list[str]:
    return re.findall(r"^### `(.+)`$", (DOCS / "messages.md").read_text(), re.M)


@pytest.fixture(scope="module")
def every_text() -> set[str]:
    return texts()


@pytest.mark.parametrize("message", _headings())
def test_a_message_is_one_of_the_code(every_text, message):
    """Word for word; `...` stands for what is filled in, or for words that the code has a choice
    of. What the code puts together of a variable and an end is found by the end."""
    pattern = re.compile(r".+".join(re.escape(part) for part in message.split("...")))
    ends = {f"...{message[at:]}" for at in range(len(message) - 9)}
    assert any(pattern.fullmatch(text) for text in every_text) or ends & every_text


def test_a_message_that_is_not_in_the_code_is_found(every_text):
    assert "the disk is on fire" not in every_text


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_changelog_has_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.split(r"^## ", text, flags=re.M)[1:]
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for release in releases:
        head, *sections = re.split(r"^### ", release, flags=re.M)
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - (unreleased|\d{4}-\d\d-\d\d)\s*", head)
        for one in sections:
            kind, entries = one.split("\n", 1)
            assert kind in kinds
            assert entries.strip().startswith("- ")
    assert f"## [{imgtool.__version__}] - " in text


@pytest.mark.parametrize("page", ["architecture", "adding"])
def test_modules_and_folders_that_development_names_are_there(page: str) -> None:
    text = (DOCS / f"development/{page}.md").read_text()
    text = text.partition("## Rooms for what is not there yet")[0]
    named = {
        word for word in re.findall(r"`([\w./]+)`", text) if "/" in word or word.endswith(".py")
    }
    assert len(named) > 10
    there = [f"/{path.relative_to(ROOT)}" + "/" * path.is_dir() for path in ROOT.rglob("[a-z_]*")]
    missing = [word for word in named if not any(path.endswith(f"/{word}") for path in there)]
    assert [word for word in missing if "NAME" not in word] == []


def test_the_version_is_the_same_everywhere():
    """In the package, what is installed from it, the changelogs, and in one place only."""
    text = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.findall(r"^## \[(.*)\] - (.*)$", text, re.M)[0]
    assert version == imgtool.__version__
    found = re.match(r"imgtool \((.*)\)", (ROOT / "debian/changelog").read_text())
    assert found and found[1] == version
    signed = re.search(r"^ -- .*>  (.*)$", (ROOT / "debian/changelog").read_text(), re.M)
    assert signed and parsedate_to_datetime(signed[1]).date().isoformat() == date
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "imgtool.__version__"


def test_the_package_carries_what_the_project_asks_for():
    """Of the modules that pyproject.toml names, the Debian package has each as new as that."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[<>=]", name)[0]: name for name in project["dependencies"]}
    private = (ROOT / "debian/private.txt").read_text()
    control = (ROOT / "debian/control").read_text().partition("Package: imgtool")[2]
    names = {"pyparted": "parted", "google-crc32c": "crc32c", "PyYAML": "yaml"}
    for name in asked:
        package = rf"python3-{names.get(name, name)}\b"
        assert re.search(package, control) or f"{name}==" in private, name
    carried = re.search(r"^typer==([\d.]+)", private, re.M)
    assert carried
    numbers = tuple(map(int, carried[1].split(".")[:2]))
    low, high = re.findall(r"\d+\.\d+", asked["typer"])
    assert tuple(map(int, low.split("."))) <= numbers < tuple(map(int, high.split(".")))
