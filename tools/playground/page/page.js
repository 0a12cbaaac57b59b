"use strict";
// The page: what is drawn, what the model answers, and what an attack finds.

const GRID = 31;
const element = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const digits = (value) => value.toFixed(3);
const strengthSlider = element("strength");

let strokes = [];
// The picture and its answer, and the last attack on it.
let current = null;
let attacked = null;
// Only the last of several attacks that wait is shown.
let turn = 0;

// Pictures ----------------------------------------------------------------------------------------

function paint(canvas, picture) {
  const context = canvas.getContext("2d");
  const paper = style("--paper").split(",").map(Number);
  const ink = style("--ink").split(",").map(Number);
  const image = context.createImageData(DATA.side, DATA.side);
  for (let pixel = 0; pixel < PIXELS; pixel += 1) {
    const value = picture ? picture[pixel] : 0;
    for (let part = 0; part < 3; part += 1) {
      image.data[4 * pixel + part] = paper[part] + value * (ink[part] - paper[part]);
    }
    image.data[4 * pixel + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function paintPad() {
  const pad = element("pad");
  const context = pad.getContext("2d");
  context.clearRect(0, 0, pad.width, pad.height);
  if (!strokes.length) {
    context.fillStyle = style("--muted");
    context.font = "18px system-ui, sans-serif";
    context.textAlign = "center";
    context.fillText("Draw here", pad.width / 2, pad.height / 2);
  }
  context.strokeStyle = `rgb(${style("--ink")})`;
  drawStrokes(context, strokes, 0.09 * pad.width, (p) => [p.x * pad.width, p.y * pad.height]);
}

function paintAll() {
  paintPad();
  document.querySelectorAll("#samples button").forEach((button, index) => {
    paint(button.firstChild, DATA.samples[index].pixels);
  });
  paint(element("picture"), current?.picture);
  paint(element("attacked"), attacked?.pixels);
  if (attacked) paintSlice();
  else element("slice").getContext("2d").clearRect(0, 0, 640, 640);
}

// The answer --------------------------------------------------------------------------------------

async function show(picture) {
  turn += 1;
  const mine = turn;
  const [answer] = await Model.serve(picture);
  if (mine !== turn) return;
  current = { picture, ...answer };
  attacked = null;
  element("class").textContent = answer.class;
  element("margin").textContent = digits(answer.margin);
  element("radius").textContent = digits(answer.radius);
  element("status").textContent = `No picture closer than ${digits(answer.radius)} gets another class.`;
  element("same-text").textContent = `class ${answer.class}, as the picture`;
  const tick = element("tick");
  tick.hidden = false;
  const share = answer.radius / Number(strengthSlider.max);
  tick.style.left = `calc(8px + ${share} * (100% - 16px) - 1.5px)`;
  for (const id of ["strength", "inside", "weakest"]) element(id).disabled = false;
  paintAll();
  await runAttack();
}

function reset() {
  turn += 1;
  current = attacked = null;
  for (const id of ["class", "margin", "radius"]) element(id).textContent = "–";
  for (const id of ["strength", "inside", "weakest"]) element(id).disabled = true;
  element("status").textContent = "Draw a digit, or choose a picture.";
  element("tick").hidden = true;
  setVerdict("Choose a picture first.", false);
  paintAll();
}

// The attack --------------------------------------------------------------------------------------

function setVerdict(text, changed) {
  element("verdict").textContent = text;
  element("verdict").classList.toggle("changed", changed);
}

function verdictOf(found, strength) {
  const { radius } = current;
  if (found.changed && found.distance < radius) {
    return "The class changed inside the certified radius. This must not happen: please report it.";
  }
  if (found.changed) {
    return `The class changed to ${found.class} at distance ${digits(found.distance)}, beyond the certified radius.`;
  }
  if (strength <= radius) {
    return `The attack failed, as is proven: ${digits(strength)} is inside the certified radius ${digits(radius)}.`;
  }
  return `The attack failed, but ${digits(strength)} is beyond the certified radius: a better attack might succeed.`;
}

async function runAttack() {
  const strength = Number(strengthSlider.value);
  element("strength-value").textContent = strength.toFixed(2);
  if (!current) return;
  turn += 1;
  const mine = turn;
  setVerdict("Attacking…", false);
  const found = await attack(current.picture, current.class, strength);
  if (mine !== turn) return;
  await present(found, strength, verdictOf(found, strength), mine);
}

async function findWeakest() {
  turn += 1;
  const mine = turn;
  setVerdict("Searching…", false);
  const { picture, radius } = current;
  const most = Number(strengthSlider.max);
  const found = await weakestAttack(picture, current.class, radius, most);
  if (mine !== turn) return;
  if (!found) {
    setVerdict(`No attack up to ${most} succeeded.`, false);
    return;
  }
  strengthSlider.value = found.distance + 0.005;
  element("strength-value").textContent = Number(strengthSlider.value).toFixed(2);
  const text =
    `The weakest attack that was found changes the class to ${found.class} at distance ` +
    `${digits(found.distance)}, ${(found.distance / radius).toFixed(1)} times the certified radius.`;
  await present(found, found.distance, text, mine);
}

async function present(found, strength, text, mine) {
  const slice = await sliceThrough(found.pixels, strength);
  if (mine !== turn) return;
  attacked = { ...found, strength, slice };
  setVerdict(text, found.changed);
  paint(element("attacked"), found.pixels);
  paintSlice();
}

// The neighborhood --------------------------------------------------------------------------------

// Classes on a grid in the plane through the picture and an attacked one.
async function sliceThrough(pixels, strength) {
  const { picture, radius } = current;
  const random = randomNumbers(1);
  let across = Float64Array.from(pixels, (value, index) => value - picture[index]);
  if (norm(across) < 1e-6) across = normalNumbers(random, PIXELS);
  across = across.map((value) => value / norm(across));
  let up = normalNumbers(random, PIXELS);
  const overlap = up.reduce((sum, value, index) => sum + value * across[index], 0);
  up = up.map((value, index) => value - overlap * across[index]);
  up = up.map((value) => value / norm(up));
  const reach = 1.3 * Math.max(strength, radius, 0.05);
  const points = new Float32Array(GRID * GRID * PIXELS);
  for (let cell = 0; cell < GRID * GRID; cell += 1) {
    const x = reach * (2 * ((cell % GRID) + 0.5) / GRID - 1);
    const y = reach * (1 - 2 * (Math.floor(cell / GRID) + 0.5) / GRID);
    for (let pixel = 0; pixel < PIXELS; pixel += 1) {
      points[cell * PIXELS + pixel] = picture[pixel] + x * across[pixel] + y * up[pixel];
    }
  }
  const answers = await Model.serve(points);
  return { reach, classes: answers.map((answer) => answer.class) };
}

function paintSlice() {
  const canvas = element("slice");
  const context = canvas.getContext("2d");
  const size = canvas.width;
  const { slice, strength, distance: moved } = attacked;
  const side = size / GRID;
  slice.classes.forEach((label, cell) => {
    context.fillStyle = style(label === current.class ? "--same" : "--other");
    const [x, y] = [(cell % GRID) * side, Math.floor(cell / GRID) * side];
    // Rounded, so that no gaps show between the cells.
    context.fillRect(Math.floor(x), Math.floor(y), Math.ceil(side) + 1, Math.ceil(side) + 1);
  });
  const scale = size / 2 / slice.reach;
  const circle = (radius, color, dashes) => {
    context.beginPath();
    context.arc(size / 2, size / 2, radius * scale, 0, 2 * Math.PI);
    context.setLineDash(dashes);
    context.lineWidth = 5;
    context.strokeStyle = color;
    context.stroke();
    context.setLineDash([]);
  };
  circle(strength, style("--text"), [14, 10]);
  circle(current.radius, style("--accent"), []);
  context.fillStyle = context.strokeStyle = style("--text");
  context.font = "600 34px system-ui, sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (const [label, [x, y]] of labelPlaces(slice.classes)) {
    context.fillText(label, (x + 0.5) * side, (y + 0.5) * side);
  }
  context.beginPath();
  context.arc(size / 2, size / 2, 8, 0, 2 * Math.PI);
  context.fill();
  const x = size / 2 + moved * scale;
  context.beginPath();
  for (const sign of [-1, 1]) {
    context.moveTo(x - 11, size / 2 - 11 * sign);
    context.lineTo(x + 11, size / 2 + 11 * sign);
  }
  context.lineWidth = 5;
  context.stroke();
}

// Where to write each other class: the cell of its region that is farthest from all other regions.
function labelPlaces(classes) {
  const places = new Map();
  classes.forEach((label, cell) => {
    if (label === current.class) return;
    const [x, y] = [cell % GRID, Math.floor(cell / GRID)];
    let room = Math.min(x, y, GRID - 1 - x, GRID - 1 - y) + 1;
    classes.forEach((other, at) => {
      if (other !== label) {
        room = Math.min(room, Math.hypot((at % GRID) - x, Math.floor(at / GRID) - y));
      }
    });
    if (room >= 2 && room > (places.get(label)?.room ?? 0)) places.set(label, { room, at: [x, y] });
  });
  return [...places].map(([label, { at }]) => [label, at]);
}

// Events ------------------------------------------------------------------------------------------

function press(button) {
  document.querySelectorAll("#samples button").forEach((other) => {
    other.setAttribute("aria-pressed", String(other === button));
  });
}

function listen() {
  const pad = element("pad");
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  };
  let isDrawing = false;
  let started = false;
  pad.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    pad.setPointerCapture(event.pointerId);
    isDrawing = true;
    // After a picture of the test set a new drawing begins.
    if (!started) strokes = [];
    started = true;
    press(null);
    strokes.push([place(event)]);
    paintPad();
  });
  pad.addEventListener("pointermove", (event) => {
    if (!isDrawing) return;
    const passed = event.getCoalescedEvents?.() ?? [];
    for (const one of passed.length ? passed : [event]) strokes.at(-1).push(place(one));
    paintPad();
  });
  const end = () => {
    if (isDrawing) show(strokesToPicture(strokes));
    isDrawing = false;
  };
  pad.addEventListener("pointerup", end);
  pad.addEventListener("pointercancel", end);
  element("clear").addEventListener("click", () => {
    strokes = [];
    press(null);
    reset();
  });
  DATA.samples.forEach(({ label, pixels }) => {
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = DATA.side;
    button.type = "button";
    button.setAttribute("aria-label", `A ${label} from the test set`);
    button.append(canvas);
    button.addEventListener("click", () => {
      strokes = [];
      started = false;
      press(button);
      show(Float32Array.from(pixels));
    });
    element("samples").append(button);
  });
  strengthSlider.addEventListener("input", runAttack);
  element("inside").addEventListener("click", () => {
    // The slider has two digits.
    strengthSlider.value = Math.floor(99 * current.radius) / 100;
    runAttack();
  });
  element("weakest").addEventListener("click", findWeakest);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);
}

async function begin() {
  element("total").textContent = DATA.total.toFixed(3);
  reset();
  element("strength-value").textContent = Number(strengthSlider.value).toFixed(2);
  try {
    await Model.start();
  } catch (error) {
    element("status").textContent = `The model could not be started: ${error.message}`;
    throw error;
  }
  listen();
  document.querySelector("#samples button").click();
}

// For tests.
const ready = begin();
