"""PyTorch's side of `cargo xtask bench`: CLIP and the steps as the methods' authors write them.

Reads a job from standard input, loads, and then answers each request with the seconds that it took; `worker.rs` has the
protocol. The contender `fair` differs from `authors` in one point: prompts are cut to the longest of their batch.
"""

import ctypes
import json
import math
import mmap
import platform
import sys
import time
from collections import OrderedDict

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

DTYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64}


def read(path):
    """The tensors of a safetensors file as it holds them, mapped: copy what is to stay."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        count = (end - begin) // torch.empty(0, dtype=dtype).element_size()
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def write(path, tensors):
    """Writes f32 tensors as a safetensors file."""
    header, chunks, offset = {}, [], 0
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().float().contiguous()
        chunk = ctypes.string_at(tensor.data_ptr(), 4 * tensor.numel())
        end = offset + len(chunk)
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        chunks.append(chunk)
        offset = end
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + b"".join(chunks))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1 = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        layers = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", QuickGELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x, mask):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, mask=None, enter=None):
        """(batch, tokens, width), run with the batch second as the published code does.

        `enter(i, x)`, x as it is run, changes what block i reads.
        """
        x = x.permute(1, 0, 2)
        for i, block in enumerate(self.resblocks):
            x = block(x if enter is None else enter(i, x), mask)
        return x.permute(1, 0, 2)


class VisionTransformer(nn.Module):
    def __init__(self, weights):
        super().__init__()
        width, _, _, patch = weights["visual.conv1.weight"].shape
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(weights["visual.class_embedding"].shape))
        self.positional_embedding = nn.Parameter(torch.empty(weights["visual.positional_embedding"].shape))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, blocks(weights, "visual.transformer."))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(weights["visual.proj"].shape))

    def forward(self, x, prompts=()):
        """`prompts` (n, width) of block 0, 1, ...: the first join before ln_pre, the others replace those before them."""
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        if prompts:
            x = torch.cat([x, prompts[0].expand(x.shape[0], -1, -1)], dim=1)

        def enter(i, x):
            if not 0 < i < len(prompts):
                return x
            own = prompts[i].unsqueeze(1).expand(-1, x.shape[1], -1)
            return torch.cat([x[: -len(own)], own])

        return self.ln_post(self.transformer(self.ln_pre(x), enter=enter)[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, channels, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            layers = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(channels, 4 * planes, 1, bias=False)),
                ("1", nn.BatchNorm2d(4 * planes)),
            ]
            self.downsample = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        skipped = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.avgpool(self.relu(self.bn2(self.conv2(out))))
        return self.relu(self.bn3(self.conv3(out)) + skipped)


class AttentionPool(nn.Module):
    def __init__(self, weights):
        super().__init__()
        positions = weights["visual.attnpool.positional_embedding"]
        width, out = positions.shape[1], weights["visual.attnpool.c_proj.weight"].shape[0]
        self.positional_embedding = nn.Parameter(torch.empty(positions.shape))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, out)

    def forward(self, x):
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x]) + self.positional_embedding[:, None]
        pooled, _ = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=x.shape[-1] // 64,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            training=self.training,
            need_weights=False,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )
        return pooled[0]


class ModifiedResNet(nn.Module):
    def __init__(self, weights):
        super().__init__()
        width = weights["visual.layer1.0.conv1.weight"].shape[0]
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for stage in range(1, 5):
            names = {name.split(".")[2] for name in weights if name.startswith(f"visual.layer{stage}.")}
            planes, layers = width * 2 ** (stage - 1), []
            for i in range(len(names)):
                layers.append(Bottleneck(channels, planes, 2 if stage > 1 and i == 0 else 1))
                channels = 4 * planes
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.attnpool = AttentionPool(weights)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.avgpool(self.relu(self.bn3(self.conv3(x))))
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


def blocks(weights, prefix):
    """Number of transformer blocks below `prefix`."""
    return sum(name.startswith(prefix) and name.endswith(".ln_1.weight") for name in weights)


class Clip(nn.Module):
    def __init__(self, weights):
        super().__init__()
        vision = VisionTransformer if "visual.proj" in weights else ModifiedResNet
        self.visual = vision(weights)
        width = weights["ln_final.weight"].shape[0]
        self.transformer = Transformer(width, blocks(weights, "transformer."))
        self.token_embedding = nn.Embedding(*weights["token_embedding.weight"].shape)
        self.positional_embedding = nn.Parameter(torch.empty(weights["positional_embedding"].shape))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(weights["text_projection"].shape))
        self.logit_scale = nn.Parameter(torch.empty(weights["logit_scale"].shape))
        missing, unexpected = self.load_state_dict(weights, strict=False)
        # How many batches a norm has seen is counted only while it learns.
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise SystemExit(f"weights: missing {missing}, unexpected {unexpected}")
        length = self.positional_embedding.shape[0]
        self.mask = torch.full((length, length), float("-inf")).triu(1)

    def encode_embedded(self, embedded, tokens, enter=None):
        """(prompts, tokens, width) of input embeddings -> (prompts, dim)."""
        length = embedded.shape[1]
        x = embedded + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, self.mask[:length, :length], enter))
        return x[torch.arange(x.shape[0]), tokens.argmax(dim=-1)] @ self.text_projection


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


class Work:
    """A row: `step` is timed, `check` gives what is compared."""

    def __init__(self, job, clip, inputs):
        self.clip = clip
        self.cut = job["contender"] == "fair"
        self.task = job["task"]
        self.inputs = inputs

    def shorten(self, tokens):
        """The fair contender's tokens end with the last end token of the batch."""
        return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1] if self.cut else tokens

    def prompts(self, ctx, tokens):
        """Input embeddings of prompts with `ctx` (n_ctx, width) behind the start token."""
        n_ctx = ctx.shape[0]
        with torch.no_grad():
            embedded = self.clip.token_embedding(tokens)
        prefix, suffix = embedded[:, :1], embedded[:, 1 + n_ctx :]
        ctx = ctx.unsqueeze(0).expand(tokens.shape[0], -1, -1)
        return torch.cat([prefix, ctx, suffix], dim=1)

    def features(self, ctx, tokens):
        """Features of prompts with `ctx` (n_ctx, width)."""
        tokens = self.shorten(tokens)
        return self.clip.encode_embedded(self.prompts(ctx, tokens), tokens)

    def features_each(self, contexts, tokens):
        """Features (contexts, classes, dim) of the prompts with each of the contexts, all in one pass."""
        tokens, n = self.shorten(tokens), contexts.shape[0]
        prompts = torch.cat([self.prompts(ctx, tokens) for ctx in contexts])
        features = self.clip.encode_embedded(prompts, tokens.repeat(n, 1))
        return features.view(n, tokens.shape[0], -1)

    def check(self):
        return self.step(0)


