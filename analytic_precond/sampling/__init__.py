"""From noise to data in a few jumps of a student.

`samplers` are loops of jumps; `levels` reads the levels as users write them, `noise` draws what is added in between.
`diffusers_scheduler` is multistep sampling as a scheduler of the diffusers library.
"""
