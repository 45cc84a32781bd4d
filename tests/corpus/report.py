"""Many images, two at a time, and what came of them in one report."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.corpus.look import Looked, look


@dataclass(frozen=True)
class Report:
    """What was looked at."""

    looked: Sequence[Looked]

    @property
    def defects(self) -> list[str]:
        """Everything that is not as it should be, with its image."""
        return [f"{each.image}: {line}" for each in self.looked for line in each.defects]

    def answers(self) -> Iterator[str]:
        """All answers, as JSON lines."""
        for each in self.looked:
            for command, answer in each.answers.items():
                row = {"image": str(each.image), "command": command, "status": answer.status}
                row |= {"seconds": round(answer.seconds, 2), "memory": answer.memory}
                row |= {"err": answer.err, "out": answer.out[:2000].decode(errors="replace")}
                yield json.dumps(row) + "\n"

    def __str__(self) -> str:
        answers = [answer for each in self.looked for answer in each.answers.values()]
        lines = list(self.defects)
        for command in self.looked[0].answers if self.looked else ():
            statuses = Counter(each.answers[command].status for each in self.looked)
            told = ", ".join(f"{count} with {status}" for status, count in sorted(statuses.items()))
            lines.append(f"{command}: {told}")
        slowest = max((answer.seconds for answer in answers), default=0)
        largest = max((answer.memory for answer in answers), default=0)
        lines.append(
            f"{len(self.looked)} images, {len(answers)} commands, {len(self.defects)} defects;"
            f" {sum(each.compared for each in self.looked)} compared with the kernel;"
            f" slowest {slowest:.1f} s, largest {largest >> 20} MiB"
        )
        return "\n".join(lines)


def run_all(
    images: Sequence[Path],
    expected: Mapping[str, Mapping[str, Any]],
    *,
    engine: str = "direct",
    parallel: int = 2,
) -> Report:
    """Look at each of the images; `expected` has its part by what a path ends in."""

    def one(image: Path) -> Looked:
        wanted = next((each for end, each in expected.items() if str(image).endswith(end)), None)
        return look(image, engine=engine, expected=wanted)

    looked = []
    with ThreadPoolExecutor(parallel) as pool:
        for number, each in enumerate(pool.map(one, images), 1):
            looked.append(each)
            if number % 50 == 0:
                done = sum(len(each.defects) for each in looked)
                print(f"{number} of {len(images)} images, {done} defects", file=sys.stderr)
    return Report(looked)
