"""A small text-to-image model with the parts of Stable Diffusion, for machines without a GPU or a network.

    make_base(Path("runs/demo/tiny_base"), ["Halftone"], device)
    load(Path("runs/demo/tiny_base/without-Halftone"), device)    # of common.diffusion: a folder in diffusers' layout

It learns 64-px scenes of the demo's painter, painted for it: first as they are, without a style, then in all styles but
the unseen ones, whose words and brushwork are left for LoRA. The first part takes most of the time; its result, which
all bases share, is in report/tiny_base. Without that folder, or with other numbers below, it is trained anew.
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
from common.names import display_name
from common.optim import MovingAverage, Optimizers
from common.painter import STYLES, Artist, Scene
from common.run import write_text

SIDE = 64
SHARED = Path(__file__).resolve().parent.parent / "report/tiny_base"  # the base that knows no style
SEED = 0
SCENES, PAINTERS = 64, 2  # few, so that minutes suffice to learn them; of each style
PLAIN_STEPS, STYLE_STEPS, BATCH_SIZE = 3000, 350, 16
LR, EMA_DECAY = 0.003, 0.99
CHANNELS = (64, 96)
SCALES = (2.0, 1.0, 0.55)  # standard deviations of light and of the two hues, of the mean of a patch
NOTE = "made_from.json"
FIRST_SCENE = 1_000_000  # the demo's own numbers are small, so that no picture is in both


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
    """A scene as it is and, by several painters, in every style: uint8 (1 + styles * PAINTERS, 3, 64, 64)."""
    rng, scene = np.random.default_rng([SEED, number]), Scene(FIRST_SCENE + number, SEED, 2 * SIDE)
    pictures = [(255 * scene.colour.clip(0, 1)).astype(np.uint8)]
    for style, about in STYLES.items():
        artists = about.artists.split()[:-2]  # the others paint the demo's test pictures
        pictures += [Artist(name).paint(scene, style) for name in rng.choice(artists, PAINTERS, replace=False)]
    return np.stack([np.asarray(Image.fromarray(picture).reduce(2)).transpose(2, 0, 1) for picture in pictures])


def paint_scenes(processes: int) -> dict:
    """The pictures uint8 (N, 3, 64, 64) by style, "" for scenes as they are; number n shows GENRES[n % 4]."""
    with ProcessPoolExecutor(processes or None) as pool:
        painted = np.stack(list(pool.map(paint_scene, range(SCENES))))
    styles = {}
    for number, style in enumerate(STYLES):
        of_style = painted[:, 1 + number * PAINTERS : 1 + (number + 1) * PAINTERS]
        styles[style] = of_style.swapaxes(0, 1).reshape(-1, *painted.shape[2:])
    return {style: torch.from_numpy(pictures) for style, pictures in ({"": painted[:, 0]} | styles).items()}


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
    """Train a base on all styles but the unseen ones, and save it to folder / base_name(unseen); returns facts.

    A base of the same numbers that is there already is kept.
    """
    plain_numbers = [SEED, PLAIN_STEPS, BATCH_SIZE, SCENES, list(CHANNELS)]
    numbers = [*plain_numbers, STYLE_STEPS, PAINTERS]
    base, plain = folder / base_name(unseen), folder / base_name(STYLES)
    seen = [style for style in STYLES if style not in unseen]
    with diffusion.exclusive(folder / "bases"):
        if not is_made(plain, plain_numbers) and is_made(SHARED, plain_numbers):
            shutil.rmtree(plain, ignore_errors=True)
            shutil.copytree(SHARED, plain, ignore=shutil.ignore_patterns(NOTE))
            write_text(plain / NOTE, (SHARED / NOTE).read_text())  # last: now it is complete
        start = time.process_time()
        pictures = None if is_made(plain, plain_numbers) and is_made(base, numbers) else paint_scenes(processes)
        torch.manual_seed(SEED)
        if not is_made(plain, plain_numbers):
            fit(pipe := new_pipeline().to(device), {"": pictures[""]}, PLAIN_STEPS, "scenes without a style")
            save(pipe, plain, plain_numbers, start)
            start = time.process_time()
        if seen and not is_made(base, numbers):
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(plain, safety_checker=None).to(device)
            names = ", ".join(map(display_name, unseen))
            fit(pipe, {style: pictures[style] for style in seen}, STYLE_STEPS, f"all styles but {names}")
            save(pipe, base, numbers, start)
    first, second = read_note(plain), read_note(base)
    minutes = {"tiny_plain_cpu_minutes": first["cpu_minutes"], "tiny_cpu_minutes": second["cpu_minutes"]}
    return minutes | {"tiny_weights": first["weights"], "tiny_scenes": SCENES}


def base_name(unseen) -> str:
    """The folder of a base: "plain" is the one that no style was left for."""
    left_out = [style for style in STYLES if style in unseen]
    return "plain" if len(left_out) == len(STYLES) else "without-" + ("-".join(left_out) or "none")


def read_note(folder: Path) -> dict:
    return json.loads((folder / NOTE).read_text())


def is_made(folder: Path, numbers: list) -> bool:
    return (folder / NOTE).exists() and read_note(folder)["numbers"] == numbers


def save(pipe, folder: Path, numbers: list, start: float) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    pipe.unet.half()  # half of the size; it is read as float32
    pipe.save_pretrained(folder)
    about = {"numbers": numbers, "cpu_minutes": (time.process_time() - start) / 60}
    about["weights"] = sum(weight.numel() for part in diffusion.networks(pipe) for weight in part.parameters())
    about["words"] = sorted({word for text in captions() for word in text.lower().split()})
    write_text(folder / NOTE, json.dumps(about))  # last, here too


def captions(artists=("",)) -> list[str]:
    return [
        diffusion.caption(genre, artist, style)
        for genre in (*Scene.GENRES, "")
        for style in (*STYLES, "")
        for artist in artists
    ]


def fit(pipe, pictures: dict, steps: int, name: str) -> None:
    """Train UNet and text encoder on pictures {style: uint8 (N, 3, 64, 64)}; number n shows GENRES[n % 4]."""
    pipe.unet.to(memory_format=torch.channels_last)
    networks = torch.nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder}).train()
    optimizer, average = Optimizers(networks, LR, 0.0, steps), MovingAverage(networks, EMA_DECAY)
    schedule, styles = diffusion.noise_schedule(pipe), list(pictures)
    for _ in (bar := tqdm(range(steps), name, leave=False)):
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
