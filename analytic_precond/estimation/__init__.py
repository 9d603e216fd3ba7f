"""From a teacher and data to its statistics."""
