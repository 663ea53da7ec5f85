# The stages that only the report needs: `make report WIKIART=...`. Included by the Makefile, whose variables it uses.

.PHONY: report backbones publish
ifeq ($(WIKIART),)
report:
	@echo 'make report publishes a run on real paintings: give WIKIART=/path'; exit 1
else
hide := HIDE='-c report/settings.json'
$(VENV)/ready-magenta: | $(VENV)/ready-embed
$(VENV)/ready-lora: | $(VENV)/ready-magenta
report: $(VENV)/ready-lora
	$(call with_settings,backbones $(hide))
	$(call with_settings,publish $(hide))
endif

# Pre-trained networks; LITES="0.pth 1.pth 2.pth" are files of their weights, otherwise the hub has them.
lites := tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2

# Trainings of the classifier that are compared. A finished one is kept, unless its code, settings or paintings are newer.
# After changing a row of ablation.json, remove that row's folders: tune.py says which.
seeds := {"seed": [0, 1, 2]}
balance := {"balance": ["none", "resample", "sampler", "weights", "logit"]}
balance_flags := --per-class 0
# Expanded in the recipe, by a shell, because the demo is drawn after make has read this.
unknown = {"holdout": [$(shell cd $(DATA)/train 2>/dev/null || cd $(DATA); printf '"%s", ' */ | sed 's,/",",g; s/, $$//')]}
unknown_flags := $(if $(WIKIART),--epochs 8 --crop 96 --tta-scales 2.0 1.5)
ablation_0 := report/ablation.json
ablation_1 := $(ablation_0)
ablation_0_flags := --seed 0
ablation_1_flags := --seed 1
COMPARISONS := $(addprefix $(RUN)/,seeds.md balance.md ablation_0.md ablation_1.md unknown.md)
$(RUN)/ablation_0.md $(RUN)/ablation_1.md: report/ablation.json
# A row whose settings are those of the run's own classifier, or of another table's row, is copied: row=folder.
setting = $(shell sed -n 's/^$(1) = "\?\([^"]*\)"\?$$/\1/p' $(RUN)/stamps/classifier)
seeds_copied = $(call setting,seed)=.
balance_copied = $(addsuffix =.,$(filter-out resample,$(call setting,balance)))
ablation_0_copied = $(if $(filter 0,$(call setting,seed)),no_balance=balance/none)
$(RUN)/ablation_0.md: | $(RUN)/balance.md
$(COMPARISONS): $(RUN)/%.md: $(RUN)/stamps/classifier $(RUN)/stamps/test $(RUN)/paintings.txt | $(RUN)/report.txt
	@mkdir -p $(RUN)/$*
	@find $(RUN)/$* -name report.txt ! -newer $(RUN)/stamps/test -delete  # tested again
	@for file in $(filter-out %.json %/test,$^); do find $(RUN)/$* \( -name 'classifier*.pt' -o -name flags.json \) ! -newer $$file -delete; done
	@for pair in $($*_copied); do row=$(RUN)/$*/$${pair%=*}; [ -e $$row/classifier.pt ] || \
	    { mkdir -p $$row && cp $(addprefix $(RUN)/$${pair#*=}/,facts.json report.txt classifier.pt) $$row; } || exit; done
	$(PY) tune.py '$($*)' --name $* $(FLAGS) -- $($*_flags)

# Combined codes of another seed.
other := $(RUN)/clusters_1
contrastive_1 := $(firstword $(contrastive)) --run $(other)/contrastive $(wordlist 4,99,$(contrastive)) --seed 1
clusters_1 := cluster.py --codes combined --run $(other) --seed 1
$(other)/contrastive/autoencoder.pt: $(RUN)/stamps/contrastive_1 $(RUN)/paintings.txt
	$(call train,contrastive_1)
$(other)/clusters.md: $(RUN)/stamps/clusters_1 $(other)/contrastive/autoencoder.pt
	$(call run,clusters_1)

# The assignment's recipe, an autoencoder with embeddings of styles; and the style model with a pre-trained feature
# network. To compare with.
conditional := train_autoencoder.py --run $(RUN)/conditional --conditional
$(RUN)/conditional/autoencoder.pt: $(RUN)/stamps/conditional $(RUN)/paintings.txt
	$(call train,conditional)
style_backbone := train_style.py --run $(RUN)/style_backbone --epochs 24 --features $(word 1,$(lites)) \
    $(addprefix --weights ,$(word 1,$(LITES)))
$(RUN)/style_backbone/style.pt: $(RUN)/stamps/style_backbone $(RUN)/classifier.pt
	mkdir -p $(@D) && cp $(RUN)/classifier.pt $(@D)
	$(call train,style_backbone)

embed := embed.py --backbone $(lites) $(if $(LITES),--weights $(LITES))
embed_224 := embed.py --backbone $(word 3,$(lites)) $(addprefix --weights ,$(word 3,$(LITES))) --target style \
    --shrink 224 --stages 0
$(RUN)/embed_tf_efficientnet_lite2.pt: $(RUN)/stamps/embed $(RUN)/paintings.txt
	$(call run,embed)
$(RUN)/embed_tf_efficientnet_lite2_224.pt: $(RUN)/stamps/embed_224 $(RUN)/embed_tf_efficientnet_lite2.pt
	$(call run,embed_224)
# The classifier that label.py takes where its backbone's weights are installed.
$(RUN)/head/report.txt: $(RUN)/stamps/test $(RUN)/embed_tf_efficientnet_lite2.pt
	@mkdir -p $(@D)
	$(PY) test.py $(FLAGS) --run $(@D) --checkpoint $(RUN)/head_tf_efficientnet_lite0.pt
# More rows of the table of style transfer: other methods, and the model itself on fewer or on validation paintings.
autoencoder_row := --method autoencoder --paintings 100
backbone_row := --checkpoint $(RUN)/style_backbone/style.pt --name backbone --paintings 100
magenta_row := --method magenta --paintings 100
fewer_row := --name fewer --paintings 100
validation_row := --split validation --judges judge
ROWS := $(patsubst %,$(RUN)/more/style_grid_%.png,autoencoder backbone magenta fewer validation)
$(RUN)/more/style_grid_autoencoder.png: $(RUN)/conditional/autoencoder.pt
$(RUN)/more/style_grid_backbone.png: $(RUN)/style_backbone/style.pt
$(ROWS): $(RUN)/more/style_grid_%.png: $(RUN)/style_grid.png
	$(call run,repaint) $($*_row)

# The codes that clusters.md compares, and the second judge: made first, so that $(wildcard ...) finds them.
backbones: $(RUN)/embed_tf_efficientnet_lite2.pt $(RUN)/embed_tf_efficientnet_lite2_224.pt

# In the demo the same scene exists in every style, so repaintings can be compared with the true picture. There LoRA
# learns each style in turn, on a small base that has seen four of the others; finished adapters are kept.
# make report trains these bases as well; otherwise those of report/ are copied.
$(RUN)/stamps/bases: FORCE
	@$(PY) -m common.stamp $@ --code common.tiny_diffusion.train_bases
$(RUN)/bases.txt: $(RUN)/stamps/bases | $(RUN)/report.txt
	rm -rf $(addprefix $(RUN)/demo/,tiny_base lora lora_compare.png)  # adapters are of their base
	$(PY) -c 'from common.tiny_diffusion import train_bases; train_bases("$(RUN)/demo/tiny_base")'
	touch $@
$(RUN)/demo: $(RUN)/bases.txt FORCE
	+$(MAKE) --no-print-directory WIKIART= HIDE= RUN=$(RUN)/demo pipeline $(addprefix $(RUN)/demo/,lora_compare.png unknown.md)
	@cp data/demo/demo.png $@ && cp data/demo.stamp $@/stamps/demo

.PHONY: eight_styles
eight_styles: $(VENV)/ready-lora
	$(call with_settings,$(RUN)/lora_compare.png)
each_style := lora.py -c settings/tiny.json --per-style
$(RUN)/lora_compare.png: $(RUN)/stamps/each_style $(RUN)/paintings.txt common/figures.py $(RUN)/style.pt \
    $(RUN)/judge_style/classifier.pt $(RUN)/judge_genre/classifier.pt
	@for file in $(wordlist 1,2,$^); do find $(RUN) -name 'lora*.partial.pt' ! -newer $$file -delete \
	    -o -path '$(RUN)/lora/*/lora.json' ! -newer $$file -delete; done
	$(call run,each_style,train)
	$(PY) lora.py grid --run $(RUN) -c settings/tiny.json
	$(PY) lora.py compare $(FLAGS) -c settings/tiny.json

# Speed is measured last, when nothing else of this runs.
publish: pipeline $(COMPARISONS) $(other)/clusters.md $(RUN)/head/report.txt $(ROWS) $(RUN)/demo
	@$(MAKE) --no-print-directory -j1 $(RUN)/benchmark.md
	$(PY) report/build.py --run $(RUN) --publish
