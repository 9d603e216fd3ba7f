"""What is known of a teacher: l_t, s_t and the remainder per noise level, from sums over samples. Needs no teacher.

`moments` are the sums and what follows from them, `teacher_statistics` the object and its file, `element_statistics`
the same for every element of a sample; `merging` pools runs, `ems` exchanges files with DPM-Solver-v3.
"""
