"use strict";
/* LLaVA from pixels to words in plain JavaScript: tokenizer.py, images.py, clip.py, llama.py, llava.py and generate.py once
more, under the same names, for one picture and one row of tokens. What a batch, padding and other number types ask
for is left out; what a lesson asks for is put in: every part notes what it computes, and can be switched off (`off`).

Shapes: P patches, T new tokens, S slots that can be attended to, D width, H heads, K key/value heads, E head width.
A matrix (rows, columns) is a Float32Array, row after row; sums are taken in 64 bits, as JavaScript's numbers are. */

class Matrix {
  constructor(rows, columns, data = new Float32Array(rows * columns)) {
    Object.assign(this, {rows, columns, data});
  }
  row(i) { return this.data.subarray(i * this.columns, (i + 1) * this.columns); }
  slice(from, to) { return new Matrix(to - from, this.columns, this.data.subarray(from * this.columns, to * this.columns)); }
}

// The weights of a safetensors file: 8 bytes that say how long the JSON is, the JSON that says what is where, and float16
// numbers, which become float32 here. Returns a Map of name -> Matrix; a vector is one row.
function read_safetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const weights = new Map();
  for (const [name, {dtype, shape, data_offsets: [from, to]}] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F16") throw new Error(`${name} is ${dtype}; expected F16`);
    const halves = new Uint16Array(buffer.slice(8 + length + from, 8 + length + to)), floats = new Float32Array(halves.length);
    for (let i = 0; i < halves.length; i++) floats[i] = HALVES[halves[i]];
    const rows = shape.length > 1 ? shape[0] : 1;
    weights.set(name, new Matrix(rows, floats.length / rows, floats));
  }
  return weights;
}

// The value of each float16: 1 bit of sign, 5 of exponent, 10 of fraction.
const HALVES = Float32Array.from({length: 65536}, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

// ------------------------------------------------------------------------------------------------------ torch.nn

// x Wᵀ + b: (T, in), (out, in), (1, out) -> (T, out). Two rows of x by four of W at a time: what is loaded once is used more
// often. Where fewer are left over, some that are done are done again (W has four rows at least).
function linear(x, weight, bias) {
  const n = x.columns, T = x.rows, M = weight.rows, out = new Matrix(T, M), from = x.data, w = weight.data, to = out.data;
  for (let t = 0; t < T; t += 2) {
    const u = Math.min(t + 1, T - 1), first = t * n, second = u * n;
    for (let block = 0; block < M; block += 4) {
      const o = Math.min(block, M - 4), a = o * n, b = a + n, c = b + n, d = c + n;
      let ta = 0, tb = 0, tc = 0, td = 0, ua = 0, ub = 0, uc = 0, ud = 0;
      for (let i = 0; i < n; i++) {
        const p = from[first + i], q = from[second + i], wa = w[a + i], wb = w[b + i], wc = w[c + i], wd = w[d + i];
        ta += p * wa; tb += p * wb; tc += p * wc; td += p * wd;
        ua += q * wa; ub += q * wb; uc += q * wc; ud += q * wd;
      }
      to[t * M + o] = ta; to[t * M + o + 1] = tb; to[t * M + o + 2] = tc; to[t * M + o + 3] = td;
      to[u * M + o] = ua; to[u * M + o + 1] = ub; to[u * M + o + 2] = uc; to[u * M + o + 3] = ud;
    }
  }
  return bias ? map(out, (value, i) => value + bias.data[i % M]) : out;
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

function add(x, y) { return new Matrix(x.rows, x.columns, x.data.map((value, i) => value + y.data[i])); }

function map(x, f) { return new Matrix(x.rows, x.columns, x.data.map(f)); }

function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity), weights = Float64Array.from(scores, s => Math.exp(s - most));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map(w => w / sum);
}

// (x − mean) / √(variance + eps) · weight + bias, of each row.
function layer_norm(x, weight, bias, eps) {
  const out = new Matrix(x.rows, x.columns);
  for (let t = 0; t < x.rows; t++) {
    const row = x.row(t), to = out.row(t), mean = row.reduce((a, b) => a + b, 0) / row.length;
    const variance = row.reduce((sum, v) => sum + (v - mean) ** 2, 0) / row.length, scale = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < row.length; i++) to[i] = (row[i] - mean) * scale * weight.data[i] + bias.data[i];
  }
  return out;
}

