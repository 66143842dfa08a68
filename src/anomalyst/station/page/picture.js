// The part and its nearest normal neighbour: map with opacity, outlines, zoom on both.
import { call, showPicture, withQuery } from "./api.js";
import { h } from "./dom.js";
import { stored } from "./state.js";

const SIDE = 1400;
const STRONG = 128; // the map's grey where it turns strong
// (value in units, red, green, blue, opacity): the ramp of the library's overlays.
const RAMP = [
  [0, 255, 236, 110, 0],
  [0.6, 255, 236, 110, 0],
  [0.85, 255, 224, 70, 0.12],
  [1, 255, 214, 30, 0.4],
  [1.4, 250, 140, 30, 0.52],
  [1.7, 226, 60, 70, 0.58],
  [2, 170, 0, 120, 0.64],
];
const FULL = 0.64;

let colours = null;

/** Colours by grey value, RGBA. */
function ramp() {
  if (colours) return colours;
  colours = new Uint8ClampedArray(256 * 4);
  for (let grey = 0; grey < 256; grey += 1) colours.set(colourOf((2 * grey) / 255), 4 * grey);
  return colours;
}

function colourOf(value) {
  const upper = Math.max(1, RAMP.findIndex((stop) => stop[0] >= value));
  const [from, to] = [RAMP[upper - 1], RAMP[upper]];
  const share = Math.min(1, Math.max(0, (value - from[0]) / (to[0] - from[0])));
  const mixed = from.map((low, k) => low + share * (to[k] - low));
  return [mixed[1], mixed[2], mixed[3], (255 * mixed[4]) / FULL];
}

/** Show a part; returns {element, dispose}. `nearest` puts the normal neighbour beside it. */
export function viewer(part, { nearest = true } = {}) {
  const stack = h("div.stack");
  const frame = h("div.frame", {}, stack);
  const ours = h("figure.pane", {}, frame, h("figcaption", {}, `This part: ${part.image}`));
  const panes = h("div.viewer", {}, ours);
  const tools = h("div.viewer-tools");
  const element = h("div", {}, panes, tools);
  if (!part.links.image) {
    frame.replaceChildren(h("p.absent", {}, part.error || "no picture was kept"));
    panes.classList.add("single");
    return { element, keys: {} };
  }
  const picture = h("img", { alt: `Picture of ${part.part_id || part.image}` });
  picture.addEventListener("error", () => frame.replaceChildren(h("p.absent", {}, "the picture could not be loaded")));
  const heat = h("canvas", { "aria-hidden": "true" });
  const lines = h("canvas", { "aria-hidden": "true" });
  stack.append(picture, heat, lines);
  fit(picture, frame);
  showPicture(picture, withQuery(part.links.image, { side: SIDE }));
  const frames = [frame];
  if (nearest && part.links.nearest) panes.append(neighbour(part, frames, panes));
  else panes.classList.add("single");
  const peak = { at: [0.5, 0.5] };
  drawMap(part, heat, lines, tools, peak);
  const keys = controls(tools, peak, heat, lines, frames);
  return { element, keys };
}

function neighbour(part, frames, panes) {
  const picture = h("img", { alt: "The nearest normal reference" });
  const frame = h("div.frame", {}, h("div.stack", {}, picture));
  const caption = h("figcaption", {}, "Nearest normal reference");
  if (part.similarity !== null) caption.append(` (similarity ${part.similarity.toFixed(3)})`);
  picture.addEventListener("error", () => {
    frame.replaceChildren(h("p.absent", {}, "No picture of a normal reference is here yet: decide some parts good."));
    panes.classList.add("without");
  });
  showPicture(picture, withQuery(part.links.nearest, { side: SIDE }));
  fit(picture, frame);
  frames.push(frame);
  return h("figure.pane", {}, frame, caption);
}

/** Give a frame its picture's shape, as large as there is room. */
function fit(picture, frame) {
  picture.addEventListener("load", () => {
    const ratio = picture.naturalWidth / picture.naturalHeight;
    frame.style.aspectRatio = String(ratio);
    picture.parentElement.style.width = `min(100%, ${ratio} * min(56vh, 40rem))`;
  });
}

async function drawMap(part, heat, lines, tools, peak) {
  if (!part.links.map) return;
  let grey;
  try {
    grey = await mapOf(part, 700);
  } catch (error) {
    if (error.name !== "AbortError") tools.append(h("p.hint", {}, `No map: ${error.message}`));
    return;
  }
  peak.at = highest(grey);
  paintHeat(heat, grey);
  paintLines(lines, grey);
}

async function mapOf(part, side) {
  const blob = await call(withQuery(part.links.map, { side }), { as: "blob" });
  return greyOf(await createImageBitmap(blob));
}

