"""A request's clock: the moments that the shell notes, and metrics from them. The core has no clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from folo.state.evolve import evolve


@dataclass(frozen=True)
class Clock:
    """Moments of a request in seconds of time.perf_counter; `arrival` in seconds since the epoch."""

    arrival: float = field(default_factory=time.time)
    submitted: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first: float | None = None
    last: float | None = None
    num_tokens: int = 0

    def admit(self, now: float) -> Clock:
        """The first step that computes the request begins; later admissions change nothing."""
        return self if self.admitted is not None else evolve(self, admitted=now)

    def token(self, now: float) -> Clock:
        """A step that sampled one of its tokens has ended."""
        first = now if self.first is None else self.first
        return evolve(self, first=first, last=now, num_tokens=self.num_tokens + 1)

    def metrics(self, num_samples: int = 1) -> dict[str, float]:
        """What is known so far: seconds, and tokens a second for `throughput`.

        arrival; queue_time, from submission to the first step that computes the request; ttft, time
        to first token; tpot, time per output token of one sample after the first; throughput, output
        tokens of all samples over the time since submission.
        """
        known = {"arrival": self.arrival}
        if self.admitted is not None:
            known["queue_time"] = self.admitted - self.submitted
        if self.first is not None and self.last is not None:
            known["ttft"] = self.first - self.submitted
            later = self.num_tokens / num_samples - 1
            known["tpot"] = (self.last - self.first) / later if later > 0 else 0.0
            known["throughput"] = self.num_tokens / (self.last - self.submitted)
        return known
