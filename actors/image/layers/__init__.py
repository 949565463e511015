"""Layers: tar in gzip, zstd or nothing, once in order, and again from any checkpoint on; and what they make together.

`download` brings them, `stream` decompresses and checks them (`inflate`, `zstd`), `tar` reads entries, `content` hashes and cuts what is
in files, `overlaying` is the rule by which layers become one tree.  `checkpoints` says where one may start to read again.

Layers of eStargz and zstd:chunked are not downloaded at all: `tabled` finds their tables of contents, `toc` reads entries from these, and
`frames` makes of them what `checkpoints` needs.
"""
