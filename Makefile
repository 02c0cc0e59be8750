# `make help` lists the targets. Everything is made from mosh.py; what it takes is fetched into .venv when it is missing.
#
# PYTHON=python3.12     the interpreter to use
# HOST=you@host         run: log in there; without it, a session on this machine that needs no ssh
# SEED=n                sim: repeat the run with this seed
# MINUTES=n             fuzz: for so long, all decoders together
# COUNT=n               attack: so many datagrams of each kind
# ROOTS=folder          test-matrix: where the Debian systems are kept
# TESTS="..."           test: arguments for pytest instead of the folder tests

PYTHON ?= python3
HOST :=
SEED ?=
TESTS ?= tests
COUNT ?= 10000
ROOTS ?= .venv/roots
MINUTES ?= 10

VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest -c tests/pytest.ini --rootdir .
SOURCES := mosh.py build_zipapp.py tests

.PHONY: all run slim test test-matrix lint sim bench bench-terminal bench-network bench-simulated bench-start fuzz attack
.PHONY: clean help peers emulator

all: mosh.pyz ## build mosh.pyz, the one file to run and to copy (plain `make` does this)

# The table of character widths comes from the package wcwidth: from this Python if it has it, else from .venv. The
# libraries for a Python without AES-OCB come from wheels, which are kept in .venv/wheels; offline it is built without.
define build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
	    || { echo "make: $(PYTHON) must be Python 3.9 or newer; choose one with make PYTHON=..." >&2; exit 1; }
	@python=$(PYTHON); \
	if ! $$python build_zipapp.py --check 2>/dev/null; then \
	    $(MAKE) --silent --no-print-directory $(VENV)/.wcwidth && python=$(VENV)/bin/python || exit 1; \
	fi; \
	$$python build_zipapp.py --output $@
endef

mosh.pyz: mosh.py build_zipapp.py
	$(build)

run: mosh-slim.pyz ## start a session on this machine, or with HOST=you@host on that one
	@$(PYTHON) mosh-slim.pyz $(if $(HOST),$(HOST),--local 127.0.0.1)

slim: mosh-slim.pyz ## build mosh-slim.pyz, without bytecode and libraries: a hundredth of the size, 0.1 s more at each start

mosh-slim.pyz: mosh.py build_zipapp.py
	$(build) --source-only

test: lint peers ## check the style and run all tests, also against the stock mosh; CI=true forbids to skip any peer
	$(PYTEST) $(TESTS)

# From the oldest Python to the newest. What ends in -arm64 is emulated, or left out by name where that cannot be.
SYSTEMS := bullseye bookworm trixie testing trixie-arm64

test-matrix: $(VENV)/.tools peers emulator ## be either end on bare Debian systems, which root on Debian gets by debootstrap
	@mkdir -p $(ROOTS); for system in $(SYSTEMS); do \
	    test -x $(ROOTS)/$$system/usr/sbin/sshd && continue; rm -rf $(ROOTS)/$$system; \
	    suite=$${system%-arm64}; arch=; \
	    if [ $$suite != $$system ]; then \
	        arch=--arch=arm64; $(RUNS_ARM64) || { mkdir $(ROOTS)/$$system; continue; }; \
	    fi; \
	    echo "making a Debian $$system"; \
	    debootstrap $$arch --variant=minbase --include=python3,openssh-server $$suite $(ROOTS)/$$system \
	        >$(ROOTS)/$$system.log || { echo "make: debootstrap failed, see $(ROOTS)/$$system.log" >&2; exit 1; }; \
	done
	MOSH_ROOTS=$(abspath $(ROOTS)) $(PYTEST) -rs tests/test_matrix.py

lint: $(VENV)/.tools ## check style and types
	$(VENV)/bin/python -m ruff check $(SOURCES)
	$(VENV)/bin/python -m mypy --config-file .mypy.ini $(SOURCES)

