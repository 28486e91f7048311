"use strict";
/* The small world and the marks on it: tiny/world.py, tiny/marked.py and marks.py once more, under the same names, for pictures of
112 pixels. A thing is {size, colour, kind, cell, radius, x, y, shade, tilt}; a mark has the fields of marks.Mark, and its thing's cell. */

const WORLD = JSON.parse(document.getElementById("data").textContent).world, MARKS = WORLD.marks;
const SCALE = WORLD.side / 336;  // a mark's widths and lengths are given for a picture of 336 pixels

// ----------------------------------------------------------------------------------------------------- tiny/world.py

// A thing as it is drawn on this page: straight, of middling size, in the middle of its place.
function place_thing({size, colour, kind, cell}) {
  const [least, most] = WORLD.sizes[size], third = WORLD.side / 6;
  const x = third * (2 * (cell % 3) + 1), y = third * (2 * Math.floor(cell / 3) + 1);
  return {size, colour, kind, cell, radius: (least + most) / 2, x, y, shade: WORLD.colours[colour], tilt: 0};
}

// The corners of a shape around (0, 0), turned by `tilt` degrees; a circle and a ring have many.
function corners(kind, radius, tilt) {
  const at = (r, degrees) => [r * Math.cos(degrees * Math.PI / 180), r * Math.sin(degrees * Math.PI / 180)];
  if (kind === "cross") {
    const arm = 0.36 * radius, far = Math.hypot(radius, arm), near = Math.hypot(arm, arm), half = Math.atan(0.36) * 180 / Math.PI;
    return [0, 90, 180, 270].flatMap(turn => [at(far, turn - half + tilt), at(far, turn + half + tilt), at(near, turn + 45 + tilt)]);
  }
  const every = (count, step, from) => Array.from({length: count}, (_, k) => step * k + from);
  const [angles, radii] = {
    square: [every(4, 90, 45), [1.25]],
    triangle: [every(3, 120, -90), [1.2]],
    star: [every(10, 36, -90), [1.2, 0.5]],
  }[kind] ?? [every(36, 10, 0), [1]];
  return angles.map((angle, k) => at(radius * radii[k % radii.length], angle + tilt));
}

const outline = (thing, scale = 1) =>
  corners(thing.kind, thing.radius * scale, thing.tilt).map(([x, y]) => [thing.x + x, thing.y + y]);

function paint(pen, thing) {
  pen.fillStyle = `rgb(${thing.shade})`;
  pen.beginPath();
  if (thing.kind === "circle" || thing.kind === "ring") {
    pen.arc(thing.x, thing.y, thing.radius, 0, 2 * Math.PI);
    if (thing.kind === "ring") pen.arc(thing.x, thing.y, thing.radius * 0.55, 0, 2 * Math.PI, true);
  } else {
    outline(thing).forEach(corner => pen.lineTo(...corner));
  }
  pen.fill();
}

// Like "A large red circle at the top left and a small blue star in the centre." marks: a marked thing is followed by its mark's words.
function describe(things, marks = []) {
  const phrases = [...things].sort((a, b) => a.cell - b.cell).map(({size, colour, kind, cell}) => {
    const mark = marks.find(one => one.cell === cell);
    return `a ${size} ${colour} ${kind} ${WORLD.places[cell]}` + (mark ? ` ${words_of(mark)}` : "");
  });
  if (!phrases.length) return "Nothing.";
  const last = phrases.pop(), text = phrases.length ? `${phrases.join(", ")} and ${last}` : last;
  return text[0].toUpperCase() + text.slice(1) + ".";
}

// ---------------------------------------------------------------------------------------------------------- marks.py

// How a question refers to what is marked: "within the red rectangle".
const words_of = mark => `${MARKS.kinds[mark.kind].relation} the ${mark.colour} ${mark.kind}`;

const uniform = (random, from, to) => from + (to - from) * random();
const whole = (random, from, to) => from + Math.floor(random() * (to - from + 1));
const gauss = (random, middle, deviation) =>
  middle + deviation * Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());

