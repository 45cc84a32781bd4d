"""Scripts that run once, when the guest starts the next time.

They stand in a folder, with numbers before their names, and a unit of ours runs those that have not
run: one after the other, also if one fails. What they say is in a log and on the console. That a
script ran is written down before it starts: one that restarts the machine is not run again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from imgtool.errors import UsageError
from imgtool.inject.guest_files.units import ADMIN, require_systemd
from imgtool.inject.guest_overlay import GuestOverlay
from imgtool.inject.steps.schema import HOST_FILE, WORD, Schema, mapping
from imgtool.inject.steps.services import enable
from imgtool.inject.steps.step import Option, Step, StepContext, host_file

FOLDER = "/usr/lib/imgtool-firstboot"
SCRIPTS = f"{FOLDER}/scripts"
DONE = "/var/lib/imgtool-firstboot"
LOG = "/var/log/imgtool-firstboot.log"
UNIT = "imgtool-firstboot.service"
_LARGEST = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBERED = re.compile(r"(\d{4})-(.+)")

RUNNER = f"""\
#!/bin/sh
# Runs, in the order of their names, the scripts that have not run yet.
scripts={SCRIPTS}
ran={DONE}
log={LOG}
mkdir -p "$ran"
# /var/log is not always root's alone.
if [ -L "$log" ]; then rm -f "$log"; fi
touch "$log" && chmod 0600 "$log"
status=0
for script in "$scripts"/*; do
    name=${{script##*/}}
    if [ ! -f "$script" ] || [ -e "$ran/$name" ]; then continue; fi
    : > "$ran/$name"
    sync
    {{
        echo "imgtool: $(date): $name begins"
        "$script" < /dev/null
        ended=$?
        echo "$ended" > "$ran/$name"
        echo "imgtool: $(date): $name ended with status $ended"
    }} 2>&1 | tee -a "$log"
    [ "$(cat "$ran/$name")" = 0 ] || status=1
done
exit $status
"""

SERVICE = f"""\
[Unit]
Description=Scripts of the first start
After=network-online.target
Wants=network-online.target

[Service]
Type=oneshot
ExecStart=/bin/sh {FOLDER}/run
StandardOutput=journal+console
StandardError=inherit
TimeoutStartSec=infinity

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class FirstBoot(Step):
    """A script that runs once."""

    kind = "firstboot"
    schema: ClassVar[Schema] = {
        "description": "A script that runs once, when the guest starts the next time.",
        "anyOf": [
            HOST_FILE,
            mapping(
                {"name": {"type": "string", "pattern": f"^{_NAME.pattern}$"}, "content": WORD},
                required=("name", "content"),
            ),
        ],
    }
    option = Option("--firstboot", "SCRIPT", "Run once, at the next start.")
    script: Path | None = None
    name: str = ""
    content: str | None = None

    @classmethod
    def from_spec(cls, value: str | Mapping[str, str], folder: Path) -> Sequence[Step]:
        """A file of the host, or a name with what is to be in it."""
        return [cls(folder / value) if isinstance(value, str) else cls(None, **value)]

    @classmethod
    def from_option(cls, text: str) -> Step:
        """A file of the host."""
        return cls(Path(text))

    @property
    def subject(self) -> str:
        """The script's name."""
        return self.name or (self.script.name if self.script else "")

    def _text(self) -> bytes:
        if self.script is not None:
            return host_file(self.script, _LARGEST)
        return (self.content or "").encode()

    def check(self, variables: Mapping[str, str]) -> None:
        """It can be read, and says by what it is run."""
        if not _NAME.fullmatch(self.subject):
            raise UsageError(
                "a script's name is of letters, digits, '.', '_' and '-'", subject=self.subject
            )
        text = self._text()
        if not text.startswith((b"#!", b"\x7fELF")):
            raise UsageError(
                "the script does not begin with '#!'",
                subject=self.subject,
                hint="such as #!/bin/sh",
            )
        if text.partition(b"\n")[0].endswith(b"\r"):
            raise UsageError("the script has DOS line ends", subject=self.subject)

    def apply(self, site: StepContext) -> bool:
        """Put it behind those that are there; one of its name that has not run is replaced."""
        view = site.view
        require_systemd(view)
        text = self._text()
        names = view.names(SCRIPTS)
        numbered = [found for found in map(_NUMBERED.fullmatch, names) if found]
        place = None
        for found in numbered:
            if found[2] == self.subject:
                same = view.read(f"{SCRIPTS}/{found[0]}") == text
                if same or view.kind(f"{DONE}/{found[0]}") is None:
                    place = found[0]
        if place is None:
            number = max((int(found[1]) for found in numbered), default=0) + 1
            place = f"{number:04d}-{self.subject}"
        changed = view.folder(SCRIPTS)
        changed |= view.write(f"{SCRIPTS}/{place}", text, mode=0o755, owner=(0, 0))
        return _runs_them(view) or changed


def _runs_them(view: GuestOverlay) -> bool:
    changed = view.write(f"{FOLDER}/run", RUNNER.encode(), mode=0o755, owner=(0, 0))
    changed |= view.folder(ADMIN)
    changed |= view.write(f"{ADMIN}/{UNIT}", SERVICE.encode(), mode=0o644, owner=(0, 0))
    return enable(view, UNIT) or changed
