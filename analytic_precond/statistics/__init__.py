"""What is known of a teacher: l_t, s_t and the remainder per noise level, from sums over samples. Needs no teacher."""
