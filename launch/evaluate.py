"""Evaluate a trained model: `shampax evaluate --workdir=DIR [--sets=NAME,...] [--config.KEY=VALUE ...]`.

Prints the held-out metrics of the run's data, by the name "heldout", and of the sets of `evaluation.sets`. With
overrides of `config.data`, such as --config.data.source='file:/path/*.txt', it evaluates the held-out part of these
data instead, with the tokenizer of the run. Other overrides change how it evaluates: `evaluation.batches`,
`batch_size`, `mesh`. A run in progress is not disturbed; rows that its data folder lacks are added there. A Hugging
Face folder has no data: it needs --config.data.source, and its rows are prepared in every call.

Exit codes: 0; 2, invalid input.
"""

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..framework.base import paths
from ..framework.base.errors import UserError
from . import flags

_OWN, _GIVEN = "heldout", "given"  # names of the run's data, and of the data of overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("evaluate", __doc__, knobs=True)
    flag = parser.add_argument
    flag("--workdir", type=paths.given, required=True, metavar="PATH", help="workdir, checkpoint, Hugging Face folder")
    flag("--use", choices=("best", "newest"), default="best", help="which checkpoint of a workdir")
    flag("--sets", default="", metavar="NAME,...", help="sets to evaluate; by default all")
    flag("--json", action="store_true", help="print an object of JSON")
    flag("--harness", default="", metavar="TASK,...", help="run tasks of lm-evaluation-harness instead (extra lm-eval)")
    flag("--harness_tasks", type=Path, metavar="FOLDER", help="folder with further tasks, whose code is executed")
    flag("--shots", type=int, metavar="N", help="examples before each question of a task")
    flag("--limit", type=int, metavar="N", help="questions of each task")
    flag("--trust", action="store_true", help="import models and data sets from outside shampax that the workdir names")
    options, overrides = parser.parse(arguments)
    if options.harness:
        try:
            from . import harness
        except ModuleNotFoundError as error:
            raise UserError(f"--harness needs {error.name}. Run pip install 'shampax[lm-eval]'.") from error
        print(harness.run(options, overrides))
        return 0
    with contextlib.ExitStack() as end:
        result = _evaluated(options, overrides, end)
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    print(result["checkpoint"] if result["step"] is None else f"{result['checkpoint']}, step {result['step']}")
    for name, values in result["sets"].items():
        ordered = sorted(values.items(), key=lambda item: (item[0] != "loss", item[0]))
        print(f"{name}: {', '.join(f'{key} {value:{_form(value)}}' for key, value in ordered)}")
    return 0


def _form(value: float) -> str:
    return ",d" if isinstance(value, int) else ",.4f"


def _evaluated(options: argparse.Namespace, changes: Sequence[str], end: contextlib.ExitStack) -> dict[str, Any]:
    # Imported after the flags are parsed, so that --help does not wait for JAX and Orbax.
    import jax

    from ..framework import dataset
    from ..framework.base import workdir as layout
    from ..framework.base.model_folder import is_folder
    from ..framework.checkpoint import restore, store
    from ..framework.config import components, overrides
    from ..framework.config.schema import get_config
    from ..framework.config.sets import heldout_sets
    from ..framework.data.feed import Heldout
    from ..framework.data.pipeline import Reading
    from ..framework.sharding import placement
    from ..framework.sharding.global_batch import Share
    from ..framework.step.evaluation import evaluate, predict
    from ..framework.step.steps import make_eval_step, make_predict_step
    from ..framework.task import judge_of
    from . import trained

    mesh_here = [f"mesh.{axis}={size}" for axis, size in get_config().mesh.items()]
    others = [*mesh_here, "slices=0", *(each for each in changes if not each.startswith("data."))]
    folder, step = is_folder(options.workdir), None
    if folder:
        workdir = checkpoint = Path(options.workdir)
        config, cache = trained.config_of_folder(workdir), Path(end.enter_context(tempfile.TemporaryDirectory()))
        overrides.apply(config, others)
        if not any(each.startswith("data.source=") for each in changes) or not config.data.tokenizer:
            raise UserError(
                f"--workdir={workdir}: a Hugging Face folder needs its tokenizer and --config.data.source=SOURCE, of "
                "which the held-out part is evaluated. Add what is missing."
            )
    else:
        workdir, checkpoint = trained.locate(options.workdir, options.use)
        config, cache = restore.config(workdir, others, trusted=options.trust), layout.cache(workdir)
        step = store.record(checkpoint).step
    given = [each.replace("data.", f"{_GIVEN}.", 1) for each in changes if each.startswith("data.")]
    config.evaluation.sets = (*config.evaluation.sets, *given)
    sets = {_OWN: components.fitting("data", components.build(config.data)), **heldout_sets(config)}
    wanted = options.sets.split(",") if options.sets else [_GIVEN] if given else [*sets]
    for name in wanted:
        if name not in sets:
            raise UserError(f"--sets={options.sets}: there is no set {name!r}. Choose from {', '.join(sets)}.")
    task = trained.adapted(components.fitting("task", components.build(config.task)))
    mesh, training = placement.mesh_of(config, None), sets[_OWN]
    with jax.set_mesh(mesh), trained.compiled_before(workdir):
        share, heldout = Share(config.batch_size, mesh), {}
        for name in wanted:
            data = training if name == _OWN else dataset.beside(sets[name], training, cache)
            data.prepare(cache)
            reading = Reading.choose(data.examples("heldout", cache), **config.input)
            rows = {"global_batch_size": config.batch_size, "rows": share.rows, "reading": reading}
            heldout[name] = Heldout(data, cache, share, config.evaluation, **rows)
        first = next(iter(heldout[wanted[0]]))
        spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in first.items()}
        variables = restore.variables(checkpoint, task, spec, config.sharding_rules, mesh)
        eval_step, judge = make_eval_step(task, variables, mesh, config.microbatches), judge_of(task)
        measured = {}
        for name, each in heldout.items():
            values = evaluate(eval_step, variables, each)
            if judge is not None:
                predict_step = make_predict_step(judge, variables, mesh, config.microbatches)
                judged, line = judge.judge(predict(predict_step, variables, each, each.examples), each.decode)
                values |= judged
                print(line, file=sys.stderr)
            if "bits_per_byte" in values:  # the loss is in nats per token
                values["perplexity"] = math.exp(values["loss"])
            measured[name] = values | {"examples": each.examples}
    return {"checkpoint": str(checkpoint), "step": step, "sets": measured}


if __name__ == "__main__":
    sys.exit(main())
