"""Functions of lambda = -ln t between the levels they are known at: splines, and tables that torch evaluates."""
