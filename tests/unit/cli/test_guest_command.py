"""The options with which a guest is opened are the same in every command, and all arrive."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import typer

from imgtool.cli import options
from imgtool.cli.guest_command import OPTIONS, READ, WRITE, guest_command, plain_command
from imgtool.cli.session import Common, Request
from imgtool.errors import Reason
from imgtool.guest.guest_options import GuestOptions


def run(command, *words: str) -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    typer.main.get_command(app).main(list(words), standalone_mode=False)


def test_each_field_of_the_options_has_an_option():
    fields = {field.name for field in dataclasses.fields(GuestOptions)}
    assert fields == set(READ) <= OPTIONS.keys()
    every = {field.name for field in dataclasses.fields(Request)} - {"image"}
    assert every == OPTIONS.keys() - {"verbose"}


def test_what_is_typed_arrives(tmp_path):
    seen = []

    @guest_command(*dict.fromkeys((*READ, *WRITE)))
    def look(request: Request, paths: options.GuestPaths, human: options.Human = False) -> None:
        """Look."""
        seen.append((request, paths, human))

    read = ["-A", "b", "--format", "raw", "--snapshot", "s", "-m", "/dev/sda:/", "--root", "/dev/r"]
    more = ["--key", "k", "--engine", "direct", "--backing-dir", str(tmp_path), "--debug"]
    write = ["-n", "--clone", "c", "--tmp-dir", "t", "--force", "damaged"]
    run(look, "a", "/x", "/y", "-h", *read, *more, *write)
    ((request, paths, human),) = seen
    assert (paths, human) == (["/x", "/y"], True)
    assert request == Request(
        image=Path("a"), add=[Path("b")], format="raw", snapshot="s", mounts=["/dev/sda:/"],
        root="/dev/r", keys=["k"], engine="direct", backing_dirs=[tmp_path], debug=True,
        dry_run=True, clone=Path("c"), tmp_dir=Path("t"), force=[Reason.DAMAGED],
    )  # fmt: skip


def test_what_is_not_typed_is_as_the_request_has_it():
    seen = []

    @guest_command(*READ)
    def look(request: Request) -> None:
        seen.append(request)

    run(look, "a")
    assert seen == [Request(image=Path("a"))]


def test_an_option_of_the_command_itself_stays_its_own():
    seen = []

    @guest_command(*READ, image=False)
    def look(
        request: Request,
        paths: Annotated[list[Path], typer.Argument()],
        snapshot: Annotated[str, typer.Option("--snapshot")] = "now",
    ) -> None:
        seen.append((request.snapshot, paths, snapshot))

    run(look, "a", "b", "--snapshot", "s")
    assert seen == [(None, [Path("a"), Path("b")], "s")]


def test_what_opens_no_guest_gets_what_is_typed_too(tmp_path):
    seen = []

    @plain_command("dry_run", "force", "human", "format", "backing_dirs")
    def look(common: Common, image: options.Image, human: options.Human = False) -> None:
        """Look."""
        seen.append((common, image, human))

    names = ["image", "dry_run", "force", "human", "format", "backing_dirs", "verbose", "debug"]
    assert list(inspect.signature(look).parameters) == names
    write = ["-n", "--force", "damaged", "--format", "raw", "--backing-dir", str(tmp_path)]
    run(look, "a", "-h", *write, "--debug")
    run(look, "b")
    common = Common(
        dry_run=True, force=[Reason.DAMAGED], format="raw", backing_dirs=[tmp_path], debug=True
    )
    assert seen == [(common, Path("a"), True), (Common(), Path("b"), False)]
