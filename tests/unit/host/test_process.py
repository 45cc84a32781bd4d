"""How programs are started."""

from __future__ import annotations

import subprocess
import sys

from imgtool.host.process import Limits, run


def test_program_of_limited_memory_sets_little_of_it_aside():
    words = ["sh", "-c", "echo ${MALLOC_ARENA_MAX-none}; ulimit -v"]
    assert run(words).stdout.split()[0] == b"none"
    assert run(words, limits=Limits(memory=1 << 30)).stdout.split() == [b"1", b"1048576"]


def test_what_is_asked_for_counts_more():
    found = run(
        ["sh", "-c", "echo $MALLOC_ARENA_MAX"],
        limits=Limits(memory=1 << 30),
        env={"MALLOC_ARENA_MAX": "3"},
    )
    assert found.stdout.strip() == b"3"


def test_lower_limits_of_the_host_stay():
    """`ulimit -v` and its like are no error, and nobody raises them."""
    program = """
import os, resource
import subprocess
import sys

from imgtool.host.process import Limits, run
if os.geteuid() == 0:
    os.setresuid(61500, 61500, 61500)
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (50, 50))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
words = ["sh", "-c", "ulimit -v; ulimit -t; ulimit -f"]
print(run(words, limits=Limits(memory=4 << 30, cpu=100, file_size=1 << 30)).stdout.decode())
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.stderr, done.stdout.split()) == ("", [str(3 << 20), "50", "2048"])
