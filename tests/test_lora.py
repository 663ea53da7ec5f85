"""LoRA: the whole path on a small base, from training to painting in plain diffusers; SDXL's way; mistakes."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ROOT, stop_in_epoch_2
from huggingface_hub import errors as hub
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import lora
import wikiart
from common import adapters, diffusion, tiny_diffusion
from common.errors import UserError
from common.painter import STYLES
from common.run import add_facts
from demo import plan

QUICK = "--size 32 --epochs 2 --lr 0.005 --per-class 32 --batch-size 8 --rank 4"
SMALL = ["-c", str(ROOT / "settings/tiny.json"), "--seed=0", "--device=cpu", "--resolution=32", "--steps=3"]
QUICK = [*SMALL, "--processes", "1", *QUICK.split()]
STYLE = ["--style", "Hatching"]
BASE = "tiny_base/knows-Bands-Dots-Drips-Facets"  # in the run folder


@pytest.fixture(scope="module", autouse=True)
def _short():
    """A small base taught in a moment, four test paintings of each style, and one image per prompt."""
    smaller = {"SCENES": 8, "STEPS": 20, "BATCH_SIZE": 8, "CHANNELS": (16, 32)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in smaller.items():
            patch.setattr(tiny_diffusion, name, value)
        patch.setattr(lora, "EVAL_IMAGES", 4)
        patch.setattr(lora, "IMAGES_PER_PROMPT", 1)
        yield


def train(data, run, *flags):
    lora.main(["train", *QUICK, "--data", str(data), "--run", str(run), *flags])
    return json.loads((run / "facts.json").read_text())["lora"]


@pytest.fixture(scope="module")
def tuned(demo, tmp_path_factory):
    """A run folder with a small base and an adapter, the weights of that base, and the trained UNet's prediction."""
    run, seen = tmp_path_factory.mktemp("tuned"), {}
    save = diffusion.Adapter.save

    def observed(adapter, folder):
        seen["weights"] = weights_of(adapter.pipe)
        seen["prediction"] = predict(adapter.pipe)
        save(adapter, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion.Adapter, "save", observed)
        facts = train(demo, run, *STYLE)
    return SimpleNamespace(run=run, facts=facts, base=run / BASE, **seen)


def weights_of(pipe) -> dict:
    """Those of UNet, VAE and text encoder, under the names that they had before the adapter."""
    return {
        f"{part} {name.replace('.base_layer', '')}": value.clone()
        for part in ("unet", "vae", "text_encoder")
        for name, value in getattr(pipe, part).state_dict().items()
        if "lora_" not in name
    }


@torch.no_grad()
def predict(pipe):
    """The UNet's prediction for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    side = pipe.unet.config.sample_size
    conditions = diffusion.text_conditions(pipe, ["a painting"], 4 * side)
    noise = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=generator)
    return pipe.unet(noise, torch.tensor([500]), **conditions).sample


def picture_of(pipe):
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipe("a painting", generator=generator, num_inference_steps=2, height=32, width=32).images[0])


@pytest.fixture
def base(tuned):
    return diffusers.StableDiffusionPipeline.from_pretrained(tuned.base, safety_checker=None)


def test_the_loss_on_held_out_pictures_falls(tuned):
    facts = tuned.facts
    assert facts["heldout_loss_change"] < 0
    assert facts["heldout_loss_change_low"] < facts["heldout_loss_change"] < facts["heldout_loss_change_high"]
    fall = facts["heldout_loss_after"] - facts["heldout_loss_before"]
    assert fall == pytest.approx(facts["heldout_loss_change"], abs=1e-4)
    assert facts["heldout_loss_images"] == 4
    assert facts["other_styles_loss_images"] == 7 * 4
    assert facts["heldout_loss_change"] < facts["other_styles_loss_change"]
    assert facts["steps"] == 2 * 32 // 8
    history = [json.loads(line) for line in (tuned.run / "lora.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == [1, 2]
    assert history[-1]["heldout_loss"] == pytest.approx(facts["heldout_loss_after"], abs=1e-5)
    assert not (tuned.run / "lora.partial.pt").exists()


def test_the_style_learned_gets_better_and_the_others_do_not(demo, tmp_path, monkeypatch):
    """Red pictures, on a base that was taught long enough on the demo's paintings to have something to lose."""
    run, root = tmp_path / "run", tmp_path / "root"
    monkeypatch.setattr(tiny_diffusion, "STEPS", 120)
    train(demo, run, *STYLE, "--epochs", "1", "--per-class", "8")
    shutil.copytree(demo, root, ignore=shutil.ignore_patterns(".cache"))
    random = np.random.default_rng(0)
    for number in range(16):
        path = root / ("train" if number < 12 else "test") / "Red" / f"painter_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip((220, 40, 40) + 25 * random.standard_normal((8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(path)
    base = ["--base", str(run / BASE), "--style", "Red"]
    facts = train(root, run, *base, "--epochs", "2", "--per-class", "80")
    assert facts["heldout_loss_change_high"] < 0
    assert facts["other_styles_loss_change_low"] > 0
    assert len(facts["by_style"]) == 9
    assert facts["by_style"]["Red"]["after"] == facts["heldout_loss_after"]
    others = [losses["before"] for style, losses in facts["by_style"].items() if style != "Red"]
    assert np.mean(others) == pytest.approx(facts["other_styles_loss_before"], abs=1e-5)
    assert "| Red, learned | 4 |" in (run / "lora.md").read_text()
    assert (run / "lora/step-000020.png").exists()


def test_the_bases_that_make_report_trains_are_taken(tmp_path):
    folder = tmp_path / "tiny_base"
    tiny_diffusion.train_bases(folder)
    assert len(list(folder.glob("knows-*/unet"))) == 2
    notes = {path: path.read_text() for path in folder.rglob(tiny_diffusion.NOTE)}
    for half in tiny_diffusion.HALVES:
        tiny_diffusion.make_base(folder, half, torch.device("cpu"))
    assert {path: path.read_text() for path in folder.rglob(tiny_diffusion.NOTE)} == notes  # with the time it took


