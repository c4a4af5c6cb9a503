"""Which servers are silent: pings are counted, no clock is read (sans-IO: answers in, a verdict out)."""

from dataclasses import dataclass, field


@dataclass
class Silence:
    """Counts the unanswered pings of each server, one after another.

    limit: so many make a server silent. If most servers fall silent at once the fault is likely the asker's own
    (its host, its network): then nobody is called silent, and only Ray's word counts.
    """

    limit: int
    unanswered: dict[str, int] = field(default_factory=dict)

    def answered(self, name: str) -> None:
        """A ping came back."""
        self.unanswered[name] = 0

    def missed(self, name: str) -> None:
        """A ping did not come back in its time."""
        self.unanswered[name] = self.unanswered.get(name, 0) + 1

    def forget(self, name: str) -> None:
        """The server is gone, or begins anew."""
        self.unanswered.pop(name, None)

    def silent(self) -> frozenset[str]:
        """The servers at the limit; none of them where they are more than half of several."""
        names = frozenset(name for name, count in self.unanswered.items() if count >= self.limit)
        return frozenset() if len(self.unanswered) > 1 and 2 * len(names) > len(self.unanswered) else names
