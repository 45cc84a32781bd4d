"""A search through a guest: what its tests and actions may ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

from imgtool.guest.guest import Guest, OnProblem, Owners
from imgtool.search.visiting import Visit, Visited


class Search(ABC):
    """What is known while a search goes on; who prints says how."""

    def __init__(self, guest: Guest, on_problem: OnProblem) -> None:
        self.guest = guest
        self.on_problem = on_problem
        self.visit: Visit | None = None
        self.over = False
        self._times: dict[str, int] = {}
        self._numbers: dict[tuple[str, bool], int] = {}

    @cached_property
    def owners(self) -> Owners:
        """The guest's own names of users and groups."""
        return self.guest.owners()

    def time_of_change(self, path: str) -> int:
        """When the content of a file of the guest was changed last, in nanoseconds; links are
        followed. Raises `NotInGuestError`."""
        if path not in self._times:
            self._times[path] = self.guest.lstat(self.guest.resolve(path)).mtime_ns
        return self._times[path]

    def number_of(self, name: str, *, group: bool) -> int:
        """The number of a user or group that is named, or is a number. Raises `NotInGuestError`."""
        if (name, group) not in self._numbers:
            look_up = self.owners.group_number if group else self.owners.user_number
            self._numbers[name, group] = look_up(name)
        return self._numbers[name, group]

    def prune(self, visited: Visited) -> None:
        """Do not go into this directory."""
        assert self.visit is not None
        if visited.entry.type == "directory":
            self.visit.prune(visited.entry)

    def quit(self) -> None:
        """End after this entry."""
        self.over = True

    @abstractmethod
    def write(self, content: bytes) -> None:
        """Give out bytes as they are, safe for a terminal."""

    @abstractmethod
    def print_name(self, visited: Visited) -> None:
        """Give out the path, a line."""

    @abstractmethod
    def print_line(self, visited: Visited) -> None:
        """Give out all that `ls -l` shows, a line."""
