# Ropewalk: every command does its own set-up first. `make` alone lists them.
# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: test-engines test-transformers test-intel test-emulated test-models gpu-test cuda-report intel-report help run test setup wheel test-asan test-tsan test-arm fuzz bench fresh-debian format lint docs clean
.NOTPARALLEL:

setup := scripts/setup.sh
FUZZ_SECONDS ?= 600

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run:  ## see it work: what serves here, real models' shapes checked and timed, a real language model
	@scripts/run.sh

test:  ## all tests, C++ and Python
	@$(setup) system base sycl wheel full
	@scripts/test.sh

setup:  ## only the set-up: system packages, .venv, the wheel in it
	@$(setup) system base sycl wheel full

wheel:  ## wheels for other machines, x86-64 and aarch64, in dist/; or of MACHINES alone
	@$(setup) system $(if $(MACHINES),,arm) base sycl dev zig
	@scripts/wheel.sh $(MACHINES)

fresh-debian:  ## README's ways of installing and `make run` on a fresh Debian 12 and 13, in a folder each (root; debootstrap)
	@scripts/fresh_debian.sh 12
	@scripts/fresh_debian.sh 13

test-asan:  ## all tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(setup) system base sycl wheel full
	@scripts/test.sh asan

test-tsan:  ## the threaded tests under ThreadSanitizer
	@$(setup) system base
	@scripts/test.sh tsan

test-arm:  ## the C++ tests and the conformance cases for aarch64, under qemu
	@$(setup) system arm base
	@scripts/test.sh arm

test-emulated:  ## all cases with the CUDA kernel run on the processor, in both layouts; report in build/
	@$(setup) system base
	@scripts/test.sh emulated

test-models:  ## the heads of every real model, split over ranks, in every mode: on the CPU, and with the CUDA kernel run there
	@$(setup) system base
	@scripts/test.sh models

test-engines:  ## the plugins in the Python code of SGLang and vLLM, by their own loaders, on the CPU
	@$(setup) system base sycl wheel full engines
	@scripts/test.sh engines

test-transformers:  ## all model classes of transformers that rotate, tiny, with Ropewalk and without, on the CPU
	@$(setup) system base sycl wheel full
	@scripts/test.sh transformers

test-intel:  ## all cases on Intel's CPU OpenCL device, each with the exact kernel of a GPU; results in build/
	@$(setup) system base sycl wheel full
	@scripts/test.sh intel

fuzz:  ## each fuzz target for FUZZ_SECONDS seconds (600)
	@$(setup) system fuzz base sycl wheel
	@scripts/fuzz.sh $(FUZZ_SECONDS)

gpu-test:  ## the tests that need an NVIDIA GPU; report in docs/results/
	@$(setup) system base sycl wheel full
	@ROPEWALK=.venv/bin/ropewalk scripts/gpu_test.sh docs/results/$$(date -u +%F)-gpu-test.md

cuda-report:  ## registers, spills, shared memory and size of the CUDA variants; fails on a spill
	@$(setup) system base
	@scripts/report.sh cuda

intel-report:  ## SIMD width, spills, loads and stores of all Intel GPU variants; fails on a spill; report in docs/results/
	@$(setup) system base
	@scripts/report.sh intel --all

bench:  ## the speed of every shape beside its floor and the peers installed; results in docs/results/
	@$(setup) system base sycl wheel full
	@bench/results.sh

format:  ## format C++ and Python in place
	@$(setup) base dev
	@scripts/lint.sh --fix

lint:  ## formatting, ruff, shellcheck, versions, headers, clang-tidy
	@$(setup) system base dev tidy
	@scripts/lint.sh

docs:  ## make the generated pages and Python's rope_ anew from their tables, and the site in build/site-html
	@$(setup) system base docs
	@scripts/docs.sh

clean:  ## remove what was built; .venv stays
	rm -rf build dist .venv/.stamps/wheel
