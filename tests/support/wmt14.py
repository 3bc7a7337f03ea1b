"""Write sentences of a test in the form of WMT'14 in tensorflow-datasets, as array_record files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds


def prepare_wmt14(directory: Path, config: str, splits: Mapping[str, Sequence[tuple]]) -> None:
    """Write `splits` (name -> pairs of the config's languages, in the set's order) as wmt14_translate, offline."""
    languages = config.split("-")
    with tfds.core.registered.skip_registration():

        class Wmt14(tfds.core.GeneratorBasedBuilder):
            name = "wmt14_translate"
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=config),)

            def _info(self):
                features = tfds.features.Translation(languages=languages)
                return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=tuple(languages))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(pairs) for split, pairs in splits.items()}

            def _generate_examples(self, pairs):
                for index, pair in enumerate(pairs):
                    yield index, dict(zip(languages, pair, strict=True))

        tfds.disable_progress_bar()
        Wmt14(data_dir=directory, file_format="array_record", config=config).download_and_prepare()
