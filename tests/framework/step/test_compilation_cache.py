import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from toy_runs import arrays, lines, make_config, saved

from shampax.framework.step import compilation_cache
from shampax.framework.train import train

BESIDE = types.SimpleNamespace(folder="beside", gigabytes=1.0)


@pytest.fixture
def without_cache():
    """Turn off the cache of the tests. `hits` counts programs loaded from a cache since then."""
    given = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    jax.clear_caches()
    hits = []

    def count(event, **details):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(count)
    yield hits
    jax.monitoring.unregister_event_listener(count)
    jax.config.update("jax_compilation_cache_dir", given)
    jax_cache.reset_cache()


def compiled():
    """Compile a program that nothing else compiles, or load it."""
    jax.clear_caches()
    return jax.jit(lambda x: jnp.sin(x) @ x + 17)(np.eye(5, dtype=np.float32))


def test_cached_programs_of_tests_are_loaded():
    """Fault: every test run compiles everything (for some CPUs, see jax#38445)."""
    hits = []

    def count(event, **details):
        hits.append(event == "/jax/compilation_cache/cache_hits")

    compiled()
    jax.monitoring.register_event_listener(count)
    try:
        compiled()
    finally:
        jax.monitoring.unregister_event_listener(count)
    assert any(hits), (
        "XLA refuses compiled programs that it has written on this CPU; every run will take as long as a cold one"
    )


@pytest.mark.slow
def test_a_second_start_loads_its_programs_and_has_the_same_bits(without_cache, tmp_path):
    """Faults: nothing is stored or loaded; a loaded program with donated state computes something else."""
    knobs = {"duration": "4 steps", "evaluation.every": "0 steps", "checkpoint.every": "0 steps"}
    for name, folder in (("a/plain", ""), ("b/first", "beside"), ("b/second", "beside")):
        jax.clear_caches()
        before = len(without_cache)
        train(make_config(**knobs, **{"compilation_cache.folder": folder}), tmp_path / name, devices=jax.devices()[:2])
        loaded = len(without_cache) - before
        assert (loaded > 3) == (name == "b/second"), (name, loaded)
    assert not (tmp_path / "a" / "compilation_cache").exists()
    for name in ("b/first", "b/second"):
        assert lines(tmp_path / name) == lines(tmp_path / "a/plain")
        assert saved(tmp_path / name)[-1] == 4
        jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path / name, 4), arrays(tmp_path / "a/plain", 4))
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_recently_used_programs_are_kept_up_to_the_limit(tmp_path):
    """Faults: the folder grows without bound; programs used by every start are deleted because they are old."""
    for age, name in enumerate(["old", "used", "new"]):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + age, 1000 + age))
    os.utime(tmp_path / "used-cache", (5000, 1001))
    compilation_cache.prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new-cache", "used-cache"]
    compilation_cache.prune(tmp_path, 100)
    assert [path.name for path in tmp_path.iterdir()] == ["used-cache"]
    compilation_cache.prune(tmp_path / "missing", 1)


def test_an_unusable_cache_folder_does_not_stop_a_run(without_cache, tmp_path, capsys):
    """Fault: a run fails because of a cache that it does not need."""
    (tmp_path / "compilation_cache").write_text("a file")
    with compilation_cache.kept(tmp_path / "run", BESIDE):
        compiled()
    assert "cannot be used (File exists)" in capsys.readouterr().out
    assert without_cache == []


def test_a_cache_from_the_environment_is_kept(tmp_path):
    """Fault: the cache of a cluster, or of these tests, is replaced."""
    given = jax.config.values["jax_compilation_cache_dir"]
    assert given
    with compilation_cache.kept(tmp_path / "run", BESIDE):
        assert jax.config.values["jax_compilation_cache_dir"] == given
    assert not any(tmp_path.iterdir())
