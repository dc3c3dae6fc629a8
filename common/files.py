"""Writing files atomically, and the one family of errors that a user can cause.

in   a path
out  a temporary path beside it that takes its name on success
"""

import contextlib
import hashlib
import os
import secrets
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct: one line with reason and remedy, never a traceback."""


class FileError(UserError):
    """A file or folder that cannot be written."""


# temporary path -> final path, which messages name; one atomic_write may write inside another
FINAL_PATHS = {}
WRITTEN = []  # lists that `written` fills


@contextlib.contextmanager
def atomic_write(path: Path | str):
    """A temporary path beside `path` that takes its name on success and is deleted on failure.

    Nobody ever reads half a file, not even after a power cut. Raises FileError.
    """
    path = Path(path)
    make_folder(path.parent)
    # a short name, since its length is limited; FFmpeg chooses the container by the suffix
    part = path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")
    FINAL_PATHS[part] = FINAL_PATHS.get(path, path)
    # the caller writes `part`; any error on the way leaves `path` as it was
    try:
        yield part
        # on disk before it is renamed, or a power cut could leave an empty file of this name
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        # one inside another writes no file of its own
        if path not in FINAL_PATHS:
            for paths in WRITTEN:
                paths.append(path)
    except OSError as error:
        reason = error.strerror or error
        raise FileError(
            f"{FINAL_PATHS[part]}: cannot be written ({reason}); "
            "free some space or choose another folder"
        ) from error
    # after the rename `part` does not exist any more
    finally:
        del FINAL_PATHS[part]
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def scratch_file(folder: Path | str):
    """The path of an empty file in a folder, deleted in the end. Raises FileError."""
    path = make_folder(folder) / f".{secrets.token_hex(8)}.part"
    try:
        path.touch()
        yield path
    except OSError as error:
        reason = error.strerror or error
        raise FileError(
            f"{folder}: cannot be written to ({reason}); free some space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def written():
    """A list that gets the path of every file that `atomic_write` completes meanwhile."""
    paths = []
    WRITTEN.append(paths)
    try:
        yield paths
    finally:
        WRITTEN.pop()


def write_bytes(path: Path | str, content: bytes):
    """Write a small file atomically. Raises FileError."""
    with atomic_write(path) as part:
        part.write_bytes(content)


def make_folder(path: Path | str) -> Path:
    """Create a folder and its parents where they are missing. Raises FileError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{path}: cannot be made ({error.strerror}); give another folder"
        raise FileError(reason) from None
    return path


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
