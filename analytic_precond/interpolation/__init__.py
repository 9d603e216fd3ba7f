"""Functions of lambda = -ln t between the levels they are known at: splines, and tables that torch evaluates.

From levels to a jump: `splines` goes through the values at the levels (NumPy, offline), `integral_table` integrates l
and s between any two levels, `float32_integrals` does so where there is no float64, and `element_table` for every
element of a sample. `spline_table` holds functions of two levels, such as regressed jumps.
"""
