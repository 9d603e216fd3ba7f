"""Noise levels: grids, random ones, schedules of other codebases, and what a raw network is given at each.

`grids` says what a noise level is; `random_levels` draws them for training. `schedules` and `vp_schedules` turn other
codebases' times into noise levels and back, `function_schedule` those of any two functions. `network_scalings` makes a
denoiser of a raw network, `per_sample` one level per sample of what callers write.
"""
