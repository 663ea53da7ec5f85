# What is made from what. Results that are up to date are not made again; an interrupted training resumes.
#
#   make                              demo: draws its own data set first
#   make WIKIART=/scratch/wikiart     the same on real paintings: <root>/train/<Style>/*, <root>/test/<Style>/*
#   make report WIKIART=...           ... and renew report/ and the README's results from that run (report/report.mk)
#   make label FOLDER=my_folder       labels.csv and labels.png: the styles of the pictures below a folder (OUT=)
#   make embed WIKIART=...            optional: classifiers on pre-trained backbones, whose weights come from the hub
#   make serve WIKIART=...            the page that labels new paintings, at http://127.0.0.1:7860/ (HOST=, PORT=)
#   make lora                         optional: LoRA on a small text-to-image model, in minutes
#   make lora WIKIART=... LORA='--style Ukiyo_e'     the same on Stable Diffusion from the hub (needs a GPU)
#   make benchmark                    optional: CPU time and memory compared with common alternatives
#   make test, make clean             run the tests; delete the demo's data and results
#   make clean-cache WIKIART=...      delete the decoded pixels of these paintings; the scripts write them again

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
WIKIART ?=
HOST := 127.0.0.1
PORT := 7860
ifneq ($(words x$(WIKIART) x$(RUN)),2)
$(error WIKIART and RUN must be paths without spaces; a link to the folder will do)
endif
small_lora := -c settings/tiny.json --style Halftone
ifeq ($(WIKIART),)
DATA := data/demo
RUN ?= runs/demo
LORA ?= $(small_lora)
else
DATA := $(patsubst %/,%,$(WIKIART))
RUN ?= runs/$(notdir $(DATA))
endif
DEMO := $(if $(WIKIART),,-c settings/demo.json)
FLAGS = $(SETTINGS) $(DEMO) $(HIDE) --data $(DATA) --run $(RUN)
.PHONY: all pipeline embed features label lora painter serve benchmark test lint clean clean-cache FORCE
.DELETE_ON_ERROR:

# torch knows whether there is a GPU, but only once it is installed: so make calls itself with the settings for it.
define with_settings
+@if $(PY) -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then \
    echo 'make: settings for a GPU (config.json)'; $(MAKE) --no-print-directory $(1); \
else \
    echo 'make: no GPU here, so settings/cpu.json overrides config.json'; \
    $(MAKE) --no-print-directory $(1) SETTINGS='-c settings/cpu.json'; \
fi
endef

all: $(VENV)/ready
	$(call with_settings,pipeline)

# What each stage runs: a script and its own flags; $(FLAGS) come between them.
classifier := train.py
mlp := train.py -c settings/mlp.json --run $(RUN)/mlp
judge := train.py -c settings/judge.json $(if $(WIKIART),,--epochs 10 --optimizer adamw) --run $(RUN)/judge
judge_style = $(if $(WIKIART),$(judge),train.py --size 64 --crop 64 --seed 1 --run $(RUN)/judge)_style
judge_genre = $(subst judge_style,judge_genre,$(judge_style)) --target genre
autoencoder := train_autoencoder.py
contrastive := train_autoencoder.py --run $(RUN)/contrastive --contrastive-weight 0.15
style := train_style.py
test := test.py
clusters := cluster.py --codes all
repaint := style_transfer.py --judges judge $(notdir $(firstword $(wildcard $(RUN)/embed_*_224.pt)))
lora = lora.py $(LORA)
benchmark := benchmark.py -c settings/cpu.json $(DEMO)
run = $(PY) $(firstword $($(1))) $(2) $(FLAGS) $(wordlist 2,99,$($(1)))

# make compares times: where the clock was set back, so are the times of these files.
$(if $(wildcard $(PY)),$(shell $(PY) -m common.stamp --clock $(RUN) $(wildcard data/demo.stamp data/demo/metadata.csv)))
# A stage's stamp is rewritten when its settings, flags or code change: see common/stamp.py.
$(RUN)/stamps/%: FORCE
	@$(PY) -m common.stamp $@ $(firstword $($*)) $(FLAGS) $(wordlist 2,99,$($*))

# Every folder of paintings, and every file with its size and time of change.
$(RUN)/paintings.txt: $(if $(WIKIART),,data/demo/metadata.csv) FORCE
	@mkdir -p $(RUN); find -L $(DATA) -mindepth 1 -name '.*' -prune -o -type d -printf '%P\n' -o \
	    -printf '%P %s %T@\n' 2>/dev/null | LC_ALL=C sort > $@.new && if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# A training resumes from its partial checkpoint, unless something that it depends on is newer.
