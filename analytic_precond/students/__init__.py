"""Consistency models: a network and a preconditioning; their weights; settings of published codes."""
