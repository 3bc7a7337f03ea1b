"""Click-through prediction by DLRM (arXiv 1906.00091): tables under row-wise AdaGrad, MLPs under Shampoo.

sample, sample_adagrad: predict which of 30,000 flights of 2013 arrive late; for 2 CPU cores, which simulate 4
  devices.

    shampax train --config=dlrm:sample --workdir=runs/flights

  The metric is the AUC on November and December: 0.673 (AdaGrad 0.667), means of three seeds. Flights are not clicks:
  do not quote these as CTR or Criteo results.

criteo_kaggle: the Kaggle set, for one accelerator of 16 GB or more. Not trained yet.

    shampax train --config=dlrm:criteo_kaggle --workdir=runs/kaggle \
        --config.data.source=file:/data/criteo/train.txt

  Sizes of the MLPs and width of the tables are those of bench/dlrm_s_criteo_kaggle.sh in the paper's repository
  (facebookresearch/dlrm), which trains one epoch. Batch size and rates are ours, and not tuned.

paper: the terabyte, for a v5e slice of 64 chips. Not trained yet.

    shampax train --config=dlrm:paper --workdir=/mnt/runs/criteo_1tb \
        --config.data.source='file:/data/criteo_1tb/day_*.gz'

  Sizes are MLPerf's (facebookresearch/dlrm, bench/run_and_time.sh: width 128, bottom 512-256-128, top
  1024-1024-512-256-1, categories hashed to at most 40 M). The batch of 65,536 and one epoch are those of NVIDIA's
  DeepLearningExamples. As in arXiv 2002.09018, tables are treated diagonally and MLPs preconditioned. Rates are ours,
  and not tuned. Run the command in every host of the slice (docs/clusters.md).
"""

from typing import Any

from . import base

ADAGRAD = "shampax.optimizers.baselines:AdaGradOptions"
TREATMENTS = ((r"embedding.*", "rows"), (r".*", "shampoo"))
SHARDING_RULES = (("rows", ("data", "fsdp", "tensor")),)  # the MLPs are replicated
RATE_RULES = ((r"embedding.*", 10.0), (r".*", 1.0))


def sample(config: Any) -> None:
    """Train on flights."""
    _flights(config)
    config.optimizer = base.component(
        base.SHAMPOO,
        block_size=128,
        **base.WITHOUT_ORTHOGONALIZING,
        early_intervals=(),
        treatments=TREATMENTS,
        rate_rules=RATE_RULES,
        weight_decay=1.0,  # shrinks rows that are rare, or occur only in the held-out months
        decay_rules=((r"embedding.*", True), (r".*", False)),
    )
    config.schedule.learning_rate = 1e-2


def sample_adagrad(config: Any) -> None:
    """Train the sample with AdaGrad, row-wise on the tables."""
    _flights(config)
    config.optimizer = base.component(ADAGRAD)
    config.schedule.learning_rate = 6e-2


def criteo_kaggle(config: Any) -> None:
    """Train the sizes of the published script for the Kaggle set."""
    _criteo(config, KAGGLE, embed_dim=16, bottom=(512, 256, 64, 16), top=(512, 256))
    config.data.source = "file:criteo_kaggle/train.txt"
    config.duration = "1 epochs"
    config.batch_size = 2_048
    config.schedule.learning_rate = 1e-3


def paper(config: Any) -> None:
    """Train MLPerf's sizes on the terabyte."""
    _criteo(config, TERABYTE, embed_dim=128, bottom=(512, 256, 128), top=(1_024, 1_024, 512, 256))
    config.data.source = "file:criteo_1tb/day_*.gz"
    config.data.heldout_files = "day_23.gz"
    config.data.workers = 24
    config.duration = "1 epochs"
    config.batch_size = 65_536
    config.task.compute_dtype = "bfloat16"
    config.schedule.learning_rate = 1e-3
    config.schedule.warmup = "4_000 steps"
    config.evaluation.batches = 1_361  # 89 M examples, the first half of the last day
    config.evaluation.sample = False
    config.checkpoint.every = "2_000 steps"


# Different values per category: of the Kaggle set, and of the terabyte hashed to 40 M (MLPerf's max-ind-range).
KAGGLE = (
    *(1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3, 93_145, 5_683, 8_351_593, 3_194, 27, 14_992),
    *(5_461_306, 10, 5_652, 2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572),
)
TERABYTE = (
    *(39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63, 38_532_951, 2_953_546, 403_346, 10, 2_208),
    *(11_938, 155, 4, 976, 14, 39_979_771, 25_641_295, 39_664_984, 585_935, 12_972, 108, 36),
)
# For the flights' 17 fields and 9 crosses. Fields that identify a day, plane or flight get a table of one row, which is
# a constant: they would be memorised, and do not occur in the held-out months.
FLIGHT_ROWS = (
    *(1_000, 1, 1, 1_000, 1_000, 1, 1, 1_000, 1_000, 1_000, 1, 1_000, 1_000, 1, 1_000, 1_000, 1),
    *(1,) * 9,
)


def _flights(config: Any) -> None:
    config.task = base.component(
        "shampax.models.dlrm:DLRMTask",
        rows=FLIGHT_ROWS,
        embed_dim=8,
        bottom=(32, 8),
        top=(32, 16),
        dropout=0.5,
        normalize_integers=True,
    )
    config.data = base.component("shampax.framework.data.clicks:ClickData", source="sample:flights")
    config.sharding_rules = SHARDING_RULES
    config.duration = "200 steps"
    config.batch_size = 512
    config.simulated_devices = 4


def _criteo(config: Any, values: tuple[int, ...], **model: Any) -> None:
    # Published tables have a row per value. Ours hash, so small tables are larger, to make collisions rare.
    rows = tuple(8 * count if count < 1_000_000 else count for count in values)
    config.task = base.component("shampax.models.dlrm:DLRMTask", rows=rows, sparse_updates=True, **model)
    config.data = base.component("shampax.framework.data.clicks:ClickData", source="file:")
    config.optimizer = base.component(
        base.SHAMPOO, **base.WITHOUT_ORTHOGONALIZING, treatments=TREATMENTS, rate_rules=RATE_RULES
    )
    config.sharding_rules = SHARDING_RULES


VARIANTS = {"sample": sample, "sample_adagrad": sample_adagrad, "criteo_kaggle": criteo_kaggle, "paper": paper}
BASELINES = {"sample": "sample_adagrad"}
get_config = base.of_variants(VARIANTS)