restart = $(if $(wildcard $(1)),$$(ls -t $^ $(1) | head -1 | grep -q '\.partial\.pt$$' || echo --restart))
train = $(call run,$(1)) $(call restart,$(@:.pt=.partial.pt))
# The stages -----------------------------------------------------------------------------------------------------------
pipeline: $(RUN)/report.txt $(RUN)/clusters.md $(RUN)/style_grid.png
	@$(PY) report/build.py --run $(RUN)
data/demo.stamp: FORCE
	@$(PY) -m common.stamp $@ demo.py
data/demo/metadata.csv: data/demo.stamp
	rm -rf data/demo
	$(PY) demo.py --data data/demo

$(RUN)/classifier.pt: $(RUN)/stamps/classifier $(RUN)/paintings.txt
	$(call train,classifier)
$(patsubst %,$(RUN)/%/classifier.pt,mlp judge judge_style judge_genre): $(RUN)/%/classifier.pt: $(RUN)/stamps/% $(RUN)/paintings.txt
	$(call train,$*)
$(RUN)/autoencoder.pt: $(RUN)/stamps/autoencoder $(RUN)/paintings.txt
	$(call train,autoencoder)
$(RUN)/contrastive/autoencoder.pt: $(RUN)/stamps/contrastive $(RUN)/paintings.txt
	$(call train,contrastive)
$(RUN)/style.pt: $(RUN)/stamps/style $(RUN)/classifier.pt
	$(call train,style)

$(RUN)/report.txt: $(RUN)/stamps/test common/figures.py $(RUN)/classifier.pt $(RUN)/mlp/classifier.pt
	$(call run,test)
$(RUN)/clusters.md: $(RUN)/stamps/clusters common/figures.py $(RUN)/autoencoder.pt $(RUN)/contrastive/autoencoder.pt \
    $(RUN)/classifier.pt $(wildcard $(RUN)/embed_*.pt)
	$(call run,clusters)
$(RUN)/style_grid.png: $(RUN)/stamps/repaint common/figures.py $(RUN)/style.pt \
    $(RUN)/judge/classifier.pt $(wildcard $(RUN)/embed_*_224.pt)
	$(call run,repaint) --method adain --paintings 100
	$(call run,repaint) --method wct --paintings 100
	$(call run,repaint)

# The rest -------------------------------------------------------------------------------------------------------------
embed: $(VENV)/ready-embed
	$(call with_settings,features)
features: $(RUN)/paintings.txt
	$(PY) embed.py $(FLAGS)
label: $(VENV)/ready
	$(PY) label.py '$(or $(FOLDER),$(error give FOLDER=my_folder, of pictures))' --run $(RUN) $(if $(OUT),--out '$(OUT)')
serve: $(VENV)/ready-label
	$(PY) label.py serve $(FLAGS) --host $(HOST) --port $(PORT)
lora: $(VENV)/ready-lora
	$(call with_settings,painter)
painter: $(RUN)/lora_grid.png
# With --per-style there is an adapter for each style, so a file of make's own says that training has finished.
$(RUN)/lora/trained: $(RUN)/stamps/lora $(RUN)/paintings.txt
	$(call run,lora,train) $(or $(call restart,$(RUN)/lora*.partial.pt),--restart) && mkdir -p $(@D) && touch $@
$(RUN)/lora_grid.png: common/figures.py $(RUN)/lora/trained $(addprefix $(RUN)/judge_,style/classifier.pt genre/classifier.pt)
	$(PY) lora.py grid --run $(RUN) $(patsubst %.json,-c %.json,$(filter %.json,$(LORA)))

benchmark: $(VENV)/ready-embed $(if $(WIKIART),,data/demo/metadata.csv)
	$(call with_settings,$(RUN)/benchmark.md)
$(RUN)/benchmark.md: $(RUN)/stamps/benchmark $(RUN)/stamps/classifier $(RUN)/paintings.txt
	$(call run,benchmark)

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r $<
	touch $@
$(VENV)/ready-%: requirements/%.txt $(VENV)/ready
	$(PY) -m pip install --disable-pip-version-check -r $<
	touch $@
$(VENV)/ready-test: $(wildcard requirements/*.txt)
test: $(VENV)/ready-test; $(PY) -m pytest -n auto --dist loadfile
lint: $(VENV)/ready-test
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
clean:; rm -rf data/demo data/demo.stamp runs/demo
clean-cache:
	@$(PY) -c 'from common.images import remove_cache; remove_cache("$(DATA)")'
include report/report.mk
