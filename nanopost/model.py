"""A GPT-2 transformer from scratch (Radford et al. 2019), with an optional scalar head and a key-value cache.

`forward` returns hidden states, never logits: the output matrix is a third of the work of a small model, so logits and
log-probabilities are made only at the positions that a loss asks for. Rows are padded on the right and attention is
plain causal, so padding is never seen by a real token and no attention mask is needed.

Shapes: B rows, T tokens, C = n_embd, H heads of D = C / H channels, S cached columns, V = vocab_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanopost.config import UserError
from nanopost.linear import Linear, linear


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Half precision to fp32, because half-precision sums and logs are off by whole nats; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Rows of logits at once, without gradients: for GPT-2 at most 1.2 GB (logits, quotient and log-softmax, in fp32). With
# gradients this bounds nothing: autograd keeps all of them until the backward pass.
LOGIT_ROWS = 2**11


def token_nll(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """-log softmax(logits / temperature) at each target, in nats, fp32: logits (N, V), targets (N,) -> (N,)."""
    logits = upcast(logits)
    if temperature != 1:  # a pass over all logits, and one more in the backward pass
        logits = logits / temperature
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass
class GPTConfig:
    """The sizes of a model. Raises UserError for sizes that do not fit together."""

    vocab_size: int = 50262  # real tokens; the matrix has more rows (a multiple of 64), which never get probability
    block_size: int = 1024  # the longest sequence, in tokens; a multiple of 8, and so of data.PAD_TO
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    scalar_head: bool = False  # one number per position: the value (PPO) or the reward (reward model)

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_layer > 1000:
            raise UserError(f"n_layer must be at most 1,000, not {self.n_layer:,}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.block_size % 8:
            raise UserError(f"block_size ({self.block_size}) must be a multiple of 8")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def rows(self) -> int:
        """Rows of the embedding matrix: vocab_size rounded up to a multiple of 64, which GPUs multiply faster."""
        return math.ceil(self.vocab_size / 64) * 64


class KVCache:
    """Keys and values of every layer, for B rows of at most S tokens. S begins as `length` and grows as they do.

    pos (B,) is the column of each row's next token; no row has more than `used` tokens; a decoding step attends to the
    first `span` columns. Raises ValueError if S exceeds the context.
    """

    GROWTH = 32  # columns at a time: to grow is to copy everything

    def __init__(self, config: GPTConfig, rows: int, length: int, device=None, dtype=torch.float32):
        self.context = config.block_size
        if length > self.context:
            raise ValueError(f"{length} tokens are longer than the context of {self.context}")
        head = config.n_embd // config.n_head
        shape = (config.n_layer, 2, rows, config.n_head, length, head)  # (L, 2, B, H, S, D)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.pos = torch.zeros(rows, dtype=torch.long, device=device)  # (B,)
        self.used = self.span = 0

    def fill(self, lengths: torch.Tensor, longest: int):
        """After the forward pass of the prompts: their lengths (B,) in tokens, and the longest as a number."""
        self.pos, self.used = lengths.clone(), longest

    def extend(self):
        """Before every decoding step: each row is about to get a token. Raises ValueError if the context is full."""
        if self.used == self.context:
            raise ValueError(f"the cache is full: the context has {self.context} tokens")
        room = self.kv.shape[4]
        if self.used == room:
            self.kv = F.pad(self.kv, (0, 0, 0, min(self.GROWTH, self.context - room)))
        self.used += 1
        self.span = min(math.ceil(self.used / 8) * 8, self.kv.shape[4])  # a multiple of 8: few shapes occur

    def keep(self, rows: torch.Tensor):
        """The rows are these from now on (an index, in which a row may occur often, or a mask)."""
        self.kv, self.pos = self.kv[:, :, rows], self.pos[rows]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, kv=None, pos=None, mask=None):
        """x (B, T, C) -> (B, T, C). kv (2, B, H, S, D) is this layer's cache; a mask is given only when decoding."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if kv is not None and mask is None:  # the prompt: fill columns 0..T-1
            kv[0, :, :, :T], kv[1, :, :, :T] = k, v
        elif kv is not None:  # one token per row: write it to the row's own column, read all columns in use
            rows = torch.arange(B, device=x.device)
            kv[0, rows, :, pos], kv[1, rows, :, pos] = k[:, :, 0].to(kv.dtype), v[:, :, 0].to(kv.dtype)
            k, v = kv[:, :, :, : mask.shape[-1]]  # (B, H, S, D) each
        if mask is None:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        else:  # the same, written out: faster on a CPU, where there is one query per row
            scores = q @ k.transpose(2, 3) / math.sqrt(C // self.n_head) + mask  # (B, H, 1, S)
            y = scores.softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = nn.ModuleDict()
        self.mlp["c_fc"] = Linear(config.n_embd, 4 * config.n_embd)
        self.mlp["c_proj"] = Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, kv=None, pos=None, mask=None):
        x = x + self.drop(self.attn(self.ln_1(x), kv, pos, mask))
        h = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.drop(self.mlp["c_proj"](h))


