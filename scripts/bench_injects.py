"""What scripts/bench measures of inject: twenty steps against one copy-in, and virt-customize."""

from __future__ import annotations

from bench_cases import (
    IMGTOOL,
    NO_ENGINE,
    Case,
    Command,
    Peer,
    Place,
    line,
    make_overlay,
    overlay,
    source,
)

WRITTEN = 14


def guests_folder(place: Place) -> str:
    """Where the base of the overlay is, as a word of a command."""
    return str(place.image.parent)


def prepare(place: Place) -> None:
    """An overlay to write to, and the spec of twenty steps."""
    make_overlay(place)
    steps = ["hostname: bench", "timezone: Europe/Warsaw", "mkdir: /srv/bench"]
    steps += [f"write: {{path: /srv/bench/{number}, content: text}}" for number in range(WRITTEN)]
    steps += [
        'chmod: {path: /srv/bench/0, mode: "0600"}',
        "link: {path: /srv/bench/link, target: /srv/bench/0}",
        "delete: /etc/motd",
    ]
    spec = "steps:\n" + "".join(f"  - {step}\n" for step in steps)
    (place.folder / "spec.yaml").write_text(spec)


def spec(place: Place) -> str:
    """The spec, as a word of a command."""
    return str(place.folder / "spec.yaml")


def customize() -> Command:
    """The same steps for virt-customize."""
    words = ["virt-customize", "--no-network", "--quiet", "--hostname", "bench"]
    words += ["--timezone", "Europe/Warsaw", "--mkdir", "/srv/bench"]
    for number in range(WRITTEN):
        words += ["--write", f"/srv/bench/{number}:text"]
    words += ["--chmod", "0600:/srv/bench/0", "--link", "/srv/bench/0:/srv/bench/link"]
    return line(*words, "--delete", "/etc/motd", "-a", overlay)


INJECT_CASES = (
    Case(
        "inject",
        lambda place, engine: line(
            *(str(IMGTOOL), "inject", "--backing-dir", guests_folder, overlay, spec)
        )(place),
        (
            Peer(
                "imgtool copy-in",
                line(
                    *(str(IMGTOOL), "copy-in", "--backing-dir", guests_folder),
                    *(overlay, source, "/root"),
                ),
                1.3,
            ),
            Peer("virt-customize", customize(), 0.5, appliance=True),
        ),
        engines=(NO_ENGINE,),
        prepare=prepare,
        silent=True,
    ),
)
