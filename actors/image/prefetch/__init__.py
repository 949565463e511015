"""Prefetch: what a command will read is brought before it asks.

`policy` says how an image's content is to come, `tracing` which traces there are, `process` is the "image prefetcher", which makes packs
of traces and streams them, and `prefetching` has it done for one mounted image. What a program needs for sure (`program`) another such
process reads while the container is being made (`starting`; `programs` has it done, also with `image.prefetch` off: it is read anyway).
`line` runs them, one after another.
"""
