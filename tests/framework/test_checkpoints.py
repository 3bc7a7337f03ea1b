import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shampax.framework import partitioning
from shampax.framework.checkpoints import (
    Checkpoints,
    Evaluation,
    Origin,
    Record,
    check,
    find_origin,
    restore,
    restore_variables,
)
from shampax.framework.errors import UserError
from shampax.framework.state import TrainState


def make_state(sizes, spec, *, width=8, fill=None):
    """A state on a mesh of its own, and what to restore it as."""
    mesh = partitioning.make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes)
    values = jnp.arange(16 * width, dtype=jnp.float32).reshape(16, width) if fill is None else fill
    params = {"layer": {"w": jax.device_put(values, NamedSharding(mesh, spec))}}
    scalars = [jax.device_put(jnp.int32(7 + i), partitioning.replicated(mesh)) for i in range(4)]
    opt_state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec if leaf.ndim else P())),
        optax.adam(1e-3).init(params),
    )
    state = TrainState(scalars[3], params, opt_state, {"counters": {"batches": scalars[0]}}, scalars[1])
    return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(workdir, state, scores, **options):
    """Save a checkpoint at each step of `scores`; None where there was no evaluation."""
    defaults = {"keep_last": 2, "keep_best": 1, "best_metric": "loss"}
    record = Record()
    with Checkpoints(workdir, **(defaults | options)) as saver:
        for step, score in scores.items():
            record = dataclasses.replace(record, step=step, tokens=100 * step)
            if score is not None:
                record = record.with_evaluation({"loss": score}, "loss")
            saver.save(state, record)
    return record


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_restores_onto_another_mesh_with_every_value_in_its_place(tmp_path):
    state, _ = make_state({"data": 8}, P("data"))
    record = save(tmp_path, state, {3: 1.5})
    other, abstract = make_state({"fsdp": 2, "tensor": 4}, P("tensor", "fsdp"), fill=jnp.zeros((16, 8)))
    origin = find_origin(tmp_path, resume_from="", init_from="")
    assert origin == Origin("own", tmp_path / "checkpoints" / "3")
    restored = restore(origin.path, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, other)
    assert origin.record() == record == Record(3, 0.0, 300, Evaluation(3, {"loss": 1.5}), Evaluation(3, {"loss": 1.5}))


def test_saved_state_is_that_of_the_call_even_if_donated_at_once(tmp_path):
    state, abstract = make_state({"data": 8}, P("data"))
    expected = jax.tree.map(np.array, state)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=1, keep_best=0, best_metric="loss") as saver:
        saver.save(state, Record(step=1))
        spoil(state)
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "checkpoints" / "1", abstract), expected)


def test_keeps_last_and_best(tmp_path):
    state, _ = make_state({"data": 8}, P())
    scores = {1: 3.0, 2: 1.0, 3: None, 4: math.nan, 5: 2.0, 6: 2.5, 7: None}
    save(tmp_path, state, scores, keep_last=2, keep_best=2)
    assert steps(tmp_path) == [2, 5, 6, 7]


def test_best_is_remembered_over_a_resume_and_rubbish_is_removed(tmp_path):
    state, _ = make_state({"data": 8}, P())
    save(tmp_path, state, {1: 1.0, 2: 2.0}, keep_last=1, keep_best=1)
    rubbish = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    (rubbish / "state").mkdir(parents=True)
    assert find_origin(tmp_path, resume_from="", init_from="").path.name == "2"
    save(tmp_path, state, {3: 3.0, 4: None}, keep_last=1, keep_best=1)
    assert steps(tmp_path) == [1, 4]


def test_a_step_already_saved_is_left_alone(tmp_path):
    state, _ = make_state({"data": 8}, P())
    save(tmp_path, state, {5: None})
    save(tmp_path, state, {5: None})
    assert steps(tmp_path) == [5]


def test_origin_own_before_resume_before_init_before_scratch(tmp_path):
    state, _ = make_state({"data": 8}, P())
    own, first, second = tmp_path / "own", tmp_path / "first", tmp_path / "second"
    save(first, state, {1: None, 2: None})
    save(second, state, {9: None})
    assert find_origin(own, resume_from="", init_from="") == Origin("scratch")
    assert find_origin(own, resume_from="", init_from=str(second)) == Origin("init", second / "checkpoints" / "9")
    assert find_origin(own, resume_from=str(first), init_from=str(second)).path == first / "checkpoints" / "2"
    named = find_origin(own, resume_from=str(first / "checkpoints" / "1"), init_from="")
    assert named == Origin("resume", first / "checkpoints" / "1")
    assert named.record().step == 1
    assert find_origin(own, resume_from="", init_from=str(second)).record() == Record()
    save(own, state, {4: None})
    assert find_origin(own, resume_from=str(first), init_from=str(second)).kind == "own"
    for kind, word in {"own": "resuming", "resume": "resume_from", "init": "init_from"}.items():
        assert word in str(Origin(kind, own))
        assert str(own) in str(Origin(kind, own))


def test_missing_origin_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"resume_from .*nowhere holds no finished checkpoint"):
        find_origin(tmp_path, resume_from=str(tmp_path / "nowhere"), init_from="")


def test_other_shapes_and_names_are_refused_with_both(tmp_path):
    state, _ = make_state({"data": 8}, P())
    save(tmp_path, state, {1: None})
    path = tmp_path / "checkpoints" / "1"
    own, init = Origin("own", path), Origin("init", path)
    _, wider = make_state({"data": 8}, P(), width=24)
    with pytest.raises(UserError, match=r"params/layer/w is float32\[16,8\] there and float32\[16,24\] here"):
        check(own, wider)
    with pytest.raises(UserError, match=r"params/layer/w is float32\[16,8\] there and float32\[16,24\] here"):
        check(init, wider)
    _, abstract = make_state({"data": 8}, P())
    renamed = dataclasses.replace(abstract, params={"block": abstract.params["layer"]})
    with pytest.raises(UserError, match="params/block/w is absent there and"):
        check(own, renamed)


def test_variables_alone_need_no_like_optimizer(tmp_path):
    state, abstract = make_state({"data": 8}, P("data"))
    save(tmp_path, state, {1: None})
    other = dataclasses.replace(abstract, opt_state={"momentum": abstract.params})
    taken = restore_variables(tmp_path / "checkpoints" / "1", other)
    np.testing.assert_array_equal(taken["params"]["layer"]["w"], state.params["layer"]["w"])
    assert int(taken["model_state"]["counters"]["batches"]) == 7
    assert sorted(taken) == ["model_state", "params"]


def test_best_evaluation_is_the_lowest_finite_one():
    record, best = Record(), []
    for step, loss in enumerate([math.nan, 3.0, math.nan, 2.0, 2.5, -math.inf], start=1):
        record = dataclasses.replace(record, step=step).with_evaluation({"loss": loss}, "loss")
        best.append(record.best.step)
    assert best == [1, 2, 2, 4, 4, 4]
    assert record.last.step == 6
