"""What a run shows and writes: console, metrics, profiles and stalls; reports about many runs."""
