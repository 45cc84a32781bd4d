"""Small reads of a volume answered from memory: metadata lies together, reads of it should too."""

from __future__ import annotations

from imgtool.engines.direct.worker.fs.base import ReadFailed, Source

_PAGE = 16 * 1024
_PAGES = 256  # 4 MiB in all


class Pages:
    """A source whose recently read pages stay in memory; large reads pass through."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pages: dict[int, bytes] = {}
        self.size = source.size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`; `ReadFailed` past the end."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ReadFailed("outside of the volume")
        first, last = offset // _PAGE, (offset + length - 1) // _PAGE
        if length > 2 * _PAGE:
            return self._source.read(offset, length)
        if first == last:
            start = offset - first * _PAGE
            return self._page(first)[start : start + length]
        joined = b"".join(self._page(number) for number in range(first, last + 1))
        start = offset - first * _PAGE
        return joined[start : start + length]

    def _page(self, number: int) -> bytes:
        page = self._pages.pop(number, None)
        if page is None:
            start = number * _PAGE
            page = self._source.read(start, min(_PAGE, self.size - start))
            if len(self._pages) >= _PAGES:
                del self._pages[next(iter(self._pages))]
        self._pages[number] = page  # put last: the first is the one that was used longest ago
        return page
