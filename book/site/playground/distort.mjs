// Ways to spoil 28x28 pixels after they were normalised, so that nothing is centred again.
import { SIDE } from "./normalise.mjs";

const signed = (v) => `${v}`.replace("-", "\u2212");

// Of each way: where it does nothing, its range, and how a value reads.
export const WAYS = {
  rotate: { none: 0, min: -90, max: 90, step: 1, text: (v) => `${signed(v)}°` },
  shift: { none: 0, min: -12, max: 12, step: 0.5, text: (v) => `${signed(v)} px` },
  scale: { none: 1, min: 0.25, max: 1.75, step: 0.05, text: (v) => `× ${v.toFixed(2)}` },
  noise: { none: 0, min: 0, max: 1, step: 0.02, text: (v) => v.toFixed(2) },
};

// The same normal numbers for each image, each model and each visit (mulberry32, Box and Muller).
let seed = 1;
function uniform() {
  seed = (seed + 0x6d2b79f5) | 0;
  let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
}
const NOISE = Float32Array.from(
  { length: SIDE * SIDE },
  () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()),
);

// pixels: Float32Array(784), 0 to 1. Clockwise degrees, pixels to the right, factor, sd of noise.
export function distort(pixels, { rotate = 0, shift = 0, scale = 1, noise = 0 } = {}) {
  const out = new Float32Array(pixels.length);
  const middle = (SIDE - 1) / 2;
  const angle = (rotate * Math.PI) / 180;
  const [cos, sin] = [Math.cos(angle) / scale, Math.sin(angle) / scale];
  const at = (x, y) => (x < 0 || y < 0 || x >= SIDE || y >= SIDE ? 0 : pixels[y * SIDE + x]);
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) {
      // Where this pixel comes from, between four others (bilinear).
      const [dx, dy] = [x - middle - shift, y - middle];
      const [sx, sy] = [middle + cos * dx + sin * dy, middle - sin * dx + cos * dy];
      const [x0, y0] = [Math.floor(sx), Math.floor(sy)];
      const [a, b] = [sx - x0, sy - y0];
      const upper = (1 - a) * at(x0, y0) + a * at(x0 + 1, y0);
      const lower = (1 - a) * at(x0, y0 + 1) + a * at(x0 + 1, y0 + 1);
      const i = y * SIDE + x;
      out[i] = Math.min(1, Math.max(0, (1 - b) * upper + b * lower + noise * NOISE[i]));
    }
  }
  return out;
}
