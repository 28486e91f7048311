"use strict";
/* What is on the page: asking, drawing, the stages, the switches and the tour. The model itself is in model.js. */

const data = JSON.parse(document.getElementById("data").textContent), config = data.config;
const file = Uint8Array.from(atob(document.getElementById("weights").textContent), c => c.charCodeAt(0));
const model = new Llava(config, read_safetensors(file.buffer));
const tokenizer = new Tokenizer(data.tokenizer), processor = new ImageProcessor(data.processor);

const SIDE = config.vision.image_size, PATCH = config.vision.patch_size, GRID = Math.floor(SIDE / PATCH), P = GRID * GRID;
const LONGEST = 96;  // tokens of an answer, at the most

const state = {
  base: null, things: [], pixels: null, features: null,  // the picture: as chosen, what was drawn on it, as the model reads it
  question: "", prompt: [], cache: null, answer: [],  // answer: [{token, logits}, …]
  trace: null,  // what the model computed on the way to the answer: Llava.forward's result
  word: 0, patch: 0, head: null,  // what is looked at; head: [block, head]
};
const off = {blocks: new Set(), heads: new Set(), grey: new Set(), blind: new Set(), layers: null};

// ------------------------------------------------------------------------------------------------------- elements

const $ = id => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));
const percent = p => p >= 0.9995 ? "100 %" : p < 0.0001 ? "< 0.01 %" : `${Number((100 * p).toPrecision(p < 0.01 ? 1 : 3))} %`;
const number = value => value.toFixed(2).replace("-", "−");
const place = n => `row ${Math.floor(n / GRID) + 1}, column ${n % GRID + 1}`;
const press = (buttons, chosen) => buttons.forEach((button, n) => button.setAttribute("aria-pressed", n === chosen));

// Buttons in rows and columns, of which the Tab key finds one and the arrow keys the others.
function grid(element, columns, buttons, pick) {
  buttons.forEach((button, n) => {
    button.type = "button";
    button.tabIndex = n ? -1 : 0;
    button.onclick = () => { buttons.forEach(other => other.tabIndex = other === button ? 0 : -1); pick(n); };
    button.onkeydown = event => {
      const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key], to = buttons[n + step];
      if (step === undefined) return;
      event.preventDefault();
      if (!to || Math.abs(step) === 1 && Math.floor((n + step) / columns) !== Math.floor(n / columns)) return;
      button.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    };
  });
  return buttons;
}

// A square of so many cells a side over the picture.
function square(element, cells, pick) {
  element.style.gridTemplate = `repeat(${cells}, 1fr) / repeat(${cells}, 1fr)`;
  const buttons = grid(element, cells, Array.from({length: cells * cells}, () => make("button")), pick);
  element.replaceChildren(...buttons);
  return buttons;
}

// A list of words with bars: rows of {label, p, cut, pick, chosen}.
function bars(list, rows) {
  const focused = [...list.children].findIndex(row => row.contains(document.activeElement));  // what is replaced must not lose it
  list.replaceChildren(...rows.map(({label, p, text, cut, pick, chosen}) => {
    const word = pick ? make("button", {type: "button", onclick: pick, "aria-pressed": Boolean(chosen)}, label) : make("span", {}, label);
    const bar = make("span", {className: "bar", "aria-hidden": "true"});
    bar.style.setProperty("--p", Math.max(0, Math.min(1, p)));
    return make("li", {className: cut ? "cut" : ""}, word, bar,
      make("span", {className: "number"}, text ?? percent(p) + (cut ? " cut" : "")));
  }));
  list.children[focused]?.querySelector("button")?.focus();
}

// A token as it is shown: a space at its front is a space, what cannot be seen is named.
function spelling(id) {
  if (config.eos_ids.includes(id)) return "(end)";
  const literal = Object.keys(tokenizer.specials).find(name => tokenizer.specials[name] === id);
  const [piece, , kind] = tokenizer.pieces[id] ?? [literal ?? `(${id})`];  // the vocabulary may have rows that no token has
  const byte = kind === "byte" ? tokenizer.bytes.indexOf(id) : 0;
  return kind === "byte" && byte > 32 && byte < 127 ? String.fromCharCode(byte) : piece === "<0x0A>" ? "⏎" : piece.replaceAll("▁", " ");
}
const label = id => spelling(id).trim() || "␣";

const top_ids = (values, count) => Array.from(values.keys()).sort((a, b) => values[b] - values[a]).slice(0, count);
const cosine = (a, b) => dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b) || 1);

// -------------------------------------------------------------------------------------------------------- pictures

// The pixels of a picture, as RGBA bytes; what is transparent is laid on white.
function pixels_of(picture) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth ?? picture.width, picture.naturalHeight ?? picture.height];
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(picture, 0, 0);
  return pen.getImageData(0, 0, canvas.width, canvas.height);
}

function load_picture(url) {
  return new Promise((done, failed) => {
    const picture = new Image();
    picture.onload = () => done(picture);
    picture.onerror = () => failed(new Error("this file is not a picture that the browser reads"));
    picture.src = url;
  });
}

// The picture as the model sees it, its normalisation undone.
let seen = {};
function as_seen(pixels) {
  if (seen.pixels === pixels) return seen.canvas;
  const canvas = make("canvas", {width: SIDE, height: SIDE}), pen = canvas.getContext("2d"), image = pen.createImageData(SIDE, SIDE);
  const {image_mean: mean, image_std: deviation} = processor;
  for (let i = 0; i < SIDE * SIDE; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = 255 * (pixels.data[c * SIDE * SIDE + i] * deviation[c] + mean[c]);
    image.data[4 * i + 3] = 255;
  }
  pen.putImageData(image, 0, 0);
  seen = {pixels, canvas};
  return canvas;
}

