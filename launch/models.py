"""List what can be trained: `shampax models [WORD ...]`.

Prints the variants of each shipped config, then tasks, data sets and optimizers, which a config chooses by their import
strings. With words, only the lines that have all of them.

Exit codes: 0; 2, invalid input.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..framework.config import components, files
from . import flags

_WIDTH = 28  # of the column of names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("models", __doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only lines with these words")
    options, _ = parser.parse(arguments)
    for heading, lines in (("Configs, for --config", _configs()), *_components()):
        chosen = [line for line in lines if all(word.lower() in line.lower() for word in options.words)]
        if chosen:
            print(f"{heading}:", *chosen, sep="\n")
    return 0


def _configs() -> Iterator[str]:
    for name in files.shipped():
        module = files.module_of(name)
        for variant, change in module.VARIANTS.items():
            yield _line(f"{name}:{variant}", change)


def _components() -> Iterator[tuple[str, Sequence[str]]]:
    for key, heading in (("task", "Tasks"), ("data", "Data sets"), ("optimizer", "Optimizers")):
        classes = {name: components.load_class(name) for name in components.known(key)}
        lines = [_line(name, cls) for name, cls in classes.items()]
        yield f"{heading}, for --config.{key}.name", lines


def _line(name: str, of: Any) -> str:
    return f"  {name:<{_WIDTH}}  {(inspect.getdoc(of) or '').partition(chr(10))[0].rstrip('.')}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
