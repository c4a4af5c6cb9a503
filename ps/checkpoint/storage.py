"""Where checkpoints lie: a folder of this host, or whatever place fsspec has a scheme for (s3://, gs://, memory://).

A file is *created* (its content is durable once closed) or *published* (it appears whole or not at all). On a host's
own disk both sync files and folders; elsewhere an upload that was answered counts as durable and whole.
"""

import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ps.errors import EmbringError
from ps.viewlog import sync_folder

Buffer = bytes | bytearray | memoryview


class CheckpointError(EmbringError):
    """A checkpoint is missing, damaged, of another format, or does not fit; names the file and what is wrong."""

    code = "checkpoint"


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: Any, /) -> Any:
        """Write all of it."""

    def close(self) -> None:
        """Make it durable. Raises OSError."""


class _LocalSink:
    """A file of this host. It has no buffer of its own: blocks are written as they are."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by `close`

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while len(view):  # a raw file may take less than all
            view = view[self._file.write(view) :]

    def close(self) -> None:
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


class _Guarded:
    """A filesystem of fsspec, or a file of one: whatever else it raises is an OSError for those who call."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._thing, name)
        return _told(value) if callable(value) else value

    def __enter__(self) -> "_Guarded":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _told(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except OSError:
            raise
        except NotImplementedError:
            raise OSError("this kind of place cannot do that") from None
        except Exception as error:
            raise OSError(f"{type(error).__name__} {error}") from error

    return told


class Storage:
    """A folder of folders of files. Paths inside are ("folder", "name")."""

    def __init__(self, url: str | Path) -> None:
        """Raises CheckpointError where there is no such scheme, or the package for it is not installed."""
        if not str(url):
            raise CheckpointError("the place of checkpoints is empty: name a folder or an fsspec URL")
        if "::" in str(url):  # what caches lie between would tell of another state, or keep what is to last
            raise CheckpointError(f"{url} is a chain of URLs: name the place itself")
        try:
            filesystem, self.root = fsspec.core.url_to_fs(str(url))
        except (ImportError, ValueError, TypeError, OSError) as error:
            raise CheckpointError(f"{url} cannot be reached: {error}") from None
        self.local = isinstance(filesystem, LocalFileSystem)
        self._lasts = not isinstance(filesystem, MemoryFileSystem)
        self._fs = _Guarded(filesystem)

    def path(self, *parts: str) -> str:
        """The full path of a folder or file, as messages name it."""
        return "/".join([self.root.rstrip("/"), *parts]) or "/"

    def existing(self) -> "Storage":
        """The same, or CheckpointError where there is no such folder."""
        if not self.has():
            raise CheckpointError(f"{self.root} is missing")
        return self

    def lasting(self) -> "Storage":
        """The same, or CheckpointError where it ends with this process."""
        if not self._lasts:
            raise CheckpointError("memory:// is the memory of one process, and gone with it: choose another place")
        return self

    def names(self, *parts: str) -> list[str]:
        """What a folder holds; nothing where there is none. Raises CheckpointError where it cannot be read."""
        place = self.path(*parts)
        try:
            self._fs.invalidate_cache(place)
            return sorted(str(p).rstrip("/").rpartition("/")[2] for p in self._fs.ls(place, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"{place} cannot be read: {error.strerror or error}") from None

    def has(self, *parts: str) -> bool:
        """Whether there is such a folder or file. Raises CheckpointError where that cannot be told."""
        try:
            self._fs.info(self.path(*parts))  # `exists` of fsspec takes every error for a no
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise CheckpointError(f"{self.path(*parts)} cannot be reached: {error.strerror or error}") from None
        return True

    def age_s(self, *parts: str) -> float:
        """Seconds since a folder or file was last changed; 0 where that is not known."""
        try:
            return max(0.0, time.time() - self._fs.modified(self.path(*parts)).timestamp())
        except OSError:  # some stores of fsspec keep no times
            return 0.0

    def make(self, folder: str) -> None:
        """Make a new folder. Raises CheckpointError where it exists, or cannot be made."""
        place = self.path(folder)
        if self.has(folder):
            raise CheckpointError(f"{place} exists already")
        try:
            if self.local:
                _make_durable(Path(self.root))
                os.mkdir(place, 0o755)
            else:
                self._fs.makedirs(place, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be written: {error.strerror or error}") from None

    def check_writable(self) -> None:
        """Make the folder of this host; CheckpointError where nothing can be written. Other places are not asked."""
        if not self.local:
            return
        try:
            _make_durable(Path(self.root))
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be written: {error.strerror or error}") from None

    def create(self, folder: str, name: str) -> Sink:
        """A new file to be written. Raises OSError."""
        if self.local:
            return _LocalSink(self.path(folder, name))
        return cast(Sink, _Guarded(self._fs.open(self.path(folder, name), "wb")))

    def publish(self, folder: str, name: str, data: bytes) -> None:
        """Make a file that is there whole or not at all, after all that was created in the folder. Raises OSError."""
        if not self.local:
            self._fs.pipe_file(self.path(folder, name), data)
            return
        temporary = self.path(folder, f".{name}")
        sink = _LocalSink(temporary)
        try:
            sink.write(data)
        finally:
            sink.close()
        sync_folder(Path(self.path(folder)))
        os.rename(temporary, self.path(folder, name))
        sync_folder(Path(self.path(folder)))
        sync_folder(Path(self.root))

    def open(self, folder: str, name: str) -> IO[bytes]:
        """A file to be read. Raises OSError."""
        if self.local:
            return open(self.path(folder, name), "rb", buffering=0)
        return cast(IO[bytes], _Guarded(self._fs.open(self.path(folder, name), "rb")))

    def read(self, folder: str, name: str) -> bytes:
        """All of a file. Raises OSError."""
        return bytes(self._fs.cat_file(self.path(folder, name)))

    def size(self, folder: str, name: str) -> int:
        """Bytes of a file. Raises CheckpointError where it is missing, or cannot be read."""
        path = self.path(folder, name)
        try:
            return int(self._fs.size(path))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"{path} is missing: {error.strerror or error}") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None

    def withdraw(self, folder: str, name: str) -> None:
        """Remove a file, for good before anything else is; another process may do the same. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.path(folder, name))
            if self.local:
                sync_folder(Path(self.path(folder)))

    def remove(self, folder: str) -> None:
        """Remove a folder with all that is in it; another process may do the same. Raises OSError."""
        place = Path(self.path(folder))
        with contextlib.suppress(FileNotFoundError):
            if self.local:
                shutil.rmtree(place.resolve())  # what a link leads to takes the room
            else:
                self._fs.rm(self.path(folder), recursive=True)
        if self.local and place.is_symlink():
            place.unlink(missing_ok=True)


def _make_durable(folder: Path) -> None:
    """Make a folder with its parents, and their names durable."""
    if not folder.is_dir():
        _make_durable(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
