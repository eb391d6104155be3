"""Files that are replaced whole: a reader, or an interruption, sees the old content or the new, never a part."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def check_directory(directory: Path, names: Iterable[str] = ()) -> None:
    """Makes a directory; to be called before a long run, so that its end does not fail to write there.

    Args:
        directory: where files will go; made when missing.
        names: of those files.

    Raises:
        OSError: it cannot be made or written, or a directory is in the place of a file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (directory / name).is_dir():
            raise IsADirectoryError(errno.EISDIR, f"{name} is a directory")
    with tempfile.NamedTemporaryFile(prefix=".nc_patch.", dir=directory) as file:
        file.write(b"0")  # an empty file fits on a full disk


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file beside ``path`` and puts it in its place.

    Raises:
        OSError: the directory cannot be written, or the disk is full; ``path`` is as it was.
    """
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
