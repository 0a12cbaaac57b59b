// Tests of build/playground in Chromium. `make playground` copies this file to where its packages are,
// and runs it. PLAYGROUND is the folder of the page, CHROMIUM the browser, SCREENSHOTS a folder for pictures.

import assert from "node:assert/strict";
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import path from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath, pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const here = path.dirname(fileURLToPath(import.meta.url));
const folder = path.resolve(process.env.PLAYGROUND ?? path.join(here, "../playground"));
const browsers = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/google-chrome"];
const executablePath = browsers.find((candidate) => candidate && existsSync(candidate));
const skip = executablePath ? false : "needs Chromium: name it in CHROMIUM";
const expected = JSON.parse(readFileSync(path.join(folder, "expected.json"), "utf8"));

let browser, server, url;
// Requests that left this machine, and errors of the pages.
const outside = [];
const errors = [];

before(async () => {
  if (skip) return;
  server = createServer((request, response) => {
    const file = path.join(folder, path.basename(request.url));
    if (!existsSync(file)) return response.writeHead(404).end();
    const types = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css" };
    response.writeHead(200, { "Content-Type": types[path.extname(file)] ?? "text/plain" });
    response.end(readFileSync(file));
  });
  await new Promise((resolve) => server.listen(0, "localhost", resolve));
  url = `http://localhost:${server.address().port}/index.html`;
  browser = await chromium.launch({
    executablePath,
    args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync"],
  });
});

after(async () => {
  await browser?.close();
  server?.close();
});

async function open(address = url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  page.on("request", (request) => {
    if (!/^(http:\/\/localhost:|file:|blob:|data:)/.test(request.url())) outside.push(request.url());
  });
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  await page.goto(address);
  await page.evaluate("ready");
  await settled(page);
  return page;
}

// After the attack that follows a new picture.
async function settled(page) {
  await page.waitForFunction(
    "!/Attacking|Searching|Choose/.test(document.getElementById('verdict').textContent)",
  );
}

const text = (page, id) => page.locator(`#${id}`).textContent();

async function setStrength(page, strength) {
  await page.locator("#strength").fill(String(strength));
  await settled(page);
}

async function draw(page, strokes) {
  const box = await page.locator("#pad").boundingBox();
  for (const stroke of strokes) {
    const points = stroke.map(([x, y]) => [box.x + x * box.width, box.y + y * box.height]);
    await page.mouse.move(...points[0]);
    await page.mouse.down();
    for (const point of points.slice(1)) await page.mouse.move(...point, { steps: 8 });
    await page.mouse.up();
  }
  await page.waitForFunction("current !== null");
  await settled(page);
}

const circle = Array.from({ length: 25 }, (_, i) => {
  const angle = (2 * Math.PI * i) / 24 - Math.PI / 2;
  return [0.5 + 0.22 * Math.cos(angle), 0.5 + 0.38 * Math.sin(angle)];
});
const DRAWINGS = {
  0: [circle],
  1: [[[0.42, 0.25], [0.52, 0.12], [0.52, 0.88]]],
  4: [[[0.55, 0.12], [0.25, 0.6], [0.78, 0.6]], [[0.6, 0.4], [0.6, 0.9]]],
  7: [[[0.25, 0.15], [0.75, 0.15], [0.42, 0.9]]],
};

test("samples have the class of Keras and its radius, less the allowance", { skip }, async () => {
  const page = await open();
  const buttons = page.locator("#samples button");
  assert.equal(await buttons.count(), expected.length);
  const answers = await page.evaluate(
    "Promise.all(DATA.samples.map((s) => Model.serve(Float32Array.from(s.pixels)).then((r) => r[0])))",
  );
  answers.forEach((answer, index) => {
    assert.equal(answer.class, expected[index].class);
    assert.ok(answer.radius <= expected[index].radius, "the radius is above that of Keras");
    assert.ok(Math.abs(answer.radius - expected[index].radius) < 1e-4);
  });
  assert.ok(answers.filter((answer) => answer.radius > 0.1).length > 5);
  await buttons.nth(7).click();
  await page.waitForFunction(`document.getElementById("class").textContent === "${expected[7].class}"`);
  await settled(page);
  assert.ok(Math.abs(Number(await text(page, "radius")) - expected[7].radius) < 6e-4);
});

