"""What lora.py is made of: pipelines of diffusers, captions and latents of paintings, the denoising loss, a small base.

    pipe = load("stable-diffusion-v1-5/stable-diffusion-v1-5", device)    # or a folder in diffusers' layout; SDXL too
    losses = denoising(pipe, schedule, latents, noise, times, captions)   # (B,)

Latents travel as float16 on the CPU until they are needed.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import runs
from figures import plain
from folder import open_rgb, read_picture

try:
    import diffusers
    import peft
    import transformers
    from huggingface_hub import errors as hub
    from tokenizers.pre_tokenizers import ByteLevel
except ImportError:  # an extra: see ready
    diffusers = None


FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for


# The base -------------------------------------------------------------------------------------------------------------


def ready() -> None:
    """Quiet libraries, or a clear line where there are none."""
    if diffusers is None:
        raise runs.Problem("no diffusers here, which has the models: pip install -r requirements-lora.txt")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # its warnings are about what is done here on purpose
        library.utils.logging.disable_progress_bar()


def load(base, device):
    """The base as diffusers' own pipeline, frozen; on a GPU in half precision.

    Without SD 1.x's safety checker: it blackens paintings now and then, and takes 0.6 GB.
    """
    try:
        pipe = diffusers.AutoPipelineForText2Image.from_pretrained(base, dtype=precision(device), safety_checker=None)
    except Exception as error:  # hub, network, files: each has kinds of its own
        advice = what_to_do(base, error)
        raise runs.Problem(f"cannot load the base {base}: {advice} ({type(error).__name__})") from None
    if not hasattr(pipe, "unet"):
        raise runs.Problem(f"the base {base} is a {type(pipe).__name__}: only those with a UNet are known here")
    for network in networks(pipe):
        network.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)  # a fifth faster
    return pipe.to(device)


def what_to_do(base, error) -> str:
    """Advice on a base that does not load; diffusers hides the hub's errors behind its own."""
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)

    def among(*kinds):
        return any(isinstance(each, kinds) for each in chain)

    if among(MemoryError) or "t allocate memory" in str(error):  # PyTorch's is a RuntimeError
        return "too little memory: close other programs, or take a smaller base"
    if Path(base).is_dir():
        return "it is no folder in diffusers' layout, with model_index.json, unet/, vae/, ..."
    if among(hub.GatedRepoError):
        return "it is gated: accept its terms on its page on the hub, then `hf auth login`"
    if among(hub.RepositoryNotFoundError, hub.HFValidationError):
        return "neither a folder nor a name on the hub: check it; if it is private, `hf auth login`"
    if among(hub.RemoteEntryNotFoundError):
        return "the hub has it, but not in diffusers' layout"
    return "no network and no copy here: check the network and the name, or give a folder"


def noise_schedule(pipe):
    """How much noise each step of training adds."""
    return diffusers.DDPMScheduler.from_config(pipe.scheduler.config)


