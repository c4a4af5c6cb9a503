"""What every test shares: bounded threads, and the folder of real data where there is one."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# Examples run on a loaded two-core machine: their number bounds a test, never the clock.
settings.register_profile("embring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("embring")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside the checkout; a test that needs them skips, saying so, where there are none."""
    folder = Path(os.environ.get("EMBRING_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}; set EMBRING_TEST_DATA to a folder that holds them")
    return folder
