"""The section [checkpoint]."""

from dataclasses import dataclass

from ps.config.setting import setting


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints that the controller saves by itself, and lost slots that it restores."""

    directory: str = setting(
        "",
        "folder",
        None,
        None,
        "Where they lie: a folder that outlives this host's memory and disk, or a place that fsspec has a scheme for "
        '("s3://bucket/path", with its package installed). Empty: none are saved.',
    )
    every_s: float = setting(
        0.0,
        "seconds",
        0,
        604800,
        "Time from the end of one save to the next; 0 saves none. What is pushed after the last one is lost where all "
        "owners of a slot die at once.",
    )
    full_every: int = setting(
        24,
        "checkpoints",
        1,
        1000,
        "One in so many is full, the others hold what changed since the one before. More saves less; a restore "
        "reads the full one and all that follow.",
    )
    keep: int = setting(
        3,
        "full checkpoints",
        1,
        1000,
        "How many stay, each with its increments; older ones of this cluster are removed.",
    )
    restore_lost: bool = setting(
        False,
        "switch",
        None,
        None,
        "Restore lost slots from the newest checkpoint by itself. Service returns without a person; what was pushed to "
        "those slots since is given up without asking one.",
    )
