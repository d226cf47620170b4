/* A GPT-2 in plain JavaScript, with its tokenizer: what nanopost/model.py, sampling.py and tokenizer.py do, for one
   sequence, one token at a time, on plain arrays. Nothing is hidden in a library: every sum is a loop.

   Sizes: V tokens in the vocabulary, C channels, H heads of D = C / H channels, L layers, S tokens so far. */
"use strict";

// ------------------------------------------------------------------------------------------------ the tokenizer
// Text becomes bytes, bytes become tokens: byte-level BPE, where a word that is a token is taken whole. A token is kept as
// a string with one character per byte.

const WHITE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"; // what Python calls white space
const WORDS = new RegExp( // GPT-2's split pattern: tokens never reach across these pieces
  `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^${WHITE}\\p{L}\\p{N}]+|[${WHITE}]+$|[${WHITE}]+(?![^${WHITE}])|[${WHITE}]`, "gu");

class Tokenizer {
  constructor(tokens, special) {
    this.tokens = tokens; // rank -> bytes
    this.ranks = new Map(tokens.map((token, rank) => [token, rank]));
    this.special = special; // "<|user|>" and the like: they take the ids after the vocabulary's own
  }

  id(name) { return this.tokens.length + this.special.indexOf(name); }

  /* The ids of a text. A text that contains "<|end|>" stays text: no typing can make a special token. */
  encode(text) {
    const ids = [];
    for (const [word] of text.matchAll(WORDS)) {
      const bytes = Array.from(new TextEncoder().encode(word), byte => String.fromCharCode(byte));
      const whole = bytes.join("");
      for (const token of this.ranks.has(whole) ? [whole] : this.merge(bytes)) ids.push(this.ranks.get(token));
    }
    return ids;
  }

  /* BPE: of all neighbours that together are a token, join those of the lowest rank, until none are. */
  merge(parts) {
    const rank = i => i + 1 < parts.length ? this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity : Infinity;
    const ranks = parts.map((_, i) => rank(i)); // of the pair that begins at i
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (!(ranks[best] < Infinity)) return parts;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best, 1);
      ranks[best] = rank(best);
      if (best > 0) ranks[best - 1] = rank(best - 1);
    }
  }

  prompt(text) { return [this.id("<|user|>"), ...this.encode(text), this.id("<|assistant|>")]; }

  /* One token as text; null if its bytes are only a part of a character. */
  text(id) {
    if (id >= this.tokens.length) return this.special[id - this.tokens.length] ?? null;
    try { return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytesOf(this.tokens[id])); }
    catch { return null; }
  }
}

function bytesOf(string) { return Uint8Array.from(string, character => character.charCodeAt(0)); }

// ---------------------------------------------------------------------------------------------- the transformer

/* y = W x + b, for W (rows, columns) stored row after row. */
function linear(x, W, b) {
  const columns = x.length, y = new Float32Array(W.length / columns);
  for (let row = 0; row < y.length; row++) {
    let sum = b ? b[row] : 0;
    for (let i = 0, w = row * columns; i < columns; i++) sum += W[w + i] * x[i];
    y[row] = sum;
  }
  return y;
}

/* Mean 0 and variance 1 over the channels, then a learned scale and shift. */
function layerNorm(x, scale, shift) {
  let mean = 0, variance = 0;
  for (const value of x) mean += value / x.length;
  for (const value of x) variance += (value - mean) ** 2 / x.length;
  const size = Math.sqrt(variance + 1e-5);
  return x.map((value, i) => (value - mean) / size * scale[i] + shift[i]);
}

/* A smooth ReLU; GPT-2 uses this approximation of it. */
function gelu(x) { return 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))); }

/* log p of every token: logits - log sum exp(logits), with the largest taken out so that no exp overflows. */
function logSoftmax(logits, temperature = 1) {
  let largest = -Infinity, sum = 0;
  for (const x of logits) largest = Math.max(largest, x / temperature);
  for (const x of logits) sum += Math.exp(x / temperature - largest);
  return Float64Array.from(logits, x => x / temperature - largest - Math.log(sum));
}

class GPT {
  /* sizes: {n_layer, n_head, n_embd, block_size}; weights: {name as in PyTorch: Float32Array} */
  constructor(sizes, weights) {
    this.sizes = sizes;
    this.weights = weights;
  }

  /* The cache: keys and values of all tokens so far, so that a new token needs one pass for itself alone. */
  cache() {
    const { n_layer: L, n_embd: C, block_size } = this.sizes;
    const room = () => Array.from({ length: L }, () => new Float32Array(block_size * C));
    return { length: 0, keys: room(), values: room() };
  }

