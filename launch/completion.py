"""Complete commands in a shell: put `source <(shampax completion)` into ~/.bashrc or ~/.zshrc.

Completes verbs, shipped configs and the knobs of a config; files elsewhere.

Exit codes: 0; 2, invalid input.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Sequence

from ..configs import base
from ..framework.base.errors import UserError
from ..framework.config import files
from ..framework.config.check import load
from . import flags, knobs
from . import main as command

# zsh has bash's `complete` in a module. The shell runs this command with the line in COMP_LINE and COMP_POINT.
_SCRIPT = """
if [ -n "$ZSH_VERSION" ]; then autoload -U +X compinit bashcompinit && compinit -u && bashcompinit; fi
complete -o default -o nospace -C 'shampax completion --line' shampax
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(given: list[str]) -> int:
    # The shell adds the command's name, the word and the word before it.
    if given[:1] == ["--line"]:
        line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT") or 0)]
        sys.stdout.writelines(f"{each}\n" for each in candidates(line))
        return 0
    flags.Parser("completion", __doc__).parse(given)
    print(_SCRIPT.strip())
    return 0


def candidates(line: str) -> list[str]:
    """Return what can follow the last break of a line, up to the cursor: a shell breaks words at "=" and ":", too."""
    word = re.split(r"\s", line)[-1]
    words = line.split()[: None if not word else -1]
    wholes = command.VERBS if len(words) == 1 else _of_verb(words[1:], word)
    broken = re.split(r"(?<=[=:])", word)
    done = len("".join(broken[:-1]))
    return sorted({whole[done:] for whole in wholes if whole.startswith(word) and whole != word})


def _of_verb(words: Sequence[str], word: str) -> Iterable[str]:
    if words[0] not in ("train", "plan", "prepare"):
        return ()
    if not word.startswith("--config."):
        chosen = [f"{name}:{variant}" for name in files.shipped() for variant in files.module_of(name).VARIANTS]
        return ["--workdir=", "--help", "--config.", *(f"--config={each}" for each in chosen)]
    given = [each.removeprefix("--config=") for each in words if each.startswith("--config=")]
    config = base.get_config()
    with contextlib.suppress(UserError):
        config = load(given[-1]) if given else config
    return [f"--config.{knob.key}=" for knob in knobs.knobs(config)]


if __name__ == "__main__":
    sys.exit(main())
