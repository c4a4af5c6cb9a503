"""Servers that join and leave, as administrators ask for it. The view says how far a move is; here is what it cannot
know: processes that are starting and do not stand in it yet, and those that have left it and still run."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from ray.exceptions import RayError

from hashring.planner import Begin, Change
from hashring.view import Move, View
from ps.controller.admin import abort_of
from ps.controller.members import Member, Members
from ps.controller.outlook import begun, names_for, outlook
from ps.errors import EmbringError, NotApplied, RequestError, cause
from ps.failover import Wish

log = logging.getLogger("embring.controller")


class Moves:
    """What is asked for, one move at a time.

    view: the newest. change: changes it, and waits until servers have it. refuse: raises RequestError where a restore
    keeps a server from leaving. port: of the first server, 0 where it is not fixed. starting: servers that are to join
    and are not in the view. failed: why the last join came to nothing, in one sentence.
    """

    def __init__(
        self,
        members: Members,
        view: Callable[[], View],
        change: Callable[[Wish], Awaitable[int]],
        refuse: Callable[[View, Move], None],
        port: int,
    ) -> None:
        self.starting: tuple[str, ...] = ()
        self.failed = ""
        self.joins: set[asyncio.Task[None]] = set()
        self._members = members
        self._view = view
        self._change = change
        self._refuse = refuse
        self._port = port
        self._aborted = False

    def _move_of(self, fields: Mapping[str, Any]) -> Move:
        """The move that is asked for, if it can be made now. Raises RequestError."""
        kind, names, rate = fields.get("kind"), fields.get("names") or (), fields.get("bytes_per_s") or 0
        if kind not in ("join", "leave") or not isinstance(names, list | tuple) or not isinstance(rate, int):
            raise RequestError("a move needs a kind, join or leave, a list of names, and bytes_per_s as a whole number")
        if self.starting:
            raise RequestError(
                f"a change is under way ({', '.join(self.starting)} starting): wait until it is done, or abort it"
            )
        if kind == "join":
            names = names_for(self._view(), names, self._port, [member.name for member in self.superfluous()])
        return Move(kind, tuple(map(str, names)), max(0, rate))

    def outlook(self, fields: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """What a move would do. Raises RequestError where it would be refused. limit: see `outlook`."""
        move = self._move_of(fields)
        self._refuse(self._view(), move)
        return outlook(self._view(), move, {m.name: m.figures for m in self._members.by_name.values()}, limit)

    async def begin(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Begin to add or remove servers: how far it is, `status` tells. Raises RequestError."""
        move = self._move_of(fields)
        begun(self._view(), move)  # refused before any process is started
        self.failed = ""
        if move.kind == "join":
            self.starting, self._aborted = move.names, False
            task = asyncio.get_running_loop().create_task(self._join(move))
            self.joins.add(task)
            task.add_done_callback(self.joins.discard)
            return {"names": list(move.names), "epoch": self._view().epoch}

        def wish(view: View) -> Change:
            self._refuse(view, move)
            return Begin(move)

        return {"names": list(move.names), "epoch": await self._change(wish)}

    async def _join(self, move: Move) -> None:
        """Start the servers, and have them join; where one does not start, none does."""
        try:
            launches = (self._members.launch(name) for name in move.names)
            failed = [o for o in await asyncio.gather(*launches, return_exceptions=True) if isinstance(o, Exception)]
            members = [self._members.by_name[name] for name in move.names if name in self._members.by_name]
            if failed or not all(m.state == "alive" for m in members):
                raise failed[0] if failed else NotApplied("it died while it started")
            await self._change(lambda view: self._begun(move, members))
            if self._aborted:  # too late to refuse it, and too soon for the abort to find it in the view
                await self._undo(move.kind, move.names)
        except (RayError, TimeoutError, EmbringError) as error:
            self.failed = f"{', '.join(move.names)} did not join: {cause(error)}"
            log.warning("%s", self.failed, exc_info=error)
            for name in move.names:
                if self._view().server_index(name) is None:
                    await self._members.remove(name)
        finally:
            self.starting = ()

    def _begun(self, move: Move, members: Sequence[Member]) -> Change:
        """The join, at its turn. Raises RequestError where it was aborted before that."""
        if self._aborted:
            raise RequestError("it was aborted")
        return Begin(move, tuple(m.server for m in members))

    async def abort(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Undo a move of a kind: servers that were joining leave, those that were leaving stay. names: whose; without
        any, those of the move of that kind that is under way. Asked for again meanwhile, it answers the same. Raises
        RequestError where another is under way, or none."""
        kind, names = fields.get("kind"), [str(name) for name in fields.get("names") or ()]
        if kind == "join" and self._view().move is None and self.starting:
            if set(self.starting) != set(names or self.starting):
                under_way, asked = Move("join", self.starting), Move("join", tuple(names))
                raise RequestError(f"the change that is under way is {under_way}, not {asked}")
            self._aborted = True
            return {"names": list(self.starting), "epoch": self._view().epoch}
        return await self._undo(kind, names)

    async def _undo(self, kind: Any, names: Sequence[str]) -> dict[str, Any]:
        whose = tuple(names)

        def wish(view: View) -> Change | None:
            nonlocal whose
            whose, change = abort_of(view, kind, names)
            return change

        return {"epoch": await self._change(wish), "names": list(whose)}

    def superfluous(self) -> list[Member]:
        """Servers that have left the view, and run. Their names are not free until they have ended: a process that
        joins under one of them would be ended in their place."""
        view, members = self._view(), self._members.by_name.values()
        return [
            m for m in members if view.server_index(m.name) is None and m.name not in self.starting and m.incarnation
        ]
