"""LAZY of an image: its content, fetched by ranges of the registry's layers as it is read.

`source` answers reads with what is `held`, or has it brought (`flights`, by `fetching`) into a `spool` from which whole objects are
published; ahead of whom reads on (`readahead`), behind everybody if all is wanted (`filling`), and not at all where a pack brings it
(`coming`).  What is read first is recorded (`recording`).
`actors.image.serve` is the process.
"""
