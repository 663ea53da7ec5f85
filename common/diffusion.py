"""Text-to-image diffusion with diffusers: loading a base, captions and latents, the denoising loss, LoRA, sampling.

    pipe = load("stable-diffusion-v1-5/stable-diffusion-v1-5", device)    # or a folder in diffusers' layout; SDXL too
    losses = denoising_loss(pipe, noise_schedule(pipe), latents, noise, timesteps, captions)    # (B,)

Latents are float16 (N, channels, S / 8, S / 8), S / 4 of the small base, on the CPU until they are used.
"""

import contextlib
import fcntl
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import peft
import torch
import transformers
from huggingface_hub import errors as hub
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from common.adapters import ADAPTER_FILE
from common.errors import UserError
from common.images import named_errors, open_rgb, read_image
from common.names import display_name
from common.run import atomic_write, save_checkpoint, to_device

SNR_GAMMA = 5.0
DROP_CAPTION, DROP_PART = 0.1, 0.3  # probabilities of an empty caption, and of one without the genre or the artist

for library in (diffusers, transformers):
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


# The base model -------------------------------------------------------------------------------------------------------


def load(base, device):
    """A base model as diffusers' text-to-image pipeline, frozen; in half precision on a GPU. Raises UserError.

    base: a name on the Hugging Face hub, or a folder. SD 1.x's safety checker is left out: it blackens some paintings,
    and takes 0.6 GB.
    """
    try:
        pipe = diffusers.AutoPipelineForText2Image.from_pretrained(base, dtype=precision(device), safety_checker=None)
    except Exception as error:  # the hub, the network and files raise many types
        advice = loading_advice(base, error)
        raise UserError(f"cannot load the base {base}: {advice} ({type(error).__name__})") from None
    if not hasattr(pipe, "unet"):
        raise UserError(f"the base {base} is a {type(pipe).__name__}: only pipelines with a UNet are supported")
    for network in networks(pipe):
        network.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)  # a fifth faster
    return pipe.to(device)


def loading_advice(base, error: Exception) -> str:
    """What to do about a base that does not load; diffusers hides the hub's errors behind its own."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)

    def caused_by(*types):
        return any(isinstance(cause, types) for cause in chain)

    if caused_by(MemoryError) or "t allocate memory" in str(error):  # PyTorch's is a RuntimeError
        return "too little memory: close other programs, or use a smaller base"
    if Path(base).is_dir():
        return "it is no folder in diffusers' layout, with model_index.json, ..., or a file there is damaged"
    if caused_by(hub.GatedRepoError):
        return "it is gated: accept its terms on its page on the hub, then `hf auth login`"
    if caused_by(hub.RepositoryNotFoundError, hub.HFValidationError):
        return "neither a folder nor a name on the hub: check it; if it is private, `hf auth login`"
    if caused_by(hub.RemoteEntryNotFoundError):
        return "the hub has it, but not in diffusers' layout"
    return "not cached and no network: check the network and the name, or give a folder"


def networks(pipe) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def precision(device) -> torch.dtype:
    """The type of the frozen weights: bf16 on a GPU, or fp16 where it lacks bf16."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


# The loss -------------------------------------------------------------------------------------------------------------


def noise_schedule(pipe):
    """The forward process of training: how much noise each timestep adds."""
    return diffusers.DDPMScheduler.from_config(pipe.scheduler.config)


def text_conditions(pipe, captions: list[str], side: int) -> dict:
    """The UNet's arguments beside noisy latents and timesteps; SDXL also takes pooled embeddings and image sizes."""
    embeddings, _, *pooled = pipe.encode_prompt(
        captions, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if not pooled:
        return {"encoder_hidden_states": embeddings}
    sizes = to_device(torch.tensor([[side, side, 0, 0, side, side]] * len(captions)), embeddings.device)
    added = {"text_embeds": pooled[0], "time_ids": sizes.to(embeddings.dtype)}
    return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}


def denoising_loss(pipe, schedule, latents, noise, timesteps, captions: list[str]) -> torch.Tensor:
    """Mean squared error of the UNet's prediction for each image, (B,); latents and noise (B, channels, h, w)."""
    device, dtype = pipe.unet.device, precision(pipe.unet.device)
    latents, noise, timesteps = (to_device(values, device) for values in (latents.float(), noise, timesteps))
    noisy = schedule.add_noise(latents, noise, timesteps)
    targets = {"epsilon": lambda *_: noise, "v_prediction": schedule.get_velocity, "sample": lambda *_: latents}
    target = targets[schedule.config.prediction_type](latents, noise, timesteps)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        conditions = text_conditions(pipe, captions, latents.shape[-1] * pipe.vae_scale_factor)
        prediction = pipe.unet(noisy.to(dtype), timesteps, **conditions).sample
    return (prediction.float() - target).square().mean((1, 2, 3))


