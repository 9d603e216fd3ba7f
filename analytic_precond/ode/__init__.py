"""The teacher's probability-flow ODE: steps, whole solutions, accurate trajectories."""
