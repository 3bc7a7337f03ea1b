"""Look after checkpoints: `shampax checkpoint VERB ...`; see --help and VERB --help.

A PATH is a workdir, which stands for its newest intact checkpoint, or one checkpoint, WORKDIR/checkpoints/STEP. Nothing
in a checkpoint is executed. No accelerator is used, so that a run in progress keeps its own.

Exit codes: 0; 1, `verify` has found a fault or `diff` a difference; 2, invalid input.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..framework.base import paths
from ..framework.base.errors import UserError, printable, told
from . import environment, flags

LM = "shampax.models.lm:LMTask"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    environment.without_accelerator()
    from ..framework.checkpoint import workarounds

    workarounds.apply()
    return options.verb(options)


# The verbs import what they need when they run, so that --help does not wait for JAX and Orbax.


def _list(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import inspect

    _say(*inspect.listing(options.workdir).split("\n"))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import inspect, store

    text = inspect.as_text(
        inspect.read(options.path if store.is_checkpoint(options.path) else _locate(options.path)),
        arrays=options.arrays,
    )
    _say(*text.split("\n"))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import inspect, store

    intact = True
    for path in options.paths:
        for checkpoint in [path] if store.is_checkpoint(path) else store.in_workdir(path):
            faults = inspect.faults(checkpoint)
            intact = intact and not faults
            _say(*(f"{checkpoint}: {fault}" for fault in faults or ["intact"]))
    return 0 if intact else 1


def _diff(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import diff, inspect

    a, b = (inspect.read(_locate(given)) for given in (options.a, options.b))
    _say(f"A: {a.path}", f"B: {b.path}")
    verdicts = dict(diff.compare(a, b))
    unlike = {name: difference for name, difference in verdicts.items() if difference}
    _say(*(f"{name}: {difference}" for name, difference in unlike.items()))
    _say(f"{len(verdicts) - len(unlike)} equal, {len(unlike)} different")
    return 1 if unlike else 0


def _import(options: argparse.Namespace) -> int:
    from ..configs import base
    from ..framework.checkpoint import imports
    from ..framework.config import components
    from . import trained

    folder = Path(options.folder)
    config = trained.config_of_folder(folder)
    config.optimizer = base.component(base.ADAMW)
    path, count = imports.run(folder, options.workdir, components.build(config.task), config)
    _say(f"{path}: {count:,} parameters, from {folder}")
    return 0


def _average(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import average

    checkpoints = average.newest(options.paths, options.last)
    path, count = average.run(checkpoints, options.workdir)
    _say(f"{path}: {count:,} parameters, the mean of {len(checkpoints)} checkpoints:", *map(str, checkpoints))
    return 0


def _export(options: argparse.Namespace) -> int:
    from ..framework.checkpoint.export import export

    path = _locate(options.path)
    if options.format != "flax":
        return _export_folder(path, options)
    count, size = export(path, Path(options.target), model_state=options.model_state, force=options.force)
    _say(f"{options.target}: {count} arrays, {size:,} bytes, from {path}")
    return 0


def _export_folder(path: paths.Path, options: argparse.Namespace) -> int:
    from ..framework.base import model_folder
    from ..framework.base import workdir as layout
    from ..framework.base.json_files import read_object
    from ..framework.checkpoint import export, restore

    if options.force or options.model_state:
        raise UserError(f"--format={options.format}: takes neither --force nor --model_state. Give a new folder.")
    workdir = paths.of(path).parent.parent
    task = restore.component(workdir, "task", [LM])
    content = read_object(workdir / layout.CONFIG) or {}
    data = content.get("data") or {}
    trained = [each for each in paths.listed(workdir / layout.CACHE) if each.match("tokenizer-*.json")]
    found = options.tokenizer or data.get("tokenizer") or (trained[0] if len(trained) == 1 else None)
    words = export.tokenizer_of(Path(found)) if found else export.Words({}, {})
    try:
        config = task.folder_config(options.family)
        adapter = task.adapter_config(config["model_type"])
        peft = options.format == "peft"
        tensors = task.adapter_tensors(config, adapter) if peft and adapter else task.folder_tensors(config)
    except ValueError as error:
        raise UserError(f"{workdir}: {error}.") from error
    if peft and not adapter:
        raise UserError(f"--format=peft: {workdir} has no adapters. Use hf, or train with task.lora_rank.")
    if peft:
        adapter["base_model_name_or_path"] = options.base or _base(str(content.get("init_from") or ""))
        written, stem, size = {model_folder.ADAPTER: adapter}, "adapter_model", sys.maxsize
    else:
        config |= {"max_position_embeddings": data.get("sequence_length")} | words.fields
        written = {model_folder.CONFIG: config | {"torch_dtype": options.dtype}}
        stem, size = "model", int(options.file_gigabytes * 1e9)
    texts = {name: json.dumps(each, indent=2, sort_keys=True) for name, each in written.items()}
    files = {**words.files, **{name: f"{text}\n".encode() for name, text in texts.items()}}
    merged = task.merged if adapter and not peft else None
    others = {"state": {} if peft else task.folder_state(config), "stem": stem, "merged": merged}
    count, size = export.export_folder(path, Path(options.target), tensors, files, options.dtype, size, **others)
    _say(f"{options.target}: {count} tensors, {size:,} bytes, from {path}")
    return 0


def _base(init_from: str) -> str:
    """Return the Hugging Face folder that a run started from, "" for other runs."""
    from ..framework.base import model_folder

    path = Path(init_from).expanduser()
    return str(model_folder.base_of(path).absolute()) if init_from and model_folder.is_folder(path) else ""


def _prune(options: argparse.Namespace) -> int:
    from ..framework.checkpoint import ownership, saving, shelf, store, verify

    if options.keep_last < 1 or options.keep_best < 0:
        raise UserError(f"--keep_last={options.keep_last} --keep_best={options.keep_best}: at least 1 and 0.")
    store.in_workdir(options.workdir)
    would = "would be " if options.dry_run else ""
    # A dry run writes nothing, not even the lock.
    with contextlib.nullcontext() if options.dry_run else ownership.lock(options.workdir):
        counts = {"keep_last": options.keep_last, "keep_best": options.keep_best}
        verdicts = saving.pruning(options.workdir, **counts)
        _say(*(f"{path}: {verdict}" for path, verdict in verdicts.items() if verdict))
        for path in (path for path, verdict in verdicts.items() if not verdict):
            size = verify.size(path)
            try:
                if not options.dry_run:
                    shelf.delete(path)
            except paths.errors() as error:
                raise UserError(f"{path} cannot be deleted ({told(error)}). Fix it and retry.") from error
            _say(f"{path}: {would}deleted, {size:,} bytes")
    return 0


def _locate(given: paths.Path) -> paths.Path:
    from ..framework.checkpoint import store

    path, damaged = store.locate(given)
    for other, why in damaged:
        print(printable(f"warning: checkpoint {other} is damaged ({why}); using {path}"), file=sys.stderr)
    return path


def _say(*lines: str) -> None:
    for line in lines:
        print(printable(line))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shampax checkpoint",
        description="Look after the checkpoints of training runs.",
        epilog="PATH is a workdir, which stands for its newest intact checkpoint, or WORKDIR/checkpoints/STEP.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, work: Callable[[argparse.Namespace], int], about: str, **named: str) -> Callable[..., Any]:
        made = verbs.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=parser.epilog)
        made.set_defaults(verb=work)
        for path, words in named.items():
            many: Any = {"nargs": "+"} if path == "paths" else {}
            metavar = path.upper().rstrip("S")
            made.add_argument(path, type=paths.given, metavar=metavar, help=words, **many)
        return made.add_argument

    verb("list", _list, "list the checkpoints of a workdir", workdir="a workdir")

    flag = verb("inspect", _inspect, "show record, sizes, parameters and blocks of a checkpoint", path="a PATH")
    flag("--arrays", help="show every array with shape, dtype and bytes, too", action="store_true")

    verb("verify", _verify, "compare files with their checksums, and the manifest with the arrays", paths="a PATH")

    verb("diff", _diff, "compare two checkpoints by arrays and blocks", a="a PATH", b="another PATH")

    flag = verb("import", _import, "make a workdir of a Hugging Face folder", folder="the folder")
    flag("--workdir", help="a new workdir", type=paths.given, required=True, metavar="DIR")

    flag = verb("average", _average, "make a workdir of the mean of the parameters of checkpoints", paths="a PATH")
    flag("--last", help="of a workdir, average the newest N checkpoints", type=int, default=1, metavar="N")
    flag("--workdir", help="a new workdir", type=paths.given, required=True, metavar="DIR")

    about = "write the parameters as safetensors: a file, or a Hugging Face folder"
    flag = verb("export", _export, about, path="a PATH", target="the file or folder")
    about = "flax: a file, arrays as in training; hf: a folder, with adapters merged; peft: a folder with the adapters"
    flag("--format", help=about, choices=("flax", "hf", "peft"), default="flax")
    flag("--family", help="hf, peft: model_type, by default one that fits", default="", metavar="NAME")
    flag("--base", help="peft: the model of the adapters, by default init_from if it is a folder", default="")
    flag("--dtype", help="hf, peft: type of the tensors", choices=("float32", "bfloat16", "float16"), default="float32")
    flag("--tokenizer", help="hf, peft: folder with its files, by default that of the run", type=Path, metavar="FOLDER")
    flag("--file_gigabytes", help="hf: size of a file", type=float, default=4.0, metavar="N")
    flag("--model_state", help="flax: write the other collections, too, as COLLECTION.path", action="store_true")
    flag("--force", help="flax: replace the file if it exists", action="store_true")

    flag = verb("prune", _prune, "delete checkpoints", workdir="a workdir without a run in progress")
    flag("--keep_last", help="number of newest intact checkpoints to keep", type=int, required=True, metavar="N")
    flag("--keep_best", help="number of best intact checkpoints to keep", type=int, required=True, metavar="M")
    flag("--dry_run", help="only show what would be deleted", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
