"""Stands between LMDB and the kernel: sees every write and sync of a data file, and may fail it or end the process.

LMDB's extension module calls libc through a table of addresses (ELF's relocations); `install` puts Python functions
into that table. So no compiler, tracer or preloaded library is needed. 64-bit Linux; for a process of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import lmdb.cpython

_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_HEADER = Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = Struct("<IIQQQQQQ")
_DYNAMIC = Struct("<qQ")
_RELOCATION = Struct("<QQq")
_SYMBOL = Struct("<IBBHQQ")
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_PLTRELSZ, _DT_JMPREL = 5, 6, 7, 8, 2, 23
_PROT_READ_WRITE = 3


class Write(NamedTuple):
    """About to write these bytes here; `synced`: they are durable when the call returns (O_DSYNC)."""

    offset: int
    data: bytes
    synced: bool


class Sync(NamedTuple):
    """About to make all earlier writes durable."""


Handler = Callable[[Write | Sync], int]
"""Told before each call; returns 0 to let it pass, or the errno that it fails with."""

_kept: list[Any] = []


def install(handler: Handler) -> None:
    """From now on, in this process, LMDB's writes go through the handler."""
    slots = _slots(lmdb.cpython.__file__)

    def pwrite(file: int, data: int, length: int, offset: int) -> int:
        content = ctypes.string_at(data, length)
        return _call(Write(offset, content, _synced(file)), lambda: os.pwrite(file, content, offset))

    def writev(file: int, vector: int, count: int) -> int:
        parts = (ctypes.c_size_t * (2 * count)).from_address(vector)
        content = b"".join([ctypes.string_at(parts[2 * i], parts[2 * i + 1]) for i in range(count)])
        offset = os.lseek(file, 0, os.SEEK_CUR)
        return _call(Write(offset, content, _synced(file)), lambda: os.write(file, content))

    def fdatasync(file: int) -> int:
        return _call(Sync(), lambda: _fdatasync(file))

    def _call(event: Write | Sync, real: Callable[[], int]) -> int:
        error = handler(event)
        if not error:
            try:
                return real()
            except OSError as failed:
                error = failed.errno or 0
        ctypes.set_errno(error)
        return -1

    kinds: dict[str, tuple[Any, Callable[..., int]]] = {
        "pwrite": ((ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long), pwrite),
        "writev": ((ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int), writev),
        "fdatasync": ((ctypes.c_int, ctypes.c_int), fdatasync),
    }
    for name, (signature, function) in kinds.items():
        hook = ctypes.CFUNCTYPE(*signature, use_errno=True)(function)
        _kept.append(hook)
        _patch(slots.get(name) or slots[f"{name}64"], ctypes.cast(hook, ctypes.c_void_p).value or 0)


def _fdatasync(file: int) -> int:
    os.fdatasync(file)
    return 0


def _synced(file: int) -> bool:
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DSYNC)


def _patch(slot: int, address: int) -> None:
    page = slot & -_PAGE_BYTES
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * _PAGE_BYTES), _PROT_READ_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.c_void_p.from_address(slot).value = address


def _slots(path: str) -> dict[str, int]:
    """Where a loaded library keeps the address of each function that it calls."""
    base = next(
        int(line.split("-")[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path) and line.split()[2] == "00000000"
    )
    data = Path(path).read_bytes()
    header = _HEADER.unpack_from(data)
    segments = [_SEGMENT.unpack_from(data, header[5] + index * _SEGMENT.size) for index in range(header[10])]

    def place(address: int) -> int:
        """Where in the file lies what is loaded at this address?"""
        for kind, _, offset, start, _, size, _, _ in segments:
            if kind == _PT_LOAD and start <= address < start + size:
                return int(address - start + offset)
        raise ValueError(f"nothing is loaded at {address}")

    dynamic = next(segment for segment in segments if segment[0] == _PT_DYNAMIC)
    entries = dict(_DYNAMIC.iter_unpack(data[dynamic[2] : dynamic[2] + dynamic[5]]))
    symbols, strings = place(entries[_DT_SYMTAB]), place(entries[_DT_STRTAB])
    slots: dict[str, int] = {}
    for table, size in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
        if table not in entries:
            continue
        start = place(entries[table])
        for where, info, _ in _RELOCATION.iter_unpack(data[start : start + entries[size]]):
            if info >> 32:
                name = strings + _SYMBOL.unpack_from(data, symbols + (info >> 32) * _SYMBOL.size)[0]
                slots[data[name : data.index(b"\0", name)].decode()] = base + where
    return slots