  /* Reads one more token; returns the logits (V) of what comes after it. */
  read(id, cache) {
    const { weights } = this, C = this.sizes.n_embd, position = cache.length++;
    if (position >= this.sizes.block_size) throw new RangeError(`the context holds ${this.sizes.block_size} tokens`);
    let x = new Float32Array(C); // the residual stream: what the token is, plus where it is, and every layer adds to it
    for (let i = 0; i < C; i++) x[i] = weights["wte.weight"][id * C + i] + weights["wpe.weight"][position * C + i];
    for (let layer = 0; layer < this.sizes.n_layer; layer++) {
      const part = name => [weights[`h.${layer}.${name}.weight`], weights[`h.${layer}.${name}.bias`]];
      const attended = this.attend(linear(layerNorm(x, ...part("ln_1")), ...part("attn.c_attn")), layer, cache);
      x = add(x, linear(attended, ...part("attn.c_proj"))); // tokens exchange what they know
      const hidden = linear(layerNorm(x, ...part("ln_2")), ...part("mlp.c_fc")).map(gelu);
      x = add(x, linear(hidden, ...part("mlp.c_proj"))); // each token thinks by itself
    }
    x = layerNorm(x, weights["ln_f.weight"], weights["ln_f.bias"]);
    return linear(x, weights["wte.weight"]); // the output matrix is that of the input: a token is likely if x points at it
  }

  /* Attention: the token's query meets the key of every token before it (and its own); their values are averaged. */
  attend(qkv, layer, cache) {
    const { n_embd: C, n_head: H } = this.sizes, D = C / H, S = cache.length;
    const keys = cache.keys[layer], values = cache.values[layer];
    keys.set(qkv.subarray(C, 2 * C), (S - 1) * C);
    values.set(qkv.subarray(2 * C), (S - 1) * C);
    const y = new Float32Array(C);
    for (let head = 0; head < C; head += D) { // this head's channels are head .. head + D - 1
      const scores = new Float32Array(S);
      for (let s = 0; s < S; s++) {
        let dot = 0;
        for (let i = head; i < head + D; i++) dot += qkv[i] * keys[s * C + i];
        scores[s] = dot / Math.sqrt(D);
      }
      const attention = logSoftmax(scores).map(Math.exp); // weights that sum to 1; later tokens do not exist yet
      for (let s = 0; s < S; s++) for (let i = head; i < head + D; i++) y[i] += attention[s] * values[s * C + i];
    }
    return y;
  }

  /* log p of every token at every place of the response: what it was chosen from. ids: prompt and response. */
  distributions(ids, promptLength) {
    const cache = this.cache(), found = [];
    ids.slice(0, -1).forEach((id, i) => {
      const logits = this.read(id, cache);
      if (i >= promptLength - 1) found.push(logSoftmax(logits));
    });
    return found;
  }
}

function add(x, y) { return x.map((value, i) => value + y[i]); }

/* The weights as the page holds them: 16 bits each. A matrix has a scale for every row: weight = scale x integer. */
function unpack(base64, shapes) {
  const bytes = bytesOf(atob(base64)).buffer, weights = {};
  let at = 0;
  const take = (Kind, count) => new Kind(bytes.slice(at, at += count * Kind.BYTES_PER_ELEMENT));
  for (const [name, rows, columns] of shapes) {
    const scales = take(Float32Array, rows);
    weights[name] = columns ? Float32Array.from(take(Int16Array, rows * columns), (w, i) => w * scales[Math.floor(i / columns)]) : scales;
  }
  return weights;
}

// -------------------------------------------------------------------------------------------------- sampling

/* The token whose stretch of the line from 0 to 1 holds the number: as long as its probability, in the order of ids. So
   with the same number, two models that agree on the probabilities choose the same token. Temperature 0: the likeliest. */
function choose(logprobs, number, temperature) {
  if (temperature === 0) return logprobs.reduce((best, x, id) => x > logprobs[best] ? id : best, 0);
  let sum = 0;
  return logprobs.findIndex(x => (sum += Math.exp(x)) > number);
}

/* Yields an answer token by token: {id, logprobs}; logprobs are those at temperature 1. */
function* generate(model, prompt, end, { temperature, noise }) {
  const cache = model.cache();
  let logits;
  for (const id of prompt) logits = model.read(id, cache);
  for (const number of noise) {
    const id = choose(logSoftmax(logits, temperature || 1), number, temperature);
    yield { id, logprobs: logSoftmax(logits) };
    if (id === end || cache.length === model.sizes.block_size) return;
    logits = model.read(id, cache);
  }
}
