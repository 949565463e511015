"""Supervision for daemons whose parts may crash, hang or be killed: actors over isolated processes.

It knows nothing of what the daemon is for, and could be a package by itself: README.md beside this file shows how to use it, and how to
publish it.  The pure half decides: `supervision` is the rule book, over `spec`, `strategy`, `restarts`, `exits`, `children`, `deadlines`;
`rules` is what goes in and comes out.  The thin half acts: `actor`, `tree`, `system` on Pykka; `worker`, `isolation`, `forkserver`,
`watch` on processes; `frames`, `channel`, `sockets` between them; `keeper`, `succession`, `parts`, `held`, `orders`, `pulse`,
`replacing`, `descriptors` on what outlives the daemon; `store` on what outlives the machine's power; `events` on what has happened.

Nothing is re-exported here: every isolated process imports this file, and none may load Pykka with it.
"""
