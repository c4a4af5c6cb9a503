"""Which version of each dense model goes with a checkpoint's rows: the newest of a repository, by names of folders."""

from pathlib import Path

from ps.checkpoint.storage import CheckpointError


def newest_versions(repository: str | Path) -> dict[str, str]:
    """Model -> its newest version, of a repository NAME/VERSION/... as routers serve it. Raises CheckpointError."""
    try:
        folders = [m for m in Path(repository).iterdir() if m.is_dir() and not m.name.startswith(".")]
        models = {m.name: [v.name for v in m.iterdir() if v.is_dir()] for m in folders}
    except OSError as error:
        raise CheckpointError(f"the models in {repository} cannot be listed: {error.strerror or error}") from None
    numbers = {name: [int(v) for v in versions if v.isdecimal()] for name, versions in models.items()}
    return {name: str(max(found)) for name, found in sorted(numbers.items()) if found}
