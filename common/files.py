"""Files written whole or not at all, and the one family of errors that a user can cause.

in   a path
out  a temporary path beside it that takes its name on success
"""

import contextlib
import hashlib
import os
import secrets
from pathlib import Path


class UserError(Exception):
    """Something that the user, not the code, must mend: one line with the remedy, never a traceback."""


class FileError(UserError):
    """A file or folder that cannot be written."""


FINAL = {}  # temporary path -> the path it stands for, which is what messages have to name


@contextlib.contextmanager
def atomic_write(path):
    """A temporary path beside `path` that takes its name on success and vanishes on failure.

    A reader never sees half a file, and neither does whoever looks after a power cut. Raises FileError.
    """
    path = Path(path)
    make_folder(path.parent)
    # short, since a name's length has a limit; FFmpeg chooses the container by the suffix
    part = path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")
    FINAL[part] = FINAL.get(path, path)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(
            f"{FINAL[part]}: cannot be written ({reason}); free some space or choose another folder"
        ) from error
    finally:
        del FINAL[part]
        with contextlib.suppress(OSError):
            part.unlink()


def write_bytes(path, content):
    """The content of a small file, whole or not at all."""
    with atomic_write(path) as part:
        part.write_bytes(content)


def make_folder(path):
    """The folder, made with its parents where it is missing. Raises FileError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path}: cannot be made ({error.strerror}); give another folder") from None
    return path


def sha256(path):
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
