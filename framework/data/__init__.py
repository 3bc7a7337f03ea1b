"""Data sets by kind, and the pipeline that feeds any of them to the devices."""
