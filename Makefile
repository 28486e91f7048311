PYTHON ?= python3

sample: .venv/installed
	.venv/bin/python sample.py

test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadfile

page: .venv/installed            # page.html: the bundled model in the browser, in one file
	.venv/bin/python -m lessons.page

demo: .venv/demo                 # a page to drop pictures in, mark and ask: http://127.0.0.1:7860/
	.venv/bin/python demo.py

exercise: .venv/installed        # make exercise N=1, or a hint instead: make exercise N=1 HINT=1
	.venv/bin/python -m lessons.exercises $(N) $(if $(HINT),--hint $(HINT))

notebook: .venv/notebook         # lessons/walkthrough.ipynb from top to bottom, compared with what is stored in it
	.venv/bin/python -m lessons.run_notebook

lora: .venv/installed            # teach the bundled model mirrors by an adapter, then grade what it learnt and forgot
	$(MAKE) tiny/build/mirror/adapter_model.safetensors
	.venv/bin/python -m tiny.mirror --grade tiny/build/mirror

# Everything below is for those who change the project; nothing above needs it.

check: .venv/installed           # style; `.venv/bin/ruff format .` mends most of it
	.venv/bin/pip install --quiet --disable-pip-version-check ruff==0.17.6
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

parity: .venv/installed          # live, against transformers and PEFT
	.venv/bin/pip install --quiet transformers==5.23.0 peft==0.21.2
	.venv/bin/python -m tests.parity
	.venv/bin/python -m tests.tokenizer_parity
	.venv/bin/python -m tests.parity_lora
	.venv/bin/python -m tests.parity_original
	.venv/bin/python -m pytest tests/test_quantize.py -k nothing_else_loads_it  # without transformers it is skipped

oldest: .venv-oldest/installed   # the suite on the oldest PyTorch that the README speaks of
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile

tiny: .venv/installed            # make tiny/llava again, from nothing but seeds; goes on where it was stopped (to begin anew, remove tiny/build)
	$(MAKE) tiny/build/llava/model.safetensors
	cp tiny/build/llava/*.json tiny/build/llava/tokenizer.model tiny/build/llava/model.safetensors tiny/llava/
	.venv/bin/python -m tiny.grade --json tiny/accuracy.json

tiny/mirror-data/instruct.json:
	.venv/bin/python -m tiny.mirror
tiny/build/mirror/adapter_model.safetensors: | tiny/mirror-data/instruct.json
	.venv/bin/python train.py --stage 2 --lora 16 --model tiny/llava --data tiny/mirror-data/instruct.json --images tiny/mirror-data \
		--out tiny/build/mirror --batch-size 8 --lr 2e-3

tiny/data/instruct.json:
	.venv/bin/python -m tiny.world
tiny/more-data/instruct.json:
	.venv/bin/python -m tiny.world --out tiny/more-data --count 40000 --each 2 --seed 1
tiny/build/base/model.safetensors:
	.venv/bin/python -m tiny.towers
tiny/build/aligned/model.safetensors: | tiny/build/base/model.safetensors tiny/data/instruct.json
	.venv/bin/python train.py --stage 1 --model tiny/build/base --data tiny/data/align.json --images tiny/data \
		--out tiny/build/aligned --batch-size 32 --lr 2e-3
tiny/build/tuned/model.safetensors: | tiny/build/aligned/model.safetensors
	.venv/bin/python train.py --stage 2 --model tiny/build/aligned --data tiny/data/instruct.json --images tiny/data \
		--out tiny/build/tuned --batch-size 16 --lr 1e-3 --epochs 3
tiny/build/llava/model.safetensors: | tiny/build/tuned/model.safetensors tiny/more-data/instruct.json
	.venv/bin/python train.py --stage 2 --model tiny/build/tuned --data tiny/more-data/instruct.json --images tiny/more-data \
		--out tiny/build/llava --batch-size 16 --lr 5e-4

tiny-vip: .venv/installed        # make tiny/vip-llava again, which goes on from tiny/llava
	$(MAKE) tiny/build/vip-llava/model.safetensors
	mkdir -p tiny/vip-llava
	cp tiny/build/vip-llava/*.json tiny/build/vip-llava/tokenizer.model tiny/build/vip-llava/model.safetensors tiny/vip-llava/
	.venv/bin/python -m tiny.grade --model tiny/vip-llava --json tiny/vip-accuracy.json

tiny/marked-data/instruct.json:
	.venv/bin/python -m tiny.marked
tiny/build/vip-base/model.safetensors:
	.venv/bin/python -m tiny.towers --style vip
tiny/build/vip-aligned/model.safetensors: | tiny/build/vip-base/model.safetensors tiny/marked-data/instruct.json
	.venv/bin/python train.py --stage 1 --model tiny/build/vip-base --data tiny/marked-data/align.json --images tiny/marked-data \
		--out tiny/build/vip-aligned --batch-size 32 --lr 2e-3 --dtype bfloat16
tiny/build/vip-refers/model.safetensors: | tiny/build/vip-aligned/model.safetensors
	.venv/bin/python -m tiny.refer --model tiny/build/vip-aligned --out tiny/build/vip-refers --steps 1600
tiny/build/vip-llava/model.safetensors: | tiny/build/vip-refers/model.safetensors
	.venv/bin/python -m tiny.refer --model tiny/build/vip-refers --out tiny/build/vip-llava --steps 1000 --lr 5e-4 --seed 1

.venv/installed: requirements.txt
	@echo "Installing PyTorch and seven small packages into .venv, once."
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/notebook: .venv/installed lessons/requirements.txt
	@.venv/bin/pip install --quiet --disable-pip-version-check -r lessons/requirements.txt
	@touch $@

.venv/demo: .venv/installed demo-requirements.txt
	@.venv/bin/pip install --quiet --disable-pip-version-check -r demo-requirements.txt
	@touch $@

.venv-oldest/installed: requirements.txt
	$(PYTHON) -m venv .venv-oldest
	sed 's/^torch==.*/torch==2.6.0/' requirements.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -r .venv-oldest/requirements.txt
	touch $@

.PHONY: sample test page demo exercise notebook lora check parity oldest tiny tiny-vip