// A mark on a thing, as different as the ones in training (in width, alpha, place and form).
function random_mark(thing, kind, colour, random = Math.random) {
  const {widths, alphas, around} = MARKS.kinds[kind], edge = value => Math.min(Math.max(value, 0), WORLD.side);
  const where = outline(thing, around ? 1.2 : 1).map(point => point.map(edge));
  const [xs, ys] = [0, 1].map(axis => where.map(point => point[axis]));
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const x = (left + right) / 2, y = (top + bottom) / 2, width = right - left, height = bottom - top;
  const mark = {kind, colour, cell: thing.cell, aspect: 1, angle: 0, length: 50, head: 0.35, filled: true, bent: 0};
  let points = where;
  if (kind === "rectangle") points = [[left, top], [right, bottom]];
  if (kind === "ellipse") {
    const ratio = uniform(random, 1, 1.5) / 2;
    points = [[x - ratio * width, y - ratio * height], [x + ratio * width, y + ratio * height]].map(point => point.map(edge));
  }
  if (kind === "triangle") {
    for (let n = 0; n < 100; n++) {
      points = [0, 1, 2].map(() => point_in(where, random));
      if (widest_angle(points) <= 150) break;
    }
  }
  if (kind === "point") {
    points = [point_in(where, random, () => [gauss(random, x, Math.sqrt(width / 8)), gauss(random, y, Math.sqrt(height / 8))])];
    if (random() < 0.5) mark.aspect = uniform(random, 0.5, 2);
  }
  if (kind === "scribble") points = bezier([0, 1, 2, 3].map(() => point_in(where, random)));
  if (kind === "arrow") {
    points = [[x + uniform(random, -0.25, 0.25) * width, y + uniform(random, -0.25, 0.25) * height]];
    [mark.angle, mark.head] = [uniform(random, 0, 360), uniform(random, 0.2, 0.5)];
    const across = Math.max(1, 0.8 * Math.min(width, height) / SCALE);
    mark.length = uniform(random, Math.min(across, 50), Math.max(across, 50));
    mark.bent = random() < 0.5 ? 0 : uniform(random, -5, 5);
    mark.filled = random() < 0.5;
  }
  const [thin, thick] = widths.map(value => Math.floor(value * SCALE + 1e-6));  // whole pixels of this picture
  mark.width = Math.max(1, whole(random, thin, thick)) / SCALE;
  mark.alpha = whole(random, ...alphas);
  mark.coordinates = points.flat();
  return mark;
}

// A point drawn until it lies in the polygon, or given up on after fifty.
function point_in(polygon, random, draw) {
  const [xs, ys] = [0, 1].map(axis => polygon.map(point => point[axis]));
  draw ??= () => [uniform(random, Math.min(...xs), Math.max(...xs)), uniform(random, Math.min(...ys), Math.max(...ys))];
  let point;
  for (let n = 0; n < 50; n++) {
    point = draw();
    if (lies_in(polygon, ...point)) break;
  }
  return point;
}

function lies_in(polygon, x, y) {
  const crossings = polygon.filter(([x0, y0], n) => {  // of a ray to the right with the sides: an odd number from inside
    const [x1, y1] = polygon[(n + 1) % polygon.length];
    return (y0 > y) !== (y1 > y) && x < x0 + (x1 - x0) * (y - y0) / (y1 - y0);
  });
  return crossings.length % 2 === 1;
}

// The largest angle of a triangle, in degrees, from the lengths of its sides.
function widest_angle(points) {
  const sides = points.map(([x, y], n) => Math.hypot(x - points[(n + 1) % 3][0], y - points[(n + 1) % 3][1]));
  const [a, b, c] = sides.sort((one, other) => one - other);
  return a ? Math.acos(Math.min(1, Math.max(-1, (a * a + b * b - c * c) / (2 * a * b)))) * 180 / Math.PI : 180;
}

