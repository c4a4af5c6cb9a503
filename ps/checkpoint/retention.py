"""What is kept of the checkpoints of a folder, and whether it is sound."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from ps.checkpoint.codec import decode_block
from ps.checkpoint.files import MANIFEST, check_link, links_of, missing, read_blocks, survey, unfinished
from ps.checkpoint.manifest import Manifest
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

    Those come first whose manifest is damaged. What stands on an unsound checkpoint is not sound either.
    Raises CheckpointError where there is none of that name.
    """
    counter = counter or Counter()
    known, broken = survey(storage)
    names = {m.name: m for m in known}
    damaged = {str(e).removeprefix(storage.path("")).partition("/")[0]: str(e) for e in broken}
    if name is not None:
        if name not in names:
            raise CheckpointError(
                damaged.get(name) or f"{storage.path(name)} is not a checkpoint: it has no {MANIFEST}"
            )
        known = links_of(names[name], names.get)
        damaged = {n: e for n, e in damaged.items() if n == known[0].parent}
    counter.expect(sum(m.bytes for m in known))
    for folder, error in damaged.items():
        yield Checked(folder, 0, 0, (error,))
    found = {}
    for manifest in known:
        links = [] if manifest.parent in damaged else _link_problems(storage, names, manifest)
        found[manifest.name] = [*links, *_file_problems(storage, manifest, counter)]
    # Only now: a clock that was set back lists a checkpoint before the one that it stands on.
    unsound = damaged.keys() | {n for n, problems in found.items() if problems}
    for manifest in known:
        problems = found[manifest.name]
        if below := _unsound_below(names, manifest, unsound):
            path = storage.path(manifest.name)
            problems.append(f"{path} cannot be restored: it stands on {below!r}, which is not sound")
        yield Checked(manifest.name, manifest.rows, manifest.bytes, tuple(problems))


def _unsound_below(names: dict[str, Manifest], manifest: Manifest, unsound: Collection[str]) -> str:
    """The first unsound checkpoint of the chain that this one stands on, "" for none."""
    links = links_of(manifest, names.get)
    return next((n for n in (links[0].parent, *(m.name for m in links[:-1])) if n in unsound), "")


def _link_problems(storage: Storage, names: dict[str, Manifest], manifest: Manifest) -> Iterator[str]:
    try:
        check_link(storage, manifest, names.get(manifest.parent))
    except CheckpointError as error:
        yield str(error)


def _file_problems(storage: Storage, manifest: Manifest, counter: Counter) -> Iterator[str]:
    """The first damage of each file."""
    for name, blocks in manifest.files.items():
        try:
            size, end = storage.size(manifest.name, name), sum(b.size for b in blocks)
            for block, message in read_blocks(storage, manifest, name):
                decode_block(message)
                counter.add(block.rows, block.size, block.size)
            if size != end:
                yield f"{storage.path(manifest.name, name)} has {size} bytes; the manifest counts {end}"
        except CheckpointError as error:
            yield str(error)


def chains(manifests: list[Manifest]) -> list[list[Manifest]]:
    """Checkpoints by the full one that they need, oldest chain first; those that lack it are in none."""
    names = {m.name: m for m in manifests}
    out: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        root = links_of(manifest, names.get)[0]
        if not root.parent:
            out.setdefault(root.name, []).append(manifest)
    return [out[m.name] for m in manifests if m.name in out]


def severed(storage: Storage, manifests: list[Manifest]) -> list[Manifest]:
    """Increments whose chain lacks a checkpoint (it is missing or another one, not damaged): nothing can be restored
    from them."""
    names = {m.name: m for m in manifests}
    roots = {m.name: links_of(m, names.get)[0].parent for m in manifests}
    gone = {parent for parent in roots.values() if parent and (parent in names or missing(storage, parent))}
    return [m for m in manifests if roots[m.name] in gone]


def prune(storage: Storage, keep: int, cluster: int) -> list[str]:
    """Remove all but the newest `keep` chains of a cluster, and what saves left that were killed; the names removed.

    Only whole chains go, their newest increments first, so that whatever is left is whole; and increments whose chain
    lacks a checkpoint. Raises CheckpointError.
    """
    known, _ = survey(storage)
    mine = [m for m in known if m.cluster == cluster]
    names = [m.name for links in [severed(storage, mine), *chains(mine)[: -max(1, keep)]] for m in reversed(links)]
    killed = [name for name in unfinished(storage) if _idle_s(storage, name) > UNFINISHED_S]
    try:
        for name in names:
            storage.withdraw(name, MANIFEST)
            storage.remove(name)
        for name in killed:
            storage.remove(name)
    except OSError as error:
        raise CheckpointError(f"{storage.root} cannot be pruned: {error.strerror or error}") from None
    return names + killed


def _idle_s(storage: Storage, name: str) -> float:
    """Seconds since a block was written to any file of a folder, 0 where that is not known. The folder's own time says
    less: object stores keep none, and a disk keeps that of the last file that was begun in it."""
    return min((storage.age_s(name, file) for file in storage.names(name)), default=0.0)


def prune_after(storage: Storage, keep: int, cluster: int) -> dict[str, Any]:
    """What a save tells of the `prune` that follows it, and takes nothing from it: pruned, and prune_error, "" if none.

    A key that may write and not remove is enough to fail; whoever saved again for it would fill the disk.
    """
    try:
        return {"pruned": prune(storage, keep, cluster), "prune_error": ""}
    except CheckpointError as error:
        return {"pruned": [], "prune_error": str(error)}
