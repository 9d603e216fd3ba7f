"""From noise to data in a few jumps of a student."""
