"""A head on disk: `head.json` (its spec) and `head.safetensors` (its weights). Never a pickle.

Both files are written beside their final name and renamed, weights first: a folder with a `head.json` is complete.
"""

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dense_head.models import build
from dense_head.spec import HeadError, HeadSpec

SPEC_FILE = "head.json"
WEIGHTS_FILE = "head.safetensors"


def save(folder: str | Path, spec: HeadSpec, module: nn.Module) -> None:
    """Write a head into `folder`, which is made if absent; an older head there is replaced."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}
    new = target / f".{WEIGHTS_FILE}.new"
    save_file(weights, new)
    _replace(new, target / WEIGHTS_FILE)
    new = target / f".{SPEC_FILE}.new"
    new.write_text(spec.to_json() + "\n")
    _replace(new, target / SPEC_FILE)


def load(folder: str | Path) -> tuple[HeadSpec, nn.Module]:
    """The head in `folder`. HeadError where a file is missing or damaged, or weights and spec disagree."""
    source = Path(folder)
    try:
        spec = HeadSpec.from_json((source / SPEC_FILE).read_text())
        weights = load_file(source / WEIGHTS_FILE)
    except FileNotFoundError as error:
        missing = Path(error.filename or WEIGHTS_FILE).name
        raise HeadError(f"there is no head in {source}: {missing} is missing") from None
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise HeadError(f"the head in {source} cannot be read: {error}") from None
    module = build(spec)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise HeadError(f"the weights in {source} are not those of its {SPEC_FILE}: {reason}") from None
    return spec, module


def _replace(new: Path, target: Path) -> None:
    """Give `new` its final name, after its bytes are on disk."""
    with open(new, "rb") as file:
        os.fsync(file.fileno())
    os.replace(new, target)
