"""When the controller has a checkpoint saved, and lost slots restored. The work is done by a process of its own.

One piece of work at a time. A save that fails is tried again after RETRY_S, or when the next one is due if that is
sooner; a restore likewise: whatever made it fail (a table that the checkpoint has not, say) is in `status`.
"""

import asyncio
import contextlib
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

from hashring.view import View
from ps.checkpoint.hidden import unrestored
from ps.config.checkpoint import CheckpointConfig

LOOK_S = 0.5
"""Between two looks at what is due."""

RETRY_S = 30.0
"""After a failure."""

LOST_WAIT_S = 20.0
"""How long a server that died may take to be started again before lost slots are restored without it."""

JOB_MAX_S = 24 * 3600.0

COMMAND = (sys.executable, "-m", "ps.checkpoint.job")

Job = Literal["save", "restore"]
Order = Callable[[Job], dict[str, Any]]
"""What the process is told: see ps.checkpoint.job."""

log = logging.getLogger("embring.checkpoint")


class Keeper:
    """Decides, and keeps what came of it for `status`."""

    def __init__(
        self,
        config: CheckpointConfig,
        view: Callable[[], View],
        order: Order,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._view, self._order, self._clock = config, view, order, clock
        self._doing: Job | None = None
        self._lost_since: float | None = None
        self._next: dict[Job, float] = {"save": clock() + config.every_s, "restore": 0.0}
        self._last: dict[str, Any] = {}
        self._error = ""

    async def run(self) -> None:
        """Look at what is due, without end."""
        while self._config.every_s or self._config.restore_lost:
            job = self.due()
            if job is not None:
                self.ended(job, await asyncio.to_thread(run_job, self._order(job)))
            await asyncio.sleep(LOOK_S)

    def save_soon(self) -> None:
        """What was restored has no checkpoint of this cluster yet: until then no lost slot comes back by itself."""
        self._next["save"] = self._clock()

    def due(self) -> Job | None:
        """What is to be done now; it counts as begun."""
        now, lost = self._clock(), lost_for_good(self._view())
        self._lost_since = (self._lost_since if self._lost_since is not None else now) if lost else None
        job: Job | None = None
        if self._doing is None and self._config.restore_lost and self._lost_since is not None:
            waited = complete(self._view()) or now - self._lost_since >= LOST_WAIT_S
            if waited and now >= self._next["restore"]:
                job = "restore"
        elif self._doing is None and self._config.every_s and self._view().tables and now >= self._next["save"]:
            job = "save"  # with lost slots there is nothing to save, it would say so again and again
        self._doing = job or self._doing
        return job

    def ended(self, job: Job, told: dict[str, Any]) -> None:
        """A job has ended with this outcome."""
        now, self._doing = self._clock(), None
        failed, said = "error" in told, [f"{job}: {warning}" for warning in told.get("warnings", ())]
        if failed:
            said.insert(0, f"{job}: {told['error']}")
        if told.get("prune_error"):  # the save stands: the next one is due as ever, and will try it again
            said.append(f"prune: {told['prune_error']}")
        self._error = "; ".join(said)
        if said:
            log.warning("checkpoint: %s", self._error)
        wait = self._config.every_s if job == "save" else 0.0
        self._next[job] = now + (min(wait or RETRY_S, RETRY_S) if failed else wait)
        if failed:
            return
        log.info("checkpoint: %s %s, %d rows, %d bytes", job, told["name"], told["rows"], told["bytes"])
        self._last[job] = {"at": time.time(), **{k: told[k] for k in ("name", "rows", "bytes")}}

    def status(self) -> dict[str, Any]:
        """doing: the job under way, or None. last: by job, the last that ended well. error: of the last, what
        it warned of, or of the pruning that followed it, "" if none."""
        return {
            "directory": self._config.directory,
            "every_s": self._config.every_s,
            "doing": self._doing,
            "last": self._last,
            "error": self._error,
        }


def lost_for_good(view: View) -> bool:
    """Whether slots are lost that no restore has made, which may be under way."""
    return bool((view.lost() & ~unrestored(view)).any())


def complete(view: View) -> bool:
    """Whether no server is missing: those of dead processes whose name is back lie in graves, as "NAME~..."."""
    return all(s.alive or "~" in s.name for s in view.servers)


def run_job(order: dict[str, Any]) -> dict[str, Any]:
    """Have the order done by a process; its outcome, or {"error": sentence}. Blocks."""
    try:
        done = subprocess.run(COMMAND, input=json.dumps(order), capture_output=True, text=True, timeout=JOB_MAX_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": f"its process failed: {error}"}
    with contextlib.suppress(ValueError):
        told: dict[str, Any] = json.loads(done.stdout)
        return told
    return {"error": ": ".join([_ended(done.returncode), *done.stderr.strip().splitlines()[-1:]])[:300]}


def _ended(status: int) -> str:
    if status >= 0:
        return f"its process ended with status {status}"
    try:
        return f"its process was ended by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"its process was ended by signal {-status}"