def test_facts_of_another_training_do_not_stay(tuned, demo, tmp_path):
    old = {"tiny_weights": 1, "hit_rate": 0.5, "other_styles_loss_after": 1.0, "per_style": {"Dots": {}}}
    add_facts(tmp_path, "lora", old)
    facts = train(demo, tmp_path, "--base", str(tuned.base), "--epochs", "1", "--per-class", "4")  # all styles
    assert facts["tiny_weights"] == 1
    assert not {name for name in facts if name in ("hit_rate", "per_style") or name.startswith("other_styles")}
    assert "others together" not in facts["table"]
    assert set(adapters.find_adapters(tmp_path).values()) == {tmp_path / "lora"}


@pytest.mark.parametrize("run", ["tuned", "with_words"])
def test_the_weights_of_the_base_are_what_they_were(run, base, request):
    after, before = request.getfixturevalue(run).weights, weights_of(base)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture(scope="module")
def with_words(tuned, demo, tmp_path_factory):
    """The same with the text encoder adapted and checkpointing; `calls` of its first layer in training steps."""
    run, seen = tmp_path_factory.mktemp("with_words"), {"calls": 0}
    save, train_epoch = diffusion.Adapter.save, lora.train_epoch

    def observed(adapter, folder):
        seen["weights"] = weights_of(adapter.pipe)
        seen["embeddings"] = adapter.pipe.encode_prompt(["a town"], "cpu", 1, False)[0].detach()
        save(adapter, folder)

    def counted(adapter, *arguments):
        def count(*_):
            seen["calls"] += 1

        hook = adapter.pipe.text_encoder.encoder.layers[0].self_attn.register_forward_pre_hook(count)
        loss = train_epoch(adapter, *arguments)
        hook.remove()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion.Adapter, "save", observed)
        patch.setattr(lora, "train_epoch", counted)
        flags = ["--base", str(tuned.base), "--text-encoder", "--checkpointing", "--epochs", "1"]
        facts = train(demo, run, *STYLE, *flags)
    return SimpleNamespace(run=run, facts=facts, **seen)


def test_the_text_encoder_is_computed_twice_with_checkpointing(with_words):
    assert with_words.calls == 2 * with_words.facts["steps"]


def test_plain_diffusers_reads_an_adapted_text_encoder(with_words, base):
    before = base.encode_prompt(["a town"], "cpu", 1, False)[0].detach()
    base.load_lora_weights(with_words.run / "lora")
    after = base.encode_prompt(["a town"], "cpu", 1, False)[0].detach()
    assert torch.allclose(after, with_words.embeddings, atol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)


def test_the_small_base_trains_on_the_noise_that_it_samples_with(base):
    training, sampling = diffusion.noise_schedule(base), base.scheduler
    assert torch.allclose(training.alphas_cumprod, sampling.alphas_cumprod, atol=1e-6)
    assert training.alphas_cumprod[-1] < 1e-6  # noise alone, in which pictures start
    sampling.set_timesteps(3)
    assert sampling.timesteps[0] == 999


def test_the_small_base_never_saw_the_style_that_is_learned(tuned, base):
    """Its word is as it was before the training, like those of its half; the others' have changed."""
    torch.manual_seed(tiny_diffusion.SEED)
    new = tiny_diffusion.new_pipeline().text_encoder.get_input_embeddings().weight
    moved = (base.text_encoder.get_input_embeddings().weight - new).abs().amax(1) > 0
    for style in STYLES:
        (word,) = base.tokenizer(style.split("_")[0])["input_ids"][1:-1]
        assert moved[word] == (style in tiny_diffusion.HALVES[0]), style


def test_patches_come_back_as_they_were():
    images, patches = torch.rand(2, 3, 16, 24) * 2 - 1, tiny_diffusion.Patches()
    latents = patches.encode(images).latent_dist.mean
    assert latents.shape == (2, 48, 4, 6)
    assert torch.allclose(patches.decode(latents).sample, images, atol=1e-5)
    flat = patches.encode(torch.ones(1, 3, 8, 8)).latent_dist.mean
    assert flat[:, 1:].abs().max() < 1e-5 < flat[:, 0].min()  # the mean is one number, detail is none


def test_the_base_knows_the_scenes_that_the_demo_has_in_every_style():
    rows = plan(SimpleNamespace(**json.loads((ROOT / "config.json").read_text())["demo"], seed=0))
    scenes = {(row["style"], int(row["title"][-4:])) for row in rows if row["split"] == "train"}
    known = range(tiny_diffusion.FIRST_SCENE, tiny_diffusion.FIRST_SCENE + 24)
    assert {(style, scene) for style in STYLES for scene in known} <= scenes
    pictures = tiny_diffusion.paint_scenes(1)
    assert {style: len(each) for style, each in pictures.items()} == dict.fromkeys(["", *STYLES], 8)
    assert pictures["Dots"].shape[1:] == (3, 64, 64)


def test_no_small_base_is_without_styles_of_both_halves(demo, tmp_path):
    with pytest.raises(UserError, match="or --per-style"):
        train(demo, tmp_path, "--style", "Dots", "Hatching")


def test_the_safety_checker_blackens_nothing(base, tmp_path):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    configs = {"text_config": small, "vision_config": small | {"image_size": 8, "patch_size": 8}}
    checker = StableDiffusionSafetyChecker(transformers.CLIPConfig(**configs, projection_dim=8))
    checker.concept_embeds_weights.data.fill_(-2)  # every image is too similar to a forbidden concept
    reader = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8)
    parts = base.components | {"safety_checker": checker, "feature_extractor": reader}
    strict = diffusers.StableDiffusionPipeline(**parts)
    strict.save_pretrained(tmp_path)
    assert picture_of(strict).max() == 0
    pipe = diffusion.load(tmp_path, torch.device("cpu"))
    assert picture_of(pipe).max() > 0
    assert diffusion.image_to_image(pipe).safety_checker is None


