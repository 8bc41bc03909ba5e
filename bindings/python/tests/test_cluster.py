"""Clerks and slicelets of this Python process, against a real cluster."""

from __future__ import annotations

import asyncio
import bisect
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from typing import Any, Callable, Optional

import mandoline
from mandoline import Clerk, Generation, Slice, Slicelet, aio, slice_key

from cluster import REPOSITORY, Cluster, binary, until

#: How many keys Rust and Python are asked for.
KEYS = int(os.environ.get("MANDOLINE_PYTHON_KEYS", 1_000_000))


class Cases(unittest.TestCase):
    """What all have: a cluster for each class, and clerks of it."""

    cluster: Cluster

    @classmethod
    def setUpClass(cls) -> None:
        cls.cluster = Cluster()
        cls.addClassCleanup(cls.cluster.close)

    def clerk(self, job: str, **more: Any) -> Clerk:
        return Clerk(job, [self.cluster.assigner], **more)

    def slicelet(self, job: str, task: str, port: int, **more: Any) -> Slicelet:
        return Slicelet(job, task, f"127.0.0.1:{port}", [self.cluster.assigner], **more)

    def pair(self, job: str, **more: Any) -> tuple[Slicelet, Slicelet]:
        """Two tasks that both serve, at ports 1 and 2."""
        pair = (self.slicelet(job, "a", 1, **more), self.slicelet(job, "b", 2, **more))
        for task in pair:
            task.ready(timeout=60)
        newest = Generation.parse(self.cluster.serve(job, {"a", "b"})["generation"])
        until("both to know", lambda: all(task.owned and task.generation >= newest for task in pair))
        return pair

    def alone(self, task: Slicelet) -> Slicelet:
        """Waits until a task owns all: it is ready a moment before."""
        task.ready(timeout=60)
        until("the task to own all", lambda: task.owns("x"))
        return task

    def key_of(self, task: Slicelet) -> str:
        return next(key for key in map(str, range(1_000)) if task.owns(key))


class Answers(Cases):
    def test_python_gives_the_same_answers_as_rust(self) -> None:
        job, tasks = "same", {f"t{n}" for n in range(3)}
        self.cluster.make_job(job)
        for task in sorted(tasks):
            self.cluster.demo_task(job, task)
        self.cluster.serve(job, tasks)
        # More slices than tasks.
        pins = {f"{n:x}1{'0' * 14}": f"t{n % 3}" for n in range(16)}
        for first, task in pins.items():
            self.cluster.run("assignment", "pin", job, f"{first}..{first[:2]}{'f' * 14}", task)

        def in_force() -> bool:
            tasks = {one["slice"][:16]: one["replicas"][0]["task"] for one in self.cluster.shown(job)["slices"]}
            return all(tasks.get(first) == task for first, task in pins.items())

        until("the pins to be in force", in_force)
        self.cluster.run("assignment", "freeze", job)

        chance = random.Random(7)
        keys = [chance.randbytes(chance.randrange(1, 40)) for _ in range(KEYS)]
        sent = b"".join(len(key).to_bytes(2, "little") + key for key in keys)
        owners = binary("MANDOLINE_OWNERS", "examples/owners")
        clerk = self.clerk(job)
        # A round that was under way may still change something: then all are asked once more.
        for _ in range(5):
            shown = self.cluster.shown(job)
            generation = clerk.wait_for(shown["generation"], timeout=60)
            rust = subprocess.run([owners, job, self.cluster.assigner], input=sent, capture_output=True)
            self.assertEqual(rust.returncode, 0, rust.stderr.decode())
            as_of, *told = rust.stdout.decode().split()
            python = [clerk.route(key).address for key in keys]
            if {as_of, shown["generation"], str(generation)} == {str(clerk.generation)}:
                break
        else:
            self.fail("the assignment never stood still")
        self.assertEqual((len(told), len(set(told))), (len(keys), 3))
        self.assertTrue(python == told)

        # And what an operator is shown.
        firsts = [slice["slice"][:16] for slice in shown["slices"]]
        for key in keys[:10_000]:
            slice = shown["slices"][bisect.bisect(firsts, f"{slice_key(key):016x}") - 1]
            self.assertEqual(clerk.route(key).task, slice["replicas"][0]["task"])

    def test_a_target_says_where_and_as_of_when(self) -> None:
        self.cluster.make_job("one")
        more = {"labels": {"zone": "z"}, "revision": "v2", "capacity": 2.0}
        task = self.alone(self.slicelet("one", "a", 9, **more))
        clerk = self.clerk("one")
        generation = clerk.wait_for(task.generation, timeout=60)
        target = clerk.route("user-1")
        self.assertEqual((target.address, target.task), ("127.0.0.1:9", "a"))
        self.assertEqual((target.labels, target.is_spilled), ({"zone": "z"}, False))
        self.assertEqual(target.generation, generation)
        self.assertEqual(clerk.route_at(slice_key("user-1")).task, "a")
        until("the clerk to be told", lambda: clerk.state.state == "live")
        self.assertEqual((clerk.job, task.state.state), ("one", "attached"))
        self.assertGreater(task.shutdown(), 0, "nobody was there to take its slices")
        self.assertEqual(task.state.state, "stopped")
        with self.assertRaisesRegex(mandoline.NotReady, "shut down"):
            task.ready()


