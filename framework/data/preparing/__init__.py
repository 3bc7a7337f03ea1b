"""Preparing: the records of a source made into shards of rows, once, by any number of processes."""
