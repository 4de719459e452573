"""Networks raced: the same weights in several runtimes, checked and timed in turns; what others published."""
