"""c_skip(t, s) and c_out(t, s): of published models, and of a teacher's statistics.

A jump begins in `base` (checks, dtypes, `jump`, `required_output`), which asks a subclass for its coefficients:
`hand_crafted` has formulas, `analytic` an Euler step in the integrals of `interpolation.integral_table`, `per_element`
the same for each element of a sample. `scheduled` is any of them in another schedule's variable. Fitted jumps are in
`fitted_preconditionings`, since a fit needs a teacher.
"""