/** Where a part's map is highest, as shares of width and height; the middle where there is none. */
export async function peakOf(part) {
  try {
    return highest(await mapOf(part, 128));
  } catch {
    return [0.5, 0.5];
  }
}

function greyOf(image) {
  const canvas = h("canvas", { width: image.width, height: image.height });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0);
  const { data } = pen.getImageData(0, 0, image.width, image.height);
  const values = new Uint8Array(image.width * image.height);
  for (let k = 0; k < values.length; k += 1) values[k] = data[4 * k];
  return { values, width: image.width, height: image.height };
}

/** Where the map is highest, as shares of width and height. */
function highest({ values, width, height }) {
  let best = 0;
  for (let k = 1; k < values.length; k += 1) if (values[k] > values[best]) best = k;
  return [((best % width) + 0.5) / width, (Math.floor(best / width) + 0.5) / height];
}

function paintHeat(canvas, { values, width, height }) {
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  const table = ramp();
  for (let k = 0; k < values.length; k += 1) pixels.data.set(table.subarray(4 * values[k], 4 * values[k] + 4), 4 * k);
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** Outline where the map is strong: a white line on a dark one shows on every picture. */
function paintLines(canvas, { values, width, height }) {
  const scale = Math.max(1, Math.round(1400 / Math.max(width, height)));
  canvas.width = width * scale;
  canvas.height = height * scale;
  const strong = (x, y) => x >= 0 && y >= 0 && x < width && y < height && values[y * width + x] >= STRONG;
  const path = new Path2D();
  const edge = (x, y, dx, dy) => {
    path.moveTo(x * scale, y * scale);
    path.lineTo((x + dx) * scale, (y + dy) * scale);
  };
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      if (!strong(x, y)) continue;
      if (!strong(x, y - 1)) edge(x, y, 1, 0);
      if (!strong(x, y + 1)) edge(x, y + 1, 1, 0);
      if (!strong(x - 1, y)) edge(x, y, 0, 1);
      if (!strong(x + 1, y)) edge(x + 1, y, 0, 1);
    }
  }
  const pen = canvas.getContext("2d");
  const unit = Math.max(canvas.width, canvas.height) / 500;
  for (const [colour, thick] of [["#18181b", 4.5], ["#ffffff", 2.2]]) {
    Object.assign(pen, { strokeStyle: colour, lineWidth: thick * unit, lineCap: "square" });
    pen.stroke(path);
  }
}

/** Slider, outlines, zoom; returns what keys do. */
function controls(tools, peak, heat, lines, frames) {
  const wish = stored.get("picture", { opacity: 65, outlines: true });
  const output = h("output", {}, `${wish.opacity} %`);
  const slider = h("input", { type: "range", min: 0, max: 100, step: 5, "aria-label": "Map opacity" });
  slider.value = wish.opacity;
  const outlines = h("input", { type: "checkbox", checked: wish.outlines });
  const zoom = h("button", { type: "button", "aria-pressed": "false" }, "Zoom ", h("kbd", {}, "Z"));
  const apply = () => {
    heat.style.opacity = slider.value / 100;
    lines.hidden = !outlines.checked;
    output.textContent = `${slider.value} %`;
    stored.set("picture", { opacity: Number(slider.value), outlines: outlines.checked });
  };
  slider.addEventListener("input", apply);
  outlines.addEventListener("change", apply);
  const zoomed = zoomOf(frames, zoom, peak);
  tools.prepend(h("label.slider", {}, "Map", slider, output), h("label.check", {}, outlines, "Outlines"), zoom);
  apply();
  const flip = () => ((outlines.checked = !outlines.checked), apply());
  const peek = () => ((slider.value = Number(slider.value) ? 0 : 65), apply());
  return { m: peek, o: flip, z: () => zoomed() };
}

/** Zoom all frames at the same place: where the map is highest, or where it was clicked. */
function zoomOf(frames, button, peak) {
  let on = false;
  const toggle = (at = null) => {
    on = !on;
    button.setAttribute("aria-pressed", String(on));
    const place = at || peak.at;
    for (const frame of frames) {
      frame.classList.toggle("zoomed-in", on);
      const stack = frame.querySelector(".stack");
      if (!stack) continue;
      stack.style.transformOrigin = `${100 * place[0]}% ${100 * place[1]}%`;
      stack.style.transform = on ? "scale(3)" : "";
    }
  };
  button.addEventListener("click", () => toggle());
  for (const frame of frames) {
    frame.addEventListener("click", (event) => {
      const box = frame.querySelector(".stack")?.getBoundingClientRect();
      if (box) toggle([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]);
    });
  }
  return toggle;
}
