"""A cluster for one benchmark: real processes, in a state folder of its own, ended with the benchmark."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ps
from ps.cluster import start, stop
from ps.config import Config, load_config
from ps.runtime import Runtime, read_token

Report = Callable[[str], None]


def benchmark_config(servers: int, config: Path | None = None) -> Config:
    """Settings of the cluster: those of a cluster.toml, or the defaults, with so many servers."""
    return load_config(config).with_settings("server", servers=servers)


@contextmanager
def cluster(config: Config, report: Report, in_place: bool = True) -> Iterator[tuple[Runtime, "ps.Client"]]:
    """(its runtime, a blocking client connected to it). in_place: whether the client may read without messages."""
    with tempfile.TemporaryDirectory(prefix="embring-bench-") as folder:
        runtime_file = Path(folder) / "cluster.json"
        runtime = start(config, state=Path(folder) / "state", runtime_file=runtime_file, report=report)
        try:
            token = read_token(runtime.token_path)
            with ps.connect(list(runtime.addresses), token, 60.0, in_place=in_place) as client:
                yield runtime, client
        finally:
            stop(runtime, runtime_file=runtime_file)
