"""Sampling: a batch of prompts of different lengths, a key-value cache, stop at the end token.

Rows start at column 0 and prompts are padded on the right, so the prefill is the plain causal forward and the finished
buffer is directly a training batch. Each row writes its next token at its own column. Nothing is read back to the host
but once every few steps, to drop the rows that have ended; so on a GPU a step is a CUDA graph, one launch in place of
a few hundred.
"""

from dataclasses import dataclass

import torch

from nanopost.model import GPT, KVCache, upcast

CHECK_EVERY = 4  # decoding steps between two looks at which rows have ended
GRAPHS = ("cuda",)  # devices where a decoding step is captured and replayed
BATCH_TOKENS = 2**16  # of all rows of a batch together: 5 GB of keys and values in fp32 for GPT-2 124M


@dataclass
class Samples:
    """R sampled sequences, prompt and response in one row, right-padded to T tokens; per-token tensors target-aligned.

    ids (R, T) int64; prompt_lengths (R,), lengths (R,) int64 in tokens, the end token counted; mask (R, T-1) bool, True
    where ids[:, t+1] is a response token, the end token included; logprobs (R, T-1) fp32 in nats under the distribution
    sampled from, zero outside the mask; values (R, T-1) fp32 of the scalar head, zero outside the mask, None without a
    head; ended (R,) bool: the row closed its answer itself.
    """

    ids: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor | None
    ended: torch.Tensor

    def responses(self) -> list[list[int]]:
        """The response ids of every row, without the end token."""
        rows = zip(self.ids.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), self.ended.tolist())
        return [ids[start : stop - ended] for ids, start, stop, ended in rows]


