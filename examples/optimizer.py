"""An optimizer: Lion from optax, behind a dataclass of options.

    shampax train --config=examples/config.py --workdir=runs/example --config.optimizer.beta1=0.95

Any optax transformation works. `shampax/framework/optimizer.py` says how a part of a state whose arrays are not shaped
like parameters tells the trainer its layout, as Shampoo's does, and what the trainer does with all other states.
"""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class LionOptions:
    """Lion (Chen et al. 2023, arXiv 2302.06675). Each field is a knob of `config.optimizer`."""

    beta1: float = 0.9  # weight of the momentum in the update
    beta2: float = 0.99  # decay of the momentum
    weight_decay: float = 0.0  # decoupled weight decay

    def __post_init__(self):
        if not 0 <= self.beta1 < 1:
            raise ValueError(f"beta1={self.beta1}: must be in [0, 1). Use 0.9.")

    def build(self, learning_rate: optax.Schedule, **layout) -> optax.GradientTransformation:
        """Return the optimizer.

        Args:
          learning_rate: learning rate as a function of the step; the trainer makes it from `config.schedule`.
          **layout: `mesh`, `axis_names` and `param_specs` of the parameters, for optimizers that need them.
        """
        del layout
        return optax.lion(learning_rate, b1=self.beta1, b2=self.beta2, weight_decay=self.weight_decay)
