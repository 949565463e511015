import sys
from actors import daemon
a=sys.argv[1:]
if a[0]=='daemon': sys.exit(daemon.main('--take-over' in a))
if a[0]=='process': sys.exit(daemon.process(a[1],a[2:]))
