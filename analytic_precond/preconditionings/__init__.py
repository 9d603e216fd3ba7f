"""c_skip(t, s) and c_out(t, s): of published models, and of a teacher's statistics."""