const sigmoid = x => 1 / (1 + Math.exp(-x)), silu = x => x * sigmoid(x), quick_gelu = x => x * sigmoid(1.702 * x);
const gelu = x => x * (1 + erf(x / Math.SQRT2)) / 2;

// The error function by its series 2/√π e^(−x²) Σ 2ⁿ x^(2n+1) / (1 · 3 · … · (2n+1)), all of whose terms have one sign.
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) sum += term *= 2 * x * x / (2 * n + 1);
  return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}

// softmax(q kᵀ / √E) v, head by head: q (T, H·E), k and v (S, K·E) -> (T, H·E). Query t sees slot s if visible(t, s).
// maps: an array to add the weights to, [head] -> Matrix (T, S); off(head): leave this head's result out.
function naive_attention(q, k, v, heads, visible, maps, off) {
  const E = q.columns / heads, groups = heads / (k.columns / E), out = new Matrix(q.rows, q.columns), noted = [];
  for (let h = 0; h < heads; h++) {
    const weights = new Matrix(q.rows, k.rows), at = Math.floor(h / groups) * E;  // H / K query heads share one key/value head
    for (let t = 0; t < q.rows; t++) {
      const query = q.row(t).subarray(h * E, (h + 1) * E), scores = new Float64Array(k.rows).fill(-Infinity);
      for (let s = 0; s < k.rows; s++) if (visible(t, s)) scores[s] = dot(query, k.row(s).subarray(at, at + E)) / Math.sqrt(E);
      weights.row(t).set(softmax(scores));
      const to = out.row(t), w = weights.row(t);
      if (!off(h)) for (let s = 0; s < k.rows; s++) {
        if (w[s]) for (let i = 0; i < E; i++) to[h * E + i] += w[s] * v.data[s * v.columns + at + i];
      }
    }
    noted.push(weights);
  }
  if (maps) maps.push(noted);
  return out;
}

// What a lesson may change: is this block of this tower ("clip" or "llama") left out, is this head, may the token at position
// `query` look at the one at `key`, and which of CLIP's layers are read (null: the model's own).
const NOTHING_OFF = {block: (tower, n) => false, head: (tower, n, h) => false, sees: (query, key) => true, layers: null};

// -------------------------------------------------------------------------------------------------- tokenizer.py

class Tokenizer {
  // pieces: [[text, score, kind], …] of the SentencePiece model, kind "normal", "byte" or "special"; specials: {literal: id}.
  constructor({pieces, specials, bos_id, eos_id, image_id}) {
    Object.assign(this, {pieces, specials, bos_id, eos_id, image_id});
    this.ids = new Map(pieces.flatMap(([text, , kind], id) => kind === "normal" ? [[text, id]] : []));
    this.bytes = pieces.flatMap(([, , kind], id) => kind === "byte" ? [id] : []);
  }

  // Ids of a text, BOS first. A special token's literal becomes its one id; each stretch between them stands alone.
  encode(text) {
    const escaped = Object.keys(this.specials).map(literal => literal.replace(/[^\w]/g, "\\$&"));
    const parts = text.split(new RegExp(`(${escaped.join("|")})`)).filter(part => part);
    return [this.bos_id, ...parts.flatMap(part => Object.hasOwn(this.specials, part) ? this.specials[part] : this.encode_part(part))];
  }

  // Byte-pair encoding: single characters, of which the pair with the best score is merged until none is in the vocabulary.
  encode_part(text) {
    const symbols = Array.from("▁" + text.replaceAll(" ", "▁"));
    for (;;) {
      let best = -1, score = -Infinity;
      for (let i = 0; i + 1 < symbols.length; i++) {
        const id = this.ids.get(symbols[i] + symbols[i + 1]);
        if (id !== undefined && this.pieces[id][1] > score) [best, score] = [i, this.pieces[id][1]];
      }
      if (best < 0) break;
      symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
    }
    // A character outside the vocabulary is spelt in bytes.
    return symbols.flatMap(s => this.ids.has(s) ? [this.ids.get(s)] : Array.from(new TextEncoder().encode(s), byte => this.bytes[byte]));
  }

