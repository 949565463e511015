"""Registries: names, manifests and ranges of blobs, over HTTP, from a registry or a mirror of it, however it behaves.

A name is put in full (`reference`), one repository is asked (`repository`) at the hosts that serve it (`endpoint`, `mirrors`), as who we
are there (`challenges`, `login`, `credentials`); a blob's answer is read while it keeps moving (`blobs`), as often as is decent
(`patience`); what comes of it first are manifests (`manifests`).  It knows of no archive and no mount.
"""
