"""How good a teacher, a preconditioning or a student is; pictures."""
