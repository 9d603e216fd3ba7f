"""Training: times, distances, weightings, losses.

A step draws its levels (`jump_times`, `ict`), follows the teacher, calls student and target (`losses`, their passes in
`student_passes`), and compares their images by a distance (`distances`; `lpips` with `lpips_weights`) times a weight
(`weightings`, with the `Loss` that comes out). `denoising` is the loss that CTM adds, and its balance.
"""
