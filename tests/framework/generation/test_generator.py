import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from lm_cases import SMALL, batch_of, logits_of, variables_of

from shampax.framework.generation.generator import Generator
from shampax.framework.generation.sampling import Sampling

PROMPTS = [[1, 2, 3], [9] * 16, [5]]


def mesh_of(data, tensor=1):
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def generated(generator, mesh, prompts, most=4):
    with jax.set_mesh(mesh):
        return np.stack([*generator.tokens(variables_of(SMALL), prompts, most)], axis=1)


def test_greedy_tokens_are_those_of_whole_rows():
    """Faults: the first token is lost or comes twice; a token is fed to the wrong row; a row of padding is returned."""
    mesh = mesh_of(2)
    generator = Generator(SMALL, mesh, Sampling(0))
    found = generated(generator, mesh, PROMPTS)
    assert found.shape == (3, 4)
    batch = batch_of([[1] * 21] * 3)
    for row, prompt in enumerate(PROMPTS):
        batch["tokens"][row, : len(prompt) + 4] = [*prompt, *found[row]]
    following = np.asarray(logits_of(SMALL, variables_of(SMALL), batch)).argmax(axis=-1)
    for row, prompt in enumerate(PROMPTS):
        assert following[row, len(prompt) - 1 : len(prompt) + 3].tolist() == found[row].tolist()
    assert (generator.speed.read, generator.speed.written) == (20, 9)


def test_neighbours_do_not_matter():
    """Fault: the same prompt has another text in another batch, row or mesh."""
    mesh = mesh_of(1)
    generator = Generator(SMALL, mesh, Sampling(1.0, seed=3))
    together = generated(generator, mesh, PROMPTS)
    others = mesh_of(2, 2)
    across = generated(Generator(SMALL, others, Sampling(1.0, seed=3)), others, PROMPTS[::-1])[::-1]
    np.testing.assert_array_equal(together, across)
    np.testing.assert_array_equal(together[1:2], generated(generator, mesh, PROMPTS[1:2]))
    assert (together != generated(Generator(SMALL, mesh, Sampling(1.0, seed=4)), mesh, PROMPTS)).any()


def test_few_sizes_are_compiled_and_the_cache_changes_in_place():
    """Faults: every length compiles again; a step copies the whole cache."""
    mesh, task = mesh_of(1), dataclasses.replace(SMALL, layers=8)
    generator = Generator(task, mesh, Sampling(0))
    programs, used = generator._programs, []
    generator._programs = lambda *x: used.append(programs(*x)) or used[-1]
    for length, rows in ((3, 3), (20, 4)):
        with jax.set_mesh(mesh):
            assert len([*generator.tokens(variables_of(task), [[1] * length] * rows, 2)]) == 2
    assert len(set(used)) == 1
    memory = used[0][1].memory_analysis()
    cache = 2 * 8 * 4 * 64 * 2 * 8 * 4  # keys and values: layers, rows, slots, heads, width, bytes
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2


@pytest.mark.parametrize("most", [1, 2])
def test_the_last_token_costs_no_step(most):
    """Fault: a step is computed whose token nobody sees."""
    mesh = mesh_of(1)
    generator = Generator(SMALL, mesh, Sampling(0))
    assert generated(generator, mesh, PROMPTS, most).shape == (3, most)
    assert generator.speed.written == 3 * (most - 1)
