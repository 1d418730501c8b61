// The page: a pad, a card for each model, a look inside, and ways to break it.
import { WAYS, distort } from "./distort.mjs";
import { element, ink, maps, overlay, paint } from "./draw.mjs";
import { about, load, models, softmax, winner } from "./models.mjs";
import { SIDE, normalise } from "./normalise.mjs";

const $ = (id) => document.getElementById(`pg-${id}`);
const PAD = 280; // the pad's side in its own units, whatever its size on the screen
const STEPS = 25; // values of a strip
const PATIENCE = 300; // ms of quiet before the strips are made
const app = document.getElementById("playground");
const pad = $("pad");
const count = new Intl.NumberFormat("en");
const a = (read) => (read === 8 ? "an 8" : `a ${read}`);

let strokes = []; // what is drawn: lists of points [x, y]
let sample = null; // or what is shown instead: { label, pixels, ... }
let digit = null; // 28x28, before it is spoilt
let settings = Object.fromEntries(Object.entries(WAYS).map(([way, { none }]) => [way, none]));
let wanted = 0; // grows with each change, so that work on an older digit can stop

// --- the pad -------------------------------------------------------------------------------------

const hidden = element("canvas", { width: PAD, height: PAD });
const scan = hidden.getContext("2d", { willReadFrequently: true });

function readPad() {
  scan.fillStyle = "black";
  scan.fillRect(0, 0, PAD, PAD);
  ink(scan, strokes, PAD, "white");
  const { data } = scan.getImageData(0, 0, PAD, PAD);
  return normalise(data.filter((_, i) => i % 4 === 0), PAD, PAD);
}

function showPad() {
  const context = pad.getContext("2d");
  context.clearRect(0, 0, pad.width, pad.height);
  const colour = getComputedStyle(pad).color;
  if (sample) {
    const small = element("canvas");
    paint(small, sample.pixels, SIDE, SIDE, colour.match(/\d+/g).slice(0, 3).map(Number));
    context.drawImage(small, 0, 0, pad.width, pad.height);
  }
  ink(context, strokes, PAD, colour);
  $("undo").disabled = $("clear").disabled = !sample && strokes.length === 0;
  for (const button of document.querySelectorAll(".pg-samples button")) {
    button.setAttribute("aria-pressed", button.sample === sample);
  }
}

function changed() {
  showPad();
  digit = sample ? sample.pixels : readPad();
  answer();
}

function point(event) {
  const box = pad.getBoundingClientRect();
  const at = (value, start, size) => ((value - start) / size) * PAD;
  return [at(event.clientX, box.left, box.width), at(event.clientY, box.top, box.height)];
}

pad.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  event.preventDefault();
  pad.setPointerCapture(event.pointerId); // a line may leave the pad and come back
  if (sample) [sample, strokes] = [null, []];
  strokes.push([point(event)]);
  changed();
});
pad.addEventListener("pointermove", (event) => {
  if (!pad.hasPointerCapture(event.pointerId)) return;
  const events = event.getCoalescedEvents?.() ?? [];
  strokes.at(-1).push(...(events.length ? events : [event]).map(point));
  changed();
});
$("undo").addEventListener("click", () => {
  sample ? (sample = null) : strokes.pop();
  changed();
});
$("clear").addEventListener("click", () => {
  [sample, strokes] = [null, []];
  changed();
});

function addSamples(samples) {
  for (const { kind, label, wrong, of, pixels: text } of samples) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const own = { label, pixels: Float32Array.from(bytes, (v) => v / 255) };
    const name = kind === "clear" ? `Clear ${label}` : `Labelled ${label}; ${wrong} of ${of} wrong`;
    const canvas = element("canvas", { ariaHidden: "true" });
    paint(canvas, own.pixels, SIDE, SIDE);
    const button = element("button", { type: "button", title: name, ariaLabel: name }, canvas);
    button.sample = own;
    button.addEventListener("click", () => {
      [sample, strokes] = [own, []];
      changed();
    });
    $(`${kind}-ones`).append(button);
  }
  document.querySelector(".pg-samples").hidden = false;
}

// --- the models ----------------------------------------------------------------------------------

function addCard(model) {
  const bars = Array.from({ length: 10 }, (_, i) => element("i", {}, `${i}`));
  const card = element(
    "li",
    { className: "pg-card" },
    element("a", { href: `results.html#${model.name}`, textContent: model.name }),
    element("b", { className: "pg-reads", textContent: "·" }),
    element("div", { className: "pg-bars", ariaHidden: "true" }, ...bars),
    element("span", { className: "pg-sure" }),
    element("small", { className: "pg-time", textContent: "loading" }),
    element("small", { textContent: `${count.format(model.params)} parameters` }),
    element("small", { textContent: recorded(model) }),
  );
  $("models").append(card);
  return card;
}

