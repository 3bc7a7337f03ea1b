"""Measure on one accelerator what programs compiled for absent devices cannot tell, in at most 10 minutes on an H200.

    python -m shampax.benchmarks.device > device.jsonl
    python -m shampax.benchmarks.device --tiny

attention: each kernel against XLA: largest differences of values and gradients, milliseconds forward and backward.
mfu: a step of a language model: milliseconds and MFU, and their bounds as launch.plan computes them.
optimizers: milliseconds of a step with Shampoo, AdamW and Muon, over whole intervals of refreshes.
host: milliseconds of a step with roots on the host beside the same without roots and with roots on the device.

Each row is a line of JSON. A section that fails or takes longer than its share of the time is reported, and the others
run. --tiny runs everything on any machine with shapes that mean nothing, on two CPU cores within a minute.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..configs import base
from ..framework import optimizer
from ..framework.config import components
from ..framework.config.schema import get_config
from ..framework.planning import cost
from ..framework.sharding import chips, global_batch, meshes
from ..framework.step.compiler_options import compile_with
from ..framework.step.program import Program
from ..framework.step.state import make_initial
from ..framework.task import kernel_cost_of, square_flops_of
from ..models import attention
from ..models.kernels import attention as kernels
from ..optimizers.plan import patterns

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes and lengths.

    Attributes:
      attention: rows, positions, query heads, key-value heads, width of a head.
      model: fields of the language model whose MFU is measured.
      rows: of its batch.
      small: fields of the model with which optimizers are compared.
      interval: of refreshes.
      runs: repetitions of a measurement.
    """

    attention: tuple[int, int, int, int, int]
    model: dict[str, Any]
    rows: int
    small: dict[str, Any]
    interval: int
    runs: int
    block_size: int


_1B = {"vocab_size": 32_768, "embed_dim": 2_048, "heads": 16, "kv_heads": 8, "head_dim": 128, "mlp_dim": 5_632}
_TINY = {"vocab_size": 512, "embed_dim": 32, "heads": 2, "kv_heads": 1, "head_dim": 128, "mlp_dim": 64, "layers": 1}
REAL = Sizes(
    attention=(4, 4_096, 16, 8, 128),
    model=_1B | {"layers": 24, "compute_dtype": "bfloat16", "remat": "best", "sequence_length": 2_048},
    rows=8,
    small=_1B | {"layers": 4, "compute_dtype": "bfloat16", "remat": "best", "sequence_length": 2_048},
    interval=20,
    runs=10,
    block_size=1_024,
)
TINY = Sizes(
    attention=(1, 256, 2, 1, 128),
    model=_TINY | {"sequence_length": 128},
    rows=2,
    small=_TINY | {"sequence_length": 128},
    interval=3,
    runs=1,
    block_size=32,
)


