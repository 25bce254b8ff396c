"""Settings: what one is, the ranges of values, the groups that commands share, and what other tools call them."""