def networks(pipe) -> list:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def precision(device):
    """What weights are held in: bf16 or else fp16 on a GPU."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def conditions(pipe, captions, side: int) -> dict:
    """What the UNet is told beside the noisy latents: the captions; SDXL's also as one vector each, and the size."""
    words, _, *pooled = pipe.encode_prompt(
        captions, device=pipe.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if not pooled:
        return {"encoder_hidden_states": words}
    sizes = torch.tensor([[side, side, 0, 0, side, side]] * len(captions), device=words.device, dtype=words.dtype)
    return {"encoder_hidden_states": words, "added_cond_kwargs": {"text_embeds": pooled[0], "time_ids": sizes}}


def denoising(pipe, schedule, latents, noise, times, captions):
    """The loss of each picture (B,): how wrong the UNet is about the noise (B, 4, h, w) in its noisy latents."""
    device, dtype = pipe.unet.device, precision(pipe.unet.device)
    latents, noise, times = latents.float().to(device), noise.to(device), times.to(device)
    noisy = schedule.add_noise(latents, noise, times)
    velocity = schedule.config.prediction_type == "v_prediction"
    aim = schedule.get_velocity(latents, noise, times) if velocity else noise
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        told = conditions(pipe, captions, latents.shape[-1] * pipe.vae_scale_factor)
        guess = pipe.unet(noisy.to(dtype), times, **told).sample
    return (guess.float() - aim).square().mean((1, 2, 3))


def weigh(schedule, times, snr: float):
    """Min-SNR weights (B,) of steps of noise (Hang et al. 2023): easy steps do not drown the others."""
    if not snr:
        return torch.ones(len(times))
    kept = schedule.alphas_cumprod[times]
    ratio = kept / (1 - kept)
    return ratio.clamp(max=snr) / (ratio + (schedule.config.prediction_type == "v_prediction"))


# The loss on test paintings -------------------------------------------------------------------------------------------


@torch.no_grad()
def heldout(pipe, schedule, latents, texts, items, config):
    """The denoising loss of the chosen pictures (N,), the mean over four steps of noise; the same noise every time."""
    draw, losses = torch.Generator().manual_seed(config.seed), torch.zeros(len(latents))
    for level in (0.125, 0.375, 0.625, 0.875):
        noise = torch.randn(latents.shape, generator=draw)
        for rows in items.split(config.batch_size):
            times = torch.full((len(rows),), int(level * schedule.config.num_train_timesteps))
            said = [texts[row] for row in rows]
            losses[rows] += denoising(pipe, schedule, latents[rows], noise[rows], times, said).cpu() / 4
    return losses[items]


def compare(before, after) -> dict:
    """Mean losses, and the change with its 95 % interval; pictures (N,) are compared each with itself."""
    change, error = after - before, 1.96 * (after - before).std(correction=0) / len(before) ** 0.5
    found = {"before": before.mean(), "after": after.mean(), "change": change.mean(),
             "change_low": change.mean() - error, "change_high": change.mean() + error}  # fmt: skip
    return {key: round(float(value), 6) for key, value in found.items()} | {"images": len(before)}


def losses_by_style(names, styles, before, after) -> dict:
    """Facts of the losses (N,) on test paintings of styles `names` (N,): of each, those learned, and the others."""
    own = np.isin(names, styles)
    each = {str(style): compare(before[names == style], after[names == style]) for style in np.unique(names)}
    shown = {plain(style) + ", learned" * (style in styles): found for style, found in each.items()}
    facts = {f"heldout_loss_{key}": value for key, value in compare(before[own], after[own]).items()}
    if not own.all():
        shown["the others together"] = others = compare(before[~own], after[~own])
        facts |= {f"other_styles_loss_{key}": value for key, value in others.items()}
    row = "| {} | {images} | {before:.4f} | {after:.4f} | {change:+.4f} ({change_low:+.4f} to {change_high:+.4f}) |"
    table = ["| style | test paintings | before | after | change, with its 95 % interval |", "|---|---|---|---|---|"]
    table += [row.format(name, **found) for name, found in shown.items()]
    return facts | {"by_style": each, "table": "\n".join(table)}


# The adapter ----------------------------------------------------------------------------------------------------------


class Adapter:
    """The part of a pipeline that is trained: LoRA matrices in its UNet and, where asked for, its text encoders."""

    def __init__(self, pipe, config):
        self.pipe, self.parts, self.scale = pipe, {"unet": pipe.unet}, config.alpha / config.rank
        if config.text_encoder:
            self.parts |= {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
        torch.manual_seed(config.seed)
        for name, part in self.parts.items():
            targets = config.targets if name == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
            try:
                part.add_adapter(peft.LoraConfig(r=config.rank, target_modules=targets, lora_alpha=config.alpha))
            except ValueError as error:
                raise runs.Problem(f"--targets {' '.join(targets)}: {str(error).splitlines()[0]}") from None
            if config.checkpointing:
                part.train()  # or a text encoder keeps all activations; no part has dropout
                part.enable_gradient_checkpointing() if name == "unet" else part.activation_checkpointing_enable()
        for weight in self.parameters():
            weight.data = weight.data.float()  # half precision would lose small steps

    def parameters(self) -> list:
        return [weight for part in self.parts.values() for weight in part.parameters() if weight.requires_grad]

    def state_dict(self) -> dict:
        return {name: peft.get_peft_model_state_dict(part, adapter_name="default") for name, part in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts.items():
            peft.set_peft_model_state_dict(part, state[name], adapter_name="default")

    @contextlib.contextmanager
    def off(self):
        for part in self.parts.values():
            part.disable_adapters()
        yield
        for part in self.parts.values():
            part.enable_adapters()

    def save(self, folder: Path) -> None:
        """As any program reads it. The scale goes into the second matrix, for not all of them know alpha."""
        layers = {}
        for name, state in self.state_dict().items():
            scaled = {key: value * self.scale if "lora_B" in key else value for key, value in state.items()}
            layers[f"{name}_lora_layers"] = scaled  # under peft's names: diffusers' older ones do not load beside them
        with runs.replacing(folder / FILE) as temporary:
            self.pipe.save_lora_weights(temporary.parent, **layers, weight_name=temporary.name)


# Painting -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def make(pipe, prompts, seeds, config, **more) -> np.ndarray:
    """Pictures uint8 (prompts x seeds, 3, H, W); drawn on the CPU, so that every machine starts from the same noise."""
    made = []
    for prompt, seed in itertools.product(prompts, seeds):
        draw = torch.Generator().manual_seed(seed)
        made += pipe(prompt, generator=draw, num_inference_steps=config.steps, guidance_scale=config.guidance,
                     **more).images  # fmt: skip
    return np.stack([np.asarray(picture.convert("RGB")).transpose(2, 0, 1) for picture in made])


def over_pictures(pipe):
    """The pipeline that starts from a picture instead of noise."""
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_picture(path, side: int) -> Image.Image:
    """A file in its own proportions, with about side x side pixels, sides in multiples of 64."""
    picture = open_rgb(path, 2 * side)
    scale = side / (picture.width * picture.height) ** 0.5
    return picture.resize([max(64, round(scale * length / 64) * 64) for length in picture.size])


# Paintings and captions -----------------------------------------------------------------------------------------------


def caption(genre: str, artist: str, style: str) -> str:
    """What is known of "a landscape painting by claude monet in the style of Impressionism"."""
    kind = " ".join([*genre.removesuffix("painting").replace("_", " ").split(), "painting"])
    parts = ["an" if kind[0] in "aeiou" else "a", kind]
    parts += ["by", artist.replace("-", " ")] * bool(artist) + ["in the style of", plain(style)] * bool(style)
    return " ".join(part for part in parts if part)


def captions_of(data, items, chances, config) -> list[str]:
    """Captions of the paintings (B,); parts drop out where the chances (B, 3) in [0, 1) are small."""
    said = []
    for item, (all_of_it, genre, artist) in zip(items, chances.tolist(), strict=True):
        known = [(data.genres[item], genre), (data.artists[item], artist)]
        parts = [value if chance >= config.drop_words else "" for value, chance in known]
        said.append("" if all_of_it < config.drop_caption else caption(*parts, data.styles[item]))
    return said


def read_all(files, side: int, processes: int):
    """Pictures uint8 (B, 3, side, side), their centre cut out: a squashed one would teach wrong proportions."""
    with ThreadPoolExecutor(processes or None) as pool:
        return torch.from_numpy(np.stack(list(pool.map(lambda file: read_picture(file, side, "crop"), files))))


@torch.no_grad()
def encode(pipe, batches):
    """Latents float16 (N, 4, h, w), on the CPU, of batches of pictures uint8 (B, 3, S, S)."""
    pipe.vae.float()  # SDXL's overflows in fp16
    codes = [pipe.vae.encode(batch.to(pipe.vae.device) / 127.5 - 1).latent_dist.mean.cpu() for batch in batches]
    pipe.vae.to(pipe.unet.dtype)
    return (torch.cat(codes) * pipe.vae.config.scaling_factor).half()


def latents_of(pipe, sets, side: int, path: Path, processes: int) -> list:
    """The latents of each set of paintings; made once and kept in a file."""
    key = hashlib.sha256(json.dumps([side, *([data.fingerprint, data.paths.tolist()] for data in sets)]).encode())
    for weight in pipe.vae.state_dict().values():
        key.update(weight.cpu().float().numpy().tobytes())
    with one_at_a_time(path):
        if path.exists() and (kept := torch.load(path, weights_only=True))["key"] == key.hexdigest():
            return kept["latents"]
        found = []
        for data in sets:
            files = np.array([str(data.root / name) for name in data.paths])
            parts = tqdm(np.array_split(files, -(-len(files) // 8)), "latents", leave=False)
            found.append(encode(pipe, (read_all(part, side, processes) for part in parts)))
        runs.save_checkpoint(path, {"key": key.hexdigest(), "latents": found})
    return found


@contextlib.contextmanager
def one_at_a_time(path: Path):
    """Several processes do this one after the other; what the first has made, the others find."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# The small base -------------------------------------------------------------------------------------------------------


def make_tiny(folder: Path, data, config, device) -> None:
    """A small latent diffusion model of Stable Diffusion's parts, taught on these paintings by their genre alone.

    It stands in for a real base where there is no network or no GPU: same classes, same folder.
    """
    side, identity = config.resolution or 64, [data.fingerprint, config.resolution, config.tiny_steps, config.seed]
    note, started = folder / "made_from.json", time.process_time()
    with one_at_a_time(folder):
        if note.exists() and json.loads(note.read_text()) == identity:
            return
        torch.manual_seed(config.seed)
        pipe = build_tiny([caption(*said) for said in zip(data.genres, data.artists, data.styles, strict=True)], side)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.to(device)
        pixels = read_all([data.root / path for path in data.paths], side, config.processes)
        learn_codes(pipe.vae, pixels, config)
        learn_painting(pipe, pixels, data, config)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tiny-") as scratch:
            pipe.save_pretrained(f"{scratch}/base")
            Path(scratch, "base", note.name).write_text(json.dumps(identity))
            shutil.rmtree(folder, ignore_errors=True)
            Path(scratch, "base").rename(folder)
    facts = {"tiny_weights": sum(weight.numel() for part in networks(pipe) for weight in part.parameters()),
             "tiny_cpu_minutes": round((time.process_time() - started) / 60, 2), "tiny_images": len(data)}  # fmt: skip
    runs.add_facts(config.run, "lora", facts, merge=True)


def teach_words(texts):
    """CLIP's tokenizer with a token for every word; its own training gives other numbers in every run."""
    letters = sorted(ByteLevel.alphabet())
    merges = {}
    for word in sorted({word for text in texts for word in re.findall("[a-z]+", text.lower())}):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:  # as the tokenizer will: the oldest merge first, a new one where there is none
            pairs = list(itertools.pairwise(parts))
            pair = min(pairs, key=lambda pair: merges.get(pair, len(merges)))
            merges.setdefault(pair, len(merges))
            place = pairs.index(pair)
            parts[place : place + 2] = ["".join(pair)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    words = dict.fromkeys([*words, *map("".join, merges)])
    vocabulary = {word: number for number, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocabulary, list(merges), model_max_length=32)


def build_tiny(texts, side: int):
    """The parts with fresh weights; the vocabulary is that of the captions."""
    tokenizer = teach_words(texts)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, **ends))  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, sample_size=side,
        block_out_channels=[16, 32, 64], norm_num_groups=8, latent_channels=4, mid_block_add_attention=False,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(  # what it calls attention_head_dim is the number of heads
        sample_size=side // 4, block_out_channels=[32, 64], layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=64, attention_head_dim=[1, 2], down_block_types=["CrossAttnDownBlock2D"] * 2,
        up_block_types=["CrossAttnUpBlock2D"] * 2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    return diffusers.StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None,
                                             feature_extractor=None, requires_safety_checker=False)  # fmt: skip


def warm(optimizer, steps: int):
    """Learning rates that rise for a twentieth of the steps, then fall to 0."""

    def share(step):
        return min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps), 1)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def descend(weights, loss, steps: int, lr: float, what: str) -> None:
    """Minimise a loss by so many steps of AdamW."""
    optimizer = torch.optim.AdamW(weights, lr)
    rates = warm(optimizer, steps)
    for _ in tqdm(range(steps), what, leave=False):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()


def learn_codes(vae, pixels, config) -> None:
    """Teach the autoencoder to give windows (B, 3, 32, 32) back; its scale brings codes to deviation 1."""

    def windows():
        batch = pixels[torch.randint(len(pixels), (16,))]
        top, left = torch.randint(pixels.shape[-1] - 31, (2,))
        return batch[:, :, top : top + 32, left : left + 32].to(vae.device) / 127.5 - 1

    def loss():
        images = windows()
        codes = vae.encode(images).latent_dist
        return (vae.decode(codes.sample()).sample - images).abs().mean() + 1e-5 * codes.kl().mean() / 64

    descend(list(vae.parameters()), loss, config.tiny_steps[0], 2e-3, "small autoencoder")
    with torch.no_grad():
        codes = torch.cat([vae.encode(windows()).latent_dist.mean for _ in range(8)])
    vae.register_to_config(scaling_factor=float(1 / codes.std()))


def learn_painting(pipe, pixels, data, config) -> None:
    """Teach the UNet and the text encoder to take noise away; captions name the genre and nothing else."""
    schedule, latents = noise_schedule(pipe), encode(pipe, pixels.split(32))

    def loss():
        items, kept = torch.randint(len(data), (16,)), torch.rand(16) > 0.1
        times = torch.randint(schedule.config.num_train_timesteps, (16,))
        texts = [caption(data.genres[item], "", "") * bool(told) for item, told in zip(items, kept, strict=True)]
        noise = torch.randn(16, *latents.shape[1:])
        each = denoising(pipe, schedule, latents[items], noise, times, texts)
        return (each * weigh(schedule, times, 5.0).to(each.device)).mean()

    weights = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    descend(weights, loss, config.tiny_steps[1], 3e-3, "small diffusion model")
