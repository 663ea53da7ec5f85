"""A small latent diffusion model with the parts of Stable Diffusion, trained here where there is no network or no GPU.

    make_base(Path("runs/demo/tiny_base"), data, 32, 0, device)    # side, seed; writes a folder in diffusers' layout

It learns from paintings and their genres, without words for styles, which LoRA then adds.
"""

import json
import shutil
import time
from pathlib import Path

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import diffusion
from common.optim import linear_warmup_decay
from common.run import write_text

VAE_STEPS, UNET_STEPS, BATCH_SIZE = 500, 2500, 16
VAE_CROP = 32


def make_base(folder: Path, data, side: int, seed: int, device, threads: int = 0) -> dict:
    """Train a base on a data set's images (side x side) and genres, and save it to `folder`; returns facts.

    A base of the same data and settings that is there already is kept, and {} returned.
    """
    identity, start = [data.fingerprint, side, [VAE_STEPS, UNET_STEPS], seed], time.process_time()
    note = folder / "made_from.json"
    with diffusion.exclusive(folder):
        if note.exists() and json.loads(note.read_text()) == identity:
            return {}
        torch.manual_seed(seed)
        captions = map(diffusion.caption, data.genres, data.artists, data.styles)
        pipe = new_pipeline(list(captions), side)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.to(device)
        images = diffusion.read_images([data.root / path for path in data.paths], side, threads)
        fit_vae(pipe.vae, images)
        fit_unet(pipe, images, data.genres)
        shutil.rmtree(folder, ignore_errors=True)
        pipe.save_pretrained(folder)
        write_text(note, json.dumps(identity))  # last: a base without it is incomplete
    return {
        "tiny_weights": sum(weight.numel() for network in diffusion.networks(pipe) for weight in network.parameters()),
        "tiny_cpu_minutes": (time.process_time() - start) / 60,
        "tiny_images": len(data),
    }


def train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with one token for each word of the texts; it spells other words in bytes."""
    letters = sorted(ByteLevel.alphabet())
    # As special tokens, because the trainer would number the letters that end words in the order of a hash map.
    alphabet = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    options = {"end_of_word_suffix": "</w>", "show_progress": False}
    tokenizer = CLIPTokenizer().backend_tokenizer
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=1_000_000, special_tokens=alphabet, **options))
    model = json.loads(tokenizer.to_str())["model"]
    return CLIPTokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]], model_max_length=32)


def new_pipeline(texts: list[str], side: int) -> diffusers.StableDiffusionPipeline:
    """The parts with new weights, for images (side x side); the vocabulary is that of the texts."""
    tokenizer = train_tokenizer(texts)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 64, "max_position_embeddings": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text_encoder = CLIPTextModel(CLIPTextConfig(**sizes, **tokens))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    blocks |= {"block_out_channels": [16, 32, 64], "mid_block_add_attention": False}
    vae = diffusers.AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=8, sample_size=side)
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2}
    blocks |= {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8}
    blocks |= {"cross_attention_dim": 64, "attention_head_dim": [1, 2]}  # the latter is the number of heads
    unet = diffusers.UNet2DConditionModel(**blocks, sample_size=side // 4)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's
    scheduler = diffusers.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    parts = (vae, text_encoder, tokenizer, unet, scheduler)
    return diffusers.StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def fit(parameters: list, loss, steps: int, lr: float, name: str) -> None:
    """Minimise loss() with AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr)
    schedule = linear_warmup_decay(optimizer, steps, warmup=0.05)
    for _ in tqdm(range(steps), name, leave=False):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def fit_vae(vae, images) -> None:
    """Train the autoencoder on random crops of images uint8 (N, 3, S, S); scale its latents to standard deviation 1."""

    def crops():
        batch = images[torch.randint(len(images), (BATCH_SIZE,))]
        top, left = torch.randint(images.shape[-1] - VAE_CROP + 1, (2,))
        return batch[:, :, top : top + VAE_CROP, left : left + VAE_CROP].to(vae.device) / 127.5 - 1

    def loss():
        batch = crops()
        latents = vae.encode(batch).latent_dist
        return (vae.decode(latents.sample()).sample - batch).abs().mean() + 1e-5 * latents.kl().mean() / 64

    fit(list(vae.parameters()), loss, VAE_STEPS, 2e-3, "small autoencoder")
    with torch.no_grad():
        latents = torch.cat([vae.encode(crops()).latent_dist.mean for _ in range(8)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


def fit_unet(pipe, images, genres) -> None:
    """Train the UNet and the text encoder on images uint8 (N, 3, S, S); captions name the genre (N,) alone."""
    schedule, latents = diffusion.noise_schedule(pipe), diffusion.encode(pipe, images.split(32))

    def loss():
        items, keep = torch.randint(len(latents), (BATCH_SIZE,)), torch.rand(BATCH_SIZE) > 0.1
        timesteps = torch.randint(schedule.config.num_train_timesteps, (BATCH_SIZE,))
        texts = [
            diffusion.caption(genres[item], "", "") if kept else "" for item, kept in zip(items, keep, strict=True)
        ]
        noise = torch.randn(BATCH_SIZE, *latents.shape[1:])
        losses = diffusion.denoising_loss(pipe, schedule, latents[items], noise, timesteps, texts)
        return (losses * diffusion.min_snr_weight(schedule, timesteps).to(losses.device)).mean()

    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    fit(parameters, loss, UNET_STEPS, 3e-3, "small diffusion model")