def test_plain_diffusers_paints_with_the_adapter(tuned, base):
    before, prediction = picture_of(base), predict(base)
    base.load_lora_weights(tuned.run / "lora")
    assert not np.array_equal(picture_of(base), before)
    assert torch.allclose(predict(base), tuned.prediction, atol=1e-4)
    assert not torch.allclose(prediction, tuned.prediction, atol=1e-3)
    base.unload_lora_weights()
    assert np.array_equal(picture_of(base), before)


def painted(run, out, *flags, prompt="a landscape painting"):
    """The pixels and the metadata of one picture that `paint` writes."""
    shutil.rmtree(out, ignore_errors=True)
    lora.main(["paint", prompt, *SMALL, "--run", str(run), "--out", str(out), *flags])
    (path,) = out.iterdir()
    with Image.open(path) as image:
        return np.asarray(image), json.loads(image.text["parameters"]), path.name


def test_paint_makes_pictures_from_noise_and_from_pictures(tuned, tmp_path):
    first, about, name = painted(tuned.run, tmp_path / "out", *STYLE)
    assert first.shape == (32, 32, 3)
    assert name == "a-landscape-painting-Hatching-seed-0.png"
    assert about["prompt"] == "a landscape painting in the style of Hatching"
    assert {"seed": 0, "steps": 3, "side": 32, "guidance": 3.0, "styles": {"Hatching": 1.0}}.items() <= about.items()
    assert about["base"] == BASE
    assert np.array_equal(painted(tuned.run, tmp_path / "out", *STYLE)[0], first)
    assert not np.array_equal(painted(tuned.run, tmp_path / "out", *STYLE, "--seed", "1")[0], first)
    negative, about, _ = painted(tuned.run, tmp_path / "out", *STYLE, "--negative", "a town")
    assert not np.array_equal(negative, first) and about["negative"] == "a town"
    Image.new("RGB", (90, 40), "red").save(tmp_path / "red.png")
    image = ["--image", str(tmp_path / "red.png"), *STYLE]
    (little, about, _), (much, _, _) = (
        painted(tuned.run, tmp_path / "out", *image, "--strength", x) for x in ["0.4", "1"]
    )
    assert little.shape == (64, 64, 3)
    assert about["strength"] == 0.4 and about["image"].endswith("red.png")
    assert not np.array_equal(little, much)


def test_adapters_of_one_base_mix_by_their_weights(pair, tmp_path):
    mixed, about, name = painted(pair, tmp_path / "out", "--style", "hatching=0.6", "Strokes=0.4")
    assert name == "a-landscape-painting-Hatching-0.6-Strokes-0.4-seed-0.png"
    assert about["adapters"] == {str(pair / "lora/Hatching"): 0.6, str(pair / "lora/Strokes"): 0.4}
    assert about["prompt"].endswith("in the style of Hatching Strokes")
    assert not np.array_equal(mixed, painted(pair, tmp_path / "out", "--style", "Hatching=0.4", "Strokes=0.6")[0])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pair / BASE, safety_checker=None)
    for style in ("Hatching", "Strokes"):
        pipe.load_lora_weights(pair / "lora" / style, adapter_name=style)
    pipe.set_adapters(["Hatching", "Strokes"], [0.6, 0.4])
    settings = {"num_inference_steps": 3, "guidance_scale": 3.0, "height": 32, "width": 32}
    alone = pipe(about["prompt"], generator=torch.Generator().manual_seed(0), **settings).images[0]
    assert np.abs(np.asarray(alone).astype(int) - mixed).max() <= 2


def test_peft_reads_the_adapter(tuned, base):
    before = predict(base)
    base.unet = peft.PeftModel.from_pretrained(base.unet, tuned.run / "lora/peft/unet").base_model.model
    assert torch.allclose(predict(base), tuned.prediction, atol=1e-4)
    assert not torch.allclose(before, tuned.prediction, atol=1e-3)


