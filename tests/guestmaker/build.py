"""Builds the guests that are asked for, each at most once, and keeps them outside the repository.

The folder is named by a hash of these sources, so a changed recipe makes new guests and never
changes one under a test that runs. Several callers at a time wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from imgtool.engines.libguestfs.appliance.launch import launch_appliance
from imgtool.errors import UsageError
from tests.guestmaker import awkward, debian, small, volumes, windows
from tests.guestmaker.disks import to_qcow2
from tests.guestmaker.recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for module in (debian, small, awkward, volumes, windows)
    for recipe in module.RECIPES
}

# Older guests may still be read by the tests of another checkout.
_KEPT_UNUSED = 24 * 3600


def default_cache() -> Path:
    """Where guests are kept when nothing else is said: $IMGTOOL_GUESTS or the user's cache."""
    if chosen := os.environ.get("IMGTOOL_GUESTS"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "imgtool" / "guests"


@cache
def _sources() -> str:
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for source in [here.parent.parent / "scripts/make-guests", *sorted(here.glob("*.py"))]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def folder(cache_folder: Path) -> Path:
    """Where the guests of these very sources are."""
    return cache_folder / _sources()


def find(name: str) -> Recipe:
    """The recipe of a guest, by its name or by the name of one of its files."""
    for recipe in RECIPES.values():
        if name == recipe.name or any(name in (file, Path(file).stem) for file in recipe.files):
            return recipe
    raise UsageError(
        "no such test guest", subject=name, hint=f"there are: {', '.join(sorted(RECIPES))}"
    )


def say(line: str) -> None:
    """Progress, on stderr."""
    print(f"make-guests: {line}", file=sys.stderr, flush=True)


def _built(recipe: Recipe, target: Path) -> bool:
    return all((target / file).exists() for file in recipe.files)


def _publish(recipe: Recipe, work: Path, target: Path) -> None:
    """Give the finished files their names; nobody sees a half-written one."""
    for file in recipe.files:
        made, raw = work / file, work / f"{Path(file).stem}.raw"
        if not made.exists():
            to_qcow2(raw, made)
        made.chmod(0o644)
        made.replace(target / file)
    shutil.rmtree(work)


def _fill(started: Sequence[tuple[Recipe, Path]]) -> None:
    """Run what needs the appliance, all in one."""
    disks = {recipe.name: recipe.disks(work) for recipe, work in started}

    def add_drives(g: Any) -> None:
        for paths in disks.values():
            for path in paths:
                g.add_drive_opts(str(path), format="raw", cachemode="unsafe", discard="besteffort")

    with launch_appliance(add_drives, notice=say) as g:
        devices = iter(g.list_devices())
        for recipe, work in started:
            clock = time.monotonic()
            own = [next(devices) for _ in disks[recipe.name]]
            assert recipe.fill is not None
            recipe.fill(g, own, work)
            say(f"{recipe.name}: filled in {time.monotonic() - clock:.1f} s")
        g.shutdown()


def _prepare(recipe: Recipe, cache_folder: Path, target: Path) -> Path:
    clock = time.monotonic()
    work = cache_folder / f"making-{recipe.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    for needed in recipe.needs:
        for file in RECIPES[needed].files:
            (work / file).hardlink_to(target / file)
    recipe.prepare(work)
    say(f"{recipe.name}: prepared in {time.monotonic() - clock:.1f} s")
    return work


def _remove_old(cache_folder: Path, target: Path) -> None:
    for path in cache_folder.iterdir():
        unused = time.time() - path.stat().st_mtime > _KEPT_UNUSED
        if path.is_dir() and path != target and (unused or path.name.startswith("making-")):
            shutil.rmtree(path)
        elif path.suffix == ".tar" and unused:
            path.unlink()


@contextlib.contextmanager
def _locked(cache_folder: Path) -> Iterator[None]:
    with (cache_folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _with_needs(names: Sequence[str]) -> list[Recipe]:
    wanted: dict[str, Recipe] = {}
    for name in names:
        recipe = find(name)
        for needed in (*recipe.needs, recipe.name):
            wanted[needed] = RECIPES[needed]
    return list(wanted.values())


def build(names: Sequence[str], cache_folder: Path) -> Path:
    """Build what is not there of these guests and what they need; all if none is named.

    Gives the folder of the guests. Needs root: owners, devices and attributes are made for real.
    """
    target = folder(cache_folder)
    wanted = _with_needs(names or list(RECIPES))
    target.mkdir(parents=True, exist_ok=True)
    os.utime(target)
    if all(_built(recipe, target) for recipe in wanted):
        return target
    with _locked(cache_folder):
        _remove_old(cache_folder, target)
        missing = [recipe for recipe in wanted if not _built(recipe, target)]
        first = [recipe for recipe in missing if not recipe.needs]
        started = []
        for recipe in first:
            work = _prepare(recipe, cache_folder, target)
            if recipe.fill is None:
                _publish(recipe, work, target)
            else:
                started.append((recipe, work))
        if started:
            _fill(started)
        for recipe, work in started:
            if recipe.finish is not None:
                recipe.finish(work)
            _publish(recipe, work, target)
        for recipe in missing:
            if recipe.needs:
                _publish(recipe, _prepare(recipe, cache_folder, target), target)
    return target
