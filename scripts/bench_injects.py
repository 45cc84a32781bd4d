"""What scripts/bench measures of inject: twenty steps against one copy-in, and virt-customize; ten
clones of one base."""

from __future__ import annotations

from bench_cases import (
    IMGTOOL,
    NO_ENGINE,
    CannotMeasure,
    Case,
    Command,
    Peer,
    Place,
    image,
    line,
    make_overlay,
    overlay,
    source,
)

WRITTEN = 14
CLONES = 10


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


def clones(parallel: int) -> Command:
    """Ten clones of the guest, so many at a time."""

    def command(place: Place) -> list[str]:
        words = [str(IMGTOOL), "inject", *line(image, spec)(place), "-P", str(parallel)]
        words += ["--hostname", "{{ image }}", "--backing-dir", guests_folder(place)]
        for new in place.overlays(CLONES):
            words += ["--clone", str(new)]
        return words

    return command


def small(place: Place) -> None:
    """Raise unless the clones together are smaller than their base: it was not copied."""
    together = sum(new.stat().st_blocks for new in place.overlays(CLONES))
    if together >= place.image.stat().st_blocks:
        raise CannotMeasure(f"the clones take {together * 512} bytes, more than their base")


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
    Case(
        "inject-clones",
        lambda place, engine: clones(2)(place),
        (Peer("one at a time", clones(1), 1.0),),
        engines=(NO_ENGINE,),
        prepare=prepare,
        finish=small,
        by_name=True,
        once=True,
    ),
)
