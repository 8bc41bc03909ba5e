"""Where keys land, and the values that go with them: no cluster needed."""

from __future__ import annotations

import copy
import json
import pickle
import unittest
from typing import Any, Callable, Union

import mandoline
from mandoline import Generation, grouped_slice_key, slice_key

from cluster import REPOSITORY


class Keys(unittest.TestCase):
    def test_keys_land_where_the_vectors_say(self) -> None:
        vectors = json.loads((REPOSITORY / "docs/key-vectors.json").read_text())
        self.assertGreater(len(vectors["keys"]), 40)
        for vector in vectors["keys"]:
            key = bytes.fromhex(vector["key"])
            self.assertEqual(f"{slice_key(key):016x}", vector["slice_key"], key)
        for vector in vectors["grouped"]:
            group, member = bytes.fromhex(vector["group"]), bytes.fromhex(vector["member"])
            self.assertEqual(f"{grouped_slice_key(group, member):016x}", vector["slice_key"])

    def test_a_text_is_its_utf_8(self) -> None:
        for text in ["", "a", "Ω/π", "a\0b"]:
            self.assertEqual(slice_key(text), slice_key(text.encode()))

    def test_what_is_no_key_is_refused(self) -> None:
        for odd in [None, 7, 1.5, ["a"], bytearray(b"a"), memoryview(b"a")]:
            with self.assertRaisesRegex(TypeError, "a key is bytes or str, and not "):
                slice_key(odd)  # type: ignore[arg-type]
        with self.assertRaises(UnicodeEncodeError):
            slice_key("\ud800")


class Generations(unittest.TestCase):
    def test_generations_sort_and_come_back(self) -> None:
        one, two, three = Generation(1, 9), Generation(1, 10), Generation(2, 0)
        self.assertEqual(sorted([three, two, one]), [one, two, three])
        self.assertEqual(len({one, two, Generation.parse("1.9")}), 2)
        self.assertEqual((str(two), repr(two)), ("1.10", "Generation(1, 10)"))
        self.assertEqual((two.incarnation, two.number), (1, 10))
        self.assertEqual(two.to_bytes(), bytes(7) + b"\1" + bytes(7) + b"\n")
        self.assertLess(two.to_bytes(), three.to_bytes())
        self.assertEqual(pickle.loads(pickle.dumps(one)), one)
        for bad in ["", "1", "1.", "-1.2", "1.2.3"]:
            with self.assertRaisesRegex(ValueError, "is no generation"):
                Generation.parse(bad)

    def test_exceptions_can_be_copied(self) -> None:
        raised: list[Union[mandoline.NotOwner, mandoline.NoTask]] = [
            mandoline.NotOwner("no", "h:1", Generation(1, 2)),
            mandoline.InTransit("no", "1.2/0000000000000000", Generation(1, 2)),
            mandoline.NoLease("no", Generation(1, 2)),
            mandoline.NoTask("no", Generation(1, 2)),
        ]
        for error in raised:
            again = copy.copy(error)
            self.assertEqual((type(again), str(again)), (type(error), "no"))
            self.assertEqual(again.generation, Generation(1, 2))


class Beginnings(unittest.TestCase):
    def test_what_cannot_be_started_says_why(self) -> None:
        cases: list[tuple[Callable[[], Any], str]] = [
            (lambda: mandoline.Clerk("", ["h:1"]), "the name is empty"),
            (lambda: mandoline.Clerk("kv", ["h"]), '"h" is no address'),
            (lambda: mandoline.Clerk("kv", []), "source"),
            (lambda: mandoline.Clerk("kv", ["h:1"], token="a\nb"), "token"),
            (lambda: mandoline.Slicelet("k v", "a", "h:1", ["h:2"]), "job"),
            (lambda: mandoline.Slicelet("kv", "a", "h", ["h:2"]), "the task's address"),
            (lambda: mandoline.Slicelet("kv", "a", "h:1", []), "no assigner is given"),
            (lambda: mandoline.Slicelet("kv", "a", "h:1", ["h:2"], capacity=0), "capacity"),
            (lambda: mandoline.Slicelet("kv", "a", "h:1", ["h:2"], grace=-1), "length of time"),
        ]
        for make, says in cases:
            with self.assertRaisesRegex(mandoline.ConfigError, says):
                make()

    def test_a_clerk_that_knows_nothing_says_so(self) -> None:
        clerk = mandoline.Clerk("kv", ["127.0.0.1:1"])
        with self.assertRaisesRegex(mandoline.NoTask, "no assignment is known yet") as raised:
            clerk.route("a")
        self.assertIsNone(raised.exception.generation)
        with self.assertRaisesRegex(TimeoutError, "no assignment came in time"):
            clerk.ready(timeout=0.05)
        self.assertEqual(clerk.state.state, "empty")
        self.assertIsNone(clerk.generation)
        for bad in [-1, float("nan"), float("inf")]:
            with self.assertRaises(ValueError):
                clerk.ready(timeout=bad)


if __name__ == "__main__":
    unittest.main()
