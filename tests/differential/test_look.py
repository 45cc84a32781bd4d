"""`du`, `head`, `tail`, `stat`, `ls` and patterns say what the programs of that name say."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from imgtool import open_guest
from imgtool.errors import NotInGuestError, UsageError
from imgtool.guest.globbing import expand
from imgtool.guest.guest import Guest
from tests.support.commands import run_here

_LINES = b"".join(b"line %d\n" % number for number in range(1, 40001))


def _make_tree(top: Path) -> None:
    for folder in ("var/log/deep", "home/a b", "empty", ".hidden", "[x]"):
        (top / folder).mkdir(parents=True)
    files = {
        "var/log/app.log": _LINES,
        "var/log/other.log": b"one\ntwo\nthree",
        "var/log/empty.log": b"",
        "var/log/newlines.log": b"\n\n\n",
        "var/log/deep/big": os.urandom(1 << 20),
        "home/a b/file": b"x" * 5000,
        ".hidden/file": b"x",
        "[x]/file": b"x",
    }
    for name, content in files.items():
        (top / name).write_bytes(content)
    with (top / "var/sparse").open("wb") as file:
        file.seek(8 << 20)
        file.write(b"end")
    (top / "var/log/link.log").symlink_to("app.log")
    (top / "log").symlink_to("var/log")
    os.link(top / "var/log/deep/big", top / "home/again")
    for number, path in enumerate(sorted(top.rglob("*"))):
        moment = 1_600_000_000 + number
        os.utime(path, (moment, moment), follow_symlinks=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("look") / "tree"
    top.mkdir()
    _make_tree(top)
    return top


@pytest.fixture(scope="module")
def image(tree: Path) -> Path:
    image = tree.parent / "disk.img"
    words = ["mke2fs", "-q", "-t", "ext4", "-O", "^resize_inode", "-d", str(tree)]
    subprocess.run([*words, image, "32M"], check=True)
    return image


@pytest.fixture(scope="module")
def guest(image: Path):
    with open_guest(image, engine="direct") as opened:
        yield opened


def _theirs(tree: Path, *words: str) -> bytes:
    env = {**os.environ, "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    return subprocess.run(words, cwd=tree, env=env, check=True, capture_output=True).stdout


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("tail", ["-n", "3"]),
        ("tail", ["-n", "0"]),
        ("tail", ["-n", "39999"]),
        ("tail", ["-n", "50000"]),
        ("tail", ["-n", "+39998"]),
        ("tail", ["-n", "+1"]),
        ("tail", ["-n", "+0"]),
        ("tail", ["-n", "+50000"]),
        ("tail", ["-c", "10"]),
        ("tail", ["-c", "1M"]),
        ("tail", ["-c", "+100"]),
        ("tail", []),
        ("head", []),
        ("head", ["-n", "3"]),
        ("head", ["-n", "0"]),
        ("head", ["-n", "50000"]),
        ("head", ["-n", "-3"]),
        ("head", ["-n", "-39999"]),
        ("head", ["-c", "10"]),
        ("head", ["-c", "1k"]),
        ("head", ["-c", "-10"]),
    ],
)
@pytest.mark.parametrize("name", ["app", "other", "empty", "newlines", "link"])
def test_ends_of_files(program: str, words: list[str], name: str, image: Path, tree: Path) -> None:
    path = f"/var/log/{name}.log"
    done = run_here(program, *words, image, path)
    assert done.status == 0, done.err
    assert done.out == _theirs(tree, program, *words, f".{path}")


def test_several_ends_have_their_names(image: Path, tree: Path) -> None:
    done = run_here("tail", "-n", "1", image, "/var/log/*.log")
    files = ["app", "empty", "link", "newlines", "other"]
    expected = _theirs(tree, "tail", "-n", "1", *(f"var/log/{name}.log" for name in files))
    assert (done.status, done.out) == (0, expected.replace(b"==> ", b"==> /"))
    quiet = run_here("tail", "-q", "-n", "1", image, "/var/log/*.log")
    assert quiet.out == b"".join(
        line + b"\n" * (not line.endswith(b"three"))
        for line in (b"line 40000", b"line 40000", b"", b"three")
    )


def test_a_part_of_what_is_no_file_is_an_error(image: Path) -> None:
    for program in ("head", "tail"):
        assert run_here(program, image, "/var/log").status == 1
        assert run_here(program, image, "/var/nothing").status == 5
        assert run_here(program, "-n", "1", "-c", "1", image, "/var").status == 2
        assert run_here(program, "-n", "many", image, "/var").status == 2


def _sizes(lines: bytes) -> dict[str, int]:
    rows = (line.split(None, 1) for line in lines.decode().splitlines())
    return {"/" + path.removeprefix(".").lstrip("/"): int(size) for size, path in rows}


@pytest.mark.parametrize("words", [["--apparent-size"], []])
@pytest.mark.parametrize("start", ["/", "/var", "/home"])
def test_du_sums_what_du_sums(words: list[str], start: str, image: Path, guest: Guest) -> None:
    """Of the kernel's own view of the image there is no need: the walk is compared elsewhere."""
    field = "apparent" if words else "allocated"
    done = run_here("du", "--all", "--depth", "9", *words, "-o", "json", image, start)
    rows = {row["path"]: row for row in json.loads(done.text)}
    entries = [guest.lstat(start), *guest.walk(start)]
    assert len(entries) - len(rows) == 1 * (start == "/")  # the second name of one file
    for path, row in rows.items():
        below, met = [], set()
        for entry in entries:
            name = os.fsdecode(entry.path)
            inside = path == "/" or name == path or name.startswith(path + "/")
            if inside and entry.inode not in met:
                met.add(entry.inode)
                below.append(entry)
        if row["files"] != len(below):  # the second name counts where the first one is not
            continue
        sizes = (
            (entry.size if entry.type != "directory" else 0)
            if field == "apparent"
            else entry.blocks * 512
            for entry in below
        )
        assert row[field] == sum(sizes), path
    order = [row[field] for row in json.loads(done.text)]
    assert order == sorted(order, reverse=True)


