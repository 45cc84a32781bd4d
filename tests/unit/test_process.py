"""How programs are started."""

from __future__ import annotations

from imgtool.process import Limits, run


def test_a_program_whose_memory_is_limited_sets_little_of_it_aside_for_threads():
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
