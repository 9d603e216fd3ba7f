"""A teacher's pass over data.

`arguments` are what every pass is asked with, `sources` yield clean samples and their noise, `batches` tells samples
from batches, `memory` cuts work into pieces that fit, `processes` share it.
"""
