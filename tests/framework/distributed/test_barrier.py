import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from jax._src.lib import _jax
from processes import free_port

from shampax.framework.distributed import barrier

COUNT = 3


@pytest.fixture
def processes(monkeypatch):
    """Return a function that runs `work(index, barriers)` in threads that stand for processes with one real store."""
    address, me = f"127.0.0.1:{free_port()}", threading.local()
    service = _jax.get_distributed_runtime_service(address, COUNT)
    clients = [_jax.get_distributed_runtime_client(address, index) for index in range(COUNT)]
    monkeypatch.setattr(barrier, "_store", lambda: clients[me.index])
    monkeypatch.setattr(jax, "process_index", lambda: me.index)
    monkeypatch.setattr(jax, "process_count", lambda: COUNT)
    with ThreadPoolExecutor(COUNT) as pool:
        list(pool.map(lambda client: client.connect(), clients))
        barriers = [barrier.Barriers() for _ in range(COUNT)]
        for each in barriers:
            each._numbers = iter(range(1, 100))  # as in separate processes

        def run(work):
            def of(index):
                me.index = index
                try:
                    return work(index, barriers[index])
                except OSError as error:
                    return str(error)

            return list(pool.map(of, range(COUNT)))

        yield run
        list(pool.map(lambda client: client.shutdown(), clients))
    service.shutdown()


@pytest.mark.parametrize("bad", range(COUNT))
@pytest.mark.parametrize("passed", [0, 1])
def test_a_process_that_fails_ends_the_barrier_of_all(processes, bad, passed):
    """Faults: the others wait; they take the failure for that of another task; a task after it fails, too."""

    def fails(index, barriers):
        barriers.begin()
        for _ in range(passed):
            barriers.wait(60)
        if index == bad:
            return barriers.fail("disk full")
        barriers.wait(60)

    reason = f"process {bad}: disk full"
    assert processes(fails) == [None if index == bad else reason for index in range(COUNT)]

    def passes(index, barriers):
        barriers.begin()
        barriers.wait(60)
        barriers.wait(60)

    assert processes(passes) == [None] * COUNT
    assert processes(fails) == [None if index == bad else reason for index in range(COUNT)]


def test_barriers_leave_nothing_in_the_store(processes):
    """Fault: the memory of process 0 grows with every save."""

    settled = threading.Barrier(COUNT)

    def wait(index, barriers):
        for _ in range(20):
            settled.wait(60)
            barriers.begin()
            barriers.wait(60)
            barriers.wait(60)
        return len(barrier._store().key_value_dir_get("shampax/"))

    assert max(processes(wait)) <= 4 * COUNT


def test_a_barrier_waits_for_all(processes):
    """Fault: a process passes before the last one has come."""
    come = []

    def wait(index, barriers):
        barriers.begin()
        if index == 1:
            threading.Event().wait(0.1)
            come.append(index)
        barriers.wait(60)
        return list(come)

    assert processes(wait) == [[1]] * COUNT


def test_a_missing_process_ends_the_wait_in_time(processes):
    def wait(index, barriers):
        barriers.begin()
        if index == 1:
            return "away"
        try:
            barriers.wait(0.2)
        except jax.errors.JaxRuntimeError as error:
            return "DEADLINE_EXCEEDED" in str(error)

    assert processes(wait) == [True, "away", True]
