"""Settings of a router and of each model it serves: unit, range, default, trade-off.

A model repository is a folder: `models/NAME/VERSION/` (a whole number from 1) with `model.toml`, `features.toml` and
`head/`. Every key of model.toml has a default; an empty file is a good one. The tables are those that
features.toml names, in the cluster that the router is connected to.
"""

from dataclasses import dataclass
from pathlib import Path

from ps.errors import ConfigError
from router.settings import build, read_toml, setting


@dataclass(frozen=True)
class ModelConfig:
    """model.toml."""

    absent: str = setting(
        "zeros",
        "What an id without a row answers: zeros says nothing about what was never trained; initial is the row that "
        "training would begin with; default is the table's own vector.",
        choices=("zeros", "initial", "default"),
    )
    timeout_ms: float = setting(
        1000.0, "Milliseconds that a request without a deadline of its own may take.", 1, 600_000
    )
    request_rows_max: int = setting(4096, "Rows of one request. More let one client hold the queue longer.", 1, 2**20)
    batch_rows_max: int = setting(1024, "Rows of a batch. More raise throughput, and everybody's latency.", 1, 2**20)
    batch_wait_ms: float = setting(
        1.0,
        "Longest wait for others to share a batch while another batch is on its way; none while there is none.",
        0,
        1000,
    )
    batches_max: int = setting(2, "Batches on their way at once: one pulls while another is in the head.", 1, 64)
    queue_rows_max: int = setting(
        16384, "Rows that wait before requests are refused as overloaded. A longer queue rides out bursts.", 1, 2**24
    )
    inline_rows_max: int = setting(
        64, "Up to so many rows the head runs on the event loop; beyond, in a thread (0.1 ms dearer).", 0, 2**20
    )

    @classmethod
    def load(cls, path: Path) -> "ModelConfig":
        """From a model.toml; ConfigError names the key, the value and what is allowed."""
        config = build(cls, read_toml(path), str(path))
        if config.request_rows_max > config.queue_rows_max:
            raise ConfigError(
                f"{path}: request_rows_max is {config.request_rows_max}; it must not exceed queue_rows_max "
                f"({config.queue_rows_max})"
            )
        return config


@dataclass(frozen=True)
class RouterSettings:
    """What belongs to the process, not to a model."""

    threads: int = setting(1, "Threads that run heads of large batches.", 1, 64)
    device: str = setting("auto", "Where heads run: auto is the first GPU, else the CPU; or a name that torch knows.")


def find_models(models_dir: Path) -> dict[str, dict[int, Path]]:
    """name -> version -> folder of every model in a repository; ConfigError where there is none, or no number."""
    if not models_dir.is_dir():
        raise ConfigError(f"there is no model repository {models_dir}")
    found: dict[str, dict[int, Path]] = {}
    for folder in sorted(p for p in models_dir.iterdir() if p.is_dir() and not p.name.startswith(".")):
        versions: dict[int, Path] = {}
        for version in (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if not version.name.isdecimal() or str(int(version.name)) != version.name or version.name == "0":
                raise ConfigError(f"{version} is no version of a model; it must be named by a whole number from 1")
            versions[int(version.name)] = version
        if versions:
            found[folder.name] = dict(sorted(versions.items()))
    if not found:
        raise ConfigError(f"there is no model in {models_dir}; it needs NAME/VERSION/model.toml")
    return found
