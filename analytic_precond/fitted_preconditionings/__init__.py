"""c_skip(t, s) and c_out(t, s) regressed along a teacher's own trajectories.

A fit begins in `fitted` (its arguments, range and file). `follow` checks what is asked for and follows the teacher from
noised data, `trajectory_moments` sums products on the way, `jump_regression` makes coefficients and their table of
them. `least_squares` is just that, `per_mode` does it for each mode of one of the `bases`, and `shifted` chooses the
level to ask at, too (`shift_regression`).
"""
