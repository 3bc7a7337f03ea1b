"""Run tasks of lm-evaluation-harness with a model of this package, for `shampax evaluate --harness=TASK,...`.

Needs the extra `lm-eval`. A task whose folder is given may bring code of its own, which is executed.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import jax
from lm_eval import evaluator, utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from ..framework.base import model_folder
from ..framework.base.errors import UserError
from ..framework.generation.generator import Generator
from ..framework.generation.sampling import Sampling
from ..framework.generation.scoring import Scorer
from ..framework.generation.texts import Text
from . import trained

_LONGEST = 4_096  # tokens of a row; a folder may name more than fit
_GENERATED = 256  # tokens of a continuation whose task does not tell, as in lm-evaluation-harness


def run(options: argparse.Namespace, changes: Sequence[str]) -> str:
    """Return the results of the tasks as text: a table, or JSON.

    Raises:
      UserError: there is no such model or task, or an override is not one of the mesh or of `batch_size`.
    """
    sizes, batch_size = [], 16
    for change in changes:
        key, _, value = change.partition("=")
        if key == "batch_size" and value.isdecimal() and int(value):
            batch_size = int(value)
        elif key.startswith("mesh."):
            sizes.append(change.removeprefix("mesh."))
        else:
            raise UserError(f"--config.{change}: with --harness only config.mesh and config.batch_size can be given.")
    manager = TaskManager(include_path=str(options.harness_tasks) if options.harness_tasks else None)
    names = options.harness.split(",")
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(f"--harness={options.harness}: there is no task {unknown[0]!r}. Add --harness_tasks=FOLDER.")
    model = trained.find(options.workdir, options.use, ",".join(sizes), [trained.LM], [trained.TEXT, trained.CHAT])
    with jax.set_mesh(model.mesh), trained.compiled_before(model.workdir):
        found: Any = evaluator.simple_evaluate(
            Harnessed(model, batch_size),
            tasks=names,
            num_fewshot=options.shots,
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
    return json.dumps(found["results"], indent=2, default=str) if options.json else utils.make_table(found)


class Harnessed(TemplateLM):
    """A model as lm-evaluation-harness uses it.

    Args:
      model: the model.
      batch_size: rows that are computed together.
    """

    def __init__(self, model: trained.Trained, batch_size: int):
        super().__init__()
        self._model, self._batch_size = model, batch_size
        self._codec, self._variables = model.codec(), model.variables()
        self._begin = self._codec.encode("")
        self._scorer = Scorer(model.task, model.mesh, batch_size)
        self._length = model.data.sequence_length
        if model_folder.is_folder(model.workdir):
            named = model_folder.read_config(model.workdir).get("max_position_embeddings") or _LONGEST
            self._length = min(named, _LONGEST)

    @property
    def eot_token_id(self) -> int:
        """Return the token before the first one of a text."""
        return (self._begin or sorted(self._codec.ends))[-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text; with those that begin every text unless `add_special_tokens` is False."""
        tokens = self._codec.encode(string)
        return tokens[len(self._begin) :] if add_special_tokens is False else tokens

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        pairs = [self._fitting(text, continuation) for _, text, continuation in requests]
        return [(score.nats, score.greedy) for score in self._scorer.scores(self._variables, pairs)]

    def _fitting(self, text: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Return text and continuation without what comes too early for a row."""
        continuation = continuation[-self._length :]
        return text[-max(1, self._length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text, cut into rows without overlap if it is longer than one."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = utils.get_rolling_token_windows(tokens, self.eot_token_id, self._length, context_len=1)
            pairs += [utils.make_disjoint_window(window) for window in windows]
            owners += [number] * (len(pairs) - len(owners))
        sums = [0.0] * len(requests)
        for owner, score in zip(owners, self._scorer.scores(self._variables, pairs), strict=True):
            sums[owner] += score.nats
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each text, up to its stop texts."""
        found = [""] * len(requests)
        encoded = [self.tok_encode(request.args[0]) for request in requests]
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for text, numbers in kinds.items():
            options = json.loads(text)
            until, most = options.get("until") or [], options.get("max_gen_toks", _GENERATED)
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            heat = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            sampling = Sampling(heat, options.get("top_k", 0), options.get("top_p", 1.0))
            generator = Generator(self._model.task, self._model.mesh, sampling)
            numbers.sort(key=lambda number: len(encoded[number]))
            for start in range(0, len(numbers), self._batch_size):
                batch = numbers[start : start + self._batch_size]
                prompts = [encoded[number][-max(1, self._length - most) :] for number in batch]
                texts = [Text(self._codec, prompt, stops) for prompt in prompts]
                for drawn in generator.tokens(self._variables, prompts, most):
                    for each, token in zip(texts, drawn, strict=True):
                        each.add(int(token))
                    if all(each.finish for each in texts):
                        break
                for number, each in zip(batch, texts, strict=True):
                    each.end()
                    found[number] = each.text
        return found