sim: $(VENV)/.tools peers ## simulate 10,000 sessions on bad networks, and compare 13,000 screens with stock; SEED=n repeats one session
	PYTHONPATH=. $(VENV)/bin/python tests/random_sessions.py $(if $(SEED),--seed $(SEED))
	$(if $(SEED),,MOSH_SIM_LONG=1 $(PYTEST) -s tests/test_differential.py)

bench: $(VENV)/.tools mosh.pyz peers ## measure against stock mosh and plain ssh; bench-terminal, -network, -simulated, -start: one part
	@for bench in tests/bench*.py; do \
	    echo "== $$bench"; MOSH_PYZ="$(CURDIR)/mosh.pyz" $(VENV)/bin/python $$bench || exit 1; \
	done

bench-terminal bench-network bench-simulated bench-start: bench-%: $(VENV)/.tools mosh.pyz peers
	MOSH_PYZ="$(CURDIR)/mosh.pyz" $(VENV)/bin/python tests/bench_$*.py

fuzz: $(VENV)/.tools ## fuzz every decoder, guided by coverage, for MINUTES=n; without the package atheris at random
	@$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet 'atheris>=3,<4' 2>/dev/null; \
	$(VENV)/bin/python tests/fuzz.py --minutes $(MINUTES)

attack: $(VENV)/.tools peers ## ten thousand of each hostile datagram, and faults, also for stock mosh; print what happens
	MOSH_ATTACK_COUNT=$(COUNT) $(PYTEST) -s tests/test_attack.py tests/test_faults.py

clean: ## remove everything that make has made, .venv included
	rm -rf mosh.pyz mosh-slim.pyz $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf __pycache__ tests/__pycache__

help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z -]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo; awk '/^# [A-Z]+=/ { sub("# ", "  "); print }' Makefile

# -- What the targets need ---------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); \
	    echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; }

$(VENV)/.wcwidth: tests/requirements.txt | $(VENV)/bin/python
	@$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint tests/requirements.txt wcwidth \
	    || { echo "make: pip cannot get the package wcwidth; without a network, install it for $(PYTHON)" >&2; exit 1; }
	@touch $@

$(VENV)/.tools: tests/requirements.txt | $(VENV)/bin/python
	@$(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --requirement tests/requirements.txt
	@touch $@ $(VENV)/.wcwidth

# The programs that tests run ours against. Root on Debian gets them; elsewhere the tests that need one say so and skip.
PEERS := mosh-server mosh-client sshd ssh tmux vim nano zsh fish tcsh csh ksh mksh $(if $(wildcard /etc/debian_version),locale-gen)
PEER_PACKAGES := mosh openssh-server openssh-client tmux vim nano locales zsh fish tcsh csh ksh mksh

peers:
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	missing() { for peer in $(PEERS); do command -v $$peer >/dev/null 2>&1 || printf ' %s' $$peer; done; }; \
	if [ -n "$$(missing)" ] && [ -f /etc/debian_version ] && [ "$$(id -u)" = 0 ]; then \
	    echo "installing the programs to test against:$$(missing)"; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends \
	        $(PEER_PACKAGES) >/dev/null || echo "make: apt-get could not install them" >&2; \
	fi; \
	if [ -n "$$(missing)" ]; then \
	    echo "make: programs to test against that are not installed:$$(missing)" >&2; \
	    if [ -n "$$CI" ]; then exit 1; fi; \
	fi

# Programs for arm64 run on another machine when the kernel hands them to qemu: the package asks the kernel to, except
# in a container or wherever else nothing has booted.
BINFMT := /proc/sys/fs/binfmt_misc
RUNS_ARM64 := [ "$$(uname -m)" = aarch64 -o -e $(BINFMT)/qemu-aarch64 ]

emulator:
	@$(RUNS_ARM64) || { \
	    apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends \
	        qemu-user-static >/dev/null; \
	    test -e $(BINFMT)/register || mount -t binfmt_misc binfmt_misc $(BINFMT); \
	    $(RUNS_ARM64) || cat /usr/lib/binfmt.d/qemu-aarch64.conf >$(BINFMT)/register; \
	} || echo "make: cannot emulate arm64, which takes qemu-user-static and binfmt_misc" >&2
