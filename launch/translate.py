"""Translate: `shampax translate --workdir=DIR < SENTENCES > TRANSLATIONS`.

Each line of the input is a sentence in UTF-8 and gives one line of output; an empty line stays empty. Vocabulary, beam
size and length penalty of the training run are read from the workdir. Groups of several batches are sorted by length,
and written in their original order.

Exit codes: 0; 2, invalid input.
"""

import argparse
import dataclasses
import io
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..framework.base import paths
from ..framework.base.errors import UserError
from . import flags

TASK, DATA = "shampax.models.translation:TranslationTask", "shampax.framework.data.pairs:PairData"
_BATCHES_READ = 16  # lines are sorted by length within this many batches
_LENGTH_STEP = 32  # sources are padded to a multiple of this, so that few lengths are compiled
_Numbered = list[tuple[int, str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("translate", __doc__)
    parser.add_argument(
        "--workdir", type=paths.given, required=True, metavar="DIR", help="workdir of a translation run"
    )
    parser.add_argument("--use", choices=("best", "newest"), default="best", help="which of its checkpoints")
    parser.add_argument("--batch_size", type=int, default=64, metavar="N", help="sentences per batch (64)")
    parser.add_argument("--beam_size", type=int, metavar="K", help="replaces that of the run")
    parser.add_argument("--length_penalty", type=float, metavar="A", help="replaces that of the run")
    parser.add_argument("--decode_length", type=int, metavar="N", help="maximum tokens of a translation")
    options, _ = parser.parse(arguments)
    if options.batch_size < 1:
        raise UserError(f"--batch_size={options.batch_size}: must be at least 1.")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    translate = _model(options)
    lines = enumerate(sys.stdin.buffer, start=1)
    while group := list(itertools.islice(lines, options.batch_size * _BATCHES_READ)):
        texts = [(number, _text(line, number)) for number, line in group]
        translations = translate([(number, text) for number, text in texts if text])
        print(*(translations.get(number, "") for number, _ in texts), sep="\n", flush=True)
    return 0


def _text(line: bytes, number: int) -> str:
    try:
        return line.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"line {number} of the input is not UTF-8 at byte {error.start}. Convert it.") from error


def _model(options: argparse.Namespace) -> Callable[[_Numbered], dict[int, str]]:
    """Return a function from numbered sentences to translations by number."""
    # Imported after the flags are parsed, so that --help does not wait for JAX and Orbax.
    import jax
    import numpy as np

    from ..framework.base import workdir as layout
    from ..framework.checkpoint import restore
    from ..framework.sharding import meshes
    from . import trained

    workdir, checkpoint = trained.locate(options.workdir, options.use)
    data = restore.component(workdir, "data", [DATA])
    search = ("beam_size", "length_penalty", "decode_length")
    given = {name: value for name in search if (value := getattr(options, name)) is not None}
    try:
        # Beam search attends by XLA; a kernel that training used may not exist here.
        task = dataclasses.replace(restore.component(workdir, "task", [TASK]), **given, attention="xla")
    except ValueError as error:
        raise UserError(str(error)) from error
    tokenizer, decode = data.load_tokenizer(workdir / layout.CACHE), data.decoder(workdir / layout.CACHE)
    mesh = trained.make_mesh("")
    rows = -(-options.batch_size // mesh.size) * mesh.size
    variables = trained.Trained(workdir, checkpoint, task, data, mesh).variables()
    placed = meshes.batch_sharding(mesh)
    compiled = jax.jit(task.translate)

    def batch_of(sources: list[list[int]]) -> tuple[Any, Any]:
        length = -(-(max(map(len, sources)) + 1) // _LENGTH_STEP) * _LENGTH_STEP
        tokens, segments = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
        for row, source in enumerate(sources):
            tokens[row, : len(source)] = source  # the end token, 0, follows
            segments[row, : len(source) + 1] = 1
        segments[len(sources) :, 0] = 1  # an empty sentence, whose search ends soon
        return jax.device_put((tokens, segments), placed)

    def translate(sentences: _Numbered) -> dict[int, str]:
        encoded = [(number, tokenizer.encode(text, add_special_tokens=False).ids) for number, text in sentences]
        encoded.sort(key=lambda item: len(item[1]))
        found = {}
        for start in range(0, len(encoded), rows):
            batch = encoded[start : start + rows]
            with jax.set_mesh(mesh):
                translations = jax.device_get(compiled(variables, *batch_of([source for _, source in batch])))
            for row, (number, source) in enumerate(batch):
                if len(source) >= data.source_length:
                    trained.warn(
                        f"line {number} has {len(source) + 1} tokens; training had at most {data.source_length}"
                    )
                if not translations.finished[row]:
                    trained.warn(f"the translation of line {number} is cut after {task.decode_length} tokens")
                found[number] = " ".join(decode(translations.tokens[row]).splitlines())
        return found

    return translate


if __name__ == "__main__":
    sys.exit(main())