// The patch that differs most from the picture's mean colour: a place where something is.
function striking(pixels) {
  const means = [0, 1, 2].map(c => pixels.row(c).reduce((a, b) => a + b, 0) / pixels.columns), patches = model.vision_tower.patches(pixels);
  const differs = n => patches.row(n).reduce((sum, value, i) => sum + (value - means[Math.floor(i / PATCH / PATCH)]) ** 2, 0);
  return top_ids(Array.from({length: P}, (_, n) => differs(n)), 1)[0];
}

// The world's own shapes, as tiny/world.py paints them.
function paint(pen, {kind, colour, size, cell}) {
  const radius = (data.world.sizes[size][0] + data.world.sizes[size][1]) / 2, third = SIDE / 6;
  const x = third * (2 * (cell % 3) + 1), y = third * (2 * Math.floor(cell / 3) + 1), turn = degrees => degrees * Math.PI / 180;
  pen.fillStyle = `rgb(${data.world.colours[colour]})`;
  pen.beginPath();
  if (kind === "circle" || kind === "ring") {
    pen.arc(x, y, radius, 0, 2 * Math.PI);
    if (kind === "ring") pen.arc(x, y, radius * 0.55, 0, 2 * Math.PI, true);
  } else {
    const [angles, radii] = {
      square: [[45, 135, 225, 315], [1.25]],
      triangle: [[-90, 30, 150], [1.2]],
      star: [Array.from({length: 10}, (_, k) => 36 * k - 90), [1.2, 0.5]],
      cross: [Array.from({length: 12}, (_, k) => 90 * Math.floor(k / 3) + [-19.8, 19.8, 45][k % 3]), [1.063, 1.063, 0.509]],
    }[kind];
    angles.forEach((angle, k) => {
      const r = radius * radii[k % radii.length];
      pen.lineTo(x + r * Math.cos(turn(angle)), y + r * Math.sin(turn(angle)));
    });
  }
  pen.fill();
}

// ViP-LLaVA's marks around the middle of a place, as marks.py draws them: {kind, colour, cell}.
function draw_mark(pen, {kind, colour, cell}) {
  const third = SIDE / 6, x = third * (2 * (cell % 3) + 1), y = third * (2 * Math.floor(cell / 3) + 1), r = third * 0.9;
  const rgb = data.marks.colours[colour];
  pen.strokeStyle = `rgba(${rgb}, 0.85)`;
  pen.fillStyle = `rgba(${rgb}, ${kind === "mask" ? 0.45 : 0.85})`;
  pen.lineWidth = data.marks.widths[kind];
  pen.lineJoin = pen.lineCap = "round";
  pen.beginPath();
  if (kind === "rectangle" || kind === "mask" || kind === "mask contour") pen.rect(x - r, y - r, 2 * r, 2 * r);
  if (kind === "ellipse") pen.ellipse(x, y, r, r, 0, 0, 2 * Math.PI);
  if (kind === "triangle") [[x, y - r], [x + r, y + r], [x - r, y + r]].forEach(corner => pen.lineTo(...corner));
  if (kind === "point") pen.arc(x, y, pen.lineWidth, 0, 2 * Math.PI);
  if (kind === "scribble") { pen.moveTo(x - r, y); pen.bezierCurveTo(x - r / 2, y - 2 * r, x + r / 2, y + 2 * r, x + r, y); }
  if (kind === "arrow") {
    const angle = Math.atan2(SIDE / 2 - y, SIDE / 2 - x),
      at = (length, turn) => [x + length * Math.cos(angle + turn), y + length * Math.sin(angle + turn)];
    pen.moveTo(x, y);
    pen.lineTo(...at(20, 0));
    pen.stroke();
    pen.beginPath();
    [at(7, Math.PI / 3), [x, y], at(7, -Math.PI / 3)].forEach(corner => pen.lineTo(...corner));
  }
  if (["rectangle", "ellipse", "triangle", "mask contour"].includes(kind)) pen.closePath();
  ["mask", "point", "arrow"].includes(kind) ? pen.fill() : pen.stroke();
}

// Take a picture, with what was drawn on it, through preprocessing and the vision tower.
function look() {
  const canvas = make("canvas", {width: state.base.width, height: state.base.height}), pen = canvas.getContext("2d");
  pen.drawImage(state.base, 0, 0);
  for (const thing of state.things) (thing.mark ? draw_mark : paint)(pen, thing);
  state.pixels = processor.call(pixels_of(canvas));
  state.features = null;
  state.patch = striking(state.pixels);
  document.documentElement.style.setProperty("--picture", `url(${as_seen(state.pixels).toDataURL()})`);
  $("canvas").querySelectorAll("button").forEach((button, cell) => {
    const there = state.things.filter(thing => thing.cell === cell).map(name_of).join(", ");
    button.setAttribute("aria-label", `${data.world.places[cell]}${there && `: ${there}`}`);
  });
}

const name_of = thing => thing.mark ? `${thing.colour} ${thing.kind} (mark)` : `${thing.size} ${thing.colour} ${thing.kind}`;

