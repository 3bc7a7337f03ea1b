"""Which process this is, and how processes start, agree and end together."""
