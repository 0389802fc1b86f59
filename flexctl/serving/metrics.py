"""What the server counts, as Prometheus reads it. Numbers alone: no text, no key, no address."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class _Histogram:
    def __init__(self) -> None:
        self.sum = 0.0
        self.counts = [0] * (len(_SECONDS) + 1)

    def observe(self, seconds: float) -> None:
        self.sum += seconds
        self.counts[bisect_left(_SECONDS, seconds)] += 1


class Metrics:
    """Counts what happens. Used from one thread alone, that of the web application."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._left_out: Counter[str] = Counter()
        self._first_token, self._duration = _Histogram(), _Histogram()

    @property
    def requests(self) -> int:
        """How many requests were answered or refused."""
        return sum(self._requests.values())

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self._requests[endpoint, status] += 1
        self._duration.observe(seconds)

    def began(self, seconds: float) -> None:
        """Count the time from a request to its first token."""
        self._first_token.observe(seconds)

    def left_out(self, experts: Sequence[str]) -> None:
        """Count the experts that may not answer a request."""
        self._left_out.update(experts)

    def text(self, now: Mapping[str, tuple[str, float]]) -> str:
        """Return all of it in Prometheus' text format.

        Args:
            now: Name -> type ("counter", "gauge") and value of what others count.
        """
        return "".join(f"{line}\n" for line in self._lines(now))

    def _lines(self, now: Mapping[str, tuple[str, float]]) -> Iterator[str]:
        for name, (kind, value) in now.items():
            yield f"# TYPE flexctl_{name} {kind}"
            yield f"flexctl_{name} {value:g}"
        yield "# TYPE flexctl_requests_total counter"
        for (endpoint, status), count in sorted(self._requests.items()):
            yield f'flexctl_requests_total{{endpoint="{endpoint}",status="{status}"}} {count}'
        yield "# TYPE flexctl_left_out_total counter"
        for expert, count in sorted(self._left_out.items()):
            yield f'flexctl_left_out_total{{expert="{expert}"}} {count}'
        yield from _histogram("flexctl_time_to_first_token_seconds", self._first_token)
        yield from _histogram("flexctl_request_seconds", self._duration)


def _histogram(name: str, histogram: _Histogram) -> Iterator[str]:
    yield f"# TYPE {name} histogram"
    total = 0
    for bound, count in zip((*map(str, _SECONDS), "+Inf"), histogram.counts, strict=True):
        total += count
        yield f'{name}_bucket{{le="{bound}"}} {total}'
    yield f"{name}_sum {histogram.sum:g}"
    yield f"{name}_count {total}"