function empty_ground() {
  const canvas = make("canvas", {width: SIDE, height: SIDE}), pen = canvas.getContext("2d");
  pen.fillStyle = "rgb(236, 240, 244)";
  pen.fillRect(0, 0, SIDE, SIDE);
  return canvas;
}

async function show_example(n) {
  const {picture, question, answer} = data.examples[n];
  [state.base, state.things] = [pixels_canvas(await load_picture(picture)), []];
  press([...$("examples").children], n);
  $("about-picture").textContent = `Held out: no training picture shows this scene. To “${question}” the right answer is “${answer}”`;
  $("question").value = question;
  look();
}

const pixels_canvas = picture => {
  const image = pixels_of(picture), canvas = make("canvas", {width: image.width, height: image.height});
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
};

async function open_file(chosen) {
  if (!chosen) return;
  const url = URL.createObjectURL(chosen);
  try {
    const picture = await load_picture(url);
    const [short, long] = [picture.naturalWidth, picture.naturalHeight].sort((a, b) => a - b);
    const size = `${picture.naturalWidth} × ${picture.naturalHeight} pixels`;
    if (!short || long > 50 * short) throw new Error(`the picture has ${size}; expected sides that differ by 50 times at the most`);
    if (short * long > 4e7) throw new Error(`the picture has ${size}; the page takes up to 40 million: make it smaller`);
    own_picture(pixels_canvas(picture), `${chosen.name}, ${size}: resized to ${SIDE}, and its middle kept, as the model was trained.`);
    look();
    ask();
  } catch (error) {
    $("error").textContent = error.message;
  } finally {
    URL.revokeObjectURL(url);
  }
}

function own_picture(canvas, about) {
  [state.base, state.things] = [canvas, []];
  press([...$("examples").children], -1);
  $("about-picture").textContent = about;
}

// Put the chosen thing in a place, or take away the same thing there.
function put(cell) {
  const chosen = Object.fromEntries(new FormData($("tools"))), mark = chosen.tool === "mark";
  const thing = mark ? {mark, kind: chosen.mark, colour: chosen.ink, cell}
    : {mark, kind: chosen.kind, colour: chosen.colour, size: chosen.size, cell};
  const same = state.things.find(there => JSON.stringify(there) === JSON.stringify(thing));
  state.things = state.things.filter(there => there !== same && (there.cell !== cell || there.mark !== mark));
  if (!same) state.things.push(thing);
  press([...$("examples").children], -1);
  const all = state.things.map(there => `${name_of(there)} ${data.world.places[there.cell]}`).join(", ");
  $("about-picture").textContent = `Your own scene: ${all || "nothing drawn"}.`;
  if (mark && !same) $("question").value = `What is ${data.marks.relations[thing.kind]} the ${thing.colour} ${thing.kind}?`;
  look();
  ask();
}

// ---------------------------------------------------------------------------------------------------------- asking

let run = 0;  // of answers: a new one ends the one before

const options = () => ({max_new_tokens: LONGEST, temperature: Number($("temperature").value), top_p: Number($("top-p").value)});

async function ask() {
  $("error").textContent = "";
  state.question = $("question").value.trim();
  try {
    state.prompt = expand_images(tokenizer.encode(chat_prompt(state.question, data.style)), config.image_id, config.features_per_image);
    const room = config.text.max_position_embeddings;
    const length = state.prompt.length;
    if (length >= room) throw new Error(`the question and its picture are ${length} tokens, more than the ${room - 1} that fit`);
    state.cache = new KVCache(config.text, Math.min(length + LONGEST, room));
  } catch (error) {
    $("error").textContent = error.message;
    return;
  }
  state.answer = [];
  state.word = 0;
  await go_on(state.prompt, true);
}

// The ids that the cache does not hold yet, and then the answer, word by word.
async function go_on(ids, looks) {
  const mine = ++run, start = performance.now();
  let first = 0;
  state.trace = null;  // until there is one of the new answer
  $("main").setAttribute("aria-busy", "true");
  $("said").textContent = "reading …";
  await frame();
  if (mine !== run) return;
  state.features ??= model.encode_images(state.pixels);
  for (const {token, logits} of ended() ? [] : model.generate(ids, looks ? state.features : null, state.cache, options())) {
    first ||= performance.now() - start;
    state.answer.push({token, logits});
    state.word = state.answer.length - 1;
    show_answer();
    await frame();
    if (mine !== run) return;
    if (ended()) break;
  }
  const more = state.answer.length > 1 ? `, then ${((performance.now() - start - first) / (state.answer.length - 1)).toFixed(0)} ms each`
    : "";
  $("said").textContent = `“${text()}” ${first ? `First word after ${first.toFixed(0)} ms${more}.` : ""}`;
  state.word = top_ids(state.answer.map(({token, logits}) => -softmax(logits)[token]), 1)[0];  // the one that was least sure
  show_answer();
  await frame();
  if (mine !== run) return;
  const tokens = state.answer.map(({token}) => token);
  state.trace = model.forward([...state.prompt, ...tokens.slice(0, -1)], state.pixels);
  show_stages();
  show_blind();
  await compare();
  if (mine === run) $("main").setAttribute("aria-busy", "false");
}

const said = () => tokenizer.decode(state.answer.map(({token}) => token));
const text = () => said().split(data.style.end)[0].trim();
const ended = () => state.answer.length > 0
  && (config.eos_ids.includes(state.answer.at(-1).token) || said().includes(data.style.end) || state.answer.length >= LONGEST);