function recorded({ mean, sd, n }) {
  const spread = sd === null ? "" : ` ± ${(100 * sd).toFixed(2)}`;
  return `error ${(100 * (1 - mean)).toFixed(2)}${spread}%, n\u00a0=\u00a0${n}`;
}

function showAnswer(model, output) {
  const { card } = model;
  const probabilities = softmax(output.logits);
  model.reads = winner(probabilities);
  model.typical = model.typical ? 0.8 * model.typical + 0.2 * output.ms : output.ms;
  const sure = probabilities[model.reads];
  card.querySelector(".pg-reads").textContent = model.reads;
  card.querySelector(".pg-sure").textContent =
    sure > 0.999 ? "over 99.9%" : `${(100 * sure).toFixed(1)}%`;
  card.querySelector(".pg-time").textContent = `${model.typical.toFixed(1)} ms`;
  card.querySelectorAll("i").forEach((bar, i) => {
    bar.style.setProperty("--p", probabilities[i]);
    bar.classList.toggle("pg-top-bar", i === model.reads);
  });
}

function showVerdict() {
  const told = models.filter(({ reads }) => reads !== undefined); // one may have come just now
  const votes = new Map();
  for (const { reads } of told) votes.set(reads, (votes.get(reads) ?? 0) + 1);
  const ranked = [...votes].sort((x, y) => y[1] - x[1]);
  const [first, most] = ranked[0];
  const others = ranked.slice(1).map(([read, n]) => `, ${n} ${n > 1 ? "read" : "reads"} ${a(read)}`);
  const label = sample ? ` Its label is ${sample.label}.` : "";
  $("digit").textContent = first;
  $("verdict").textContent =
    (most === told.length
      ? `All ${most} models read ${a(first)}.`
      : `${most} of ${told.length} models read ${a(first)}${others.join("")}.`) + label;
  for (const bar of document.querySelectorAll(".pg-votes")) {
    bar.replaceChildren(
      ...ranked.map(([read, n], i) => {
        const part = element("span", { textContent: read, className: i ? "pg-other" : "" });
        part.style.flexGrow = n;
        return part;
      }),
    );
  }
  for (const { card, reads } of told) card.classList.toggle("pg-differs", reads !== first);
}

function showPixels(pixels) {
  for (const id of ["seen", "spoilt"]) paint($(id), pixels, SIDE, SIDE);
}

function showNothing() {
  $("digit").textContent = "?";
  $("verdict").textContent = "Write a digit on the pad, or pick a sample.";
  for (const bar of document.querySelectorAll(".pg-votes")) bar.replaceChildren();
  $("maps").replaceChildren();
  $("rows").replaceChildren();
  $("strip-text").textContent = "";
  showPixels(new Float32Array(SIDE * SIDE));
  for (const model of models) {
    const { card } = model;
    model.reads = undefined;
    card.classList.remove("pg-differs");
    card.querySelector(".pg-reads").textContent = "·";
    card.querySelector(".pg-sure").textContent = "";
    card.querySelectorAll("i").forEach((bar) => bar.style.setProperty("--p", 0));
  }
}

const pause = (ms = 0) => new Promise((done) => setTimeout(done, ms));

let busy = false;

// Ask every model about the digit as it is now; again while it changes meanwhile.
async function answer() {
  wanted++;
  if (busy) return;
  busy = true;
  for (let done = -1; done !== wanted; ) {
    done = wanted;
    if (!digit) {
      showNothing();
      continue;
    }
    const pixels = distort(digit, settings);
    showPixels(pixels);
    for (const model of [...models]) {
      const output = await model.run(pixels);
      if (!digit) break; // cleared meanwhile
      showAnswer(model, output);
      if (model.name === $("which").value) lookInside(model, output, pixels);
      if (output.ms > 8) await pause(); // the pad comes first
    }
    if (digit && models.length) showVerdict();
    await pause();
  }
  busy = false;
  strips(wanted);
}

// --- inside --------------------------------------------------------------------------------------

const INSIDE = {
  attention: "How much of each patch reaches the answer, in orange (attention rollout).",
  reconstruction: "What the decoder draws from the winning capsule alone.",
  maps: "What leaves the first convolution, one picture a channel.",
};

function lookInside(model, output, pixels) {
  const kind = Object.keys(INSIDE).find((key) => output[key]);
  $("inside-text").textContent = INSIDE[kind];
  if (kind === "attention") overlay($("maps"), pixels, SIDE, output.attention);
  if (kind === "maps") maps($("maps"), output.maps);
  if (kind === "reconstruction") {
    const { data } = output.reconstruction;
    maps($("maps"), { data, dims: [1, 1, SIDE, SIDE] });
  }
}

function addInside(model) {
  if (!Object.keys(INSIDE).some((key) => model.extras.includes(key))) return;
  $("which").append(element("option", { textContent: model.name, value: model.name }));
  $("inside").hidden = false;
}

// --- break it ------------------------------------------------------------------------------------