class Coop(Work):
    def __init__(self, *args):
        super().__init__(*args)
        self.ctx = nn.Parameter(self.inputs["ctx"])
        self.graphs = self.inputs["tokens"].split(self.task["graph"])

    def loss(self, features, labels):
        images = unit(self.inputs["image_features"])
        logits = self.clip.logit_scale.exp() * images @ unit(features).t()
        return logits, F.cross_entropy(logits, labels)

    def step(self, i):
        """One graph with its own classes only; the whole step where there is one graph."""
        self.ctx.grad = None
        tokens = self.graphs[i % len(self.graphs)]
        features = self.features(self.ctx, tokens)
        logits, loss = self.loss(features, self.inputs["labels"] % tokens.shape[0])
        loss.backward()
        return {"features": features, "logits": logits, "grad.ctx": self.ctx.grad}

    def check(self):
        if len(self.graphs) == 1:
            return self.step(0)
        # All features without a graph, the loss and its gradient by the features, then one graph at a time.
        self.ctx.grad = None
        with torch.no_grad():
            features = torch.cat([self.features(self.ctx, tokens) for tokens in self.graphs])
        features.requires_grad_(True)
        logits, loss = self.loss(features, self.inputs["labels"])
        loss.backward()
        for tokens, gradient in zip(self.graphs, features.grad.split(self.task["graph"])):
            self.features(self.ctx, tokens).backward(gradient)
        return {"features": features, "logits": logits, "grad.ctx": self.ctx.grad}


class Cocoop(Work):
    def __init__(self, *args):
        super().__init__(*args)
        self.ctx = nn.Parameter(self.inputs["ctx"])
        hidden, dim = self.inputs["meta_net.linear1.weight"].shape
        layers = [
            ("linear1", nn.Linear(dim, hidden)),
            ("relu", nn.ReLU(inplace=True)),
            ("linear2", nn.Linear(hidden, self.ctx.shape[1])),
        ]
        self.meta_net = nn.Sequential(OrderedDict(layers))
        prefix = "meta_net."
        self.meta_net.load_state_dict(
            {name[len(prefix) :]: x for name, x in self.inputs.items() if name.startswith(prefix)}
        )

    def step(self, _):
        self.ctx.grad = None
        self.meta_net.zero_grad()
        images = unit(self.inputs["image_features"])
        shifted = self.ctx.unsqueeze(0) + self.meta_net(images).unsqueeze(1)
        scale, features, logits = self.clip.logit_scale.exp(), [], []
        for ctx, image in zip(shifted, images):
            text = self.features(ctx, self.inputs["tokens"])
            logits.append(scale * image @ unit(text).t())
            features.append(text)
        logits = torch.stack(logits)
        F.cross_entropy(logits, self.inputs["labels"]).backward()
        out = {"features": torch.cat(features), "logits": logits, "grad.ctx": self.ctx.grad}
        for name, param in self.meta_net.named_parameters():
            out[f"grad.meta_net.{name}"] = param.grad
        return out


