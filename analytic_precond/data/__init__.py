"""A teacher's pass over data: sources of samples and noise, its arguments, memory, processes."""
