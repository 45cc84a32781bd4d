"""Why the direct engine does not read something."""

from __future__ import annotations


class Unsupported(Exception):
    """The direct engine may not read this; the appliance can. The message is the reason."""


class NotInstalled(Unsupported):
    """The host lacks a program or a module. The message has the command that installs it."""


class NoSandbox(Unsupported):
    """The host has no sandbox of a kind, or none at all. The message is the reason."""


class SandboxFailed(NoSandbox):
    """A sandbox could not be closed; nothing of an image was looked at. The message is what the
    program said that should have closed it.
    """
