"""Supervision for daemons whose parts may crash, hang or be killed: actors over isolated processes.

It knows nothing of what the daemon is for.  The pure half decides (`spec`, `restarts`); the thin half acts (`actor`, `tree`,
`system` on Pykka; `worker`, `isolation`, `forkserver`, `watch` on processes; `frames`, `channel`, `sockets` between them; `keeper`,
`parts`, `held`, `orders`, `replacing`, `descriptors` on what outlives the daemon; `store` on what outlives the machine's power).

Nothing is re-exported here: every isolated process imports this file, and none may load Pykka with it.
"""
