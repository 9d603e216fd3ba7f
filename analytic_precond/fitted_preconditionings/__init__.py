"""c_skip(t, s) and c_out(t, s) regressed along a teacher's own trajectories."""
