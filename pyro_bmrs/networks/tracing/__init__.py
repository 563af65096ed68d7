"""One pass of a network in which labels of structures are followed, and what is found by it."""
