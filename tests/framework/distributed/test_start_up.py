"""Test runs that cannot start: all processes exit in time, with one line that explains why, and an exit code."""

import contextlib
import pathlib
import socket
import sys
import time

import pytest
from processes import Job, script

CONFIG = pathlib.Path(__file__).parents[2] / "support" / "toys" / "toy_many.py"


def train(workdir, of_process_1):
    """Start the real command in two processes; the second has an additional flag."""
    program = f"""
import os, sys
from shampax.launch.train import main
more = ["{of_process_1}"] if os.environ["JAX_PROCESS_ID"] == "1" else []
sys.exit(main([*sys.argv[1:], *more]))
"""
    command = [sys.executable, "-c", program, f"--config={CONFIG}", f"--workdir={workdir}"]
    return Job(command, processes=2, devices=1)


def codes(ended):
    return [each.code for each in ended]


def test_another_config_in_one_process_is_named_by_its_key(tmp_path):
    """Faults: the programs hang; they train different things."""
    with train(tmp_path / "work", "--config.schedule.learning_rate=0.5") as job:
        ended = job.wait()
    assert codes(ended) == [2, 2]
    for each in ended:
        assert each.err == (
            "error: process 1 differs from process 0 in config.schedule.learning_rate (0.5, and 0.001 in process 0). "
            "Give all processes of a run the same config, workdir and code.\n"
        )
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_processes_that_do_not_connect_in_time_are_named():
    """Faults: a foreign connection counts as a process; the missing processes are not named."""
    text = """
        import socket
        group = Group(place)
        if place.index == 1:
            time.sleep(0.5)
            for words in (b"GET / HTTP/1.1\\r\\n\\r\\n", b"[]\\n", b"\\xff\\n"):
                socket.create_connection((place.host, place.port)).sendall(words)
        while not group._come or (place.index == 0 and 1 not in group._identities):
            time.sleep(0.01)
        group.join({}, waiting_seconds=4, death_seconds=5)
    """
    with script(text, processes=2, JAX_NUM_PROCESSES="4") as job:
        ended = job.wait()
    assert codes(ended) == [75, 75]
    for each in ended:
        assert each.err.startswith("error: 2 of 4 processes have not connected to 127.0.0.1:")
        assert "and sent their config within 4 s: 2, 3. " in each.err
        assert each.err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_of_the_same_index_are_refused():
    text = """
        Group(place._replace(index=min(place.index, 1)))
        time.sleep(600)
    """
    with script(text, processes=3, JAX_NUM_PROCESSES="3") as job:
        ended = job.wait()
    assert codes(ended) == [2, 2, 2], ended
    assert all(
        "error: process 1 of 3 cannot join this run of 3 processes. JAX_NUM_PROCESSES must be" in each.err
        for each in ended
    )


@pytest.mark.slow
def test_another_number_of_processes_in_one_is_refused():
    text = """
        group = Group(place._replace(count=2 + place.index))
        group.join({}, waiting_seconds=240, death_seconds=5)
    """
    with script(text, processes=2) as job:
        ended = job.wait()
    assert codes(ended) == [2, 2]
    for each in ended:
        assert "error: process 1 of 3 cannot join this run of 2 processes. JAX_NUM_PROCESSES must be" in each.err
        assert each.seconds < 120  # less than their waiting time


@pytest.mark.slow
def test_an_additional_process_does_not_disturb_a_run():
    """Fault: starting a process twice ends a run of days."""
    text = """
        late, working, number = place.index == 2, meeting / "working", meeting / "number"
        if late:
            while not working.exists():
                time.sleep(0.01)
            number.write_text(str(os.getpid()))
        group = Group(place._replace(index=min(place.index, 1), count=2))
        group.join({}, waiting_seconds=120, death_seconds=5)
        working.touch()
        while not number.exists() or pathlib.Path("/proc", number.read_text()).exists():
            time.sleep(0.01)
        group.leave()
    """
    with script(text, processes=3, JAX_NUM_PROCESSES="3") as job:
        ended = job.wait()
    assert codes(ended) == [0, 0, 2], ended
    assert "error: process 1 of 2 cannot join this run of 2 processes. " in ended[2].err


@pytest.mark.slow
def test_a_port_in_use_is_reported_by_process_0_and_the_others_end_in_time():
    """Fault: the others mistake another program at that port for process 0, and wait forever."""
    with contextlib.ExitStack() as stack:
        stranger = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = stranger.getsockname()[1]
        text = """
            try:
                group = Group(place)
            except UserError as error:
                sys.exit(f"error: {error}")
            group.join({}, waiting_seconds=1, death_seconds=5)
        """
        job = stack.enter_context(script(text, processes=2, JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}"))
        ended = job.wait()
    assert f"error: process 0 cannot listen at 127.0.0.1:{port}: Address already in use. If another run" in ended[0].err
    assert ended[1].code == 75
    assert ended[1].err == (
        f"error: process 0 has not answered at 127.0.0.1:{port} within 1 s. See the output of process 0.\n"
    )


@pytest.mark.slow
def test_waiting_for_a_missing_coordinator_ends_in_time():
    text = """
        print(time.time(), flush=True)
        group = Group(place)
        group.join({}, waiting_seconds=1, death_seconds=5)
    """
    with script(text, processes=1, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1") as job:
        start = time.time()
        [ended] = job.wait()
    assert ended.code == 75
    assert ended.err.startswith("error: process 0 has not answered at 127.0.0.1:")
    # 1 s, 5 s in which process 0 would speak first, and 2 s for others to learn of the end; 20 s if it waits too long.
    assert start + ended.seconds - float(ended.out) < 20


@pytest.mark.slow
def test_unreachable_devices_are_detected_before_compilation():
    """Fault: the run hangs in its first step."""
    text = """
        import jax
        from jax.experimental import multihost_utils
        group = Group(place)
        initialize = jax.distributed.initialize
        def connected(*arguments, **options):
            initialize(*arguments, **options)
            # In the first collective, which process 1 does not take part in.
            group._waiting_seconds = (1.0, 600.0)[place.index]
        jax.distributed.initialize = connected
        if place.index == 1:
            multihost_utils.sync_global_devices = lambda name: time.sleep(600)
        group.join({}, waiting_seconds=240, death_seconds=5)
    """
    with script(text, processes=2) as job:
        ended = job.wait()
    assert codes(ended) == [75, 75]
    assert all(
        "error: the first collective over the devices of all 2 processes has not returned in process 0 within 1 s"
        in each.err
        for each in ended
    ), ended


def test_jax_sees_the_devices_of_all_processes():
    """Faults: a process uses the GPUs of another; half of a machine is idle without a word."""
    text = """
        group = Group(place)
        group.join({"config.seed": "0"}, waiting_seconds=30, death_seconds=5)
        import jax, json
        print(json.dumps([jax.process_count(), jax.device_count(), jax.local_device_count()]))
        group.leave()
    """
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", "JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}
    with script(text, processes=2, JAX_NUM_CPU_DEVICES="2", **gpus) as job:
        ended = job.wait()
    assert codes(ended) == [0, 0], ended
    # The library of collectives writes to the same output, so the counts may share a line with its words.
    assert all("[2, 4, 2]" in each.out for each in ended), ended
    assert ["each process has 4 of 8 GPUs of its machine" in each.out for each in ended] == [True, False]
