# The stages that only the report needs: `make report WIKIART=...`. Included by the Makefile, whose variables it uses.

.PHONY: report backbones publish
ifeq ($(WIKIART),)
report:
	@echo 'make report publishes a run on real paintings: give WIKIART=/path'; exit 1
else
hide := HIDE='-c report/settings.json'
report: $(addprefix $(VENV)/ready-,embed magenta lora label)
	$(call with_settings,backbones $(hide))
	$(call with_settings,publish $(hide))
# One row of the table of the style model's losses, e.g. `make report-critic WIKIART=...`.
report-%: $(VENV)/ready-embed
	$(call with_settings,$(RUN)/style_grid_$*.png $(hide))
endif

# Trainings of the classifier that are compared. A finished one is kept, unless something that it depends on is newer.
seeds := {"seed": [0, 1, 2]}
balance := {"balance": ["none", "resample", "sampler", "weights", "logit"]}
balance_flags := --epochs 8 --per-class 0
ablation := report/ablation.json
ablation_flags := --epochs 8
COMPARISONS := $(addprefix $(RUN)/,seeds.md balance.md ablation.md)
$(COMPARISONS): $(RUN)/%.md: $(RUN)/stamps/classifier $(RUN)/paintings.txt report/ablation.json | $(RUN)/report.txt
	@mkdir -p $(RUN)/$*
	@for file in $^; do find $(RUN)/$* \( -name 'classifier*.pt' -o -name flags.json \) ! -newer $$file -delete; done
	$(PY) tune.py '$($*)' --name $* $(FLAGS) -- $($*_flags)

# The style model with one loss at a time, with other conditions, and with everything.
variant = train_style.py --run $(RUN)/style_$(1) --start $(RUN)/autoencoder.pt --features $(RUN)/classifier.pt --epochs 5
style_course := $(call variant,course) --condition style --style-ce-weight 0 --style-stat-weight 0 --critic-weight 0 \
    --layout-weight 0
style_ce := $(call variant,ce) --style-stat-weight 0 --critic-weight 0
style_stat := $(call variant,stat) --style-ce-weight 0 --critic-weight 0
style_critic := $(call variant,critic) --style-ce-weight 0 --style-stat-weight 0
style_absolute := $(call variant,absolute) --condition style
style_means := $(call variant,means) --embed means
style_adversary := $(call variant,adversary) --adversary-weight 0.1
style_all := $(call variant,all)
variants := course ce stat critic absolute means adversary all
VARIANTS := $(patsubst %,$(RUN)/style_grid_%.png,$(variants))
$(patsubst %,$(RUN)/style_%/style.pt,$(variants)): $(RUN)/style_%/style.pt: $(RUN)/stamps/style_% \
    $(RUN)/autoencoder.pt $(RUN)/classifier.pt
	$(call train,style_$*)
$(VARIANTS): $(RUN)/style_grid_%.png: $(RUN)/style_%/style.pt $(RUN)/style_grid.png
	$(call run,repaint) --checkpoint $(RUN)/style_$*/style.pt --name $* --paintings 100

# Pre-trained networks to compare with; LITES="0.pth 1.pth 2.pth" are files of their weights, otherwise the hub has them.
lites := tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2
embed := embed.py --backbone $(lites) $(if $(LITES),--weights $(LITES))
embed_64 := embed.py --backbone $(word 1,$(lites)) $(addprefix --weights ,$(word 1,$(LITES))) --target style --shrink 64
$(RUN)/embed_tf_efficientnet_lite2.pt: $(RUN)/stamps/embed $(RUN)/paintings.txt
	$(call run,embed)
$(RUN)/embed_tf_efficientnet_lite0_64.pt: $(RUN)/stamps/embed_64 $(RUN)/embed_tf_efficientnet_lite2.pt
	$(call run,embed_64)
$(RUN)/style_grid_magenta.png: $(RUN)/style_grid.png
	$(call run,repaint) --method magenta --paintings 16

# The codes that clusters.md compares, and the second judge: made first, so that $(wildcard ...) finds them.
backbones: $(RUN)/embed_tf_efficientnet_lite2.pt $(RUN)/embed_tf_efficientnet_lite0_64.pt

# In the demo the same scene exists in every style, so repaintings can be compared with the true picture; it also
# trains the small text-to-image model.
$(RUN)/demo: FORCE
	+$(MAKE) --no-print-directory WIKIART= HIDE= RUN=$(RUN)/demo LORA='$(small_lora)' pipeline painter

# Speed is measured last, when nothing else of this runs.
publish: pipeline $(COMPARISONS) $(VARIANTS) $(RUN)/style_grid_magenta.png $(RUN)/demo
	@$(MAKE) --no-print-directory -j1 $(RUN)/label.txt $(RUN)/benchmark.md
	$(PY) report/build.py --run $(RUN) --publish
label := label.py
$(RUN)/label.txt: $(RUN)/stamps/label $(wildcard serve/*.py) $(RUN)/classifier.pt
	$(PY) label.py $(firstword $(wildcard $(DATA)/test) $(DATA)) --measure $(SETTINGS) --run $(RUN) --port 0 > $@.new
	mv $@.new $@
