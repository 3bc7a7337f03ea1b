"""The data of a run: training and held-out batches, on the devices."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from .. import dataset
from ..base import durations
from ..base.errors import UserError
from ..config import overrides
from ..config.sets import OWN, Mixture
from ..distributed import agreement
from ..sharding.global_batch import Share
from .mixing import Mixed, made, totals
from .pipeline import Batches, HeldoutBatches, Reading
from .preparing import manifests

_SPARE = 1.05  # rows to prepare / rows that the run takes
_LONGEST_WAIT = 600.0  # seconds that the other processes of a run may wait while one prepares


class Heldout:
    """The held-out batches of a data set, laid over a mesh; iterate for one pass.

    Attributes:
      examples: number of examples of one pass.
      decode: decodes the token ids of an example to text; None for data that are not text.
    """

    def __init__(self, data: dataset.Data, cache: Path, share: Share, options: Any, **rows: Any):
        source = data.examples("heldout", cache)
        self._share = share
        self._batches = HeldoutBatches(source, limit=options.batches, sample=options.sample, **rows)
        self.examples = min(len(source), len(self._batches) * rows["global_batch_size"])
        self.decode = dataset.decoder(data, cache)

    def __iter__(self) -> Generator[Any]:
        with contextlib.closing(iter(self._batches)) as batches:
            yield from map(self._share.to_devices, batches)

    def shapes(self) -> dict[str, str]:
        """Return type and shape of the arrays of an example."""
        return {name: f"{array.dtype}{list(array.shape[1:])}" for name, array in sorted(self._batches[0].items())}


class Feed:
    """Batches of a data set, laid over a mesh; opening one prepares the data in the folder `cache` on process 0.

    Args:
      data: the data set.
      mixture: further sources to train on.
      sets: further held-out sets, by name, with those of the mixture.
      cache: folder of prepared data.
      mesh: the mesh.
      config: the config.

    Attributes:
      examples: number of training examples.
      fingerprint: of the training data, "" if the data set has none.
      heldout: the held-out batches of the data set, by the name "", and of the further sets.
      reading: how batches are read.
      batch_spec: shapes and shardings of a global batch.

    Raises:
      UserError: the data cannot be used.
    """

    def __init__(
        self,
        data: dataset.Data,
        mixture: Mixture,
        sets: Mapping[str, dataset.Data],
        cache: Path,
        mesh: Mesh,
        config: Any,
    ):
        needed, stages = length(config, data, mixture)
        seconds = _LONGEST_WAIT if jax.process_count() > 1 else 0

        def prepare(name: str, each: dataset.Data) -> None:
            agreement.first(lambda: dataset.prepare(each, cache, needed.get(name, 0), seconds))

        prepare(OWN, data)
        sets = {name: dataset.beside(each, data, cache) for name, each in sets.items()}
        for name, each in sets.items():
            with _about(name, mixture):
                prepare(name, each)
        trained = {OWN: data} | {name: sets[name] for name in mixture.sources}
        source: dataset.Source = data.examples("train", cache)
        self._made = [(each, needed.get(name, 0)) for name, each in trained.items()]
        self._cache = cache
        fingerprints = [dataset.fingerprint(each, cache) for each in trained.values()]
        if mixture.sources:
            source = Mixed({name: each.examples("train", cache) for name, each in trained.items()}, stages)
        self._share = Share(config.batch_size, mesh)
        self.reading = Reading.choose(source, **config.input)
        rows = {"global_batch_size": config.batch_size, "rows": self._share.rows, "reading": self.reading}
        self._source, self._batch_size = source, config.batch_size
        self._failures: list[Callable[[], str]] = []
        self._train = Batches(source, seed=config.seed, augment=dataset.augment(data), **rows)
        self.examples = len(source)
        self.fingerprint = manifests.digest(fingerprints) if mixture.sources else fingerprints[0]
        self.heldout = {"": Heldout(data, cache, self._share, config.evaluation, **rows)}
        for name, each in sets.items():
            with _about(name, mixture):
                self.heldout[name] = self._further(each, cache, config, rows)
        self.batch_spec = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
            self._share.to_devices(self._train[0]),
        )

    @contextlib.contextmanager
    def ahead(self) -> Generator[None]:
        """Make the training examples of later steps in the background, on process 0, until the context ends."""
        with contextlib.ExitStack() as stack:
            for data, examples in self._made if jax.process_index() == 0 else ():
                self._failures.append(stack.enter_context(dataset.ahead(data, self._cache, examples)))
            yield

    def made(self, number: int) -> tuple[int, str]:
        """Return how many training batches exist, as far as batch `number` needs it, on process 0.

        Returns:
          The number, and why batch `number` will not exist, "" if it does or is being made.
        """
        failure = "".join(told() for told in self._failures)  # first: shards may come until then
        batches = made(self._source, (number + 1) * self._batch_size - 1) // self._batch_size
        return batches, failure if batches <= number else ""

    def train(self, number: int) -> Generator[Any]:
        """Yield training batches `number`, `number` + 1, ... without end. Close the iterator to end its workers."""
        with contextlib.closing(self._train.from_step(number)) as batches:
            yield from map(self._share.to_devices, batches)

    def _further(self, data: dataset.Data, cache: Path, config: Any, rows: dict[str, Any]) -> Heldout:
        found = Heldout(data, cache, self._share, config.evaluation, **rows)
        given, wanted = found.shapes(), self.heldout[""].shapes()
        if given != wanted:
            raise UserError(f"an example has {given}, but one of config.data has {wanted}. Use the same shapes.")
        return found


def length(config: Any, data: dataset.Data, mixture: Mixture) -> tuple[dict[str, int], list[tuple[int, Any]]]:
    """Return how many training examples of each source a run takes, and the stages of the mixture in examples.

    The first are with some to spare, and {} if the run takes all: its length is in epochs.

    Raises:
      UserError: the mixture or a duration is invalid.
    """
    grows = dataset.grows(data)
    if durations.parse(config.duration, whole_run=True)[1] == "epochs" and not mixture.sources and not grows:
        return {}, []
    units = durations.Units(config.batch_size, no_epochs, data.tokens_per_example)
    total = durations.to_steps(config.duration, units)
    in_steps = functools.partial(durations.to_steps, units=dataclasses.replace(units, total_steps=total))
    stages = [(step * config.batch_size, weights) for step, weights in mixture.stages(in_steps)]
    counts = totals(stages, total * config.batch_size)
    return {name: int(_SPARE * n) + 1 for name, n in zip((OWN, *mixture.sources), counts, strict=True)}, stages


def no_epochs() -> int:
    """Raise UserError: a duration is in epochs, of data that have none."""
    raise UserError(
        "config.mixture, config.data.shuffle_window: a mixture has no epochs, nor has data of which only a part exists "
        "when training starts. Give durations in steps, examples or tokens."
    )


def _about(name: str, mixture: Mixture) -> contextlib.AbstractContextManager[None]:
    return overrides.about(f"{'mixture' if name in mixture.sources else 'evaluation.sets'}: {name}")