  // The text of some ids: special tokens left out, without the leading space.
  decode(ids) {
    let text = "", run = [];
    for (const id of [...ids, null]) {
      const [piece, , kind] = this.pieces[id] ?? ["", 0, "special"];
      if (id !== null && kind === "special") continue;
      if (kind === "byte") { run.push(this.bytes.indexOf(id)); continue; }
      if (run.length) text += utf8(run);
      run = [];
      text += piece.replaceAll("▁", " ");
    }
    return text.replace(/^ /, "");
  }
}

function utf8(bytes) {
  try {
    return new TextDecoder("utf-8", {fatal: true, ignoreBOM: true}).decode(new Uint8Array(bytes));
  } catch {
    return "�".repeat(bytes.length);
  }
}

// Each <image> id as often as the picture has features.
function expand_images(ids, image_id, count) { return ids.flatMap(id => id === image_id ? Array(count).fill(id) : [id]); }

// The prompt of one question about one picture. style: a row of tokenizer.STYLES. What a user types is text and nothing else.
function chat_prompt(question, style) {
  const literal = [...style.specials, ...style.turns].find(literal => question.includes(literal));
  const problem = "which the model would not read as text; write it another way";
  if (literal) throw new Error(`the question contains ${JSON.stringify(literal)}, ${problem}`);
  return (style.system && style.system + style.separator) + style.begin + style.user + "<image>\n" + question + style.assistant;
}

// ----------------------------------------------------------------------------------------------------- images.py

class ImageProcessor {
  constructor({size, crop_size, image_mean, image_std}) { Object.assign(this, {size, crop_size, image_mean, image_std}); }

  // A picture of any size, {width, height, data: RGBA bytes}, as a canvas gives it -> pixel values (3, S·S).
  call(image) {
    const short = Math.min(image.width, image.height), long = Math.floor(this.size * Math.max(image.width, image.height) / short);
    const [width, height] = image.width <= image.height ? [this.size, long] : [long, this.size];
    const resized = bicubic(image, width, height), side = this.crop_size;
    const left = width - side >> 1, top = height - side >> 1, pixels = new Matrix(3, side * side);
    for (let c = 0; c < 3; c++) for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) {
      const level = Math.fround(resized[4 * ((y + top) * width + x + left) + c] * 0.00392156862745098);
      pixels.data[(c * side + y) * side + x] = Math.fround(level - Math.fround(this.image_mean[c])) / Math.fround(this.image_std[c]);
    }
    return pixels;
  }
}

// Pillow's bicubic resizing of bytes, to the bit: rows first, then columns, each a weighted sum in whole numbers of 2⁻²².
function bicubic({width, height, data}, to_width, to_height) {
  if (to_width !== width) data = resample(data, height, width, to_width, 4 * width, 4, 4 * to_width, 4);
  if (to_height !== height) data = resample(data, to_width, height, to_height, 4, 4 * to_width, 4, 4 * to_width);
  return data;
}

// Each of `lines` lines from `from` to `to` pixels. line, step: bytes from line to line and from pixel to pixel, before and after.
function resample(data, lines, from, to, line, step, to_line, to_step) {
  const out = new Uint8ClampedArray(lines * to * 4), scale = from / to, wide = Math.max(scale, 1);
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale, first = Math.max(0, Math.trunc(centre - 2 * wide + 0.5)), weights = [];
    for (let k = first; k < Math.min(from, Math.trunc(centre + 2 * wide + 0.5)); k++) weights.push(cubic((k - centre + 0.5) / wide));
    const sum = weights.reduce((a, b) => a + b, 0), whole = weights.map(w => Math.trunc(w / sum * 2 ** 22 + (w < 0 ? -0.5 : 0.5)));
    for (let n = 0; n < lines; n++) for (let c = 0; c < 4; c++) {
      let value = 2 ** 21;
      for (let k = 0; k < whole.length; k++) value += whole[k] * data[n * line + (first + k) * step + c];
      out[n * to_line + i * to_step + c] = Math.floor(value / 2 ** 22);
    }
  }
  return out;
}

