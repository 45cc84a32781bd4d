"""One number makes one hostile image out of the sound ones: the same number, the same changes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

from tests.hostile.seeds import Region, Seed

_WORDS = (b"9" * 40, b"-1", b"{", b"}", b"[", b'"', b"\\", b"1e9", b"../..", b"#", b"\0", b"9.9")


class Mutant(NamedTuple):
    """A hostile image, and what was done to make it."""

    number: int
    seed: Seed
    content: bytes
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number} ({self.seed.name}: {'; '.join(self.changes)})"


def mutant(seeds: Sequence[Seed], number: int) -> Mutant:
    """The hostile image of this number; numbers in a row go through the sound images in turn."""
    chance = random.Random(number)
    seed = seeds[number % len(seeds)]
    image = bytearray(seed.content)
    repaired = chance.random() < 0.5
    changes: list[str] = []
    kinds = sorted({region.what for region in seed.regions})
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        what = chance.choice(kinds)
        region = chance.choice([region for region in seed.regions if region.what == what])
        changes.append(f"{what} {_change(image, region, chance)}")
        if repaired and region.repair is not None:
            region.repair(image, region.offset)
            changes[-1] += ", checksum right"
    if chance.random() < 0.03:
        del image[chance.randrange(len(image)) :]
        changes.append(f"cut at {len(image)}")
    return Mutant(number, seed, bytes(image), tuple(changes))


def _change(image: bytearray, region: Region, chance: random.Random) -> str:
    """Change one field of a structure, a few of its bits, or a stretch of it."""
    way = chance.choice(("field", "field", "field", "field", "bits", "stretch", "word"))
    if way == "word" and region.what == "text":
        value = chance.choice(_WORDS)
        at = region.offset + chance.randrange(region.length - len(value))
    elif way == "bits":
        at = region.offset + chance.randrange(region.length)
        value = bytes([image[at] ^ 1 << chance.randrange(8)])
    elif way == "stretch":
        length = chance.randrange(4, 33)
        at = region.offset + chance.randrange(max(1, region.length - length))
        start = region.offset + chance.randrange(max(1, region.length - length))
        value = chance.choice((chance.randbytes(length), bytes(image[start : start + length])))
    else:
        width = chance.choice((1, 2, 2, 4, 4, 4, 8))
        at = region.offset + chance.randrange(max(1, region.length // width)) * width
        order: Literal["little", "big"] = chance.choice(("little", "big"))
        known = int.from_bytes(image[at : at + width], order)
        most = (1 << 8 * width) - 1
        number = chance.choice(
            (
                0,
                1,
                most,
                most >> 1,
                (most >> 1) + 1,
                chance.randrange(most + 1),
                known + 1 & most,
                known - 1 & most,
                known * 2 & most,
                known + chance.randrange(200) & most,
            )
        )
        value = number.to_bytes(width, order)
    image[at : at + len(value)] = value
    return f"+{at - region.offset} of {region.offset} = {value.hex()}"
