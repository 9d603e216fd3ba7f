"""Teachers: anything that estimates the clean data, D(x, t), and adapters that make one of a network.

`denoiser` says what a teacher is, `exact` has those in closed form. A network becomes one in `networks`, by the linear
map that `predictions` derives from what it predicts under a schedule; `diffusers_models` finds both in a scheduler's
config. `guidance` makes one teacher of two; `conditions` gives each row of a batch its own condition.
"""
