"""Videos, images and their annotations -> shards with statistics; docs/data.md says how to use it.

One module a stage: `sources` and `layouts` read annotations, `scan` makes the work list, `media` probes and re-encodes
files, `plan` decides which sample goes where, `write` makes the shards, `stats` and `page` say what came out. `run` is
the stages in order; `cli` and `cluster` start it here or on Slurm.
"""
