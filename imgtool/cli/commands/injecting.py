"""`inject`."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from imgtool.cli import options, render
from imgtool.cli.commands.injected import FIELDS, row, say, unopened_row
from imgtool.cli.guest_command import WRITE, guest_command
from imgtool.cli.output import Output
from imgtool.cli.session import Failures, Request
from imgtool.cli.step_options import step_options
from imgtool.errors import ExitStatus, ImgtoolError, Interrupted, UsageError
from imgtool.host import interrupt
from imgtool.inject.steps.step import Asked

if TYPE_CHECKING:
    from imgtool.image.chain.chain import Chain
    from imgtool.inject.planner import LocatedStep, Result

# What would be changed in one image is shown in one piece.
_showing = threading.Lock()


@dataclass(frozen=True)
class _Request(Request):
    """One image's request; `title` goes before what `--dry-run` would change in it."""

    shows_changes: bool = True
    title: str | None = None

    @classmethod
    def for_image(
        cls,
        request: Request,
        image: Path,
        *,
        clone: Path | None,
        shows_changes: bool,
        title: str | None,
    ) -> _Request:
        """The same options for one of the images."""
        same = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
        same |= {"image": image, "clone": clone}
        return cls(**same, shows_changes=shows_changes, title=title)

    @property
    def written(self) -> Path:
        """The image that has the result."""
        return self.clone or self.image

    def _review(self, written: Sequence[Chain]) -> None:
        if not self.shows_changes:
            return
        with _showing:
            if self.title is not None:
                render.text(f"{render.plain(self.title)}\n")
            super()._review(written)


def _spec_and_images(paths: list[Path], spec: Path | None) -> tuple[list[Path], Path | None]:
    """The last argument is the spec if it is called so."""
    if spec is None and len(paths) > 1 and paths[-1].suffix in (".yaml", ".yml"):
        return paths[:-1], paths[-1]
    return paths, spec


def _explain_that_nothing_is_to_do(images: Sequence[Path], spec: Path | None) -> NoReturn:
    if spec is not None:
        raise UsageError("it has no steps, and no option gives one", subject=spec)
    for path in images:
        if path.suffix in (".yaml", ".yml"):
            raise UsageError(
                "it is taken for an image, not for a spec", subject=path, hint="IMAGE... SPEC.yaml"
            )
    raise UsageError("there is nothing to do", hint="name a SPEC.yaml, or give steps as options")


def _show_schema(wanted: bool) -> None:
    if wanted:
        from imgtool.inject.spec import schema_text

        render.text(schema_text())
        raise typer.Exit


@guest_command(*WRITE, image=False)
@step_options(after="var")
def inject(
    request: Request,
    asked: Asked,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE... [SPEC.yaml]", help="The disk images, and the steps."),
    ],
    spec: Annotated[
        Path | None,
        typer.Option("--spec", metavar="FILE", help="The steps, whatever the file is called."),
    ] = None,
    var: Annotated[
        list[str] | None,
        typer.Option("--var", metavar="NAME=VALUE", help="A variable of templates."),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", is_eager=True, callback=_show_schema, help="Print the spec's JSON schema."
        ),
    ] = False,
    parallel: options.Parallel = 1,
    output: options.OutputOption = Output.table,
    clone: Annotated[
        list[Path] | None,
        typer.Option(
            "--clone",
            metavar="NEW",
            help="Leave the image alone; the result is a new overlay on it.",
        ),
    ] = None,
    clone_dir: Annotated[
        Path | None,
        typer.Option(
            "--clone-dir", metavar="DIR", help="As --clone, in this folder, by the images' names."
        ),
    ] = None,
) -> None:
    """Set up guests: users, passwords, files, services, network.

    All of it is done or nothing. Steps are those of the spec in its order, then those of the
    options, in the order of this list. What is so already is left alone, and a guest in which all
    is so is not written to at all. Only a spec has the steps 'network' and 'cloud-init', and more
    details of the others: --schema.

    \b
    Examples:
      imgtool inject guest.qcow2 --password root:prompt
      imgtool inject -n guest.qcow2 --hostname web1 --user alice
      imgtool inject --clone-dir clones guest.qcow2 spec.yaml
    """
    from imgtool.inject.option_parsers import steps_of, variables_of

    images, spec = _spec_and_images(paths, spec)
    if len(images) > 1 and (request.add or clone):
        raise UsageError("-A and --clone are for one image", hint="--clone-dir is for several")
    targets = _targets(images, clone or [], clone_dir)
    request.refuse_direct()
    failures = Failures(request.debug)
    steps, variables = _read(spec, failures)
    variables |= variables_of(var or ())
    steps += steps_of(asked)
    _check(steps, [new or image for image, new in targets], variables, failures)
    failures.finish()
    if not steps:
        _explain_that_nothing_is_to_do(images, spec)
    requests = [
        _Request.for_image(
            request,
            image,
            clone=new,
            shows_changes=output is Output.table,
            title=f"{new or image}:" if len(targets) > 1 else None,
        )
        for image, new in targets
    ]
    _carry_out(requests, steps, variables, failures, parallel=parallel, output=output)