// The answer goes on from its n-th word, which is now this token.
function go_on_from(n, token) {
  state.answer.length = n + 1;
  state.answer[n] = {...state.answer[n], token};
  state.cache.truncate(state.prompt.length + n);
  show_answer();
  return go_on([token], false);
}

// Sliders: the same prompt, another draw.
function draw_again() {
  if (!state.cache) return;
  state.answer = [];
  state.word = 0;
  state.cache.truncate(state.prompt.length - 1);
  return go_on(state.prompt.slice(-1), false);
}

function show_answer() {
  if (!state.answer.length) return;
  for (const id of ["answer", "words"]) {
    const focused = [...$(id).querySelectorAll("button")].indexOf(document.activeElement);  // redrawn, it would be lost
    const buttons = state.answer.map(({token, logits}) => {
      const p = softmax(logits)[token], button = make("button", {className: spelling(token).startsWith(" ") ? "space" : ""}, label(token));
      if (p < 0.9) button.classList.add("unsure");
      button.setAttribute("aria-label", `${label(token)}, ${percent(p)}`);
      return button;
    });
    grid($(id), 1000, buttons, choose_word);
    const groups = [];  // a full stop stays on the line of its word
    for (const button of buttons) {
      if (groups.length && /^\W/.test(button.textContent)) groups.at(-1).append(button);
      else groups.push(make("span", {}, button));
    }
    $(id).replaceChildren(...groups);
    press(buttons, state.word);
    buttons[focused]?.focus();
  }
  const {logits, token} = state.answer[state.word], now = options();
  const p = softmax(logits), drawn = distribution(logits, now.temperature, now.top_p), best = top_ids(p, 10);
  $("alternatives-title").textContent = `In the place of “${label(token)}”`;
  bars($("alternatives"), best.map(id => ({
    label: label(id), p: p[id], cut: drawn[id] === 0 && now.temperature > 0, chosen: id === token, pick: () => go_on_from(state.word, id),
  })));
  $("draw-title").textContent = now.temperature > 0
    ? `Drawn from, at temperature ${now.temperature} and top-p ${now.top_p}, in the place of “${label(token)}”:`
    : `At temperature 0 no draw is made: the likeliest word is taken. In the place of “${label(token)}”:`;
  bars($("draw"), top_ids(p, 6).map(id => ({label: label(id), p: drawn[id]})));
}

// ---------------------------------------------------------------------------------------------------------- stages

// The picture, darkened where the weights of its cells are small; the strongest cells are numbered.
function draw_map(canvas, weights, side, numbered, chosen) {
  [canvas.width, canvas.height] = [side, side];
  const pen = canvas.getContext("2d"), size = side / GRID, most = Math.max(...weights, 1e-9);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(as_seen(state.pixels), 0, 0, side, side);
  weights.forEach((weight, n) => {
    pen.fillStyle = `rgba(12, 18, 28, ${0.85 * (1 - Math.max(0, weight) / most)})`;
    pen.fillRect(n % GRID * size, Math.floor(n / GRID) * size, size, size);
  });
  const boxed = (n, width) =>
    pen.strokeRect(n % GRID * size + width / 2, Math.floor(n / GRID) * size + width / 2, size - width, size - width);
  top_ids(weights, numbered).forEach((n, k) => {
    const x = n % GRID * size + size / 2, y = Math.floor(n / GRID) * size + size / 2;
    [pen.font, pen.textAlign, pen.textBaseline] = [`bold ${size * 0.55}px sans-serif`, "center", "middle"];
    [pen.strokeStyle, pen.lineWidth] = ["#fff", 2];
    boxed(n, 3);
    [pen.strokeStyle, pen.fillStyle, pen.lineWidth] = ["#000", "#fff", 4];
    pen.strokeText(k + 1, x, y);
    pen.fillText(k + 1, x, y);
  });
  if (chosen !== undefined) {
    [pen.strokeStyle, pen.lineWidth] = ["#fff", 4];
    boxed(chosen, 4);
    [pen.strokeStyle, pen.lineWidth] = ["#000", 1.5];
    boxed(chosen, 1.5);
  }
}

function figure(draw, caption, description) {
  const canvas = make("canvas", {role: "img", "aria-label": description});
  draw(canvas);
  return make("figure", {}, canvas, make("figcaption", {}, caption));
}