def of_attention(sizes: Sizes) -> Iterator[Row]:
    """Compare the kernel of the platform with XLA; splash attention on a CPU is interpreted."""
    kernel = {"gpu": "cudnn"}.get(jax.default_backend(), "splash")
    rows, length, heads, kv_heads, width = sizes.attention
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((rows, length, heads, width), *[(rows, length, kv_heads, width)] * 2)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=False)]
    ends = np.sort(np.random.default_rng(0).integers(1, length, (rows, 3)), axis=1)
    segments = jnp.asarray(1 + (np.arange(length) >= ends[..., None]).sum(axis=1), jnp.int32)
    cases = {
        "causal": kernels.Pattern(),
        "whole": kernels.Pattern(causal=False),
        "window": kernels.Pattern(window=length // 4),
        "soft cap": kernels.Pattern(soft_cap=30.0),
    }
    for name, pattern in cases.items():
        measured = {}
        for each in (kernel, "xla"):

            def loss(query, key, value, each=each, pattern=pattern):
                mixed = attention.attention(query, key, value, segments, pattern=pattern, kernel=each)
                return (mixed.astype(jnp.float32) ** 2).mean(), mixed

            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
            try:
                with jax.set_mesh(_mesh(get_config())):
                    (_, mixed), gradients = jax.block_until_ready(step(*arrays))
                    milliseconds = _milliseconds(lambda step=step: step(*arrays), sizes.runs)
            except ValueError as error:  # the kernel does not fit
                yield {"section": "attention", "case": name, "kernel": each, "refused": str(error)}
                break
            measured[each] = (mixed, *gradients), milliseconds
        else:
            (own, own_ms), (other, other_ms) = measured[kernel], measured["xla"]
            errors = [_difference(a, b) for a, b in zip(own, other, strict=True)]
            names = ("value_error", "query_gradient_error", "key_gradient_error", "value_gradient_error")
            row = {"section": "attention", "case": name, "kernel": kernel, "shape": list(sizes.attention)}
            yield row | dict(zip(names, errors, strict=True)) | {"ms": own_ms, "xla_ms": other_ms}


def of_mfu(sizes: Sizes) -> Iterator[Row]:
    """Measure steps of a language model under AdamW and judge the same compiled program."""
    run = Loop(_config(sizes.model, sizes.rows, base.component(base.ADAMW)))
    kind = jax.devices()[0].device_kind
    chip = chips.chip(kind)
    work = cost.judge(run.text, chip, tpu=kind.startswith("TPU"), kernel=lambda *call: kernel_cost_of(run.task, *call))
    run.steps(3)
    seconds = run.steps(sizes.runs)
    flops, square = run.task.flops(run.batch_spec), square_flops_of(run.task, run.batch_spec)
    row: Row = {"section": "mfu", "ms": 1e3 * seconds, "counted_flops": work.flops, "assumed": list(work.assumed)}
    if chip:
        bound = work.seconds + work.network_seconds
        row |= {"bound_ms": 1e3 * bound, "mfu": flops / chip.flops / seconds, "mfu_bound": flops / chip.flops / bound}
        row |= {"mfu_whole_square": square / chip.flops / seconds if square else None}
    stats = jax.devices()[0].memory_stats() or {}
    yield row | {"peak_bytes": stats.get("peak_bytes_in_use"), "planned_peak_bytes": run.peak}


def of_optimizers(sizes: Sizes) -> Iterator[Row]:
    """Measure steps over whole intervals with AdamW, Muon and Shampoo."""
    shampoo = {"block_size": sizes.block_size, "interval": sizes.interval, "early_intervals": ()}
    muon = tuple(
        (pattern, "muon" if treatment == "shampoo" else treatment)
        for pattern, treatment in base.component(base.SHAMPOO).treatments
    )
    chosen = {
        "adamw": base.component(base.ADAMW),
        "muon": base.component(base.SHAMPOO, **shampoo, treatments=muon),
        "shampoo": base.component(base.SHAMPOO, **shampoo),
    }
    for name, options in chosen.items():
        run = Loop(_config(sizes.small, sizes.rows, options))
        run.steps(sizes.interval)
        yield {"section": "optimizers", "optimizer": name, "ms": 1e3 * run.steps(2 * sizes.interval)}


def of_host(sizes: Sizes) -> Iterator[Row]:
    """Measure steps with roots on the host, and how long the loop waits for them."""
    options: Row = {"block_size": sizes.block_size, "interval": sizes.interval, "early_intervals": ()}
    ways = {
        "none": {"start_step": 10**6},
        "device": {},
        "host": {"refresh": "host", "delay": 2},
    }
    for name, way in ways.items():
        with Loop(_config(sizes.small, sizes.rows, base.component(base.SHAMPOO, **options | way))) as run:
            run.steps(sizes.interval)
            before = run.service.metrics()
            seconds = run.steps(2 * sizes.interval)
            row = {"section": "host", "roots": name, "ms": 1e3 * seconds}
            yield row | {"before": before, "after": run.service.metrics()} if name == "host" else row


class Loop:
    """A train step on one device with random tokens, and its state."""

    def __init__(self, config: Any):
        task, _, options = components.build_all(config)
        mesh = _mesh(config)
        length = config.data.sequence_length
        tokens = np.random.default_rng(0).integers(1, config.task.vocab_size, (config.batch_size, length + 1))
        arrays = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": np.arange(length + 1) + 0 * tokens}
        arrays["bytes"] = 4 * tokens.shape[1] + 0 * tokens[:, 0]
        with jax.set_mesh(mesh):
            spec = {name: jax.ShapeDtypeStruct(each.shape[1:], jnp.int32) for name, each in arrays.items()}
            self.task, self.batch_spec = task, global_batch.spec(spec, config.batch_size, mesh)
            program = Program(config, task, options, mesh, self.batch_spec, lambda count: 1e-4 + 0 * count)
            lowered = program.train_step.lower(program.abstract, self.batch_spec)
            self._step = compile_with(lowered, program.compiler_options)
            names = patterns.paths(program.abstract)
            made = make_initial(task, program.tx, self.batch_spec, program.abstract, 0, names)()
            state = jax.tree.unflatten(jax.tree.structure(program.abstract), [made[name] for name in names])
        self._batch = {name: jax.device_put(each.astype(np.int32)) for name, each in arrays.items()}
        self._batch = jax.device_put(self._batch, {name: each.sharding for name, each in self.batch_spec.items()})
        self.text = self._step.as_text() or ""
        memory: Any = self._step.memory_analysis()
        self.peak = memory.peak_memory_in_bytes
        self.service = optimizer.service(program.tx, program.abstract.params)
        self._state = dataclasses.replace(state, opt_state=self.service.start(state.opt_state))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.service.close()

    def steps(self, count: int) -> float:
        """Take steps as the trainer does, one ahead of the metrics; return the mean seconds of one."""
        start, unread = time.perf_counter(), None
        for _ in range(count):
            state = dataclasses.replace(self._state, opt_state=self.service.install(self._state.opt_state))
            self._state, metrics = self._step(state, self._batch)
            self.service.take(self._state.opt_state)
            if unread is not None:
                jax.block_until_ready(unread)
            unread = metrics
        loss = float(jax.block_until_ready(unread)["loss"]) if unread else 0.0
        assert np.isfinite(loss), loss
        return (time.perf_counter() - start) / count


def _config(fields: dict[str, Any], rows: int, options: Any) -> Any:
    config = get_config()
    fields = dict(fields)
    length, vocabulary = fields.pop("sequence_length"), fields["vocab_size"]
    config.task = base.component("shampax.models.lm:LMTask", **fields)
    config.data = base.component("shampax.framework.data.text:TextData", sequence_length=length, vocab_size=vocabulary)
    config.optimizer = options
    config.batch_size = rows
    return config


def _mesh(config: Any) -> Mesh:
    return meshes.make_mesh(dict(config.mesh), jax.devices()[:1], slices=1)


def _milliseconds(call: Callable[[], Any], runs: int) -> float:
    start = time.perf_counter()
    for _ in range(runs):
        result = call()
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - start) / runs


