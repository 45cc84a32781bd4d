"""The spec: a YAML file of steps, checked against its schema with the lines of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from imgtool.errors import ImgtoolError, UsageError
from imgtool.inject.planner import LocatedStep
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
from imgtool.inject.steps.step import Step
from imgtool.inject.yaml_lines import Lines


@dataclass(frozen=True)
class Spec:
    """What a spec asks for."""

    steps: tuple[LocatedStep, ...]
    variables: Mapping[str, str]


def schema_text() -> str:
    """The JSON schema of a spec."""
    return resources.files("imgtool.inject").joinpath("schema.json").read_text("utf-8")


def read_spec(path: Path) -> tuple[Spec | None, list[ImgtoolError]]:
    """The spec in a file, or what is wrong with it, each with its line.

    Raises `UsageError` for what is no YAML, `ImgtoolError` for a file that cannot be read.
    """
    lines = Lines(path)
    problems = _problems(lines)
    if problems:
        return None, problems
    steps = []
    for number, step in enumerate(lines.data["steps"]):
        ((kind, value),) = step.items()
        where = lines.where(("steps", number, kind))
        made = _STEPS[kind](value, path.parent)
        steps += [LocatedStep(one, where) for one in (made if isinstance(made, list) else [made])]
    variables = {name: str(value) for name, value in lines.data.get("vars", {}).items()}
    return Spec(tuple(steps), variables), []


def _problems(lines: Lines) -> list[ImgtoolError]:
    import jsonschema

    schema = json.loads(schema_text())
    if lines.data is None:
        return [UsageError(f"{lines.where(())}: the spec is empty")]
    found: dict[tuple[str, str], UsageError] = {}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(lines.data):
        # Of alternatives, the one that comes nearest.
        deepest = jsonschema.exceptions.best_match([error]) or error
        place, message = tuple(deepest.absolute_path), _said(deepest)
        if deepest.validator == "additionalProperties" and isinstance(deepest.instance, dict):
            unknown = [key for key in deepest.instance if key not in deepest.schema["properties"]]
            place = (*place, unknown[0])
            message = _unknown(unknown[0], list(deepest.schema["properties"]))
        where = lines.where(place)
        found.setdefault((where, message), UsageError(f"{where}: {message}"))
    return sorted(found.values(), key=lambda e: int(e.message.split(":")[1]))


def _unknown(key: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, 1)
    meant = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    return f"'{key}' is not known here; {meant}"


def _said(error: Any) -> str:
    """What is wrong, in the spec's words; values may be long or secret, and are left out."""
    name = next((f"'{key}'" for key in reversed(error.absolute_path) if isinstance(key, str)), "")
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in error.instance]
        return f"{name or 'the spec'} needs '{missing[0]}'"
    if error.validator in ("oneOf", "anyOf"):
        choices = [c["required"][0] for c in error.validator_value if c.get("required")]
        if choices:
            return f"{name} needs one of: {', '.join(choices)}"
    if error.validator == "type":
        kinds = error.validator_value
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return f"{name or 'the spec'} is to be of type {' or '.join(kinds)}"
    if error.validator == "const":
        return f"{name} is to be '{error.validator_value}'"
    if error.validator == "enum":
        return f"{name} is to be one of: {', '.join(map(str, error.validator_value))}"
    if error.validator == "pattern":
        form = error.schema.get("description", f"of the form {error.validator_value}")
        return f"{name} is not as it has to be: {form.rstrip('.')}"
    if error.validator == "maxProperties":
        return "a step is one thing: begin the next one with '- '"
    return f"{name}: {error.message[:200]}" if name else str(error.message)[:200]


def _plain(make: Callable[..., Step]) -> Callable[[Any, Path], Step]:
    """A step whose fields are called as in the spec; a lone value is its `path` or `name`."""

    def build(value: Any, folder: Path) -> Step:
        if not isinstance(value, dict):
            return make(value)
        fields = dict(value)
        if "source" in fields:
            fields["source"] = folder / fields["source"]
        if "owner" in fields:
            fields["owner"] = str(fields["owner"])
        return make(**fields)

    return build


def _user(value: Any, folder: Path) -> Step:
    fields = {"name": value} if isinstance(value, str) else dict(value)
    groups = fields.get("groups", ())
    fields["groups"] = (groups,) if isinstance(groups, str) else tuple(groups)
    return accounts.User(**fields)


def _ssh_key(value: Any, folder: Path) -> Step:
    file = folder / value["file"] if "file" in value else None
    return ssh_keys.SshKey(value["user"], file, value.get("key"))


def _password(value: Any, folder: Path) -> Step:
    source = next(name for name in ("file", "env", "hash") if name in value)
    name = str(folder / value[source]) if source == "file" else value[source]
    return passwords.Password(value["user"], passwords.Secret(source, name))


def _services(value: Any, folder: Path) -> list[Step]:
    ((action, units),) = value.items()
    return [services.Service(action, u) for u in ([units] if isinstance(units, str) else units)]


def _firstboot(value: Any, folder: Path) -> Step:
    if isinstance(value, str):
        return firstboot.FirstBoot(folder / value)
    return firstboot.FirstBoot(name=value["name"], content=value["content"])


def _network(value: Any, folder: Path) -> Step:
    ethernets = [network.Ethernet.of(name, one) for name, one in value["ethernets"].items()]
    return network.Network(tuple(ethernets), value.get("renderer"))


def _cloud_init(value: Any, folder: Path) -> Step:
    parts = {key: folder / v if isinstance(v, str) else v for key, v in value.items()}
    return cloud.CloudInit(parts)


def _bare(make: Callable[[], Step]) -> Callable[[Any, Path], Step]:
    return lambda value, folder: make()


_STEPS: dict[str, Callable[[Any, Path], Step | list[Step]]] = {
    "write": _plain(files.Write),
    "copy": _plain(files.Copy),
    "template": _plain(files.Template),
    "append-line": _plain(files.AppendLine),
    "mkdir": _plain(files.MakeFolder),
    "chmod": _plain(files.ChangeMode),
    "chown": _plain(files.ChangeOwner),
    "link": _plain(files.Link),
    "delete": _plain(files.Delete),
    "user": _user,
    "ssh-key": _ssh_key,
    "password": _password,
    "service": _services,
    "firstboot": _firstboot,
    "network": _network,
    "cloud-init": _cloud_init,
    "hostname": _plain(system.Hostname),
    "timezone": _plain(system.Timezone),
    "locale": _plain(system.Locale),
    "machine-id": _bare(system.MachineId),
    "ssh-host-keys": _bare(host_keys.SshHostKeys),
    "selinux": _bare(system.Relabel),
}
