"""Consistency models: a network and a preconditioning; their weights; settings of published codes.

`base` is the denoiser inside a student: EDM's scalings around a raw network, or one that is given. `consistency_models`
makes jumps of it; `initialization` starts the network as its teacher's, `averaging` follows it in training; `presets`
are the jump, times and grids of published codes, `paper_experiments` the paper's.
"""
