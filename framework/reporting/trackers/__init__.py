"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, Aim, or a user's own. `tracker.py` is the contract.

Each runs in a process of its own (`relay.py` starts it, `__main__.py` runs in it): it can neither end nor slow a run.
"""
