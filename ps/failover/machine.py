"""`Failover`: who owns what, decided by one controller. Events in, actions out; no clock, no disk, no Ray.

    tick()                          a round of pings begins (every 200 ms)
    answered(incarnation, ...)      a ping's answer, with what the server has to say
    refused(incarnation)            nobody listens where a process was to be asked
    died(incarnation)               Ray's word (or the operator's) that a process is dead
    started(servers)                new processes listen
    change(token, wish)             an administrator's wish
    logged(view), taken()           what came of `Append`

A view is logged before anybody hears of it; whoever cannot log the next is controller no more. Nobody is asked for
positions: every owner in the newest view holds every acknowledged push, so the next in line follows.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hashring.columns import any_of, count_of
from hashring.goal import goal, leavers
from hashring.planner import Change, End, Enlist, Fail, PlanError, Reassign, Renew, Return, Withdraw, plan
from hashring.view import Server, View
from ps.errors import EmbringError, RequestError
from ps.failover.health import Disputes, Health, incarnations, silent
from ps.failover.moves import Course, course, pairs
from ps.replication import ADMISSION, COMPLAINT, HELD, LESSON, Standing


@dataclass(frozen=True, slots=True)
class FailoverLimits:
    """Limits of the controller, in rounds of pings (200 ms) where they are of time.

    pings_max: unanswered pings after which a server leaves its slots. wait_rounds: how long, while a server is missing,
    slots are not moved again: a paused process that returns by then needs only its fork. learn_rounds: between two
    looks at what should move. turn_rounds: between two views of a move that give slots away, while more are on their
    way: a view costs every server and client some milliseconds, and the pushes under way an attempt. dispute_rounds:
    how long two servers that could not reach each other are kept apart. learn_max: slots that one primary copies, or
    streams to learners that were admitted, at a time. turn_max: slots that get other owners in one view.
    """

    pings_max: int = 5
    wait_rounds: int = 25
    learn_rounds: int = 5
    turn_rounds: int = 10
    dispute_rounds: int = 50
    learn_max: int = 1024
    turn_max: int = 16384


@dataclass(frozen=True, slots=True)
class Ping:
    """Ask a process how it is: its answer goes to `answered`. copying: whether slots are being copied, by whomever."""

    incarnation: int
    copying: bool = False


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand a process the view."""

    incarnation: int
    view: View


@dataclass(frozen=True, slots=True)
class Append:
    """Create the view in the log, only if its epoch is absent; planned from epoch `after`. Then `logged` or `taken`."""

    view: View
    after: int


@dataclass(frozen=True, slots=True)
class Learn:
    """Tell a primary to copy slots to a learner."""

    primary: int
    slots: NDArray[np.int64]
    learner: int
    epoch: int


@dataclass(frozen=True, slots=True)
class Changed:
    """An administrator's wish is in the log, or (at the present epoch) was fulfilled already."""

    token: Hashable
    epoch: int


@dataclass(frozen=True, slots=True)
class Refused:
    """It cannot be."""

    token: Hashable
    error: EmbringError


@dataclass(frozen=True, slots=True)
class Retire:
    """Another controller has taken over: end."""


Action = Ping | Deliver | Append | Learn | Changed | Refused | Retire

Wish = Change | Callable[[View], Change | View | None]
"""A change, or what says, of the view when its turn comes: a change, a view planned from it, or None for nothing."""


