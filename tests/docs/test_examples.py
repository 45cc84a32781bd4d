"""Every example of the documentation prints what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.examples import differences, examples, write
from tests.docs.varying import same
from tests.support.documentation import name_of, pages

PAGES = [page for page in pages() if examples(page)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples(page: Path):
    wrong = differences(page)
    assert wrong == [], "\n".join(map(str, wrong))


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("imgtool: closed after 0.7 s in all", "imgtool: closed after 12.25 s in all"),
        ("a  2026-11-23T22:36:21.6Z", "a 2027-01-01T00:00:00.123456789Z"),
        ("/srv/guest.qcow2  4.0G  289M", "/srv/guest.qcow2 4.0G 301M"),
        ("root  11%", "root 12%"),
        ("one\n...\nlast", "one\ntwo\nthree\nlast"),
    ],
)
def test_what_varies_may_differ(written, printed):
    assert same(written.splitlines(), printed.splitlines())


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("/dev/sda1 64M", "/dev/sda2 64M"),
        ("4.0G  289M", "4.0G  589M"),
        ("4.0G", "4.0M"),
        ("START 1048576", "START 1048577"),
        ("one", "one\ntwo"),
        ("one\ntwo", "one"),
        ("one\n...\nlast", "one\ntwo"),
        ("", "imgtool: error: no such file (x)"),
    ],
)
def test_what_does_not_vary_may_not_differ(written, printed):
    assert not same(written.splitlines(), printed.splitlines())


_PAGE = """# A page

```console
$ cat > list <<END
> one
> two
> END
$ wc -l list; pwd
2 list
/srv
$ cat list
one
three
$ imgtool ls nothing.qcow2 /; echo $?
imgtool: error: no such file (nothing.qcow2)
5
```

<!-- not run: it is wrong on purpose -->
```console
$ echo four
five
```

```python
print(6 * 7)
```

```text
43
```
"""


def test_a_wrong_example_is_found_and_can_be_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(_PAGE)
    wrong = differences(page)
    assert [one.example.line for one in wrong][:2] == [11, 14]
    assert [one.printed for one in wrong][::2] == [["one", "two"], ["42"]]
    write(wrong)
    assert differences(page) == []
    assert "one\ntwo\n$ imgtool ls" in page.read_text()
    assert "```text\n42\n```\n" in page.read_text()
    assert "five" in page.read_text()
