"use strict";
/* What is on the page: asking, drawing, the stages, the switches and the tour. The model is in model.js, the drawn world in scene.js. */

const data = JSON.parse(document.getElementById("data").textContent), config = data.config;
const file = Uint8Array.from(atob(document.getElementById("weights").textContent), c => c.charCodeAt(0));
const model = new Llava(config, read_safetensors(file.buffer));
const tokenizer = new Tokenizer(data.tokenizer), processor = new ImageProcessor(data.processor);

const SIDE = config.vision.image_size, PATCH = config.vision.patch_size, GRID = Math.floor(SIDE / PATCH), P = GRID * GRID;
const LONGEST = 96;  // tokens of an answer, at the most
const ENOUGH = 20;  // tokens of one that comes to no end
const SURE = 0.9;  // the probability below which a word is marked as doubtful

const state = {
  picture: null,  // a canvas: what the model is shown
  scene: null,  // what is known of it: {ground, things, marks}; ground is a colour, or the photograph below; `name` is of a photograph
  pixels: null, features: null,  // the picture as the model reads it
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
const speak = text => { $("spoken").textContent = text; };  // the one thing on the page that a screen reader says by itself
const press = (buttons, chosen) => buttons.forEach((button, n) => button.setAttribute("aria-pressed", n === chosen));

// Buttons of which the Tab key finds one and the arrow keys the others. With one column, all arrows go forward or back.
function grid(columns, buttons, pick, first = 0) {
  buttons.forEach((button, n) => {
    button.type = "button";
    button.tabIndex = n === first ? 0 : -1;
    button.onclick = () => { buttons.forEach(other => other.tabIndex = other === button ? 0 : -1); pick(n); };
    button.onkeydown = event => {
      const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
      if (step === undefined) return;
      event.preventDefault();
      const within = to => Math.abs(step) > 1 || columns === 1 || Math.floor(to / columns) === Math.floor(n / columns);
      let to = n + step;
      while (buttons[to]?.disabled) to += step;
      if (!buttons[to] || !within(to)) return;
      button.tabIndex = -1;
      buttons[to].tabIndex = 0;
      buttons[to].focus();
    };
  });
  return buttons;
}

// A square of so many cells a side over the picture.
function square(element, cells, pick) {
  element.style.gridTemplate = `repeat(${cells}, 1fr) / repeat(${cells}, 1fr)`;
  const buttons = grid(cells, Array.from({length: cells * cells}, () => make("button")), pick);
  element.replaceChildren(...buttons);
  return buttons;
}

// A list of words with bars: rows of {label, p, text, cut, pick, chosen}; with `after`, what p becomes, there are two bars each.
function bars(list, rows) {
  const focused = [...list.children].findIndex(row => row.contains(document.activeElement));  // what is replaced must not lose it
  const buttons = [];
  list.replaceChildren(...rows.map(({label, p, after, text, cut, pick, chosen}) => {
    const word = pick ? make("button", {"aria-pressed": Boolean(chosen)}, label) : make("span", {}, label);
    if (pick) buttons.push(word);
    const bar = after === undefined ? one_bar(p) : make("span", {className: "both"}, one_bar(p, "before"), one_bar(after));
    const number = make("span", {className: "number"}, text ?? percent(p));
    if (after !== undefined) number.append(cut ? " → cut off" : ` → ${percent(after)}`);
    return make("li", {className: after === undefined ? "" : "pair"}, word, bar, number);
  }));
  grid(1, buttons, n => rows[n].pick(), Math.max(0, rows.findIndex(row => row.chosen)));
  list.children[focused]?.querySelector("button")?.focus();
}

function one_bar(p, name = "") {
  const bar = make("span", {className: `bar ${name}`, "aria-hidden": "true"});
  bar.style.setProperty("--p", Math.max(0, Math.min(1, p)));
  return bar;
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

// Which of some tokens are pieces of words, and of which words: what "reen" is one cannot guess.
function pieces_among(ids) {
  const found = [...new Set(ids.map(label))].flatMap(piece => {
    const whole = WORLD.words.includes(piece) || !/^\p{L}+$/u.test(piece) ? undefined : WORLD.words.find(word => word.includes(piece));
    return whole ? [`“${piece}” of “${whole}”`] : [];
  });
  return found.length ? `Pieces of words: ${found.join(", ")}.` : "";
}

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

// A picture of a scene: its ground, its things and its marks.
function painted({ground, things, marks}) {
  const canvas = make("canvas", {width: SIDE, height: SIDE}), pen = canvas.getContext("2d");
  if (Array.isArray(ground)) {
    pen.fillStyle = `rgb(${ground})`;
    pen.fillRect(0, 0, SIDE, SIDE);
  } else {
    pen.drawImage(ground, 0, 0);
  }
  for (const thing of things) paint(pen, thing);
  for (const mark of marks) draw_mark(pen, mark);
  return canvas;
}

// What the picture shows, in words.
function in_words({things, marks, name}) {
  if (!name) return describe(things, marks);
  return things.length ? `${name}, and on top of it: ${describe(things, marks)}` : `${name}, a picture of yours.`;
}

// Take the picture through preprocessing; where it is shown, it is named by what it shows.
function look() {
  state.pixels = processor.call(pixels_of(state.picture));
  state.features = null;
  state.patch = striking(state.pixels);
  document.documentElement.style.setProperty("--picture", `url(${as_seen(state.pixels).toDataURL()})`);
  const words = in_words(state.scene);
  $("canvas").setAttribute("aria-label", `The picture: ${words} When drawing: nine places, arrow keys move, Enter draws.`);
  $("grey").setAttribute("aria-label", `Patches to grey, of the picture: ${words} Arrow keys move, Enter greys.`);
  draw_map($("mini"), Array(P).fill(1), 64, 0);
  for (const id of ["mini", "thumb"]) $(id).setAttribute("aria-label", `The picture: ${words}`);
  show_places();
  show_suggestions();
}

const chosen_tool = () => Object.fromEntries(new FormData($("tools")));
const shown_thing = ({size, colour, kind}) => `${size} ${colour} ${kind}`;

// The nine places are named by what is there; one where the chosen mark cannot go says why.
function show_places() {
  const {tool, mark, ink} = chosen_tool();
  [...$("canvas").children].forEach((button, cell) => {
    const {things, marks} = state.scene, thing = things.find(one => one.cell === cell), there = marks.find(one => one.cell === cell);
    const names = [thing && shown_thing(thing), there && `${there.colour} ${there.kind}`].filter(Boolean).join(", ");
    const refused = tool === "mark" ? never_learnt(thing, marks, mark, ink) : "";
    button.setAttribute("aria-label", `${WORLD.places[cell]}${names && `: ${names}`}${refused && `. ${refused}`}`);
    button.classList.toggle("refused", refused !== "");
  });
}

const pixels_canvas = picture => {
  const image = pixels_of(picture), canvas = make("canvas", {width: image.width, height: image.height});
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
};

// Show another picture. about: the note below it; n: which of the examples it is.
function show_picture(picture, scene, about, n = -1) {
  [state.picture, state.scene] = [picture, scene];
  press([...$("examples").children], n);
  $("about-picture").textContent = about;
  $("refused").textContent = "";
  look();
}

async function show_example(n) {
  const {picture, question, answer, ground, things, marks} = data.examples[n];
  const about = `Held out: no training picture shows this scene. To “${question}” the right answer is “${answer}”`;
  $("question").value = question;
  show_picture(pixels_canvas(await load_picture(picture)), {ground, things, marks}, about, n);
}

async function open_file(chosen) {
  if (!chosen) return;
  const url = URL.createObjectURL(chosen);
  try {
    const picture = await load_picture(url);
    const [short, long] = [picture.naturalWidth, picture.naturalHeight].sort((a, b) => a - b);
    const size = `${picture.naturalWidth} × ${picture.naturalHeight} pixels`;
    if (!short || long > 50 * short) throw new Error(`the picture has ${size}; expected sides that differ by 50 times at the most`);
    if (short * long > 4e7) throw new Error(`the picture has ${size}; the page takes up to 40 million: make it smaller`);
    const canvas = pixels_canvas(picture), ground = as_seen(processor.call(pixels_of(canvas)));
    const about = `${chosen.name}, ${size}: resized to ${SIDE}, and its middle kept, as the model was trained.`;
    show_picture(canvas, {ground, things: [], marks: [], name: chosen.name}, about);
    ask();
  } catch (error) {
    complain(error.message);
  } finally {
    URL.revokeObjectURL(url);
  }
}

function complain(message) {
  $("error").textContent = message;
  speak(message);
}

// Put the chosen thing or mark in a place, or take away the same there. What else was there gives way.
function put(cell) {
  const chosen = chosen_tool(), {ground, things, marks, name} = state.scene, thing = things.find(one => one.cell === cell);
  const scene = {ground, name, things: things.filter(one => one.cell !== cell), marks: marks.filter(one => one.cell !== cell)};
  if (chosen.tool === "mark") {
    const {mark: kind, ink: colour} = chosen, refused = never_learnt(thing, marks, kind, colour);
    $("refused").textContent = refused;
    if (refused) { speak(refused); return; }
    scene.things = things;
    const same = marks.some(one => one.cell === cell && one.kind === kind && one.colour === colour);
    if (!same) {
      const mark = random_mark(thing, kind, colour);
      scene.marks.push(mark);
      $("question").value = `What is ${words_of(mark)}?`;
    }
  } else if (!thing || shown_thing(thing) !== shown_thing(chosen)) {
    scene.things.push(place_thing({...chosen, cell}));
  }
  show_picture(painted(scene), scene, `Your own scene: ${in_words(scene)}`);
  ask();
}

// Questions to press; of a ViP-LLaVA about the newest mark in the picture, or plain ones where there is none.
function show_suggestions() {
  const mark = state.scene.marks.at(-1);
  const fill = text => text.replace("{words}", mark && words_of(mark)).replace("{name}", mark && `${mark.colour} ${mark.kind}`);
  const questions = data.suggestions.filter(text => mark || !text.includes("{")).map(fill);
  const buttons = questions.map(text => make("button", {}, text));
  grid(1, buttons, n => { $("question").value = questions[n]; ask(); });
  $("suggestions").replaceChildren(...buttons);
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
    complain(error.message);
    return;
  }
  state.answer = [];
  await go_on(state.prompt, true);
}

// The ids that the cache does not hold yet, and then the answer, word by word. word: which one is looked at in the end.
async function go_on(ids, looks, word) {
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
  state.word = Math.min(word ?? least_sure(), state.answer.length - 1);
  show_answer();
  show_notes();
  speak(`“${short(state.answer.map(({token}) => token))}” ${$("outside").textContent}`);
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
const text_of = tokens => tokenizer.decode(tokens).split(data.style.end)[0].trim();
const text = () => text_of(state.answer.map(({token}) => token));
const has_end = tokens => config.eos_ids.includes(tokens.at(-1)) || tokenizer.decode(tokens).includes(data.style.end);
const ended = () => state.answer.length > 0 && (has_end(state.answer.map(({token}) => token)) || state.answer.length >= LONGEST);

// The text of some tokens, of which so many are enough if they come to no end: a broken model can go on for long.
const short = tokens => has_end(tokens) ? text_of(tokens) : `${text_of(tokens.slice(0, ENOUGH))} …`;

// The word of the answer that was least sure, the marks that end it left out.
function least_sure() {
  const words = state.answer.filter(({token}) => /\w/.test(spelling(token)) && !config.eos_ids.includes(token));
  const doubtful = (words.length ? words : state.answer).toSorted((a, b) => softmax(a.logits)[a.token] - softmax(b.logits)[b.token]);
  return state.answer.indexOf(doubtful[0]);
}

// What may need to be explained, beside the answer: its signs, and where it is worth nothing.
function show_notes() {
  const tokens = state.answer.map(({token}) => token), signs = ["Choose a word to see what else it could have been."];
  if (state.answer.some(({token, logits}) => softmax(logits)[token] < SURE)) {
    signs.push(`A double line marks words of which the model was less than ${100 * SURE} % sure.`);
  }
  if (tokens.some(token => label(token) === "␣")) signs.push("␣ is a space that is a token of its own.");
  if (tokens.some(token => label(token) === "⏎")) signs.push("⏎ begins a new line.");
  if (tokens.some(token => config.eos_ids.includes(token))) signs.push("(end) is the token that ends the answer.");
  else if (said().includes(data.style.end)) signs.push(`${data.style.end} is how this model ends its answer: it was trained so.`);
  $("signs").textContent = signs.join(" ");

  const unknown = [...new Set(state.question.match(/[\p{L}\p{N}_]+/gu))].filter(word => !WORLD.words.includes(word));
  const notes = [];
  if (state.scene.name) notes.push("This is no drawn scene, and drawn scenes are all this model knows.");
  if (unknown.length) notes.push(`No question in its training has ${unknown.map(word => `“${word}”`).join(", ")}, written so.`);
  if (notes.length) notes.push("It answers all the same, and sounds sure: do not trust it here.");
  $("outside").textContent = notes.join(" ");
}

// The answer goes on from its n-th word, which is now this token.
function go_on_from(n, token) {
  state.answer.length = n + 1;
  state.answer[n] = {...state.answer[n], token};
  state.cache.truncate(state.prompt.length + n);
  show_answer();
  return go_on([token], false, n);
}

function set_sliders(temperature, top_p) {
  [$("temperature").value, $("top-p").value] = [temperature, top_p];
  show_sliders();
}

function show_sliders() {
  for (const id of ["temperature", "top-p"]) $(`${id}-now`).textContent = $(id).value;
  show_alternatives();
}

// The same prompt, another draw. The same place in the answer stays in view.
function draw_again() {
  if (!state.answer.length) return;
  state.answer = [];
  state.cache.truncate(state.prompt.length - 1);
  return go_on(state.prompt.slice(-1), false, state.word);
}

// A token of the answer as one speaks of it: a piece is named with its word.
function speaking_of(n) {
  const spelt = state.answer.map(({token}) => spelling(token)), letters = k => /^\s?[\p{L}\p{N}]+$/u.test(spelt[k] ?? "");
  let [from, to] = [n, n + 1];
  while (letters(from) && !spelt[from].startsWith(" ") && letters(from - 1)) from--;
  while (letters(n) && letters(to) && !spelt[to].startsWith(" ")) to++;
  const whole = spelt.slice(from, to).join("").trim(), piece = label(state.answer[n].token);
  return to - from > 1 ? `“${piece}”, a piece of “${whole}”` : `“${piece}”`;
}

function show_answer() {
  if (!state.answer.length) return;
  for (const id of ["answer", "words"]) {
    const focused = [...$(id).querySelectorAll("button")].indexOf(document.activeElement);  // redrawn, it would be lost
    const buttons = state.answer.map(({token, logits}) => {
      const p = softmax(logits)[token], button = make("button", {className: spelling(token).startsWith(" ") ? "space" : ""}, label(token));
      if (p < SURE) button.classList.add("unsure");
      button.setAttribute("aria-label", `${label(token)}, ${percent(p)}`);
      return button;
    });
    grid(1, buttons, choose_word, state.word);
    const groups = [];  // a full stop stays on the line of its word
    for (const button of buttons) {
      if (groups.length && /^\W/.test(button.textContent)) groups.at(-1).append(button);
      else groups.push(make("span", {}, button));
    }
    $(id).replaceChildren(...groups);
    press(buttons, state.word);
    buttons[focused]?.focus();
  }
  show_alternatives();
}

// The likeliest words in the chosen place: what the model gives them and, above temperature 0, what is drawn from.
function show_alternatives() {
  if (!state.answer.length) return;
  const {logits, token} = state.answer[state.word], {temperature, top_p} = options();
  const p = softmax(logits), drawn = distribution(logits, temperature, top_p), draws = temperature > 0;
  $("alternatives-title").textContent = `In the place of ${speaking_of(state.word)}`;
  bars($("alternatives"), top_ids(p, 10).map(id => ({
    label: label(id), p: p[id], after: draws ? drawn[id] : undefined, cut: drawn[id] === 0, chosen: id === token,
    pick: () => go_on_from(state.word, id),
  })));
  $("pieces").textContent = pieces_among(top_ids(p, 10));
  $("drawn-how").textContent = draws
    ? `Outline: what the model says. Filled: what a word is drawn with, at temperature ${temperature} and top-p ${top_p}.`
    : "At temperature 0 nothing is drawn: the likeliest word is taken, and top-p changes nothing.";
  $("again").disabled = $("top-p").disabled = !draws;
  $("draw-title").textContent = draws
    ? `Drawn from, at temperature ${temperature} and top-p ${top_p}, in the place of “${label(token)}”:`
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
  $("nearest-pieces").textContent = pieces_among(near(state.patch).map(([id]) => id));
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
    .map(t => `${label(ids[t]) === "␣" ? `the space at position ${t}` : `“${label(ids[t])}”`} (${percent(weights[t])})`);
  const where = top_ids(seen, 3).map((n, k) => `(${k + 1}) ${place(n)}`).join(", ");
  $("attention-says").textContent = `For ${speaking_of(state.word)}, ${name} gave the picture ${percent(share)} of its attention, `
    + `most to ${where}; `
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
  const titles = $("stream").querySelector("td").offsetWidth;  // they stay where they are; the chosen column comes next to them
  box.scrollLeft = column.offsetLeft + column.offsetWidth > box.clientWidth ? column.offsetLeft - titles : 0;
  $("depth-now").textContent = block ? `after block ${block}` : "before the first block";
  const at_patches = next_words(states[block].slice(start, start + P), block === last);
  const cells = at_patches.map(([id, p], n) => make("span", {role: "cell"}, label(id)));
  $("lens").style.gridTemplate = `repeat(${GRID}, 1fr) / repeat(${GRID}, 1fr)`;
  $("lens").replaceChildren(...Array.from({length: GRID}, (_, row) =>
    make("div", {role: "row"}, ...cells.slice(row * GRID, (row + 1) * GRID))));
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

// How likely the old answer is now, in words. fall: of its log-probability.
function now_likely(fall) {
  const times = Math.exp(Math.abs(fall));
  if (times < 1.1) return "is about as likely as before";
  if (times > 1000) return fall > 0 ? "would practically never be given now" : "is more than 1000 times more likely than before";
  return `is ${Number(times.toPrecision(2))} times ${fall > 0 ? "less" : "more"} likely than before`;
}

let comparison = 0;

// What the switches change: a new answer, and the old answer's words with their probabilities before and after.
async function compare() {
  const mine = ++comparison;
  if (!state.answer.length) return;
  if (!switched()) {
    $("changed").textContent = `Nothing is switched off. The answer is “${text()}”`;
    $("compared").replaceChildren(...state.answer.map(({token, logits}) => pair(token, softmax(logits)[token])));
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
    {max_new_tokens: state.answer.length + ENOUGH, off: ablated})) {
    words.push(token);
    if (has_end(words)) break;
  }
  const fall = after.reduce((sum, p, n) => sum + Math.log(before[n]) - Math.log(Math.max(p, 1e-30)), 0), now = short(words);
  const becomes = now === text() ? "The answer stays" : "The answer becomes";
  $("changed").textContent = `${becomes} “${now}” The old one, word for word, ${now_likely(fall)}.`;
  speak($("changed").textContent);
  $("compared").replaceChildren(...tokens.map((token, n) => pair(token, before[n], after[n])));
}

// A word of the old answer, with its probability before and after.
function pair(token, before, after) {
  const [outline, filled] = [one_bar(before, "before"), one_bar(after ?? before)];
  const numbers = after === undefined ? percent(before) : `${percent(before)} → ${percent(after)}`;
  return make("li", {}, make("b", {}, label(token)), outline, filled, make("span", {className: "number"}, numbers));
}

function toggle(set, value, button) {
  if (!set.delete(value)) set.add(value);
  button.setAttribute("aria-pressed", set.has(value));
  compare();
}

function switches(element, tower, blocks, heads) {
  element.style.gridTemplateColumns = `repeat(${1 + heads}, minmax(0, 1fr))`;
  const parts = Array.from({length: blocks}, (_, n) => [
    {set: off.blocks, part: `${tower} ${n}`, shown: `block ${n + 1}`, name: `block ${n + 1}`},
    ...Array.from({length: heads}, (_, h) =>
      ({set: off.heads, part: `${tower} ${n} ${h}`, shown: `head ${h + 1}`, name: `block ${n + 1}, head ${h + 1}`})),
  ]).flat();
  const buttons = parts.map(({part, shown, name}) =>
    make("button", {"aria-pressed": "false", "aria-label": name, "data-part": part}, shown));
  grid(1 + heads, buttons, n => toggle(parts[n].set, parts[n].part, buttons[n]));
  element.replaceChildren(...buttons);
}

// The words from the picture on, each to be kept from looking at it, and in front a button for all of them.
function show_blind() {
  for (const position of [...off.blind]) if (position >= state.prompt.length + LONGEST) off.blind.delete(position);
  const texts = [...state.prompt, ...state.answer.map(({token}) => token)], after = state.prompt.lastIndexOf(config.image_id) + 1;
  const every = Array.from({length: state.prompt.length + LONGEST - after}, (_, n) => after + n);
  const all = make("button", {"aria-pressed": every.every(t => off.blind.has(t))}, "all of them");
  const buttons = [all, ...texts.slice(after).map((id, n) => make("button", {"aria-pressed": off.blind.has(after + n)}, label(id)))];
  grid(1, buttons, n => {
    if (n) { toggle(off.blind, after + n - 1, buttons[n]); return; }
    off.blind = new Set(every.every(t => off.blind.has(t)) ? [] : every);
    show_blind();
    $("blind").firstChild.focus();
    compare();
  });
  $("blind").replaceChildren(...buttons);
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
  async () => {
    restore();
    set_sliders(0, 1);
    await show_example(0);
    $("question").value = set.question;
    await ask();
    choose_word(set.word);
  },
  () => choose_patch(set.patch),
  () => choose_patch(set.patch),
  () => choose_patch(set.patch),
  () => { choose_word(set.word); choose_head(set.head); },
  () => choose_word(set.word),
  async () => {
    restore();
    $("llama-switches").querySelector(`[data-part="${set.off}"]`).click();
    while ($("changed").textContent === "computing …") await frame();
  },
];
const choose_word = n => { state.word = Math.max(0, Math.min(n, state.answer.length - 1)); show_answer(); show_stages(); };
const choose_head = head => { state.head = head; show_stages(); };

let step = -1;

// The panel stands in the section that it speaks of: the Tab key goes on from it to what is to be tried.
async function tour(n) {
  const before = step;
  document.querySelectorAll(".now").forEach(element => element.classList.remove("now"));
  step = n;
  $("tour").hidden = n < 0;
  document.documentElement.classList.toggle("touring", n >= 0);
  if (n < 0) {
    if (before >= 0) $(steps[before].dataset.at).focus({preventScroll: true});  // where one is, one stays
    return;
  }
  steps.forEach((element, k) => { element.hidden = k !== n; });
  $("back").disabled = n === 0;
  $("next").textContent = n + 1 < steps.length ? "Next" : "Done";
  $("leave").hidden = n + 1 === steps.length;
  const place = $(steps[n].dataset.at);
  place.prepend($("tour"));
  $("tour").setAttribute("aria-label", `The tour, ${steps[n].textContent.trim()}`);
  $("tour").focus({preventScroll: true});
  place.classList.add("now");
  await prepare[n]();
  if (step !== n) return;
  const phone = matchMedia("(max-width: 46rem)").matches, calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const {wide, narrow} = steps[n].dataset, part = phone ? narrow : wide;  // a telephone has no room for what stands above
  const shown = part ? place.querySelector(part) : place;
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
for (const section of [$("ask"), $("ablate"), ...document.querySelectorAll(".stage")]) section.tabIndex = -1;  // the tour ends there

const head_canvases = Array.from({length: blocks * heads}, () => make("canvas", {"aria-hidden": "true"}));
const head_buttons = grid(heads, head_canvases.map(canvas => make("button", {}, canvas)),
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

const thumbs = data.examples.map(({picture, things, marks}, n) =>
  make("button", {"aria-label": `picture ${n + 1}: ${describe(things, marks)}`}, make("img", {src: picture, alt: ""})));
grid(1, thumbs, async n => { await show_example(n); ask(); });
$("examples").append(...thumbs);

const choice = (name, values, title) => make("label", {className: `of-${name}`}, `${title} `,
  make("select", {name}, ...values.map(value => make("option", {value}, value))));
const thing_choices = make("div", {className: "choices"}, choice("size", ["large", "small"], "Size"),
  choice("colour", Object.keys(WORLD.colours), "Colour"), choice("kind", WORLD.kinds, "Shape"));
$("tools").append(thing_choices);
if (MARKS) {
  const inks = Object.keys(MARKS.colours).sort((a, b) => (b === "aqua") - (a === "aqua"));  // aqua differs from every thing's colour
  const mark_choices = make("div", {className: "choices"}, choice("ink", inks, "Colour"), choice("mark", Object.keys(MARKS.kinds), "Mark"));
  const tools = ["mark", "thing"].map((value, n) =>
    make("label", {}, make("input", {type: "radio", name: "tool", value, checked: n === 0}), ` a ${value}`));
  $("tools").prepend(make("div", {className: "choices"}, "Put ", ...tools), mark_choices);
}
$("tools").oninput = () => {
  for (const element of $("tools").querySelectorAll(".of-ink, .of-mark")) element.parentElement.hidden = chosen_tool().tool !== "mark";
  thing_choices.hidden = chosen_tool().tool === "mark";
  $("refused").textContent = "";
  if (state.scene) show_places();
};
$("tools").oninput();
$("tools").onsubmit = event => event.preventDefault();
$("empty").onclick = () => {
  const scene = {ground: [236, 240, 244], things: [], marks: []};
  show_picture(painted(scene), scene, "Your own scene: an empty ground.");
  ask();
};
$("drawing").ontoggle = () => { for (const button of $("canvas").children) button.disabled = !$("drawing").open; };
$("file").onchange = event => open_file(event.target.files[0]);
document.ondragover = event => event.preventDefault();
document.ondrop = event => { event.preventDefault(); open_file(event.dataTransfer.files[0]); };

$("form").onsubmit = event => { event.preventDefault(); ask(); };
for (const id of ["temperature", "top-p"]) {
  $(id).oninput = show_sliders;
  $(id).onchange = draw_again;
}
show_sliders();
$("again").onclick = draw_again;
[$("depth").max, $("depth").value] = [blocks, blocks];
$("depth").oninput = show_stages;
$("restore").onclick = restore;
$("start-tour").onclick = () => tour(0);
$("back").onclick = () => tour(step - 1);
$("next").onclick = () => tour(step + 1 < steps.length ? step + 1 : -1);
$("leave").onclick = () => tour(-1);
document.onkeydown = event => { if (event.key === "Escape" && step >= 0) tour(-1); };
const parameters = Array.from(model.weights.values(), weight => weight.data.length).reduce((a, b) => a + b, 0);
if (MARKS) document.title = $("title").textContent = "A whole ViP-LLaVA in one page";
document.querySelectorAll(MARKS ? ".llava" : ".vip").forEach(element => element.remove());
$("parameters").textContent = `${(parameters / 1e6).toFixed(1)} million`;

const ready = show_example(0).then(ask);