class Plot(Work):
    EPS, MAX_ITER, THRESHOLD = 0.1, 100, 1e-2

    def __init__(self, *args):
        super().__init__(*args)
        self.ctx = nn.Parameter(self.inputs["ctx"])
        # The tower gives the batch second, the global feature first.
        self.places = self.inputs["image_features"][:, 1:].transpose(0, 1).contiguous()

    def plan(self, kernel, rows, columns):
        r, c = torch.ones_like(rows), torch.ones_like(columns)
        for _ in range(self.MAX_ITER):
            before = r
            r = rows / (kernel @ c.unsqueeze(-1)).squeeze(-1)
            c = columns / (kernel.transpose(1, 2).contiguous() @ r.unsqueeze(-1)).squeeze(-1)
            if (r - before).abs().mean().item() < self.THRESHOLD:
                break
        return r.unsqueeze(-1) @ c.unsqueeze(-2) * kernel

    def step(self, _):
        self.ctx.grad = None
        text = self.features_each(self.ctx, self.inputs["tokens"])
        (n, classes, _), (m, batch, _) = text.shape, self.places.shape
        places, unit_text = F.normalize(self.places, dim=2), F.normalize(text, dim=2)
        similarity = torch.einsum("mbd,ncd->mnbc", places, unit_text).contiguous()
        similarity = similarity.view(m, n, batch * classes).permute(2, 0, 1)
        with torch.no_grad():
            kernel = torch.exp(-(1 - similarity) / self.EPS)
            rows = torch.full((batch * classes, m), 1 / m)
            columns = torch.full((batch * classes, n), 1 / n)
            plan = self.plan(kernel, rows, columns)
        score = torch.sum(plan * similarity, dim=(1, 2)).view(batch, classes)
        logits = self.clip.logit_scale.exp() * score
        F.cross_entropy(logits, self.inputs["labels"]).backward()
        return {"features": text.flatten(0, 1), "logits": logits, "plan": plan, "grad.ctx": self.ctx.grad}


class Vpt(Work):
    KL_WEIGHT = 0.001

    def __init__(self, *args):
        super().__init__(*args)
        names = ["ctx", "mean_posterior", "std_posterior"]
        self.learned = nn.ParameterDict({name: nn.Parameter(self.inputs[name]) for name in names})

    def step(self, _):
        self.learned.zero_grad()
        noise, labels = self.inputs["noise"], self.inputs["labels"]
        mean, log_variance = self.learned["mean_posterior"], self.learned["std_posterior"]
        added = mean.unsqueeze(0) + noise * log_variance.exp().sqrt().unsqueeze(0)
        contexts = self.learned["ctx"].unsqueeze(0) + added
        text = unit(self.features_each(contexts, self.inputs["tokens"]))
        images = unit(self.inputs["image_features"]).unsqueeze(0).expand(len(noise), -1, -1)
        logits = self.clip.logit_scale.exp() * torch.einsum("lbd,lcd->lbc", images, text)
        log_probs = torch.log_softmax(logits, dim=-1)
        chosen = (log_probs * F.one_hot(labels, logits.shape[-1])).sum(dim=-1)
        task = -(torch.logsumexp(chosen, dim=0) - math.log(len(noise))).mean(dim=-1)
        prior = Normal(torch.zeros_like(mean), torch.ones_like(log_variance))
        kl = kl_divergence(Normal(mean, log_variance.exp().sqrt()), prior).mean(dim=-1)
        loss = task + self.KL_WEIGHT * kl
        loss.backward()
        averaged = torch.logsumexp(log_probs.detach(), dim=0) - math.log(len(noise))
        out = {"logits": averaged, "loss": loss.reshape(1)}
        for name, param in self.learned.items():
            out[f"grad.{name}"] = param.grad
        return out


