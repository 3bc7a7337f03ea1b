"""Show and record a run: console, metrics, profiles and stalls. Draw runs."""