function show_stages() {
  if (!state.trace) return;
  const {vision, image_features: features, hidden_states: states, attentions, logits} = state.trace, row = position();
  const shape = (name, text) => $(`shape-${name}`).textContent = text;
  const first = config.keep_cls ? 1 : 0, T = states[0].rows, heads = config.text.num_attention_heads;
  draw_map($("thumb"), Array(P).fill(1), 64, 0);

  // 1. Pixels
  shape("pixels", `(1, 3, ${SIDE}, ${SIDE})`);
  $("planes").replaceChildren(...["red", "green", "blue"].map((name, c) => {
    const plane = state.pixels.row(c), low = Math.min(...plane), high = Math.max(...plane);
    const draw = canvas => {
      [canvas.width, canvas.height] = [SIDE, SIDE];
      const pen = canvas.getContext("2d"), image = pen.createImageData(SIDE, SIDE);
      plane.forEach((value, i) => image.data.set([...Array(3).fill(255 * (value - low) / (high - low || 1)), 255], 4 * i));
      pen.putImageData(image, 0, 0);
    };
    return figure(draw, `${name}: ${number(low)} to ${number(high)}`,
      `the ${name} plane, bright where there is much ${name}, from ${number(low)} to ${number(high)}`);
  }));

  // 2. Patches
  shape("patches", `(1, ${P}, ${config.vision.hidden_size}), and one class vector in front`);
  const vector = vision.states[0].row(1 + state.patch), most = Math.max(...vector.map(Math.abs));
  const canvas = $("vector"), pen = canvas.getContext("2d");
  [canvas.width, canvas.height] = [3 * vector.length, 120];
  pen.fillStyle = "#17202b";
  vector.forEach((value, i) => pen.fillRect(3 * i, 60, 2, -58 * value / most));
  pen.fillRect(0, 60, canvas.width, 1);
  canvas.setAttribute("aria-label", `${vector.length} numbers as bars, up and down`);
  const numbers = `${vector.length} numbers, the largest ${number(most)}`;
  $("vector-says").textContent = `Patch ${state.patch + 1} (${place(state.patch)}) as ${numbers}, with its position added and normalised.`;
  press(tiles, state.patch);
  press(nearest, state.patch);

  // 3. CLIP
  const read_is = `read is state ${names_of(config.vision_layers)}`;
  shape("clip", `(1, ${1 + P}, ${config.vision.hidden_size}) after each of ${config.vision.num_hidden_layers} blocks; ${read_is}`);
  const alike = vision.states.map(x => Array.from({length: P}, (_, n) => cosine(x.row(1 + state.patch), x.row(1 + n))));
  $("similar").replaceChildren(...alike.map((cosines, k) => {
    const low = Math.min(...cosines), weights = cosines.map(c => (c - low) / (1 - low + 1e-9));
    return figure(canvas => draw_map(canvas, weights, 128, 0, state.patch), `${k ? `after block ${k}` : "before"}: ${number(low)} to 1`,
      `after ${k} blocks, cosines from ${number(low)}; most alike are ${top_ids(cosines, 4).slice(1).map(place).join("; ")}`);
  }));
  const closest = alike.map(cosines => top_ids(cosines, 2)[1]);
  $("similar-says").textContent = `Most like the patch at ${place(state.patch)}: before the first block the one at ${place(closest[0])}, `
    + `after the last that is read the one at ${place(closest.at(-1))}.`;

  // 4. Projector
  shape("projector", `(1, ${P}, ${features.columns})`);
  const table = model.weights.get("language_model.embed_tokens.weight"), words = Array.from(tokenizer.ids.values());
  const near = n => {
    const c = words.map(id => cosine(features.row(first + n), table.row(id)));
    return top_ids(c, 5).map(i => [words[i], c[i]]);
  };
  nearest.forEach((button, n) => {
    const [[id, c]] = near(n);
    button.textContent = label(id);
    button.setAttribute("aria-label", `${place(n)}: ${label(id)}, cosine ${c.toFixed(2)}`);
  });
  $("nearest-title").textContent = `Nearest to the patch at ${place(state.patch)}, by cosine:`;
  bars($("nearest-words"), near(state.patch).map(([id, c]) => ({label: label(id), p: c, text: c.toFixed(2)})));

  // 5. Splice
  shape("splice", `(1, ${state.prompt.length}, ${features.columns})`);
  const chips = [];
  state.prompt.forEach((id, t) => {
    const text = spelling(id).replace(" ", "␣");
    if (id !== config.image_id) chips.push(make("span", {}, text, make("sub", {}, `${id}`), make("sub", {}, `${t}`)));
    else if (state.prompt[t - 1] !== id) {
      const mini = make("canvas", {role: "img", "aria-label": `the picture's ${config.features_per_image} vectors`});
      draw_map(mini, Array(P).fill(1), 152, 0);
      chips.push(make("span", {className: "picture"}, mini, `${config.features_per_image} vectors`,
        make("sub", {}, `${t} to ${t + config.features_per_image - 1}`)));
    }
  });
  $("sequence").replaceChildren(...chips);

  // 6. Attention
  shape("attention", `(1, ${heads}, ${T}, ${T}) in each of ${attentions.length} blocks`);
  const start = state.prompt.indexOf(config.image_id) + first;
  const looked = (n, h) => Array.from(attentions[n][h].row(row));
  head_canvases.forEach((canvas, i) => {
    const weights = looked(Math.floor(i / heads), i % heads).slice(start, start + P), sum = weights.reduce((a, b) => a + b, 0);
    draw_map(canvas, weights, 64, 0);
    canvas.parentElement.setAttribute("aria-label",
      `block ${Math.floor(i / heads) + 1}, head ${i % heads + 1}: ${percent(sum)} on the picture`);
  });
  state.head ??= hardest(attentions, row, start);
  const weights = looked(...state.head), seen = weights.slice(start, start + P), share = seen.reduce((a, b) => a + b, 0);
  press(head_buttons, state.head[0] * heads + state.head[1]);
  draw_map($("attention"), seen, 448, 3);
  const ids = [...state.prompt, ...state.answer.map(({token}) => token)], name = `block ${state.head[0] + 1}, head ${state.head[1] + 1}`;
  const read = top_ids(weights.map((w, t) => ids[t] === config.image_id ? 0 : w), 3)
    .map(t => `“${label(ids[t])}” ${percent(weights[t])}`);
  const where = top_ids(seen, 3).map((n, k) => `(${k + 1}) ${place(n)}`).join(", "), chosen = label(state.answer[state.word].token);
  $("attention-says").textContent = `For “${chosen}”, ${name} gave the picture ${percent(share)} of its attention, most to ${where}; `
    + `of the words most to ${read.join(", ")}.`;
  $("attention").setAttribute("aria-label", $("attention-says").textContent);

  // 7. The residual stream
  shape("stream", `(1, ${T}, ${states[0].columns}) after each of ${attentions.length} blocks`);
  show_stream(states, start);

  // 8. A word
  shape("word", `(1, ${logits.columns})`);
}

