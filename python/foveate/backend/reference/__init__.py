"""The definition of every op in plain torch, which the other backends are held against."""
