# The verbs of the project. `make demo` and `make test` install what is missing; see README.md.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
CARGO ?= cargo
# Where other PostgreSQL versions are unpacked: a directory that the server's user can enter too.
PG_CACHE ?= $(if $(filter 0,$(shell id -u)),/var/cache/sitepair/pg,$(HOME)/.cache/sitepair/pg)
# Where the jars of the Kafka broker are kept.
KAFKA_CACHE ?= $(if $(filter 0,$(shell id -u)),/var/cache/sitepair/kafka,$(HOME)/.cache/sitepair/kafka)
TEST_KAFKA = $(KAFKA_CACHE)/4.3.1
BENCH_DEBEZIUM = $(KAFKA_CACHE)/debezium-3.5.0.Final
TEST_PG = 15=$(shell tests/setup/find-server 15):16=$(PG_CACHE)/16/bin:17=$(PG_CACHE)/17/bin:18=$(PG_CACHE)/18/bin
SOAK_ROUNDS ?= 100

.PHONY: help demo test soak lint bench bench-parts docs setup-demo setup-test setup-bench

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

setup-demo:
	@tests/setup/packages

setup-test: setup-demo
	@tests/setup/packages --test
	@tests/setup/postgres-versions "$(PG_CACHE)"
	@tests/setup/kafka "$(KAFKA_CACHE)"

setup-bench: setup-test
	@tests/setup/debezium "$(KAFKA_CACHE)"

demo: setup-demo ## two throw-away sites, a load, kills, and the proof that both agree
	$(CARGO) build --release --locked
	target/release/sitepair demo

lint: setup-test ## format, clippy, rustdoc and dependency checks; a warning fails
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items
	tests/setup/cargo-deny
	$(CARGO) deny --offline check bans licenses sources

test: setup-test lint ## everything: lint, unit tests, real servers, kill tests
	SITEPAIR_TEST_PG="$(TEST_PG)" SITEPAIR_TEST_KAFKA="$(TEST_KAFKA)" CARGO="$(CARGO)" tests/setup/run

soak: setup-test ## the kill test, SOAK_ROUNDS rounds (default 100), and a copy of 5 M rows within 200 MB
	SITEPAIR_TEST_PG="$(TEST_PG)" SITEPAIR_KILL_ROUNDS=$(SOAK_ROUNDS) $(CARGO) test --locked --release --test it kill -- --nocapture
	SITEPAIR_TEST_PG="$(TEST_PG)" SITEPAIR_COPY_ROWS=5000000 $(CARGO) test --locked --release --test it snapshot::bounds -- --nocapture

bench: setup-bench ## sitepair beside pg_recvlogical, native replication, Debezium and psql; writes docs/BENCHMARKS.md (benches/compare/main.rs and benches/copy.rs have its variables)
	SITEPAIR_TEST_PG="$(TEST_PG)" SITEPAIR_TEST_KAFKA="$(TEST_KAFKA)" SITEPAIR_BENCH_DEBEZIUM="$(BENCH_DEBEZIUM)" $(CARGO) bench --locked --bench compare
	SITEPAIR_TEST_PG="$(TEST_PG)" $(CARGO) bench --locked --bench copy

bench-parts: setup-test ## criterion benchmarks of decode, rules, record, append and plan; says what changed since it last ran
	$(CARGO) bench --locked --bench wire --bench topic --bench changes

docs: ## writes the generated pages under docs/ anew
	SITEPAIR_WRITE_DOCS=1 $(CARGO) test --locked --test docs