class Failover:
    """One controller's mind, from the newest view of the log on."""

    def __init__(self, view: View, limits: FailoverLimits | None = None) -> None:
        self.view = view
        self.limits = limits or FailoverLimits()
        self.retired = False
        self._onward = False
        self.servers: dict[int, Health] = {s.incarnation: Health(s.incarnation) for s in view.servers if s.alive}
        self.disputes = Disputes(self.limits.dispute_rounds)
        self._dead: set[int] = set()
        self._new: dict[str, Server] = {}
        self._wishes: list[tuple[Hashable, Wish]] = []
        self._logging: tuple[View, Hashable] | None = None
        self._late: set[int] = set()
        self._goal: tuple[frozenset[str], NDArray[np.int16]] | None = None
        self._round = self._changed_round = self._learned_round = self._turned_round = 0
        self._taught_round = -2
        self._untaught = False
        self._admitted = 0
        self.out: list[Action] = []

    def actions(self) -> list[Action]:
        """What is to be done, in order; empties the list."""
        out, self.out = self.out, []
        return out

    @property
    def appending(self) -> bool:
        """Whether a view of this controller's is on its way into the log."""
        return self._logging is not None

    # -- events

    def tick(self) -> None:
        """A round: count who did not answer the last ping, ask again, hand on what was late, decide."""
        if self.retired:
            return
        self._round += 1
        self.disputes.age()
        copying = self._copying()
        for health in self.servers.values():
            health.missed += health.awaiting
            health.awaiting = True
            self.out.append(Ping(health.incarnation, copying))
        self._late = set()
        self._deliver()
        self._decide()
        due = self._round - self._learned_round >= self.limits.learn_rounds
        if self._logging is None and (due or self._come()):
            self._learned_round = self._round
            self._move()

    def answered(self, incarnation: int, epoch: int, standing: Standing) -> None:
        """A process answers."""
        health = self.servers.get(incarnation)
        if health is None or self.retired:
            return
        if health.missed > 1:  # it was paused, for everybody: nobody is cut off from it
            self.disputes.settle(incarnation)
        health.missed, health.refused, health.awaiting, health.heard = 0, 0, False, True
        health.epoch, health.standing = max(health.epoch, epoch), standing
        if epoch > self.view.epoch:  # another controller has logged a view, and may be gone: the log must be read again
            self.taken()
        self._decide()

    def refused(self, incarnation: int) -> None:
        """Nobody listens where a process did."""
        health = self.servers.get(incarnation)
        if health is not None and not self.retired:
            health.refused += 1
            self._decide()

    def died(self, incarnation: int) -> None:
        """A process is dead, by the word of who started it."""
        self._dead.add(incarnation)
        self._decide()

    def started(self, *servers: Server) -> None:
        """New processes listen; those of the same names before them are dead."""
        self._new |= {s.name: s for s in servers}
        self._decide()

    def change(self, token: Hashable, wish: Wish) -> None:
        """Make a change as soon as it is its turn: `Changed` or `Refused` tells what came of it."""
        self._wishes.append((token, wish))
        self._decide()

    def logged(self, view: View) -> None:
        """The view is in the log: now everybody may hear of it."""
        if self._logging is None or self.retired:
            return
        token = self._logging[1]
        self._logging = None
        old, self.view = self.view, view
        if not self._onward:
            self._goal = None
        if token is not None:
            self.out.append(Changed(token, view.epoch))
        alive = {s.incarnation for s in view.servers if s.alive}
        self.servers = {i: self.servers.get(i) or Health(i) for i in sorted(alive)}
        self._late = self._flipped(old, view)
        self._deliver()
        self._decide()

    def taken(self) -> None:
        """Somebody else has logged the next epoch: who is left must read the log, or nobody would hear of it."""
        self.retired = True
        self.out = [Retire()]

    # -- views

    def _flipped(self, old: View, new: View) -> set[int]:
        """New primaries of slots whose old primary is alive: it hears of the view first, and hands it on behind its
        last block."""
        n = old.slots_total
        before, after = incarnations(old.servers)[old.owners()[:, 0]], incarnations(new.servers)[new.owners()[:n, 0]]
        moved = (before != after) & (old.terms() != new.terms()[:n])
        there = {i for i, h in self.servers.items() if h.fresh}
        pairs = {(int(a), int(b)) for a, b in zip(before[moved], after[moved], strict=True)}
        return {b for a, b in pairs if a in there}

    def _deliver(self) -> None:
        for health in self.servers.values():
            if health.epoch < self.view.epoch and health.incarnation not in self._late and self.view.epoch:
                self.out.append(Deliver(health.incarnation, self.view))

    def _append(self, change: Change, token: Hashable = None) -> bool:
        """Plan the next view and ask for it to be logged; False where it would change nothing."""
        view = plan(self.view, change)
        if (
            token is None
            and isinstance(change, Withdraw | Reassign | Renew)
            and (view.terms() == self.view.terms()).all()
        ):
            return False
        if isinstance(change, Withdraw | Fail):
            self._changed_round = self._round
        return self._log(view, token)

    def _log(self, view: View, token: Hashable, onward: bool = False) -> bool:
        """onward: whether the view is a step towards the goal, which holds after it."""
        self._logging = (view, token)
        self._onward = onward
        self.out.append(Append(view, self.view.epoch))
        return True

    def _decide(self) -> None:
        """The most urgent change, if there is any and none is under way."""
        if self.retired or self._logging is not None:
            return
        for step in (self._deaths, self._births, self._silence, self._complaints, self._wish):
            if step():
                return

    def _deaths(self) -> bool:
        for server in self.view.servers:
            if server.alive and server.incarnation in self._dead:
                return self._append(Fail(server.name))
        return False

    def _births(self) -> bool:
        known = {s.incarnation for s in self.view.servers}
        self._new = {name: s for name, s in self._new.items() if s.incarnation not in known}
        if strangers := tuple(s for name, s in self._new.items() if self.view.server_index(name) is None):
            return self._append(Enlist(strangers))
        for name, server in self._new.items():
            alive = any(s.alive for s in self.view.servers if s.name == name)
            return self._append(Fail(name) if alive else Return(server))
        return False

    def _silence(self) -> bool:
        gone = silent(self.servers, self.limits.pings_max)
        everything = np.arange(self.view.slots_total)
        return self._withdraw(dict.fromkeys(sorted(gone), everything))

    def _withdraw(self, slots: dict[int, NDArray[np.int64]]) -> bool:
        names = {s.incarnation: s.name for s in self.view.servers if s.alive}
        leaving = {names[i]: left for i, left in slots.items() if i in names}
        return bool(leaving) and self._append(Withdraw(leaving))

    def _reports(self, *kinds: int, late: bool = False) -> list[tuple[int, int, NDArray[np.int64]]]:
        """(primary, peer, slots) of what holds in the present terms, from servers that answer; late: also of those
        whose last answer may come yet."""
        heard = [h for h in self.servers.values() if (self._usable(h.incarnation) if late else h.fresh)]
        speak = [h for h in heard if any(h.standing.says(kind) for kind in kinds)]
        if not speak:
            return []
        terms, owners = self.view.terms(), self.view.owners()
        ids = incarnations(self.view.servers)
        found = []
        for health in speak:
            said, primary = health.standing, health.incarnation
            if primary in self._dead:
                continue
            good = any_of(said.kinds[:, None] == kinds) & (said.slots < len(terms))
            slots, peers, when = said.slots[good], said.peers[good], said.terms[good]
            now = (terms[slots] == when) & (ids[owners[slots, 0]] == np.uint64(primary))
            for peer in np.unique(peers[now]):
                found.append((primary, int(peer), slots[now & (peers == peer)]))
        return found

    def _complaints(self) -> bool:
        """An owner leaves the slots for which its primary could not reach it; who disputes with most leaves all."""
        reports = self._reports(COMPLAINT)
        for primary, peer, _ in reports:
            self.disputes.add(primary, peer)
        leaving: dict[int, list[NDArray[np.int64]]] = {}
        renewed = []
        for primary, peer, slots in reports:
            sick = max((peer, primary), key=self._opponents)  # of equals the primary is believed
            if self._opponents(sick) > max(1, (len(self.servers) - 1) / 2):
                leaving.setdefault(sick, []).append(np.arange(self.view.slots_total))
            else:
                owned = self._owned(peer, slots)
                leaving.setdefault(peer, []).append(slots[owned])
                renewed.append(slots[~owned])  # an admitted learner: its promise ends with the term
        if leaving and self._withdraw({i: np.unique(np.concatenate(s)) for i, s in sorted(leaving.items())}):
            return True
        again = np.unique(np.concatenate(renewed)) if renewed else np.empty(0, np.int64)
        return bool(len(again)) and self._append(Renew(again))

    def _opponents(self, incarnation: int) -> int:
        """With how many that answer it is in dispute: whoever is dead is in dispute with everybody."""
        return sum(i in self.servers and self.servers[i].fresh for i in self.disputes.opponents(incarnation))

    def _owned(self, incarnation: int, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        ids = incarnations(self.view.servers)
        return any_of(ids[self.view.owners()[slots]] == np.uint64(incarnation))

    def _wish(self) -> bool:
        while self._wishes:
            token, wish = self._wishes.pop(0)
            try:
                change = wish(self.view) if callable(wish) else wish
                if isinstance(change, View):
                    return self._log(change, token)
                if change is not None:
                    return self._append(change, token)
                self.out.append(Changed(token, self.view.epoch))
            except PlanError as error:
                self.out.append(Refused(token, RequestError(str(error))))
            except EmbringError as error:
                self.out.append(Refused(token, error))
        return False

    # -- moves

    @property
    def learning(self) -> int:
        """Slots that are being copied to servers now, or wait to be named theirs, one for each server."""
        return self._count(LESSON, HELD, ADMISSION)

    @property
    def left(self) -> int:
        """Copies that are to be made, and slots that only change their owners' order, until the goal is reached; 0 also
        where that cannot be told, since some are `unheard`."""
        ahead = self._course()
        return 0 if ahead is None else len(ahead.missing) + len(ahead.ready) - ahead.gaining

    @property
    def unheard(self) -> list[str]:
        """Servers that the view takes for alive, and that have not answered yet or do not any more."""
        return [s.name for s in self.view.servers if s.alive and not self._usable(s.incarnation)]

    @property
    def held(self) -> int:
        """Copies of these that are made, and wait for the others."""
        return self._count(HELD, ADMISSION)

    def _count(self, *kinds: int) -> int:
        return sum(len(slots) for _, _, slots in self._reports(*kinds))

    def _course(self) -> Course | None:
        """The way to the goal; None where it cannot be told, since a server that owns slots does not answer."""
        view, servers = self.view, self.view.servers
        unusable = frozenset(s.name for s in servers if s.alive and not self._usable(s.incarnation))
        if 2 * len(unusable) > sum(s.alive for s in servers):
            return None
        shared = view.owners()[count_of(view.owners() >= 0) > 1]
        if any(s.name in unusable and (shared == i).any() for i, s in enumerate(servers)):
            return None  # it answers soon, or leaves those slots
        if self._goal is None or self._goal[0] != unusable:
            self._goal = (unusable, goal(view, unusable))
        index = {s.incarnation: i for i, s in enumerate(servers) if s.alive and s.incarnation not in self._dead}
        lessons, admitted = (
            pairs(len(servers), [(index[peer], at) for _, peer, at in self._reports(*kinds) if peer in index])
            for kinds in ((LESSON, HELD), (ADMISSION,))
        )
        fresh = np.array([s.incarnation in index and self.servers[s.incarnation].fresh for s in servers], np.bool_)
        return course(view, self._goal[1], lessons, admitted, fresh)

    def _move(self) -> None:
        """A step towards the goal: slots that are ready get their owners, others are copied.

        Soon after a failure only what was copied already is given away: who failed may return, and with it its rows.
        """
        ahead = self._course()
        self._untaught = False
        if ahead is None:
            return
        waiting = self._awaited()
        ready = min(self.limits.turn_max, ahead.gaining if waiting else len(ahead.ready))
        if ready and not self._can_wait(ahead.ready[:ready], ahead.owners[:ready]):
            self._turned_round = self._round
            after = plan(self.view, Reassign(ahead.ready[:ready], ahead.owners[:ready]))
            self._log(after, None, onward=True)
        elif len(ahead.stray) and not waiting:
            self._log(plan(self.view, Renew(ahead.stray)), None, onward=True)
        elif self._over(ahead) and not waiting:
            self._append(End())
        if not waiting:
            self._teach(ahead)

    def _copying(self) -> bool:
        """Whether copies are being made, or are to be: what was copied waits for them. Also where that is not known
        yet, for who once goes on does not rest again."""
        unheard = any(not h.heard and h.missed < self.limits.pings_max for h in self.servers.values())
        told = self._round <= self._taught_round + 1  # and has not said yet that it does
        return unheard or told or self._untaught or bool(self._reports(LESSON, late=True))

    def _come(self) -> bool:
        """Whether the last learners on their way have just been admitted: every push goes to them too until a view."""
        before, self._admitted = self._admitted, self._count(ADMISSION)
        return self._admitted > before and not self._reports(LESSON, HELD, late=True)

    def _can_wait(self, slots: NDArray[np.int64], owners: NDArray[np.int16]) -> bool:
        """Whether slots that could get these owners have as many already, and others come soon to go with them."""
        if self._round - self._turned_round >= self.limits.turn_rounds or not self._reports(LESSON, HELD, late=True):
            return False
        return bool((count_of(self.view.owners()[slots] >= 0) >= count_of(owners >= 0)).all())

    def _over(self, ahead: Course) -> bool:
        """Whether the move that is under way has arrived, and nothing else is to be done."""
        move = self.view.move
        if move is None or not ahead.arrived:
            return False
        if move.kind == "leave":
            return not leavers(self.view)[self.view.owners()].any()
        return all(self._usable(s.incarnation) for s in self.view.servers if s.name in move.names)

    def _teach(self, ahead: Course) -> None:
        """Have slots copied, some at a time."""
        k = len(self.view.servers)
        settled = np.isin(ahead.teach // k, np.union1d(ahead.ready, ahead.stray), invert=True)
        slots, learners = ahead.teach[settled] // k, ahead.teach[settled] % k
        sources = self.view.owners()[slots, 0]
        busy = dict.fromkeys(self.servers, 0)
        for primary, _, at in self._reports(LESSON, ADMISSION):
            busy[primary] += len(at)
        for source in np.unique(sources).tolist():
            primary = self.view.servers[source].incarnation
            if not self.servers[primary].fresh:
                continue
            for learner in np.unique(learners[sources == source]).tolist():
                other = self.view.servers[learner].incarnation
                if self.disputes.between(primary, other) or not self.servers[other].fresh:
                    continue
                wanted = slots[(sources == source) & (learners == learner)]
                room = max(0, self.limits.learn_max - busy[primary])
                self._untaught |= len(wanted) > room
                wanted = wanted[:room]
                busy[primary] += len(wanted)
                if len(wanted):
                    self._taught_round = self._round
                    self.out.append(Learn(primary, wanted, other, self.view.epoch))

    def _awaited(self) -> bool:
        """Whether a server is missing that may come back soon: paused, with what it has, or started again, for its
        share of the copies."""
        there = {i for i, health in self.servers.items() if health.fresh}
        away = any(s.incarnation not in there for s in self.view.servers if "~" not in s.name)
        return away and self._round - self._changed_round < self.limits.wait_rounds

    def _usable(self, incarnation: int) -> bool:
        """Whether it has answered, and not fallen silent since."""
        health = self.servers.get(incarnation)
        alive = health is not None and health.heard and health.missed < self.limits.pings_max
        return alive and incarnation not in self._dead