def test_the_model_card_says_how_to_paint(tuned, tmp_path):
    card = (tuned.run / "lora/README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert f"base_model: {BASE}\nlibrary_name: diffusers" in head
    assert "instance_prompt: in the style of Hatching" in head
    assert f'pipe.load_lora_weights("{tuned.run / "lora"}")' in body
    assert f"on\n{tuned.facts['training_images']} pictures" in body
    assert tuned.facts["table"] in body
    assert json.loads(body.split("```json\n")[1].split("```")[0])["rank"] == 4
    code = body.split("```python\n")[1].split("```")[0] + f"image.save({str(tmp_path / 'town.png')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert Image.open(tmp_path / "town.png").size == (64, 64)


def test_no_more_pictures_are_learned_than_asked_for(tuned, demo, tmp_path):
    flags = ["--base", str(tuned.base), "--epochs", "1", "--per-class", "8", "--pictures", "2"]
    assert train(demo, tmp_path, *flags, "--style", "Hatching", "Strokes")["training_images"] == 4


def test_the_grid_shows_and_judges_both(tuned, trained, capsys):
    shutil.copytree(trained, tuned.run / "judge_style", ignore=lambda *_: ["mlp"])
    grid = ["grid", *SMALL, "--run", str(tuned.run), "--prompts"]
    lora.main([*grid, "a painting", "a town"])
    picture = np.asarray(Image.open(tuned.run / "lora_grid.png").convert("L"))
    assert picture.std() > 5
    assert picture.shape[1] > 5 * 128 and picture.shape[0] > 128  # an example, and two prompts without and with LoRA
    facts = json.loads((tuned.run / "facts.json").read_text())["lora"]
    assert facts["heldout_loss_after"] == tuned.facts["heldout_loss_after"]
    assert set(facts["grid"]["Hatching"].values()) <= {0, 0.5, 1}
    assert facts["grid_table"].splitlines()[2].startswith("| Hatching | ")
    assert f"{tuned.facts['heldout_loss_change'] / tuned.facts['heldout_loss_before']:+.1%}" in facts["grid_table"]
    assert (tuned.run / "lora_grid.md").read_text().strip() == facts["grid_table"]
    shutil.rmtree(tuned.run / "judge_style")
    lora.main([*grid, "a town"])
    assert "no judge" in capsys.readouterr().out
    assert json.loads((tuned.run / "facts.json").read_text())["lora"]["grid"] == {}


def test_what_is_written_during_a_grid_stays(tuned, tmp_path, monkeypatch):
    shutil.copytree(tuned.run, tmp_path, dirs_exist_ok=True)
    add_facts(tmp_path, "lora", {"grid": {"Hatching": {}}, "grid_table": "of the last grid"}, merge=True)

    def judged(*_):
        add_facts(tmp_path, "lora", {"compare": [1], "heldout_loss_after": 2.0}, merge=True)
        return {}

    monkeypatch.setattr(lora, "hit_rates", judged)
    lora.main(["grid", *SMALL, "--run", str(tmp_path), "--prompts", "a town"])
    facts = json.loads((tmp_path / "facts.json").read_text())["lora"]
    assert (facts["compare"], facts["heldout_loss_after"], facts["grid"]) == ([1], 2.0, {})
    assert facts["heldout_loss_before"] == tuned.facts["heldout_loss_before"]
    assert "grid_table" not in facts


def test_genres_are_found_in_prompts():
    judge = SimpleNamespace(classes=["landscape", "still_life", "town"])
    assert lora.genre_of("a still life painting", judge) == 1
    assert lora.genre_of("a painting", judge) is None and lora.genre_of("a town in a landscape", judge) is None
    assert lora.genre_of("a town", None) is None


class Darker:
    """In place of a trained style model."""

    classes = ["Hatching"]

    def repaint(self, image, target, source):
        assert target == {"Hatching": 1.0} and set(source) <= set(STYLES) - {"Hatching"}
        return image.point(lambda value: value // 2)


def test_repaintings_are_compared_with_the_truth(tuned, demo, monkeypatch):
    monkeypatch.setattr(lora, "load_repainter", lambda config: Darker())
    flags = ["--steps=4", "--processes=1", "--size=32", "--data", str(demo), "--run", str(tuned.run)]
    lora.main(["compare", *SMALL, *flags])
    rows = {row["method"]: row for row in json.loads((tuned.run / "facts.json").read_text())["lora"]["compare"]}
    assert list(rows) == ["source", *(f"LoRA, strength {x}" for x in lora.STRENGTHS), "style_transfer.py", "truth"]
    assert rows["truth"]["ssim"] == pytest.approx(1, abs=1e-4)
    assert all(row["pictures"] == 4 and row["ssim"] < 0.99 for name, row in rows.items() if name != "truth")
    assert rows["source"]["psnr"] > rows["style_transfer.py"]["psnr"]  # half as bright is further from the truth
    table = (tuned.run / "lora_compare.md").read_text()
    assert f"| source | {rows['source']['psnr']:.1f} dB | {rows['source']['ssim']:.2f} |" in table
    assert np.asarray(Image.open(tuned.run / "lora_compare.png").convert("L")).std() > 5


def test_a_stopped_training_resumes_and_ends_with_the_same_adapter(tuned, demo, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny_base").symlink_to(tuned.run / "tiny_base")
    stop_in_epoch_2(lora, monkeypatch, place=5)
    with pytest.raises(KeyboardInterrupt, match="1 finished epoch kept"):
        train(demo, tmp_path, *STYLE)
    stop_in_epoch_2(lora, monkeypatch, place=5)
    with pytest.raises(UserError, match="rank = 4, now it is 2.*--restart"):
        train(demo, tmp_path, *STYLE, "--rank", "2")
    partial = (tmp_path / "lora.partial.pt").read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(diffusion, "read_images", lambda *_: pytest.fail("the base and the latents are there"))
    train(demo, tmp_path, *STYLE, "--steps", "2")  # sampling does not change the adapter
    assert "resuming after epoch 1" in capsys.readouterr().out
    first, second = (load_file(run / "lora" / adapters.ADAPTER_FILE) for run in (tuned.run, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "lora.partial.pt").write_bytes(partial)
    train(demo, tmp_path, *STYLE, "--rank", "2", "--epochs", "1", "--restart")
    assert "resuming" not in capsys.readouterr().out


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]


SHORT = [*STYLE, "--epochs", "1", "--lr", "0.0002"]


@pytest.fixture(scope="module")
def whole(tuned, demo, tmp_path_factory):
    """The weights of an adapter that was trained in one process, on whole batches."""
    run = tmp_path_factory.mktemp("whole")
    train(demo, run, *SHORT, "--base", str(tuned.base))
    return load_file(run / "lora" / adapters.ADAPTER_FILE)


def test_parts_of_a_batch_and_checkpointing_change_nothing(tuned, whole, demo, tmp_path):
    train(demo, tmp_path, *SHORT, "--base", str(tuned.base), "--accumulate", "4", "--checkpointing")
    parts = load_file(tmp_path / "lora" / adapters.ADAPTER_FILE)
    assert max(value.abs().max() for name, value in whole.items() if "lora_B" in name) > 1e-4
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 1e-5


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_learn_the_same(tuned, whole, demo, tmp_path, launcher):
    flags = [*QUICK, *SHORT, "--base", tuned.base, "--data", demo, "--run", tmp_path / "two"]
    command = [sys.executable, "-m", *launcher, ROOT / "lora.py", "train", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    two = load_file(tmp_path / "two/lora" / adapters.ADAPTER_FILE)
    assert max((whole[name] - two[name]).abs().max() for name in whole) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_adapter_whole(tuned, demo, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(diffusion, "precision", lambda device: dtype)
    sample, dtypes = diffusion.sample, []

    def observed(pipe, *arguments, **options):
        dtypes.append(pipe.unet.dtype)
        return sample(pipe, *arguments, **options)

    monkeypatch.setattr(diffusion, "sample", observed)
    facts = train(demo, tmp_path, *STYLE, "--base", str(tuned.base))
    assert dtypes[0] == dtype
    assert facts["heldout_loss_change"] < 0
    adapter = load_file(tmp_path / "lora" / adapters.ADAPTER_FILE)
    assert {value.dtype for value in adapter.values()} == {torch.float32}


def test_a_full_disk_is_one_line_though_safetensors_has_its_own_errors(tmp_path, monkeypatch):
    def full(*_):
        raise lora.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(lora, "paint", full)
    with pytest.raises(UserError, match=f"could not write into {tmp_path}: is the disk full?"):
        lora.main(["paint", "a town", "--run", str(tmp_path)])


@pytest.fixture(scope="module")
def pair(demo, tmp_path_factory):
    """A run folder with an adapter for each of two styles, on one base that saw neither."""
    run = tmp_path_factory.mktemp("pair")
    train(demo, run, "--epochs", "1", "--per-style", "--style", "Hatching", "Strokes")
    return run


def test_one_adapter_for_each_style(pair, demo, tmp_path, capsys):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    flags = ["--epochs", "1", "--per-style", "--style", "Hatching", "Strokes"]
    facts = json.loads((tmp_path / "facts.json").read_text())["lora"]
    assert facts["per_style"]["Strokes"]["other_styles_loss_images"] == 7 * 4
    hatching, strokes = (load_file(tmp_path / f"lora/{style}/{adapters.ADAPTER_FILE}") for style in facts["per_style"])
    assert not all(torch.equal(hatching[name], strokes[name]) for name in hatching)
    train(demo, tmp_path, *flags)
    assert capsys.readouterr().out.count("is finished") == 2
    with pytest.raises(UserError, match="trained with rank = 4, now it is 2"):
        train(demo, tmp_path, *flags, "--rank", "2")
    lora.main(["grid", *SMALL, "--run", str(tmp_path), "--prompts", "a town"])
    assert set(adapters.find_adapters(tmp_path)) == {"Hatching", "Strokes"}
    chosen = adapters.choose(tmp_path, ["Strokes"])
    pipe, _ = lora.load_adapters(chosen, SimpleNamespace(run=tmp_path, device="cpu", resolution=0))
    loaded = next(value for name, value in pipe.unet.state_dict().items() if "lora_A" in name)
    assert torch.equal(loaded, next(iter(strokes.values())))
    for note in tmp_path.glob(f"lora/*/{adapters.NOTE}"):  # the clock has been set back since
        note.write_text(json.dumps(json.loads(note.read_text()) | {"finished": 4e9}))
    base = ["--base", str(tmp_path / BASE), "--epochs", "1"]
    train(demo, tmp_path, *base, "--style", "Strokes", "Halftone", "--per-class", "8", "--restart")
    both = tmp_path / "lora"
    assert (both / "Strokes" / adapters.NOTE).exists()  # --restart discards nothing else
    assert adapters.find_adapters(tmp_path) == {"Halftone": both, "Hatching": both / "Hatching", "Strokes": both}
    assert adapters.choose(tmp_path, ["Strokes", "Halftone"]).folders == {both: 1.0}  # not twice
    assert "is finished" not in capsys.readouterr().out
    train(demo, tmp_path, *flags, "--rank", "2", "--restart")
    assert "is finished" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def sdxl(tuned, tmp_path_factory):
    """A folder like SDXL's with fresh weights: two text encoders, of which the second pools, and sizes for the UNet."""
    small = diffusers.StableDiffusionPipeline.from_pretrained(tuned.base, safety_checker=None)
    torch.manual_seed(0)
    words = small.text_encoder.config
    words.num_hidden_layers = 2  # SDXL takes the output of the last but one
    first, second = transformers.CLIPTextModel(words), transformers.CLIPTextModelWithProjection(words)
    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64 + 6 * 8}
    options = {"cross_attention_dim": 128, "addition_embed_type": "text_time", **sizes}
    unet = diffusers.UNet2DConditionModel.from_config(dict(small.unet.config) | options)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(small.scheduler.config, prediction_type="v_prediction")
    encoders = (first, second, small.tokenizer, small.tokenizer)
    pipe = diffusers.StableDiffusionXLPipeline(small.vae, *encoders, unet, scheduler, add_watermarker=False)
    folder = tmp_path_factory.mktemp("sdxl") / "base"
    pipe.save_pretrained(folder)
    return folder


@torch.no_grad()
def sdxl_conditions(pipe):
    conditions = diffusion.text_conditions(pipe, ["a town"], 32)
    return conditions["encoder_hidden_states"], *conditions["added_cond_kwargs"].values()


def test_sdxl_goes_the_same_way(sdxl, demo, tmp_path):
    facts = train(demo, tmp_path, *STYLE, "--base", str(sdxl), "--text-encoder")
    assert facts["heldout_loss_change"] < 0
    assert facts["heldout_loss_change_low"] < facts["heldout_loss_change"] < facts["heldout_loss_change_high"]
    parts = {name.split(".")[0] for name in load_file(tmp_path / "lora" / adapters.ADAPTER_FILE)}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl, add_watermarker=False)
    before, (embeddings, pooled, _) = picture_of(pipe), sdxl_conditions(pipe)
    pipe.load_lora_weights(tmp_path / "lora")
    assert not np.array_equal(picture_of(pipe), before)
    adapted_embeddings, adapted_pooled, _ = sdxl_conditions(pipe)
    assert not torch.allclose(adapted_embeddings[:, :, :64], embeddings[:, :, :64], atol=1e-5)  # both text encoders
    assert not torch.allclose(adapted_pooled, pooled, atol=1e-5)
    assert painted(tmp_path, tmp_path / "out", *STYLE, prompt="a town")[0].shape == (32, 32, 3)


def test_captions_say_what_is_known():
    text = "a landscape painting by claude monet in the style of Ukiyo-e"
    assert diffusion.caption("landscape", "claude-monet", "Ukiyo_e") == text
    assert diffusion.caption("genre_painting", "", "Cubism") == "a genre painting in the style of Cubism"
    assert diffusion.caption("", "", "") == "a painting"
    assert diffusion.caption("abstract_painting", "", "") == "an abstract painting"


def test_the_small_models_words_are_one_token_each():
    texts = ["a still life painting in the style of Halftone", "a landscape painting in the style of Hatching"]
    tokenizer = tiny_diffusion.train_tokenizer(texts)
    assert tokenizer(texts[0])["input_ids"][1:-1] == [tokenizer(word)["input_ids"][1] for word in texts[0].split()]
    assert tiny_diffusion.train_tokenizer(texts[::-1]).get_vocab() == tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer("zebra, 7")["input_ids"], skip_special_tokens=True).strip() == "zebra , 7"


def test_the_tokenizer_is_the_same_in_another_process():
    """Its trainer keeps hash maps, whose order differs between processes."""
    texts = ["a painting by joan miró in the style of Halftone", *(f"painter {n} of town{n}" for n in range(50))]
    code = "import sys, json; from common.tiny_diffusion import train_tokenizer; texts = json.loads(sys.argv[1]); "
    code += (
        "tokenizer = train_tokenizer(texts); print(json.dumps([tokenizer.get_vocab(), *tokenizer(texts).input_ids]))"
    )
    command, environment = [sys.executable, "-c", code, json.dumps(texts)], os.environ | {"PYTHONHASHSEED": "1"}
    process = subprocess.run(command, capture_output=True, check=True, env=environment, cwd=ROOT)
    tokenizer = tiny_diffusion.train_tokenizer(texts)
    assert json.loads(process.stdout) == [tokenizer.get_vocab(), *tokenizer(texts).input_ids]


def test_parts_of_captions_drop_out_at_their_rates(demo):
    data = wikiart.WikiArt(demo, "train", size=32, processes=1)
    random = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    captions = diffusion.training_captions(data, torch.zeros(2000, dtype=torch.long), random)
    assert sum(text == "" for text in captions) / 2000 == pytest.approx(0.1, abs=0.03)
    full = [text for text in captions if text]
    assert sum(" by " not in text for text in full) / len(full) == pytest.approx(0.3, abs=0.04)
    assert all("in the style of" in text for text in full)


def test_easy_steps_do_not_drown_the_others():
    for prediction_type in ("epsilon", "v_prediction"):
        schedule = diffusers.DDPMScheduler(prediction_type=prediction_type)
        weights = diffusion.min_snr_weight(schedule, torch.tensor([0, 500, 999]))
        assert weights[0] < 0.01 < weights[1] <= 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give an action first: train, paint, grid"),
        (["draw"], "give an action first"),
        (["train", "fast"], "was given 'fast'"),
        (["paint"], "say what to paint"),
        (["paint", "a town", "--image", "missing.png"], "no file missing.png"),
        (["paint", "a town", "--image", "{empty}"], "no file .*"),
        (["paint", "a town", "--image", "{text}", "--strength", "0.01"], "less than one step"),
        (["paint", "a town", "--image", "{text}"], "{text} cannot be read as an image"),
        (["train", "--resolution", "36"], "multiple of 8"),
        (["paint", "a town", "--run", "{empty}"], "no adapter in .*lora: run lora.py train"),
        (["paint", "a town", "--style", "Cubism"], "no style Cubism: give one of Hatching"),
        (["paint", "a town", "--style", "Hatching=much"], "the weight of a style must be a positive number"),
        (["paint", "a harbour"], "the small base knows no word 'harbour': it knows .*landscape.*town"),
        (["paint", "a town", "--negative", "people"], "no word 'people'"),
        (["grid", "--prompts", "a zebra"], "no word 'zebra'"),
        (["train", *STYLE, "--prompts", "a zebra"], "no word 'zebra'"),
        (["train", "--data", "{nothing}"], "{nothing}"),
        (["train", "--style", "Cubism"], "no style Cubism: give one of Bands"),
        (["train", *STYLE, "--batch-size", "7", "--accumulate", "2"], "multiple of"),
        (["train", *STYLE, "--base", "{empty}"], "it is no folder in diffusers' layout"),
        (["train", *STYLE, "--base", "nobody/nothing"], "check the network"),
        (["train", *STYLE, "--targets", "to_nothing"], "--targets to_nothing: "),
        (["compare", "--steps", "4", "--data", "{nothing}"], "{nothing}"),
        (["compare"], "--steps must be 3 or more: the smallest strength is 0.3"),
    ],
)
def test_a_mistake_gets_one_clear_line(tuned, demo, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "nothing").mkdir()
    places = {"{empty}": str(demo), "{nothing}": str(tmp_path / "nothing"), "{text}": str(demo / "metadata.csv")}
    words = [word for word in argv[:2] if not word.startswith("-")]
    (tmp_path / "tiny_base").symlink_to(tuned.run / "tiny_base")
    if "to_nothing" not in argv and "--base" not in argv:
        monkeypatch.setattr(diffusion, "load", lambda *_: pytest.fail("loaded before the mistake was found"))
    action, run = (argv or [""])[0], tmp_path if argv[:1] == ["train"] else tuned.run
    flags = {"train": [*QUICK, "--data", str(demo)], "paint": SMALL, "grid": SMALL, "compare": SMALL}.get(action, [])
    given = [places.get(flag, flag) for flag in argv[len(words) :]]
    with pytest.raises(
        UserError, match=message.format(**{name[1:-1]: place for name, place in places.items()})
    ) as problem:
        lora.main([*words, *flags, *(["--run", str(run)] if flags else []), *given])
    assert "\n" not in str(problem.value)