def _difference(found: jax.Array, expected: jax.Array) -> float:
    """Return the largest difference relative to the largest expected value."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


# Section -> (its function, seconds after which it begins no further row)
SECTIONS: dict[str, tuple[Callable[[Sizes], Iterator[Row]], float]] = {
    "attention": (of_attention, 100),
    "mfu": (of_mfu, 150),
    "optimizers": (of_optimizers, 200),
    "host": (of_host, 130),
}


def run(sizes: Sizes, chosen: list[str]) -> int:
    """Run sections and print their rows. Return the number of sections that failed."""
    failed = 0
    for name in chosen:
        section, seconds = SECTIONS[name]
        start = time.monotonic()
        try:
            for row in section(sizes):
                _print(row)
                if time.monotonic() - start > seconds:
                    _print({"section": name, "stopped": f"after {seconds} s"})
                    break
        except Exception as error:  # the other sections are worth running
            failed += 1
            traceback.print_exc(file=sys.stderr)
            _print({"section": name, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
        _print({"section": name, "seconds": round(time.monotonic() - start, 1)})
    return failed


def _print(row: Row) -> None:
    print(json.dumps(row), flush=True)


def main() -> int:
    """Run the benchmark; return 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="shapes for a test")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only={options.only}: unknown {', '.join(sorted(unknown))}. Use some of {', '.join(SECTIONS)}")
    if options.tiny:  # the time goes to the compiler
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    device = jax.devices()[0]
    _print({"device": device.device_kind, "platform": device.platform, "jax": jax.__version__})
    return 1 if run(TINY if options.tiny else REAL, chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
