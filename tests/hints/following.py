"""How a hint is followed: it is brought up by a command line, taken out of what that said, and
what it says to type is typed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imgtool import cli
from imgtool.image.intent.intent_log import is_ours

MIB = 1 << 20
SIZE = 8 << 20


@dataclass(frozen=True)
class Done:
    """What a command said and how it ended."""

    status: int
    text: str
    err: str


def imgtool(*words: object, stdin: str = "") -> Done:
    """Run a command line in this process, on guests that it opens itself."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin.encode()))
        try:
            status = int(cli._run([str(word) for word in words]))
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            sys.stdin = before
    return Done(status, os.fsdecode(out.buffer.getvalue()), err.getvalue())


def run(*words: str | Path, input: bytes | None = None) -> str:
    """A program that must succeed; what it wrote."""
    return subprocess.run(words, check=True, capture_output=True, input=input).stdout.decode()


def hint(said: str) -> str:
    """The hint among what a command has said."""
    lines = [line for line in said.splitlines() if line.startswith("  hint: ")]
    assert len(lines) == 1, said
    return lines[0].removeprefix("  hint: ")


def _to_do(answer: str, what: str) -> str:
    """What `chain check -o json` says is to be done about a finding."""
    (text,) = (row["do"] for row in json.loads(answer) if row["what"] == what)
    return str(text)


def pattern_of(template: str) -> re.Pattern[str]:
    """What a hint with this template, as it is in known.txt, looks like."""
    return re.compile(".*".join(re.escape(part) for part in re.split(r"\{\d*\}", template)))


_PROGRAMS = r"(?:imgtool|qemu-img|cp|mv|rm|dd|chmod|truncate|touch|mkdir|grep|blockdev)"
_QUOTED = rf"(?<!\S)'({_PROGRAMS} [^']*)'"
_OPEN = rf"(?:^|(?<=[:;,(] )|(?<=then )|(?<=or ))({_PROGRAMS} [^;:,(]+)"


def commands_in(text: str, **chosen: str | Path) -> list[str]:
    """The commands that a hint gives, with what is to be chosen put in for words in capitals."""
    for name, value in chosen.items():
        parts = re.split(rf"\b{name}\b", text)
        text = shlex.quote(str(value)).join(parts)
    return [quoted or open for quoted, open in re.findall(f"{_QUOTED}|{_OPEN}", text)]