class Maple(Work):
    def __init__(self, *args):
        super().__init__(*args)
        names = [name for name in self.inputs if name.startswith("prompt_learner.")]
        self.learned = {name: nn.Parameter(self.inputs[name]) for name in names}
        depth = 1 + sum("compound_prompts_text" in name for name in names)
        deep = [(f"compound_prompts_text.{i}", f"compound_prompt_projections.{i}") for i in range(depth - 1)]
        # What is learned for each block: the text prompt, and the map to the image tower's.
        self.keys = [tuple(f"prompt_learner.{key}" for key in pair) for pair in [("ctx", "proj"), *deep]]

    def step(self, _):
        for param in self.learned.values():
            param.grad = None
        text = [self.learned[prompt] for prompt, _ in self.keys]
        maps = [(self.learned[f"{key}.weight"], self.learned[f"{key}.bias"]) for _, key in self.keys]
        visual = [F.linear(prompt, *weights) for prompt, weights in zip(text, maps)]

        def enter(i, x):
            if not 0 < i < len(text):
                return x
            own = text[i].unsqueeze(1).expand(-1, x.shape[1], -1)
            return torch.cat([x[:1], own, x[1 + len(own) :]])

        tokens = self.shorten(self.inputs["tokens"])
        classes = self.clip.encode_embedded(self.prompts(text[0], tokens), tokens, enter)
        images = self.clip.visual(self.inputs["pixels"], visual)
        logits = self.clip.logit_scale.exp() * unit(images) @ unit(classes).t()
        F.cross_entropy(logits, self.inputs["labels"]).backward()
        out = {"text_features": classes, "image_features": images, "logits": logits}
        return out | {f"grad.{name}": param.grad for name, param in self.learned.items()}


class DeepVpt(Work):
    def __init__(self, *args):
        super().__init__(*args)
        names = [name for name in self.inputs if name.startswith("image_encoder.")]
        names.sort(key=lambda name: int(name.split(".")[3]) if "resblocks" in name else 0)
        self.learned = {name: nn.Parameter(self.inputs[name]) for name in names}
        self.text = unit(self.inputs["text_features"])

    def step(self, _):
        for param in self.learned.values():
            param.grad = None
        images = self.clip.visual(self.inputs["pixels"], list(self.learned.values()))
        logits = self.clip.logit_scale.exp() * unit(images) @ self.text.t()
        F.cross_entropy(logits, self.inputs["labels"]).backward()
        out = {"image_features": images, "logits": logits}
        return out | {f"grad.{name}": param.grad for name, param in self.learned.items()}


class Vp(Work):
    """A learned frame around every normalised image; class features at hand."""

    SIDES = ["pad_up", "pad_down", "pad_left", "pad_right"]

    def __init__(self, *args):
        super().__init__(*args)
        self.learned = {name: nn.Parameter(self.inputs[name]) for name in self.SIDES}
        self.text = unit(self.inputs["text_features"])

    def step(self, _):
        for param in self.learned.values():
            param.grad = None
        up, down, left, right = self.learned.values()
        inside = torch.zeros(1, 3, left.shape[2], up.shape[3] - 2 * left.shape[3])
        frame = torch.cat([up, torch.cat([left, inside, right], dim=3), down], dim=2)
        images = self.clip.visual(self.inputs["pixels"] + frame)
        logits = self.clip.logit_scale.exp() * unit(images) @ self.text.t()
        F.cross_entropy(logits, self.inputs["labels"]).backward()
        out = {"image_features": images, "logits": logits}
        return out | {f"grad.{name}": param.grad for name, param in self.learned.items()}


class ZeroShot(Work):
    @torch.no_grad()
    def step(self, _):
        features = []
        for tokens in self.inputs["tokens"].split(self.task["batch"]):
            tokens = self.shorten(tokens)
            features.append(self.clip.encode_embedded(self.clip.token_embedding(tokens), tokens))
        features = torch.cat(features)
        each = unit(features).reshape(-1, self.task["templates"], features.shape[1])
        return {"features": features, "weights": unit(each.mean(dim=1))}


class Image(Work):
    @torch.no_grad()
    def step(self, _):
        return {"features": self.clip.visual(self.inputs["pixels"])}


WORK = {
    "coop": Coop,
    "cocoop": Cocoop,
    "plot": Plot,
    "vpt": Vpt,
    "maple": Maple,
    "deep-vpt": DeepVpt,
    "vp": Vp,
    "zero-shot": ZeroShot,
    "image": Image,
}


def answer(reply):
    print(json.dumps(reply), flush=True)


def give_back_memory():
    """Returns what loading has freed to the system: a step that takes it anew is then seen to grow by it."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def main():
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    clip = Clip(read(job["weights"])).eval()
    for param in clip.parameters():
        param.requires_grad_(False)
    inputs = {name: tensor.clone() for name, tensor in read(job["inputs"]).items()}
    work = WORK[job["task"]["kind"]](job, clip, inputs)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    give_back_memory()
    answer({"ready": {"versions": versions, "forecast": None}})
    for line in sys.stdin:
        [(request, argument)] = json.loads(line).items()
        started = time.perf_counter()
        if request == "check":
            out = work.check()
            seconds = time.perf_counter() - started
            write(argument, out)
        else:
            work.step(argument)
            seconds = time.perf_counter() - started
        out = None
        answer({"took": seconds})


main()
