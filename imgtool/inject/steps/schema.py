"""What the steps' parts of a spec's JSON schema are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Schema = Mapping[str, object]

# What several steps have, as `$defs` of the whole schema.
DEFINITIONS: Schema = {
    "path": {"type": "string", "pattern": "^/", "description": "An absolute path in the guest."},
    "host-file": {"type": "string", "minLength": 1, "description": "A file of the host."},
    "mode": {
        "description": "Octal digits.",
        "type": ["string", "integer"],
        "pattern": "^[0-7]{1,4}$",
        "minimum": 0,
        "maximum": 7777,
    },
    "owner": {
        "description": "USER, USER:GROUP or :GROUP, by the guest's own names or by numbers.",
        "type": ["string", "integer"],
        "minLength": 1,
    },
    "names": {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        ]
    },
}
PATH: Schema = {"$ref": "#/$defs/path"}
HOST_FILE: Schema = {"$ref": "#/$defs/host-file"}
MODE: Schema = {"$ref": "#/$defs/mode"}
OWNER: Schema = {"$ref": "#/$defs/owner"}
NAMES: Schema = {"$ref": "#/$defs/names"}
TEXT: Schema = {"type": "string"}
WORD: Schema = {"type": "string", "minLength": 1}
YES_OR_NO: Schema = {"type": "boolean"}


def mapping(
    properties: Mapping[str, Schema],
    *,
    description: str | None = None,
    required: Sequence[str] = (),
    one_of: Sequence[str] = (),
) -> Schema:
    """A mapping of these keys and no others; it needs all of `required`, and one of `one_of`."""
    found: dict[str, object] = {} if description is None else {"description": description}
    found["type"] = "object"
    if required:
        found["required"] = list(required)
    found["additionalProperties"] = False
    if one_of:
        found["oneOf"] = [{"required": [key]} for key in one_of]
    return {**found, "properties": dict(properties)}