def _targets(
    images: Sequence[Path], clones: Sequence[Path], clone_dir: Path | None
) -> list[tuple[Path, Path | None]]:
    """Each image with the clone that is made of it, if one is."""
    if clones and clone_dir is not None:
        raise UsageError("--clone and --clone-dir name the same", hint="give one of them")
    targets: list[tuple[Path, Path | None]]
    if clones:
        targets = [(images[0], new) for new in clones]
    elif clone_dir is not None:
        targets = [(image, clone_dir / f"{image.stem}.qcow2") for image in images]
    else:
        return [(image, None) for image in images]
    seen = set()
    for _, new in targets:
        if new in seen:
            raise UsageError("two clones would have this name", subject=new)
        seen.add(new)
    return targets


def _read(spec: Path | None, failures: Failures) -> tuple[list[LocatedStep], dict[str, str]]:
    if spec is None:
        return [], {}
    from imgtool.inject.spec import read_spec

    found, problems = read_spec(spec)
    for problem in problems:
        failures.add(problem)
    failures.finish()
    assert found is not None
    return list(found.steps), dict(found.variables)


def _check(
    steps: Sequence[LocatedStep],
    images: Sequence[Path],
    variables: Mapping[str, str],
    failures: Failures,
) -> None:
    """Everything that can be told before a guest is opened, each error once."""
    from imgtool.inject.planner import check, image_variables

    said = set()
    for image in images:
        for error in check(steps, image_variables(image, variables)):
            if str(error) not in said:
                said.add(str(error))
                failures.add(error)


def _carry_out(
    requests: Sequence[_Request],
    steps: Sequence[LocatedStep],
    variables: Mapping[str, str],
    failures: Failures,
    *,
    parallel: int,
    output: Output,
) -> None:
    def one(request: _Request) -> Result | ImgtoolError:
        try:
            if interrupt.pending():  # no further image is begun after Ctrl-C
                raise Interrupted("interrupted")
            return _inject_one(request, steps, variables)
        except ImgtoolError as error:
            return error

    with ThreadPoolExecutor(parallel) as pool:
        results = list(pool.map(one, requests))
    rows = []
    for request, result in zip(requests, results, strict=True):
        if isinstance(result, ImgtoolError):
            if result.status is ExitStatus.INTERRUPTED:
                raise result
            failures.add(result)
            if len(requests) > 1 or output is not Output.table:
                rows.append(unopened_row(request.written, result))
            continue
        for error in result.errors:
            failures.add(error)
        rows += [
            row(request.written, number, outcome, result.committed)
            for number, outcome in enumerate(result.outcomes, 1)
        ]
        say(
            request.written,
            result,
            dry_run=request.dry_run,
            is_clone=request.clone is not None,
        )
    columns = ["status", "kind", "subject", "where"]
    if len(requests) > 1:
        columns.insert(0, "image")
    # With --dry-run the answer in a table is the difference, which is out already.
    if output is not Output.table or (rows and not requests[0].dry_run):
        render.emit(rows, FIELDS, output, columns=columns)
    failures.finish()


def _inject_one(
    request: _Request, steps: Sequence[LocatedStep], variables: Mapping[str, str]
) -> Result:
    from imgtool.inject.planner import image_variables, inject

    request.refuse_doubtful_guest()
    reads = dataclasses.replace(request, engine="direct")
    directly = request.engine != "libguestfs" and not request.keys
    return inject(
        reads.opened if directly else None,
        request.opened_to_write,
        steps,
        image_variables(request.written, variables),
        commits=not request.dry_run,
        clones=request.clone is not None,
    )