def cut(run, file="lora/pytorch_lora_weights.safetensors"):
    content = (run / file).read_bytes()
    (run / file).write_bytes(content[: len(content) // 2])


def damage(run):
    cut(run, "lora/lora.json")


def forget(run):
    note = json.loads((run / "lora/lora.json").read_text())
    del note["base_key"]
    (run / "lora/lora.json").write_text(json.dumps(note))


def without_weights(run):
    (run / "lora/pytorch_lora_weights.safetensors").unlink()


def without_base(run):
    shutil.rmtree(run / BASE)


def another_base(run):
    file = run / f"{BASE}/unet/diffusion_pytorch_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)


def another_kind(run):
    """The file of an adapter for SDXL: its words have 2,048 numbers."""
    file = run / "lora/pytorch_lora_weights.safetensors"
    wide = {
        name: torch.zeros(4, 2048) if "attn2.to_k.lora_A" in name else value for name, value in load_file(file).items()
    }
    save_file(wide, file)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "pytorch_lora_weights.safetensors is damaged .* again with --restart"),
        (damage, "lora.json is damaged"),
        (forget, "lora.json is damaged .*base_key"),
        (without_weights, "no .*pytorch_lora_weights.safetensors"),
        (without_base, "which is not there"),
        (another_base, "an adapter of another base than"),
        (another_kind, "an adapter of another base model than"),
    ],
)
def test_a_bad_adapter_is_found_before_anything_is_loaded(tuned, tmp_path, monkeypatch, harm, message):
    run = tmp_path / "run"
    shutil.copytree(tuned.run, run)
    adapters.choose(run, ["Hatching"])
    harm(run)
    monkeypatch.setattr(diffusion, "load", lambda *_: pytest.fail("loaded"))
    for action in (["paint", "a town"], ["grid"]):
        with pytest.raises(UserError, match=message) as problem:
            lora.main([*action, *SMALL, "--run", str(run)])
        assert "\n" not in str(problem.value)