class Tasks(Cases):
    def test_who_does_not_own_a_key_says_who_does(self) -> None:
        self.cluster.make_job("two")
        a, b = self.pair("two")
        key = self.key_of(a)
        a.claim(key)
        a.claim(key, cost=2.5)
        a.count(key, 1.5)
        self.assertFalse(b.owns(key))
        calls: list[Callable[[str], Any]] = [b.claim, b.acquire]
        for call in calls:
            with self.assertRaises(mandoline.NotOwner) as raised:
                call(key)
            self.assertEqual(raised.exception.owner, "127.0.0.1:1")
            self.assertEqual(raised.exception.generation, b.generation)
            self.assertIn("does not own the key: 127.0.0.1:1 does", str(raised.exception))
        owner = b.owner_of(key)
        self.assertEqual((owner.address, owner.generation), ("127.0.0.1:1", b.generation))
        for cost in [-1, float("nan")]:
            with self.assertRaises(mandoline.ConfigError):
                a.claim(key, cost)
        self.assertEqual(a.shutdown(), 0, "the other one took all")
        until("the other to own it", lambda: b.owns(key))

    def test_what_comes_and_goes_is_told(self) -> None:
        self.cluster.make_job("told")
        came: list[Slice] = []
        went: list[Slice] = []
        a = self.alone(self.slicelet("told", "a", 1, on_added=came.extend, on_removed=went.extend))
        self.assertEqual([str(slice) for slice in came], [f"{'0' * 16}..{'f' * 16}"])
        self.assertTrue(slice_key("x") in came[0])
        self.assertEqual((came[0].first, came[0].last), (0, 2**64 - 1))
        b = self.slicelet("told", "b", 2)
        until("something to go", lambda: went and b.owned)
        self.assertTrue(a.owned)

    def test_what_a_callback_raises_is_printed_and_costs_nothing(self) -> None:
        self.cluster.make_job("odd")
        raised: list[Any] = []
        before, sys.unraisablehook = sys.unraisablehook, raised.append
        self.addCleanup(setattr, sys, "unraisablehook", before)

        def fail(slices: list[Slice]) -> None:
            raise LookupError("no such file")

        self.alone(self.slicelet("odd", "a", 1, on_added=fail))
        self.assertEqual(str(raised[0].exc_value), "no such file")


class Exclusive(Cases):
    def test_a_key_is_owned_by_one_and_its_token_grows(self) -> None:
        self.cluster.make_job("own", "consistency: exclusive\nheartbeat: 1s\nlease: 10s\n")
        a, b = self.pair("own")
        key = self.key_of(a)
        with a.acquire(key) as guard:
            self.assertTrue(guard.still_owned())
            first = guard.fencing_token
            place = f"{slice_key(key):016x}"
            self.cluster.run("assignment", "pin", "own", f"{place}..{place}", "b")

            def moving() -> Optional[mandoline.InTransit]:
                try:
                    a.acquire(key).release()
                except mandoline.InTransit as error:
                    return error
                return None

            in_transit = until("the slice to be released", moving)
            self.assertRegex(in_transit.hand_off, rf"^\d+\.\d+/{place}$")
            self.assertTrue(guard.still_owned(), "a hand-off waits for the guards that were given")
            self.assertFalse(b.owns(key))
        self.assertFalse(guard.still_owned())
        until("the other to own it", lambda: b.owns(key))
        with b.acquire(key) as guard:
            self.assertGreater(guard.fencing_token, first)
            self.assertGreater(guard.fencing_token.to_bytes(), first.to_bytes())
        moved = self.clerk("own").wait_moved(key, in_transit.generation, timeout=60)
        self.assertEqual(moved.task, "b")

    def test_a_guard_is_lost_with_its_lease(self) -> None:
        cluster = Cluster()
        self.addCleanup(cluster.close)
        cluster.make_job("lease", "consistency: exclusive\nheartbeat: 500ms\nlease: 2s\n")
        task = self.alone(Slicelet("lease", "a", "127.0.0.1:1", [cluster.assigner]))
        guard = task.acquire("x")
        with self.assertRaises(TimeoutError):
            mandoline.lost(guard, timeout=0.01)
        cluster.node.kill()
        mandoline.lost(guard, timeout=60)
        self.assertFalse(guard.still_owned())
        with self.assertRaises(mandoline.NotOwner):
            task.acquire("x")


