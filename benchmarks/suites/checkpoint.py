"""Saving, restoring, importing and exporting, beside `cat` and plain reading of the same files; bytes of an increment.

Figures above 1 say that embring was faster: seconds of the other side by its own. S15 compares a save with a copy of
its files that is synced as they are, and a restore with a copy and with reading to nowhere (out of the page cache).
S11 is the bytes of a full checkpoint by those of an increment after 1 % of the rows were pushed to.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import ps
from benchmarks.report import Findings
from benchmarks.suites.cluster import Report, benchmark_config, cluster
from hashring.view import Server
from ps.bulk import Export, bring, open_source, take
from ps.checkpoint.reach import Access, Counter, controller_through
from ps.checkpoint.restore import restore
from ps.checkpoint.retention import verify
from ps.checkpoint.save import Saved, save
from ps.checkpoint.storage import Storage
from ps.errors import EmbringError
from ps.runtime import Runtime, read_token

TABLE = "rows"
STEP = 50_000
"""Rows assigned in one call while the table is filled."""

SAMPLE = 20_000
"""Rows that are compared after each restore and import."""


@dataclass(frozen=True)
class Settings:
    """What is measured. folder: where the files lie, None: the present folder."""

    rows: int = 1_000_000
    dim: int = 64
    rounds: int = 3
    servers: int = 3
    folder: str | None = None


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Start a cluster, measure, end it. The JSON-able result."""
    findings = Findings()
    with (
        tempfile.TemporaryDirectory(prefix="checkpoints-", dir=settings.folder or os.getcwd()) as folder,
        cluster(benchmark_config(settings.servers), report) as (runtime, client),
    ):
        work = _Work(settings, runtime, client, Path(folder), findings, report)
        work.fill()
        work.checkpoints()
        work.increment()
        work.files()
    return findings.to_plain({"command": "embring bench checkpoint", **asdict(settings)})


