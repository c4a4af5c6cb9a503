"""What is kept of the checkpoints of a folder, and whether it is sound."""

from collections.abc import Iterator
from dataclasses import dataclass

from ps.checkpoint.codec import decode_block
from ps.checkpoint.files import MANIFEST, Manifest, check_link, read_blocks, survey, unfinished
from ps.checkpoint.reach import Counter
from ps.checkpoint.storage import CheckpointError, Storage

UNFINISHED_S = 24 * 3600.0
"""A folder without a manifest is of a save that goes on, or that was killed; after so long, of the latter."""


@dataclass(frozen=True)
class Checked:
    """What verify found of one checkpoint: problems is empty where it is sound."""

    name: str
    rows: int
    bytes: int
    problems: tuple[str, ...]


def verify(storage: Storage, name: str | None = None, counter: Counter | None = None) -> Iterator[Checked]:
    """Read every byte of the checkpoints of a folder (or of one, with what it needs), oldest first, and compare.

    Raises CheckpointError where there is none of that name.
    """
    counter = counter or Counter()
    known, broken = survey(storage)
    names = {m.name: m for m in known}
    if name is not None:
        if name not in names:
            raise next((e for e in broken if storage.path(name, MANIFEST) in str(e)), None) or CheckpointError(
                f"{storage.path(name)} is not a checkpoint: it has no {MANIFEST}"
            )
        known, broken = _needed(names, names[name]), []
    counter.expect(sum(m.bytes for m in known))
    for error in broken:
        yield Checked(str(error).split("/" + MANIFEST)[0].rpartition("/")[2], 0, 0, (str(error),))
    for manifest in known:
        problems = [*_link_problems(storage, names, manifest), *_file_problems(storage, manifest, counter)]
        yield Checked(manifest.name, manifest.rows, manifest.bytes, tuple(problems))


def _needed(names: dict[str, Manifest], manifest: Manifest) -> list[Manifest]:
    links = [manifest]
    while (parent := names.get(links[-1].parent)) is not None:
        links.append(parent)
    return links[::-1]


def _link_problems(storage: Storage, names: dict[str, Manifest], manifest: Manifest) -> Iterator[str]:
    try:
        check_link(storage, manifest, names.get(manifest.parent))
    except CheckpointError as error:
        yield str(error)


def _file_problems(storage: Storage, manifest: Manifest, counter: Counter) -> Iterator[str]:
    """The first damage of each file."""
    for name, blocks in manifest.files.items():
        path = storage.path(manifest.name, name)
        try:
            size, end = storage.size(manifest.name, name), sum(b.size for b in blocks)
            for block, message in read_blocks(storage, manifest, name):
                decode_block(message)
                counter.add(block.rows, block.size, block.size)
            if size != end:
                yield f"{path} has {size} bytes; the manifest counts {end}"
        except OSError as error:
            yield f"{path} is missing: {error.strerror or error}"
        except CheckpointError as error:
            yield str(error)


def chains(manifests: list[Manifest]) -> list[list[Manifest]]:
    """Checkpoints by the full one that they need, oldest chain first; those whose full one is missing are in none."""
    names = {m.name: m for m in manifests}
    out: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        root = _needed(names, manifest)[0]
        if not root.parent:
            out.setdefault(root.name, []).append(manifest)
    return [out[m.name] for m in manifests if m.name in out]


def prune(storage: Storage, keep: int, cluster: int) -> list[str]:
    """Remove all but the newest `keep` chains of a cluster, and what saves left that were killed; the names removed.

    Only whole chains go, their newest increments first, so that whatever is left is whole. Raises CheckpointError.
    """
    known, _ = survey(storage)
    old = chains([m for m in known if m.cluster == cluster])[: -max(1, keep)]
    names = [m.name for links in old for m in reversed(links)]
    killed = [name for name in unfinished(storage) if storage.age_s(name) > UNFINISHED_S]
    try:
        for name in names:
            storage.withdraw(name, MANIFEST)
            storage.remove(name)
        for name in killed:
            storage.remove(name)
    except OSError as error:
        raise CheckpointError(f"{storage.root} cannot be pruned: {error.strerror or error}") from None
    return names + killed
