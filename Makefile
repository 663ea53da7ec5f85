# What is made from what. Up-to-date results are not made again; a stopped training goes on where it was.
#
#   make                              demo: paints its own data set first
#   make WIKIART=/scratch/wikiart     the same on real paintings: <root>/train/<Style>/*, <root>/test/<Style>/*
#   make report WIKIART=...           ... and renew report/ and the README's results from that run
#   make embed WIKIART=...            optional: classifiers on pre-trained backbones, whose weights come from the hub
#   make serve WIKIART=...            the page that labels new paintings, at http://127.0.0.1:7860/ (HOST=, PORT=)
#   make lora                         optional: LoRA on a small text-to-image model that it teaches first (minutes)
#   make lora WIKIART=... LORA='--styles Ukiyo_e'    the same on Stable Diffusion, from the hub; needs a GPU; with other
#                                     flags (--per-style, ...) it is trained anew
#   make benchmark                    optional: CPU time and memory beside what people use
#   make test                         the tests
#   make clean                        forget the demo's data and results

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
WIKIART ?=

ifneq ($(words x$(WIKIART) x$(RUN)),2)
$(error WIKIART and RUN must be paths without spaces; a link to the folder will do)
endif
small_lora := -c tiny.json --styles Drips
ifeq ($(WIKIART),)
DATA := data/demo
RUN ?= runs/demo
LORA ?= $(small_lora)
STAGES := -c demo.json
else
DATA := $(patsubst %/,%,$(WIKIART))
RUN ?= runs/$(notdir $(DATA))
STAGES :=
endif

FLAGS = $(SETTINGS) $(STAGES) --data $(DATA) --run $(RUN)
SHARED := wikiart.py layers.py windows.py folder.py runs.py config.json $(filter %.json,$(SETTINGS) $(STAGES)) \
    $(RUN)/inputs.txt

.PHONY: all pipeline embed features backbones lora painter serve benchmark report publish test lint clean FORCE
.DELETE_ON_ERROR:

# torch knows whether there is a GPU, but only once it is installed: so make calls itself with the settings for it.
define with_settings
+@if $(PY) -c 'import sys, torch; sys.exit(not torch.accelerator.is_available())'; then \
    echo 'make: settings for a GPU (config.json)'; $(MAKE) --no-print-directory $(1); \
else \
    echo 'make: no GPU here, so cpu.json is laid over config.json'; \
    $(MAKE) --no-print-directory $(1) SETTINGS='-c cpu.json'; \
fi
endef

all: $(VENV)/ready
	$(call with_settings,pipeline)

# The stages -----------------------------------------------------------------------------------------------------------

pipeline: $(RUN)/report.txt $(RUN)/clusters.md $(RUN)/style_grid.png
	@$(PY) report/build.py --run $(RUN)

data/demo/metadata.csv: demo.py
	rm -rf data/demo
	$(PY) demo.py --data data/demo

# The flags, and every folder of paintings and metadata.csv with its time of change: what is trained again when it changes.
$(RUN)/inputs.txt: $(if $(WIKIART),,data/demo/metadata.csv) FORCE
	@mkdir -p $(RUN); echo '$(FLAGS)' > $@.new; \
	find -L $(DATA) -name '.*' -prune -o -type d -printf '%P %T@\n' 2>/dev/null | sed 1d | sort >> $@.new; \
	find -L $(DATA)/metadata.csv -printf '%f %T@\n' 2>/dev/null >> $@.new; \
	if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(RUN)/classifier.pt: train.py $(SHARED)
	$(PY) train.py $(FLAGS) $(if $(wildcard $(RUN)/classifier.partial.pt),--resume)

$(RUN)/mlp/classifier.pt: train.py mlp.json $(SHARED)
	$(PY) train.py $(FLAGS) -c mlp.json --run $(RUN)/mlp \
	    $(if $(wildcard $(RUN)/mlp/classifier.partial.pt),--resume)

$(RUN)/report.txt: test.py scores.py figures.py $(RUN)/classifier.pt $(RUN)/mlp/classifier.pt
	$(PY) test.py $(FLAGS)

$(RUN)/autoencoder.pt: train_autoencoder.py losses.py $(SHARED)
	$(PY) train_autoencoder.py $(FLAGS) $(if $(wildcard $(RUN)/autoencoder.partial.pt),--resume)

# The same, which tells windows of one painting from others, too: its maps know of manner.
$(RUN)/manner/autoencoder.pt: train_autoencoder.py losses.py $(SHARED)
	$(PY) train_autoencoder.py $(FLAGS) --run $(RUN)/manner --manner-weight 0.15 \
	    $(if $(wildcard $(RUN)/manner/autoencoder.partial.pt),--resume)

