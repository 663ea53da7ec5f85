"""A small text-to-image model with the parts of Stable Diffusion, for machines without a GPU or a network.

    make_base(Path("runs/demo/tiny_base"), ["Halftone"], device)
    load(Path("runs/demo/tiny_base/knows-Bands-Dots-Drips-Facets"), device)    # of common.diffusion

It learns 64-px scenes of the demo's painter, painted for it, as they are and in one half of the styles. The words and
the brushwork of the other half are left for LoRA. The two bases, one for each half, are in report/tiny_base; without
that folder, or with other numbers below, they are trained anew. So few scenes are learned by heart: to invent others, a
model needs thousands of times as many steps.
"""

import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin  # diffusers looks for ModelMixin here when it loads a Patches
from diffusers.configuration_utils import register_to_config
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import diffusion
from common.errors import UserError
from common.names import display_name
from common.optim import MovingAverage, Optimizers
from common.painter import STYLES, Artist, Scene
from common.run import pick_device, write_text

SIDE = 64
SHARED = Path(__file__).resolve().parent.parent / "report/tiny_base"
HALVES = list(STYLES)[:4], list(STYLES)[4:]
SEED = 0
SCENES = 24  # few, so that minutes suffice to learn them
STEPS, BATCH_SIZE = 5000, 16
LR, EMA_DECAY = 0.003, 0.99
CHANNELS = (64, 96)
SCALES = (2.0, 1.0, 0.55)  # standard deviations of light and of the two hues, of the mean of a patch
NOTE = "made_from.json"
FIRST_SCENE = 40  # of the demo's first training scenes, which are painted in every style


class Patches(ModelMixin, ConfigMixin):
    """In place of an autoencoder: the cosine transform of 4 x 4 patches, as in JPEG. Exact, without training.

    Latents are (B, 48, H / 4, W / 4), scaled to standard deviations of about 1; images (B, 3, H, W) from -1 to 1.
    """

    @register_to_config
    def __init__(self, latent_channels: int = 48, scaling_factor: float = 1.0, block_out_channels: tuple = (3, 12, 48)):
        super().__init__()
        place = torch.arange(4)
        waves = torch.cos(torch.pi / 4 * (place + 0.5) * place[:, None]) / 2**0.5  # (frequency, place)
        waves[0] /= 2**0.5
        colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])  # light, and two of hue
        colours /= colours.norm(dim=1, keepdim=True)
        basis = torch.einsum("kc,fy,gx->kfgcyx", colours, waves, waves).reshape(48, 48)
        falling = 0.15 + 0.85 / (1 + place[:, None] + place) ** 2  # detail is fainter than the mean of a patch
        scale = torch.stack([falling * deviation for deviation in SCALES]).flatten()
        self.register_buffer("analysis", basis / scale[:, None])
        self.register_buffer("synthesis", basis.T * scale)

    def encode(self, images, return_dict: bool = True):
        latents = torch.einsum("kp,bphw->bkhw", self.analysis, torch.nn.functional.pixel_unshuffle(images, 4))
        exact = SimpleNamespace(mean=latents, mode=lambda: latents, sample=lambda generator=None: latents)
        return SimpleNamespace(latent_dist=exact) if return_dict else (exact,)

    def decode(self, latents, return_dict: bool = True, generator=None):
        images = torch.einsum("pk,bkhw->bphw", self.synthesis, latents)
        images = torch.nn.functional.pixel_shuffle(images, 4)
        return SimpleNamespace(sample=images) if return_dict else (images,)


# Pictures -------------------------------------------------------------------------------------------------------------


def paint_scene(number: int) -> np.ndarray:
    """A scene as it is and in every style: uint8 (1 + styles, 3, 64, 64)."""
    rng, scene = np.random.default_rng([SEED, number]), Scene(FIRST_SCENE + number, SEED, 4 * SIDE)
    pictures = [(255 * scene.colour.clip(0, 1)).astype(np.uint8)]
    for style, about in STYLES.items():
        artist = rng.choice(about.artists.split()[:-2])  # the others paint the demo's test pictures
        pictures.append(Artist(artist).paint(scene, style))
    return np.stack([np.asarray(Image.fromarray(picture).reduce(4)).transpose(2, 0, 1) for picture in pictures])


def paint_scenes(processes: int) -> dict:
    """The pictures uint8 (SCENES, 3, 64, 64) by style, "" for scenes as they are; number n shows GENRES[n % 4]."""
    with ProcessPoolExecutor(processes or None) as pool:
        painted = torch.from_numpy(np.stack(list(pool.map(paint_scene, range(SCENES)))))
    return {style: painted[:, number] for number, style in enumerate(["", *STYLES])}


# The model ------------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with one token for each word of the texts; it spells other words in bytes."""
    letters = sorted(ByteLevel.alphabet())
    # As special tokens, because the trainer would number the letters that end words in the order of a hash map.
    alphabet = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    options = {"end_of_word_suffix": "</w>", "show_progress": False}
    tokenizer = CLIPTokenizer().backend_tokenizer
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=1_000_000, special_tokens=alphabet, **options))
    model = json.loads(tokenizer.to_str())["model"]
    return CLIPTokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]], model_max_length=24)


