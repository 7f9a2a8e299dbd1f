.PHONY: setup demo eval bench test check gpu-check serve

setup:            ## .venv with stock SGLang and the embedded model; returns at once when it is there
	@bash scripts/setup.sh

demo: setup       ## the main job: stock SGLang, real model, reuse off and on side by side
	@.venv/bin/kvshare demo

eval: setup       ## answer quality of every method on real text, small version (some 15 minutes); out/eval
	@.venv/bin/kvshare eval --cases 24 --ratios 0.18 --methods naive,random,epic,cacheblend,dhd,default,quality,speed

# In turns on a CPU; there alone it was tried, and there alone two servers surely fit beside each other.
bench: setup      ## load test: stock SGLang (lpm) and ours on the same RAG and agent traces (under 15 minutes); out/bench
	@.venv/bin/kvshare bench $(if $(wildcard /proc/driver/nvidia/version /dev/nvidia0),,--interleave 5) --traces benchmarks/traces/rag.jsonl,benchmarks/traces/agents.jsonl

# In two processes: each engine that tests/engine makes leaves threads of SGLang and gloo behind, 2,500 at the end of it.
test: setup       ## everything: unit, property, ops, contract, then end-to-end on the real server. ARGS="..." are pytest's
	@first=0; .venv/bin/python -m pytest -q $(ARGS) tests --ignore tests/e2e || first=$$?; \
	.venv/bin/python -m pytest -q $(ARGS) tests/e2e && exit $$first

check: setup      ## style: format and lint, in seconds. Import rules and SGLang's seams: pytest tests/contract
	@bash scripts/check.sh

gpu-check: setup  ## everything that needs an NVIDIA GPU; benchmarks/gpu. ARGS="--stages ops,kernels", see --help
	@.venv/bin/python scripts/gpu_check.py $(ARGS)

serve: setup      ## a server on port 30000; ARGS="..." are SGLang's own
	@.venv/bin/kvshare serve $(ARGS)
