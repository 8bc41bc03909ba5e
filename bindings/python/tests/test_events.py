"""A client as docs/protocol.md, section 7, has it written: nothing but the standard library, and the hash."""

from __future__ import annotations

import bisect
import http.client
import json
import random
import unittest
from typing import Any, Iterator

import mandoline
from mandoline import Generation, slice_key

from cluster import PATIENCE, Cluster, until


class Events:
    """Who serves what, by server-sent events."""

    def __init__(self, assigner: str, job: str) -> None:
        self._connection = http.client.HTTPConnection(assigner, timeout=PATIENCE)
        self._connection.request("GET", f"/api/v1/jobs/{job}/watch")
        self._stream = self._connection.getresponse()
        kind = self._stream.getheader("content-type")
        assert kind == "text/event-stream", (self._stream.status, kind)
        self.generation = Generation(0, 0)
        self._tasks: dict[int, str] = {}
        #: Where slices begin, in order, and who serves each.
        self._firsts: list[int] = []
        self._sessions: list[list[int]] = []

    def _events(self) -> Iterator[tuple[str, Any]]:
        name, data = "", []
        for line in self._stream:
            text = line.decode().rstrip("\r\n")
            field, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif not text and data:
                yield name, json.loads("\n".join(data))
                name, data = "", []

    def follow(self, wanted: Generation) -> None:
        """Takes in what comes until that generation is known."""
        for name, event in self._events():
            if name == "full":
                self._tasks, self._firsts, self._sessions = {}, [0], [[]]
            self._tasks.update((task["session"], task["address"]) for task in event["tasks"])
            for gone in event.get("gone", []):
                del self._tasks[gone]
            for slice in event["slices"]:
                first, last = (int(end, 16) for end in slice["slice"].split(".."))
                self._set(first, last, [replica["session"] for replica in slice["replicas"]])
            self.generation = Generation.parse(event["generation"])
            if self.generation >= wanted:
                return

    def _set(self, first: int, last: int, sessions: list[int]) -> None:
        begins, ends = bisect.bisect_left(self._firsts, first), bisect.bisect(self._firsts, last)
        firsts, set_to = [first], [sessions]
        if last < 2**64 - 1 and self._firsts[ends : ends + 1] != [last + 1]:
            firsts.append(last + 1)
            set_to.append(self._sessions[ends - 1])
        self._firsts[begins:ends], self._sessions[begins:ends] = firsts, set_to

    def route(self, key: bytes) -> str:
        """Gives the address of a task that serves a key."""
        sessions = self._sessions[bisect.bisect(self._firsts, slice_key(key)) - 1]
        return self._tasks[sessions[0]]

    def close(self) -> None:
        self._connection.close()


class AnotherLanguage(unittest.TestCase):
    def test_a_client_by_the_page_gives_the_same_answers(self) -> None:
        cluster = Cluster()
        self.addCleanup(cluster.close)
        cluster.make_job("kv")
        events = Events(cluster.assigner, "kv")
        self.addCleanup(events.close)
        for task in ["a", "b"]:
            cluster.demo_task("kv", task)
        cluster.serve("kv", {"a", "b"})
        for n in range(8):
            cluster.run("assignment", "pin", "kv", f"{n:x}7{'0' * 14}..{n:x}7{'f' * 14}", "ab"[n % 2])

        def in_force() -> bool:
            slices = {one["slice"][:2]: one["replicas"][0]["task"] for one in cluster.shown("kv")["slices"]}
            return all(slices.get(f"{n:x}7") == "ab"[n % 2] for n in range(8))

        until("the pins to be in force", in_force)
        clerk = mandoline.Clerk("kv", [cluster.assigner])
        clerk.ready(timeout=PATIENCE)
        # Whoever is behind catches up, until both speak of the same generation.
        events.follow(clerk.wait_for(cluster.shown("kv")["generation"], timeout=PATIENCE))
        clerk.wait_for(events.generation, timeout=PATIENCE)
        chance = random.Random(11)
        for _ in range(20_000):
            key = chance.randbytes(12)
            target = clerk.route(key)
            if target.generation > events.generation:
                events.follow(target.generation)
            if target.generation == events.generation:
                self.assertEqual(events.route(key), target.address)
        self.assertEqual(clerk.generation, events.generation)


if __name__ == "__main__":
    unittest.main()
