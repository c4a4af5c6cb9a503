"""`Replication`: what one server does about other copies of its slots. Events in, actions out.

The shell calls a method for each event, in the order in which they happen, on the data thread, and then carries out
`actions()` in order. There is no clock, socket or Ray in here.

    install(view)                        a newer view                 push(token, share, ...)     a client's push
    request(op, fields, arrays)          a peer's replicate, repair, fork, digest: the reply
    replied(peer, link, number, ...)     a peer's reply               broken(peer, link)          a connection ended
    learn(slots, learner, epoch)         the controller's command     pinged(fields)               a ping, of whomever
    flush()                              before rows move in memory
    hold(token, slots, positions)        an export that leaves when all owners hold it
    give_up(tokens)                      answers for which nobody waits any more
    verify(token, slots, start, repair)  copies are to be compared
    tick(now)                            about every 50 ms
"""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashring.view import View
from ps.errors import EmbringError, PerhapsApplied, WrongView
from ps.kernels.replicate import ADMITTED, COPY, HOPELESS
from ps.replication.actions import Action, Arrays, ReplicationLimits
from ps.replication.backup import Backup, Reply
from ps.replication.links import Flight, Link
from ps.replication.members import Members
from ps.replication.primary import Primary
from ps.replication.verify import Comparison, Verifier
from ps.share import PushShare
from ps.slots import OWNER, PRIMARY
from ps.store import Store

FORGET_S = 60.0
"""Seconds between two looks for clients that are idle."""

COMPLAINT, ADMISSION, LESSON, HELD = 1, 2, 3, 4
"""What a server tells the controller of a slot: an owner that must leave it, a learner that may be named as owner, one
that is to be given a copy, and one that has it, but not all that was changed since."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What holds until a view changes it: kinds uint8[n], peers uint64[n] (incarnations), slots and terms int64[n]."""

    kinds: NDArray[np.uint8]
    peers: NDArray[np.uint64]
    slots: NDArray[np.int64]
    terms: NDArray[np.int64]

    def says(self, kind: int) -> bool:
        """Whether this holds of any slot."""
        return bool((self.kinds == kind).any())

    def to_arrays(self) -> Arrays:
        """As arrays of a ping's reply."""
        return {"kinds": self.kinds, "peers": self.peers, "slots": self.slots, "terms": self.terms}


NOTHING = Standing(np.empty(0, np.uint8), np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))


class _Parts:
    """A push of which several servers decide a part: one answer, once all have answered."""

    def __init__(self, token: Hashable, parts: int) -> None:
        self.token, self.left = token, parts
        self.fields = {"applied": 0, "seen": 0, "rows_new": 0}
        self.error: EmbringError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    parts: _Parts


def _asked_by(token: Hashable) -> Hashable:
    """Whose answer it is, of a part too."""
    return token.parts.token if isinstance(token, _Part) else token


class _Gathering(Primary):
    """A `Primary` whose answers to parts of a push, or of a comparison, become one answer."""

    def __init__(self, store: Store, limits: ReplicationLimits) -> None:
        super().__init__(store, limits)
        self.verifier = Verifier(self)

    def answer(self, token: Hashable, fields: dict[str, Any]) -> None:
        if not isinstance(token, _Part):
            super().answer(token, fields)
            return
        for name in token.parts.fields:
            token.parts.fields[name] += int(fields.get(name, 0))
        self._part_done(token.parts)

    def refuse(self, token: Hashable, error: EmbringError) -> None:
        if isinstance(token, Comparison):
            self.verifier.missed(token)
            return
        if not isinstance(token, _Part):
            super().refuse(token, error)
            return
        token.parts.error = token.parts.error or PerhapsApplied(f"a part of the push was refused: {error}")
        self._part_done(token.parts)

    def _part_done(self, parts: _Parts) -> None:
        parts.left -= 1
        if parts.left:
            return
        if parts.error is not None:
            super().refuse(parts.token, parts.error)
        else:
            super().answer(parts.token, parts.fields)


