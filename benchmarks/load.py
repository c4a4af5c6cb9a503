"""Load on a cluster: as fast as it goes (closed), or at a rate that does not wait for answers (open)."""

import asyncio
import gc
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ps.errors import EmbringError

Request = Callable[[int], Awaitable[object]]
"""Make request number i, and return once it is answered; EmbringError where it failed."""


@dataclass
class Outcome:
    """What came of a load. seconds: how long it ran. latency_s: of the requests that were `answered`, from their turn.
    refused: those that failed.

    lag_s: of every request, how long after its turn it was begun: the generator's own part of the latency.
    """

    seconds: float = 0.0
    requests: int = 0
    answered: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Requests that failed."""
        return len(self.refused)

    @property
    def rate(self) -> float:
        """Requests a second that were answered: one that is refused at once is no work done."""
        return len(self.answered) / self.seconds


def percentiles_ms(seconds: Sequence[float], shares: Sequence[float] = (50, 95, 99)) -> dict[str, float]:
    """{"p50_ms": ...}; empty where there is nothing."""
    if not len(seconds):
        return {}
    return {f"p{q:g}_ms": round(float(np.percentile(seconds, q)) * 1e3, 3) for q in shares}


def arrivals(rate: float, seconds: float, seed: int, kind: str = "poisson") -> NDArray[np.float64]:
    """When requests are due, in seconds from the beginning, `rate` a second: float64[n], rising.

    "poisson" draws the gaps from an exponential law; "fixed" makes them all alike.
    """
    n = max(1, round(rate * seconds))
    if kind == "fixed":
        return np.arange(n) / rate
    gaps = np.random.default_rng((seed, n)).exponential(1.0, n)
    return np.cumsum(gaps) * seconds / max(gaps.sum(), 1e-9)  # scaled, so that the stated rate is the rate


def steady() -> None:
    """Have later collections of garbage pass over what is there already: one that walks through torch, numba and Ray
    stops the load for 0.2 s, and all that fell due meanwhile comes at once."""
    gc.collect()
    gc.freeze()


async def closed(
    request: Request, in_flight: int, seconds: float = math.inf, requests_max: float = math.inf
) -> Outcome:
    """Keep so many requests in flight, for so long or until so many were made."""
    steady()
    found = Outcome()
    begun = time.perf_counter()
    number = 0

    async def one_after_another() -> None:
        nonlocal number
        while time.perf_counter() - begun < seconds and number < requests_max:
            turn, number = number, number + 1
            await _one(request, turn, time.perf_counter(), found)

    await asyncio.gather(*(one_after_another() for _ in range(in_flight)))
    found.seconds = time.perf_counter() - begun
    return found


async def opened(request: Request, due: NDArray[np.float64], first: int = 0) -> Outcome:
    """Begin each request when it is due, however many are in flight; a latency counts from when it was due."""
    steady()
    found = Outcome()
    begun = time.perf_counter()
    tasks = []
    for i, after in enumerate(due):
        left = begun + after - time.perf_counter()
        if left > 0 or i % 16 == 0:
            await asyncio.sleep(max(0.0, left))
        tasks.append(asyncio.create_task(_one(request, first + i, begun + after, found)))
    await asyncio.gather(*tasks)
    found.seconds = time.perf_counter() - begun
    return found


async def _one(request: Request, number: int, due: float, found: Outcome) -> None:
    found.requests += 1
    found.lag_s.append(max(0.0, time.perf_counter() - due))
    try:
        await request(number)
        found.latency_s.append(time.perf_counter() - due)
        found.answered.append(number)
    except EmbringError as error:
        found.refused.append(number)
        if len(found.errors) < 20:
            found.errors.append(f"{type(error).__name__}: {error}"[:200])
