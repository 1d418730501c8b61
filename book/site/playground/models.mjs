// Loads what `mnistlab export` wrote, and runs it by onnxruntime-web: one thread, no server.
import { SIDE } from "./normalise.mjs";

const url = (path) => new URL(path, import.meta.url).href;

export const models = []; // those that have arrived, in the order of the manifest

// A file's bytes; `heard` is called with the number that has arrived.
async function bytes(path, heard = () => {}) {
  const answer = await fetch(url(path));
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  const chunks = [];
  let count = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(chunks).arrayBuffer());
    chunks.push(value);
    heard((count += value.length));
  }
}

const json = async (path) => JSON.parse(new TextDecoder().decode(await bytes(path)));

// What the page shows before a model is there: { runtime, samples, models }.
export async function about() {
  const [page, listed] = await Promise.all([json("./page.json"), json("./models.json")]);
  return { ...page, models: listed };
}

// Load the runtime, then each model. heard(bytes, all) follows the runtime, arrived(model) comes
// once for each model. Throws where WebAssembly is missing or a file cannot be had.
export async function load({ runtime, models: listed }, heard, arrived) {
  if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly.");
  const ort = await import("./ort/ort.wasm.min.mjs");
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1; // more would need headers that a static host does not send
  ort.env.wasm.wasmBinary = await bytes(`./ort/${runtime.wasm}`, (n) => heard(n, runtime.bytes));
  for (const model of listed) {
    // The hash in the address: no cache gives an older file of the same name.
    const file = await bytes(`./models/${model.file}?${model.sha256.slice(0, 12)}`);
    const session = await ort.InferenceSession.create(file);
    await inTurn(() => run(ort, session, new Float32Array(SIDE ** 2))); // the first call is slow
    models.push({ ...model, run: (pixels) => inTurn(() => run(ort, session, pixels)) });
    arrived(models.at(-1));
  }
}

let last = Promise.resolve();

// The runtime takes one call at a time.
function inTurn(task) {
  const result = last.then(task);
  last = result.catch(() => {});
  return result;
}

// pixels: Float32Array(784 * N), 0 to 1. Returns { logits, ms } and the model's extras, each
// { data, dims } with N first.
async function run(ort, session, pixels) {
  const shape = [pixels.length / SIDE ** 2, 1, SIDE, SIDE];
  const input = new ort.Tensor("float32", pixels, shape);
  const start = performance.now();
  const outputs = await session.run({ pixels: input });
  return { ...outputs, ms: performance.now() - start };
}

// Probabilities of image n of a batch.
export function softmax({ data, dims }, n = 0) {
  const logits = data.slice(n * dims[1], (n + 1) * dims[1]);
  const top = Math.max(...logits);
  const powers = Array.from(logits, (v) => Math.exp(v - top));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((v) => v / sum);
}

export const winner = (values) => values.indexOf(Math.max(...values));
