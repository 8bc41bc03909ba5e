"""The same owner for a key, whoever is asked: proxy, stub and application by `mandoline bench same`, and then this process."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
import unittest
from pathlib import Path
from typing import Iterator

from mandoline import Clerk, Generation, grouped_slice_key, slice_key

from cluster import PATIENCE, binary

#: How many keys everyone is asked for.
KEYS = int(os.environ.get("MANDOLINE_PYTHON_KEYS", 1_000_000))

#: Instead of the length of a group: the key has none.
ALONE = 0xFFFF


def slice_keys(kept: bytes) -> Iterator[tuple[bytes, int]]:
    """Where each key that the bench has left lands, and the key itself if it is in no group."""
    at = 0
    while at < len(kept):
        of_group, of_key = struct.unpack_from("<HH", kept, at)
        at += 4
        group = None if of_group == ALONE else kept[at : at + of_group]
        at += len(group or b"")
        key = kept[at : at + of_key]
        at += of_key
        yield (key, slice_key(key)) if group is None else (b"", grouped_slice_key(group, key))


class Everyone(unittest.TestCase):
    def test_everyone_gives_the_same_owner(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.ask(Path(directory))

    def ask(self, directory: Path) -> None:
        command = ["bench", "same", "--keys", str(KEYS), "--write", str(directory), "--json"]
        done = subprocess.run(
            [binary("MANDOLINE_BIN", "mandoline"), *command], capture_output=True, text=True, timeout=5 * PATIENCE
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        found = json.loads(done.stdout)
        self.assertEqual((found["keys"], found["differ_total"]), (KEYS, 0), found)

        # The cluster is gone: what it said last is what everyone was asked by.
        clerk = Clerk("kv", ["127.0.0.1:1"], cache=directory / "assignment")
        self.assertEqual(clerk.generation, Generation.parse(found["generation"]))
        owners = (directory / "owners").read_text().split()
        keys = list(slice_keys((directory / "keys").read_bytes()))
        self.assertEqual((len(keys), len(set(owners))), (len(owners), found["tasks"]))
        self.assertTrue([clerk.route_at(at).address for _, at in keys] == owners)
        plain = [(key, owner) for (key, _), owner in zip(keys, owners) if key]
        self.assertTrue(all(clerk.route(key).address == owner for key, owner in plain))


if __name__ == "__main__":
    unittest.main()