function addSliders() {
  for (const [way, { none, min, max, step, text }] of Object.entries(WAYS)) {
    const slider = element("input", { type: "range", min, max, step, id: `pg-${way}` });
    const shown = element("output", { htmlFor: slider.id, textContent: text(none) });
    slider.value = none;
    slider.addEventListener("input", () => {
      settings[way] = Number(slider.value);
      shown.textContent = text(settings[way]);
      answer();
    });
    const label = element("label", { htmlFor: slider.id }, way);
    $("sliders").append(element("div", {}, label, slider, shown));
    $("way").append(element("option", { textContent: way, value: way }));
  }
  const reset = element("button", { type: "button", textContent: "Reset" });
  reset.addEventListener("click", () => {
    for (const [way, { none }] of Object.entries(WAYS)) {
      const slider = $(way);
      slider.value = none;
      slider.dispatchEvent(new Event("input"));
    }
  });
  $("sliders").append(reset);
}

// For each model, along the range of one way: where it still says what it should. What it should
// say is the label of a sample, or else what most models say of the digit as it was drawn.
async function strips(mine) {
  await pause(PATIENCE);
  if (mine !== wanted || !digit || !models.length) return;
  const way = $("way").value;
  const { none, min, max, text } = WAYS[way];
  const values = Array.from({ length: STEPS }, (_, i) => min + (i * (max - min)) / (STEPS - 1));
  const images = new Float32Array((STEPS + 1) * digit.length);
  [none, ...values].forEach((value, i) =>
    images.set(distort(digit, { [way]: value }), i * digit.length),
  );
  const rows = [];
  for (const model of [...models]) {
    const { logits } = await model.run(images);
    if (mine !== wanted) return;
    const reads = Array.from({ length: STEPS + 1 }, (_, i) => winner(softmax(logits, i)));
    rows.push({ name: model.name, reads });
    await pause();
    if (mine !== wanted) return;
  }
  const tally = (read) => rows.filter(({ reads }) => reads[0] === read).length;
  const most = rows.map(({ reads }) => reads[0]).sort((x, y) => tally(y) - tally(x))[0];
  const right = sample ? sample.label : most;
  for (const row of rows) {
    const far = values.filter((_, i) => row.reads[i + 1] !== right).map((v) => Math.abs(v - none));
    row.holds = row.reads[0] === right ? Math.min(...far, Infinity) : 0;
  }
  rows.sort((x, y) => x.holds - y.holds);
  $("strip-text").textContent =
    `From ${text(min)} to ${text(max)}: filled where a model reads ${a(right)}; ` +
    "else the digit that it reads. The first to fail is on top.";
  $("rows").replaceChildren(
    ...rows.map(({ name, reads, holds }) => {
      const says =
        holds === 0 ? "wrong as it is" : holds === Infinity ? "never fails" : `fails ${reach(way, holds)}`;
      const cells = reads.slice(1).map((read, i) => {
        const cell = element("i", { className: read === right ? "pg-holds" : "", title: text(values[i]) });
        if (read !== right) cell.textContent = read;
        return cell;
      });
      const strip = element("div", { className: "pg-strip", ariaHidden: "true" }, ...cells);
      return element("div", {}, element("span", {}, name), strip, element("small", {}, says));
    }),
  );
}

function reach(way, distance) {
  const { none, text } = WAYS[way];
  return way === "scale" ? `at × ${none} ± ${distance.toFixed(2)}` : `at ${text(distance)}`;
}

// --- start ---------------------------------------------------------------------------------------

function tell(text, progress = 0) {
  if ($("message").textContent !== text) $("message").textContent = text;
  $("progress").value = progress;
}

async function start() {
  addSliders();
  showNothing();
  showPad();
  $("which").addEventListener("change", answer);
  $("way").addEventListener("change", () => strips(wanted));
  new MutationObserver(showPad).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  const listed = await about();
  addSamples(listed.samples);
  const cards = listed.models.map(addCard);
  app.dataset.state = "loading";
  tell("Loading the runtime");
  const mega = (bytes) => (bytes / 1e6).toFixed(1);
  await load(
    listed,
    (n, all) => tell(`Loading the runtime: ${mega(n)} of ${mega(all)} MB`, (0.8 * n) / all),
    (model) => {
      model.card = cards[models.length - 1];
      model.card.querySelector(".pg-time").textContent = "ready";
      model.card.querySelector(".pg-sure").textContent = "";
      addInside(model);
      const [have, all] = [models.length, listed.models.length];
      tell(`Loading the models: ${have} of ${all}`, 0.8 + (0.2 * have) / all);
      if (digit) answer();
    },
  );
  app.dataset.state = "ready";
  tell("", 1);
}

start().catch((error) => {
  app.dataset.state = "failed";
  tell(
    `Not all models could be loaded. ${error.message} The playground needs a browser of 2023 or ` +
      "later, with WebAssembly, and the files of this site.",
  );
});