class _Work:
    """A cluster with one table, and the folder of its files."""

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        client: "ps.Client",
        folder: Path,
        findings: Findings,
        report: Report,
    ) -> None:
        self._settings, self._client, self._folder = settings, client, folder
        self._findings, self._report = findings, report
        self._storage = Storage(folder / "saved")
        self._fingerprint, self._access = runtime.fingerprint, Access(read_token(runtime.token_path))
        self._servers = [Server("", 0, "", "", (address,)) for address in runtime.addresses]
        self._ids = np.random.default_rng(1).choice(settings.rows, min(SAMPLE, settings.rows), replace=False)

    def _sample(self) -> Any:
        return self._client.pull(TABLE, self._ids, timeout=60.0)

    def _save(self, name: str, incremental: bool = False) -> Saved:
        return save(
            self._storage, self._servers, self._access, self._fingerprint, name=name, incremental=incremental
        )  # fmt: skip

    def _restore(self, name: str) -> None:
        with controller_through(self._servers, self._access) as ask:
            restore(self._storage, ask, self._access, name=name, replace_tables=True)

    def fill(self) -> None:
        """A table of random rows."""
        s, rng = self._settings, np.random.default_rng(0)
        self._report(f"filling a table with {s.rows} rows of {s.dim} floats")
        self._client.create_table(TABLE, s.dim, optimizer=ps.SGD(lr=1.0))
        for at in range(0, s.rows, STEP):
            ids = np.arange(at, min(at + STEP, s.rows))
            self._client.assign(TABLE, ids, rng.standard_normal((len(ids), s.dim), np.float32), timeout=60.0)

    def checkpoints(self) -> None:
        """S15: saves and restores, each beside `cat` in the same round."""
        ratios: dict[str, list[float]] = {}
        rates: dict[str, list[float]] = {}
        before = self._sample()
        for number in range(self._settings.rounds):
            saved = self._save(f"full{number}")
            files = sorted(str(p) for p in Path(saved.path).glob("*.blocks"))
            copy, read = self._copied(files), _seconds(partial(_cat, files, os.devnull))
            restoring = _seconds(partial(self._restore, saved.name))
            self._findings.equal &= bool(np.array_equal(self._sample(), before))
            # As the copy is: on a virtual machine a page that was never used costs its write three times as much.
            self._storage.remove(saved.name)
            for key, above, below in (
                ("save_to_copy", copy, saved.seconds),
                ("restore_to_copy", copy, restoring),
                ("restore_to_read", read, restoring),
            ):
                ratios.setdefault(key, []).append(above / below)
            for key, seconds in (("save", saved.seconds), ("restore", restoring), ("copy", copy), ("read", read)):
                rates.setdefault(key, []).append(saved.bytes / seconds / 1e9)
        figures = {key: round(median(values), 3) for key, values in ratios.items()}
        self._findings.figures["S15"] = {
            **figures, "gb_per_s": {key: round(median(values), 3) for key, values in rates.items()}
        }  # fmt: skip
        self._findings.spreads["S15"] = {k: [round(min(v), 3), round(max(v), 3)] for k, v in ratios.items()}
        self._report(f"S15: {self._findings.figures['S15']}")

    def _copied(self, files: list[str]) -> float:
        target = str(self._folder / "copy")

        def copy() -> None:
            _cat(files, target)
            with open(target, "rb") as file:
                os.fsync(file.fileno())

        seconds = _seconds(copy)
        os.unlink(target)
        return seconds

    def increment(self) -> None:
        """S11, of all files of both, manifests too."""
        s = self._settings
        ids = np.random.default_rng(2).choice(s.rows, max(1, s.rows // 100), replace=False)
        self._save("base")  # restores have put the rows into slots that the older ones do not know
        for part in np.array_split(ids, 10):
            self._client.push(TABLE, part, np.ones((len(part), s.dim), np.float32), timeout=60.0)
        saved = self._save("one", incremental=True)
        full, increment = (
            sum(p.stat().st_size for p in (self._folder / "saved" / name).iterdir()) for name in ("base", "one")
        )
        self._findings.equal &= saved.rows == len(ids)
        self._findings.equal &= not any(c.problems for c in verify(self._storage, counter=Counter()))
        self._findings.figures["S11"] = {"full_by_increment": round(full / increment, 2), "bytes": [full, increment]}
        self._report(f"S11: {self._findings.figures['S11']}")

    def files(self) -> None:
        """Exports and imports, by the time in which the file's own library reads it: out of the page cache, and (cold,
        for imports) from the disk, by imports that find the file there too. Exports by the time in which it writes the
        same rows into a new file, too: no exporter is faster than that."""
        before = self._sample()
        out = {}
        for kind in (".npy", ".safetensors", ".parquet"):
            path = self._folder / f"rows{kind}"
            seconds: dict[str, list[float]] = {}
            for _ in range(self._settings.rounds):
                export = Export(path, 1, 1, self._settings.dim, resume=False)
                for name, work, cold in (
                    ("export", partial(take, self._client, TABLE, export, Counter()), False),
                    ("read", partial(_read, path), False),
                    ("read", partial(_read, path), False),
                    ("import", partial(self._import, path), False),
                    ("read_cold", partial(_read, path), True),
                    ("import_cold", partial(self._import, path), True),
                ):
                    if cold:
                        _forget(path)
                    seconds.setdefault(name, []).append(_seconds(work))
                seconds.setdefault("write", []).append(_seconds(_writing(path, self._folder / f"written{kind}")))
                self._findings.equal &= bool(np.array_equal(self._sample(), before))
                size = path.stat().st_size / 1e9
                for file in (path, self._folder / f"written{kind}"):
                    file.unlink()  # the file system would write the old file's successor to the disk at once
            took = {name: median(all_) for name, all_ in seconds.items()}
            out[kind] = {name: round(took["read"] / took[name], 3) for name in ("import", "export")}
            out[kind]["import_cold"] = round(took["read_cold"] / took["import_cold"], 3)
            out[kind]["export_to_write"] = round(took["write"] / took["export"], 3)
            out[kind] |= {f"{name}_gb_per_s": round(size / one, 3) for name, one in took.items()}
        self._findings.figures["files"] = out
        self._report(f"files, by reading them: {out}")

    def _import(self, path: Path) -> None:
        bring(self._client, TABLE, path, open_source(path), 0, _Nowhere(), Counter())


class _Nowhere:
    def write(self, rows: int) -> None:
        """An import of a benchmark is not gone on with."""


def _seconds(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _cat(files: list[str], target: str) -> None:
    with open(target, "wb") as out:
        done = subprocess.run(["cat", *files], stdout=out, check=False)
    if done.returncode:
        raise EmbringError(f"cat ended with status {done.returncode}")


def _forget(path: Path) -> None:
    """Have the page cache forget a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> Any:
    """All rows in memory, as the file's own library gives them."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        return load_file(path)
    import pyarrow.parquet as pq

    return pq.read_table(path)["row"].combine_chunks().flatten().to_numpy()


def _writing(path: Path, target: Path) -> Callable[[], Any]:
    """What writes the same rows and ids again, by the file's own library and as embring does: uncompressed."""
    if path.suffix == ".npy":
        return partial(np.save, target, np.load(path))
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file, save_file

        return partial(save_file, load_file(path), target)
    import pyarrow.parquet as pq

    options = {"compression": "none", "use_dictionary": False, "write_statistics": ["id"]}
    return partial(pq.write_table, pq.read_table(path), target, **options)