def type_in(command: str) -> Done:
    """Type a command into a shell; imgtool is the one that is tested."""
    words = shlex.split(command)
    if words[0] == "imgtool":
        return imgtool(*words[1:])
    done = subprocess.run(command, shell=True, check=False, capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


# What is in the folder, and what must not change


def _inside(image: Path) -> tuple[dict[str, str | None], list[str]]:
    """What a qcow2 holds besides what a guest sees now: snapshots, with their content where it can
    be read; bitmaps."""
    said = json.loads(run("qemu-img", "info", "-U", "--output=json", image))
    if said["format"] != "qcow2":
        return {}, []
    found: dict[str, str | None] = {}
    for row in said.get("snapshots", ()):
        copy = image.with_name("of a snapshot")
        words = ("qemu-img", "convert", "-U", "-l", f"snapshot.id={row['id']}", "-O", "raw")
        done = subprocess.run([*words, image, copy], check=False, capture_output=True)
        readable = done.returncode == 0
        content = copy.read_bytes().rstrip(b"\0") if readable else b""  # whatever its size is now
        found[row["name"]] = hashlib.sha256(content).hexdigest() if readable else None
        copy.unlink(missing_ok=True)
    bitmaps = said["format-specific"]["data"].get("bitmaps", ())
    return found, sorted(row["name"] for row in bitmaps)


def _is_kept(image: Path, before: tuple[dict[str, str | None], list[str]]) -> bool:
    """Whether an image holds what it held, as far as that could be read."""
    snapshots, bitmaps = _inside(image)
    same = [one in (None, snapshots.get(name, "")) for name, one in before[0].items()]
    return all(same) and snapshots.keys() == before[0].keys() and bitmaps == before[1]


def files() -> dict[str, str]:
    """Each file of the folder with its checksum, or what a link says."""
    found = {}
    for folder, _, names in os.walk("."):
        for name in names:
            path = Path(folder, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                with path.open("rb") as file:
                    found[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


Step = Callable[[list[str], str], Done]


@dataclass(frozen=True)
class Row:
    """A hint that is followed.

    `hint` is the template as known.txt has it, `make` makes what is in the folder, and `wrong` is
    the command that ends with it, or a `chain check` that has it for its `finding`. `step` does
    what it says, given that command and the text; then `holds` is in what that has said, or is
    true. Of `writes` that step may change the content; all other files are as they were, and so
    are the snapshots and the bitmaps of these, unless it is said that it `loses` them.
    """

    hint: str
    make: Callable[[], object]
    wrong: str
    step: Step
    holds: str | Callable[[], bool] = ""
    writes: tuple[str, ...] = ()
    loses: bool = False
    finding: str = ""

    def follow(self) -> None:
        """Bring the hint up and follow it."""
        self.make()
        words = shlex.split(self.wrong)
        before = files()
        failed = imgtool(*words)
        assert failed.status != 0 or self.finding, failed.text
        text = _to_do(failed.text, self.finding) if self.finding else hint(failed.err)
        assert pattern_of(self.hint).fullmatch(text), text
        assert files() == before, "what is refused changes nothing"
        kept = () if self.loses else self.writes
        inside = {name: _inside(Path(name)) for name in kept}
        done = self.step(words, text)
        assert done.status == 0, f"{text}\n{done.err}"
        if isinstance(self.holds, str):
            assert self.holds in done.text + done.err
        else:
            assert self.holds(), done.text + done.err
        after = files()
        changed = {name for name in before if after.get(name) != before[name]}
        changed = {name for name in changed if not is_ours(Path(name).name)}
        assert {str(Path(name)) for name in changed} <= set(self.writes), changed
        assert all(_is_kept(Path(name), inside[name]) for name in kept), inside


# Steps


def added(*options: str) -> Step:
    """The same command with options that the hint spells, each tried by itself."""

    def step(words: list[str], text: str) -> Done:
        for option in options:
            assert option in text, text
            done = imgtool(*words, *shlex.split(option))
            assert done.status == 0, f"{option}: {done.err}"
        return done

    return step


def matching(expression: str, **chosen: str) -> Step:
    """The same command with the options that this finds in the hint."""

    def step(words: list[str], text: str) -> Done:
        matched = re.search(expression, text)
        assert matched is not None, text
        option = matched[0]
        for name, value in chosen.items():
            option = re.sub(rf"\b{name}\b", value, option)
        return imgtool(*words, *shlex.split(option))

    return step


def each(expression: str) -> Step:
    """The same command with each of the options that this finds in the hint."""

    def step(words: list[str], text: str) -> Done:
        options = re.findall(expression, text)
        assert len(options) > 1, text
        done = [imgtool(*words, *shlex.split(option)) for option in options]
        return Done(
            max(one.status for one in done),
            "".join(one.text for one in done),
            "".join(one.err for one in done),
        )

    return step


def without(options: str, says: str = "") -> Step:
    """The same command without what the hint, by the first word or by these, says to leave out."""

    def step(words: list[str], text: str) -> Done:
        left_out = shlex.split(options)
        assert (says or left_out[0]) in text, text
        return imgtool(*(word for word in words if word not in left_out))

    return step


def instead(*commands: str, says: str = "") -> Step:
    """Other commands, of which the hint has these words."""

    def step(words: list[str], text: str) -> Done:
        assert says in text, text
        for command in commands:
            done = imgtool(*shlex.split(command))
            assert done.status == 0, f"{command}: {done.err}"
        return done

    return step


def typed(again: bool = True, **chosen: str) -> Step:
    """The commands that the hint gives; after them the command that failed is done `again`."""

    def step(words: list[str], text: str) -> Done:
        commands = commands_in(text, **chosen)
        assert commands, text
        for command in commands:
            done = type_in(command)
            assert done.status == 0, f"{command}: {done.err}"
        return imgtool(*words) if again else done

    return step


def command(number: int, again: bool = False, **chosen: str) -> Step:
    """One of the commands that the hint gives, by its number."""

    def step(words: list[str], text: str) -> Done:
        done = type_in(commands_in(text, **chosen)[number])
        return done if done.status or not again else imgtool(*words)

    return step
