"""Command lines that run in the process of the tests: a third of the time of a program."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from dataclasses import dataclass

import pytest
import typer

from imgtool import cli
from tests.support.schemas import require_schema

# Half of the time of a quick command goes into this.
_get_command = functools.cache(typer.main.get_command)


@dataclass(frozen=True)
class Result:
    """What a command said and how it ended."""

    status: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()


def run_here(*words: object, stdin: bytes = b"") -> Result:
    """Run a command line; what it says in JSON has to be as its schema tells."""
    arguments = [str(word) for word in words]
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding="utf-8", write_through=True)
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(typer.main, "get_command", _get_command)
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            status = int(cli._run(arguments))
        except SystemExit as ended:
            status = int(ended.code or 0)
        out.flush()
    require_schema(arguments, written.getvalue())
    return Result(status, written.getvalue(), err.getvalue())
