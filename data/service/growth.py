"""When a pool grows and shrinks by itself: a rule over what trainers report, without clocks or actors of its own."""

from dataclasses import dataclass, field

WINDOW_S = 5.0  # reports of so many seconds decide
GROW_ABOVE = 0.05  # share of the time that some trainer waits
SHRINK_BELOW = 0.01
PATIENCE_S = 60.0  # of quiet before the pool shrinks; doubles each time that shrinking proved wrong


@dataclass
class Growth:
    """Decides the number of builders between `least` and `most`."""

    least: int
    most: int
    patience_s: float = PATIENCE_S
    share: float | None = None  # of time, of the trainer that waited most in the last window
    _shrunk: bool = False
    _since: float | None = None  # begin of the window
    _quiet_since: float | None = None
    _waited: dict[int, float] = field(default_factory=dict)
    _seconds: dict[int, float] = field(default_factory=dict)

    def add(self, rank: int, seconds: float, waited_s: float) -> None:
        """A data rank's report."""
        if seconds <= 0:
            return
        self._seconds[rank] = self._seconds.get(rank, 0.0) + seconds
        self._waited[rank] = self._waited.get(rank, 0.0) + waited_s

    def decide(self, now: float, builders: int, settled: bool) -> int:
        """How many builders there should be. `settled`: all that there should be are there and have built something."""
        if not settled or self._since is None:
            self._begin(now)
            self._quiet_since = None
            return builders
        if now - self._since < WINDOW_S or not self._seconds:
            return builders
        share = max(self._waited[rank] / seconds for rank, seconds in self._seconds.items())
        self.share = share
        self._begin(now)
        if share > SHRINK_BELOW:
            self._quiet_since = None
        elif self._quiet_since is None:
            self._quiet_since = now
        if share > GROW_ABOVE and builders < self.most:
            if self._shrunk:
                self.patience_s, self._shrunk = 2 * self.patience_s, False
            return builders + 1
        if self._quiet_since is not None and now - self._quiet_since >= self.patience_s and builders > self.least:
            self._shrunk, self._quiet_since = True, now
            return builders - 1
        return builders

    def _begin(self, now: float) -> None:
        self._since = now
        self._waited.clear()
        self._seconds.clear()