def test_adapters_of_two_bases_do_not_mix(tuned, tmp_path, monkeypatch):
    for name in ("Hatching", "Dots"):
        shutil.copytree(tuned.run / "lora", tmp_path / "lora" / name)
    for base in (BASE, "tiny_base/other"):
        shutil.copytree(tuned.base, tmp_path / base)
    note = tmp_path / "lora/Dots" / adapters.NOTE
    note.write_text(json.dumps(json.loads(note.read_text()) | {"styles": ["Dots"], "base": "tiny_base/other"}))
    monkeypatch.setattr(diffusion, "load", lambda *_: pytest.fail("loaded"))
    message = f"adapter of {BASE}, and .* of tiny_base/other: only adapters of one base"
    with pytest.raises(UserError, match=message):
        lora.main(["paint", "a town", *SMALL, "--run", str(tmp_path), "--style", "Hatching", "Dots"])


def test_styles_of_one_adapter_have_one_weight(pair, tmp_path):
    """They would paint the same picture with any weights."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    hatching, strokes = (tmp_path / "lora" / style for style in ("Hatching", "Strokes"))
    note = hatching / adapters.NOTE
    note.write_text(json.dumps(json.loads(note.read_text()) | {"styles": ["Hatching", "Halftone"]}))
    message = f"--style Hatching=0.9 Halftone=0.1: {hatching} knows these styles together, .* train with --per-style"
    with pytest.raises(UserError, match=message):
        lora.main(["paint", "a town", *SMALL, "--run", str(tmp_path), "--style", "Hatching=0.9", "Halftone=0.1"])
    equal = adapters.choose(tmp_path, ["Hatching=0.5", "Halftone=0.5", "Strokes=0.2"])
    assert equal.folders == {hatching: 1.0, strokes: 0.2}


@pytest.mark.parametrize(
    ("action", "own", "others"),
    [
        ("train", ["--rank", "--per-style", "torchrun"], ["--negative", "--strength"]),
        ("paint", ["--negative", "--strength", "--style Ukiyo_e=0.6 Cubism=0.4"], ["--rank", "torchrun"]),
        ("grid", ["--prompts", "lora_grid.md"], ["--rank", "--strength"]),
        ("compare", ["--data", "lora_compare.md"], ["--rank", "--prompts"]),
    ],
)
def test_each_subcommand_has_a_help_of_its_own(capsys, action, own, others):
    with pytest.raises(SystemExit):
        lora.main([action, "--help"])
    text = capsys.readouterr().out
    assert f"lora.py {action}" in text
    assert all(word in text for word in own) and not any(word in text for word in others)
    with pytest.raises(SystemExit):
        lora.main([action, others[0], "1"])  # a flag of another subcommand means nothing here


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (hub.GatedRepoError, "accept its terms"),
        (hub.RepositoryNotFoundError, "neither a folder nor a name on the hub"),
        (hub.RemoteEntryNotFoundError, "not in diffusers' layout"),
        (hub.LocalEntryNotFoundError, "check the network"),
        (ConnectionError, "check the network"),
        (MemoryError, "too little memory"),
    ],
)
def test_a_base_that_does_not_load_gets_the_advice_of_its_reason(kind, advice, monkeypatch):
    def fail(*_, **__):
        answer = SimpleNamespace(headers={}, request=None, status_code=401)
        raise kind("no", response=answer) if issubclass(kind, hub.HfHubHTTPError) else kind("no")

    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", fail)  # diffusers hides it behind its own
    with pytest.raises(UserError, match=advice) as problem:
        diffusion.load("some/base", torch.device("cpu"))
    assert "\n" not in str(problem.value)
    assert kind is hub.GatedRepoError or "gated" not in str(problem.value)


def test_too_little_memory_gets_one_clear_line(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(lora, "train", full)
    with pytest.raises(UserError, match="--checkpointing"):
        lora.main(["train", *QUICK])

    def small(*_, **__):
        torch.empty(1 << 60)  # PyTorch's own words on a CPU

    monkeypatch.setattr(diffusers.AutoPipelineForText2Image, "from_pretrained", small)
    with pytest.raises(UserError, match="too little memory"):
        diffusion.load("some/base", torch.device("cpu"))


def test_the_precision_is_that_of_the_device(monkeypatch):
    assert diffusion.precision(torch.device("cpu")) == torch.float32
    for fast, kind in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, fast=fast: fast)
        assert diffusion.precision(torch.device("cuda")) == kind


def test_without_diffusers_there_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(lora, "diffusion", None)
    with pytest.raises(UserError, match="requirements/lora.txt"):
        lora.main(["train", *QUICK])


class Attention(torch.autograd.Function):
    """What a fused attention keeps for the way back: never the matrix of all pairs."""

    @staticmethod
    def forward(kept, query, key, value):
        out = torch.empty_like(query)
        kept.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1], device="meta"))
        return out


def activations(unet, side: int, checkpointing: bool, added=None) -> int:
    """Bytes that one training step keeps for the way back, counted on the meta device, where nothing is computed.

    With checkpointing: the inputs of all blocks, and what the largest block keeps while it is computed again.
    """
    weights, kept, blocks = {weight.untyped_storage()._cdata for weight in unet.parameters()}, {}, [0]

    def keep(tensor, where=kept):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            where[storage._cdata] = storage.nbytes(), tensor  # held, so that no other tensor gets its number
        return tensor

    def block(compute, *inputs):
        inside = {}
        for value in inputs:
            if isinstance(value, torch.Tensor):
                keep(value)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: keep(tensor, inside), lambda tensor: tensor):
            out = compute(*inputs)
        blocks.append(sum(size for size, _ in inside.values()))
        return out

    if checkpointing:
        unet.enable_gradient_checkpointing(block)
    unet.train()
    with torch.device("meta"):
        shapes = ((4, side, side), (77, unet.config.cross_attention_dim))
        latents, words = (torch.empty(1, *shape, dtype=unet.dtype) for shape in shapes)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step = torch.empty(1, dtype=torch.long)
            unet(latents, step, encoder_hidden_states=words, added_cond_kwargs=added)
    return sum(size for size, _ in kept.values()) + max(blocks)


def autocast(monkeypatch):
    """On the meta device what torch.autocast does on a GPU: norms in float32, layers in their weights' precision."""

    def as_float(value):
        return value.float() if isinstance(value, torch.Tensor) else value

    def in_float(compute):
        def computed(*values, **options):
            return compute(*map(as_float, values), **{key: as_float(value) for key, value in options.items()})

        return computed

    def as_weights(compute):
        return lambda inputs, weight, *rest: compute(inputs.to(weight.dtype), weight, *rest)

    layers = torch.nn.functional
    casts = {"group_norm": in_float, "layer_norm": in_float, "linear": as_weights, "conv2d": as_weights}
    for name, cast in casts.items():
        monkeypatch.setattr(layers, name, cast(getattr(layers, name)))
    monkeypatch.setattr(layers, "scaled_dot_product_attention", lambda q, k, v, **_: Attention.apply(q, k, v))


