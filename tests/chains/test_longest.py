"""The longest chain that is followed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from imgtool.image.chain.chain import MAX_LINKS, open_chain


def test_longest_chain_that_is_followed_is_opened_by_qemu(tmp_path: Path) -> None:
    words = ["qemu-img", "create", "-q", "-f", "qcow2"]
    link = tmp_path / "0.qcow2"
    subprocess.run([*words, link, "1M"], check=True)
    for number in range(1, MAX_LINKS):
        overlay = tmp_path / f"{number}.qcow2"
        subprocess.run([*words, "-u", "-F", "qcow2", "-b", link.name, overlay, "1M"], check=True)
        link = overlay
    longest = open_chain(link)
    assert len(longest.links) == MAX_LINKS == 200
    words = ["qemu-img", "map", "--output=json", longest.filename()]
    assert json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