def min_snr_weight(schedule, timesteps) -> torch.Tensor:
    """Min-SNR weights (B,) of timesteps (Hang et al. 2023), which keep nearly noiseless timesteps from dominating.

    Of predicted velocities and images with 1 added, because a schedule may end in noise alone: the SNR is 0 there.
    """
    signal = schedule.alphas_cumprod[timesteps]
    snr = signal / (1 - signal)
    kept = snr.clamp(max=SNR_GAMMA)
    return {"epsilon": kept / snr, "v_prediction": (kept + 1) / (snr + 1), "sample": kept + 1}[
        schedule.config.prediction_type
    ]


@torch.no_grad()
def heldout_losses(pipe, latents, captions: list[str], config, chosen=slice(None)) -> torch.Tensor:
    """Denoising losses of the `chosen` images of a test set, means over four timesteps, always with the same noise."""
    schedule, generator = noise_schedule(pipe), torch.Generator().manual_seed(config.seed)
    items, losses = torch.arange(len(latents))[chosen], torch.zeros(len(latents))
    for level in (0.125, 0.375, 0.625, 0.875):
        noise = torch.randn(latents.shape, generator=generator)
        for rows in items.split(config.batch_size):
            timesteps = torch.full((len(rows),), int(level * schedule.config.num_train_timesteps))
            texts = [captions[row] for row in rows]
            losses[rows] += denoising_loss(pipe, schedule, latents[rows], noise[rows], timesteps, texts).cpu() / 4
    return losses[items]


# LoRA -----------------------------------------------------------------------------------------------------------------


