"""The files of a folder or of a tar archive, one after the other, or one clear `DataError`.

Archives are read as a stream: nothing is written to disk, and no member is ever extracted.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast


class DataError(ValueError):
    """A source of data cannot be used; the message names it, what is wrong, and what to do."""


class File(NamedTuple):
    """A file: its name within the folder or archive, and how far the reading has come.

    `done` of `total` counts bytes of an archive, or files of a folder.
    """

    name: str
    content: bytes
    done: int
    total: int


def files(path: Path, wanted: Callable[[str], bool], patterns: Sequence[str]) -> Iterator[File]:
    """Yield the wanted files of a folder or tar archive, one after the other.

    Args:
        path: a folder, or a tar archive (plain, gz, bz2 or xz).
        wanted: whether a file of this name is to be read.
        patterns: globs that find the wanted files of a folder. They bound the depth: a wrong path,
            such as a home folder, must fail fast.

    Raises:
        DataError: when `path` is missing, not an archive, cut short, damaged or unreadable.

    Example:
        >>> next(files(Path("nowhere"), bool, ("*",)))
        Traceback (most recent call last):
        ddg_gpu.archive.DataError: nowhere: no such file or folder; ...
    """
    try:
        if path.is_dir():
            yield from _folder(path, wanted, patterns)
        elif path.is_file():
            yield from _archive(path, wanted)
        else:
            raise DataError(f"{path}: no such file or folder; give a folder or a tar archive")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from error


def _folder(path: Path, wanted: Callable[[str], bool], patterns: Sequence[str]) -> Iterator[File]:
    found = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    names = sorted(filter(wanted, (file.relative_to(path).as_posix() for file in found)))
    for done, name in enumerate(names, start=1):
        yield File(name, (path / name).read_bytes(), done, len(names))


def _archive(path: Path, wanted: Callable[[str], bool]) -> Iterator[File]:
    total = path.stat().st_size
    cut = f"{path}: the archive ends too early or is damaged; copy or download it again"
    with path.open("rb") as raw:
        try:
            for name, content in _members(_decompressed(raw), wanted):
                yield File(name, content, raw.tell(), total)
        except EOFError as error:
            raise DataError(cut) from error
        except _BadMember as error:
            raise DataError(f"{path}: {error}") from error
        except Exception as error:  # tarfile and the decompressors let many kinds through
            if "unexpected end of data" in str(error):
                raise DataError(cut) from error
            raise DataError(
                f"{path}: not a tar archive (plain, gz, bz2 or xz), or damaged ({error}); "
                "give a folder or a tar archive"
            ) from error


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    magic = raw.read(6)
    raw.seek(0)
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(raw))
    if magic.startswith(b"BZh"):
        return bz2.open(raw)
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.open(raw)
    return raw


class _BadMember(Exception):
    """A wanted member of an archive has no content of its own."""


def _members(stream: IO[bytes], wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    tail = _Tail(stream)
    with tarfile.open(fileobj=cast(IO[bytes], tail), mode="r|") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isdir() or not wanted(name):
                continue
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                raise _BadMember(f"{name} is a link; archive the files themselves")
            yield name, content.read()
        # tarfile takes a missing or damaged header for the end of the archive. The real end is a
        # block of zeros.
        if tail.block_at(archive.offset) != bytes(tarfile.BLOCKSIZE):
            raise EOFError
    while stream.read(1 << 16):  # to the end, where the decompressor compares its checksum
        pass


class _Tail:
    """A stream that keeps the last chunk it gave, to tell a finished archive from a cut one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._chunk = b""
        self._start = 0

    def read(self, size: int) -> bytes:
        self._start += len(self._chunk)
        self._chunk = self._stream.read(size)
        return self._chunk

    def block_at(self, position: int) -> bytes:
        return self._chunk[position - self._start :][: tarfile.BLOCKSIZE]
