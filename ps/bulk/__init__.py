"""Rows of a table from files of other tools, and into them: .npy, .safetensors (a torch state_dict), .parquet."""

from ps.bulk.exports import PARTS, Export, take, writing
from ps.bulk.sources import IN_FLIGHT, KINDS, TIMEOUT_S, bring, check_dim, ids_file, ids_path, open_source

__all__ = [
    "IN_FLIGHT",
    "KINDS",
    "PARTS",
    "TIMEOUT_S",
    "Export",
    "bring",
    "check_dim",
    "ids_file",
    "ids_path",
    "open_source",
    "take",
    "writing",
]