// The head that looked hardest at one patch: [block, head].
function hardest(attentions, row, start) {
  const [best] = top_ids(attentions.flat().map(weights => Math.max(...weights.row(row).subarray(start, start + P))), 1);
  return [Math.floor(best / attentions[0].length), best % attentions[0].length];
}

const position = () => state.prompt.length - 1 + state.word;  // a word is chosen at the position before its own

// The likeliest next word of some states (T, D), by the output head: T pairs of id and probability.
function next_words(x, normalised) {
  const norm = model.weights.get("language_model.norm.weight");
  const scores = model.language_model.lm_head(normalised ? x : rms_norm(x, norm, config.text.rms_norm_eps));
  return Array.from({length: x.rows}, (_, t) => { const p = softmax(scores.row(t)), [id] = top_ids(p, 1); return [id, p[id]]; });
}

// A table of the likeliest next words: a row for each block, a column for each word of the answer.
function show_stream(states, start) {
  const from = state.prompt.length - 1, block = Number($("depth").value), last = states.length - 1;
  const rows = states.map((x, k) => {
    const words = next_words(x.slice(from, from + state.answer.length), k === last);  // the last state is normalised already
    const cells = words.map(([id, p], n) => {
      const classes = [n === state.word && "chosen", id === state.answer[n].token && "same"].filter(Boolean).join(" ");
      return make("td", {className: classes}, label(id), make("small", {}, percent(p)));
    });
    return make("tr", {}, make("th", {scope: "row"}, k ? `after block ${k}` : "before"), ...cells);
  });
  const heads = state.answer.map(({token}, n) => make("th", {scope: "col", className: n === state.word ? "chosen" : ""}, label(token)));
  $("stream").replaceChildren(make("thead", {}, make("tr", {}, make("td", {}, "the answer"), ...heads)), make("tbody", {}, ...rows));
  const box = $("stream").parentElement, column = $("stream").querySelector("th.chosen");
  box.scrollLeft = column.offsetLeft + column.offsetWidth > box.clientWidth ? column.offsetLeft - 120 : 0;
  $("depth-now").textContent = block ? `after block ${block}` : "before the first block";
  const at_patches = next_words(states[block].slice(start, start + P), block === last);
  $("lens").style.gridTemplate = `repeat(${GRID}, 1fr) / repeat(${GRID}, 1fr)`;
  $("lens").replaceChildren(...at_patches.map(([id, p]) => make("span", {}, label(id))));
}

// ------------------------------------------------------------------------------------------------------- ablations

const switched = () => off.blocks.size + off.heads.size + off.grey.size + off.blind.size > 0 || off.layers !== null;

const ablation = () => ({
  block: (tower, n) => off.blocks.has(`${tower} ${n}`),
  head: (tower, n, h) => off.heads.has(`${tower} ${n} ${h}`),
  sees: (query, key) => !(off.blind.has(query) && state.prompt[key] === config.image_id),
  layers: off.layers,
});

function greyed() {
  const pixels = new Matrix(3, SIDE * SIDE, state.pixels.data.slice());
  for (const n of off.grey) for (let c = 0; c < 3; c++) for (let y = 0; y < PATCH; y++) {
    const from = (Math.floor(n / GRID) * PATCH + y) * SIDE + n % GRID * PATCH;
    pixels.row(c).fill(0, from, from + PATCH);  // 0 is the mean of CLIP's pictures: grey
  }
  return pixels;
}