def filter_logits(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Keeps the top_k most likely tokens, and the fewest whose probabilities reach top_p; the rest get -inf. (..., V)

    For chatting only: a truncated distribution has zeros, and ratios and KL of the training losses are undefined there.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of the tokens before this one
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def capture(step):
    """Records the kernels that step() launches, without running them, as a CUDA graph: a function that runs them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread may go on meanwhile
        step()
    return graph.replay


def replayed(step):
    """step(), whose first call is a warm-up: libraries initialise, autocast makes its copies of the weights. The second
    is captured, and it and all later ones are replayed: step must use the same tensors each time, and never look."""
    warm, replay = False, None

    def call():
        nonlocal warm, replay
        if not warm:
            warm = True
            return step()
        replay = replay or capture(step)
        replay()

    return call


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, end: int, *, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None,
             noise: torch.Tensor | None = None, pad: int = 0, on_token=None) -> Samples:
    """Samples one response to each prompt (lists of ids), of at most max_new_tokens with the end token counted.

    temperature 0 is greedy. All chance is in `noise`, (R, max_new_tokens) uniform numbers in [0, 1), drawn with
    `generator` if not given: a row's response depends on its prompt and its noise and on no other row. In fp32 a
    probability is resolved to 2^-24 = 6e-8. `on_token(ids)`, for streaming, is called with each step's tokens, a list
    of those of the rows still going. Raises ValueError for an empty prompt, or one that leaves no room in the context.
    """
    lengths = torch.tensor([len(p) for p in prompts])
    R, P, block = len(prompts), int(lengths.max()), model.config.block_size
    if lengths.min() == 0:
        raise ValueError("a prompt must have at least one token")
    if P + max_new_tokens > block:
        raise ValueError(f"a prompt of {P} tokens and {max_new_tokens} new ones exceed the context of {block}")
    device, S, training = model.device, P + max_new_tokens, model.training
    model.eval()  # no dropout: the log-probabilities are the model's own
    ids = torch.full((R, S), pad)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ids, prompt_lengths = ids.to(device), lengths.to(device)
    lengths = prompt_lengths.clone()
    logprobs = upcast(model.wte.weight.new_zeros(R, S - 1))
    values = torch.zeros_like(logprobs) if model.head is not None else None
    ended = torch.zeros(R, dtype=torch.bool, device=device)
    if temperature > 0:
        if noise is None:
            noise = torch.rand(R, max_new_tokens, generator=generator, device=generator.device if generator else None)
        noise = noise.to(logprobs)

    graphs, autocast = device.type in GRAPHS, torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else model.wte.weight.dtype
    cache = KVCache(model.config, R, S, device, dtype, columns=64 if graphs else 8)
    hidden = model(ids[:, :P], cache)  # (R, P, C)
    hidden = hidden[torch.arange(R, device=device), lengths - 1]  # (R, C): at the last token of each prompt
    cache.fill(lengths, P)
    rows = torch.arange(R, device=device)  # (n,) the samples that the n rows of the cache belong to

    def choose(hidden):
        """The next token of every row (n,), from the hidden state of its last (n, C); writes down all about it."""
        column, logits = cache.pos, model.logits(hidden)  # (n,), (n, V)
        if temperature not in (0, 1):
            logits = upcast(logits) / temperature
        p = filter_logits(logits, top_k, top_p).softmax(-1, dtype=logprobs.dtype)  # (n, V)
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            below = p.cumsum(-1)  # (n, V): the probability of all tokens up to this one
            total = below[:, -1:]  # 1 up to rounding; a token is where the noise falls, and never beyond the last
            where = noise[rows, column - prompt_lengths[rows], None] * total
            where = torch.minimum(where, total.nextafter(total.new_zeros(1)))
            token = torch.searchsorted(below, where, right=True)[:, 0]  # (n,)
            token = token.clamp(max=p.shape[1] - 1)  # nothing is above NaN; the loss will be NaN and says so
        live = ~ended[rows]
        ids[rows, column] = torch.where(live, token, ids[rows, column])
        logprobs[rows, column - 1] = torch.where(live, p.gather(1, token[:, None])[:, 0].log(), 0.0)
        if values is not None:
            values[rows, column - 1] = torch.where(live, model.scalar(hidden), 0.0)
        lengths[rows] += live
        ended[rows] |= live & (token == end)
        return token

    def advance():
        token.copy_(choose(model(token[:, None], cache)[:, 0]))

    token, step, shape = choose(hidden), advance, None
    for n in range(1, max_new_tokens + 1):  # n tokens a row so far
        if on_token:
            on_token(token.tolist())
        if n == max_new_tokens:
            break
        if on_token or n % CHECK_EVERY == 0:
            stay = ~ended[rows]
            left = int(stay.sum())
            if left <= (len(rows) - 1 if on_token else len(rows) // 2):  # not for a few: it copies the cache
                rows, token = rows[stay], token[stay]
                cache.keep(stay)
            if not left:
                break
        cache.extend()
        if graphs and shape != (len(rows), cache.span):  # a graph is of one shape
            step, shape = replayed(advance), (len(rows), cache.span)
        step()
    model.train(training)

    T = int(lengths.max())
    column = torch.arange(1, T, device=device)  # the token that target-aligned column t is about
    mask = (column >= prompt_lengths[:, None]) & (column < lengths[:, None])  # (R, T-1)
    values = None if values is None else values[:, : T - 1]
    return Samples(ids[:, :T], prompt_lengths, lengths, mask, logprobs[:, : T - 1], values, ended)


def sample_text(model: GPT, tokenizer, prompts: list[list[int]], max_new_tokens: int, *, batch_size: int = 512,
                temperature: float = 1.0, seed: int = 0, noise: torch.Tensor | None = None) -> list[dict]:
    """Samples a response to each prompt in batches of like length, whose size changes nothing; in the prompts' order.

    A batch has at most batch_size rows and BATCH_TOKENS tokens: that bounds the key-value cache. noise (N,
    max_new_tokens) is as in generate; by default it is drawn from the seed.

    Returns a dict each: prompt_ids, ids (the response, end token included), text, ended, logprob (its sum, nats).
    """
    if noise is None:
        noise = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [None] * len(prompts)
    while order:
        longest = len(prompts[order[min(batch_size, len(order)) - 1]]) + max_new_tokens
        rows = max(1, min(batch_size, BATCH_TOKENS // longest))
        part, order = order[:rows], order[rows:]
        samples = generate(model, [prompts[i] for i in part], max_new_tokens, tokenizer.end, temperature=temperature,
                           noise=noise[part], pad=tokenizer.pad)
        totals = samples.logprobs.cpu().double().sum(1).tolist()
        for i, ids, ended, logprob in zip(part, samples.responses(), samples.ended.tolist(), totals):
            out[i] = {"prompt_ids": prompts[i], "ids": ids + [tokenizer.end] * ended, "text": tokenizer.decode(ids),
                      "ended": ended, "logprob": logprob}
    return out


def show_answers(model: GPT, tokenizer, prompts: list[list[int]], max_new_tokens: int, seed: int = 0) -> str:
    """A few prompts with the model's sampled answers, to read along while it trains."""
    room = model.config.block_size - max_new_tokens
    samples = sample_text(model, tokenizer, [ids for ids in prompts if len(ids) <= room], max_new_tokens, seed=seed)
    return "\n".join(f"    {tokenizer.decode(s['prompt_ids'])} {s['text']}{'<|end|>' * s['ended']}" for s in samples)
