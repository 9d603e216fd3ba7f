"""Noise levels: grids, random ones, schedules of other codebases, and what a raw network is given at each."""
