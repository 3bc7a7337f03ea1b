"""Train: read train.py first, then setup.py, loop.py and hooks.py.

Users implement the contracts task.py, dataset.py and optimizer.py.
"""
