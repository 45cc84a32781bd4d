"""A seed for cloud-init: the NoCloud data source, as files in the guest.

Source: cloud-init's documentation, "NoCloud" (/var/lib/cloud/seed/nocloud) and "User-data formats".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgtool.errors import ImgtoolError, NotInGuestError, UsageError
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import Schema, mapping
from imgtool.inject.steps.step import Step, StepContext, host_file

SEED = "/var/lib/cloud/seed/nocloud"
_LARGEST = 16 << 20
# The first lines by which cloud-init knows what user-data are.
_HEADERS = (
    *("#cloud-config", "#cloud-config-archive", "#cloud-boothook", "#include", "#include-once"),
    *("#part-handler", "#cloud-config-jsonp", "## template: jinja", "#!", "Content-Type:"),
    *("MIME-Version:", "From nobody"),
)
_GZIP = b"\x1f\x8b"
_FILE_OR_MAPPING: Schema = {"type": ["string", "object"]}
PARTS = ("user-data", "meta-data", "network-config")


@dataclass(frozen=True)
class CloudInit(Step):
    """The parts of a seed: each a file of the host, or a mapping that is written as YAML."""

    kind = "cloud-init"
    schema = mapping(
        dict.fromkeys(PARTS, _FILE_OR_MAPPING),
        description="A NoCloud seed; each part is a file of the host, or what would be in it.",
        required=("meta-data",),
    )
    parts: Mapping[str, Path | Mapping[str, object]]

    @classmethod
    def from_spec(
        cls, value: Mapping[str, str | Mapping[str, object]], folder: Path
    ) -> Sequence[Step]:
        """A text is the name of a file."""
        return [cls({key: folder / v if isinstance(v, str) else v for key, v in value.items()})]

    @property
    def subject(self) -> str:
        """The parts' names."""
        return " ".join(name for name in PARTS if name in self.parts)

    def _content(self, name: str) -> bytes:
        part = self.parts[name]
        if isinstance(part, Path):
            return host_file(part, _LARGEST)
        import yaml

        text = str(yaml.safe_dump(dict(part), sort_keys=False, allow_unicode=True))
        return (f"#cloud-config\n{text}" if name == "user-data" else text).encode()

    def check(self, variables: Mapping[str, str]) -> None:
        """Each part can be read, and is what cloud-init takes."""
        for name in PARTS:
            if name in self.parts:
                try:
                    _CHECKS[name](self._content(name))
                except UsageError as error:
                    error.add_context(name)
                    raise

    def apply(self, site: StepContext) -> bool:
        """Write the parts; user-data for root alone, since there may be secrets in them."""
        view = site.view
        if not _has_cloud_init(view):
            raise NotInGuestError("the guest has no cloud-init", subject="/etc/cloud/cloud.cfg")
        if view.kind("/etc/cloud/cloud-init.disabled") is not None:
            raise ImgtoolError(
                "cloud-init is disabled in the guest",
                subject="/etc/cloud/cloud-init.disabled",
                hint="delete that file in a step before",
            )
        changed = view.folder(SEED)
        for name in PARTS:
            if name in self.parts:
                content = self._content(name)
                changed |= view.write(f"{SEED}/{name}", content, mode=0o600, owner=(0, 0))
        # Without user-data the seed does not count.
        if "user-data" not in self.parts and view.kind(f"{SEED}/user-data") is None:
            changed |= view.write(f"{SEED}/user-data", b"#cloud-config\n{}\n", mode=0o600)
        return changed


def _has_cloud_init(view: GuestOverlay) -> bool:
    programs = ("/etc/cloud/cloud.cfg", "/usr/bin/cloud-init", "/usr/bin/cloud-init-per")
    return any(view.kind(path) == "file" for path in programs)


def _mapping(raw: bytes, what: str) -> Mapping[str, object]:
    from imgtool.inject.yaml_lines import mapping_of

    found = mapping_of(raw)
    if found is None:
        raise UsageError(f"{what} is not a mapping of keys")
    return found


def _check_user_data(raw: bytes) -> None:
    if raw.startswith(_GZIP):
        raw = _unpack(raw)
    first = raw.partition(b"\n")[0].decode("utf-8", "replace").strip()
    if not first.startswith(_HEADERS):
        raise UsageError(
            "cloud-init does not know what this is",
            hint="its first line is '#cloud-config', '#!' or another header of cloud-init's",
        )
    if first == "#cloud-config" and raw.partition(b"\n")[2].strip():
        _mapping(raw, "it")


def _unpack(raw: bytes) -> bytes:
    """What is in a gzip file, which cloud-init unpacks too; it has the limit of a plain one."""
    import zlib

    unpacker = zlib.decompressobj(wbits=31)  # with the header and the check sum of gzip
    try:
        content = unpacker.decompress(raw, _LARGEST + 1)
    except zlib.error as error:
        raise UsageError(f"not a gzip file: {error}") from error
    if len(content) > _LARGEST:
        raise UsageError(f"unpacked it is longer than {_LARGEST} bytes")
    if not unpacker.eof:
        raise UsageError("the gzip file is cut off")
    return content


def _check_meta_data(raw: bytes) -> None:
    found = _mapping(raw, "it")
    if not isinstance(found.get("instance-id"), str | int):
        raise UsageError(
            "it needs 'instance-id'",
            hint="another one makes cloud-init begin anew at the next start",
        )


def _check_network(raw: bytes) -> None:
    found = _mapping(raw, "it")
    inner = found.get("network", found)
    if not isinstance(inner, dict) or inner.get("version") not in (1, 2):
        raise UsageError("it needs 'version: 1' or 'version: 2'")
    if inner["version"] == 1 and not isinstance(inner.get("config"), list):
        raise UsageError("version 1 needs a list 'config'")
    if inner["version"] == 2:
        for kind in ("ethernets", "bonds", "bridges", "vlans", "wifis"):
            if kind in inner and not isinstance(inner[kind], dict):
                raise UsageError(f"'{kind}' is not a mapping of names")


_CHECKS = {
    "user-data": _check_user_data,
    "meta-data": _check_meta_data,
    "network-config": _check_network,
}
