"""Which blocks are due, their statistics, and whether new roots are accepted."""
