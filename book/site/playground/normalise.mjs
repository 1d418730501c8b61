// From ink to the 28x28 pixels that a net is fed, as MNIST's digits were made from NIST's forms
// (LeCun et al. 1998): the box that holds the ink is scaled, aspect kept, until its longer side is
// 20 pixels, each of which is the mean of the ink that it covers; the result moves by whole pixels
// until its centre of mass rounds to pixel (14, 14). All of MNIST's own images obey that.
export const SIDE = 28;
const BOX = 20;
const CENTRE = 14;

// What to sum, and with which weight, for each of `to` equal parts of `from` pixels.
function parts(from, to) {
  const step = from / to;
  return Array.from({ length: to }, (_, i) => {
    const start = i * step;
    const stop = start + step;
    const taps = [];
    for (let j = Math.floor(start); j < Math.min(from, stop); j++) {
      taps.push([j, (Math.min(stop, j + 1) - Math.max(start, j)) / step]);
    }
    return taps;
  });
}

function bounds(ink, width, height) {
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (ink[y * width + x] === 0) continue;
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = y;
    }
  }
  return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

// ink: width x height bytes, 0 for paper and 255 for ink, row by row.
// Returns Float32Array(784), steps of 1/255 from 0 to 1; null where there is no ink.
export function normalise(ink, width, height) {
  const box = bounds(ink, width, height);
  if (!box) return null;
  const scale = BOX / Math.max(box.width, box.height);
  const columns = parts(box.width, Math.max(1, Math.round(box.width * scale)));
  const rows = parts(box.height, Math.max(1, Math.round(box.height * scale)));
  let [mass, massX, massY] = [0, 0, 0];
  const small = rows.map((down, y) =>
    columns.map((across, x) => {
      let sum = 0;
      for (const [j, b] of down) {
        const row = (box.top + j) * width + box.left;
        for (const [i, a] of across) sum += a * b * ink[row + i];
      }
      mass += sum;
      massX += sum * x;
      massY += sum * y;
      return Math.round(sum) / 255;
    }),
  );
  const left = CENTRE - Math.round(massX / mass);
  const top = CENTRE - Math.round(massY / mass);
  const pixels = new Float32Array(SIDE * SIDE);
  small.forEach((row, y) =>
    row.forEach((value, x) => {
      const [px, py] = [x + left, y + top];
      if (px >= 0 && px < SIDE && py >= 0 && py < SIDE) pixels[py * SIDE + px] = value;
    }),
  );
  return pixels;
}
