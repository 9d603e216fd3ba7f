"""Consistency models: a network and a preconditioning; their weights; settings of published codes.

`consistency_models` puts EDM's scalings and a preconditioning around a network; `weights` starts the network as its
teacher's and averages it; `presets` are the jump, times and grids of published codes, `paper_experiments` the paper's.
"""