function cubic(x, a = -0.5) {
  x = Math.abs(x);
  return x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

// ------------------------------------------------------------------------------------------------------- clip.py

class CLIPVision {
  constructor(config, weights) { Object.assign(this, {config, weights}); }

  // Hidden states of the layers asked for, in the order asked: (3, S·S) -> L × (1 + P, D). noted: {states, maps}, to be filled.
  call(pixel_values, layers, noted = {states: [], maps: []}, off = NOTHING_OFF) {
    const {num_hidden_layers: depth, layer_norm_eps: eps} = this.config, w = name => this.weights.get(`vision_tower.${name}`);
    const wanted = layers.map(k => k < 0 ? k + depth + 1 : k);

    const patches = linear(this.patches(pixel_values), w("patch_embedding.weight"));  // (P, D): a convolution of stride 14
    let x = new Matrix(1 + patches.rows, patches.columns);
    x.data.set(w("class_embedding").data);  // (1 + P, D)
    x.data.set(patches.data, patches.columns);
    x = layer_norm(add(x, w("position_embedding.weight")), w("pre_layrnorm.weight"), w("pre_layrnorm.bias"), eps);
    noted.states.push(x);
    for (let n = 0; n < Math.max(...wanted); n++) {
      if (!off.block("clip", n)) x = this.block(x, name => w(`layers.${n}.${name}`), noted.maps, h => off.head("clip", n, h));
      noted.states.push(x);
    }
    return wanted.map(k => noted.states[k]);
  }

  // The numbers of each patch in one row, as the kernel of the convolution has them: (3, S·S) -> (P, 3·14·14).
  patches(pixel_values) {
    const {image_size: S, patch_size: p} = this.config, grid = Math.floor(S / p), out = new Matrix(grid * grid, 3 * p * p);
    for (let n = 0; n < out.rows; n++) for (let c = 0; c < 3; c++) for (let y = 0; y < p; y++) for (let x = 0; x < p; x++) {
      out.row(n)[(c * p + y) * p + x] = pixel_values.data[(c * S + Math.floor(n / grid) * p + y) * S + n % grid * p + x];
    }
    return out;
  }

  block(x, w, maps, off) {
    const eps = this.config.layer_norm_eps;
    x = add(x, this.self_attn(layer_norm(x, w("layer_norm1.weight"), w("layer_norm1.bias"), eps), w, maps, off));
    x = add(x, this.mlp(layer_norm(x, w("layer_norm2.weight"), w("layer_norm2.bias"), eps), w));
    return x;
  }

  self_attn(x, w, maps, off) {
    const [q, k, v] = ["q", "k", "v"].map(p => linear(x, w(`self_attn.${p}_proj.weight`), w(`self_attn.${p}_proj.bias`)));
    const out = naive_attention(q, k, v, this.config.num_attention_heads, () => true, maps, off);
    return linear(out, w("self_attn.out_proj.weight"), w("self_attn.out_proj.bias"));
  }

  mlp(x, w) { return linear(map(linear(x, w("mlp.fc1.weight"), w("mlp.fc1.bias")), quick_gelu), w("mlp.fc2.weight"), w("mlp.fc2.bias")); }
}

// ------------------------------------------------------------------------------------------------------ llama.py

class KVCache {
  constructor(config, max_length) {
    const make = () => Array.from({length: config.num_hidden_layers},
      () => new Matrix(max_length, config.num_key_value_heads * config.head_dim));
    Object.assign(this, {keys: make(), values: make(), length: 0, max_length});
  }

  // Put keys and values (T, K·E) of one layer into the next slots; returns that layer's (S, K·E), those slots included.
  write(layer, keys, values) {
    return [[this.keys, keys], [this.values, values]].map(([stored, fresh]) => {
      stored[layer].data.set(fresh.data, this.length * fresh.columns);
      return stored[layer].slice(0, this.length + fresh.rows);
    });
  }

  truncate(length) { this.length = length; }
}

class Llama {
  constructor(config, weights) { Object.assign(this, {config, weights}); }

  embed(ids) {
    const table = this.weights.get("language_model.embed_tokens.weight"), out = new Matrix(ids.length, table.columns);
    ids.forEach((id, t) => out.row(t).set(table.row(id)));
    return out;
  }

  // Embeddings (T, D) to normalised last hidden states (T, D). noted: {states, maps}, to be filled; the last state normalised.
  // last: return (1, D), the last token's; of the others the last block then computes keys and values only.
  call(x, cache, noted = {states: [], maps: []}, off = NOTHING_OFF, last = false) {
    const {num_hidden_layers: depth, head_dim, rope_theta, sliding_window: window} = this.config, first = cache.length;
    if (first + x.rows > cache.max_length) throw new Error(`${x.rows} tokens after ${first} do not fit ${cache.max_length} slots`);
    const rope = rope_table(Array.from({length: x.rows}, (_, t) => first + t), head_dim, rope_theta);
    const visible = (t, s) => s <= first + t && (!window || s > first + t - window) && (s === first + t || off.sees(first + t, s));
    for (let n = 0; n < depth; n++) {
      noted.states.push(x);
      const w = name => this.weights.get(`language_model.layers.${n}.${name}.weight`);
      const write = (k, v) => cache.write(n, k, v), only = last && n === depth - 1;
      if (!off.block("llama", n)) x = this.block(x, w, rope, visible, write, noted.maps, h => off.head("llama", n, h), only);
    }
    cache.length += rope.cos.rows;
    if (last) x = x.slice(x.rows - 1, x.rows);
    x = rms_norm(x, this.weights.get("language_model.norm.weight"), this.config.rms_norm_eps);
    noted.states.push(x);
    return x;
  }

  block(x, w, rope, visible, write, maps, off, last) {
    const eps = this.config.rms_norm_eps,
      attended = this.self_attn(rms_norm(x, w("input_layernorm"), eps), w, rope, visible, write, maps, off, last);
    x = add(last ? x.slice(x.rows - 1, x.rows) : x, attended);
    x = add(x, this.mlp(rms_norm(x, w("post_attention_layernorm"), eps), w));
    return x;
  }

  self_attn(x, w, {cos, sin}, visible, write, maps, off, last) {
    const k = rotate(linear(x, w("self_attn.k_proj")), cos, sin), v = linear(x, w("self_attn.v_proj")), before = last ? x.rows - 1 : 0;
    const [keys, values] = write(k, v);  // (S, K·E)
    const [asking, c, s] = [x, cos, sin].map(m => m.slice(before, m.rows)), q = rotate(linear(asking, w("self_attn.q_proj")), c, s);
    const out = naive_attention(q, keys, values, this.config.num_attention_heads, (t, slot) => visible(before + t, slot), maps, off);
    return linear(out, w("self_attn.o_proj"));
  }

  mlp(x, w) {
    const gate = linear(x, w("mlp.gate_proj")), up = linear(x, w("mlp.up_proj"));
    return linear(new Matrix(gate.rows, gate.columns, gate.data.map((g, i) => silu(g) * up.data[i])), w("mlp.down_proj"));
  }

  lm_head(x) { return linear(x, this.weights.get("language_model.lm_head.weight")); }
}

// x / √(mean(x²) + eps) · weight, of each row.
function rms_norm(x, weight, eps) {
  const out = new Matrix(x.rows, x.columns);
  for (let t = 0; t < x.rows; t++) {
    const row = x.row(t), scale = 1 / Math.sqrt(dot(row, row) / row.length + eps), to = out.row(t);
    for (let i = 0; i < row.length; i++) to[i] = row[i] * scale * weight.data[i];
  }
  return out;
}

// cos and sin of the angles position · theta^(−2i/E), i = 0 … E/2 − 1: two matrices (T, E/2).
function rope_table(positions, head_dim, theta) {
  const half = head_dim / 2, cos = new Matrix(positions.length, half), sin = new Matrix(positions.length, half);
  positions.forEach((position, t) => {
    for (let i = 0; i < half; i++) {
      const angle = position * theta ** (-2 * i / head_dim);
      cos.row(t)[i] = Math.cos(angle);
      sin.row(t)[i] = Math.sin(angle);
    }
  });
  return {cos, sin};
}

// RoPE in the half-split form: of each head, the pair (a, b) of dimensions i and i + E/2 becomes (a cos − b sin, b cos + a sin).
function rotate(x, cos, sin) {
  const half = cos.columns, out = new Matrix(x.rows, x.columns);
  for (let t = 0; t < x.rows; t++) {
    const row = x.row(t), to = out.row(t), c = cos.row(t), s = sin.row(t);
    for (let head = 0; head < x.columns; head += 2 * half) for (let i = 0; i < half; i++) {
      const a = row[head + i], b = row[head + half + i];
      to[head + i] = a * c[i] - b * s[i];
      to[head + half + i] = b * c[i] + a * s[i];
    }
  }
  return out;
}

// ------------------------------------------------------------------------------------------------------ llava.py

class Llava {
  constructor(config, weights) {
    Object.assign(this, {config, weights});
    this.vision_tower = new CLIPVision(config.vision, weights);
    this.language_model = new Llama(config.text, weights);
  }

  // (P, L·V) -> (P, D). ViP-LLaVA normalises first, because the layers it concatenates differ in scale.
  projector(x) {
    const w = name => this.weights.get(`projector.${name}`), eps = this.config.projector_layernorm_eps;
    if (eps) x = layer_norm(x, w("projector_layernorm.weight"), w("projector_layernorm.bias"), eps);
    return linear(map(linear(x, w("linear_1.weight"), w("linear_1.bias")), gelu), w("linear_2.weight"), w("linear_2.bias"));
  }

  // A picture (3, S·S) -> features (P, D) in the space of the word embeddings.
  encode_images(pixel_values, noted, off = NOTHING_OFF) {
    const states = this.vision_tower.call(pixel_values, off.layers ?? this.config.vision_layers, noted, off);
    return this.projector(concatenate(states.map(state => this.config.keep_cls ? state : state.slice(1, state.rows))));
  }

  // What the language model reads: word embeddings, with picture features where the <image> tokens stand.
  embed(input_ids, features) {
    const embeds = this.language_model.embed(input_ids);  // (T, D)
    return features ? splice(embeds, input_ids.map(id => id === this.config.image_id), features) : embeds;
  }

  // Pixels and ids to logits, with all that lies between.
  forward(input_ids, pixel_values, off) {
    const vision = {states: [], maps: []}, text = {states: [], maps: []};
    const features = pixel_values && this.encode_images(pixel_values, vision, off);
    const x = this.language_model.call(this.embed(input_ids, features), new KVCache(this.config.text, input_ids.length), text, off);
    return {logits: this.language_model.lm_head(x), image_features: features, vision, hidden_states: text.states, attentions: text.maps};
  }

  // Word by word: yields {token, logits} until the end. What the cache does not hold yet is in input_ids.
  *generate(input_ids, features, cache, {max_new_tokens = 128, temperature = 0, top_p = 1, random = Math.random, off} = {}) {
    let x = this.embed(input_ids, features);
    for (let step = 0; step < max_new_tokens && cache.length + x.rows <= cache.max_length; step++) {
      x = this.language_model.call(x, cache, undefined, off, true);  // only the last position needs logits
      const logits = this.language_model.lm_head(x).data;
      const token = sample(logits, temperature, top_p, random);
      yield {token, logits};
      if (this.config.eos_ids.includes(token)) return;
      x = this.embed([token]);
    }
  }
}

// L matrices (P, V), side by side: (P, L·V).
function concatenate(states) {
  const out = new Matrix(states[0].rows, states.length * states[0].columns);
  states.forEach((state, n) => { for (let p = 0; p < out.rows; p++) out.row(p).set(state.row(p), n * state.columns); });
  return out;
}

// Put picture features (P, D) in the place of the <image> tokens' embeddings (T, D), in order.
function splice(embeds, is_image, features) {
  const count = is_image.filter(Boolean).length;
  if (count !== features.rows) throw new Error(`${count} <image> tokens for ${features.rows} features`);
  const out = new Matrix(embeds.rows, embeds.columns, embeds.data.slice());
  let next = 0;
  is_image.forEach((image, t) => { if (image) out.row(t).set(features.row(next++)); });
  return out;
}

// --------------------------------------------------------------------------------------------------- generate.py

// The probabilities that a token is drawn with: temperature first, then the fewest of the likeliest that reach top_p.
function distribution(logits, temperature, top_p) {
  const most = logits.reduce((a, b) => Math.max(a, b)), p = softmax(Array.from(logits, l => (l - most) / Math.max(temperature, 1e-30)));
  const order = Array.from(p.keys()).sort((a, b) => p[b] - p[a]);
  let likelier = 0;
  order.forEach((id, n) => {
    const cut = n > 0 && top_p < 1 && likelier >= top_p;
    likelier += p[id];
    if (cut) p[id] = 0;
  });
  const sum = p.reduce((a, b) => a + b, 0);
  return p.map(value => value / sum);
}

// One id: the likeliest at temperature 0, else drawn. random: () -> a number from 0 up to 1.
function sample(logits, temperature, top_p, random) {
  if (temperature === 0) return logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
  const p = distribution(logits, temperature, top_p), target = random();
  let sum = 0;
  for (let id = 0; id < p.length; id++) if ((sum += p[id]) > target) return id;
  return p.findLastIndex(value => value > 0);
}
