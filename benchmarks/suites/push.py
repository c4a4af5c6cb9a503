"""Pushing beside a local optimizer step on the same rows (S7): one copy of them, two, two of which one acknowledges.

A push is `ids` distinct ids of a table with their gradients; the peer is torch's sparse step on a matrix in this
process. S7 is the peer's seconds by embring's: rows a second of embring to those of the peer.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import ps
from benchmarks.measure import Side, interleave, timed
from benchmarks.report import Findings
from benchmarks.suites.cluster import Report, benchmark_config, cluster
from benchmarks.workloads import distinct_zipf_ids
from ps.runtime import Runtime, read_token
from ps.share import Acks
from ps.spec import Optimizer

LOAD_ROWS = 25_000
BATCHES = 32
"""Different pushes, made in turn."""

IN_FLIGHT = 8
CHECKED = 16
"""Pushes after which the rows of all sides are compared."""

CLOSE = 2e-5
"""How far a row may be from torch's: both add in float32, in another order of operations."""


@dataclass(frozen=True)
class Settings:
    """What is measured. rows: of the table; ids: distinct ids of a push, drawn by Zipf's law."""

    optimizers: Sequence[str] = ("adagrad", "adam")
    rows: int = 1_000_000
    ids: int = 4096
    dim: int = 64
    zipf: float = 1.05
    servers: int = 3
    rounds: int = 5
    seconds: float = 1.0


@dataclass(frozen=True)
class Way:
    """How a push is kept."""

    replicas: int
    acks: Acks


WAYS: Mapping[str, Way] = {"r1": Way(1, "all"), "r2": Way(2, "all"), "r2_primary": Way(2, "primary")}

OURS: Mapping[str, Optimizer] = {"adagrad": ps.Adagrad(lr=0.05), "adam": ps.Adam(lr=0.01)}

THEIRS: Mapping[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    "adam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.01),
}

Push = tuple[NDArray[np.int64], NDArray[np.float32]]
"""(distinct ids int64[k], gradients float32[k, dim])"""


class TorchStep:
    """A matrix in this process, and torch's sparse optimizer over it."""

    def __init__(self, settings: Settings, optimizer: str, values: NDArray[np.float32]) -> None:
        torch.set_num_threads(1)  # as many as a server's data thread has
        torch.sparse.check_sparse_tensor_invariants.disable()
        self.weight = torch.nn.Parameter(torch.from_numpy(values.copy()))
        self._step = THEIRS[optimizer]([self.weight])

    def push(self, push: Push) -> None:
        """One step with a sparse gradient."""
        ids, grads = (torch.from_numpy(array) for array in push)
        self.weight.grad = torch.sparse_coo_tensor(
            ids[None], grads, self.weight.shape, is_coalesced=True, check_invariants=False
        )
        self._step.step()


def run(settings: Settings, report: Report) -> dict[str, Any]:
    """Start a cluster, measure, end it; one JSON-able result."""
    findings = Findings()
    with ExitStack() as stack:
        runtime, _ = stack.enter_context(cluster(benchmark_config(settings.servers), report))
        clients = {name: stack.enter_context(_connect(runtime, way.acks)) for name, way in WAYS.items()}
        for optimizer in settings.optimizers:
            _measure(settings, optimizer, clients, findings, report)
    return findings.to_plain({"command": "embring bench push", **asdict(settings)})


def _connect(runtime: Runtime, acks: Acks) -> "ps.Client":
    return ps.connect(list(runtime.addresses), read_token(runtime.token_path), 60.0, acks=acks)


def _measure(
    settings: Settings, optimizer: str, clients: Mapping[str, "ps.Client"], findings: Findings, report: Report
) -> None:
    """One optimizer: load, compare, and time every way beside torch."""
    rng = np.random.default_rng(7)
    values = rng.standard_normal((settings.rows, settings.dim), np.float32)
    report(f"loading {settings.rows} rows with {optimizer}, {len(WAYS)} times")
    for name, way in WAYS.items():
        table, client = _table(optimizer, name), clients[name]
        client.create_table(table, settings.dim, OURS[optimizer], replicas=way.replicas)
        for at in range(0, settings.rows, LOAD_ROWS):
            ids = np.arange(at, min(at + LOAD_ROWS, settings.rows))
            client.assign(table, ids, values[ids])
    peer = TorchStep(settings, optimizer, values)
    pushes = [_push(settings, rng) for _ in range(BATCHES)]
    findings.equal &= _compared(settings, optimizer, clients, peer, pushes, findings, report)
    sides: dict[str, Side] = {"torch": timed(peer.push, pushes)}
    for name, client in clients.items():
        sides[name] = _our_side(client, _table(optimizer, name), pushes)
    report(f"pushing with {optimizer}")
    rounds = interleave(sides, settings.rounds, settings.seconds)
    size = float(np.mean([len(push[0]) for push in pushes]))
    for name in WAYS:
        ratio = findings.ratio(rounds, "torch", name, "S7", optimizer, name)
        report(f"S7 {optimizer} {name}: {size / rounds.median(name):,.0f} rows/s, {ratio:.2f}x torch")
    findings.figures.setdefault("rows_per_s", {})[optimizer] = {n: int(size / rounds.median(n)) for n in sides}
    for name, client in clients.items():
        client.drop_table(_table(optimizer, name))


def _table(optimizer: str, way: str) -> str:
    return f"{optimizer}_{way}"


def _push(settings: Settings, rng: np.random.Generator) -> Push:
    """As many distinct ids as asked for, in the order in which they would be drawn."""
    found = distinct_zipf_ids(rng, settings.ids, settings.rows, settings.zipf, (7,))
    return found, np.float32(0.01) * rng.standard_normal((len(found), settings.dim), np.float32)


def _compared(
    settings: Settings,
    optimizer: str,
    clients: Mapping[str, "ps.Client"],
    peer: TorchStep,
    pushes: list[Push],
    findings: Findings,
    report: Report,
) -> bool:
    """Whether some pushes of the same ids leave the same rows: alike in every bit among our ways, and near torch's.

    The same ids in every push: Adam's bias correction counts a row's own pushes, torch's all steps of the table.
    """
    ids = np.sort(pushes[0][0])
    for _, grads in pushes[:CHECKED]:
        peer.push((ids, grads))
        for name, client in clients.items():
            client.push(_table(optimizer, name), ids, grads)
    theirs = peer.weight.detach().numpy()[ids]
    ours = [client.pull(_table(optimizer, name), ids) for name, client in clients.items()]
    off = float(np.abs(ours[0] - theirs).max())
    findings.figures.setdefault("furthest_from_torch", {})[optimizer] = off
    report(f"{optimizer}: rows are at most {off:.1e} from torch's after {CHECKED} pushes")
    return all(np.array_equal(ours[0], other) for other in ours[1:]) and off <= CLOSE


def _our_side(client: "ps.Client", table: str, pushes: list[Push]) -> Side:
    """Pushes with some in flight, as a training loop sends them; the time of all, shared evenly."""
    turn = cycle(pushes)

    def burst(calls: int) -> None:
        handles: list[Any] = []
        for _ in range(calls):
            if len(handles) == IN_FLIGHT:
                handles.pop(0).result()
            handles.append(client.push_nowait(table, *next(turn)))
        client.flush()

    def side(calls: int) -> list[float]:
        begun = time.perf_counter()
        burst(calls)
        return [(time.perf_counter() - begun) / calls] * calls

    return side
