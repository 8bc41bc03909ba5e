"""What a call costs, in nanoseconds: the best of several rounds, against a cluster that runs.

    python3 bench_route.py kv 127.0.0.1:7400
"""

from __future__ import annotations

import sys
import timeit

import mandoline


def main(job: str, assigner: str) -> None:
    clerk = mandoline.Clerk(job, [assigner])
    print("as of", clerk.ready(timeout=10))
    key, text, place = b"0123456789abcdef", "0123456789abcdef", mandoline.slice_key(b"0123456789abcdef")
    route, route_at, slice_key = clerk.route, clerk.route_at, mandoline.slice_key

    class Nothing:
        """A method that does nothing, for comparison."""

        def route(self, key: bytes) -> None:
            return None

    nothing = Nothing().route
    for name, call in {
        "a Python method that does nothing": lambda: nothing(key),
        "slice_key(bytes)": lambda: slice_key(key),
        "clerk.route(bytes)": lambda: route(key),
        "clerk.route(str)": lambda: route(text),
        "clerk.route_at(int)": lambda: route_at(place),
        "clerk.route(bytes).address": lambda: route(key).address,
    }.items():
        count = 200_000
        # The lambda's own call is taken off.
        empty = min(timeit.repeat(lambda: None, number=count, repeat=7))
        best = min(timeit.repeat(call, number=count, repeat=7))
        print(f"{name:36} {1e9 * (best - empty) / count:6.0f} ns")


if __name__ == "__main__":
    main(*sys.argv[1:])
