"""The mechanisms of `mount`: a line registers one. Those that are asked about are imported then.

How one is added: `docs/development/adding.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imgtool.mount.mechanisms.mechanisms import Mechanism

# By the value of `--via`: the class in `mechanisms`. `auto` takes the first that works here, so
# those with the least risk come first. In the appliance a hostile filesystem meets a kernel that is
# thrown away. Of the others, which all let the host's own kernel read it, those come first that
# leave least behind if all fails.
MECHANISMS = {
    "fuse": "ApplianceMechanism",
    "loop": "LoopMechanism",
    "export": "ExportMechanism",
    "nbd": "NbdMechanism",
    "kpartx": "KpartxMechanism",
}
AUTO = "auto"
VIA = (AUTO, *MECHANISMS)


def mechanisms(via: str = AUTO) -> Iterator[tuple[str, type[Mechanism]]]:
    """The mechanisms that a value of `--via` allows, in their order, each with its name."""
    module = import_module(f"{__package__}.mechanisms")
    for name, of_class in MECHANISMS.items():
        if via in (AUTO, name):
            yield name, getattr(module, of_class)
