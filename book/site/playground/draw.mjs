// Painting: a grid of numbers as an image, the pad, bars and strips.

// Numbers from 0 to 1 as grey on a canvas of width x height; `colour`: [r, g, b] of 1, on nothing.
export function paint(canvas, values, width, height, colour = null) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  values.forEach((value, i) => {
    const level = Math.round(255 * value);
    image.data.set(colour ? [...colour, level] : [level, level, level, 255], 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Lines through the points of each stroke, [x, y] on a square of `side`; a lone point is a dot.
export function ink(context, strokes, side, colour) {
  const scale = context.canvas.width / side;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = side / 14; // as thick as MNIST's, of a digit that fills the pad
  context.strokeStyle = colour;
  for (const points of strokes) {
    context.beginPath();
    context.moveTo(...points[0]);
    for (const [i, [x, y]] of points.entries()) {
      const [nextX, nextY] = points[i + 1] ?? [x, y];
      context.quadraticCurveTo(x, y, (x + nextX) / 2, (y + nextY) / 2);
    }
    context.lineTo(...points.at(-1));
    context.stroke();
  }
  context.setTransform(1, 0, 0, 1, 0, 0);
}

// A canvas for each channel of outputs [1, C, H, W]; brightest is the largest number of all.
export function maps(box, { data, dims }) {
  const [, count, height, width] = dims;
  const low = data.reduce((a, b) => Math.min(a, b));
  const span = data.reduce((a, b) => Math.max(a, b)) - low || 1;
  const drawn = Array.from({ length: count }, (_, c) => {
    const part = data.slice(c * height * width, (c + 1) * height * width);
    const canvas = document.createElement("canvas");
    paint(canvas, part.map((v) => (v - low) / span), width, height);
    return canvas;
  });
  box.replaceChildren(...drawn);
}

// The image, and over it how much of each patch is seen.
export function overlay(box, pixels, side, { data, dims }) {
  const [, rows, columns] = dims;
  const most = Math.max(...data);
  const [below, above] = [document.createElement("canvas"), document.createElement("canvas")];
  paint(below, pixels, side, side);
  paint(above, data.map((v) => (0.85 * v) / most), columns, rows, [230, 120, 0]);
  const pair = document.createElement("div");
  pair.className = "pg-pair";
  pair.append(below, above);
  box.replaceChildren(pair);
}

export const element = (tag, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
