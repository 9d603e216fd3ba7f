"""Teachers: anything that estimates the clean data, D(x, t), and adapters that make one of a network."""
