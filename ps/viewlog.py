"""The view log: one file for each epoch, on disk before anybody hears of the view.

A file is created only if it is absent (`os.link` fails where the name exists), so of two controllers that both
believe in epoch k, one creates k+1 and the other learns that it is controller no more. Files are therefore never
removed while the cluster lives: a freed name could be created again by somebody who slept.
"""

import os
import tempfile
import zlib
from pathlib import Path

import msgpack
import xxhash

from hashring.view import View

MAGIC = b"embring-view-1\n\0"
SUFFIX = ".view"


class EpochTakenError(Exception):
    """Somebody else has created this epoch: the caller is controller no more."""


class ViewLogError(Exception):
    """The log is damaged: names the file and what is wrong with it."""


class ViewLog:
    """The views of one cluster, in a folder of its own (mode 0700)."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def epochs(self) -> list[int]:
        """Every epoch in the log, rising."""
        names = (p.stem for p in self.folder.glob(f"*{SUFFIX}"))
        return sorted(int(n) for n in names if n.isdecimal())

    def append(self, view: View, after: int | None = None) -> None:
        """Make `view` durable. Raises EpochTakenError where its epoch, or a newer one, is already there.

        after: the epoch that it was planned from, where its own is not the next one (a restore goes above every term
        of a checkpoint). The next one's name is then taken too, and first: that is where rivals meet.
        """
        names = sorted({view.epoch if after is None else after + 1, view.epoch})
        newest = self.epochs()[-1:]
        if newest and newest[0] >= names[0]:
            raise EpochTakenError(f"epoch {names[0]} is taken: {self.folder} holds epoch {newest[0]}")
        body = zlib.compress(msgpack.packb(view.to_plain()), 1)
        handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + xxhash.xxh64_digest(body) + body)
                file.flush()
                os.fsync(file.fileno())
            for name in names:
                os.link(temporary, self._path(name))
        except FileExistsError:
            raise EpochTakenError(f"an epoch of {names} is taken in {self.folder}") from None
        finally:
            os.unlink(temporary)
        sync_folder(self.folder)

    def holds(self, epoch: int) -> bool:
        """Whether this epoch is in the log: a look at one name."""
        return self._path(epoch).exists()

    def read(self, epoch: int) -> View:
        """The view of one epoch. Raises ViewLogError naming the file where it is missing or damaged."""
        path = self._path(epoch)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ViewLogError(f"the view log's {path} cannot be read: {error.strerror}") from None
        head = len(MAGIC) + 8
        if data[: len(MAGIC)] != MAGIC:
            raise ViewLogError(f"the view log's {path} is of another format")
        if xxhash.xxh64_digest(data[head:]) != data[len(MAGIC) : head]:
            raise ViewLogError(f"the view log's {path} is damaged: its checksum does not match")
        return View.from_plain(msgpack.unpackb(zlib.decompress(data[head:]), strict_map_key=False))

    def newest(self) -> View | None:
        """The newest view, or None in an empty log. A damaged newest view is an error, never passed over."""
        epochs = self.epochs()
        return self.read(epochs[-1]) if epochs else None

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{epoch:012d}{SUFFIX}"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
