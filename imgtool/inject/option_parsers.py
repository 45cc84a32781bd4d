"""Steps as options of the command line write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from imgtool.errors import UsageError
from imgtool.inject.planner import LocatedStep
from imgtool.inject.steps import (
    accounts,
    files,
    firstboot,
    host_keys,
    passwords,
    services,
    ssh_keys,
    system,
)
from imgtool.inject.steps.step import Step


def _two(option: str, text: str, form: str) -> tuple[str, str]:
    first, colon, second = text.partition(":")
    if not colon or not first or not second:
        raise UsageError(f"{option} takes {form}", subject=text)
    return first, second


def _copy(text: str) -> Step:
    # A host file may have a colon in its name; a guest path begins with the last ':/'.
    source, colon, path = text.rpartition(":/")
    if not colon or not source:
        raise UsageError("--copy takes SRC:DEST, and DEST is absolute", subject=text)
    return files.Copy(f"/{path}", source=Path(source))


def _template(text: str) -> Step:
    source, colon, path = text.rpartition(":/")
    if not colon or not source:
        raise UsageError("--template takes SRC:DEST, and DEST is absolute", subject=text)
    return files.Template(f"/{path}", source=Path(source))


def _write(text: str) -> Step:
    path, _, content = text.partition(":")
    if ":" not in text:
        raise UsageError("--write takes PATH:TEXT", subject=path)
    return files.Write(path, content=content + "\n" if content else "")


def _append(text: str) -> Step:
    path, line = _two("--append-line", text, "PATH:LINE")
    return files.AppendLine(path, line=line)


def _chmod(text: str) -> Step:
    mode, path = _two("--chmod", text, "MODE:PATH")
    return files.ChangeMode(path, mode=mode)


def _chown(text: str) -> Step:
    owner, colon, path = text.rpartition(":/")
    if not colon or not owner:
        raise UsageError("--chown takes USER:GROUP:PATH", subject=text)
    return files.ChangeOwner(f"/{path}", owner=owner)


def _link(text: str) -> Step:
    path, target = _two("--link", text, "PATH:TARGET")
    return files.Link(path, target=target)


def _user(text: str) -> Step:
    name, *rest = text.split(":")
    sudo = rest[-1:] == ["sudo"]
    groups = rest[: len(rest) - sudo]
    if len(groups) > 1:
        raise UsageError("--user takes NAME, NAME:GROUP,... and ':sudo' at its end", subject=text)
    return accounts.User(name, groups=tuple(g for g in "".join(groups).split(",") if g), sudo=sudo)


def _password(text: str) -> Step:
    user, _, source = text.partition(":")
    kind, _, name = source.partition(":")
    # What was typed is not repeated: somebody may have typed the password.
    if (
        not user
        or kind not in ("file", "env", "prompt", "stdin")
        or bool(name) != (kind in ("file", "env"))
    ):
        raise UsageError(
            "--password takes USER:file:FILE, USER:env:NAME, USER:stdin or USER:prompt",
            hint="a password on the command line can be seen by everybody on this machine",
        )
    return passwords.Password(user, passwords.Secret(kind, name))


def _ssh_key(text: str) -> Step:
    user, file = _two("--ssh-key", text, "USER:FILE")
    return ssh_keys.SshKey(user, Path(file))


def _service(text: str) -> Step:
    action, unit = _two("--service", text, "enable:UNIT, disable:, mask: or unmask:")
    return services.Service(action, unit)


def _firstboot(text: str) -> Step:
    return firstboot.FirstBoot(Path(text))


# In this order the options are carried out, whatever their order on the command line.
OPTIONS: Mapping[str, Callable[[str], Step]] = {
    "--user": _user,
    "--password": _password,
    "--ssh-key": _ssh_key,
    "--hostname": system.Hostname,
    "--timezone": system.Timezone,
    "--locale": system.Locale,
    "--mkdir": files.MakeFolder,
    "--copy": _copy,
    "--template": _template,
    "--write": _write,
    "--append-line": _append,
    "--link": _link,
    "--delete": files.Delete,
    "--chmod": _chmod,
    "--chown": _chown,
    "--service": _service,
    "--firstboot": _firstboot,
}
SWITCHES: Mapping[str, Callable[[], Step]] = {
    "--machine-id-reset": system.MachineId,
    "--ssh-host-keys-remove": host_keys.SshHostKeys,
    "--selinux-relabel": system.Relabel,
}


def steps_of(given: Mapping[str, Any]) -> list[LocatedStep]:
    """The steps that options ask for; `given` has their values by the options' names."""
    found: list[LocatedStep] = []
    for option, make in OPTIONS.items():
        value = given.get(_parameter(option)) or ()
        texts: Sequence[str] = [value] if isinstance(value, str) else value
        found += [LocatedStep(make(text), option) for text in texts]
    for option, build in SWITCHES.items():
        if given.get(_parameter(option)):
            found.append(LocatedStep(build(), option))
    return found


def variables_of(texts: Sequence[str]) -> dict[str, str]:
    """The variables in `NAME=VALUE` texts."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.replace("-", "_").isidentifier():
            raise UsageError("--var takes NAME=VALUE", subject=text)
        found[name] = value
    return found


def _parameter(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")
