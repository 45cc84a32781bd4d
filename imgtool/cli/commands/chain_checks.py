"""`chain check`."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgtool.cli import options, render
from imgtool.cli.commands.chains import image_count, name, not_read
from imgtool.cli.guest_command import plain_command
from imgtool.cli.output import Output
from imgtool.cli.session import Common, Failures, warning
from imgtool.errors import ExitStatus, ImageError, UsageError

if TYPE_CHECKING:
    from imgtool.image.checks.checking import ChainCheck
    from imgtool.image.checks.findings import Finding

FIELDS = ("path", "severity", "what", "means", "do")
_IMAGE_SUFFIXES = (
    *(".raw", ".img", ".dd", ".iso", ".qcow", ".qcow2", ".qed"),
    *(".vdi", ".vhd", ".vhdx", ".vmdk", ".vpc"),
)
_NOT_LOOKED_AT = ("outside", "not-local")


@plain_command("format", "backing_dirs")
def check(
    common: Common,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|DIR...", help="Images, or folders of them.")
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Only headers: the tables of the images are not read.")
    ] = False,
    output: options.OutputOption = Output.table,
) -> None:
    """Say what is wrong with a chain, what it means and what to do.

    Nothing is changed. Of a folder, every image in it and below.

    \b
    Examples:
      imgtool chain check tuesday.qcow2
      imgtool chain check --quick /srv

    Exit status: 3 if data is at risk, 4 if a chain leads out of the folders that it may use.
    """
    from imgtool.image.checks.checking import ChainCheck

    failures = Failures(debug=common.debug)
    there = [image for image in images if _is_there(image, failures)]
    folders = [image for image in there if image.is_dir()]
    if common.format is not None and folders:
        raise UsageError("--format is for images, not for a folder of them", subject=folders[0])
    checked = ChainCheck(
        backing_dirs=[*common.backing_dirs, *folders],
        metadata=not quick,
    )
    counts: Counter[str] = Counter()
    whats: set[str] = set()

    def told(findings: Iterator[Finding]) -> Iterator[Finding]:
        said = set()
        for finding in findings:
            if finding not in said:
                said.add(finding)
                counts[finding.severity] += 1
                whats.add(finding.what)
                yield finding

    findings = told(_findings(checked, there, common.format, failures))
    if output is Output.table:
        for finding in findings:
            render.text(
                f"{render.plain(str(finding.path))}: {finding.severity}: {finding.what}\n"
                f"    {render.plain(finding.means)}\n    to do: {render.plain(finding.do)}\n"
            )
        if checked.looked_at or counts:
            well = "nothing wrong in the headers" if quick else "nothing wrong"
            render.text(f"{image_count(len(checked.looked_at))}: {_summary(counts) or well}\n")
            render.text(f"not looked at: {_not_looked_at(checked, folders, quick=quick)}\n")
    else:
        rows = (
            {
                **name("path", finding.path),
                "severity": finding.severity,
                "what": finding.what,
                "means": finding.means,
                "do": finding.do,
            }
            for finding in findings
        )
        render.emit(rows, FIELDS, output)
    if counts["risk"]:
        raise SystemExit(int(ExitStatus.IMAGE_UNREADABLE))
    failures.finish()
    if whats.intersection(_NOT_LOOKED_AT):
        raise SystemExit(int(ExitStatus.REFUSED))


def _is_there(image: Path, failures: Failures) -> bool:
    try:
        image.stat()
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "not a path"
        failures.add(ImageError(reason.lower(), subject=image))
        return False
    return True


def _findings(
    checked: ChainCheck, images: list[Path], format: str | None, failures: Failures
) -> Iterator[Finding]:
    from imgtool.image.checks.dependants import files_below
    from imgtool.image.checks.forest import forest

    for image in images:
        if not image.is_dir():
            yield from checked.chain(image, format=format)
            continue
        trees = forest(
            [image],
            backing_dirs=[folder for folder in images if folder.is_dir()],
            on_error=lambda path, error: failures.add(not_read(path, error)),
        )
        below = [tree for root in trees for _, tree in root.walk()]
        if not below:
            warning(f"no images below {image}")
        for tree in below:
            checked.know(tree.header)
        # From the tops down; what no top leads to, since a chain is broken, after that.
        for tree in sorted(below, key=lambda tree: bool(tree.overlays)):
            yield from checked.chain(tree.path)
        # An empty file has no format of its own; by its name it was to be an image.
        for path in files_below(image):
            if path.suffix.lower() in _IMAGE_SUFFIXES and not path.stat().st_size:
                yield from checked.chain(path)


def _not_looked_at(checked: ChainCheck, folders: list[Path], *, quick: bool) -> str:
    """What a "nothing wrong" says nothing of: with the images, every file that is there."""
    from imgtool.image.checks.dependants import files_below

    parts = ["the filesystems in them"]
    if quick:
        parts.append("their tables")
    for reason, count in sorted(checked.unchecked.items()):
        parts.append(f"the tables of {image_count(count)} ({reason})")
    others = 0
    for folder in folders:
        for path in files_below(folder):
            with contextlib.suppress(OSError):  # gone since it was listed
                status = path.stat()
                others += (status.st_dev, status.st_ino) not in checked.looked_at
    if others:
        parts.append(f"{others} other file{'' if others == 1 else 's'} (no images)")
    return ", ".join(parts)


def _summary(counts: Counter[str]) -> str:
    said = [
        f"{count} {severity}{'' if count == 1 else 's'}"
        for severity in ("risk", "warning", "note")
        if (count := counts[severity])
    ]
    return ", ".join(said)
