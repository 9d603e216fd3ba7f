"""From a teacher and data to its statistics.

`estimate` is the door, `run` goes from batch to batch and adds up, `measurement` makes numbers of one batch, with
`derivatives` of the teacher where a method asks for them. `sums` are those that only an intercept or single elements
need, `checkpoint` is the file that an interrupted estimate goes on from.
"""
