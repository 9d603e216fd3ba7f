"""The teacher's probability-flow ODE: steps, whole solutions, accurate trajectories.

`steps` has the velocity, Euler's and Heun's step, and says in which dtypes they compute; `solve` repeats them over a
grid, or from a start to a stop of each sample's own; `trajectories` takes a fifth-order method, for regressions and
diagnostics that measure smaller differences than Heun's errors.
"""
