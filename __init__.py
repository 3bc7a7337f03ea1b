"""shampax: a training framework for large Flax models with Distributed Shampoo built in."""

__version__ = "0.1.0"