class Access(unittest.TestCase):
    def test_a_cluster_asks_for_its_token_over_tls(self) -> None:
        folder = REPOSITORY / "tests/it/tls"
        authority, certificate, key = (str(folder / name) for name in ["authority.pem", "node.pem", "node.key"])
        token = "0123456789abcdef0123456789abcdef"
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(token)
            file.flush()
            caller = ["--tls-ca", authority, "--token-file", file.name]
            cluster = Cluster(["--tls-cert", certificate, "--tls-key", key, *caller], caller)
            self.addCleanup(cluster.close)
            cluster.make_job("kv")
            ca = Path(authority).read_bytes()
            task = Slicelet("kv", "a", "127.0.0.1:1", [cluster.assigner], token=token, ca=ca)
            task.ready(timeout=60)
            clerk = Clerk("kv", [cluster.assigner], token=token, ca=ca)
            clerk.wait_for(task.generation, timeout=60)
            stranger = Clerk("kv", [cluster.assigner], token=token[::-1], ca=ca)
            until("a refusal", lambda: "the token is not this cluster's" in str(stranger.state.why))
            with self.assertRaisesRegex(mandoline.TimedOut, "the token is not this cluster's"):
                stranger.ready(timeout=0.1)


class Outage(Cases):
    def test_callers_go_on_without_the_cluster(self) -> None:
        cluster = Cluster()
        self.addCleanup(cluster.close)
        cluster.make_job("gone")
        task = self.alone(Slicelet("gone", "a", "127.0.0.1:1", [cluster.assigner]))
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "assignment"
            clerk = Clerk("gone", [cluster.assigner], cache=cache)
            generation = clerk.wait_for(task.generation, timeout=60)
            until("the cache to be written", cache.exists)
            cluster.node.kill()
            until("the clerk to notice", lambda: clerk.state.state == "stale")
            self.assertEqual(clerk.route("x").task, "a")
            self.assertTrue(task.owns("x"))
            # One that starts now knows what was last known.
            late = Clerk("gone", [cluster.assigner], cache=str(cache))
            self.assertEqual(late.ready(timeout=60), generation)
            self.assertEqual(late.route("x").task, "a")
            cluster.start_node()
            until("the clerk to be told again", lambda: clerk.state.state == "live")


class Waiting(Cases):
    def test_other_threads_run_while_one_waits(self) -> None:
        clerk, ticks, over = self.clerk("none"), 0, threading.Event()

        def tick() -> None:
            nonlocal ticks
            while not over.is_set():
                ticks += 1

        ticking = threading.Thread(target=tick)
        ticking.start()
        with self.assertRaises(mandoline.TimedOut):
            clerk.wait_for("1.5", timeout=0.3)
        over.set()
        ticking.join()
        self.assertGreater(ticks, 1_000)

    def test_ctrl_c_is_heard(self) -> None:
        clerk = self.clerk("none")
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with self.assertRaises(KeyboardInterrupt):
            clerk.ready()

    def test_a_process_that_was_forked_off_is_told_to_start_anew(self) -> None:
        program = (
            "import os, mandoline\n"
            "clerk = mandoline.Clerk('kv', ['127.0.0.1:1'])\n"
            "try: clerk.ready(timeout=0)\n"
            "except mandoline.TimedOut: pass\n"
            "if os.fork() == 0:\n"
            "    try: clerk.ready(timeout=0)\n"
            "    except RuntimeError as error: os._exit(7 if 'forked off' in str(error) else 1)\n"
            "    os._exit(2)\n"
            "os._exit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
        )
        ended = subprocess.run([sys.executable, "-c", program], timeout=60)
        self.assertEqual(ended.returncode, 7)


class Asyncio(Cases):
    def test_coroutines_wait_and_tasks_leave_in_good_order(self) -> None:
        self.cluster.make_job("aio")
        where = [self.cluster.assigner]

        async def scene() -> None:
            clerk = aio.Clerk("aio", where)
            async with aio.Slicelet("aio", "a", "127.0.0.1:1", where, grace=0.1) as task:
                # All at once, on one thread.
                waits = [clerk.ready(timeout=60) for _ in range(100)]
                await asyncio.gather(task.ready(timeout=60), *waits)
                # It is ready a moment before it is given anything.
                await asyncio.to_thread(until, "the task to own all", lambda: task.owns("x"))
                await clerk.wait_for(task.generation, timeout=60)
                self.assertEqual(clerk.route("x").address, "127.0.0.1:1")
                self.assertEqual(task.state.state, "attached")
                guard = task.acquire("x")
                losing = asyncio.create_task(aio.lost(guard))
                with self.assertRaises(TimeoutError):
                    await aio.lost(guard, timeout=0.01)
                guard.release()
                await asyncio.wait_for(losing, 60)
            self.assertEqual(task.state.state, "stopped")

        asyncio.run(scene())

    def test_who_is_cancelled_waits_no_longer(self) -> None:
        async def scene() -> None:
            clerk = aio.Clerk("none", [self.cluster.assigner])
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(clerk.ready(), 0.01)
            with self.assertRaises(mandoline.TimedOut):
                await clerk.wait_for("1.5", timeout=0.01)
            with self.assertRaises(mandoline.ConfigError):
                await clerk.wait_for("1.5", timeout=-1)

        asyncio.run(scene())


if __name__ == "__main__":
    unittest.main()
