"""draft"""

from typing import Any

from . import base

SHAMPOO = "shampax.optimizers.shampoo:ShampooOptions"
ADAGRAD = "shampax.optimizers.baselines:AdaGradOptions"
TREATMENTS = ((r"embedding", "rows"), (r".*", "shampoo"))


def sample(config: Any) -> None:
    """Minutes on a laptop."""
    config.task = base.component(
        "shampax.models.dlrm:DLRMTask", rows=(1000,) * 26, embed_dim=8, bottom=(32, 8), top=(32, 16)
    )
    config.data = base.component("shampax.framework.data.criteo:ClickData", source="sample:flights")
    config.optimizer = base.component(SHAMPOO, block_size=128, treatments=TREATMENTS)
    config.sharding_rules = (("rows", ("data", "fsdp", "tensor")),)
    config.duration = "200 steps"
    config.batch_size = 256
    config.schedule.learning_rate = 3e-3
    config.simulated_devices = 4


VARIANTS = {"sample": sample}


def get_config(variant: str = "sample") -> Any:
    """One of `VARIANTS`."""
    config = base.get_config()
    VARIANTS[variant](config)
    return config
