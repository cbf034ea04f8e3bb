"""How fast a step is, measured by a fixed protocol: rows, search, ceilings, tables, profiles.

Everything here times what `longtake train` runs: the model goes through `parallelize`, the step is
`training_step`, the configuration a `RunConfig`.
"""
