# What a person types. `make help` lists it.
#
# CARGO_TARGET_DIR is respected; without it cargo's own default (./target) is used.

SHELL      := /bin/bash
CARGO      ?= cargo
TARGET_DIR := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),$(CURDIR)/target)
LARDER     := $(TARGET_DIR)/release/larder

.PHONY: help build deb image demo test test-k8s lint campaign bench fuzz deps clean

help:            ## Lists the targets.
	@grep -hE '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

build:           ## Builds the release binary.
	$(CARGO) build --release --locked
	@echo "built $(LARDER)"

deb: build       ## Makes a Debian package of it in dist/.
	scripts/deb $(LARDER) dist

image: build     ## Makes an OCI image of it in dist/, without an image registry.
	scripts/image $(LARDER) dist

demo: deps build ## Shows the whole job on real data (KEEP=1 leaves it running).
	LARDER_BIN=$(LARDER) KEEP=$(KEEP) demo/run

test: deps       ## Runs the tests that guard every change.
	scripts/test

test-k8s: deps build ## Helm chart and driver on a real Kubernetes of one node, from nothing (KILLS=50 KEEP=1; root, Go).
	LARDER_BIN=$(LARDER) KILLS=$(or $(KILLS),50) KEEP=$(KEEP) tests/k8s/run.sh

lint:            ## Format, clippy, docs, licences.
	scripts/lint

campaign: deps   ## Long tests: PART=kill|survive|damage|fault|nodes|pressure|shape|import|trees|sched|jobs|life|soak|kernels|systemd|memory|nfs|random|sim|fuzz MINUTES=20 SEED=1.
	PART=$(PART) MINUTES=$(MINUTES) SEED=$(SEED) scripts/campaign

bench: deps build ## Us, the plain file system and the rivals on the same work (over an hour; WORKS= ROUNDS= RIVAL_ROUNDS= SCALE= PEERS= DIR= JSON= KEEP=1).
	PATH="$$(benches/e2e/rivals.sh):$$PATH" LARDER_BIN=$(LARDER) $(CARGO) bench --locked --bench e2e -- \
	    $(if $(WORKS),--work $(WORKS)) $(if $(PEERS),--peers $(PEERS)) $(if $(SCALE),--scale $(SCALE)) \
	    $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(RIVAL_ROUNDS),--rival-rounds $(RIVAL_ROUNDS)) \
	    $(if $(DIR),--dir $(DIR)) $(if $(JSON),--json $(JSON)) $(if $(KEEP),--keep) $(BENCH)

deps:            ## Installs what a fresh Debian lacks.
	scripts/deps
