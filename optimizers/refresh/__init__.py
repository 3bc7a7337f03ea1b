"""The refresh schedule, statistics, and accepting new roots."""