def new_pipeline() -> diffusers.StableDiffusionPipeline:
    """The parts with new weights; their vocabulary has the demo's artists, too, for an adapter's captions."""
    artists = [artist for about in STYLES.values() for artist in about.artists.split()]
    tokenizer = train_tokenizer(captions(["", *artists]))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 64, "max_position_embeddings": 24}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text_encoder = CLIPTextModel(CLIPTextConfig(**sizes, **tokens))
    blocks = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    blocks |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    blocks |= {"block_out_channels": CHANNELS, "layers_per_block": 1, "norm_num_groups": 8}
    blocks |= {"cross_attention_dim": 64, "attention_head_dim": [1, 4]}  # the latter is the number of heads
    blocks |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}  # words reach every layer
    unet = diffusers.UNet2DConditionModel(**blocks, in_channels=48, out_channels=48, sample_size=SIDE // 4)
    # A schedule that ends in noise alone can make dark and bright pictures (Lin et al. 2024). The image is predicted:
    # the noise, in 48 channels, is more than a narrow network can carry (Li and He 2025).
    noise = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True, "prediction_type": "sample"}
    scheduler = diffusers.DPMSolverMultistepScheduler(**noise, timestep_spacing="trailing", steps_offset=1)
    parts = (Patches(), text_encoder, tokenizer, unet, scheduler)
    return diffusers.StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


# Training -------------------------------------------------------------------------------------------------------------


def make_base(folder: Path, unseen: list[str], device, processes: int = 0) -> dict:
    """Put a base that has seen none of these styles into folder / base_name(unseen); returns facts.

    One of the same numbers that is there already is kept, and one in report/tiny_base is copied.
    """
    numbers, known = numbers_of_training(), known_styles(unseen)
    base, shared = folder / base_name(unseen), SHARED / base_name(unseen)
    with diffusion.exclusive(folder / "bases"):
        if not is_made(base, numbers) and is_made(shared, numbers):
            shutil.rmtree(base, ignore_errors=True)
            shutil.copytree(shared, base, ignore=shutil.ignore_patterns(NOTE))
            write_text(base / NOTE, (shared / NOTE).read_text())  # last: now it is complete
        if not is_made(base, numbers):
            train_base(base, known, device, processes)
    note = read_note(base)
    return {"tiny_cpu_minutes": note["cpu_minutes"], "tiny_weights": note["weights"], "tiny_scenes": SCENES}


def train_bases(folder) -> None:
    """Train both bases anew, as `make report` does, so that those of report/ are made by its code."""
    for half in HALVES:
        train_base(Path(folder, base_name(half)), known_styles(half), pick_device("auto"))


def numbers_of_training() -> list:
    return [SEED, STEPS, BATCH_SIZE, SCENES, list(CHANNELS)]


def train_base(folder: Path, known: list[str], device, processes: int = 0) -> None:
    """Train a base on the scenes as they are and in the styles `known`, and save it in the folder."""
    start, pictures = time.process_time(), paint_scenes(processes)
    torch.manual_seed(SEED)
    fit(pipe := new_pipeline().to(device), {style: pictures[style] for style in ("", *known)})
    save(pipe, folder, known, start)


def known_styles(unseen: list[str]) -> list[str]:
    """The half of the styles that has none of these. Raises UserError where each half has some."""
    for half in HALVES:
        if not set(half) & set(unseen):
            return half
    halves = " or ".join(", ".join(map(display_name, half)) for half in HALVES)
    raise UserError(f"the small bases know half of the styles each: give --style of {halves}, or --per-style")


def base_name(unseen: list[str]) -> str:
    return "knows-" + "-".join(known_styles(unseen))


def read_note(folder: Path) -> dict:
    return json.loads((folder / NOTE).read_text())


def is_made(folder: Path, numbers: list) -> bool:
    return (folder / NOTE).exists() and read_note(folder)["numbers"] == numbers


def save(pipe, folder: Path, known: list[str], start: float) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pipe.unet.half()  # half of the size; it is read as float32
    pipe.save_pretrained(folder)
    about = {"numbers": numbers_of_training(), "cpu_minutes": (time.process_time() - start) / 60}
    about["weights"] = sum(weight.numel() for part in diffusion.networks(pipe) for weight in part.parameters())
    about["words"] = sorted({word for text in captions(styles=("", *known)) for word in text.lower().split()})
    write_text(folder / NOTE, json.dumps(about))  # last, here too


def captions(artists=("",), styles=("", *STYLES)) -> list[str]:
    return [
        diffusion.caption(genre, artist, style)
        for genre in (*Scene.GENRES, "")
        for style in styles
        for artist in artists
    ]


def fit(pipe, pictures: dict) -> None:
    """Train UNet and text encoder on pictures {style: uint8 (N, 3, 64, 64)}; number n shows GENRES[n % 4]."""
    pipe.unet.to(memory_format=torch.channels_last)
    networks = torch.nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder}).train()
    optimizer, average = Optimizers(networks, LR, 0.0, STEPS), MovingAverage(networks, EMA_DECAY)
    schedule, styles = diffusion.noise_schedule(pipe), list(pictures)
    for _ in (bar := tqdm(range(STEPS), "small base", leave=False)):
        drawn = torch.randint(len(styles), (BATCH_SIZE,)).tolist()
        rows = [(styles[style], int(torch.randint(len(pictures[styles[style]]), ()))) for style in drawn]
        images = torch.stack([pictures[style][row] for style, row in rows]).to(pipe.device) / 127.5 - 1
        captions = [diffusion.caption(Scene.GENRES[row % 4], "", style) for style, row in rows]
        captions = [text if keep else "" for text, keep in zip(captions, torch.rand(BATCH_SIZE) > 0.1, strict=True)]
        latents, timesteps = pipe.vae.encode(images).latent_dist.mean, torch.randint(1000, (BATCH_SIZE,))
        losses = diffusion.denoising_loss(pipe, schedule, latents, torch.randn(latents.shape), timesteps, captions)
        loss = (losses * diffusion.min_snr_weight(schedule, timesteps).to(losses.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(networks)
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    networks.load_state_dict(average.module.state_dict())
    networks.eval()
