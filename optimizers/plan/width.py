"""Rules of scale: the learning rate of a matrix as a function of the model's width, so that one rate serves all widths.

Under muP (Yang et al., "Tensor Programs V", arXiv 2203.03466) one step changes every activation by the same amount at
every width. Qiu, Chen, Phan, Lei and Wilson (arXiv 2512.05620) extend it to matrix preconditioners with blocks and
grafting. The factors are read from a public copy of their code (`assign_lr` in train.py), not from the paper's text. A
matrix with w times as many inputs and outputs as the tuned one has the factor

    1 / w             Adam, and Shampoo with the norm of Adam's update
    1                 Muon of constant spectral norm, and stochastic gradient descent
    blocks^(-2k)      Shampoo without graft, for exponents k of both sides
    blocks^(-1/2)     SOAP

for `blocks` times as many blocks. Vectors and embeddings keep their rate, because their inputs do not multiply.

One factor is ours. Adam's norm spread evenly over the singular values of a block, by our Muon or after `orthogonalize`,
gives the block a spectral norm that grows with the root of its longer side. The blocks of a matrix add up as SOAP's do:

    (blocks x growth of a block's longer side)^(-1/2)
"""

import math
from collections.abc import Sequence

from ..options import Options, Treatment


def factor(options: Options, treatment: Treatment, lengths: Sequence[int], order: float) -> float:
    """Return the factor of a preconditioned matrix's learning rate in a model `options.wider` times as wide.

    Args:
      options: options of the optimizer.
      treatment: treatment of the matrix.
      lengths: lengths of its sides, each assumed to be `wider` times as long as in the tuned model.
      order: sum of the exponents of the sides.
    """
    wider, family = options.wider, treatment.preconditioner
    assert family
    grafted = family.grafts and options.graft != "none"
    if grafted and options.of_graft.method.follows_scale:
        return 1.0

    def pieces(length: float) -> int:
        return math.ceil(length / treatment.block_size)

    blocks = math.prod(pieces(length) / pieces(length / wider) for length in lengths)
    if family.orthogonal or treatment.orthogonalize:
        longer, shorter = (min(max(lengths) / by, treatment.block_size) for by in (1, wider))
        return (blocks * (longer / shorter if grafted or not family.grafts else 1)) ** -0.5
    if grafted:
        return 1 / wider
    return blocks ** -(order if family.grafts else 0.5)