def test_du_shows_the_largest(image: Path) -> None:
    lines = run_here("du", "--top", "2", "--all", image, "/var").text.splitlines()
    assert [line.split()[-1] for line in lines] == ["/var", "/var/log"]
    assert run_here("du", "-s", image, "/var", "/home").text.count("\n") == 2
    lines = run_here("du", image).text.splitlines()
    assert {line.split(None, 1)[1] for line in lines} >= {"/", "/var", "/home", "/.hidden"}
    assert run_here("du", "-h", "-s", image, "/home/a b/file").text.split()[0] == "5.0K"
    for words in (["-s", "--top", "1"], ["--ncdu", "x", "--all"]):
        assert run_here("du", *words, image).status == 2
    assert run_here("du", image, "/nothing").status == 5


def test_ncdu_gets_the_whole_tree(image: Path, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "usage.json"
    assert run_here("du", "--ncdu", file, image).status == 0
    major, minor, head, root = json.loads(file.read_text())
    assert (major, minor, head["progname"]) == (1, 0, "imgtool")

    def names(item, above: str):
        if isinstance(item, list):
            path = f"{above}{item[0]['name']}".rstrip("/")
            yield path or "/"
            for below in item[1:]:
                yield from names(below, path + "/")
        else:
            yield above + item["name"]

    found = {name for name in names(root, "") if "lost+found" not in name}
    assert found == {"/", *(f"/{path.relative_to(tree)}" for path in tree.rglob("*"))}
    assert run_here("du", "--ncdu", file, image).status == 2  # nothing is replaced


def test_stat_knows_where_a_file_lies(image: Path, tree: Path) -> None:
    done = run_here("stat", "-o", "json", image, "/var/log/deep/big", "/log", "/nothing")
    assert done.status == 5
    big, link = json.loads(done.text)
    assert (big["links"], big["size"], link["target"]) == (2, 1 << 20, "var/log")
    disk = image.read_bytes()
    content = b"".join(
        disk[extent["position"] : extent["position"] + extent["length"]]
        for extent in big["extents"]
    )
    assert content[: 1 << 20] == (tree / "var/log/deep/big").read_bytes()
    (sparse,) = json.loads(run_here("stat", "-o", "json", image, "/var/sparse").text)
    assert [extent["offset"] for extent in sparse["extents"]] == [8 << 20]
    text = run_here("stat", image, "/var/log/deep/big").text
    assert "links       2\n" in text and "\nextent      " in text


@pytest.mark.parametrize(
    ("words", "theirs"),
    [
        (["-t", "/var/log"], ["-A1t", "var/log"]),
        (["-S", "/var/log"], ["-A1S", "var/log"]),
        (["-tr", "/var/log"], ["-A1tr", "var/log"]),
        (["-r", "/var/log"], ["-A1r", "var/log"]),
        (["-a1", "/.hidden"], ["-A1", ".hidden"]),
        (["--directory", "/var", "/log"], ["-1d", "/var", "/log"]),
    ],
)
def test_ls_orders_as_ls(words: list[str], theirs: list[str], image: Path, tree: Path) -> None:
    options = [word for word in words if word.startswith("-")]
    done = run_here("ls", *options, image, *words[len(options) :])
    if theirs[0] == "-1d":
        assert done.text.splitlines() == ["/var", "/log"]
        return
    ours = done.text.splitlines()
    assert ours == _theirs(tree, "ls", *theirs).decode().splitlines()


def test_ls_lists_files_before_directories(image: Path) -> None:
    done = run_here("ls", image, "/var/log/deep", "/var/log/*.log", "/nothing")
    files = [f"/var/log/{name}.log" for name in ("app", "empty", "link", "newlines", "other")]
    assert done.text.splitlines() == [*files, "", "/var/log/deep:", "big"]
    assert done.status == 5
    assert run_here("ls", image).text == run_here("ls", image, "/").text
    # What is below a link to a directory has the link's name.
    assert "/log/deep/big" in run_here("ls", "-R", image, "/log").text.splitlines()
    assert run_here("ls", "-t", "-S", image).status == 2
    (row, *_) = json.loads(run_here("ls", "-i", "-o", "json", image, "/var").text)
    assert row["inode"] > 0


@pytest.mark.parametrize(
    "pattern",
    ["/*", "/v*/l*", "/.h*", "/*/*", "/home/a?b/*", "/[h-v]*", "/[!v]*", "/log/*.log", "/*/deep"],
)
def test_patterns_mean_what_they_mean_to_a_shell(pattern: str, guest: Guest, tree: Path) -> None:
    script = f"shopt -u extglob; printf '%s\\0' .{pattern.replace(' ', chr(92) + ' ')}"
    expected = _theirs(tree, "bash", "-c", script).decode().split("\0")[:-1]
    found = [path for path in expand(guest, pattern) if path != "/lost+found"]
    assert sorted(found) == sorted(path.removeprefix(".") for path in expected)


def test_a_pattern_may_be_a_name(guest: Guest) -> None:
    assert expand(guest, "/[x]") == ["/[x]"]
    assert expand(guest, r"/\[x]/*") == ["/[x]/file"]
    assert expand(guest, "/v*/") == ["/var"]
    with pytest.raises(NotInGuestError, match="nothing in the guest matches"):
        expand(guest, "/var/log/*.log/")
    with pytest.raises(NotInGuestError, match="nothing in the guest matches"):
        expand(guest, "/[x]/*")
    with pytest.raises(UsageError, match="absolute"):
        expand(guest, "var/*")
