"""Archives: what is known of an image, made once, by a process that may be killed, and shared by a fleet.

`archive` is the file, `trace` and `pack` lie beside it; `builder` makes one in the process "image builder" (`process`), for whom
`building` waits; nodes of a fleet share them (`fleet`) through S3 (`bucket`).
"""