// 33 points along the cubic Bézier curve with these four control points.
function bezier(control) {
  return Array.from({length: 33}, (_, k) => {
    const t = k / 32, weights = [(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t ** 2, t ** 3];
    return [0, 1].map(axis => control.reduce((sum, point, n) => sum + weights[n] * point[axis], 0));
  });
}

// Put a mark on the picture: its shape in one colour and one alpha, with hard edges, as Pillow draws it.
function draw_mark(pen, mark) {
  const layer = document.createElement("canvas"), side = WORLD.side;
  [layer.width, layer.height] = [side, side];
  const brush = layer.getContext("2d", {willReadFrequently: true});
  brush.translate(0.5, 0.5);  // Pillow takes whole coordinates, and its (0, 0) is the middle of the first pixel, not its corner
  trace_mark(brush, mark);
  const shape = brush.getImageData(0, 0, side, side), rgb = MARKS.colours[mark.colour];
  for (let i = 0; i < shape.data.length; i += 4) shape.data.set([...rgb, shape.data[i + 3] < 128 ? 0 : mark.alpha], i);
  brush.putImageData(shape, 0, 0);
  pen.drawImage(layer, 0, 0);
}

function trace_mark(brush, {kind, coordinates, width, ...more}) {
  const parts = Math.max(...coordinates) <= 1 ? WORLD.side : 1;  // so near to the corner, they are parts of the picture
  const exact = coordinates.map(value => Math.min(value * parts, WORLD.side - 1)), values = exact.map(Math.floor);
  const points = values.flatMap((value, n) => n % 2 ? [] : [[value, values[n + 1]]]), [[x, y]] = points;
  const pixels = Math.max(1, Math.floor((width ?? MARKS.kinds[kind].width) * SCALE + 1e-6));
  brush.lineJoin = "round";
  brush.lineWidth = kind === "mask contour" ? 2 * pixels + 1 : pixels;
  brush.beginPath();
  if (kind === "rectangle" || kind === "ellipse") {  // their lines lie within the box
    const [, [right, bottom]] = points, [w, h] = [right - x + 1, bottom - y + 1];
    brush.lineWidth = Math.min(pixels, Math.floor((Math.floor(Math.min(w, h)) + 1) / 2));
    const inner = brush.lineWidth / 2;
    if (kind === "rectangle") brush.rect(x - 0.5 + inner, y - 0.5 + inner, w - 2 * inner, h - 2 * inner);
    else brush.ellipse((x + right) / 2, (y + bottom) / 2, w / 2 - inner, h / 2 - inner, 0, 0, 2 * Math.PI);
    brush.stroke();
  } else if (kind === "point") {
    brush.ellipse(x, y, pixels * more.aspect + 0.5, pixels / more.aspect + 0.5, 0, 0, 2 * Math.PI);
    brush.fill();
  } else if (kind === "arrow") {
    trace_arrow(brush, ...exact, more);
  } else {
    points.forEach(point => brush.lineTo(...point));
    if (kind !== "scribble") brush.closePath();
    if (kind === "mask") brush.fill();
    else brush.stroke();
  }
}

// An arrow whose tip is at (x, y), its head open by 60° to either side of the shaft.
function trace_arrow(brush, x, y, {angle, length, head, filled, bent}) {
  const turn = angle * Math.PI / 180, long = length * SCALE, barb = Math.max(head * long, 6 * SCALE), off = bent * SCALE;
  const shaft = Math.max(long - barb, 0);
  const at = (distance, more = 0) => [x + distance * Math.cos(turn + more), y + distance * Math.sin(turn + more)].map(Math.floor);
  [at(0), at(Math.hypot(shaft / 2, off), Math.atan2(off, shaft / 2)), at(shaft)].forEach(point => brush.lineTo(...point));
  brush.stroke();
  brush.beginPath();
  [at(barb, Math.PI / 3), at(0), at(barb, -Math.PI / 3)].forEach(point => brush.lineTo(...point));
  if (filled) brush.fill();
  else brush.stroke();
}

// ---------------------------------------------------------------------------------------------------- tiny/marked.py

// Why a thing cannot have this mark, or "": a model has learnt only what it was shown in training.
function never_learnt(thing, marks, kind, colour) {
  if (!thing) return "A mark is put on a thing, and there is none in this place.";
  const others = marks.filter(mark => mark.cell !== thing.cell);
  if (Math.hypot(...MARKS.colours[colour].map((value, n) => value - thing.shade[n])) <= MARKS.apart) {
    return `In training no mark has nearly the colour of its thing: ${colour} on ${thing.colour} would hardly show. Choose another colour.`;
  }
  if (others.some(mark => mark.colour === colour)) {
    return `There is a ${colour} mark already, and in training each mark has a colour of its own. Choose another colour.`;
  }
  if (others.length >= MARKS.most) return `There are ${MARKS.most} marks already, as many as in training.`;
  return "";
}
