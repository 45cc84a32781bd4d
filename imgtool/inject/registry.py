"""The steps of `inject`: a line registers one. What a step is called in a spec, what it has there
and which option asks for it, its class says.

How one is added: `docs/development/adding.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from imgtool.inject.steps import (
    accounts,
    cloud,
    files,
    firstboot,
    host_keys,
    network,
    passwords,
    services,
    ssh_keys,
    system,
)
from imgtool.inject.steps.step import Option, Step

# In the order of the schema. Options are shown and carried out by their turns, whatever their order
# on the command line: 1.. users, whom files may belong to, 2.. the system, 3.. files, 4.. what is
# started, 5.. what makes a guest another one than that it was copied from.
_TURNS: tuple[tuple[type[Step], int | None], ...] = (
    (files.Write, 340),
    (files.Copy, 320),
    (files.Template, 330),
    (files.AppendLine, 350),
    (files.MakeFolder, 310),
    (files.ChangeMode, 380),
    (files.ChangeOwner, 390),
    (files.Link, 360),
    (files.Delete, 370),
    (system.Hostname, 210),
    (system.Timezone, 220),
    (system.Locale, 230),
    (ssh_keys.SshKey, 130),
    (accounts.User, 110),
    (passwords.Password, 120),
    (services.Service, 410),
    (firstboot.FirstBoot, 420),
    (network.Network, None),
    (cloud.CloudInit, None),
    (system.MachineId, 510),
    (host_keys.SshHostKeys, 520),
    (system.Relabel, 530),
)

STEPS: Mapping[str, type[Step]] = {step.kind: step for step, _ in _TURNS}


def _by_turns() -> Iterator[tuple[Option, type[Step]]]:
    turns = {step: turn for step, turn in _TURNS if turn is not None}
    for step in sorted(turns, key=lambda one: turns[one]):
        assert step.option is not None, step
        yield step.option, step


OPTIONS = tuple(_by_turns())
