"""How good a teacher, a preconditioning or a student is; pictures.

Of a teacher: `teacher_check` measures, `teacher_report` says what it means. Of a preconditioning: `consistency_gap`. Of
a student: `trajectory_alignment`, along the same solution of the teacher's ODE. Of two statistics: `comparison`.
`plots` draws statistics, preconditionings and gaps, as `plot_style` has it.
"""