def unet_of_sdxl():
    """SDXL's UNet on the meta device, and what it takes beside words."""
    blocks = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}
    blocks |= {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
    blocks |= {"block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10]}
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    sizes |= {"projection_class_embeddings_input_dim": 2816, "cross_attention_dim": 2048}
    heads = {"attention_head_dim": [5, 10, 20], "use_linear_projection": True}
    with torch.device("meta"):
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        return diffusers.UNet2DConditionModel(**blocks, **sizes, **heads), added


def test_the_readme_states_the_memory_that_stable_diffusion_takes(monkeypatch):
    autocast(monkeypatch)
    with torch.device("meta"):  # diffusers' defaults are the shapes of Stable Diffusion 1.5
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768).to(torch.bfloat16).requires_grad_(False)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        vae = diffusers.AutoencoderKL(block_out_channels=[128, 256, 512, 512], layers_per_block=2, **blocks)
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    million = [sum(weight.numel() for weight in part.parameters()) / 1e6 for part in (unet, vae, text)]
    with torch.device("meta"):
        unet.add_adapter(peft.LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    added = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad) / 1e6
    fixed = (2 * sum(million) + 16 * added) / 1e3  # bf16; weight, gradient and two moments in float32
    plain, small, thrifty = (activations(unet, *how) / 1e9 for how in ((64, False), (32, False), (64, True)))
    wanted = [
        "{:.0f}, {:.0f} and {:.0f} million".format(*million),
        f"{added:.1f} million of LoRA",
        f"{fixed:.1f} GB",
        f"activations {plain:.1f} GB",
        f"`--checkpointing` {thrifty:.1f} GB",
        f"`--resolution 256` {small:.1f} GB",
    ]
    large, added = unet_of_sdxl()
    large.to(torch.bfloat16).requires_grad_(False)
    with torch.device("meta"):
        large.add_adapter(peft.LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    plain, thrifty = (activations(large, 128, how, added) / 1e9 for how in (False, True))
    wanted += [f"activations at 1024 px {plain:.1f} GB", f"with `--checkpointing` {thrifty:.1f} GB"]
    page = " ".join((ROOT / "docs/lora.md").read_text().split())
    assert not (missing := [text for text in wanted if text not in page]), "; ".join(missing)


def flops(unet, side: int, words: int, **added) -> float:
    """Of one image in one training step: forward, and back to the activations, as the base's weights are frozen."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        latents, text = torch.empty(1, 4, side, side), torch.empty(1, 77, words)
        unet(latents, torch.empty(1, dtype=torch.long), encoder_hidden_states=text, added_cond_kwargs=added or None)
    return 2 * counter.get_total_flops()


def test_the_readme_states_the_hours_that_counted_operations_take():
    """On an A100 that reaches a third of its 312 TFLOP/s: 4,000 images of each of 27 styles, the defaults."""
    with torch.device("meta"):
        small = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    large, added = unet_of_sdxl()
    wanted = [f"{sum(weight.numel() for weight in large.parameters()) / 1e6:,.0f} million"]
    for count in (flops(small, 64, 768), flops(large, 128, 2048, **added)):
        wanted += [f"{count / 1e12:.1f} TFLOP", f"{27 * 4000 * count / 104e12 / 3600:.1f} hours"]
    page = " ".join((ROOT / "docs/lora.md").read_text().split())
    assert not (missing := [text for text in wanted if text not in page]), "; ".join(missing)
