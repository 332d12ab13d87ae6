"""LMDB's file read page by page, without LMDB: what a data file can be asked before LMDB maps it.

LMDB trusts its pages: a damaged one kills the process, a truncated file is SIGBUS. Everything here checks what it
follows and raises `Broken`. It knows the layout of LMDB 0.9 on a 64-bit machine and nothing of what is stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

_MAGIC = 0xBEEFC0DE
_VERSION = 1
_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8
_BIG_DATA = 1
_SUB_TREE = 2
_HEADER = Struct("=QHHHH")
_OVERFLOW_COUNT = Struct("=I")
_NODE = Struct("=HHHH")
_NUMBER = Struct("=Q")
_TREE = Struct("=IHHQQQQQ")
_META_BODY = Struct(f"=IIQQ{_TREE.size}s{_TREE.size}sQQ")
_META_BYTES = _HEADER.size + _META_BODY.size
_NO_PAGE = 2**64 - 1
_PAGE_BYTES = frozenset(2**power for power in range(9, 17))


class Broken(Exception):
    """The file is not, or no longer, an LMDB file."""


class Tree(NamedTuple):
    """The root of one table, and what LMDB counted."""

    page_bytes: int
    """Only in the tree of free pages: the file's page size."""
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


class Meta(NamedTuple):
    """One of the two meta pages."""

    page_bytes: int
    free: Tree
    main: Tree
    last_page: int
    txn_id: int


class Walked(NamedTuple):
    """What a walk over all pages found."""

    pages: int
    free_pages: int


