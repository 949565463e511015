# Set-up and everything that is done to the project.  On Debian 12 or 13, Linux 6.12 or newer, as root:
#
#     make run    sets up, starts the daemon, runs a demonstration task on a real image, stops cleanly
#     make test   sets up, checks style and types, runs the tests

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup packages control-groups run test lint bench soak posix clean

# Debian's own, whatever else is on the PATH: its header files are the ones that are installed.
PYTHON3 ?= /usr/bin/python3
PYTHON := .venv/bin/python

# Of the daemon, of building its Python packages, of tests and demonstration.
PACKAGES := conmon crun runc fuse3 \
            gcc libfuse3-dev pkg-config python3-dev python3-venv \
            busybox-static debootstrap docker-registry erofs-utils git iproute2 make openssl skopeo sqlite3 umoci util-linux
# gVisor's runtime is not in every release.
OPTIONAL := runsc

help:
	@sed -n 's/^#     //p' $(MAKEFILE_LIST)

setup: packages control-groups .venv/complete

packages:
	@missing() { for name in "$$@"; do dpkg-query -W -f '$${db:Status-Status}' $$name 2>/dev/null | grep -qx installed || echo $$name; done; }; \
	required=$$(missing $(PACKAGES)); optional=$$(missing $(OPTIONAL)); \
	if [ -n "$$required" ]; then \
	    apt-get update -q; \
	    for name in $$optional; do apt-cache show $$name >/dev/null 2>&1 && required="$$required $$name"; done; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $$required; \
	fi

# On a host with cgroup v1 and v2 side by side, v2 takes the controllers that nobody mounted for v1 (often hugetlb); crun then
# creates no container.  It is v1's as soon as it is mounted there.
control-groups:
	@unified=/sys/fs/cgroup/unified/cgroup.controllers; \
	for name in $$( [ ! -e $$unified ] || cat $$unified ); do \
	    mkdir -p /sys/fs/cgroup/$$name; \
	    mount -t cgroup -o $$name $$name /sys/fs/cgroup/$$name || { rmdir /sys/fs/cgroup/$$name; exit 1; }; \
	done

# The directory is made anew when what it should hold changes; the stamp is written last, so that a broken set-up is none.
.venv/complete: setup.cfg pyproject.toml
	rm -rf .venv
	$(PYTHON3) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check '.[dev]'
	rm -rf build aerie.egg-info
	touch $@

run: setup
	@$(PYTHON) run.py demo

lint: setup
	$(PYTHON) -m ruff check --config conf/ruff.toml .
	$(PYTHON) -m ruff format --check --config conf/ruff.toml .
	$(PYTHON) -m mypy
	.venv/bin/lint-imports

# /tmp may be a tmpfs (Debian 13), from which EROFS mounts no file.  Two files at once: much of what tests do is waiting.  Exit code 5:
# none of TESTS is such a one.
test: lint
	TMPDIR=/var/tmp $(PYTHON) -m pytest -n 2 --dist loadfile -m 'not alone' $(TESTS) || [ $$? -eq 5 ]
	TMPDIR=/var/tmp $(PYTHON) -m pytest -m alone $(TESTS) || [ $$? -eq 5 ]

# A POSIX suite on a task's workspace, and on a plain overlay.  It is Rust: it wants cargo (rustup's, Rust 1.85 or newer).
posix: setup .venv/bin/pjdfstest
	TMPDIR=/var/tmp $(PYTHON) -m pytest -s tests/node/test_posix.py

.venv/bin/pjdfstest: .venv/complete
	@command -v cargo >/dev/null || { echo "make posix: cargo is not installed: see https://rustup.rs" >&2; exit 1; }
	cargo install --quiet --locked --version 0.2.2 --root .venv pjdfstest
	touch $@

bench: setup
	$(PYTHON) -m tests.bench $(BENCH)

soak: setup
	$(PYTHON) -m tests.faults.storm --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1) $(STORM)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf --one-file-system /var/tmp/aerie-demo /var/tmp/aerie-bench
	find . -name __pycache__ -prune -exec rm -rf {} +
