"""Reading a text file with one clear line for what is wrong, writing one whole or not at all."""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces ``path`` if the block succeeds.

    A link is followed: the file it names is replaced, not the link.

    Raises:
        OSError: if the folder does not exist or cannot be written, or if the path is a device, a
            pipe or a folder, which must not be replaced.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "a.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     [(file.name, file.read_text()) for file in Path(folder).iterdir()]
    [('a.txt', 'whole')]
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is no regular file, so it is not replaced")
    # The suffix stays: writers choose the format by it.
    try:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a result file is not
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: str | Path, error: type[ValueError]) -> str:
    """Text of a UTF-8 file, unpacked if it is gzip.

    Raises:
        ValueError: of the type ``error``, in one line with the path, if the file is missing,
            broken or binary.

    >>> read_text("no/such/file", ValueError)
    Traceback (most recent call last):
    ...
    ValueError: no/such/file: cannot be read: No such file or directory
    """
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):  # gzip's magic number
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise error(f"{path}: cannot be read: not a text file") from None
    except EOFError:
        raise error(f"{path}: cannot be read: the gzip file is cut off") from None
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}") from None
    except (ValueError, zlib.error) as reason:  # a path with a null byte, broken compression
        raise error(f"{path}: cannot be read: {reason}") from None
    if "\0" in text:
        raise error(f"{path}: cannot be read: not a text file")
    return text
