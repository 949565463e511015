"""Prefetch: what a command will read is brought before it asks.

`policy` says how an image's content is to come, `tracing` which traces there are, `process` is the "image prefetcher", which makes packs
of traces and streams them, and `prefetching` has it done for one mounted image.
"""
