"""Continue texts: `shampax generate --workdir=DIR --prompt=TEXT`.

Writes the continuation to standard output as it comes. With --prompts=FILE, each line of the file is a prompt, in
UTF-8, or a JSON object whose value "prompt" is one; each gives a line of JSON, in the same order: the object, with
"text", "tokens" and "finish" ("end": the model ended the text; "stop": a --stop came; "length": --max_tokens was
reached). `-` in place of the prompt or the file is standard input. Tokens per second go to standard error.

A token is a function of the text before it, the seed and its position: a prompt has the same continuation alone and
with others, up to rounding.

Exit codes: 0; 2, invalid input.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..framework.base import paths
from ..framework.base.errors import UserError, printable
from . import flags

TASK, DATA = "shampax.models.lm:LMTask", "shampax.framework.data.text:TextData"
CHAT = "shampax.framework.data.text.chat:ChatData"
_BATCHES_READ = 16  # prompts are sorted by length within this many batches


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("generate", __doc__)
    flag = parser.add_argument
    flag(
        "--workdir", type=paths.given, required=True, metavar="PATH", help="workdir, checkpoint or Hugging Face folder"
    )
    flag("--use", choices=("best", "newest"), default="best", help="which checkpoint of a workdir")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads standard input")
    given.add_argument("--prompts", metavar="FILE", help="file with a prompt on each line; - reads standard input")
    flag("--temperature", type=float, default=0.8, metavar="T", help="0 takes the most probable tokens (0.8)")
    flag(
        "--top_p", type=float, default=0.95, metavar="P", help="draw from the tokens that have this probability (0.95)"
    )
    flag(
        "--top_k", type=int, default=0, metavar="K", help="draw from this many of the most probable tokens; 0: all (0)"
    )
    flag("--max_tokens", type=int, default=256, metavar="N", help="tokens of a continuation (256)")
    flag("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    flag("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    flag("--batch_size", type=int, default=16, metavar="N", help="prompts of a file that are continued together (16)")
    flag("--mesh", default="", metavar="AXIS=N,...", help="devices along data, fsdp and tensor (all along data)")
    options, _ = parser.parse(arguments)
    for name in ("batch_size", "max_tokens"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least 1.")
    if "" in options.stop:
        raise UserError("--stop=: the text is missing. Write --stop=TEXT")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    if options.prompts is None:
        prompt = _decoded(sys.stdin.buffer.read(), "the prompt") if options.prompt == "-" else options.prompt
        show = _show_safely if sys.stdout.isatty() else _show
        _model(options)([prompt], show)
        show("\n")
        return 0
    name = "standard input" if options.prompts == "-" else options.prompts
    with _opened(options.prompts) as file:
        prompts = _prompts(file, name)
        group = list(itertools.islice(prompts, options.batch_size * _BATCHES_READ))
        if not group:
            raise UserError(f"--prompts={options.prompts}: has no prompt. Write one on each line.")
        continued = _model(options)
        while group:
            order = sorted(range(len(group)), key=lambda number: len(group[number]["prompt"]))
            for start in range(0, len(order), options.batch_size):
                batch = order[start : start + options.batch_size]
                texts = continued([group[number]["prompt"] for number in batch], None)
                for number, text in zip(batch, texts, strict=True):
                    group[number] |= text
            print(*(json.dumps(each, ensure_ascii=False) for each in group), sep="\n", flush=True)
            group = list(itertools.islice(prompts, options.batch_size * _BATCHES_READ))
    return 0


def _opened(name: str) -> contextlib.AbstractContextManager[Iterable[bytes]]:
    if name == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    try:
        return Path(name).expanduser().open("rb")
    except OSError as error:
        raise UserError(f"--prompts={name}: cannot be read ({error.strerror}). Check the path.") from error


def _prompts(lines: Iterable[bytes], name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of the lines; a line of text becomes one. Empty lines are left out."""
    for number, line in enumerate(lines, start=1):
        place = f"line {number} of {name}"
        text = _decoded(line, place).rstrip("\r\n")
        if text.startswith("{"):
            try:
                given = json.loads(text)
            except ValueError as error:
                raise UserError(f"{place}: not JSON ({error}). Write prompts that begin with {{ as JSON.") from error
            if not isinstance(given.get("prompt"), str):
                raise UserError(f'{place}: has no text "prompt". Write {{"prompt": "..."}}.')
            yield given
        elif text:
            yield {"prompt": text}


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 at byte {error.start}. Convert it.") from error


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show_safely(text: str) -> None:
    """Write to a terminal, which the text of a model must not control."""
    _show("".join(c if c in "\n\t" else printable(c) for c in text))


def _model(options: argparse.Namespace) -> Callable[[list[str], Callable[[str], None] | None], list[dict[str, Any]]]:
    """Return a function from prompts, and what shows the text of the first as it comes, to their continuations."""
    # Imported after the flags and the input are read, so that errors in them do not wait for JAX and Orbax.
    import jax

    from ..framework.generation.generator import Generator
    from ..framework.generation.sampling import Sampling
    from ..framework.generation.texts import Text
    from . import trained

    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    model = trained.find(options.workdir, options.use, options.mesh, [TASK], [DATA, CHAT])
    codec = model.codec()
    variables = model.variables()
    generator = Generator(model.task, model.mesh, sampling)

    def continued(prompts: list[str], show: Callable[[str], None] | None) -> list[dict[str, Any]]:
        encoded = [codec.encode(prompt) for prompt in prompts]
        if [] in encoded:
            raise UserError("the prompt is empty, and no token begins the texts of this model. Give a prompt.")
        texts = [Text(codec, tokens, options.stop) for tokens in encoded]
        with jax.set_mesh(model.mesh), trained.compiled_before(model.workdir):
            for drawn in generator.tokens(variables, encoded, options.max_tokens):
                for text, token in zip(texts, drawn, strict=True):
                    shown = text.add(int(token))
                    if show:
                        show(shown)
                if all(text.finish for text in texts):
                    break
        for text in texts:
            rest = text.end()
            if show:
                show(rest)
        print(generator.speed, file=sys.stderr)
        return [{"text": text.text, "tokens": text.count, "finish": text.finish} for text in texts]

    return continued


if __name__ == "__main__":
    sys.exit(main())
