"""Training: times, distances, weightings, losses."""