// Two digits, and powers of ten for what is large.
function rounded(value) {
  const exponent = Math.floor(Math.log10(value)), raised = [...`${exponent}`].map(digit => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
  return exponent < 4 ? Number(value.toPrecision(2)) : `${(value / 10 ** exponent).toFixed(1)} · 10${raised}`;
}

let comparison = 0;

// What the switches change: a new answer, and the old answer's words with their probabilities before and after.
async function compare() {
  const mine = ++comparison;
  if (!state.answer.length) return;
  if (!switched()) {
    $("changed").textContent = `Nothing is switched off. The answer is “${text()}”`;
    $("compared").replaceChildren();
    return;
  }
  $("changed").textContent = "computing …";
  await frame();
  if (mine !== comparison) return;
  const tokens = state.answer.map(({token}) => token), pixels = greyed(), ablated = ablation();
  const {logits} = model.forward([...state.prompt, ...tokens.slice(0, -1)], pixels, ablated);
  const after = tokens.map((token, n) => softmax(logits.row(state.prompt.length - 1 + n))[token]);
  const before = state.answer.map(({token, logits}) => softmax(logits)[token]);
  await frame();
  if (mine !== comparison) return;
  const cache = new KVCache(config.text, state.cache.max_length), words = [];
  for (const {token} of model.generate(state.prompt, model.encode_images(pixels, undefined, ablated), cache,
    {max_new_tokens: LONGEST, off: ablated})) {
    words.push(token);
    if (tokenizer.decode(words).includes(data.style.end)) break;
  }
  const fall = after.reduce((sum, p, n) => sum + Math.log(before[n]) - Math.log(Math.max(p, 1e-30)), 0),
    now = tokenizer.decode(words).split(data.style.end)[0].trim();
  const times = Math.abs(fall) < 0.1 ? "about as likely as before"
    : `${rounded(Math.exp(Math.abs(fall)))} times ${fall > 0 ? "less" : "more"} likely than before`;
  const becomes = now === text() ? "The answer stays" : "The answer becomes";
  $("changed").textContent = `${becomes} “${now}” The old one, word for word, is ${times}.`;
  const titles = ["word", "before: outline; after: filled", "before", "after"];
  $("compared").replaceChildren(
    make("li", {className: "compare"}, ...titles.map((title, n) => make("small", {className: n > 1 ? "number" : ""}, title))),
    ...tokens.map((token, n) => {
      const [outline, filled] = [make("span", {className: "bar before"}), make("span", {className: "bar"})];
      outline.style.setProperty("--p", before[n]);
      filled.style.setProperty("--p", after[n]);
      return make("li", {className: "compare"}, make("span", {}, label(token)),
        make("span", {className: "bars-two", "aria-hidden": "true"}, outline, filled),
        make("span", {className: "number"}, percent(before[n])), make("span", {className: "number"}, percent(after[n])));
    }));
}

function toggle(set, value, button) {
  if (!set.delete(value)) set.add(value);
  button.setAttribute("aria-pressed", set.has(value));
  compare();
}

function switches(element, tower, blocks, heads) {
  element.style.gridTemplateColumns = `repeat(${1 + heads}, minmax(0, 1fr))`;
  const rows = Array.from({length: blocks}, (_, n) => [
    make("button", {type: "button", "aria-pressed": "false", "data-part": `${tower} ${n}`,
      onclick: event => toggle(off.blocks, `${tower} ${n}`, event.currentTarget)}, `block ${n + 1}`),
    ...Array.from({length: heads},
      (_, h) => make("button", {type: "button", "aria-pressed": "false", "aria-label": `block ${n + 1}, head ${h + 1}`,
        "data-part": `${tower} ${n} ${h}`,
      onclick: event => toggle(off.heads, `${tower} ${n} ${h}`, event.currentTarget)}, `head ${h + 1}`)),
  ]);
  element.replaceChildren(...rows.flat());
}

function show_blind() {
  for (const position of [...off.blind]) if (position >= state.prompt.length + LONGEST) off.blind.delete(position);
  const texts = [...state.prompt, ...state.answer.map(({token}) => token)], after = state.prompt.lastIndexOf(config.image_id) + 1;
  const buttons = texts.flatMap((id, t) => t < after ? []
    : [make("button", {type: "button", "aria-pressed": off.blind.has(t), onclick: event => toggle(off.blind, t, event.currentTarget)},
      spelling(id).trim() || "␣")]);
  const all = make("button", {type: "button", "aria-pressed": "false", onclick: () => {
    const every = Array.from({length: state.prompt.length + LONGEST - after}, (_, n) => after + n),
      whole = every.every(t => off.blind.has(t));
    off.blind = new Set(whole ? [] : every);
    show_blind();
    $("blind").firstChild.focus();
    compare();
  }}, "all of them");
  $("blind").replaceChildren(all, ...buttons);
}

const names_of = layers => layers.map(k => `${k}`.replace("-", "−")).join(", ");

// Read these of CLIP's states (null: the model's own). Blocks above the highest of them are not run.
function read_layers(layers) {
  off.layers = layers;
  const depth = Math.max(...(layers ?? config.vision_layers).map(k => k < 0 ? k + config.vision.num_hidden_layers + 1 : k));
  const row = 1 + config.vision.num_attention_heads;
  [...$("clip-switches").children].forEach((button, n) => { button.disabled = Math.floor(n / row) >= depth; });
  if (state.answer.length) compare();
}

function restore() {
  for (const set of [off.blocks, off.heads, off.grey, off.blind]) set.clear();
  read_layers(null);
  $("ablate").querySelectorAll("[aria-pressed]").forEach(button => button.setAttribute("aria-pressed", "false"));
  $("layer").querySelector("input").checked = true;
}

// ------------------------------------------------------------------------------------------------------------ tour

// What is set up for each step; data.tour says with which question, patch, word and head. What the steps say is in page.html.
const set = data.tour, steps = [...$("steps").children];
const prepare = [
  async () => { restore(); await show_example(0); $("question").value = set.question; await ask(); choose_word(set.word); },
  () => choose_patch(set.patch),
  () => choose_patch(set.patch),
  () => choose_patch(set.patch),
  () => { choose_word(set.word); choose_head(set.head); },
  () => choose_word(set.word),
  () => { restore(); $("llama-switches").querySelector(`[data-part="${set.off}"]`).click(); },
];
const choose_word = n => { state.word = Math.max(0, Math.min(n, state.answer.length - 1)); show_answer(); show_stages(); };
const choose_head = head => { state.head = head; show_stages(); };

let step = -1;

async function tour(n) {
  document.querySelectorAll(".now").forEach(element => element.classList.remove("now"));
  step = n;
  $("tour").hidden = n < 0;
  if (n < 0) { $("start-tour").focus(); return; }
  steps.forEach((element, k) => { element.hidden = k !== n; });
  $("back").disabled = n === 0;
  $("next").textContent = n + 1 < steps.length ? "Next" : "Done";
  $("leave").hidden = n + 1 === steps.length;
  $("tour").focus();
  const place = $(steps[n].dataset.at);
  place.classList.add("now");
  await prepare[n]();
  if (step !== n) return;
  const narrow = matchMedia("(max-width: 46rem)").matches, calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const shown = narrow ? place.querySelector("#form, .drawing, .result") : place;  // a telephone has no room for what stands above
  shown.scrollIntoView({behavior: calm ? "auto" : "smooth", block: "start"});
}

// ----------------------------------------------------------------------------------------------------------- start

const heads = config.text.num_attention_heads, blocks = config.text.num_hidden_layers;
const choose_patch = n => { state.patch = n; show_stages(); };
const tiles = square($("tiles"), GRID, choose_patch), nearest = square($("nearest"), GRID, choose_patch);
tiles.forEach((tile, n) => {
  tile.style.backgroundPosition = `${n % GRID / (GRID - 1) * 100}% ${Math.floor(n / GRID) / (GRID - 1) * 100}%`;
  tile.setAttribute("aria-label", `patch ${n + 1}, ${place(n)}`);
});
const grey = square($("grey"), GRID, n => toggle(off.grey, n, grey[n]));
grey.forEach((button, n) => { button.setAttribute("aria-label", `patch at ${place(n)}`); button.setAttribute("aria-pressed", "false"); });
square($("canvas"), 3, put).forEach(button => { button.disabled = true; });

const head_canvases = Array.from({length: blocks * heads}, () => make("canvas", {"aria-hidden": "true"}));
const head_buttons = grid($("heads"), heads, head_canvases.map(canvas => make("button", {}, canvas)),
  n => choose_head([Math.floor(n / heads), n % heads]));
$("heads").style.gridTemplateColumns = `auto repeat(${heads}, minmax(0, 1fr))`;
$("heads").replaceChildren(...head_buttons.flatMap((button, n) => n % heads ? [button]
  : [make("span", {}, `block ${n / heads + 1}`), button]));

switches($("clip-switches"), "clip", config.vision.num_hidden_layers, config.vision.num_attention_heads);
switches($("llama-switches"), "llama", blocks, heads);
for (const layers of [null, config.vision_layers.map(k => k === -2 ? -1 : k)]) {
  const radio = make("input", {type: "radio", name: "layer", checked: layers === null, onchange: () => read_layers(layers)});
  $("layer").append(make("label", {}, radio, ` ${names_of(layers ?? config.vision_layers)}${layers ? "" : " (as trained)"}`));
}
read_layers(null);

data.examples.forEach(({picture, question}, n) => {
  const button = make("button", {type: "button", "aria-label": `picture ${n + 1}`}, make("img", {src: picture, alt: ""}));
  button.onclick = async () => { await show_example(n); ask(); };
  $("examples").append(button);
});
for (const question of new Set(data.suggestions)) {
  $("suggestions").append(make("button", {type: "button", onclick: () => { $("question").value = question; ask(); }}, question));
}

const choice = (name, values, title) =>
  make("fieldset", {}, make("legend", {}, title), make("div", {className: "choices"}, ...values.map((value, n) =>
  make("label", {}, make("input", {type: "radio", name, value, checked: n === 0}), ` ${value}`))));
$("tools").append(choice("kind", data.world.kinds, "Shape"), choice("colour", Object.keys(data.world.colours), "Colour"),
  choice("size", ["large", "small"], "Size"));
if (data.marks) {
  const [kinds, inks] = [data.marks.relations, data.marks.colours].map(Object.keys);
  $("tools").prepend(choice("tool", ["mark", "thing"], "Put"), choice("mark", kinds, "Mark"), choice("ink", inks, "Colour of the mark"));
}
$("tools").onsubmit = event => event.preventDefault();
$("empty").onclick = () => { own_picture(empty_ground(), "Your own scene: nothing drawn."); look(); ask(); };
$("drawing").ontoggle = () => { for (const button of $("canvas").children) button.disabled = !$("drawing").open; };
$("file").onchange = event => open_file(event.target.files[0]);
document.ondragover = event => event.preventDefault();
document.ondrop = event => { event.preventDefault(); open_file(event.dataTransfer.files[0]); };

$("form").onsubmit = event => { event.preventDefault(); ask(); };
for (const id of ["temperature", "top-p"]) {
  const now = () => { $(`${id}-now`).textContent = $(id).value; };
  $(id).oninput = () => { now(); show_answer(); };
  $(id).onchange = draw_again;
  now();
}
[$("depth").max, $("depth").value] = [blocks, blocks];
$("depth").oninput = show_stages;
$("restore").onclick = restore;
$("start-tour").onclick = () => tour(0);
$("back").onclick = () => tour(step - 1);
$("next").onclick = () => tour(step + 1 < steps.length ? step + 1 : -1);
$("leave").onclick = () => tour(-1);
$("tour").onkeydown = event => { if (event.key === "Escape") tour(-1); };
const parameters = Array.from(model.weights.values(), weight => weight.data.length).reduce((a, b) => a + b, 0);
if (data.marks) document.title = $("title").textContent = "A whole ViP-LLaVA in one page";
$("parameters").textContent = `${(parameters / 1e6).toFixed(1)} million`;

const ready = show_example(0).then(ask);