class Pages:
    """A data file, opened for reading. Close it, or use it in a `with` statement."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.file_bytes = os.fstat(self._file).st_size
            self.meta = self._newest_meta()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @property
    def missing(self) -> range:
        """Pages that the meta counts and the file does not hold."""
        return range(min(self.file_bytes // self.meta.page_bytes, self.meta.last_page + 1), self.meta.last_page + 1)

    def free_pages(self) -> set[int]:
        """The pages that LMDB holds for reuse. Raises Broken."""
        free: set[int] = set()
        for _, value, _ in self._leaves(self.meta.free, set()):
            if len(value) < 8 or len(value) < 8 + 8 * _NUMBER.unpack_from(value)[0]:
                raise Broken("a list of free pages is shorter than it says")
            count = _NUMBER.unpack_from(value)[0]
            numbers = Struct(f"={count}Q").unpack_from(value, 8)
            if len(free) + count != len(free.union(numbers)):
                raise Broken("a page is free twice")
            free.update(numbers)
        if any(not 2 <= number <= self.meta.last_page for number in free):
            raise Broken("a free page lies outside the file")
        return free

    def walk(self) -> Walked:
        """Follow every pointer of every table: each page is used once or free once. Raises Broken."""
        used: set[int] = {0, 1}
        for _ in self._leaves(self.meta.free, used):
            pass
        for key, value, flags in self._leaves(self.meta.main, used):
            if flags & _SUB_TREE:
                if len(value) != _TREE.size:
                    raise Broken(f"the root of table {key!r} has {len(value)} bytes")
                for _ in self._leaves(Tree(*_TREE.unpack(value)), used, values=False):
                    pass
        free = self.free_pages()
        if not used.isdisjoint(free):
            raise Broken(f"page {min(used & free)} is in use and free")
        if len(used) + len(free) != self.meta.last_page + 1:
            raise Broken(f"{self.meta.last_page + 1 - len(used) - len(free)} pages are neither in use nor free")
        return Walked(len(used), len(free))

    def _newest_meta(self) -> Meta:
        first = self._meta(0, 0)
        second = self._meta(first.page_bytes, 1)
        if first.page_bytes != second.page_bytes:
            raise Broken("the two meta pages disagree about the size of a page")
        return max(first, second, key=lambda meta: meta.txn_id)

    def _meta(self, position: int, number: int) -> Meta:
        data = os.pread(self._file, _META_BYTES, position)
        if len(data) < _META_BYTES:
            raise Broken(f"the file has only {self.file_bytes} bytes")
        page, _, flags, _, _ = _HEADER.unpack_from(data)
        magic, version, _, _, free, main, last_page, txn_id = _META_BODY.unpack_from(data, _HEADER.size)
        if magic != _MAGIC or version != _VERSION or page != number or not flags & _META:
            raise Broken("it does not begin with LMDB's meta pages")
        tree = Tree(*_TREE.unpack(free))
        if tree.page_bytes not in _PAGE_BYTES:
            raise Broken(f"a page of {tree.page_bytes} bytes")
        return Meta(tree.page_bytes, tree, Tree(*_TREE.unpack(main)), last_page, txn_id)

    def _page(self, number: int, used: set[int]) -> bytes:
        """A page that nobody else may use."""
        if not 2 <= number <= self.meta.last_page:
            raise Broken(f"a pointer to page {number} of {self.meta.last_page + 1}")
        if number in used:
            raise Broken(f"two pointers to page {number}")
        used.add(number)
        page = os.pread(self._file, self.meta.page_bytes, number * self.meta.page_bytes)
        if len(page) < self.meta.page_bytes:
            raise Broken(f"page {number} lies behind the end of the file")
        return page

    def _leaves(self, tree: Tree, used: set[int], values: bool = True) -> Iterator[tuple[bytes, bytes, int]]:
        """(key, value, flags) of each entry; `values`: read those that lie on pages of their own too."""
        entries = branch_pages = leaf_pages = overflow_pages = 0
        waiting = [] if tree.root == _NO_PAGE else [(tree.root, 1)]
        while waiting:
            number, depth = waiting.pop()
            page = self._page(number, used)
            own, _, flags, lower, upper = _HEADER.unpack_from(page)
            wanted = _LEAF if depth == tree.depth else _BRANCH
            if own != number or flags & 0xF != wanted or not _HEADER.size <= lower <= upper <= len(page) or lower % 2:
                raise Broken(f"page {number} has a broken head")
            leaf_pages += wanted == _LEAF
            branch_pages += wanted == _BRANCH
            children: list[tuple[int, int]] = []
            for pointer in Struct(f"={(lower - _HEADER.size) // 2}H").unpack_from(page, _HEADER.size):
                if not upper <= pointer <= len(page) - _NODE.size:
                    raise Broken(f"page {number} has a pointer out of its bounds")
                low, high, node_flags, key_bytes = _NODE.unpack_from(page, pointer)
                start = pointer + _NODE.size
                if wanted == _BRANCH:
                    children.append((low | high << 16 | node_flags << 32, depth + 1))
                    continue
                size = low | high << 16
                key, start = page[start : start + key_bytes], start + key_bytes
                entries += 1
                if not node_flags & _BIG_DATA:
                    if start + size > len(page):
                        raise Broken(f"page {number} has an entry that reaches beyond its end")
                    yield key, page[start : start + size], node_flags
                    continue
                if start + 8 > len(page):
                    raise Broken(f"page {number} has an entry that reaches beyond its end")
                where = _NUMBER.unpack_from(page, start)[0]
                count, data = self._overflow(where, size if values else 0, used)
                if count * self.meta.page_bytes < _HEADER.size + size:
                    raise Broken(f"page {number} has an entry that reaches beyond its pages")
                overflow_pages += count
                yield key, data, node_flags
            waiting += reversed(children)
        counted = (branch_pages, leaf_pages, overflow_pages, entries)
        if counted != (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries):
            raise Broken(f"a tree has {counted} branch, leaf, overflow pages and entries, its root says otherwise")

    def _overflow(self, number: int, size: int, used: set[int]) -> tuple[int, bytes]:
        """(how many pages, the first `size` bytes on them). LMDB may leave a shorter value on the pages of a longer."""
        page = self._page(number, used)
        own, _, flags, _, _ = _HEADER.unpack_from(page)
        count: int = _OVERFLOW_COUNT.unpack_from(page, _HEADER.size - _OVERFLOW_COUNT.size)[0]
        others = range(number + 1, number + count)
        if own != number or not flags & _OVERFLOW or not count or number + count - 1 > self.meta.last_page:
            raise Broken(f"page {number} has a broken head")
        if not used.isdisjoint(others):
            raise Broken(f"two pointers to a page behind {number}")
        used.update(others)
        data = page[_HEADER.size : _HEADER.size + size]
        if len(data) < size:
            data += os.pread(self._file, size - len(data), (number + 1) * self.meta.page_bytes)
        return count, data