test("twenty attacks at 0.99 of the radius fail", { skip }, async () => {
  const page = await open();
  const found = await page.evaluate(async () => {
    const results = [];
    for (const sample of DATA.samples) {
      const picture = Float32Array.from(sample.pixels);
      const [answer] = await Model.serve(picture);
      for (const seed of [0, 1]) {
        const result = await attack(picture, answer.class, 0.99 * answer.radius, seed);
        results.push({ ...result, radius: answer.radius });
      }
    }
    return results;
  });
  assert.equal(found.length, 20);
  for (const { changed, distance, radius } of found) {
    assert.equal(changed, false);
    // It went to the edge of its ball.
    assert.ok(distance <= 0.99 * radius && distance >= 0.9 * 0.99 * radius);
  }
});

test("a strong attack succeeds, and the weakest one is beyond the radius", { skip }, async () => {
  const page = await open();
  await setStrength(page, 3);
  assert.match(await text(page, "verdict"), /^The class changed to \d at distance .* beyond/);
  await page.locator("#weakest").click();
  await settled(page);
  const [, , distance] = (await text(page, "verdict")).match(/to (\d) at distance ([\d.]+)/);
  assert.ok(Number(distance) > Number(await text(page, "radius")) && Number(distance) < 3);
  await page.locator("#inside").click();
  await settled(page);
  assert.match(await text(page, "verdict"), /^The attack failed, as is proven/);
});

test("strokes of the mouse give the class that they show", { skip }, async () => {
  const page = await open();
  for (const [digit, strokes] of Object.entries(DRAWINGS)) {
    await page.locator("#clear").click();
    assert.equal(await text(page, "class"), "–");
    await draw(page, strokes);
    assert.equal(await text(page, "class"), digit);
    assert.ok(Number(await text(page, "margin")) > 0);
  }
});

test("a finger draws on a phone, where nothing is wider than the screen", { skip }, async () => {
  const page = await open(url, {
    viewport: { width: 390, height: 844 },
    hasTouch: true,
    isMobile: true,
  });
  const widths = "[document.documentElement.scrollWidth, innerWidth]";
  const [content, screen] = await page.evaluate(widths);
  assert.ok(content <= screen);
  await page.locator("#clear").click();
  await page.locator("#pad").scrollIntoViewIfNeeded();
  const box = await page.locator("#pad").boundingBox();
  const client = await page.context().newCDPSession(page);
  const touch = (type, points) =>
    client.send("Input.dispatchTouchEvent", {
      type,
      touchPoints: points.map(([x, y]) => ({ x: box.x + x * box.width, y: box.y + y * box.height })),
    });
  const before = await page.evaluate("scrollY");
  await touch("touchStart", [[0.5, 0.15]]);
  for (let step = 1; step <= 10; step += 1) await touch("touchMove", [[0.5, 0.15 + 0.07 * step]]);
  await touch("touchEnd", []);
  await page.waitForFunction("current !== null");
  assert.equal(await page.evaluate("scrollY"), before);
  assert.match(await text(page, "class"), /^\d$/);
});

test("the page works from a file", { skip }, async () => {
  const page = await open(pathToFileURL(path.join(folder, "index.html")).href);
  assert.equal(await text(page, "class"), String(expected[0].class));
});

test("screenshots", { skip: skip || (process.env.SCREENSHOTS ? false : "SCREENSHOTS is not set") }, async () => {
  mkdirSync(process.env.SCREENSHOTS, { recursive: true });
  const phone = { viewport: { width: 390, height: 844 }, isMobile: true, hasTouch: true };
  const settings = { desktop: {}, dark: { colorScheme: "dark" }, phone, "phone-dark": { ...phone, colorScheme: "dark" } };
  for (const [name, options] of Object.entries(settings)) {
    const page = await open(url, options);
    await page.locator("#samples button").nth(6).click();
    await page.locator("#weakest").click();
    await settled(page);
    await page.screenshot({ path: path.join(process.env.SCREENSHOTS, `${name}.png`), fullPage: true });
  }
  const page = await open();
  await draw(page, DRAWINGS[4]);
  await page.screenshot({ path: path.join(process.env.SCREENSHOTS, "drawn.png"), fullPage: true });
});

test("no page had an error or left this machine", { skip }, () => {
  assert.deepEqual(errors, []);
  assert.deepEqual(outside, []);
});
