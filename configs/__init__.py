"""Configs, one file per workload. A config of your own starts from `base.get_config()`."""