class Replication:
    """The replication of one server, around its store."""

    def __init__(self, store: Store, limits: ReplicationLimits | None = None) -> None:
        self.store = store
        self.limits = limits or ReplicationLimits()
        self._primary = _Gathering(store, self.limits)
        self._backup = Backup(store)
        self._last: float | None = None
        self._clock = self._forgot = 0.0
        self._turn = 0
        # Idle by this clock, which does not go on while the process is stopped with requests unread.
        store.held.clients.clock = lambda: self._clock

    @property
    def members(self) -> Members:
        """Who else holds the slots of which this server is primary."""
        return self._primary.members

    def actions(self) -> list[Action]:
        """What is to be done, in order; empties the list."""
        out, self._primary.out = self._primary.out, []
        return out

    # -- views

    def install(self, view: View) -> None:
        """Judge by a newer view; an older one is ignored."""
        primary, store, old = self._primary, self.store, self.store.view
        if old is not None and view.epoch <= old.epoch:
            return
        primary.flush()
        left = store.regroup(view)
        before = store.held.slots.positions[: view.slots_total].copy()
        store.install(view)
        same = np.zeros(view.slots_total, np.bool_)
        if old is not None:
            same[: old.slots_total] = old.terms() == view.terms()[: old.slots_total]
        told = self._pass_on(view, same)
        me = next((i for i, s in enumerate(view.servers) if s.incarnation == store.incarnation), -2)
        primary.members = Members.of(view, me, self._links(view), primary.members, same)
        for link in primary.by_index:  # copies of slots whose term goes on do so too
            if link.index in told:
                link.epoch = max(link.epoch, view.epoch)
        opened = np.flatnonzero((view.owners()[:, 0] == me) & ~same)
        primary.open(opened, before, view)
        self._end_waits(left)
        self._take_back(view)
        self._backup.install(view)
        primary.release()
        self._renumber()

    def _pass_on(self, view: View, same: NDArray[np.bool_]) -> set[int]:
        """Hand the view to the members of slots whose term ends here, behind the last block of it."""
        members = self._primary.members
        n = min(len(members.peers), len(same))
        told = np.zeros(len(self._primary.by_index) + 1, np.bool_)
        told[members.peers[np.flatnonzero(~same[:n])]] = True  # the last is for "no peer"
        peers = set(np.flatnonzero(told[:-1]).tolist())
        for index in peers:
            link = self._primary.by_index[index]
            if not link.resting and link.epoch < view.epoch:
                self._primary.send_view(link, view)
        return peers

    def _links(self, view: View) -> NDArray[np.int16]:
        """The number of each server's link, int16[servers + 1]; links of servers that are gone end."""
        primary = self._primary
        numbers = np.full(len(view.servers) + 1, -1, np.int16)
        for i, server in enumerate(view.servers):
            if server.incarnation == self.store.incarnation:
                continue
            link = primary.links.get(server.incarnation)
            if link is None:
                link = Link(server.incarnation, len(primary.by_index))
                primary.links[server.incarnation] = link
                primary.by_index.append(link)
            if server.alive or (view.owners() == i).any():
                numbers[i] = link.index
        known = {s.incarnation for s in view.servers}
        for gone in [link for key, link in primary.links.items() if key not in known]:
            primary.lost(gone)
            del primary.links[gone.incarnation]
        return numbers

    def _renumber(self) -> None:
        """Numbers of links that have ended go to others: every push looks at each. No slot has their servers by now."""
        primary, living = self._primary, sorted(self._primary.links.values(), key=lambda link: link.index)
        if len(living) == len(primary.by_index):
            return
        numbers = np.full(len(primary.by_index) + 1, -1, np.int16)  # the last is for "no peer"
        for index, link in enumerate(living):
            numbers[link.index] = index
            link.index = index
        primary.members.peers = numbers[primary.members.peers]
        primary.by_index = living

    def _end_waits(self, left: NDArray[np.int64]) -> None:
        """Whoever waits for a slot that has another primary now must ask there; who waits for one that a table has
        left, here again: what was changed is to be held in the table's own slots."""
        named = self.store.held.slots.named
        kept = []
        for wait in self._primary.waits:
            if (named[wait.slots] == PRIMARY).all() and not np.isin(wait.slots, left).any():
                kept.append(wait)
            else:
                self._primary.refuse(
                    wait.token, PerhapsApplied("a slot got another primary, or a table others, meanwhile")
                )
        self._primary.waits = kept

    def _take_back(self, view: View) -> None:
        """A push that was handed to a server which is no primary of its slots any more, and may hang, must be asked
        for again."""
        index = {s.incarnation: i for i, s in enumerate(view.servers)}
        primaries = view.owners()[:, 0]
        for link in self._primary.links.values():
            for number, flight in link.flights.items():
                if flight.op == "push" and flight.token is not None:
                    slots = flight.slots[flight.slots < view.slots_total]
                    if len(slots) < len(flight.slots) or (primaries[slots] != index.get(link.incarnation)).any():
                        link.flights[number] = replace(flight, token=None)
                        self._primary.refuse(flight.token, PerhapsApplied("a slot got another primary meanwhile"))

    # -- pushes and exports

    def push(
        self,
        token: Hashable,
        share: PushShare,
        acks: str = "all",
        only: NDArray[np.int64] | None = None,
        epoch: int | None = None,
    ) -> None:
        """Decide a push. only: the slots that another owner has forwarded, by the view of this `epoch`; such a push
        is not forwarded again, and refused by another view, in which a table may lie in other slots."""
        try:
            if only is not None and epoch != self.store.epoch:
                why = f"slots were forwarded by epoch {epoch}; this is epoch {self.store.epoch}"
                raise WrongView(why, self.store.epoch)
            self._primary.push(token, share, acks, only)
        except WrongView as error:
            if only is not None or not self._forward(token, share, acks):
                self._primary.refuse(token, error)
        except EmbringError as error:
            self._primary.refuse(token, error)

    def _forward(self, token: Hashable, share: PushShare, acks: str) -> bool:
        """Hand the slots of a push to their primaries, where this server owns all of them; else nothing is done."""
        view = self.store.view
        slots = self.store.slots_of(share)
        if view is None or not len(slots) or (self.store.held.slots.roles[slots] < OWNER).any():
            return False
        primaries = view.owners()[slots, 0]
        parts = _Parts(token, len(np.unique(primaries)))
        for p in np.unique(primaries):
            some = slots[primaries == p]
            peer = view.servers[p].incarnation
            if peer == self.store.incarnation:
                self.push(_Part(parts), share, acks, some, self.store.epoch)
            else:
                self._primary.forward(self._primary.links[peer], _Part(parts), share, some, acks)
        return True

    def flush(self) -> None:
        """Send what waits to be sent, before rows move in memory: until then it is told by their numbers."""
        self._primary.flush()

    def hold(self, token: Hashable, slots: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Answer `token` once every owner holds these slots at these positions: an export may leave then."""
        self._primary.hold(token, slots, positions, {})

    def give_up(self, tokens: Collection[Hashable]) -> None:
        """Nobody waits for these answers any more. What was changed stays, and goes to the other owners as before."""
        self._primary.waits = [wait for wait in self._primary.waits if _asked_by(wait.token) not in tokens]
        for link in self._primary.links.values():
            for number, flight in link.flights.items():
                if flight.op == "push" and _asked_by(flight.token) in tokens:
                    link.flights[number] = replace(flight, token=None)

    def verify(self, token: Hashable, slots: NDArray[np.int64], start: int = 0, repair: bool = False) -> None:
        """Compare copies of slots of this server's view with those of their other owners (see `Verifier.verify`).

        repair: owners whose copies differ are complained of, and refuse to return but by a full copy.
        """
        self._primary.verifier.verify(token, slots, start, repair)

    @property
    def copied(self) -> tuple[int, int]:
        """Rows that were copied to learners since the start, and the bytes that it took."""
        return self._primary.copies.rows, self._primary.copies.bytes

    @property
    def verified(self) -> tuple[int, int]:
        """Copies that were compared since the start, and how many of them differed."""
        return self._primary.verifier.compared, self._primary.verifier.different

    @property
    def lag(self) -> tuple[int, float]:
        """How far other owners are behind at the most: changes of one slot, seconds that one has owed an answer."""
        members, positions = self.members, self.store.held.slots.positions
        owed = max((link.silent for link in self._primary.links.values()), default=0.0)
        return members.behind(positions[: len(members.peers)]), owed

    # -- peers

    def request(self, op: str, fields: dict[str, Any], arrays: Arrays) -> Reply:
        """The reply to a peer's `replicate`, `repair`, `fork` or `digest`. Raises EmbringError."""
        plain, out = self._backup.request(op, fields, arrays)
        late_us = int(self._primary.copies.pace.late * 1e6)
        return {**plain, "late_us": late_us, "sources": self._backup.sources}, out

    def restore(self, fields: dict[str, Any], arrays: Arrays) -> Reply:
        """The reply to an `absorb`, of slots that are being restored. Raises EmbringError."""
        return self._backup.restore(fields, arrays)

    def replied(
        self,
        peer: int,
        link: int,
        number: int,
        fields: dict[str, Any],
        arrays: Arrays,
        error: EmbringError | None = None,
        view: View | None = None,
    ) -> None:
        """A peer's reply, or its error. view: what a `view` request brought."""
        known = self._primary.links.get(peer)
        if known is None or known.number != link:
            return
        flight = known.arrive(number)
        known.epoch = max(known.epoch, int(fields.get("epoch", 0)))
        if "late_us" in fields:
            known.late = int(fields["late_us"]) / 1e6
            known.sources = max(1, int(fields["sources"]))
        if flight is None or self.store.view is None:
            return
        if error is not None:
            self._failed(known, flight, error)
        elif flight.op in ("replicate", "repair"):
            self._primary.taken(known, flight, arrays.get("verdicts"), self.store.view)
        elif flight.op == "fork":
            self._primary.forked(known, flight, arrays, self.store.view)
        elif flight.op == "push":
            if flight.token is not None:
                self._primary.answer(flight.token, fields)
        elif flight.op == "digest":
            self._primary.verifier.told(known, flight, arrays.get("verdicts"))
        if view is not None:
            self.install(view)
        if known.epoch > self.store.epoch:
            self._primary.fetch_view(known)
        self._primary.go_on(known)

    def _failed(self, link: Link, flight: Flight, error: EmbringError) -> None:
        if flight.token is not None:
            self._primary.refuse(flight.token, error)
        elif flight.op == "fork":
            self._primary.set_back_asked(link, flight.slots)
        elif flight.op in ("replicate", "repair"):
            self._primary.refused(link, flight)

    def broken(self, peer: int, link: int) -> None:
        """A connection ended, or could not be made."""
        known = self._primary.links.get(peer)
        if known is not None and known.number == link:
            self._primary.lost(known)

    # -- time and the controller

    def tick(self, now: float, late: float = 0.0) -> None:
        """Time goes by. It counts only as far as ticks come: a process that was stopped does not call others silent.

        late: seconds for which requests waited since the tick before: copies slow down for them, here and at whoever
        sends us some.
        """
        elapsed = 0.0 if self._last is None else min(max(0.0, now - self._last), self.limits.tick_max_s)
        self._last = now
        self._clock += elapsed
        primary = self._primary
        links = list(primary.links.values())
        primary.copies.tick(links, elapsed, late)
        for link in links:
            link.resting = False
            if link.copied_s is not None:
                link.copied_s += elapsed
            primary.wake(link)
            if link.untidy or (link.late_copies and primary.copies.may_mend(link)):
                primary.tidy(link)
        self._turn = (self._turn + 1) % max(1, len(links))
        for link in links[self._turn :] + links[: self._turn]:  # what copies may take goes to one after another first
            primary.pump(link)
            link.silent = link.silent + elapsed if link.flights else 0.0
            if self._accused(link):
                primary.drop_learner(link)
        primary.verifier.sweep(elapsed)
        if int(self._clock) > int(self._clock - elapsed):
            self._backup.second()
        if self._clock - self._forgot >= FORGET_S:
            self._forgot = self._clock
            primary.forget_idle()

    def _accused(self, link: Link) -> bool:
        return link.silent >= self.limits.silent_s or link.refusals >= self.limits.refusals_max

    @property
    def copying(self) -> bool:
        """Whether parts of copies, or what changed since, are to be sent."""
        return any(link.copying for link in self._primary.links.values())

    def learn(self, slots: NDArray[np.int64], learner: int, epoch: int) -> None:
        """Begin to copy slots to a learner (its incarnation); those whose term began after `epoch` are left out."""
        view = self.store.view
        link = self._primary.links.get(learner)
        if view is None or link is None or epoch > view.epoch:
            return
        slots = slots[slots < view.slots_total]
        mine = (self.store.held.slots.named[slots] == PRIMARY) & (view.terms()[slots] <= epoch)
        if len(self.members.add_learner(slots[mine], link.index)):
            link.refusals = 0
            link.untidy = True
            self._primary.tidy(link)

    def pinged(self, fields: Mapping[str, Any]) -> Standing:
        """The answer to a ping. The controller's says whether copies are being made anywhere (`copying`): slots that
        have theirs rest as long."""
        if "copying" in fields:
            self._primary.copies.elsewhere = fields["copying"] is True
        return self.standing()

    def standing(self) -> Standing:
        """What the controller should know, told again with every ping until a view answers it."""
        members, positions = self.members, self.store.held.slots.positions
        accused = any(self._accused(link) for link in self._primary.links.values())
        if not members.learning and not accused and not (members.modes == HOPELESS).any():
            return NOTHING
        kinds, peers, slots = [], [], []
        for link in self._primary.links.values():
            at, columns = members.where(link.index)
            ranks, modes = members.ranks[at, columns], members.modes[at, columns]
            bad = (modes == HOPELESS) | (self._accused(link) & (members.acked[at, columns] < positions[at]))
            learner = np.where((modes == COPY) | (members.acked[at, columns] <= 0), LESSON, HELD)
            kind = np.where(ranks == ADMITTED, ADMISSION, np.where(ranks < ADMITTED, learner, 0)).astype(np.uint8)
            kind[bad & (ranks >= ADMITTED)] = COMPLAINT
            some = kind > 0
            kinds.append(kind[some])
            peers.append(np.full(int(some.sum()), link.incarnation, np.uint64))
            slots.append(at[some])
        if not kinds or self.store.view is None:
            return NOTHING
        where = np.concatenate(slots)
        return Standing(np.concatenate(kinds), np.concatenate(peers), where, self.store.view.terms()[where])