class Adapter:
    """LoRA matrices (Hu et al. 2021) in the UNet of a pipeline and, with --text-encoder, in its text encoders.

    Their product is added with weight 1 (alpha = rank), so that files need no alpha. They are float32 on any base.
    """

    def __init__(self, pipe, config):
        self.pipe, self.parts = pipe, {"unet": pipe.unet}
        if config.text_encoder:
            self.parts |= {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
        torch.manual_seed(config.seed)
        for name, part in self.parts.items():
            modules = config.targets if name == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
            try:
                part.add_adapter(peft.LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=modules))
            except ValueError as error:
                raise UserError(f"--targets {' '.join(modules)}: {str(error).splitlines()[0]}") from None
            if config.checkpointing:
                part.train()  # text encoders checkpoint in training mode only; none has dropout
                part.enable_gradient_checkpointing() if name == "unet" else part.activation_checkpointing_enable()
        for weight in self.parameters():
            weight.data = weight.data.float()  # half precision would lose small steps

    def parameters(self) -> list[torch.nn.Parameter]:
        return [weight for part in self.parts.values() for weight in part.parameters() if weight.requires_grad]

    def state_dict(self) -> dict:
        return {name: peft.get_peft_model_state_dict(part, adapter_name="default") for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            peft.set_peft_model_state_dict(part, state[name], adapter_name="default")

    @contextlib.contextmanager
    def disabled(self):
        for part in self.parts.values():
            part.disable_adapters()
        yield
        for part in self.parts.values():
            part.enable_adapters()

    def save(self, folder: Path) -> None:
        """Write the file that load_lora_weights of diffusers reads, and a folder for peft of each network."""
        states = self.state_dict()
        layers = {f"{name}_lora_layers": state for name, state in states.items()}
        with atomic_write(folder / ADAPTER_FILE) as temporary:
            self.pipe.save_lora_weights(temporary.parent, **layers, weight_name=temporary.name)
        for name, state in states.items():
            self.parts[name].peft_config["default"].save_pretrained(folder / "peft" / name)
            named = {f"base_model.model.{key}": value.contiguous().cpu() for key, value in state.items()}
            with atomic_write(folder / "peft" / name / "adapter_model.safetensors") as temporary:
                save_file(named, temporary)


# Sampling -------------------------------------------------------------------------------------------------------------


def sample(pipe, prompts, seeds, config, **options) -> np.ndarray:
    """Images uint8 (prompts * seeds, 3, H, W), by prompt. The noise comes from the CPU: equal on every machine."""
    seeds = list(seeds)
    return sample_each(pipe, np.repeat(prompts, len(seeds)).tolist(), config, seeds * len(prompts), **options)


@torch.no_grad()
def sample_each(pipe, prompts, config, seeds=None, image=None, **options) -> np.ndarray:
    """An image of each prompt with its own seed, uint8 (N, 3, H, W); `image` holds those to start from, if any."""
    options |= {"num_inference_steps": config.steps, "guidance_scale": config.guidance}
    options["negative_prompt"] = getattr(config, "negative", "") or None
    seeds, images = seeds or [config.seed] * len(prompts), []
    for start in range(0, len(prompts), config.batch_size):
        part = slice(start, start + config.batch_size)
        batch = dict(options) | ({} if image is None else {"image": image[part]})
        if batch["negative_prompt"]:
            batch["negative_prompt"] = [batch["negative_prompt"]] * len(prompts[part])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        images += pipe(prompts[part], generator=generators, **batch).images
    return np.stack([np.asarray(each.convert("RGB")).transpose(2, 0, 1) for each in images])


def image_to_image(pipe):
    """The pipeline that starts from an image instead of noise, with the same networks."""
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_image(path) -> Image.Image:
    """An image file in RGB. Raises UserError where it cannot be read."""
    try:
        return open_rgb(path, 2048)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise UserError(f"{path} cannot be read as an image ({type(error).__name__})") from None


def fit_image(image: Image.Image, side: int) -> Image.Image:
    """An image in its own proportions, of about side x side pixels; width and height are multiples of 64."""
    scale = side / (image.width * image.height) ** 0.5
    return image.resize([max(64, round(scale * length / 64) * 64) for length in image.size])


# Captions and latents -------------------------------------------------------------------------------------------------


def caption(genre: str, artist: str, style: str) -> str:
    """ "a landscape painting by claude monet in the style of Impressionism", without the parts that are ""."""
    kind = " ".join([*genre.removesuffix("painting").replace("_", " ").split(), "painting"])
    text = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    if artist:
        text += f" by {artist.replace('-', ' ')}"
    return with_style(text, style)


def with_style(prompt: str, style: str) -> str:
    return f"{prompt} in the style of {display_name(style)}" if style else prompt


def training_captions(data, items, random: torch.Tensor) -> list[str]:
    """Captions of the paintings `items` (B,); parts are dropped where the random numbers (B, 3) in [0, 1) are small."""
    captions = []
    for item, (whole, genre, artist) in zip(items, random.tolist(), strict=True):
        genre = data.genres[item] if genre >= DROP_PART else ""
        artist = data.artists[item] if artist >= DROP_PART else ""
        captions.append(caption(genre, artist, data.styles[item]) if whole >= DROP_CAPTION else "")
    return captions


def read_images(files, side: int, threads: int) -> torch.Tensor:
    """Image files as uint8 (B, 3, side, side): their centres, because squashed images would teach wrong proportions."""

    def read(file):
        with named_errors(file):
            return read_image(file, side, "crop")

    with ThreadPoolExecutor(threads or None) as pool:
        return torch.from_numpy(np.stack(list(pool.map(read, files))))


@torch.no_grad()
def encode(pipe, batches) -> torch.Tensor:
    """Latents, float16 (N, channels, h, w) on the CPU, of batches of images uint8 (B, 3, S, S)."""
    pipe.vae.float()  # SDXL's overflows in fp16
    latents = [pipe.vae.encode(batch.to(pipe.vae.device) / 127.5 - 1).latent_dist.mean.cpu() for batch in batches]
    pipe.vae.to(pipe.unet.dtype)
    return (torch.cat(latents) * pipe.vae.config.scaling_factor).half()


def cached_latents(pipe, datasets, side: int, path: Path, threads: int) -> list[torch.Tensor]:
    """The latents of each data set, computed once and kept in the file `path`."""
    key = hashlib.sha256(json.dumps([side, *([data.fingerprint, data.paths.tolist()] for data in datasets)]).encode())
    for weight in pipe.vae.state_dict().values():
        key.update(weight.cpu().float().numpy().tobytes())
    with exclusive(path):
        if path.exists() and (cached := torch.load(path, weights_only=True))["key"] == key.hexdigest():
            return cached["latents"]
        latents = []
        for data in datasets:
            files = [data.root / name for name in data.paths]
            starts = tqdm(range(0, len(files), 8), "latents", leave=False)
            latents.append(encode(pipe, (read_images(files[start : start + 8], side, threads) for start in starts)))
        save_checkpoint(path, {"key": key.hexdigest(), "latents": latents})
    return latents


@contextlib.contextmanager
def exclusive(path: Path):
    """Processes enter this block one after the other, so that later ones find the file that the first has made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
