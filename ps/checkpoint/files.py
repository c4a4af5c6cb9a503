"""A checkpoint on disk: a folder that appears whole or not at all, and whose every byte is checked.

    FOLDER/<name>/manifest.json      what it holds, and the size and checksum (XXH64) of every block
    FOLDER/<name>/<server>.blocks    blocks, one behind another; each is one frame of the fabric (ps.wire)

Everything is written and synced under a hidden name; the manifest is put in place by rename, and so is the folder
at last. What has no manifest is no checkpoint.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from ps.errors import EmbringError
from ps.viewlog import sync_folder
from ps.wire import Buffer

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")


class CheckpointError(EmbringError):
    """A checkpoint is missing, damaged, of another format, or does not fit; names the file and what is wrong."""

    code = "checkpoint"


@dataclass(frozen=True)
class Block:
    """Where a block lies in its file, in bytes, and its checksum (16 hexadecimal digits)."""

    file: str
    offset: int
    size: int
    xxh64: str
    rows: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    cluster, epoch, fingerprint: of the view it was taken under. term_max: the highest term of a position in it; a
    restore goes above. tables: [number, name, group, spec]. groups: [number, placement, replicas, first, slots].
    watermark: where each slot stood, {"slots": ..., "positions": ...} as lists of equal length.
    """

    name: str
    created: str
    cluster: int
    epoch: int
    fingerprint: str
    term_max: int
    tables: list[list[Any]]
    groups: list[list[Any]]
    watermark: dict[str, list[int]]
    blocks: list[Block] = field(default_factory=list)
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Rows in all blocks."""
        return sum(b.rows for b in self.blocks)

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(b.size for b in self.blocks)


class BlockFile:
    """A file of blocks being written; used by one thread."""

    def __init__(self, folder: Path, name: str) -> None:
        self.blocks: list[Block] = []
        self._name = name
        self._file = open(folder / name, "xb")  # noqa: SIM115 - closed by `close`
        self._offset = 0

    def append(self, frame: list[Buffer], rows: int) -> None:
        """Write one block."""
        digest = xxhash.xxh64()
        size = 0
        for part in frame:
            digest.update(part)
            size += memoryview(part).nbytes
            self._file.write(part)
        self.blocks.append(Block(self._name, self._offset, size, digest.hexdigest(), rows))
        self._offset += size

    def close(self) -> None:
        """Make the file durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Saving:
    """A checkpoint being written. As a context manager it leaves nothing behind unless it was committed."""

    def __init__(self, folder: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"the checkpoint's name is {name!r}; it must be 1 to 100 letters, digits or _ . -")
        self.target = folder / name
        if self.target.exists():
            raise CheckpointError(f"{self.target} exists already")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from None
        self._committed = False

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            shutil.rmtree(self.path, ignore_errors=True)

    def commit(self, manifest: Manifest) -> Path:
        """Give the checkpoint its name; before this returns, nobody sees it, and afterwards it is durable."""
        temporary = self.path / f".{MANIFEST}"
        with open(temporary, "w") as file:
            json.dump(asdict(manifest), file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self.path / MANIFEST)
        sync_folder(self.path)
        self.path.chmod(0o755)
        os.rename(self.path, self.target)
        sync_folder(self.target.parent)
        self._committed = True
        return self.target


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint in a folder. Raises CheckpointError."""
    file = path / MANIFEST
    try:
        plain = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    version = plain.get("format") if isinstance(plain, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{file} has format {version!r}; this version reads format {FORMAT}")
    missing = {f.name for f in fields(Manifest)} ^ set(plain)
    if missing:
        raise CheckpointError(f"{file} is damaged: its keys differ in {', '.join(sorted(missing))}")
    try:
        return Manifest(**{**plain, "blocks": [Block(**b) for b in plain["blocks"]]})
    except TypeError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def checkpoints(folder: Path) -> list[Manifest]:
    """The checkpoints of a folder, oldest first. Raises CheckpointError where the folder cannot be read."""
    try:
        entries = [p for p in folder.iterdir() if not p.name.startswith(".") and (p / MANIFEST).is_file()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted((read_manifest(p) for p in entries), key=lambda m: (m.created, m.name))


def choose(folder: Path, name: str | None) -> Path:
    """The folder of a named checkpoint, or of the newest one. Raises CheckpointError where there is none."""
    if name is not None:
        return folder / name
    known = checkpoints(folder)
    if not known:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    return folder / known[-1].name


def check_files(path: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless every file is there in its full length (contents are checked as they are read)."""
    ends: dict[str, int] = {}
    for block in manifest.blocks:
        if Path(block.file).name != block.file:
            raise CheckpointError(f"{path / MANIFEST} names a file outside of its folder: {block.file!r}")
        ends[block.file] = max(ends.get(block.file, 0), block.offset + block.size)
    for name, end in ends.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path / name} is missing: {error.strerror}") from None
        if size != end:
            raise CheckpointError(f"{path / name} has {size} bytes; the manifest counts {end}")


def read_blocks(path: Path, blocks: list[Block]) -> Iterator[tuple[Block, bytearray]]:
    """Each block with its bytes, checked. Raises CheckpointError naming the file and the place of a damaged one."""
    for block in blocks:
        data = bytearray(block.size)
        with open(path / block.file, "rb") as file:
            file.seek(block.offset)
            got = file.readinto(data)
        if got != block.size or xxhash.xxh64_hexdigest(data) != block.xxh64:
            raise CheckpointError(
                f"{path / block.file} is damaged: the block at byte {block.offset} fails its checksum"
            )
        yield block, data
