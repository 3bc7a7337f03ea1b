"""Run a verb: `shampax VERB ...`; `python -m shampax VERB ...` does the same.

Each verb is a module of this folder, imported when it is named, so that `shampax --help` waits for nothing.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence

from ..framework.base.errors import UserError
from . import flags

VERBS = {
    "train": "train a model, or resume a run",
    "evaluate": "measure a trained model on held-out data",
    "generate": "continue texts with a trained language model",
    "translate": "translate sentences with a trained model",
    "sweep": "train a config with several values of some knobs",
    "report": "draw runs to one HTML page",
    "models": "list the shipped configs, tasks, data sets and optimizers",
    "plan": "show memory, time and communication of a config before it runs",
    "prepare": "tokenize or parse a data set once, for many runs",
    "checkpoint": "list, inspect, verify, compare, export or prune checkpoints",
    "local": "run a verb in several processes of this machine",
    "completion": "print what makes a shell complete verbs, configs and knobs",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. `arguments` defaults to those of this process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in VERBS:
        return importlib.import_module(f".{words[0]}", __package__).main(words[1:])
    return flags.run(lambda: _without_verb(words))


def _without_verb(words: Sequence[str]) -> int:
    if words and words[0] not in ("--help", "-h"):
        close = difflib.get_close_matches(words[0], VERBS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"It must be one of {', '.join(VERBS)}."
        raise UserError(f"unknown verb {words[0]!r}. {hint}")
    print("usage: shampax VERB ...\n\nTrain large Flax models with Distributed Shampoo.\n")
    print(*(f"  {verb:<12}{told}" for verb, told in VERBS.items()), sep="\n")
    print("\nBegin with:  shampax train --config=lm:sample --workdir=runs/first")
    print("More on a verb:  shampax VERB --help")
    return 0
