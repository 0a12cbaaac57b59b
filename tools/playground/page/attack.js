"use strict";
// Projected gradient descent in the 2-norm, toward every other class at once.

const STEPS = 40;

// Numbers in [0, 1) from a seed: an attack gives the same result again.
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

function normalNumbers(random, count) {
  return Float64Array.from({ length: count }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - random()));
    return radius * Math.cos(2 * Math.PI * random());
  });
}

function norm(vector) {
  return Math.sqrt(vector.reduce((sum, value) => sum + value * value, 0));
}

function distance(one, other) {
  return norm(Float64Array.from(one, (value, index) => value - other[index]));
}

// The picture plus a change, inside the ball and with pixels in [0, 1]. Clipping moves no pixel away
// from the picture, whose pixels are in [0, 1], so it stays in the ball.
function project(picture, change, strength) {
  const size = norm(change);
  // A millionth less, for the rounding to float32.
  const scale = size > strength ? ((1 - 1e-6) * strength) / size : 1;
  return Float32Array.from(picture, (value, index) =>
    Math.min(1, Math.max(0, value + scale * change[index])),
  );
}

// The picture with the smallest lead of class `winner` that was found within `strength`. The lead is
// its logit minus the largest other one: negative if the class has changed.
async function attack(picture, winner, strength, seed = 0) {
  const random = randomNumbers(seed);
  const targets = [];
  const rows = [];
  for (let target = 0; target < CLASSES; target += 1) {
    for (let start = 0; target !== winner && start < DATA.starts; start += 1) {
      targets.push(target);
      const change = normalNumbers(random, PIXELS).map((value) => (start ? value : 0));
      rows.push(project(picture, change, strength));
    }
  }
  const direction = new Float32Array(rows.length * CLASSES);
  targets.forEach((target, row) => {
    direction[row * CLASSES + winner] = 1;
    direction[row * CLASSES + target] = -1;
  });
  let best = { pixels: picture, lead: Infinity };
  for (let step = 0; step <= STEPS; step += 1) {
    const pixels = new Float32Array(rows.length * PIXELS);
    rows.forEach((row, index) => pixels.set(row, index * PIXELS));
    const found = await Model.differentiate(pixels, direction);
    rows.forEach((row, index) => {
      const logits = found.logits.subarray(index * CLASSES, (index + 1) * CLASSES);
      const others = Math.max(...logits.filter((_, label) => label !== winner));
      if (logits[winner] - others < best.lead) {
        best = { pixels: row, lead: logits[winner] - others };
      }
      const slope = found.gradient.subarray(index * PIXELS, (index + 1) * PIXELS);
      const size = norm(slope) || 1;
      const length = strength * Math.max(0.5 * (1 - step / STEPS), 0.02);
      const change = Float64Array.from(
        row,
        (value, pixel) => value - picture[pixel] - (length * slope[pixel]) / size,
      );
      rows[index] = project(picture, change, strength);
    });
  }
  const [answer] = await Model.serve(best.pixels);
  return {
    pixels: best.pixels,
    class: answer.class,
    changed: answer.class !== winner,
    distance: distance(best.pixels, picture),
  };
}

// The weakest attack that succeeds, up to `most`, by bisection above the certified radius; null if
// none does.
async function weakestAttack(picture, winner, radius, most) {
  let best = await attack(picture, winner, most);
  if (!best.changed) return null;
  let low = radius;
  let high = best.distance;
  while (high - low > 0.005) {
    const middle = 0.5 * (low + high);
    const found = await attack(picture, winner, middle);
    if (found.changed) {
      best = found;
      high = Math.min(middle, found.distance);
    } else {
      low = middle;
    }
  }
  return best;
}