$(RUN)/clusters.md: cluster.py figures.py $(RUN)/autoencoder.pt $(RUN)/manner/autoencoder.pt $(RUN)/classifier.pt \
    $(wildcard $(RUN)/embed_*.pt)
	$(PY) cluster.py $(FLAGS) --codes all --renew

style_epochs := $(if $(WIKIART),--epochs 14)
$(RUN)/style.pt: train_autoencoder.py losses.py $(RUN)/autoencoder.pt $(RUN)/classifier.pt
	$(PY) train_autoencoder.py $(FLAGS) --model StyleAutoencoder $(style_epochs) $(if $(wildcard $(RUN)/style.partial.pt),--resume)

$(RUN)/judge/classifier.pt: train.py judge.json $(SHARED)
	$(PY) train.py $(FLAGS) -c judge.json --run $(RUN)/judge \
	    $(if $(wildcard $(RUN)/judge/classifier.partial.pt),--resume)

# A second judge where there is one: embed.py --shrink 64 makes it.
JUDGES = --judges judge $(notdir $(wildcard $(RUN)/embed_*_64.pt))

$(RUN)/style_grid.png: style_transfer.py baselines.py scores.py figures.py losses.py $(RUN)/style.pt \
    $(RUN)/judge/classifier.pt $(wildcard $(RUN)/embed_*_64.pt)
	$(PY) style_transfer.py $(FLAGS) --method adain $(JUDGES)
	$(PY) style_transfer.py $(FLAGS) --method wct $(JUDGES)
	$(PY) style_transfer.py $(FLAGS) $(JUDGES)

# The rest -------------------------------------------------------------------------------------------------------------

ifeq ($(WIKIART),)
report:
	@echo 'make report publishes a run on real paintings: give WIKIART=/path'; exit 1
else
report: $(VENV)/ready $(VENV)/ready-embed $(VENV)/ready-magenta $(VENV)/ready-lora $(VENV)/ready-label
	$(call with_settings,backbones)
	$(call with_settings,publish)
endif

# Only the report needs these, several trainings each. What is finished stays, unless paintings or settings changed.
seeds := {"seed": [0, 1, 2]}
balance := {"balance": ["none", "resample", "sampler", "weights", "logit"]}
balance_flags := --epochs 8 --per-class 0
ablation := report/ablation.json
ablation_flags := --epochs 8
COMPARISONS := $(addprefix $(RUN)/,seeds.md balance.md ablation.md)

$(COMPARISONS): $(RUN)/%.md: $(SHARED) report/ablation.json | $(RUN)/report.txt
	@mkdir -p $(RUN)/$*
	@for file in $^; do find $(RUN)/$* \( -name classifier.pt -o -name flags.json \) ! -newer $$file -delete; done
	$(PY) tune.py '$($*)' --name $* $(FLAGS) -- $($*_flags)

# The autoencoder told the style with one ingredient each, told it in other ways, and all that is used.
style_course := --told style --hit-weight 0 --texture-weight 0 --critic-weight 0 --layout-weight 0
style_hit := --texture-weight 0 --critic-weight 0
style_texture := --hit-weight 0 --critic-weight 0
style_critic := --hit-weight 0 --texture-weight 0
style_absolute := --told style
style_means := --embed means
style_spy := --spy-weight 0.1
style_all :=
variants := course hit texture critic absolute means spy all
VARIANTS := $(patsubst %,$(RUN)/style_grid_%.png,$(variants))
$(patsubst %,$(RUN)/style_%/style.pt,$(variants)): $(RUN)/style_%/style.pt: train_autoencoder.py losses.py \
    $(RUN)/autoencoder.pt $(RUN)/classifier.pt
	$(PY) train_autoencoder.py $(FLAGS) --model StyleAutoencoder --run $(RUN)/style_$* --start $(RUN)/autoencoder.pt \
	    --guide $(RUN)/classifier.pt --epochs 5 $(style_$*) $(if $(wildcard $(RUN)/style_$*/style.partial.pt),--resume)

$(VARIANTS): $(RUN)/style_grid_%.png: $(RUN)/style_%/style.pt $(RUN)/style_grid.png
	$(PY) style_transfer.py $(FLAGS) --checkpoint $(RUN)/style_$*/style.pt --name $* --paintings 100 $(JUDGES)

