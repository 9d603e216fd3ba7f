"""Consistency models: a network and a preconditioning; their weights; settings of published codes.

`base` is the denoiser inside a student: EDM's scalings around a raw network, or one that is given. `consistency_models`
makes jumps of it; `weights` starts the network as its teacher's and averages it; `presets` are the jump, times and
grids of published codes.
"""
