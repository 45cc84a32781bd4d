"""What is done to an image, and what must have come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from imgtool.image.chain.chain import open_chain
from imgtool.image.change.transaction import transaction
from tests.matrix.features import SIZE, run, write
from tests.matrix.state import Snapshot, State, state_of

# What imgtool is to be called with; its exit status comes back.
Imgtool = Callable[..., int]


@dataclass
class Cell:
    """One image under one operation. `before` is its state, `secret` as that of its kind."""

    image: Path
    before: State
    secret: str
    imgtool: Imgtool

    def now(self, name: str = "disk.qcow2") -> State:
        """The state of an image beside it, or its own."""
        return state_of(self.image.with_name(name), secret=self.secret)


@dataclass(frozen=True)
class Operation:
    """`do` gives an exit status; after 0, `wanted` is the state that must be there. `prepare` runs
    first."""

    do: Callable[[Cell], int]
    wanted: Callable[[Cell, State], State] = lambda cell, now: cell.before
    prepare: Callable[[Path, str], None] = lambda image, secret: None


def _with(cell: Cell, **changed: object) -> State:
    return dataclasses.replace(cell.before, **changed)  # type: ignore[arg-type]


def _command(*words: str) -> Callable[[Cell], int]:
    def do(cell: Cell) -> int:
        folder = cell.image.parent
        return cell.imgtool(*[folder / word if ".qcow2" in word else word for word in words])

    return do


def _new(cell: Cell, now: State, name: str) -> Snapshot:
    found = [row for row in now.snapshots if row.name == name]
    assert len(found) == 1, f"snapshots {name}: {found}"
    assert found[0].content == cell.before.content, f"{name} is not the state that was there"
    return found[0]


def _created(cell: Cell, now: State) -> State:
    return _with(cell, snapshots=(*cell.before.snapshots, _new(cell, now, "third")))


def _deleted(cell: Cell, now: State) -> State:
    kept = tuple(row for row in cell.before.snapshots if row.name != "first")
    assert len(kept) == len(cell.before.snapshots) - 1
    return _with(cell, snapshots=kept)


def _reverted(cell: Cell, now: State) -> State:
    (to,) = [row for row in cell.before.snapshots if row.name == "first"]
    # A snapshot has the size of its own time.
    return _with(cell, content=to.content, size=now.size)


def _saved(cell: Cell, now: State) -> State:
    reverted = _reverted(cell, now)
    kept = (*cell.before.snapshots, _new(cell, now, "kept"))
    return dataclasses.replace(reverted, snapshots=kept)


def _resized(cell: Cell, now: State) -> State:
    assert now.size == cell.before.size + (1 << 20)
    return _with(cell, size=now.size, content=now.content)


def _overlay_on(image: Path, secret: str) -> None:
    """`top.qcow2` stands on the image, and something is written to it where QEMU needs no key."""
    top = image.with_name("top.qcow2")
    if secret:
        words = ("-f", "qcow2", "-F", "qcow2", "-b", image.name, top, str(SIZE))
        run("qemu-img", "create", "-q", "-u", *words)
        return
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image.name, top)
    write(top, 8, 512, 1024)


def _another_base(image: Path, secret: str) -> None:
    other = image.with_name("other.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", other, str(SIZE))
    write(other, 9, 0, 1024)


def _committed(cell: Cell, now: State) -> State:
    top = cell.image.with_name("top.qcow2")
    if top.exists():
        assert state_of(top).content == now.content
    assert now.content != cell.before.content
    return _with(cell, content=now.content)


def _flattened(cell: Cell, now: State) -> State:
    return _with(cell, backing=(None, None))


def _rebased(cell: Cell, now: State) -> State:
    return _with(cell, backing=("other.qcow2", "qcow2"))


def _converted(cell: Cell, now: State) -> State:
    assert cell.now("new.qcow2").content == cell.before.content
    return cell.before


def _overlaid(cell: Cell, now: State) -> State:
    top = cell.now("new.qcow2")
    assert (top.content, top.backing) == (cell.before.content, ("disk.qcow2", "qcow2"))
    return cell.before


def _write(cell: Cell) -> int:
    """What `copy-in`, `edit` and `inject` do, without the guest."""
    from imgtool.errors import ImgtoolError

    try:
        chains = [open_chain(cell.image)]
        with transaction(chains, notice=lambda line: None) as writing:
            write(writing.chains[0].active.path, 10, 4096, 512)
            writing.commit()
    except ImgtoolError as error:
        return int(error.status)
    return 0


def _written(cell: Cell, now: State) -> State:
    assert now.content != cell.before.content
    return _with(cell, content=now.content)


OPERATIONS: Mapping[str, Operation] = {
    "check": Operation(_command("check", "disk.qcow2")),
    "chain-check": Operation(_command("chain", "check", "disk.qcow2")),
    "info": Operation(_command("info", "disk.qcow2")),
    "recover": Operation(_command("recover", "disk.qcow2")),
    "repair-leaks": Operation(_command("check", "--repair", "leaks", "disk.qcow2")),
    "repair-all": Operation(_command("check", "--repair", "all", "disk.qcow2")),
    "snapshot-create": Operation(_command("snapshot", "create", "disk.qcow2", "third"), _created),
    "snapshot-delete": Operation(_command("snapshot", "delete", "disk.qcow2", "first"), _deleted),
    "revert": Operation(
        _command("snapshot", "revert", "--discard", "disk.qcow2", "first"), _reverted
    ),
    "revert-saving": Operation(
        _command("snapshot", "revert", "--save-as", "kept", "disk.qcow2", "first"), _saved
    ),
    "resize": Operation(_command("resize", "disk.qcow2", "+1M"), _resized),
    "compact": Operation(_command("compact", "disk.qcow2")),
    "overlay": Operation(_command("overlay", "create", "disk.qcow2", "new.qcow2"), _overlaid),
    "commit-into": Operation(_command("overlay", "commit", "top.qcow2"), _committed, _overlay_on),
    "commit-removing": Operation(
        _command("overlay", "commit", "--remove", "top.qcow2"), _committed, _overlay_on
    ),
    "flatten": Operation(_command("overlay", "flatten", "disk.qcow2"), _flattened),
    "rebase": Operation(
        _command("overlay", "rebase", "disk.qcow2", "other.qcow2"), _rebased, _another_base
    ),
    "convert": Operation(_command("convert", "disk.qcow2", "new.qcow2"), _converted),
    "write": Operation(_write, _written),
}