# What others trained, to compare with; LITES="0.pth 1.pth 2.pth" are files of these weights, else they come from the hub.
lites := tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2
$(RUN)/embed_tf_efficientnet_lite2.pt: embed.py backbones.py scores.py $(SHARED)
	$(PY) embed.py $(FLAGS) --backbone $(lites) $(if $(LITES),--weights $(LITES))

$(RUN)/embed_tf_efficientnet_lite0_64.pt: $(RUN)/embed_tf_efficientnet_lite2.pt
	$(PY) embed.py $(FLAGS) --backbone $(word 1,$(lites)) $(addprefix --weights ,$(word 1,$(LITES))) \
	    --target style --shrink 64

$(RUN)/style_grid_magenta.png: style_transfer.py baselines.py scores.py figures.py $(RUN)/style_grid.png
	$(PY) style_transfer.py $(FLAGS) --method magenta --paintings 16 $(JUDGES)

# The demo has scenes whose true picture in every manner is known, and teaches the small text-to-image model.
$(RUN)/demo: FORCE
	+$(MAKE) --no-print-directory WIKIART= RUN=$(RUN)/demo LORA='$(small_lora)' pipeline painter

# Codes that clusters.md compares, and the second judge: made first, so that what depends on them sees them.
backbones: $(RUN)/embed_tf_efficientnet_lite2.pt $(RUN)/embed_tf_efficientnet_lite0_64.pt

# Speed comes last, one after the other, when nothing else of this runs.
publish: pipeline $(COMPARISONS) $(VARIANTS) $(RUN)/style_grid_magenta.png $(RUN)/demo
	@$(MAKE) --no-print-directory -j1 SETTINGS='$(SETTINGS)' $(RUN)/label.txt $(RUN)/benchmark.md
	$(PY) report/build.py --run $(RUN) --publish

$(RUN)/label.txt: label.py page.py panels.py uploads.py $(RUN)/classifier.pt
	$(PY) label.py $(firstword $(wildcard $(DATA)/test) $(DATA)) --measure $(SETTINGS) --run $(RUN) --port 0 > $@.new
	mv $@.new $@

embed: $(VENV)/ready-embed
	$(call with_settings,features)

features: $(RUN)/inputs.txt
	$(PY) embed.py $(FLAGS)

lora: $(VENV)/ready-lora
	$(call with_settings,painter)

painter: $(RUN)/lora_grid.png

export LORA
$(RUN)/lora/flags.txt: FORCE
	@mkdir -p $(@D); cmp -s - $@ <<< "$$LORA" || { rm -f $(RUN)/lora*.partial.pt; echo "$$LORA" > $@; }

# With --per-style there is an adapter for each style, so a file of make's own says that training has ended.
$(RUN)/lora/trained: lora.py diffusion.py tiny.json $(RUN)/lora/flags.txt $(SHARED)
	$(PY) lora.py train $(FLAGS) $(LORA) $$(compgen -G '$(RUN)/lora*.partial.pt' > /dev/null && echo --resume)
	touch $@

$(RUN)/lora_grid.png: figures.py $(RUN)/lora/trained $(RUN)/judge/classifier.pt
	$(PY) lora.py grid $(FLAGS) $(LORA)

$(VENV)/ready-lora: $(VENV)/ready requirements-lora.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-lora.txt
	touch $@

benchmark: $(VENV)/ready $(if $(WIKIART),,data/demo/metadata.csv)
	$(call with_settings,$(RUN)/benchmark.md)

# All of it runs on the CPU, so always with the settings for one.
$(RUN)/benchmark.md: benchmark.py measures.py train.py label.py cpu.json $(SHARED)
	$(PY) benchmark.py -c cpu.json $(STAGES) --data $(DATA) --run $(RUN)

$(VENV)/ready-magenta: $(VENV)/ready requirements-magenta.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-magenta.txt
	touch $@

$(VENV)/ready-embed: $(VENV)/ready requirements-embed.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-embed.txt
	touch $@

HOST ?= 127.0.0.1
PORT ?= 7860

serve: $(VENV)/ready-label
	$(PY) label.py --serve $(FLAGS) --host $(HOST) --port $(PORT)

$(VENV)/ready-label: $(VENV)/ready requirements-label.txt
	$(PY) -m pip install --disable-pip-version-check -r requirements-label.txt
	touch $@

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-test: $(VENV)/ready $(wildcard requirements-*.txt)
	$(PY) -m pip install --disable-pip-version-check -r requirements-test.txt
	touch $@

test: $(VENV)/ready-test
	$(PY) -m pytest

lint: $(VENV)/ready-test
	$(PY) -m ruff check . && $(PY) -m ruff format --check .

clean:
	rm -rf data/demo runs/demo