class GPT(nn.Module):
    """The trunk, the tied output matrix and, if the configuration says so, a scalar head."""

    nll = staticmethod(token_nll)  # Run.compile puts a compiled one here

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.head = nn.Linear(config.n_embd, 1) if config.scalar_head else None
        std = 0.02 * math.sqrt(768 / config.n_embd)  # GPT-2's is for 768 channels; with it a narrow model learns slowly
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" not in name:  # less in residual projections: their sum keeps its size
                nn.init.normal_(p, std=std / math.sqrt(2 * config.n_layer) if "c_proj" in name else std)

    @classmethod
    def from_pretrained(cls, name: str, new_tokens: int = 0):
        """OpenAI's GPT-2, by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or from a folder in Hugging Face's layout,
        with rows for new_tokens more tokens. What it reads and what it raises: nanopost/huggingface.py."""
        from nanopost.huggingface import add_rows, read

        sizes, state = read(name)
        model = cls(GPTConfig(**{**sizes, "vocab_size": sizes["vocab_size"] + new_tokens}))
        state["wte.weight"] = add_rows(state["wte.weight"], model.config.rows - sizes["vocab_size"])
        model.load_state_dict(state)
        return model

    def add_head(self, std: float):
        """Adds a fresh scalar head: weights of standard deviation std, bias 0 (std 0: its output is 0 everywhere)."""
        self.config.scalar_head = True
        self.head = nn.Linear(self.config.n_embd, 1).to(self.wte.weight)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)
        return self

    @property
    def device(self):
        return self.wte.weight.device

    def forward(self, ids: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """ids (B, T) int64 -> hidden states after the final LayerNorm (B, T, C).

        With an empty cache: the same, and the cache gets the keys and values; then call cache.fill. With a filled one:
        ids (B, 1) are the rows' next tokens; call cache.extend first. Raises ValueError beyond block_size.
        """
        T, device = ids.shape[1], ids.device
        decoding = cache is not None and cache.used > 0
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are longer than the context of {self.config.block_size}")
        if decoding:
            position = cache.pos[:, None]  # (B, 1)
            mask = (torch.arange(cache.span, device=device) <= position)[:, None, None]  # (B, 1, 1, S): its own tokens
            bias = torch.zeros(mask.shape, device=device, dtype=cache.kv.dtype)
            mask = bias.masked_fill(~mask, -math.inf)  # added to the scores: made once, not once per layer
        else:
            position, mask = torch.arange(T, device=device), None  # (T,)
        x = self.drop(self.wte(ids) + self.wpe(position))  # (B, T, C)
        for layer, block in enumerate(self.h):
            # with a cache the shapes are others: .forward bypasses torch.compile
            x = block(x) if cache is None else block.forward(x, cache.kv[layer], cache.pos, mask)
        if decoding:
            cache.pos.add_(1)
        return self.ln_f(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> (..., V). Rows beyond the real tokens are cut off, so they get no probability.

        Under bf16 autocast they are made in fp32 (TF32 on a GPU that has it): GPT-2's are near -100, where two
        neighbouring numbers of bf16 are 0.5 apart."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
            with torch.autocast(device, enabled=False):
                logits = linear(upcast(hidden), self.wte.weight)
        else:
            logits = linear(hidden, self.wte.weight)
        return logits[..., : self.config.vocab_size]

    def scalar(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> (...): the value or the reward at each position, in fp32 even under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight)).squeeze(-1)

    def score(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """ids (B, T), lengths (B,) -> (B,) fp32: the scalar head at each row's last real token."""
        rows = torch.arange(len(ids), device=ids.device)
        return self.scalar(self(ids)[rows, lengths - 1])  # (B, T, C) -> (B, C) -> (B,)

    def logprobs(self, hidden: torch.Tensor, ids: torch.Tensor, index: torch.Tensor, temperature: float = 1.0):
        """Token log-probabilities in nats, fp32, target-aligned: hidden (B, T, C), ids (B, T) -> (B, T-1).

        Column t is log p(ids[:, t+1] | ids[:, :t+1]) at the flat positions `index` (N,) of (B, T-1), and 0 elsewhere:
        only N rows of logits are ever made. The distribution is softmax(logits / temperature).
        """
        hidden = hidden[:, :-1].flatten(0, 1)[index]  # (B, T, C) -> (B, T-1, C) -> (N, C)
        targets = ids[:, 1:].flatten()[index]  # (N,)
        parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        logp = torch.cat([-self.nll(self.logits(h), target, temperature) for h, target in parts])  # (N,)
        return logp.new_zeros(ids[:, 1:].numel()).index_put((index,), logp).view_as(ids[:, 1:])  # (B, T-1)
