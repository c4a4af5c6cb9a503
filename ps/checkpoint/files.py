"""A checkpoint's files: a folder that counts from the moment its manifest is there, and whose every byte is checked.

    DIR/NAME/0000.blocks, 0001.blocks, ...   blocks of rows, one behind another
    DIR/NAME/manifest                        written last: what has no manifest is no checkpoint

All numbers are little-endian. FORMAT is 2; whoever meets a higher one refuses it. A manifest:

    offset  size  field
    0       8     magic, b"EMBRCKPT"
    8       4     format (u32)
    12      4     length n of the body (u32)
    16      8     XXH3-64 of bytes 0 to 16 and of the body (u64)
    24      n     body: MessagePack, the fields of `Manifest` by name; arrays are [[dtype, length] ..., packed]

`Manifest` and what its fields may hold stand in ps.checkpoint.manifest.

A block is one frame (ps.wire): a MessagePack header ["block", 0, fields, arrays] and raw arrays. fields has cluster,
copy, sections ([dim, optimizer] each) and packed ([name, dtype, length] each). Arrays are those of `RowBlock`
by name: rows ("0.ids", "0.tables", "0.values", "0.state", "0.meta", ...) are raw; all others are in the array
"packed", in the order of the field: offsets as counts, `last` as its difference to `base`; each column's bytes
transposed; the whole of them deflated (zlib). XXH3-64 and length of each block stand in the manifest, and blocks fill
their files without a gap: there is no byte that is not covered by a checksum.

An *increment* holds only what changed after the watermark of its parent, which it names together with the checksum of
the parent's manifest; it needs its parent, up to a full checkpoint: a *chain*, in one DIR.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator

import xxhash

from ps.checkpoint.codec import read_frame
from ps.checkpoint.manifest import Block, Manifest, decode_manifest, encode_manifest, file_name
from ps.checkpoint.storage import CheckpointError, Sink, Storage
from ps.wire import Buffer, Message

log = logging.getLogger("embring.checkpoint")

MANIFEST = "manifest"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")
_UNENDED = re.compile(rf"\d{{4,}}\.blocks|\.{MANIFEST}")


# -- writing


class BlockFile:
    """A file of blocks being written; used by one thread."""

    def __init__(self, sink: Sink, number: int) -> None:
        self.blocks: list[Block] = []
        self._sink, self._number = sink, number

    def append(self, frame: list[Buffer], rows: int) -> int:
        """Write one block; its bytes."""
        digest, size = xxhash.xxh3_64(), 0
        for part in frame:
            digest.update(part)
            self._sink.write(part)
            size += memoryview(part).nbytes
        self.blocks.append(Block(self._number, size, rows, digest.intdigest()))
        return size

    def close(self) -> None:
        """Make the file durable."""
        self._sink.close()


class Saving:
    """A checkpoint being written; what is not committed when the context ends is removed."""

    def __init__(self, storage: Storage, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"the checkpoint's name is {name!r}; it must be 1 to 100 letters, digits or _ . -")
        self.storage, self.name = storage, name
        self.files = 0
        self._committed = False

    def __enter__(self) -> "Saving":
        if _begun(self.storage, self.name):
            place = self.storage.path(self.name)
            raise CheckpointError(f"{place} is being saved, or is left of a save that was killed: then remove it")
        self.storage.make(self.name)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            # Where even that fails, it has no manifest: nobody takes it for a checkpoint, and retention removes it.
            with contextlib.suppress(OSError):
                self.storage.remove(self.name)

    def file(self) -> BlockFile:
        """A further file of blocks. Raises OSError."""
        number, self.files = self.files, self.files + 1
        return BlockFile(self.storage.create(self.name, file_name(number)), number)

    def commit(self, manifest: Manifest) -> Manifest:
        """Make it a checkpoint, durable when this returns; its manifest with the checksum.

        Raises OSError, and CheckpointError where the parent is not there any more, or nobody could restore it.
        """
        if manifest.parent:
            self._check_parent(manifest)
        data = encode_manifest(manifest)
        manifest = decode_manifest(data, self.storage.path(self.name, MANIFEST))
        self.storage.publish(self.name, MANIFEST, data)
        self._committed = True
        return manifest

    def _check_parent(self, manifest: Manifest) -> None:
        """The parent was chosen when the save began; another process may have pruned it since."""
        parent = f"the checkpoint it is an increment to, {manifest.parent!r},"
        try:
            check_link(self.storage, manifest, read_manifest(self.storage, manifest.parent))
        except CheckpointError as error:
            if missing(self.storage, manifest.parent):
                raise CheckpointError(f"{parent} was removed meanwhile; save again") from None
            raise CheckpointError(f"{parent} is of no use any more; save again ({error})") from None


# -- reading


def read_manifest(storage: Storage, name: str) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError."""
    path = storage.path(name, MANIFEST)
    try:
        data = storage.read(name, MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{storage.path(name)} is not a checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    manifest = decode_manifest(data, path)
    if manifest.name != name:
        raise CheckpointError(f"{path} is of checkpoint {manifest.name!r}: a checkpoint keeps its name")
    return manifest


def survey(storage: Storage) -> tuple[list[Manifest], list[CheckpointError]]:
    """The checkpoints of a folder, oldest first, and what is wrong with those that cannot be read."""
    good, bad = [], []
    for name in storage.names():
        try:
            if _NAME.fullmatch(name) and storage.has(name, MANIFEST):
                good.append(read_manifest(storage, name))
        except CheckpointError as error:
            bad.append(error)
    return sorted(good, key=lambda m: (m.created, m.name)), bad


def checkpoints(storage: Storage) -> list[Manifest]:
    """The checkpoints of a folder that can be read, oldest first. Raises CheckpointError where all are damaged."""
    good, bad = survey(storage)
    if bad and not good:
        raise bad[0]
    return good


def newest(storage: Storage, cluster: int = 0, *, only: bool = False) -> Manifest:
    """The newest checkpoint that can be read, of the cluster where there is one: an old damaged one is in nobody's way.

    only: of no other cluster. Nobody knows when a damaged one was taken, so each is named in the log, which commands
    have on standard error. Raises CheckpointError where there is none.
    """
    good, bad = survey(storage)
    mine = [m for m in good if m.cluster == cluster]
    if not mine and not only:
        mine = good
    if not mine:
        of = " of this cluster" if only else ""
        raise bad[0] if bad else CheckpointError(f"there is no checkpoint{of} in {storage.root}")
    for error in bad:
        log.warning("%s; it is passed over, and the newest of the others is %r", error, mine[-1].name)
    return mine[-1]


def missing(storage: Storage, name: str) -> bool:
    """Whether there is surely no such checkpoint: storage that does not answer for a moment is no proof."""
    try:
        return not storage.has(name, MANIFEST)
    except CheckpointError:
        return False


def chain(storage: Storage, name: str | None, cluster: int = 0) -> list[Manifest]:
    """What a named checkpoint (None: the newest, of the cluster if it has any) needs, a full one first, itself last.

    Raises CheckpointError where there is none, or where a link of the chain is missing or another one.
    """
    storage.existing()
    manifest = newest(storage, cluster) if name is None else read_manifest(storage, name)

    def find(parent: str) -> Manifest | None:
        return read_manifest(storage, parent) if storage.has(parent, MANIFEST) else None

    links = links_of(manifest, find)
    if links[0].parent:
        check_link(storage, links[0], find(links[0].parent))
    return links


def links_of(manifest: Manifest, find: Callable[[str], Manifest | None]) -> list[Manifest]:
    """What a checkpoint needs, itself last, as far as it is there: where the first one has a parent, that is missing,
    or another one. find: the checkpoint of a name.

    It ends whatever the names are: a checksum is of all that a manifest says, its parent's checksum too.
    """
    links = [manifest]
    while links[-1].parent:
        parent = find(links[-1].parent)
        if parent is None or not _is_parent(parent, links[-1]):
            break
        links.append(parent)
    return links[::-1]


def _is_parent(parent: Manifest, manifest: Manifest) -> bool:
    return (parent.checksum, parent.cluster) == (manifest.parent_checksum, manifest.cluster)


def check_link(storage: Storage, manifest: Manifest, parent: Manifest | None) -> None:
    """Raise CheckpointError unless this is the parent that the manifest names, where it names one."""
    path = storage.path(manifest.name)
    if manifest.parent and parent is None:
        raise CheckpointError(f"{path} is an increment to {manifest.parent!r}, which is missing")
    if parent is not None and not _is_parent(parent, manifest):
        raise CheckpointError(f"{path} is an increment to another {manifest.parent!r} than the one here")


def unfinished(storage: Storage) -> list[str]:
    """Folders of saves that did not end, or not yet, and of such that were being removed."""
    return [n for n in storage.names() if _NAME.fullmatch(n) and missing(storage, n) and _begun(storage, n)]


def _begun(storage: Storage, name: str) -> bool:
    """Whether a folder holds what saves write before they end, and nothing else."""
    try:
        held = storage.names(name)
    except CheckpointError:  # somebody else's
        return False
    return bool(held) and all(_UNENDED.fullmatch(n) for n in held)


def check_files(storage: Storage, manifest: Manifest) -> None:
    """Raise CheckpointError unless every file is there in its full length (contents are checked as they are read)."""
    for name, blocks in manifest.files.items():
        size, end = storage.size(manifest.name, name), sum(b.size for b in blocks)
        if size != end:
            raise CheckpointError(f"{storage.path(manifest.name, name)} has {size} bytes; the manifest counts {end}")


def read_blocks(storage: Storage, manifest: Manifest, name: str) -> Iterator[tuple[Block, Message]]:
    """Each block of a file with its message, checked. Raises CheckpointError naming the file and the damaged place."""
    path, at = storage.path(manifest.name, name), 0
    try:
        with storage.open(manifest.name, name) as file:
            for block in manifest.files[name]:
                try:
                    frame, message = read_frame(file, block.size)
                except CheckpointError as error:
                    raise CheckpointError(f"{path} is damaged: the block at byte {at}: {error}") from None
                digest = xxhash.xxh3_64()
                for part in frame:
                    digest.update(part)
                if digest.intdigest() != block.xxh3:
                    raise CheckpointError(f"{path} is damaged: the block at byte {at} fails its checksum")
                yield block, message
                at += block.size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
