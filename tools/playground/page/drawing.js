"use strict";
// From strokes to a picture, as the data were made: the digit fills a bitmap of 32 by 32, and a pixel
// is the share of ink in its block of 4 by 4.

const BITMAP = 32;
// Width of a stroke and largest width of a digit, in cells of the bitmap, as in the data.
const STROKE = 4.5;
const WIDEST = 26;
// Samples along each side of a cell.
const FINE = 4;

function strokesToPicture(strokes) {
  const points = strokes.flat();
  const xs = points.map((point) => point.x);
  const ys = points.map((point) => point.y);
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const [top, bottom] = [Math.min(...ys), Math.max(...ys)];
  const scale = Math.min(
    (BITMAP - STROKE) / Math.max(bottom - top, 1e-3),
    (WIDEST - STROKE) / Math.max(right - left, 1e-3),
    // A dot stays small.
    4 * BITMAP,
  );
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = BITMAP * FINE;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.scale(FINE, FINE);
  context.translate(BITMAP / 2, BITMAP / 2);
  drawStrokes(context, strokes, STROKE, (point) => [
    scale * (point.x - 0.5 * (left + right)),
    scale * (point.y - 0.5 * (top + bottom)),
  ]);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const share = (x0, y0, size) => {
    let sum = 0;
    for (let y = y0; y < y0 + size; y += 1) {
      for (let x = x0; x < x0 + size; x += 1) sum += data[4 * (y * canvas.width + x) + 3];
    }
    return sum / (255 * size * size);
  };
  const cells = BITMAP / DATA.side;
  const picture = new Float32Array(PIXELS);
  for (let row = 0; row < BITMAP; row += 1) {
    for (let column = 0; column < BITMAP; column += 1) {
      if (share(column * FINE, row * FINE, FINE) >= 0.5) {
        const pixel = Math.floor(row / cells) * DATA.side + Math.floor(column / cells);
        picture[pixel] += 1 / (cells * cells);
      }
    }
  }
  return picture;
}

function drawStrokes(context, strokes, width, place) {
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  for (const stroke of strokes) {
    context.beginPath();
    stroke.forEach((point, index) => {
      const [x, y] = place(point);
      if (index === 0) context.moveTo(x, y);
      // A stroke of one point is a dot.
      if (index > 0 || stroke.length === 1) context.lineTo(x, y);
    });
    context.stroke();
  }
}
